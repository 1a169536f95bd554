"""report.html, in one file: the table, the pairs, and for each pair the pictures it won and lost by most."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from visalign.training.run.report import figure_uri

from .record import shown
from .results import Results, extremes
from .store import Store

GALLERY = 4  # pictures won, and lost, of a pair by a reward
SIDE = 224  # pixels: larger pictures are shown smaller
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } .wide { overflow-x: auto } tr:first-child th { border-bottom: 2px solid #999 }
th, td { padding: .2em 1.2em .2em 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } th { font-weight: 600 } small { color: #555; white-space: nowrap }
.gallery { display: flex; flex-wrap: wrap; gap: 1em 1.6em; margin: .6em 0 1.4em }
figure { margin: 0; max-width: 244px } figcaption { font-size: 13px } .two { display: flex; gap: 4px }
.two div { font-size: 12px } .two img { width: 120px; height: auto; display: block }
.tiny { image-rendering: pixelated } body { color: #222 } .chart { min-width: 640px; margin: 1em 0 }
img { max-width: 100% } summary { cursor: pointer; font-weight: 600; margin: .5em 0 } h3 { margin: 1.4em 0 .2em }
pre { background: #f5f5f5; padding: 1em; overflow: auto } .note { background: #fff4d6; padding: .5em 1em }
.better { color: #075e2c } .worse { color: #9b1c1c }"""


