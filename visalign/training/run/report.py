"""What a finished run says: summary.json, and report.html with curves, pictures before and after, and the config."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .folder import read_metrics

CURVES = {
    "reward": ("reward_mean", "eval_reward"),
    "gold (strict, held-out)": ("eval_gold_strict",),
    "ratio and KL": ("approx_kl", "kl"),
    "clip fraction": ("clip_fraction",),
    "gradient norm": ("grad_norm",),
    "watched, while sampling": ("monitor_watched_gold_strict", "monitor_watched_gold"),
    "diversity in groups": ("monitor_diversity_vendi", "monitor_diversity_cosine"),
    "pictures": ("monitor_saturation", "monitor_brightness", "monitor_high_frequency"),
    "seconds a step": ("seconds_rollout", "seconds_score", "seconds_train"),
}


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    """summary.json, keys as given."""
    (folder / "summary.json").write_text(json.dumps(values, indent=2) + "\n")


def write_report(folder: Path, summary: dict[str, Any]) -> Path:
    """report.html in one file: pictures and curves are inside it."""
    metrics = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    rows = "".join(f"<tr><td>{_text(k)}<td>{_text(_short(v))}" for k, v in summary.items())
    lines = [f"step {line['step']}: {text}" for line in metrics for text in line.get("findings", [])]
    findings = "".join(f"<li>{_text(line)}" for line in lines) or "<li>none"
    samples = "".join(
        f"<figure><figcaption>{title}</figcaption><img alt='{title}' "
        f"src='{_embed(folder / 'samples' / name)}'></figure>"
        for title, name in (("before", "before.png"), ("after", "after.png"))
        if (folder / "samples" / name).is_file()
    )
    config = (folder / "config.yaml").read_text() if (folder / "config.yaml").exists() else ""
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(folder.name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} td {{ padding: .15em 1.2em .15em 0; border-bottom: 1px solid #ddd }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 1em }} figure {{ margin: 0; flex: 1 1 480px }}
img {{ max-width: 100% }}
figcaption {{ font-weight: 600 }} pre {{ background: #f5f5f5; padding: 1em; overflow: auto }}</style>
<h1>{_text(folder.name)}</h1><table>{rows}</table>
<h2>Same prompts, same seeds</h2><div class="pictures">{samples}</div>
<h2>What the hacking watch found</h2><ul>{findings}</ul>
<h2>Curves</h2><img alt="training curves" src="{_curves(metrics)}">
<h2>Configuration</h2><pre>{_text(config)}</pre></html>"""
    path = folder / "report.html"
    path.write_text(page)
    return path


def _curves(metrics: list[dict[str, Any]]) -> str:
    curves = {t: names for t, names in CURVES.items() if any(n in line for line in metrics for n in names)}
    if not curves:
        return ""
    with plt.rc_context({"text.parse_math": False}):
        return _draw_curves(curves, metrics)


def _draw_curves(curves: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    figure, axes = plt.subplots(
        -(-len(curves) // 3), min(3, len(curves)), figsize=(11, 3 * -(-len(curves) // 3)), squeeze=False
    )
    figure.subplots_adjust(0.06, 0.18 / axes.shape[0], 0.98, 1 - 0.1 / axes.shape[0], 0.22, 0.4)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (title, names) in zip(axes.flat, curves.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), label=f" {name}", marker="." if len(points) < 12 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure_uri(figure)


def figure_uri(figure: Any) -> str:
    """A finished figure as a data: address for a page; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(_short(v) for v in value)
    return str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))
