"""A real HTTP server for tests: any ASGI application by uvicorn, in a thread, on a free port of the loopback."""

import socket
import threading
import time

import uvicorn


class LiveServer:
    """Runs `app` while in use as a context; `port` may be one that a server before it had."""

    def __init__(self, app, port: int = 0) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self, brutally: bool = False) -> None:
        """End it; brutally drops the requests under way, as a kill would."""
        self._server.should_exit, self._server.force_exit = True, brutally
        self._thread.join(30)
        self._socket.close()


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
