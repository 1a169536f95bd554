"""Score: pictures of your own under any of the rewards, and under a rubric of your own."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from visalign.demos.files import MOST_UPLOADS, SUFFIXES, decode_upload
from visalign.demos.jobs import Job, follow
from visalign.demos.markup import data_uri, details, note, status, text
from visalign.demos.page import Page, Updates, work
from visalign.demos.requests import Reading
from visalign.demos.settings import MAX_PROMPT
from visalign.rewards import make_reward

RUBRIC = "your rubric"
MOST_RUBRIC = 4000  # characters
MOST_CRITERIA = 20
PASTE = """
document.addEventListener("paste", (event) => {
  const input = document.querySelector("#score-files input[type=file]");
  const files = [...(event.clipboardData ? event.clipboardData.files : [])].filter(f => f.type.startsWith("image/"));
  if (!input || !files.length || !input.closest("#score-files").offsetParent) return;
  const carried = new DataTransfer();
  files.forEach((file, k) => carried.items.add(new File([file], `pasted-${k + 1}.png`, {type: file.type})));
  input.files = carried.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});
"""


def score_tab(page: Page) -> None:
    """Build the tab."""
    session = page.session
    example = "Is there a red circle in the picture?\n2 | Is there exactly one red circle in the picture?"
    gr.HTML(note("PNG, JPEG or WebP, up to 10 MB each; or paste a picture here with Ctrl+V."))
    files = gr.File(
        label="Pictures", file_count="multiple", file_types=list(SUFFIXES), type="filepath", elem_id="score-files"
    )
    prompt = gr.Textbox(
        "a red circle" if page.settings.shapes else "", label="Prompt", max_length=MAX_PROMPT, elem_id="score-prompt"
    )
    chosen = gr.CheckboxGroup(list(session.specs), value=list(session.specs)[:2], label="Rewards")
    with gr.Accordion("A rubric of your own", open=False, visible=page.settings.judge_name is not None):
        gr.HTML(note("A statement or a yes/no question a line; a weight may stand before it: 2 | The circle is red."))
        rubric = gr.Textbox(
            label="Criteria", lines=4, max_length=MOST_RUBRIC, placeholder=example, elem_id="score-rubric"
        )
    with gr.Row():
        go = gr.Button("Score", variant="primary", elem_id="score-go", min_width=110)
        stop = gr.Button("Stop", interactive=False, elem_id="score-stop", min_width=80)
    status_box = gr.HTML(status("Ready."), elem_id="score-status")
    results_html = gr.HTML(elem_id="score-results")

    def run(job: Job, paths: Sequence[str] | None, prompt: str, names: list[str], rubric: str) -> Iterator[Updates]:
        pictures, refused = _decode(paths)
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise ValueError(f"prompt: got {len(prompt.strip())} characters, expected 1 to {MAX_PROMPT}")
        criteria = read_rubric(rubric)
        if not names and not criteria:
            raise ValueError("rewards: got none, expected at least one, or a rubric")
        readings: dict[str, list[Reading]] = {}
        for name in [*names, *([RUBRIC] if criteria else [])]:
            yield {status_box: status(f"scoring by {name}", len(readings) / (len(names) + 1), busy=True)}

            def one(name: str = name) -> list[Reading]:
                reward = _rubric_reward(page, criteria) if name == RUBRIC else session.reward(name)
                return session.score_pictures(reward, [picture for _, picture in pictures], prompt, job)

            for _ in (following := _Result(follow(job, one))):
                pass
            readings[name] = following.value
            yield {results_html: ranking_html(pictures, readings, refused)}
        yield {status_box: status("Done.")}

    work(
        page,
        "score",
        run,
        triggers=[go.click, prompt.submit],
        inputs=[files, prompt, chosen, rubric],
        outputs=[results_html],
        go=go,
        stop=stop,
        status_box=status_box,
    )


class _Result:
    """A generator to iterate over, whose value is kept."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.value: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.value = yield from self._generator


