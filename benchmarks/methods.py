"""Every method on the shapes world, at one budget of denoiser calls: what its reward gains, and what the truth does.

    python benchmarks/methods.py                                   # all methods, three seeds; hours on two CPU cores
    python benchmarks/methods.py --methods flow_grpo draft --seeds 0 --budget 20000
    python benchmarks/methods.py --reward jpeg_compressibility --methods ddpo rlcm --budget 10000 --out runs/jpeg
    python benchmarks/methods.py --write benchmarks/methods.md     # the table and its figure from what is in --out

A run of a method trains on `--reward` from its world's base model until about `budget` rows have gone through the
denoiser (a sample's forward in one step is one row; a backward pass is not counted, but its forward is). Steps are set
from the rows of a first short run. Then, with the averaged weights and the sampler of evaluations:
    reward, strict gold       200 held-out captions, one picture each, paired with the base's pictures
    yes                       the shipped vision-language model's P(Yes), never trained on here
    own reward                of SRPO, which trains on the difference that two words before the caption make
    Vendi                     mean Vendi score of 8 pictures a caption, 25 captions, on the shipped CLIP's features
Controls: the base itself, and the best of 8 pictures a caption by the reward. Intervals are 95 %, over captions, each
with the mean of its seeds. Finished runs in --out are read, not run again; every run is a process of its own.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

JUDGE, GROUP, CAPTIONS = "{name: vqascore, model: shapes-vlm}", 8, 25
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: world, trainer, options beside its defaults
    "flow_grpo": ("shapes-flow", "flow_grpo", {}),
    "vgpo": ("shapes-flow", "vgpo", {}),
    "vgpo, relative alone": ("shapes-flow", "vgpo", {"absolute": 0.0}),
    "branch_grpo": ("shapes-flow", "tree_grpo", {"method": "branch_grpo"}),
    "tempflow": ("shapes-flow", "tree_grpo", {"method": "tempflow"}),
    "draft_1": ("shapes-flow", "reward_backprop", {"method": "draft"}),
    "draft_lv": ("shapes-flow", "reward_backprop", {"method": "draft_lv"}),
    "alignprop": ("shapes-flow", "reward_backprop", {"method": "alignprop"}),
    "refl": ("shapes-flow", "reward_backprop", {"method": "refl"}),
    "srpo": ("shapes-flow", "reward_backprop", {"method": "srpo", "positive": "Realistic", "negative": "Painting"}),
    "adjoint_matching": ("shapes-flow", "adjoint_matching", {}),
    "ddpo": ("shapes-diffusion", "ddpo", {}),
    "texforce": ("shapes-diffusion", "ddpo", {"policy": "text"}),
    "b2_diffurl": ("shapes-diffusion", "tree_grpo", {"method": "b2_diffurl", "sampler": "ddim", "eta": 1.0}),
    "draft_1 (diffusion)": ("shapes-diffusion", "reward_backprop", {"method": "draft"}),
    "rlcm": ("shapes-consistency", "ddpo", {"num_steps": 4}),
    "rlcm_rebel": ("shapes-consistency", "ddpo", {"num_steps": 4, "objective": "rebel"}),
    "draft_1 (consistency)": ("shapes-consistency", "reward_backprop", {"method": "draft", "num_steps": 4}),
}


class Rows:
    """Counts the rows that go through a trainer's denoiser, except in evaluations."""

    def __init__(self) -> None:
        from visalign.training.loop import setup

        self.count, self.parts, self.paused = 0, None, False
        build, evaluate = setup.build, setup.evaluate_with

        def counted(*args, **kwargs):
            self.parts = build(*args, **kwargs)
            layers = self.parts.generator.denoiser.modules()  # its first: passed only where it really runs
            first = next(m for m in layers if not list(m.children()) and list(m.parameters()))
            first.register_forward_pre_hook(self.add)
            return self.parts

        def uncounted(*args, **kwargs):
            self.paused = True
            try:
                return evaluate(*args, **kwargs)
            finally:
                self.paused = False

        setup.build, setup.evaluate_with = counted, uncounted

    def add(self, _module, args) -> None:
        if not self.paused:
            self.count += len(args[0])


