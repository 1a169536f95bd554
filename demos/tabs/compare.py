"""Compare: the same prompt and seeds drawn in two ways, scored, and what the judge reads in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from visalign.demos.files import save_comparison, side_by_side, to_download
from visalign.demos.jobs import Job, Stopped, follow
from visalign.demos.markup import bars, details, figure, note, reading_of, status
from visalign.demos.page import HIDDEN, Page, Updates, guarded, work
from visalign.demos.requests import (
    BASE,
    MOST_BUDGET,
    MOST_PICTURES,
    MOST_STEPS,
    PLAIN,
    SEARCHES,
    DrawRequest,
    Reading,
    Side,
)
from visalign.demos.settings import MAX_PROMPT
from visalign.images import images_to_pil
from visalign.worlds import world

Readings = dict[str, list[Reading]]


@dataclass
class Comparison:
    """What was drawn and scored; a side that was stopped has no pictures."""

    asked: DrawRequest
    sides: tuple[Side, Side]
    images: list[Tensor] = field(default_factory=list)
    readings: list[Readings] = field(default_factory=list)

    def pictures(self, k: int) -> list[Image.Image]:
        return images_to_pil(self.images[k]) if k < len(self.images) else []

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as JSON can hold it, without the pictures."""
        request = self.asked
        names = ("left", "right")
        return {
            "prompt": request.prompt,
            "seeds": request.seeds,
            "steps": request.steps,
            "guidance": request.guidance,
            **{name: vars(side) for name, side in zip(names, self.sides)},
            "rewards": {
                name: {reward: [r.score for r in values] for reward, values in readings.items()}
                for name, readings in zip(names, self.readings)
            },
        }


def compare_tab(page: Page, blocks: gr.Blocks) -> None:
    """Build the tab; the first pair is drawn as the page opens."""
    session = page.session
    default = "two red circles" if page.settings.shapes else "a photo of a cat"
    prompt = gr.Textbox(default, label="Prompt", max_length=MAX_PROMPT, lines=1, elem_id="compare-prompt")
    with gr.Row():
        go = gr.Button("Draw both", variant="primary", scale=1, min_width=110, elem_id="compare-go")
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="compare-stop")
    status_box = gr.HTML(status("Ready."), elem_id="compare-status")
    with gr.Row():
        with gr.Column(scale=2, min_width=280, elem_classes="va-controls"):
            left = _side_controls(page, "Left", BASE)
            right = _side_controls(page, "Right", next(iter(session.offered), BASE))
            chosen = gr.CheckboxGroup(list(session.specs), value=list(session.specs)[:2], label="Rewards shown")
            boxes = gr.Checkbox(True, label="Show what the judge reads", visible=page.settings.shapes)
            with gr.Accordion("Settings", open=False):
                seed = gr.Number(0, label="Seed, same on both sides", precision=0, minimum=0)
                count = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures a side")
                steps = gr.Slider(1, MOST_STEPS, session.own_steps, step=1, label="Steps")
                start = session.own_guidance if session.own_guidance is not None else 5.0
                guidance = gr.Slider(1, 15, start, step=0.5, label="Guidance", visible=session.guided)
                budget = gr.Slider(10, MOST_BUDGET, 100, step=10, label="Denoiser calls of a search, a picture")
                sought = gr.Dropdown(list(session.specs), label="What a search is for")
        with gr.Column(scale=3, min_width=320):
            pictures_box = gr.HTML(elem_id="compare-pictures")
            chart = gr.HTML(elem_id="compare-rewards")
            with gr.Accordion("Slide one over the other", open=False):
                slider = gr.ImageSlider(label="First pair", format="png", interactive=False, max_height=420)
            with gr.Row():
                save = gr.Button("Save this comparison", elem_id="compare-save")
                picture_file = gr.DownloadButton("Picture (PNG)", visible=False, elem_id="compare-png")
                notes_file = gr.DownloadButton("Notes (JSON)", visible=False, elem_id="compare-json")
    latest = gr.State(None, time_to_live=6 * 3600)

    def draw(job: Job, *values: Any) -> Iterator[Updates]:
        words, seed, count, steps, guidance, budget, sought, names, with_boxes, *sides = values
        request = DrawRequest(words or "", int(seed or 0), int(count), int(steps), guidance if session.guided else None)
        both = tuple(_side(sides[3 * k : 3 * k + 3], int(budget), sought) for k in (0, 1))
        made = Comparison(request, both)  # type: ignore[arg-type]
        yield {picture_file: gr.update(visible=False), notes_file: gr.update(visible=False)}
        for k, name in enumerate(("left", "right")):
            try:
                for report in (drawing := _Following(job, session, both[k], request)):
                    yield {status_box: status(f"{name}: {report.words}", report.share, busy=True)}
            except Stopped:
                break
            made.images.append(drawing.result)
            yield {pictures_box: pictures_html(page, made, with_boxes)}
        if not made.images:
            raise Stopped
        stopped, scoring = job.halt.is_set(), Job()  # what was drawn is scored even so
        for images in made.images:
            made.readings.append(session.score(names, images, request.prompt, scoring))
        yield {
            pictures_box: pictures_html(page, made, with_boxes),
            chart: rewards_html(page, made),
            slider: _for_slider(made),
            latest: made,
            status_box: status("Stopped; this is what was found." if stopped else "Done."),
        }

    def redraw(_session: str, made: Comparison | None, with_boxes: bool) -> Updates:
        return {pictures_box: pictures_html(page, made, with_boxes) if made else ""}

    def write(_session: str, made: Comparison | None) -> Updates:
        if made is None or len(made.images) < 2:
            raise ValueError("there is no whole comparison to save yet: press Draw both first")
        sheet, notes, *_ = save_comparison(page.settings.out, made.pictures(0), made.pictures(1), made.facts)
        return {
            status_box: status(f"Saved in {sheet.parent}."),
            picture_file: gr.update(value=to_download(sheet), visible=True),
            notes_file: gr.update(value=to_download(notes), visible=True),
        }

    inputs = [prompt, seed, count, steps, guidance, budget, sought, chosen, boxes, *left, *right]
    outputs = [pictures_box, chart, slider, latest, picture_file, notes_file]
    triggers = [go.click, prompt.submit, blocks.load]
    work(
        page,
        "compare",
        draw,
        triggers=triggers,
        inputs=inputs,
        outputs=outputs,
        go=go,
        stop=stop,
        status_box=status_box,
    )
    boxes.change(guarded(redraw, status_box), [latest, boxes], [pictures_box, status_box], **HIDDEN)
    save.click(guarded(write, status_box), [latest], [picture_file, notes_file, status_box], **HIDDEN)