def _decode(paths: Sequence[str] | None) -> tuple[list[tuple[str, Image.Image]], list[str]]:
    """The pictures by file name, and why others are none.

    Raises:
        ValueError: no picture at all, or too many.
    """
    if not paths:
        raise ValueError("pictures: got none, expected at least one")
    if len(paths) > MOST_UPLOADS:
        raise ValueError(f"pictures: got {len(paths)}, expected at most {MOST_UPLOADS}")
    pictures, refused = [], []
    for path in paths:
        try:
            pictures.append((path.replace("\\", "/").rpartition("/")[2][-60:], decode_upload(path)))
        except ValueError as error:
            refused.append(str(error))
    if not pictures:
        raise ValueError("; ".join(refused))
    return pictures, refused


def read_rubric(lines: str | None) -> list[dict[str, Any]]:
    """Criteria, one a line, as rubric files have them; a line that ends in "?" is the question.

    Regular expressions are not taken from the page: a bad one could keep the server busy for ever.

    Raises:
        ValueError: too much text, or a weight that is none.
    """
    lines = lines or ""
    if len(lines) > MOST_RUBRIC:
        raise ValueError(f"rubric: got {len(lines)} characters, expected at most {MOST_RUBRIC}")
    criteria: list[dict[str, Any]] = []
    for line in filter(None, (line.strip() for line in lines.splitlines())):
        head, bar, tail = line.partition("|")
        words, weight = (tail.strip(), head.strip()) if bar else (line, "1")
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(f"rubric: got weight {weight!r}, expected a number before the bar") from None
        if not 0 < number < 1e6 or not words:
            raise ValueError(f"rubric: got {line[:60]!r}, expected a weight above 0 and a criterion")
        plain = words.replace("{", "(").replace("}", ")")
        question = {"question": plain} if plain.endswith("?") else {}
        criteria.append({"name": f"{len(criteria) + 1}. {plain[:60]}", "text": plain, "weight": number, **question})
    if len(criteria) > MOST_CRITERIA:
        raise ValueError(f"rubric: got {len(criteria)} criteria, expected at most {MOST_CRITERIA}")
    return criteria


def _rubric_reward(page: Page, criteria: list[dict[str, Any]]) -> Any:
    rubric: dict[str, Any] = {"name": RUBRIC, "criteria": criteria}
    if page.settings.judge_name == "shapes-vlm":
        rubric["wording"] = "{question}"  # as it was taught
    return make_reward({"name": "rubric", "rubric": rubric, "model": page.settings.judge_name})


def ranking_html(
    pictures: Sequence[tuple[str, Image.Image]], readings: dict[str, list[Reading]], refused: Sequence[str] = ()
) -> str:
    """A table of the pictures, the best by the first reward on top; what could not be scored, and why."""
    first = next(iter(readings.values()))
    scores = [math.inf if reading.score is None else -reading.score for reading in first]
    order = sorted(range(len(pictures)), key=lambda n: scores[n])
    head = "".join(f'<th scope="col" class="n">{text(name)}</th>' for name in readings)
    rows = ""
    for place, n in enumerate(order, 1):
        name, picture = pictures[n]
        small = picture.copy()
        small.thumbnail((160, 160))
        image = (
            f'<img alt="{text(name)}" src="{data_uri(small)}" style="display:block;width:72px;height:auto;margin:0">'
        )
        cells = "".join(_cell(values[n]) for values in readings.values())
        rows += f'<tr><td class="n">{place}</td><td>{image}{text(name)}</td>{cells}</tr>'
    caption = f"Ranked by {next(iter(readings))}"
    inside = f'<caption>{text(caption)}</caption><thead><tr><th scope="col">rank</th><th scope="col">picture</th>'
    page = f'<div class="va-scroll"><table class="va">{inside}{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    problems = dict.fromkeys(r.problem for values in readings.values() for r in values if r.problem)
    for problem in (*refused, *problems):
        page += note(f"Not scored: {problem}")
    for n in order:
        page += details(
            {name: [values[n]] for name, values in readings.items()}, f"{pictures[n][0]}: criteria, reasons"
        )
    return page


def _cell(reading: Reading) -> str:
    return f'<td class="n">{"–" if reading.score is None else f"{reading.score:.4f}"}</td>'
