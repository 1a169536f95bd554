"""What the tabs share: the model session, everybody's jobs, and how long work is wired to buttons."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import torch

from .jobs import Jobs, Stopped
from .markup import problem, status
from .model_session import ModelSession
from .settings import Settings

Updates = dict[Any, Any]  # component: its new value, or an update of it
HIDDEN = dict(api_visibility="private", show_progress="hidden")  # of events that nobody waits for


@dataclass
class Page:
    settings: Settings
    session: ModelSession
    jobs: Jobs = field(default_factory=Jobs)


def sentence(error: BaseException) -> str:
    """What went wrong in words for the page; what cannot be told says where to look."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return "Out of memory. Draw fewer pictures at once, choose a smaller model, or close what else uses the memory."
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    return f"Something went wrong that was not foreseen ({type(error).__name__}); the terminal has the details."


def telling(error: Exception) -> str:
    """The sentence as HTML; what was not foreseen is also written to the terminal."""
    if not isinstance(error, ValueError | OSError | MemoryError | torch.cuda.OutOfMemoryError):
        import traceback

        traceback.print_exception(error)
    return problem(sentence(error))


def guarded(handler: Callable[..., Updates], status_box: Any) -> Callable[..., Updates]:
    """A handler of short work that returns updates; an error becomes a sentence in `status_box`."""

    def run(request: gr.Request, *values: Any) -> Updates:
        try:
            return handler(request.session_hash or "", *values)
        except Exception as error:
            return {status_box: telling(error)}

    return run


def work(
    page: Page,
    tab: str,
    handler: Callable[..., Iterator[Updates]],
    *,
    triggers: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    go: Any,
    stop: Any,
    status_box: Any,
    listen: bool = True,
    freeze: Sequence[Any] = (),
    before: Callable[..., Updates] | None = None,
) -> Any:
    """Wire long work: a place in the queue at once, then the handler's updates, and Stop at any time.

    Args:
        handler: (job, *values of the inputs) -> updates of outputs and of `status_box`, as they come. What it raises is
            told as a sentence; Stopped is not an error.
        triggers: events that begin it; `go` is the button that cannot be pressed meanwhile.
        listen: whether `stop` is wired here; once a tab.
        freeze: buttons beside `go` that cannot be pressed from the start; the handler's updates free them.
        before: what is done at once, ahead of the queue: (*values of the inputs) -> updates; if it raises, no work.
    """

    def begin(request: gr.Request, *values: Any) -> Updates:
        session = request.session_hash or ""
        ahead = page.jobs.begin(session, tab)
        words = f"In the queue, {ahead} before you." if ahead else "Starting."
        begun: Updates = {status_box: status(words, busy=True), stop: gr.update(interactive=True)}
        begun |= {button: gr.update(interactive=False) for button in (go, *freeze)}
        try:
            return begun | (before(*values) if before else {})
        except Exception as error:
            page.jobs.take(session, tab).problem = telling(error)
            return begun

    def run(request: gr.Request, *values: Any) -> Iterator[Updates]:
        session = request.session_hash or ""
        job = page.jobs.take(session, tab)
        done: Updates = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        try:
            job.check()
            if job.problem:
                done[status_box] = job.problem
            else:
                yield from handler(job, *values)
        except Stopped:
            done[status_box] = status("Stopped.")
        except Exception as error:
            done[status_box] = telling(error)
        finally:
            page.jobs.end(job)
        yield done

    def halt(request: gr.Request) -> None:  # says nothing itself: its answer could come after the work's last word
        page.jobs.stop(request.session_hash or "", tab)

    begun = gr.on(triggers, begin, list(inputs), [*outputs, status_box, stop, go, *freeze], queue=False, **HIDDEN)
    if listen:
        stop.click(halt, None, None, queue=False, **HIDDEN)
    return begun.then(
        run,
        list(inputs),
        [*outputs, status_box, go, stop],
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="hidden",
        api_visibility="private",
    )
