"""eval.json: every score of every picture, with the table; and the table as lines for the screen."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from .results import Estimate, Pair, Results, by_prompt, estimate, optimised, pairs

FEW = 10  # prompts below which intervals are said to be rough


def to_record(results: Results) -> dict[str, Any]:
    """All of it, as JSON holds it: numbers that do not exist are None."""
    plan = results.plan
    labels, columns = [c.label for c in plan.contestants], [c.label for c in plan.columns]
    marks = optimised(plan)
    table = [
        {
            "contestant": label,
            "reward": column,
            "mean": _told(estimate(results.scores[c, r])),
            "scored": int((~np.isnan(results.scores[c, r])).sum()),
            "prompts": len(by_prompt(results.scores[c, r])),
            "optimised_for": (c, r) in marks,
        }
        for c, label in enumerate(labels)
        for r, column in enumerate(columns)
    ]
    return {
        "contestants": [
            {"label": c.label, **c.settings(), **costs(results, k)} for k, c in enumerate(plan.contestants)
        ],
        "rewards": [{"label": c.label, "spec": c.spec, **c.options} for c in plan.columns],
        "prompts": plan.prompts,
        "seeds": plan.seeds,
        "dtype": plan.dtype,
        "batch_size": plan.batch_size,
        "notes": notes(results),
        "table": table,
        "pairs": [pair_record(pair, labels, columns) for pair in pairs(results.scores)],
        "pictures": pictures(results),
    }


def pair_record(pair: Pair, labels: list[str], columns: list[str]) -> dict[str, Any]:
    names = {"contestant": labels[pair.contestant], "against": labels[pair.against], "reward": columns[pair.reward]}
    counts = {name: getattr(pair, name) for name in ("wins", "ties", "losses", "prompts")}
    return names | {"difference": _told(pair.difference), "win_rate": _told(pair.win_rate)} | counts


def pictures(results: Results) -> list[dict[str, Any]]:
    """A line a picture: whose, of what, its file, its cost, and its score by every reward or why there is none."""
    plan, lines = results.plan, []
    for (c, p, s), picture in results.drawn.items():
        line: dict[str, Any] = {"contestant": plan.contestants[c].label, "prompt": p, "seed": plan.seeds[s]}
        line |= {"file": picture.file or None, "nfe": picture.nfe, "seconds": round(picture.seconds, 3)}
        line |= {"why": picture.why} if picture.why else {}
        scores: dict[str, Any] = {}
        for r, column in enumerate(plan.columns):
            score = results.details.get((c, r, p, s), {"score": None})
            scores[column.label] = score["score"]
            line |= {f"{column.label}_{part}": value for part, value in score.get("parts", {}).items()}
            line |= {f"{column.label}_why": score["why"]} if "why" in score else {}
        lines.append(line | {"scores": scores})
    return lines


def costs(results: Results, contestant: int) -> dict[str, float]:
    """Denoiser calls and seconds a picture."""
    own = [picture for (c, _, _), picture in results.drawn.items() if c == contestant]
    return {
        "nfe_a_picture": float(np.mean([picture.nfe for picture in own])),
        "seconds_a_picture": round(float(np.mean([picture.seconds for picture in own])), 4),
    }


def notes(results: Results) -> list[str]:
    """What a reader of the table must know: pictures and scores that are missing, and why; too few prompts."""
    plan, texts = results.plan, []
    lost = Counter((c, picture.why) for (c, _, _), picture in results.drawn.items() if not picture.file)
    for c, contestant in enumerate(plan.contestants):
        reasons = {why: count for (k, why), count in lost.items() if k == c}
        if reasons:
            texts.append(_missing(f"{contestant.label}: {sum(reasons.values())} pictures could not be drawn", reasons))
    for r, column in enumerate(plan.columns):
        reasons = Counter(score["why"] for (_, k, _, _), score in results.details.items() if k == r and "why" in score)
        if reasons:
            of = sum(1 for _, k, _, _ in results.details if k == r)
            texts.append(_missing(f"{column.label}: {sum(reasons.values())} of {of} pictures have no score", reasons))
    if len(plan.prompts) < FEW:
        texts.append(f"{len(plan.prompts)} prompts are few: intervals by bootstrap are then too narrow")
    return texts


def _missing(what: str, reasons: dict[str, int]) -> str:
    first = next(iter(reasons))
    return f"{what}; e.g. {first}" if len(reasons) > 1 else f"{what}: {first}"


def lines(record: dict[str, Any]) -> list[str]:
    """The table in words, for the screen."""
    texts = []
    for entry in record["table"]:
        star = " *" if entry["optimised_for"] else ""
        texts.append(f"{entry['contestant']}: {entry['reward']} {shown(entry['mean'])}{star}")
    for pair in record["pairs"]:
        counts = f"{pair['wins']} won, {pair['ties']} tied, {pair['losses']} lost"
        head = f"{pair['contestant']} against {pair['against']}: {pair['reward']}"
        texts.append(f"{head} {shown(pair['difference'], '+')}, win rate {shown(pair['win_rate'], '%')} ({counts})")
    if record["pairs"]:
        texts.append("in brackets 95 % intervals over prompts; a tie counts as half a win")
    if any(entry["optimised_for"] for entry in record["table"]):
        texts.append("* searched or trained for this very reward, which is then no independent judge")
    return texts + [f"note: {note}" for note in record["notes"]]


def shown(value: dict[str, float | None] | None, style: str = "") -> str:
    """A number with its interval; `style` "+" shows its sign, "%" a share in per cent."""
    if value is None:
        return "-"
    form = {"+": "{:+.4f}", "%": "{:.1%}"}.get(style, "{:.4f}")
    interval = f" ({form.format(value['low'])} to {form.format(value['high'])})" if value["low"] is not None else ""
    return form.format(value["mean"]) + interval


def _told(value: Estimate | None) -> dict[str, float | None] | None:
    return None if value is None else asdict(value)