class _Following:
    """The reports of a side being drawn; then `result` holds its pictures (N, 3, H, W)."""

    def __init__(self, job: Job, session: Any, side: Side, request: DrawRequest) -> None:
        self._make = lambda: follow(job, lambda: session.draw(side, request, job))
        self.result: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.result = yield from self._make()


def _side_controls(page: Page, name: str, variant: str) -> list[Any]:
    """How a side is made: weights, their strength, a search."""
    names = page.session.variant_names
    with gr.Group():
        weights = gr.Dropdown(names, value=variant, label=f"{name}: weights", visible=len(names) > 1)
        strength = gr.Slider(0, 1, 1.0, step=0.05, label=f"{name}: strength", visible=variant != BASE)
        start = SEARCHES[0] if name == "Right" and len(names) == 1 else PLAIN
        search = gr.Dropdown([PLAIN, *SEARCHES], value=start, label=f"{name}: search")
    weights.change(lambda chosen: gr.update(visible=chosen != BASE), weights, strength, queue=False, **HIDDEN)
    return [weights, strength, search]


def _side(values: Sequence[Any], budget: int, sought: str) -> Side:
    variant, strength, search = values
    return Side(variant, float(strength), search, budget, sought if search != PLAIN else "")


def pictures_html(page: Page, made: Comparison, with_boxes: bool) -> str:
    """Left and right of each seed, side by side."""
    sides = [made.pictures(k) for k in (0, 1)]
    cells = ""
    for row, seed in enumerate(made.asked.seeds):
        for k, name in enumerate(("Left", "Right")):
            if row < len(sides[k]):
                cells += _cell(page, made, with_boxes, sides[k][row], row, seed, f"{name}: {made.sides[k].name}")
            else:
                cells += "<div></div>"
    return f'<div class="va-pair">{cells}</div>'


def _cell(page: Page, made: Comparison, boxes: bool, picture: Image.Image, row: int, seed: int, who: str) -> str:
    objects = (
        world("shapes").read(made.images[0 if who.startswith("Left") else 1][row].numpy())
        if _readable(page, picture)
        else None
    )
    alt = f"{who}, seed {seed}, drawn for: {made.asked.prompt}"
    reading = "" if objects is None else f". {reading_of(objects)}"
    return figure(picture, alt + reading, f"{who}, seed {seed}{reading}", objects if boxes and objects else ())


def _readable(page: Page, picture: Image.Image) -> bool:
    return page.settings.shapes and picture.size == (world("shapes").SIZE,) * 2


def rewards_html(page: Page, made: Comparison) -> str:
    """The bar chart, and what rewards say beyond a number."""
    if len(made.readings) < 2:
        return note("One side was not drawn, so there is nothing to compare.")
    names = list(made.readings[0])
    if not names:
        return note("No reward is chosen.")
    ranges = {name: page.session.reward(name).range for name in names}
    chart = bars({name: (made.readings[0][name], made.readings[1][name]) for name in names}, ranges)
    more = [details(values, f"{side}: criteria and reasons") for side, values in zip(("Left", "Right"), made.readings)]
    mean = note(f"Means over {made.asked.count} seeds.") if made.asked.count > 1 else ""
    return chart + mean + "".join(more)


def _for_slider(made: Comparison) -> Any:
    if len(made.images) < 2:
        return None
    sheets = [side_by_side(made.pictures(k)[:1], made.pictures(k)[:1]) for k in (0, 1)]
    return tuple(sheet.crop((0, 0, (sheet.width - 8) // 2, sheet.height)) for sheet in sheets)
