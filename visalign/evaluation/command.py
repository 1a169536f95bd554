"""`visalign eval`: plan, draw, score, table. Each process does its share; the first one writes the table."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from visalign.search.session import write_json

from .drawing import check_searched, draw, missing_units
from .judging import Judge, judge, missing_batches
from .page import write_page
from .plan import Plan, make_plan
from .record import lines, to_record
from .results import Results, collect
from .store import Store

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # that processes which are done wait for the others


def evaluate(arguments: argparse.Namespace) -> None:
    """What `visalign eval` does, as the parsed options say."""
    state = PartialState(cpu=arguments.device == "cpu", timeout=PATIENCE)
    plan = make_plan(
        arguments.contestant,
        arguments.prompts,
        arguments.reward,
        arguments.out,
        seeds=arguments.seeds,
        seed=arguments.seed,
        gold=not arguments.no_gold,
        batch_size=arguments.batch_size,
        dtype="float32" if state.device.type == "cpu" else "bfloat16",
    )
    try:
        results = run(plan, state)
    except KeyboardInterrupt:
        print("visalign eval: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
    if state.is_main_process:
        record = to_record(results)
        write_json(plan.out / "eval.json", record)
        page = write_page(results, record, Store(plan.out))
        print("\n".join([*lines(record), f"{plan.out / 'eval.json'}  {page}"]))


def run(plan: Plan, state: PartialState) -> Results:
    """Draw and score what is not there yet, this process its share; returns all, once all processes are done.

    Raises:
        ValueError: a reward or a model that turns out not to work; what was finished is kept.
    """
    store = Store(plan.out, state.process_index)
    judges, searched = load_judges(plan, state.device)
    units = missing_units(plan, store)
    whole = len(set(plan.keys)) * len(plan.tasks)
    _say(state, f"{whole} pictures, {whole - sum(len(unit.tasks) for unit in units)} of them there already")
    local = _share(units, state)
    with _progress(state, "drawing", sum(len(unit.tasks) for unit in local)) as advance:
        draw(local, plan, store, searched, state.device, advance)
    state.wait_for_everyone()
    batches = _share(missing_batches(plan, store), state)
    with _progress(state, "scoring", sum(len(batch.pictures) for batch in batches)) as advance:
        judge(batches, store, judges, advance)
    state.wait_for_everyone()
    return collect(plan, store)


def load_judges(plan: Plan, device: torch.device) -> tuple[dict[str, Judge], dict[str, Judge]]:
    """The rewards by column, and those of searches by spec, before anything is drawn.

    Raises:
        ValueError: one that cannot be loaded, or does not do for its search.
    """
    judges = {column.label: Judge(column.spec, device, plan.context, **column.options) for column in plan.columns}
    searched = {column.spec: judges[column.label] for column in plan.columns if not column.options}
    for contestant in plan.contestants:
        if contestant.search is not None and contestant.reward is not None:
            if contestant.reward not in searched:
                searched[contestant.reward] = Judge(contestant.reward, device, plan.context)
            check_searched(contestant, searched[contestant.reward])
    return judges, searched


def _share(work: Sequence[T], state: PartialState) -> Sequence[T]:
    """This process's part of the work. None begins before all have read what there is to do: they read it alike."""
    state.wait_for_everyone()
    return work[state.process_index :: state.num_processes]


def _say(state: PartialState, text: str) -> None:
    if state.is_main_process:
        Console(stderr=True).print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def _progress(state: PartialState, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar of the main process's share, on a terminal."""
    console = Console(stderr=True)
    title_column, note_column = (TextColumn(t, markup=False) for t in ("{task.description}", "{task.fields[note]}"))
    columns = (title_column, BarColumn(), MofNCompleteColumn(), note_column)
    show = state.is_main_process and console.is_terminal and total > 0
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not show) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda count, note: progress.update(task, advance=count, note=note)