def train(name: str, reward: str, steps: int, seed: int, prompts: int, folder: Path) -> tuple[Rows, float]:
    """One run of a method with the rows that it took, and the seconds of its training."""
    world, trainer, changes = METHODS[name]
    module = importlib.import_module(f"visalign.trainers.{trainer}")
    rows = Rows()
    options = dict(model=world, reward=reward, steps=steps, seed=seed, eval_count=prompts, monitor="off", **changes)
    module.main(module.Config(**options, run_dir=str(folder), keep=1, save_every=max(1, steps // 4)))
    return rows, json.loads((folder / "summary.json").read_text())["train_seconds"]


@torch.no_grad()
def pictures(generator, captions: list[str], each: int = 1):
    """`each` pictures a caption (its own in a row), by the sampler of evaluations."""
    from visalign.sampling.rollout import rollout
    from visalign.sampling.seeds import derived_seed
    from visalign.transitions import sampler_of

    sampler = sampler_of(generator.schedule)
    pairs = [(caption, derived_seed(1234, 4, n, k)) for n, caption in enumerate(captions) for k in range(each)]
    parts = []
    for start in range(0, len(pairs), 50):
        texts, seeds = zip(*pairs[start : start + 50])
        noisy = None if sampler.stochastic else []
        parts.append(rollout(generator, list(texts), list(seeds), sampler, sde_steps=noisy).images)
    return torch.cat(parts), [caption for caption, _ in pairs]


def look(generator, reward: str, count: int, methods: list[str]) -> dict[str, Any]:
    """Scores of each held-out caption, also by the own rewards of these methods, and the Vendi scores."""
    import yaml

    from visalign.rewards import make_reward, score
    from visalign.rewards.embedding.encoder import SHIPPED, ClipEncoder
    from visalign.rewards.groups.sets import vendi_score
    from visalign.worlds.shapes import world_prompts

    captions = world_prompts("test", count)
    images, texts = pictures(generator, captions)
    judges = {"reward": make_reward(reward), "gold": make_reward("gold", strict=True)}
    judges["yes"] = make_reward(yaml.safe_load(JUDGE))
    seen = {name: score(judge, images, texts).total.tolist() for name, judge in judges.items()}
    for name in (method for method in methods if "positive" in METHODS[method][2]):
        words = [METHODS[name][2][side] for side in ("positive", "negative")]
        wanted, unwanted = (score(judges["reward"], images, [f"{w}. {text}" for text in texts]).total for w in words)
        seen[f"own of {name}"] = (wanted - unwanted).tolist()
    images, texts = pictures(generator, captions[:CAPTIONS], GROUP)
    features = ClipEncoder(str(SHIPPED), None).embed_images(images).unflatten(0, (-1, GROUP))
    return {**seen, "vendi": [float(vendi_score(group)) for group in features]}


def best_of(generator, reward: str, count: int) -> dict[str, Any]:
    """As `look`, of the picture that the reward likes best of GROUP."""
    import yaml

    from visalign.rewards import make_reward, score
    from visalign.worlds.shapes import world_prompts

    images, texts = pictures(generator, world_prompts("test", count), GROUP)
    liked = score(make_reward(reward), images, texts).total.view(count, GROUP)
    rows = (torch.arange(count) * GROUP + liked.argmax(1)).tolist()
    judges = {"gold": make_reward("gold", strict=True), "yes": make_reward(yaml.safe_load(JUDGE))}
    seen = {n: score(judge, images[rows], [texts[r] for r in rows]).total.tolist() for n, judge in judges.items()}
    return {"reward": liked.amax(1).tolist(), **seen, "vendi": None}


def run_one(name: str, reward: str, seed: int, budget: int, prompts: int, out: Path) -> None:
    """In a process of its own: a method with one seed, or a control, into a JSON file."""
    from visalign.pipeline.generator import Generator
    from visalign.worlds import resolve_model

    control, _, world = name.partition(" of ")
    if control in ("base", "best"):
        generator = Generator.from_pretrained(resolve_model(world), dtype=torch.float32)
        base = control == "base"
        result = look(generator, reward, prompts, list(METHODS)) if base else best_of(generator, reward, prompts)
        result |= {"rows": 0, "images": 0, "seconds": 0.0}
    else:
        folder = out / f"{name.replace(' ', '_')}-{seed}"
        shutil.rmtree(folder / "short", ignore_errors=True)  # of a run that was stopped
        rows, _ = train(name, reward, 1, seed, 8, folder / "short")
        steps = max(1, round(budget / rows.count))
        started = time.monotonic()
        rows, seconds = train(name, reward, steps, seed, 8, folder / f"run-{int(started)}")
        rows.paused, policy = True, rows.parts.policy
        with policy.swapped(rows.parts.average.values):
            result = look(rows.parts.generator, reward, prompts, [name])
        result |= {"rows": rows.count, "images": rows.parts.images_sampled, "seconds": seconds, "steps": steps}
    (out / f"{name.replace(' ', '_')}-{seed}.json").write_text(json.dumps(result))


def interval(values: np.ndarray) -> str:
    """Mean with its 95 % interval over captions."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.3f} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def table(names: list[str], seeds: list[int], out: Path) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """The table in Markdown, and each method's gains by judge, for the figure."""
    gained = ["reward gain", "strict gold gain", "yes gain"]
    head = ["method", "model", "seeds", *gained, "Vendi (base)", "rows", "images", "seconds"]
    lines, notes, gains = [], [], {}
    for name in names:
        world = name.partition(" of ")[2] or METHODS[name][0]
        found = [out / f"{name.replace(' ', '_')}-{seed}.json" for seed in seeds]
        runs = [json.loads(file.read_text()) for file in found if file.is_file()]
        base_file = out / f"base_of_{world}-0.json"
        if not runs or not base_file.is_file():
            continue
        base = json.loads(base_file.read_text())
        label = name.partition(" of ")[0]
        if label == "base":
            cells = [f"{np.mean(base[judge]):.3f}" for judge in ("reward", "gold", "yes")]
        else:
            gains[name] = {judge: gain(runs, base, judge) for judge in ("reward", "gold", "yes")}
            if (own := f"own of {name}") in base:
                notes.append(f"\n{name}, gain of its own reward: {interval(gain(runs, base, own))}\n")
            cells = [interval(gains[name][judge]) for judge in ("reward", "gold", "yes")]
        vendi = [v for r in runs for v in r["vendi"] or ()]
        cells.append(f"{np.mean(vendi):.2f} ({np.mean(base['vendi']):.2f})" if vendi else "-")
        cells += [f"{np.mean([r[key] for r in runs]):,.0f}" for key in ("rows", "images", "seconds")]
        label = {"base": "base (its values)", "best": f"best of {GROUP}"}.get(label, label)
        lines.append(f"| {' | '.join([label, world.removeprefix('shapes-'), str(len(runs)), *cells])} |")
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]) + "\n" + "".join(notes), gains


def gain(runs: list[dict[str, Any]], base: dict[str, Any], judge: str) -> np.ndarray:
    """(captions,): of a judge's score over the base's, the mean of the runs."""
    return np.mean([np.array(run[judge], float) - np.array(base[judge], float) for run in runs], axis=0)


def figure(gains: dict[str, dict[str, np.ndarray]], file: Path) -> None:
    """Gain of the reward and of strict gold, method by method, with intervals."""
    names = list(gains)
    _, axis = plt.subplots(figsize=(8, 0.42 * len(names) + 1.2))
    for offset, (judge, label) in enumerate((("reward", "reward (trained on)"), ("gold", "strict gold"))):
        means = [gains[n][judge].mean() for n in names]
        halves = [1.96 * gains[n][judge].std(ddof=1) / len(gains[n][judge]) ** 0.5 for n in names]
        places = np.arange(len(names)) + 0.18 * (2 * offset - 1)
        axis.errorbar(means, places, xerr=halves, fmt="o", capsize=3, label=label)
    axis.set_yticks(range(len(names)), [n.replace(" of shapes-", " of 8, ") for n in names])
    axis.invert_yaxis()
    axis.axvline(0, color="#999", linewidth=1)
    axis.set_xlabel("gain on held-out captions, 95 % intervals")
    axis.legend(loc="lower right")
    plt.tight_layout()
    plt.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--reward", default="clip_match")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=40_000, help="rows through the denoiser")
    parser.add_argument("--prompts", type=int, default=200, help="held-out captions")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--write", type=Path, help="write the table here, and the figure beside it as .png")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        given = (arguments.reward, arguments.seeds[0], arguments.budget, arguments.prompts, arguments.out)
        return run_one(arguments.one, *given)
    worlds = list(dict.fromkeys(METHODS[name][0] for name in arguments.methods))
    controls = [f"{control} of {world}" for world in worlds for control in ("base", "best")]
    todo = [(name, 0) for name in controls] + [(n, s) for s in arguments.seeds for n in arguments.methods]
    for name, seed in todo if not arguments.write else ():
        if not (arguments.out / f"{name.replace(' ', '_')}-{seed}.json").is_file():
            command = [sys.executable, __file__, "--one", name, "--seeds", str(seed), "--reward", arguments.reward]
            command += ["--budget", str(arguments.budget), "--prompts", str(arguments.prompts)]
            subprocess.run([*command, "--out", str(arguments.out)], check=True)
    text, gains = table([*controls, *arguments.methods], arguments.seeds, arguments.out)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
        figure(gains, arguments.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
