"""Search: watch one work, look into it, and stop it when the best so far is good enough."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from visalign.demos.files import new_folder, png_info, to_download
from visalign.demos.jobs import Job, follow
from visalign.demos.markup import figure, note, status
from visalign.demos.page import HIDDEN, Page, Updates, guarded, work
from visalign.demos.plots import search_curve_html
from visalign.demos.requests import MOST_BUDGET, MOST_STEPS, DrawRequest, Side
from visalign.demos.settings import MAX_PROMPT
from visalign.images import images_to_pil
from visalign.search import METHODS, Best
from visalign.search.session import write_json

from .search_view import CLICK, View, Viewer

OFFERED = tuple(name for name in METHODS if name not in ("refine", "enhance"))  # those need a critic or a rewriter
EVERY = 0.5  # seconds between views


@dataclass
class Standing:
    """How a search stands, for the page: the curve, the view, the best."""

    points: list[tuple[int, float]]
    view: View
    best: Best | None
    nfe: int


def search_tab(page: Page) -> None:
    """Build the tab."""
    session = page.session
    start = "a red star above a blue circle" if page.settings.shapes else "a photo of a cat"
    prompt = gr.Textbox(start, label="Prompt", max_length=MAX_PROMPT, elem_id="search-prompt")
    with gr.Row():
        go = gr.Button("Search", variant="primary", scale=1, min_width=110, elem_id="search-go")
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="search-stop")
    with gr.Row():
        method = gr.Dropdown(list(OFFERED), value="dts-star", label="Search", info=METHODS["dts-star"].summary)
        reward = gr.Dropdown(list(session.specs), label="For the reward")
        budget = gr.Slider(10, MOST_BUDGET, 200, step=10, label="Denoiser calls", elem_id="search-budget")
    with gr.Accordion("Settings", open=False), gr.Row():
        weights = gr.Dropdown(session.variant_names, label="Weights")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        steps = gr.Slider(1, MOST_STEPS, session.own_steps, step=1, label="Steps a picture")
    status_box = gr.HTML(status("Ready."), elem_id="search-status")
    with gr.Row():
        with gr.Column(min_width=300):
            best = gr.HTML(elem_id="search-best")
            curve = gr.HTML(elem_id="search-curve")
        with gr.Column(min_width=300, scale=2):
            inside = gr.HTML(elem_id="search-inside", js_on_load=CLICK)
            picked = gr.HTML(elem_id="search-picked", elem_classes="va-small")
    with gr.Row():
        save = gr.Button("Save the best", elem_id="search-save")
        file = gr.DownloadButton("Picture (PNG)", visible=False, elem_id="search-png")

    def run(
        job: Job, text_in: str, name: str, reward: str, budget: float, weights: str, seed: Any, steps: float
    ) -> Iterator[Updates]:
        wish = DrawRequest(text_in or "", int(seed or 0), 1, int(steps), session.own_guidance)
        yield {picked: note("Click a picture or a node to look at it."), file: gr.update(visible=False)}
        search = follow(job, lambda: _search(page, job, wish, name, reward, int(budget), weights))
        for report in search:
            standing: Standing | None = report.show
            view = {} if standing is None else _shown(standing, reward, int(budget))
            yield {status_box: status(report.words, report.share, busy=True), **view}
        if (standing := job.result) is None or standing.best is None:
            yield {status_box: status("Ended before the first picture was finished.")}
            return
        end = "Stopped; the best is kept." if job.halt.is_set() else "Done."
        job.facts = {"prompt": wish.prompt, "seed": wish.seed, "steps": wish.steps, "search": name}
        job.facts |= {"reward": reward, "budget": int(budget), "weights": weights, "value": standing.best.reward}
        job.facts |= {"nfe": standing.nfe, "curve": standing.points}
        yield {status_box: status(f"{end} {standing.nfe} denoiser calls."), **_shown(standing, reward, int(budget))}

    def _shown(standing: Standing, reward: str, budget: int) -> Updates:
        best_html = note("Nothing is finished yet.")
        if standing.best is not None:
            words = f"Best so far: {reward} {standing.best.reward:.4f}"
            best_html = figure(images_to_pil(standing.best.image)[0], words, words)
        return {
            best: best_html,
            curve: search_curve_html(standing.points, budget, reward),
            inside: standing.view.html,
        }

    def pick(request: gr.Request, event: gr.EventData) -> str:
        job = page.jobs.take(request.session_hash or "", "search")
        node = str((event._data or {}).get("node", "")) if isinstance(event._data, dict) else ""
        if job.result is None or node not in job.result.view.nodes:
            return note("That one is not on the page any more.")
        picture, words = job.result.view.nodes[node]
        return figure(picture, words, words)

    def keep(session: str) -> Updates:
        job = page.jobs.take(session, "search")
        if job.result is None or job.result.best is None or not job.facts:
            raise ValueError("there is nothing to save yet: press Search first")
        path = _save(page, job)
        return {status_box: status(f"Saved in {path.parent}."), file: gr.update(value=to_download(path), visible=True)}

    inputs = [prompt, method, reward, budget, weights, seed, steps]
    outputs = [best, curve, inside, picked, file]
    triggers = [go.click, prompt.submit]
    work(
        page, "search", run, triggers=triggers, inputs=inputs, outputs=outputs, go=go, stop=stop, status_box=status_box
    )
    inside.click(pick, None, picked, **HIDDEN)
    save.click(guarded(keep, status_box), None, [file, status_box], **HIDDEN)
    method.change(lambda name: gr.update(info=METHODS[name].summary), method, method, queue=False, **HIDDEN)


def _search(page: Page, job: Job, wish: DrawRequest, name: str, reward: str, budget: int, weights: str) -> None:
    """The search to its end or until the job is stopped; `job.result` is how it stands, always."""
    if name not in OFFERED:
        raise ValueError(f"search: got {name!r}, expected one of {list(OFFERED)}")
    session, standing = page.session, Standing([], View(), None, 0)
    viewer: Viewer | None = None
    with session.at_work(wish, Side(weights), job) as generator:
        before = 0.0
        for event in session.search(generator, name, reward, wish.prompt, wish.seed, budget, job):
            viewer = viewer or Viewer(job.chain)
            points = [*standing.points, *([(event.nfe, event.best.reward)] if event.best else [])]
            standing = Standing(points, standing.view, event.best, event.nfe)
            last = event
            if time.monotonic() - before >= EVERY:
                standing.view = viewer.view(event, standing.view)
                before, job.result = time.monotonic(), standing
                words = f"{event.nfe} of {budget} denoiser calls{f', {event.note}' if event.note else ''}"
                job.report(words, event.nfe / budget, standing)
        if viewer is not None:
            standing.view = viewer.view(last, standing.view)
    job.result = standing


def _save(page: Page, job: Job) -> Any:
    """best.png with the facts in its text, and search.json, in a new folder."""
    folder = new_folder(page.settings.out / "searches")
    picture = images_to_pil(job.result.best.image)[0]
    picture.save(folder / "best.png", pnginfo=png_info(job.facts, job.facts["prompt"], job.facts["seed"]))
    write_json(folder / "search.json", job.facts)
    return folder / "best.png"
