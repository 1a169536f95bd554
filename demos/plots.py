"""Curves as pictures inside the page, each with its numbers in words for those who do not see it."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from .markup import data_uri, note, text

STYLES = ("-", "--", ":", "-.")


def curves_html(title: str, names: Sequence[str], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The numbers `names` of each run over its steps: a colour a run, a line style a number; "" if no run has any."""
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    texts = []
    for k, (run, lines) in enumerate(metrics.items()):
        for style, name in zip(STYLES, names):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if not points:
                continue
            steps, values = zip(*points)
            values = tuple(v / 2**30 for v in values) if name.endswith("_bytes") else values
            said_name = name.removesuffix("_bytes")
            label = said_name if len(metrics) == 1 else f"{run[:24]}: {said_name}"
            axes.plot(steps, values, style, color=f"C{k}", label=plain(label), marker="." if len(steps) < 12 else None)
            texts.append(f"{label} from {values[0]:.4g} to {values[-1]:.4g} over {steps[-1]} steps")
    if not texts:
        return ""
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return plot_html(figure, f"{title}: {'; '.join(texts)}")


def search_curve_html(points: Sequence[tuple[int, float]], budget: int, reward: str) -> str:
    """The best reward so far over denoiser calls."""
    if not points:
        return note("Nothing is finished yet.")
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    spent, best = zip(*points)
    axes.step(spent, best, where="post", marker="." if len(points) < 60 else None, color="#1f6fb4")
    axes.set_xlim(0, budget)
    axes.set_xlabel("denoiser calls (NFE)")
    axes.set_ylabel(plain(f"best {reward} so far"))
    axes.grid(alpha=0.3)
    texts = f"Best {reward} so far: {best[-1]:.4f} after {spent[-1]} of {budget} denoiser calls; {best[0]:.4f} at first"
    return plot_html(figure, texts)


def plot_html(figure: Figure, alt: str) -> str:
    """A figure as an image with its text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return f'<div class="va-plot"><img alt="{text(alt)}" src="{data_uri(Image.open(buffer))}"></div>'


def plain(label: str) -> str:
    """Text that matplotlib draws as it stands, dollar signs included."""
    return label.replace("$", r"\$")
