"""What the page shows as HTML. Every text that comes from people, files or rewards passes through `text`."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from visalign.worlds import world

from .requests import Reading

CSS = """
.gradio-container { max-width: 1240px !important; width: 100% !important; margin: 0 auto !important }
.va-pair { display: grid; grid-template-columns: repeat(2, minmax(0, 420px)); gap: 12px }
.va-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 10px }
.va-pic { position: relative; line-height: 0; background: var(--background-fill-secondary); border-radius: 6px;
  overflow: hidden; max-width: 420px }
.va-pic.wide { max-width: none; width: fit-content } .va-small .va-pic { max-width: 240px }
.va-pic.wide.small img { width: auto }
.va-pic img { width: 100%; height: auto } .va-pic.small img { image-rendering: pixelated }
.va-pic svg { position: absolute; inset: 0; width: 100%; height: 100% }
.va-pic rect { fill: none; stroke: #111; stroke-width: .6 } .va-pic rect.halo { stroke: #fff; stroke-width: 1.3 }
.va-pic text { font: 600 3.4px sans-serif; fill: #111; stroke: #fff; stroke-width: 1; paint-order: stroke }
figure.va { margin: 0 } figure.va figcaption { font-size: .9em; margin-top: .3em; overflow-wrap: anywhere }
.gradio-container table.va { border-collapse: collapse; border: none; width: 100%; font-size: .95em; margin: .4em 0 }
table.va caption { text-align: left; font-weight: 600; padding-bottom: .3em }
.gradio-container table.va th, .gradio-container table.va td { text-align: left; padding: .35em .8em .35em 0;
  vertical-align: top; font-weight: 400; border: none; border-bottom: 1px solid var(--border-color-primary);
  overflow-wrap: anywhere }
.gradio-container table.va :is(thead, tbody, tr) { border: none }
.gradio-container table.va thead th { font-weight: 600 }
table.va td:not(.n), table.va th:not(.n) { min-width: 5.5em }
table.va .n { font-variant-numeric: tabular-nums; white-space: nowrap }
.va-bar { display: block; height: .7em; min-width: 2px; border-radius: 2px; background: #1f6fb4 }
.va-bar.right { background: #c25700 }
.va-note { color: var(--body-text-color-subdued) !important; font-size: .9em; margin: .3em 0 }
.va-status { min-height: 2.2em; padding-top: .3em; font-size: .95em }
.va-status progress { width: 100%; height: .6em; display: block }
.va-problem { border-left: 4px solid #b3261e; padding: .4em .8em; background: var(--background-fill-secondary) }
.va-scroll { overflow-x: auto } .va-plot img { width: 100%; height: auto; background: #fff; border-radius: 6px }
.va-plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px }
.va-winner { font-weight: 700 }
@media (max-width: 640px) {
  .va-controls { order: 2 } .tab-container button { padding: 0 6px !important; font-size: 13px !important }
  .va-pair { gap: 8px } table.va { font-size: .88em } .gradio-container { padding: 8px !important } }
"""

SIZE = world("shapes").SIZE


def text(value: Any) -> str:
    """Any text, so that a browser shows it and never reads it as HTML."""
    return html.escape(str(value), quote=True)


def data_uri(picture: Image.Image) -> str:
    """A picture as PNG inside an address, exact to the pixel."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(picture: Image.Image, alt: str, caption: str = "", boxes: Sequence[Any] = (), wide: bool = False) -> str:
    """A picture with its alternative text, a caption, and boxes around what the shapes world's judge reads in it.

    Args:
        wide: as wide as it is, or as the page; else at most 420 pixels.
    """
    boxes_html = "".join(_box(placed) for placed in boxes)
    over = f'<svg viewBox="0 0 {SIZE} {SIZE}" aria-hidden="true">{boxes_html}</svg>' if boxes_html else ""
    kind = (" small" if max(picture.size) < 256 else "") + (" wide" if wide else "")
    image = f'<div class="va-pic{kind}"><img alt="{text(alt)}" src="{data_uri(picture)}">{over}</div>'
    return f'<figure class="va">{image}<figcaption>{text(caption)}</figcaption></figure>'


def _box(placed: Any) -> str:
    side, x, y = 2 * placed.radius, placed.x - placed.radius, placed.y - placed.radius
    place = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
    above = y - 1 if y > 6 else min(y + side + 3.8, SIZE - 1)
    words = f"{placed.colour} {placed.shape}"
    left = min(max(x, 1), SIZE - 2 * len(words))
    label = f'<text x="{left:.1f}" y="{above:.1f}">{text(words)}</text>'
    return f'<rect class="halo" {place}/><rect {place}/>{label}'


def reading_of(objects: Sequence[Any]) -> str:
    """The judge's reading in words."""
    names = [f"{o.colour} {o.shape}" if o.shape != "unknown" else "something unknown" for o in objects]
    return "The judge reads: " + (", ".join(names) if names else "nothing")


def bars(readings: Mapping[str, tuple[Sequence[Reading], Sequence[Reading]]], ranges: Mapping[str, Any]) -> str:
    """A bar chart as a table: the mean reward of left and right, in each reward's own range or that of the values."""
    rows = "".join(_bar_row(name, left, right, ranges.get(name)) for name, (left, right) in readings.items())
    head = '<thead><tr><th scope="col">reward</th><th scope="col">left</th><th scope="col">right</th></tr></thead>'
    caption = "Rewards, higher is better"
    return f'<table class="va"><caption>{caption}</caption>{head}<tbody>{rows}</tbody></table>'


def _bar_row(name: str, left: Sequence[Reading], right: Sequence[Reading], bounds: Any) -> str:
    means = [mean_score(left), mean_score(right)]
    known = [m for m in means if m is not None]
    low, high = bounds if bounds and all(abs(b) < 1e6 for b in bounds) else (min([0.0, *known]), max([0.0, *known]))
    best = max(known, default=0.0)
    cells = ""
    for kind, mean, readings in (("left", means[0], left), ("right", means[1], right)):
        if mean is None:
            why = next((r.problem for r in readings if r.problem), "not scored")
            cells += f"<td>{text(why)}</td>"
            continue
        share = 100 * (mean - low) / (high - low) if high > low else 0.0
        winner = ' class="va-winner"' if mean == best and len(set(known)) > 1 else ""
        bar = f'<span class="va-bar {kind}" style="width:{min(max(share, 0), 100):.1f}%"></span>'
        cells += f'<td class="n"><span{winner}>{mean:.4f}</span>{bar}</td>'
    return f'<tr><th scope="row">{text(name)}</th>{cells}</tr>'


def mean_score(readings: Sequence[Reading]) -> float | None:
    """Of those that could be scored."""
    known = [r.score for r in readings if r.score is not None]
    return sum(known) / len(known) if known else None


def details(readings: Mapping[str, Sequence[Reading]], title: str) -> str:
    """Per-criterion answers and reasons, where rewards give them; else nothing."""
    rows = ""
    for name, values in readings.items():
        for n, reading in enumerate(values):
            where = f"{name}, picture {n + 1}" if len(values) > 1 else name
            rows += "".join(
                f'<tr><th scope="row">{text(where)}</th><td>{text(key)}</td><td class="n">{value:.3f}</td></tr>'
                for key, value in reading.criteria.items()
                if list(reading.criteria) != [name]
            )
            if reading.rationale:
                rows += f'<tr><th scope="row">{text(where)}</th><td colspan="2">{text(reading.rationale)}</td></tr>'
    return f'<table class="va"><caption>{text(title)}</caption><tbody>{rows}</tbody></table>' if rows else ""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """A plain table of texts; `numbers` are the columns of figures."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = [' class="n"' if k in numbers else "" for k in range(len(row))]
        return "".join(f"<{tag}{scope}{kind}>{text(value)}</{tag}>" for kind, value in zip(kinds, row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    inside = f"<caption>{text(caption)}</caption>{top}<tbody>{body}</tbody>"
    return f'<div class="va-scroll"><table class="va">{inside}</table></div>'


def status(words: str, share: float | None = None, busy: bool = False) -> str:
    """One line that screen readers read out, with a progress bar while there is work."""
    bar = "" if not busy else "<progress></progress>"
    if busy and share is not None:
        bar = f'<progress max="1" value="{min(max(share, 0.0), 1.0):.3f}"></progress>'
    return f'<div class="va-status" role="status">{text(words)}{bar}</div>'


def problem(words: str) -> str:
    """A sentence about what went wrong."""
    return f'<div class="va-status"><div class="va-problem" role="alert">{text(words)}</div></div>'


def note(words: str) -> str:
    return f'<p class="va-note">{text(words)}</p>'
