"""Prefer: two pictures, one choice, by hand or by keys; every choice is kept at once."""

import json
import random
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from visalign.data.votes import Pair, VoteStore, zipped
from visalign.demos.files import new_folder, to_download
from visalign.demos.jobs import Job, follow
from visalign.demos.markup import figure, note, status, table
from visalign.demos.page import HIDDEN, Page, Updates, guarded, work
from visalign.demos.requests import BASE, PLAIN, SEARCHES, DrawRequest, Side
from visalign.demos.settings import MAX_PROMPT
from visalign.images import images_to_pil
from visalign.statistics.bradley_terry import agreement, bradley_terry
from visalign.worlds import world

CHOICES = {  # button: what it says, its key, the label it stores
    "left": ("A: left is better", "a", "image_0"),
    "right": ("B: right is better", "b", "image_1"),
    "tie": ("T: as good", "t", "tie"),
    "bad": ("X: both bad", "x", "both_bad"),
}
KEYS = """
document.addEventListener("keydown", (event) => {
  const at = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (at.closest && at.closest("input, textarea, select, [contenteditable], [role=listbox], [role=combobox]")) return;
  const names = {a: "left", b: "right", t: "tie", x: "bad"};
  const name = names[event.key.toLowerCase()];
  const button = name && document.querySelector("#vote-" + name);
  if (button && button.offsetParent !== null && !button.disabled) { event.preventDefault(); button.click(); }
});
"""


def prefer_tab(page: Page, opened: gr.Tab) -> None:
    """Build the tab. Votes go to the folder `votes` of the output folder."""
    session, store = page.session, VoteStore(page.settings.out / "votes")
    ways = [*session.variant_names, *SEARCHES]
    gr.HTML(note("Which picture fits the prompt better? Press A, B, T or X, or a button. Each vote is kept at once."))
    with gr.Accordion("Who draws, and which prompts", open=False):
        with gr.Row():
            first = gr.Dropdown(ways, value=BASE, label="One is drawn by")
            second = gr.Dropdown(ways, value=ways[1], label="The other by")
            blind = gr.Checkbox(True, label="Blind: who drew what is told after the vote")
        words = "Prompts, one a line; each pair takes one of them"
        prompts = gr.Textbox("\n".join(_prompts(page)), label=words, lines=3, max_lines=12)
    with gr.Row():
        go = gr.Button("Next pair", variant="primary", elem_id="prefer-go", min_width=110)
        stop = gr.Button("Stop", interactive=False, elem_id="prefer-stop", min_width=80)
    status_box = gr.HTML(status("Press Next pair to begin."), elem_id="prefer-status")
    pictures_html = gr.HTML(elem_id="prefer-pictures")
    with gr.Row():
        buttons = {
            name: gr.Button(words, elem_id=f"vote-{name}", interactive=False, min_width=120)
            for name, (words, _, _) in CHOICES.items()
        }
    results = gr.HTML(elem_id="prefer-results")
    with gr.Row():
        refresh = gr.Button("Show the leaderboard", elem_id="prefer-board")
        export = gr.Button("Export as a dataset", elem_id="prefer-export")
        download = gr.DownloadButton("Dataset (ZIP)", visible=False, elem_id="prefer-zip")
    pair = gr.State(None, time_to_live=6 * 3600)

    def draw(job: Job, _voted_on: Pair | None, one: str, other: str, lines: str, blind: bool) -> Iterator[Updates]:
        yield {pair: None}
        made = yield from _draw_pair(page, job, (one, other), lines, blind, status_box)
        ready = {button: gr.update(interactive=True) for button in buttons.values()}
        yield {pair: made, pictures_html: _pair_html(made, blind), status_box: status("Which one?"), **ready}

    def vote(name: str) -> Any:
        def keep(made: Pair | None, *_settings: Any) -> Updates:
            if made is None:  # pressed twice
                return {}
            store.add(made, CHOICES[name][2])
            return {pair: None, results: note(f"Kept: {CHOICES[name][0][3:]}. {_told_after(made)}")}

        return keep

    def board(_session: str) -> Updates:
        return {results: results_html(store.rows())}

    def hand_out(_session: str) -> Updates:
        folder = store.export(new_folder(page.settings.out / "exports") / "preferences")
        words = status(f"{len(store.rows())} votes are in {folder}; datasets.load_dataset('imagefolder') reads it.")
        return {status_box: words, download: gr.update(value=to_download(zipped(folder)), visible=True)}

    inputs, outputs = [pair, first, second, prompts, blind], [pictures_html, pair, results, *buttons.values()]
    shared: dict[str, Any] = dict(inputs=inputs, outputs=outputs, go=go, stop=stop, status_box=status_box)
    shared["freeze"] = list(buttons.values())
    work(page, "prefer", draw, triggers=[go.click], **shared)
    for name, button in buttons.items():  # a vote is kept whoever is at work
        work(page, "prefer", draw, triggers=[button.click], before=vote(name), listen=False, **shared)
    for event in (opened.select, refresh.click):
        event(guarded(board, status_box), None, [results, status_box], **HIDDEN)
    export.click(guarded(hand_out, status_box), None, [download, status_box], **HIDDEN)


