"""Searches on the shapes world at equal cost: reward and truth over denoiser calls, and what matching best of N takes.

    python benchmarks/search.py                              # all methods, 50 captions, three seeds; hours on CPU
    python benchmarks/search.py --methods best-of-n dts-star --captions 10 --doublings 5
    python benchmarks/search.py --write benchmarks/search.md # the table and its figure from what is in --out

Budgets are T 2^j calls a caption, j = 0 .. doublings. An anytime method is run once at the largest, and its trace is
read at the others; a method of fixed size is run at each. `clip_match` is searched for. Steps draw noise, but what
searches the initial noise (zero-order, paths, reno) takes those of the ODE, whose base law is another; best of N is run
on both. All start from the same initial noise. Strict gold, the held-out truth, is read off the best picture so far.
Best of N's curve is estimated from its whole pool. Finished searches in --out are read, not run again; several
processes may share the work (--part 0/2).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

REWARD, GOLD = "clip_match", {"name": "gold", "strict": True}


@dataclass(frozen=True)
class Entry:
    """A method with settings; `settings` of one of fixed size follow from its budget and T; None: no room.

    `doublings`: its budgets go so far, where calls with gradient would take the longest.
    """

    method: str
    anytime: bool
    settings: Callable[[int, int], dict[str, Any] | None] = lambda budget, steps: {}
    doublings: int = 99


TREE: dict[str, Any] = {
    "branch_at": [1, 3, 5, 7],
    "tilt": 30.0,
    "widening": 3.0,
    "exponent": 0.2,
    "leaves_at_once": 4,
}

# Settings were chosen at 160 calls on 16 captions of the training split, by hand from three to nine tries a method;
# the tree's branches at 430 calls on 12, from nine tries.
ENTRIES: dict[str, Entry] = {
    "best-of-n": Entry("best-of-n", True),
    "best-of-n (ODE)": Entry("best-of-n", True, lambda *_: {"transition": "ode"}),
    "dts-star": Entry("dts-star", True, lambda *_: TREE),
    "zero-order": Entry("zero-order", True),
    "paths": Entry("paths", True, doublings=5),
    "fk": Entry("fk", False, lambda *_: {"tilt": 80.0, "start_step": 1, "every": 1}),
    "svdd": Entry("svdd", False, lambda budget, steps: svdd_settings(budget, steps)),
    "rbf": Entry("rbf", False, lambda budget, steps: {"chains": 2, "initial": max(1, budget // 16)}, 5),
    "das": Entry("das", False, lambda *_: {"tilt": 30.0}, 5),
    "guidance": Entry("guidance", True, lambda *_: {"scale": 30.0}, 5),
    "dts-star, guided": Entry("dts-star", True, lambda *_: {**TREE, "reward_guidance": 0.3}, 5),
    "reno": Entry("reno", True, lambda *_: {}, 5),
}


def svdd_settings(budget: int, steps: int) -> dict[str, Any] | None:
    """One chain with as many children as the budget holds; plain sampling is left to best of n."""
    children = (budget - 1) // (steps - 1)
    return {"chains": 1, "children": children} if children > 1 else None


def search_one(generator, judges, caption: str, seed: int, entry: Entry, budget: int) -> dict[str, Any] | None:
    """One search: [nfe, best reward, gold of that picture] at each change, and of a pool all; None without room."""
    from visalign.search import events_of, prepare

    settings = entry.settings(budget, generator.schedule.num_steps)
    if settings is None:
        return None
    reward, gold = judges
    options = {"seed": seed, "batch_size": 16, **settings}
    chain = prepare(generator, caption, reward, entry.method, budget=budget, **options)
    trace: list[list[float]] = []
    pool: list[float] = []
    golds: list[float] = []
    best, started = None, time.monotonic()
    for event in events_of(chain, entry.method, options):
        if entry.method == "best-of-n":
            pool += event.rewards
            golds += [float(value) for value in gold(chain.images, [caption] * len(chain.images))]
        if event.best is not None and event.best is not best:
            best = event.best
            trace.append([event.nfe, best.reward, float(gold(best.image, [caption])[0])])
    return {
        "trace": trace,
        "pool": pool,
        "golds": golds,
        "ledger": chain.ledger.to_dict(),
        "seconds": time.monotonic() - started,
    }


def jobs(arguments: argparse.Namespace, steps: int) -> Iterator[tuple[str, int, int, int]]:
    """(entry, caption, seed, budget), seed by seed and caption by caption, so that whatever is finished is balanced."""
    for seed in range(arguments.seeds):
        for caption in range(arguments.captions):
            for name in arguments.methods:
                budgets = [steps * 2**j for j in range(min(arguments.doublings, ENTRIES[name].doublings) + 1)]
                for budget in budgets[-1:] if ENTRIES[name].anytime else budgets:
                    yield name, caption, seed, budget


def work(arguments: argparse.Namespace) -> None:
    """Run what is not in --out yet, of this process's part."""
    import torch

    from visalign.pipeline.generator import Generator
    from visalign.rewards import make_reward
    from visalign.worlds import resolve_model
    from visalign.worlds.shapes import world_prompts

    part, parts = (int(number) for number in arguments.part.split("/"))
    generator = Generator.from_pretrained(
        resolve_model(arguments.model), dtype=torch.float32, num_steps=arguments.steps
    )
    if arguments.lora:
        generator.pipeline.load_lora_weights(arguments.lora)
    judges = make_reward(REWARD), make_reward(GOLD)
    captions = world_prompts("test", arguments.captions)
    generator.noise(captions[:1], [0])
    file = arguments.out / f"{arguments.tag}-{part}of{parts}.jsonl"
    done = {tuple(row["key"]) for row in read(arguments.out, arguments.tag)}
    for key in jobs(arguments, generator.schedule.num_steps):
        name, caption, seed, budget = key
        if caption % parts != part or key in done:
            continue
        found = search_one(generator, judges, captions[caption], seed, ENTRIES[name], budget)
        if found is not None:
            with open(file, "a") as lines:
                lines.write(json.dumps({"key": key, "steps": generator.schedule.num_steps, **found}) + "\n")


