"""A search into a folder: progress on the screen, the picture found, what it cost, and the curve of it."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from visalign.files import write_whole
from visalign.images import images_to_pil

from . import Chain, Event, events_of, prepare
from .render import check_render, render
from .tree.picture import draw_tree, leaf_images, shown_leaves
from .tree.tree import Tree


@dataclass(frozen=True)
class Point:
    """Of a curve: calls spent, the best reward, results so far; and the method's state."""

    nfe: int
    best: float
    results: int
    state: Any


@dataclass(frozen=True)
class Finer:
    """A model of more steps, loaded when the search is over: one pipeline takes one generator at a time."""

    num_steps: int
    load: Callable[[], Any]


Trace = list[Point]


def search_prompts(
    generator: Any,
    prompts: list[str],
    reward: Callable,
    method: str,
    out: Path,
    details: dict[str, Any],
    finer: Finer | None = None,
    **options: Any,
) -> None:
    """Search for a picture of each prompt; writes NUMBER-best.png, search.json, search.png and a tree's picture.

    Ctrl-C ends the search of the prompt under way and those to come; what was found is written.

    Args:
        said: what else search.json should tell: model, LoRA, name of the reward.
        finer: if given, draws each winner's noise once more, into NUMBER-render.png; on top of the budget.
        options: of `visalign.search.run`.
    """
    chains = [prepare(generator, prompt, reward, method, **options) for prompt in prompts]  # all refusals first
    for chain in chains if finer else ():
        check_render(chain, method, finer.num_steps)  # type: ignore[union-attr]
    plain_options = {k: v for k, v in options.items() if isinstance(v, str | int | float | bool | None | list)}
    records: list[dict[str, Any]] = []
    with _stoppable() as stopped:
        for number, chain in enumerate(chains):
            trace: Trace = []
            try:
                follow(events_of(chain, method, options), chain, prompts[number], stopped, trace)
            finally:  # whatever went wrong, what was found is kept
                records.append(_record(chain, prompts[number], trace, bool(stopped), number, out))
                write_json(out / "search.json", {"method": method, **details, **plain_options, "searches": records})
                plot_traces(records, out / "search.png")
            if trace and isinstance(trace[-1].state, Tree):
                leaves = shown_leaves(trace[-1].state)
                figure = draw_tree(trace[-1].state, leaf_images(chain, trace[-1].state, leaves), title=chain.prompt)
                figure.savefig(out / f"{number:04d}-tree.png", dpi=100)
            if stopped:
                break
    if finer is not None:
        model = finer.load()
        for number, (chain, record) in enumerate(zip(chains, records)):
            record["render"] = _render(chain, model, number, out) if chain.best is not None else None
        write_json(out / "search.json", {"method": method, **details, **plain_options, "searches": records})


def _render(chain: Chain, model: Any, number: int, out: Path) -> dict[str, Any]:
    best, ledger = render(chain, model)
    path = out / f"{number:04d}-render.png"
    images_to_pil(best.image)[0].save(path)
    print(f"{path}  {best.reward:.4f}  (its noise in {ledger.nfe} steps)")
    return {"reward": best.reward, "file": path.name, "ledger": ledger.to_dict()}


def follow(events: Iterable[Event], chain: Chain, label: str, stopped: list[int], trace: Trace) -> None:
    """Show a search's progress until it ends or is stopped; each event with a result is added to the trace."""
    results = 0
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} calls"),
    )
    clock = (TextColumn("best {task.fields[best]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *clock, console=Console(stderr=True)) as progress:
        task = progress.add_task(label[:40], total=chain.ledger.max_nfe, best="-")
        for event in events:
            results += len(event.rewards)
            if event.best is not None:
                trace.append(Point(event.nfe, event.best.reward, results, event.state))
            best = f"{event.best.reward:.4f}" if event.best is not None else "-"
            progress.update(task, completed=event.nfe, best=best)
            if stopped:
                break


def _record(chain: Chain, prompt: str, trace: Trace, stopped: bool, number: int, out: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": prompt, "stopped": stopped, "ledger": chain.ledger.to_dict()}
    record |= {"transition": repr(chain.transition), "best": None}
    record["trace"] = [[point.nfe, point.best, point.results] for point in trace]
    if chain.best is not None:
        path = out / f"{number:04d}-best.png"
        images_to_pil(chain.best.image)[0].save(path)
        record["best"] = {"reward": chain.best.reward, "entity": chain.best.entity, "file": path.name}
        print(f"{path}  {chain.best.reward:.4f}  ({chain.ledger.nfe} denoiser calls{', stopped' if stopped else ''})")
    else:
        print(f"{prompt!r}: ended before the first picture was finished")
    return record


def plot_traces(records: list[dict[str, Any]], path: Path) -> None:
    """Best reward over denoiser calls, a line a prompt, whose words are taken as they are."""
    with plt.rc_context({"text.parse_math": False}):
        _plot_traces(records, path)


def _plot_traces(records: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for record in records:
        if record["trace"]:
            spent, best, _ = zip(*record["trace"])
            axis.step(
                spent, best, where="post", marker="." if len(spent) < 60 else None, label=f" {record['prompt'][:50]}"
            )
    axis.set_xlabel("denoiser calls (NFE)")
    axis.set_ylabel("best reward so far")
    axis.grid(alpha=0.3)
    if 0 < len(records) <= 12:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, UTF-8."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Within, the first Ctrl-C is noted in the list; a second one ends the program."""
    stopped: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nobody presses keys here
        yield stopped
        return
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