def _prompts(page: Page) -> list[str]:
    if not page.settings.shapes:
        return ["a photo of a cat", "a red bicycle against a wall", "a bowl of fruit on a table"]
    return world("shapes").world_prompts("test", 40)


def _draw_pair(
    page: Page, job: Job, ways: Sequence[str], lines: str, blind: bool, status_box: Any
) -> Generator[Updates, None, Pair]:
    """Updates while two pictures of one prompt and seed are drawn; returns the pair, sides at random."""
    prompts = [line.strip() for line in (lines or "").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("prompts: got none, expected at least one line")
    if max(map(len, prompts)) > MAX_PROMPT:
        raise ValueError(f"prompts: got one of {max(map(len, prompts))} characters, expected at most {MAX_PROMPT}")
    session, chance = page.session, random.SystemRandom()
    prompt, swapped = chance.choice(prompts), chance.random() < 0.5
    sides = [_side(page, way) for way in (reversed(ways) if swapped else ways)]
    seed = chance.randrange(2**31)
    seeds = (seed, seed if sides[0] != sides[1] else chance.randrange(2**31))
    images, rewards = [], []
    for side, own in zip(sides, seeds):
        request = DrawRequest(prompt, own, 1, session.own_steps, session.own_guidance)
        drawing = follow(job, lambda side=side, request=request: session.draw(side, request, job))  # type: ignore[misc]
        try:
            while True:
                report = next(drawing)
                yield {
                    status_box: status("Drawing the next pair.", report.share, busy=True)
                }  # says not which one searches
        except StopIteration as done:
            images.append(done.value)
        readings = session.score(list(session.specs), images[-1], prompt, job)
        rewards.append({name: r[0].score for name, r in readings.items() if r[0].score is not None})
    pictures = tuple(images_to_pil(image)[0] for image in images)
    models = tuple(side.name for side in sides)
    return Pair(secrets.token_hex(8), prompt, pictures, seeds, models, tuple(rewards), swapped, blind)  # type: ignore


def _side(page: Page, way: str) -> Side:
    if way in SEARCHES:
        return replace(Side(search=way), reward=next(iter(page.session.specs)), budget=60)
    if way not in page.session.variant_names:
        raise ValueError(f"drawn by: got {way!r}, expected one of {[*page.session.variant_names, *SEARCHES]}")
    return Side(variant=way, search=PLAIN)


def _pair_html(made: Pair, blind: bool) -> str:
    cells = ""
    for k, letter in enumerate("AB"):
        who = "" if blind else f", {made.models[k]}"
        cells += figure(made.images[k], f"Picture {letter}{who}, drawn for: {made.prompt}", f"{letter}{who}")
    return figure_prompt(made.prompt) + f'<div class="va-pair">{cells}</div>'


def figure_prompt(prompt: str) -> str:
    from visalign.demos.markup import text

    return f"<p>Prompt: <strong>{text(prompt)}</strong></p>"


def _told_after(made: Pair) -> str:
    return f"A was drawn by {made.models[0]}, B by {made.models[1]}."


def results_html(rows: Sequence[dict[str, Any]]) -> str:
    """The leaderboard of models, and how often each reward agrees with the votes."""
    if not rows:
        return note("No votes yet.")
    names = sorted({row[f"model_{k}"] for row in rows for k in (0, 1)})
    games = [row for row in rows if row["model_0"] != row["model_1"]]
    left, right = ([names.index(row[f"model_{k}"]) for row in games] for k in (0, 1))
    strengths = bradley_terry(left, right, [row["label_0"] for row in games], len(names))
    order = sorted(range(len(names)), key=lambda k: -strengths.values[k])
    lines = [
        (
            names[k],
            f"{strengths.values[k]:+.2f}",
            f"{strengths.low[k]:+.2f} to {strengths.high[k]:+.2f}",
            strengths.games[k],
        )
        for k in order
    ]
    head = ("model", "strength", "95 % interval", "votes")
    board = table("Leaderboard (Bradley-Terry, log-odds; ties count half)", head, lines, (1, 2, 3))
    return note(f"{len(rows)} vote{'s' * (len(rows) != 1)}.") + board + _agreement_html(rows)


def _agreement_html(rows: Sequence[dict[str, Any]]) -> str:
    decided = [row for row in rows if row["label"] in ("image_0", "image_1")]
    scores = [[json.loads(row[f"rewards_{k}"]) for k in (0, 1)] for row in decided]
    lines = []
    for name in sorted({name for pair in scores for name in pair[0]}):
        both = [(row, pair) for row, pair in zip(decided, scores) if name in pair[0] and name in pair[1]]
        margins = [pair[0][name] - pair[1][name] for _, pair in both]
        share, low, high = agreement([row["label"] == "image_0" for row, _ in both], margins)
        lines.append((name, f"{share:.0%}", f"{low:.0%} to {high:.0%}", len(both)))
    if not lines:
        return ""
    head = ("reward", "agrees", "95 % interval", "votes")
    return table("How often each reward prefers what you preferred", head, lines, (1, 2, 3))
