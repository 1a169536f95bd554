"""Long work of a page: who waits, how far it is, and being told to stop; each visitor's apart from the others'."""

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The visitor has pressed Stop."""


@dataclass(frozen=True)
class Report:
    """How far a job is: words, and a share in [0, 1] if it is known; or something to show."""

    words: str
    share: float | None = None
    show: Any = None


@dataclass
class Job:
    """One piece of work. `report` and `check` are called by the one that works, `stop` by anybody."""

    reports: "queue.SimpleQueue[Report]" = field(default_factory=queue.SimpleQueue)
    halt: threading.Event = field(default_factory=threading.Event)
    chain: Any = None  # of a search
    problem: str = ""  # why it cannot begin, for the page
    result: Any = None  # how things stand, for what looks at them meanwhile and afterwards
    facts: dict[str, Any] = field(default_factory=dict)  # what a file of the result says

    def stop(self) -> None:
        self.halt.set()

    def check(self) -> None:
        """Raise Stopped once the job is to stop."""
        if self.halt.is_set():
            raise Stopped

    def report(self, words: str, share: float | None = None, show: Any = None) -> None:
        self.reports.put(Report(words, share, show))


class Jobs:
    """The jobs of all visitors, by session and tab. A new one takes the place of the old one, which stops."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], Job] = {}
        self._waiting: list[Job] = []
        self._lock = threading.Lock()

    def begin(self, session: str, tab: str) -> int:
        """Put a job into the queue; returns how many are before it."""
        key = (session, tab)
        with self._lock:
            if key in self._jobs:
                self._jobs[key].stop()
                self._leave(self._jobs[key])
            self._jobs[key] = Job()
            self._waiting.append(self._jobs[key])
            return len(self._waiting) - 1

    def take(self, session: str, tab: str) -> Job:
        """The job that was begun."""
        with self._lock:
            return self._jobs.setdefault((session, tab), Job())

    def end(self, job: Job) -> None:
        with self._lock:
            self._leave(job)

    def stop(self, session: str, tab: str) -> None:
        """Tell a job to stop, whether it waits or works; nothing happens without one."""
        with self._lock:
            job = self._jobs.get((session, tab))
        if job is not None:
            job.stop()
            job.report("Stopping.")

    def forget(self, session: str) -> None:
        """Stop and drop all of a visitor who has left."""
        with self._lock:
            own = [key for key in self._jobs if key[0] == session]
            for key in own:
                job = self._jobs.pop(key)
                job.stop()
                self._leave(job)

    def _leave(self, job: Job) -> None:
        self._waiting = [other for other in self._waiting if other is not job]


def follow(job: Job, work: Callable[[], T], every: float = 0.25) -> Generator[Report, None, T]:
    """Do the work in a thread of its own and yield how far it is, at most every so many seconds.

    A generator whose value (`yield from`) is what the work returns; what it raises comes out of here. Closing it stops
    the job and waits for the thread.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, work()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(every)
            latest = _drain(job)
            if latest is not None:
                yield latest
    finally:
        if thread.is_alive():
            job.stop()
            thread.join()
    done, value = outcome
    if not done:
        raise value
    return value


def _drain(job: Job) -> Report | None:
    """The newest report; what an older one had to show is kept if the newest has nothing."""
    latest: Report | None = None
    while True:
        try:
            report = job.reports.get_nowait()
        except queue.Empty:
            return latest
        show = report.show if report.show is not None or latest is None else latest.show
        latest = Report(report.words, report.share, show)
