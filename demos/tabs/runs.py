"""Runs: curves, sample grids and findings of trainings, also of one that is still going; several on one plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from visalign.demos.files import read_picture, run_folder, run_names, sample_files
from visalign.demos.markup import figure, note, status, table
from visalign.demos.page import HIDDEN, Page, Updates, guarded
from visalign.demos.plots import curves_html
from visalign.training.run.folder import read_metrics

CURVES = {  # what a plot shows: the numbers of metrics.jsonl in it, each drawn if a run has it
    "reward": ("reward_mean", "eval_reward"),
    "gold": ("eval_gold_strict", "monitor_watched_gold_strict", "monitor_watched_gold"),
    "KL": ("kl", "approx_kl"),
    "diversity": ("monitor_diversity_vendi", "monitor_diversity_cosine"),
    "memory (GB)": ("peak_memory_bytes",),
    "gradient norm": ("grad_norm",),
}
SHOWN = ("reward", "gold", "KL", "diversity", "memory (GB)")
MOST_RUNS = 6
FOLLOW = 3.0  # seconds


def runs_tab(page: Page, opened: gr.Tab) -> None:
    """Build the tab, over the run folders of `settings.runs`."""
    root = page.settings.runs
    names = run_names(root)
    with gr.Row():
        chosen = gr.Dropdown(
            names,
            value=names[:1],
            multiselect=True,
            max_choices=MOST_RUNS,
            label="Runs",
            scale=4,
            elem_id="runs-chosen",
        )
        again = gr.Button("Look again", scale=1, min_width=110, elem_id="runs-again")
        follow = gr.Checkbox(False, label="Follow a run under way", scale=1, min_width=150, elem_id="runs-follow")
    plots = gr.CheckboxGroup(list(CURVES), value=list(SHOWN), label="Curves")
    status_box = gr.HTML(status("" if names else f"There are no runs in {root} yet."), elem_id="runs-status")
    plot_box = gr.HTML(elem_id="runs-curves")
    with gr.Row():
        whose = gr.Dropdown(names[:1], value=names[0] if names else None, label="Samples of")
        step = gr.Slider(0, 1, 0, step=1, label="Sample grid, from before to after", elem_id="runs-step")
    grid = gr.HTML(elem_id="runs-grid")
    timer = gr.Timer(FOLLOW, active=False)
    seen = gr.State(None)

    def look(_session: str, wanted: list[str] | None, plots: list[str], whose: str | None, at: float) -> Updates:
        known = run_names(root)
        wanted = [name for name in wanted or known[:1] if name in known]
        if not wanted:
            return {
                chosen: gr.update(choices=known),
                status_box: status(f"There are no runs in {root} yet."),
                plot_box: "",
            }
        whose = whose if whose in wanted else wanted[0]
        folders = {name: run_folder(root, name) for name in wanted}
        return {
            chosen: gr.update(choices=known, value=wanted),
            whose_box: gr.update(choices=wanted, value=whose),
            plot_box: runs_html(folders, plots),
            status_box: status(f"{len(known)} runs in {root}."),
            seen: _stamp(root, wanted),
            **show_grid(_session, whose, at),
        }

    def show_grid(_session: str, whose: str | None, at: float) -> Updates:
        files = sample_files(run_folder(root, whose)) if whose else []
        if not files:
            return {grid: note("This run has no sample grids yet."), step: gr.update(maximum=1, value=0)}
        place = min(int(at), len(files) - 1)
        file, words = files[place], f"{files[place].stem} ({place + 1} of {len(files)})"
        plot_box = figure(read_picture(file), f"Sample grid of {whose}: {words}", words, wide=True)
        return {grid: plot_box, step: gr.update(maximum=max(len(files) - 1, 1), value=place)}

    def tick(session: str, stamp: Any, wanted: list[str], plots: list[str], whose: str | None, at: float) -> Updates:
        if not wanted or stamp == _stamp(root, wanted):
            return {status_box: gr.skip()}
        return look(session, wanted, plots, whose, at)

    whose_box = whose
    inputs, outputs = [chosen, plots, whose, step], [chosen, whose, plot_box, status_box, seen, grid, step]
    for event in (opened.select, again.click, chosen.input, plots.input):
        event(guarded(look, status_box), inputs, outputs, **HIDDEN)
    for event in (step.release, whose.input):
        event(guarded(show_grid, status_box), [whose, step], [grid, step, status_box], **HIDDEN)
    timer.tick(guarded(tick, status_box), [seen, *inputs], outputs, **HIDDEN)
    follow.change(lambda on: gr.Timer(FOLLOW, active=on), follow, timer, **HIDDEN)


def _stamp(root: Path, names: Sequence[str]) -> list[tuple[float, int]]:
    """Changes when a run has written something."""
    stats = [(run_folder(root, name) / "metrics.jsonl").stat() for name in names if name in run_names(root)]
    return [(stat.st_mtime, stat.st_size) for stat in stats]


def runs_html(folders: dict[str, Path], plots: Sequence[str]) -> str:
    """Curves of all runs on common axes, what the hacking watch found in each, and each one's latest numbers."""
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    curves = "".join(curves_html(plot, CURVES[plot], metrics) for plot in plots if plot in CURVES)
    rows = []
    for name, lines in metrics.items():
        latest: dict[str, Any] = {}
        for line in lines:
            latest |= {key: value for key, value in line.items() if value is not None}
        numbers = [latest.get(key) for key in ("reward_mean", "eval_reward", "eval_gold_strict")]
        rows.append([name, latest.get("step", 0), *("–" if n is None else f"{n:.4f}" for n in numbers)])
    head = ("run", "step", "reward", "held-out reward", "held-out gold")
    return f'<div class="va-plots">{curves}</div>' + table("Latest", head, rows, (1, 2, 3, 4)) + findings_html(metrics)


def findings_html(metrics: dict[str, list[dict[str, Any]]]) -> str:
    """What the hacking watch found, run by run."""
    rows = [
        (name, line["step"], finding)
        for name, lines in metrics.items()
        for line in lines
        for finding in line.get("findings", [])
    ]
    if not rows:
        return note("The hacking watch found nothing.")
    return table("What the hacking watch found", ("run", "step", "finding"), rows, (1,))