def write_page(results: Results, record: dict[str, Any], store: Store) -> Path:
    """Write report.html beside eval.json; pictures and figure are inside it, whole pictures are linked."""
    plan = results.plan
    sizes = f"{len(plan.contestants)} contestants, {len(plan.prompts)} prompts, {len(plan.seeds)} seeds"
    notes = "".join(f"<p class='note'>{_text(note)}</p>" for note in record["notes"])
    compared = f"<h2>Pair by pair</h2>{_pairs(record)}{_galleries(results, store)}" if record["pairs"] else ""
    settings = json.dumps({key: record[key] for key in ("contestants", "rewards", "seeds", "dtype")}, indent=1)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(plan.out.name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
{_STYLE}</style>
<h1>{_text(plan.out.name)}</h1><p>{sizes}. Pictures of a prompt and seed start from the same noise in every row.</p>
{notes}<h2>Scores</h2>{_table(record)}<div class="wide"><img class="chart"
alt="mean scores with their intervals" src="{_figure(record)}"></div>
{compared}<h2>How this was counted</h2><p>A score is that of the picture as it stands in its file. Means are over
prompts, each with the mean of its seeds; intervals are 95 % bootstrap intervals over prompts, whose seeds stay
together, of a pair over the differences of the same prompts. A win is a higher score on the same prompt and seed; a
tie counts half. Each interval is for itself: of twenty comparisons of equals, one is expected to exclude 0.
Pictures without a score are left out of the means, and of pairs on both sides.</p>
<details><summary>Settings</summary><pre>{_text(settings)}</pre></details></html>"""
    path = plan.out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(record: dict[str, Any]) -> str:
    rewards = [reward["label"] for reward in record["rewards"]]
    cells = {(entry["contestant"], entry["reward"]): entry for entry in record["table"]}
    head = "".join(f"<th>{_text(name)}" for name in ("contestant", *rewards, "denoiser calls a picture", "seconds"))
    rows = ""
    for contestant in record["contestants"]:
        label = contestant["label"]
        rows += f"<tr><th>{_text(label)}"
        for reward in rewards:
            entry = cells[label, reward]
            star = " *" if entry["optimised_for"] else ""
            rows += f"<td>{_number(entry['mean'], star=star)}<br><small>{entry['scored']} pictures</small>"
        rows += f"<td>{contestant['nfe_a_picture']:.4g}<td>{contestant['seconds_a_picture']:.3g}"
    starred = any(entry["optimised_for"] for entry in record["table"])
    star = "<p>* searched or trained for this very reward, which is then no independent judge.</p>" if starred else ""
    return f"<div class='wide'><table><tr>{head}{rows}</table></div>{star}"


def _pairs(record: dict[str, Any]) -> str:
    names = ("pair", "reward", "difference", "win rate, ties half", "won / tied / lost", "prompts")
    rows = "<tr>" + "".join(f"<th>{name}" for name in names)
    for pair in record["pairs"]:
        rows += f"<tr><td>{_text(pair['contestant'])} against {_text(pair['against'])}<td>{_text(pair['reward'])}"
        rows += (
            f"<td>{_number(pair['difference'], '+')}{_verdict(pair['difference'])}<td>{_number(pair['win_rate'], '%')}"
        )
        rows += f"<td>{pair['wins']} / {pair['ties']} / {pair['losses']}<td>{pair['prompts']}"
    return f"<div class='wide'><table>{rows}</table></div>"


def _verdict(interval: dict[str, float] | None) -> str:
    """A word where the interval excludes 0."""
    if interval is None or interval["low"] is None or interval["low"] <= 0 <= interval["high"]:
        return ""
    return " <b class='better'>better</b>" if interval["low"] > 0 else " <b class='worse'>worse</b>"


def _galleries(results: Results, store: Store) -> str:
    plan, page = results.plan, "<h2>Best wins and worst losses</h2>"
    for b in range(len(plan.contestants)):
        for a in range(b):
            page += f"<h3>{_text(plan.contestants[b].label)} against {_text(plan.contestants[a].label)}</h3>"
            for r, column in enumerate(plan.columns):
                won, lost = extremes(results.scores[b, r], results.scores[a, r], GALLERY)
                page += f"<details {'open' if r == 0 else ''}><summary>by {_text(column.label)}</summary>"
                for title, places in (("best wins", won), ("worst losses", lost)):
                    figures = "".join(_two(results, store, (a, b), r, place) for place in places)
                    page += f"<div>{title}</div><div class='gallery'>{figures or 'none'}</div>"
                page += "</details>"
    return page


def _two(results: Results, store: Store, sides: tuple[int, int], reward: int, place: tuple[int, int]) -> str:
    """Two contestants' pictures of a prompt and seed, with their scores; the earlier contestant's on the left."""
    plan, (p, s) = results.plan, place
    shots = ""
    for c in sides:
        stored, label = results.drawn[c, p, s], plan.contestants[c].label
        score = results.scores[c, reward, p, s]
        alt = _text(f"{label}: {plan.prompts[p]}")
        picture = store.picture(stored)
        tiny = " class='tiny'" if max(picture.shape[:2]) <= SIDE // 2 else ""
        shots += f"<div><a href='{_text(stored.file)}'><img{tiny} alt='{alt}' src='{_embed(picture)}'></a>"
        shots += f"{_text(label)} {score:.4g}</div>"
    caption = f"{plan.prompts[p]} (seed {plan.seeds[s]})"
    return f"<figure><div class='two'>{shots}</div><figcaption>{_text(caption)}</figcaption></figure>"


def _embed(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    buffer, large = io.BytesIO(), max(image.size) > SIDE
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, format="JPEG" if large else "PNG", **({"quality": 88} if large else {}))
    return f"data:image/{'jpeg' if large else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(record: dict[str, Any]) -> str:
    """The means with their intervals, a panel a reward, a line a contestant."""
    with plt.rc_context({"text.parse_math": False}):
        return _draw_means(record)


def _draw_means(record: dict[str, Any]) -> str:
    rewards = [reward["label"] for reward in record["rewards"]]
    labels = [contestant["label"] for contestant in record["contestants"]]
    rows = -(-len(rewards) // 3)
    figure, axes = plt.subplots(
        rows, min(3, len(rewards)), figsize=(11, rows * (1 + 0.35 * len(labels))), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(rewards) :]:
        axis.axis("off")
    for axis, reward in zip(axes.flat, rewards):
        for entry in (entry for entry in record["table"] if entry["reward"] == reward and entry["mean"]):
            mean, y = entry["mean"], labels.index(entry["contestant"])
            if mean["low"] is not None:
                axis.plot([mean["low"], mean["high"]], [y, y], color="#4477aa", linewidth=2)
            axis.plot(mean["mean"], y, "o", color="#223355")
        axis.set_title(reward, fontsize=10)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure_uri(figure)


def _number(value: dict[str, float | None] | None, style: str = "", star: str = "") -> str:
    mean, _, interval = shown(value, style).partition(" ")
    return f"{mean}{star} <small>{interval}</small>"


def _text(value: Any) -> str:
    return html.escape(str(value))
