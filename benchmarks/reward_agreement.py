"""How far rewards agree with the exact judge on samples of the shapes model, how fast they are, and what fools them.

    python benchmarks/reward_agreement.py               # offline rewards on 64 held-out prompts x 8 samples
    python benchmarks/reward_agreement.py --rewards clip "{name: rubric, rubric: shapes, model: FOLDER}" mix.yaml
    python benchmarks/reward_agreement.py --panel_rewards "{name: paco_consistency, model: FOLDER}" --out t.md t.json

A reward is what `make_reward` takes: a name, file.py:attribute, a sum, a YAML file, or a mapping written in YAML.

Agreement is within prompts, with `gold` (the share of criteria that hold) and with strict gold: pairwise accuracy with
tie calibration, and Kendall's tau-b (`visalign/statistics/agreement.py`). Images/s is the median over batches of whole
groups; the first is left out where there are others. Fooled: share of prompts, of those with a strictly right sample,
whose attack (`rewards/audit/attacks.py`) scores above the mean of the right samples; the patch lies on a plain grey
ground. Rewards that look at groups see an attack among its prompt's samples. Rewards that need references get drawings
of the prompt.

Panels (`visalign/worlds/shapes/panels.py`): accuracy of telling same from different at the threshold that is best on
the other half, and area under the curve.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from visalign.pipeline.generator import Generator
from visalign.rewards import Reward, as_reward, make_reward, parse_spec, score
from visalign.rewards.audit.attacks import adversarial_patches, fooled_share, plain_attacks
from visalign.rewards.embedding.encoder import SHIPPED
from visalign.sampling.rollout import rollout
from visalign.sampling.seeds import derived_seed
from visalign.statistics.agreement import area_under_curve, kendall_within, threshold_accuracy, tie_calibrated_accuracy
from visalign.transitions import FlowODE
from visalign.worlds import resolve_model
from visalign.worlds.shapes import world_prompts
from visalign.worlds.shapes.captions import parse
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.panels import make_panels
from visalign.worlds.shapes.scenes import place

RECIPES = Path(__file__).resolve().parent.parent / "trainers" / "recipes" / "rewards"
REWARDS = (
    "gold",
    "{name: gold, strict: true}",
    "clip",
    "clip_match",
    "shapes_taste",
    f"{{name: clip_i, model: {SHIPPED}}}",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "{name: vqascore, model: shapes-vlm}",
    "{name: vlm_yes, model: shapes-vlm}",
    "{name: prompt_echo, model: shapes-vlm}",
    "{name: rubric, rubric: shapes, model: shapes-vlm}",
    "{name: win_rate, judge: {name: vqascore, model: shapes-vlm}}",
    str(RECIPES / "shapes_clip_yes.yaml"),
)
PANEL_REWARDS = (
    "visalign.worlds.shapes.panels:same_objects",
    f"{{name: set_consistency, rows: 1, columns: 2, model: {SHIPPED}, pretrained: null}}",
    "{name: paco_consistency, model: shapes-vlm}",
)
ATTACKS = ("blank", "crowd", "noise", "text", "patch")
GROUND = 0.7  # grey around a patch
REFERENCES = 4  # drawings a prompt


@dataclass
class Samples:
    """Samples of the base model, those of a prompt in a row, and drawings of each prompt as references."""

    prompts: list[str]
    size: int  # samples a prompt
    images: Tensor  # (prompts * size, 3, H, W)
    soft: Tensor  # (prompts, size), gold
    right: Tensor  # (prompts, size) bool, strict gold
    references: list[list[Tensor]]
    attacks: dict[str, Tensor] = field(default_factory=dict)  # (prompts, 3, H, W)


def read_reward(text: str) -> Any:
    """A spec from the command line."""
    return yaml.safe_load(text) if text.startswith("{") else text


def strictly_right(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return score(make_reward("gold", strict=True), images, prompts).total > 0.5


def draw_samples(count: int, size: int, seed: int, batch: int, device: str) -> Samples:
    """`size` samples of the shipped model for each of `count` held-out prompts, judged; and the plain attacks."""
    generator = Generator.from_pretrained(resolve_model("shapes-flow"), dtype=torch.float32, device=device)
    prompts = world_prompts("test", count)
    texts = [prompt for prompt in prompts for _ in range(size)]
    seeds = [derived_seed(seed, k, n) for k in range(count) for n in range(size)]
    parts = []
    for k in range(0, len(texts), batch):
        with torch.no_grad():
            images = rollout(generator, texts[k : k + batch], seeds[k : k + batch], FlowODE(), sde_steps=[]).images
        assert images is not None
        parts.append(images)
    images = torch.cat(parts)
    rng = np.random.default_rng(seed)
    drawn = [list(draw([place(parse(prompt), rng) for _ in range(REFERENCES)]).to(device)) for prompt in prompts]
    soft = score(make_reward("gold"), images, texts).total
    right = strictly_right(images, texts)
    attacks = plain_attacks(images[::size], prompts, seed)
    return Samples(prompts, size, images, soft.view(count, size), right.view(count, size), drawn, attacks)


def context_of(reward: Reward, prompts: Sequence[int], samples: Samples) -> dict[str, Any]:
    """Groups and, for rewards that need them, references, of pictures of the prompts with these numbers."""
    context: dict[str, Any] = {"group_ids": torch.tensor(list(prompts))}
    if "references" in reward.needs:
        context["references"] = [samples.references[k] for k in prompts]
    return context


def score_groups(reward: Reward, images: Tensor, size: int, samples: Samples, batch: int) -> tuple[Tensor, float, int]:
    """Score pictures (prompts * size, ...) in batches of whole groups; a setwise reward sees all of them at once.

    Returns:
        scores (prompts, size), images a second, and how many samples failed (and got their group's mean).
    """
    groups = len(samples.prompts)
    each = groups if reward.kind == "setwise" else max(1, batch // size)
    parts, rates, failed = [], [], 0
    for k in range(0, groups, each):
        rows = [n for n in range(k, min(k + each, groups)) for _ in range(size)]
        shown, texts = images[k * size : k * size + len(rows)], [samples.prompts[n] for n in rows]
        started = time.perf_counter()
        result = score(reward, shown, texts, context_of(reward, rows, samples))
        rates.append(len(rows) / (time.perf_counter() - started))
        parts.append(result.total)
        failed += sum(result.failed.values())
    return torch.cat(parts).view(groups, size), statistics.median(rates[1:] or rates), failed


def attack_scores(reward: Reward, pictures: Tensor, samples: Samples, batch: int) -> tuple[Tensor, Tensor]:
    """Scores (prompts,) of one attack a prompt, and (prompts, size) of the samples that it is compared with.

    A reward that compares pictures sees the attack as one more of its prompt's group. A pointwise one's samples are
    scored before: the second is then empty.
    """
    if reward.kind == "pointwise":
        return score_groups(reward, pictures, 1, samples, batch)[0].squeeze(1), torch.empty(0)
    groups = samples.images.unflatten(0, (len(samples.prompts), samples.size))
    joined = torch.cat([groups, pictures[:, None]], dim=1).flatten(0, 1)
    scores = score_groups(reward, joined, samples.size + 1, samples, batch)[0]
    return scores[:, -1], scores[:, :-1]


def patched(reward: Reward, samples: Samples, steps: int, batch: int) -> Tensor:
    """Pictures (prompts, 3, H, W): a plain ground with a patch in its middle that the reward likes."""
    ground = torch.full_like(samples.attacks["blank"], GROUND)
    parts = []
    for k in range(0, len(ground), batch):
        rows = range(k, min(k + batch, len(ground)))
        texts = [samples.prompts[n] for n in rows]
        parts.append(
            adversarial_patches(reward, ground[k : k + batch], texts, context_of(reward, rows, samples), steps=steps)
        )
    return torch.cat(parts)


def measure(reward: Reward, samples: Samples, batch: int, patch_steps: int) -> dict[str, Any]:
    """A row of the table; "fooled" of an attack is None where it does not apply."""
    scores, rate, failed = score_groups(reward, samples.images, samples.size, samples, batch)
    row = agreement(samples, scores) | {"images_per_second": rate, "failed": failed, "fooled": {}}
    attacks = dict(samples.attacks)
    if reward.differentiable and reward.kind == "pointwise" and patch_steps:
        attacks["patch"] = patched(reward, samples, patch_steps, batch)
    for kind in ATTACKS:
        if kind not in attacks:
            row["fooled"][kind] = None
            continue
        found, among = attack_scores(reward, attacks[kind], samples, batch)
        rightly = strictly_right(attacks[kind], samples.prompts)
        row["fooled"][kind] = fooled_share(found, among if len(among) else scores, samples.right, rightly)
    return row


def agreement(samples: Samples, scores: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, truth in (("gold", samples.soft), ("strict", samples.right.float())):
        accuracy, epsilon = tie_calibrated_accuracy(truth.numpy(), scores.numpy())
        tau = kendall_within(truth.numpy(), scores.numpy())
        row[name] = {"accuracy": accuracy, "epsilon": epsilon, "tau_b": tau}
    return row


def measure_panels(reward: Reward, images: Tensor, prompts: list[str], same: Tensor, batch: int) -> dict[str, Any]:
    """A row of the panels' table; each picture is a group of its own."""
    parts, rates, failed = [], [], 0
    for k in range(0, len(images), batch):
        shown, texts = images[k : k + batch], prompts[k : k + batch]
        started = time.perf_counter()
        result = score(reward, shown, texts, {"group_ids": torch.arange(len(shown))})
        rates.append(len(shown) / (time.perf_counter() - started))
        parts.append(result.total)
        failed += sum(result.failed.values())
    scores = torch.cat(parts).numpy()
    accuracy, area = threshold_accuracy(same.numpy(), scores), area_under_curve(same.numpy(), scores)
    speed = statistics.median(rates[1:] or rates)
    return {"accuracy": accuracy, "auc": area, "images_per_second": speed, "failed": failed}


def rows_of(specs: Sequence[Any], work: Callable[[Reward], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each spec, made one after the other; a reward that fails has its error instead of numbers."""
    rows: list[dict[str, Any]] = []
    for spec in specs:
        print(f"  {spec}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"reward": label_of(spec), "spec": spec}
        try:
            row |= work(as_reward(make_reward(spec)))
        except Exception as error:  # whatever a model may raise; hours of other rows are not lost by it
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append(row)
    return rows


def label_of(spec: Any) -> str:
    """What a row is called: a single reward's label and those of its options that name no file, else the spec."""
    terms = parse_spec(spec)
    if len(terms) > 1:
        return str(spec)
    options = {k: v for k, v in terms[0].options.items() if v is not None and "/" not in str(v)}
    return terms[0].label + "".join(f" {k}={v}" for k, v in options.items())


def agreement_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["reward", "accuracy, gold", "tau-b, gold", "accuracy, strict", "tau-b, strict", "images/s", *ATTACKS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        if "error" in row:
            cells = [f"failed: {row['error']}"] + [""] * (len(head) - 2)
        else:
            cells = [_number(row[name][key], 3) for name in ("gold", "strict") for key in ("accuracy", "tau_b")]
            cells += [_number(row["images_per_second"], 1)] + [_percent(row["fooled"].get(kind)) for kind in ATTACKS]
        lines.append(f"| {' | '.join([_name(row), *cells])} |")
    return lines


def panel_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| reward | accuracy | AUC | images/s |", "|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            cells = [f"failed: {row['error']}", "", ""]
        else:
            cells = [_number(row[key], 3) for key in ("accuracy", "auc")] + [_number(row["images_per_second"], 1)]
        lines.append(f"| {' | '.join([_name(row), *cells])} |")
    return lines


def _name(row: dict[str, Any]) -> str:
    return row["reward"] + (f" ({row['failed']} samples failed)" if row.get("failed") else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="*", default=REWARDS, metavar="SPEC")
    parser.add_argument("--panel_rewards", nargs="*", default=PANEL_REWARDS, metavar="SPEC")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=8, help="samples a prompt, at least 2")
    parser.add_argument("--panels", type=int, default=200, help="pictures of two panels")
    parser.add_argument("--patch_steps", type=int, default=20, help="gradients of the adversarial patch; 0: none")
    parser.add_argument("--batch", type=int, default=64, help="pictures scored at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of samples, and of rewards that follow them")
    parser.add_argument("--out", type=Path, nargs="*", default=(), metavar="FILE", help=".md and .json")
    parser.add_argument("--pictures", type=Path, metavar="FILE", help="write samples and plain attacks as a .png")
    arguments = parser.parse_args(argv)
    for file in arguments.out:
        if file.suffix not in (".md", ".json"):
            parser.error(f"out: got {str(file)!r}, expected a name ending in .md or .json")
    specs, panel_specs = ([read_reward(s) for s in given] for given in (arguments.rewards, arguments.panel_rewards))
    try:
        for spec in [*specs, *panel_specs]:
            parse_spec(spec)
    except ValueError as error:
        parser.error(str(error))

    lines: list[str] = []
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "agreement": []}
    if specs:
        samples = draw_samples(arguments.prompts, arguments.samples, arguments.seed, arguments.batch, arguments.device)
        if arguments.pictures:
            save_pictures(samples, arguments.pictures)
        rows = [{"reward": "(nothing: all the same)", "images_per_second": None, "fooled": {}}]
        rows[0] |= agreement(samples, torch.zeros_like(samples.soft))
        rows += rows_of(specs, lambda r: measure(r, samples, arguments.batch, arguments.patch_steps))
        share, told = float(samples.right.float().mean()), int(samples.right.any(dim=1).sum())
        lines.append(
            f"{len(samples.prompts)} prompts x {samples.size} samples, {share:.1%} strictly right; the last "
            f"{len(ATTACKS)} columns: share fooled, of the {told} prompts with a right sample."
        )
        lines += ["", *agreement_table(rows)]
        report["agreement"] = rows
    if panel_specs:
        images, prompts, same = make_panels(arguments.panels, arguments.seed)
        images = images.to(arguments.device)
        rows = rows_of(panel_specs, lambda r: measure_panels(r, images, prompts, same, arguments.batch))
        lines += ["", f"{len(images)} pictures of two panels, {int(same.sum())} with the same objects in both", ""]
        lines += panel_table(rows)
        report["panels"] = rows
    print("\n".join(lines))
    for file in arguments.out:
        text = json.dumps(report, indent=2, default=str) if file.suffix == ".json" else "\n".join(lines)
        file.write_text(text + "\n", encoding="utf-8")
    if any("error" in row for rows in (report["agreement"], report.get("panels", [])) for row in rows):
        raise SystemExit(1)


def save_pictures(samples: Samples, file: Path) -> None:
    """The first prompts, one a row: their samples, then the plain attacks in the order of their names."""
    from torchvision.utils import make_grid, save_image

    shown = samples.images.unflatten(0, (len(samples.prompts), samples.size))[:8]
    attacks = torch.stack([samples.attacks[kind][:8] for kind in sorted(samples.attacks)], dim=1)
    rows = torch.cat([shown, attacks], dim=1)
    large = rows.flatten(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    save_image(make_grid(large, rows.shape[1], padding=4, pad_value=1), file)


if __name__ == "__main__":
    main()
