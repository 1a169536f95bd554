"""`visalign serve`: a reward over HTTP."""

import argparse

from .options import read_option


def add_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--reward", default="clip", help="as for score")
    serve.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the reward; repeatable")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; others than loopback need a token")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--token", help="that clients must send; better in VISALIGN_TOKEN, which other users cannot see")
    serve.add_argument("--max-bytes", type=int, default=256 * 2**20, help="largest request")
    serve.add_argument("--max-batch", type=int, default=64, help="pictures of several requests scored together")


def run(arguments: argparse.Namespace) -> None:
    """Serve until stopped."""
    import json
    import os

    from visalign.rewards import make_reward, parse_spec
    from visalign.rewards.urls import is_loopback

    try:
        from visalign.serving.server import Limits, make_app, open_socket, serve
    except ImportError as error:
        raise ValueError(f"{error}; the server needs the packages of pip install 'visalign[remote]'") from None
    if not 0 <= arguments.port <= 65535:
        raise ValueError(f"port: got {arguments.port}, expected 0 .. 65535")
    options = dict(read_option(text) for text in arguments.option)
    limits = Limits(max_bytes=arguments.max_bytes, max_batch=arguments.max_batch)
    token = arguments.token or os.environ.get("VISALIGN_TOKEN") or None
    parse_spec(arguments.reward, **options)
    with open_socket(arguments.host, arguments.port, token) as listening:
        reward = make_reward(arguments.reward, **options)
        spec = f"{arguments.reward} {json.dumps(options, sort_keys=True)}" if options else arguments.reward
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"serving {arguments.reward} at http://{host}:{listening.getsockname()[1]}", flush=True)
        hosts = ["localhost", "127.0.0.1", "[::1]", host] if is_loopback(arguments.host) else None
        serve(make_app(reward, spec, token, limits, hosts), listening)