def read(out: Path, tag: str) -> list[dict[str, Any]]:
    """The finished searches of all parts; a line cut short by a kill is left out."""
    rows = []
    for file in sorted(out.glob(f"{tag}-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def curves(rows: list[dict[str, Any]], name: str, budgets: list[int], shape: tuple[int, int]) -> np.ndarray | None:
    """Reward and gold, (2, captions, seeds, budgets), of an entry; NaN where it has no room or was not run."""
    from visalign.search import expected_best
    from visalign.search.comparison import at_budgets

    mine = [row for row in rows if row["key"][0] == name and row["key"][1] < shape[0] and row["key"][2] < shape[1]]
    found = np.full((2, *shape, len(budgets)), np.nan)
    for row in mine:
        _, caption, seed, budget = row["key"]
        places = [k for k, b in enumerate(budgets) if (b <= budget if ENTRIES[name].anytime else b == budget)]
        for which in (0, 1):
            trace = [(point[0], point[1 + which]) for point in row["trace"]]
            found[which, caption, seed, places] = at_budgets(trace, [budgets[k] for k in places])
        if row["pool"]:  # the whole curve from it
            for k in places:
                size = budgets[k] // row["steps"]
                found[0, caption, seed, k] = expected_best(row["pool"], size)
                found[1, caption, seed, k] = expected_best(row["pool"], size, row["golds"])
    return found if mine else None


def report(arguments: argparse.Namespace) -> None:
    """Print the table, of the searches that all methods have finished; write it and the figure if asked."""
    found: dict[str, np.ndarray] = {}
    costs: dict[str, float] = {}
    shape = (arguments.captions, arguments.seeds)
    for tag in dict.fromkeys(("base", arguments.tag, *arguments.beside)):
        rows = read(arguments.out, tag)
        for name in arguments.methods if rows else ():
            budgets = [rows[0]["steps"] * 2**j for j in range(arguments.doublings + 1)]
            label = name if tag == "base" else f"{name}, {tag}"
            if (curve := curves(rows, name, budgets, shape)) is not None:
                found[label] = curve
                mine = [row for row in rows if row["key"][0] == name]
                costs[label] = 1000 * sum(r["seconds"] for r in mine) / sum(r["ledger"]["nfe"] for r in mine)
    whole = np.stack([~np.isnan(c[0][..., last_of(c)]) for c in found.values()]).all(0)
    if not whole.any() or "best-of-n" not in found:
        return print("no caption is finished by all methods and best-of-n yet")
    for curve in found.values():
        curve[:, ~whole] = np.nan
    text = table(found, costs, budgets, int(whole.sum()))
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
        figure(found, budgets, arguments.write.with_suffix(".png"))


def last_of(curve: np.ndarray) -> int:
    """The largest budget that an entry was run at."""
    return int(np.flatnonzero(~np.isnan(curve[0]).all((0, 1)))[-1])


def table(found: dict[str, np.ndarray], costs: dict[str, float], budgets: list[int], count: int) -> str:
    """In Markdown. The gate sets gold at the entry's largest budget against one plain sample's."""
    from visalign.search.comparison import hacking_gate, relative_area, speedup
    from visalign.statistics.bootstrap import paired_interval

    control = np.nanmean(found["best-of-n"], (1, 2))
    columns = range(1, len(budgets), 3)
    head = ["method", *(f"reward at {budgets[k]}" for k in columns), "its largest budget", "gold there", "gold kept"]
    head += ["area over log NFE (best of N: 1)", f"NFE to match best of N's {control[0, -1]:.3f}", "ms a call"]
    lines = [
        f"{count} pairs of caption and seed, all methods on each.\n",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, (reward, gold) in found.items():
        shown, last = [k for k in range(len(budgets)) if not np.isnan(reward[..., k]).all()], last_of(found[name])
        curve = np.array([np.nanmean(reward[..., k]) if k in shown else np.nan for k in range(len(budgets))])
        there = ~np.isnan(reward[..., last]).all(1)  # captions; all entries have the same
        fewer = speedup(
            [budgets[k] for k in shown], reward[there][..., shown], found["best-of-n"][0][there][..., -1], budgets[-1]
        )
        area = relative_area(*([xs[k] for k in shown] for xs in (budgets, curve, control[0])), base=control[0, 0])
        done = ~np.isnan(reward[..., last])
        gate = hacking_gate(gold[..., last][done], found["best-of-n"][1][..., 0][done])
        cells = [name, *(str(paired_interval(by_caption(reward[..., k]))) if k in shown else "-" for k in columns)]
        cells += [f"{budgets[last]}", str(paired_interval(by_caption(gold[..., last]))), "yes" if gate.passed else "no"]
        match = f"not by {budgets[last]}"
        if name == "best-of-n":
            match = f"{budgets[-1]:,}"
        elif fewer.mean:
            match = f"{budgets[-1] / fewer.mean:,.0f}: {fewer.mean:.1f}x fewer ({fewer.low:.1f} to {fewer.high:.1f})"
        lines.append(f"| {' | '.join([*cells, f'{area:.2f}', match, f'{costs[name]:.1f}'])} |")
    return "\n".join(lines) + "\n"


def by_caption(values: np.ndarray) -> np.ndarray:
    """Means over the seeds that are there, of the captions that have any."""
    return np.array([row[~np.isnan(row)].mean() for row in values if not np.isnan(row).all()])


def figure(found: dict[str, np.ndarray], budgets: list[int], file: Path) -> None:
    """Reward and strict gold over denoiser calls."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 5))
    colours = ["black", *plt.get_cmap("tab10").colors, "#393b79"]
    styles = [(c, m) for m in "os^" for c in colours]
    for (name, pair), (colour, marker) in zip(found.items(), styles):
        for axis, values in zip(axes, pair):
            ks = [k for k in range(len(budgets)) if not np.isnan(values[..., k]).all()]
            style = dict(color=colour, marker=marker, markersize=4, linewidth=2.2 if name == "best-of-n" else 1.2)
            axis.plot([budgets[k] for k in ks], [by_caption(values[..., k]).mean() for k in ks], label=name, **style)
    for axis, label in zip(axes, ("clip_match, searched for", "strict gold, held out")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(b) for b in budgets])
        axis.set_xlabel("denoiser calls a caption (NFE)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(ENTRIES), choices=ENTRIES, metavar="METHOD")
    parser.add_argument("--model", default="shapes-flow")
    parser.add_argument("--steps", type=int, help="of a sample; default: the model's")
    parser.add_argument("--lora", help="a trained LoRA to search with; give --tag too")
    parser.add_argument("--tag", default="base", help="what the files in --out are called")
    parser.add_argument("--beside", nargs="*", default=[], metavar="TAG", help="searches shown beside the base's")
    parser.add_argument("--captions", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3, help="so many: 0 .. N - 1")
    parser.add_argument("--doublings", type=int, default=7)
    parser.add_argument("--part", default="0/1", help="this process's share of the captions")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--write", type=Path, help="write the table here, and the figure beside it as .png")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.captions < 1:
        parser.error(f"seeds, captions: got {arguments.seeds}, {arguments.captions}, expected >= 1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.write:
        work(arguments)
    report(arguments)


if __name__ == "__main__":
    main()
