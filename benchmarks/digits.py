"""Sampling from a tilted law on the digits world: how near each search comes, at the same denoiser calls.

    python benchmarks/digits.py                                   # all tasks and methods up to 10^5 calls; hours
    python benchmarks/digits.py --tasks odd --methods snis fk dts --budgets 100 1000 --seeds 0 1 2
    python benchmarks/digits.py --write benchmarks/digits.md      # table and figure from what is in --out

The target is the model's law times exp(tilt * r), r the log-probability that a classifier gives to a digit, or to the
odd ones. A method gets a budget of denoiser calls and returns a set of --draws pictures, drawn with replacement where
it weighs its own: its leaves (trees), particles, or pool (snis). No draw calls the model. A second classifier, which no
method asked, then tells:
    Frechet    of its features to the exactly tilted law, which is a large pool of the base's samples with their
               importance weights; "floor" is as many draws from that pool
    real       likewise to the real pictures of these digits
    accuracy   share of pictures that it takes for these digits
    entropy    of the digits in the set, in nats: 0 where one is asked for and found, log 5 = 1.61 for five odd ones
    distance   mean pixel distance of two pictures of the set; of repeated pictures it is 0
    effective  number of different pictures behind the weights, 1 / sum w^2
Intervals are 95 %, of Student's t over seeds; each seed's number is the mean over tasks of a kind;
a single seed has none. All methods step by
the DDIM family's kernel with eta 1, and start from the same noise. Finished runs in --out are read, not run again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from visalign.search import Chain, Ledger, snis_weights
from visalign.search.best_of_n import best_of_n
from visalign.search.guidance import guidance
from visalign.search.particles.steering import fk
from visalign.search.particles.twisted import das, tds
from visalign.search.tree.dts import dts, dts_star
from visalign.search.tree.reading import draw_leaves, leaf_law
from visalign.transitions import noisy_of
from visalign.worlds.digits import DigitsModel, load_network, load_pictures
from visalign.worlds.digits.metrics import Moments, effective_size, look, measure, weighted_moments
from visalign.worlds.digits.rewards import ClassReward

TASKS: dict[str, tuple[int, ...]] = {**{f"digit {d}": (d,) for d in range(10)}, "odd": (1, 3, 5, 7, 9)}
USUAL_TASKS = ("digit 1", "digit 5", "digit 8", "odd")
GROUP = 8  # of best-of-8
REFERENCE_SEED = 1_000_000
LEAVES_AT_ONCE = 32  # of trees; the paper's 1 is several times slower

Returned = tuple[Tensor, float]  # final latents (draws, 1, 8, 8), and the effective number of different ones


class Recording(Chain):
    """A chain that keeps all its results, in order."""

    kept: list[Tensor]

    def result(self, latents: Tensor, entities: Sequence[int], starts: Tensor | None = None) -> Tensor:
        self.kept = [*getattr(self, "kept", []), latents.cpu()]
        return super().result(latents, entities, starts)


def last(events) -> Any:
    """The final state of a search."""
    state = None
    for event in events:
        state = event.state
    return state


def drawn(latents: Tensor, weights: Tensor | None, draws: int, random: torch.Generator) -> Returned:
    """Draws with replacement by weights (N,); None: all equal."""
    weights = torch.ones(len(latents), dtype=torch.float64) if weights is None else weights
    rows = torch.multinomial(weights, draws, replacement=True, generator=random)
    return latents[rows], effective_size(weights, len(weights))


# Methods: (chain, tilt, draws, random) -> Returned -------------------------------------------------------------------


def base(chain: Recording, tilt: float, draws: int, random: torch.Generator) -> Returned:
    last(best_of_n(chain))
    return drawn(torch.cat(chain.kept), None, draws, random)


def snis(chain: Recording, tilt: float, draws: int, random: torch.Generator) -> Returned:
    rewards = last(best_of_n(chain)).rewards
    return drawn(torch.cat(chain.kept), snis_weights(rewards, tilt), draws, random)


def best_of_8(chain: Recording, tilt: float, draws: int, random: torch.Generator) -> Returned:
    """The best of every 8 in a row, the last of them perhaps fewer."""
    rewards = torch.tensor(last(best_of_n(chain)).rewards)
    places = [k + int(part.argmax()) for k, part in zip(range(0, len(rewards), GROUP), rewards.split(GROUP))]
    return drawn(torch.cat(chain.kept)[places], None, draws, random)


def guided(chain: Recording, tilt: float, draws: int, random: torch.Generator) -> Returned:
    last(guidance(chain, scale=tilt))
    return drawn(torch.cat(chain.kept), None, draws, random)


def particles(search: Callable, **options: Any) -> Callable[..., Returned]:
    """A set of K = budget / T weighted particles."""

    def run(chain: Recording, tilt: float, draws: int, random: torch.Generator) -> Returned:
        cloud = last(search(chain, particles=None, tilt=tilt, output="weighted", **options))
        return drawn(cloud.latents.cpu(), cloud.weights, draws, random)

    return run


def tree(search: Callable, **options: Any) -> Callable[..., Returned]:
    """Leaves drawn by the tree's values."""

    def run(chain: Recording, tilt: float, draws: int, random: torch.Generator) -> Returned:
        grown = last(search(chain, tilt=tilt, leaves_at_once=LEAVES_AT_ONCE, **options))
        leaves = draw_leaves(grown, draws, random)
        law = torch.from_numpy(leaf_law(grown))
        return torch.cat([grown.states[leaf] for leaf in leaves]), effective_size(law, len(law))

    return run


METHODS: dict[str, Callable[..., Returned]] = {
    "base": base,
    "snis": snis,
    "best-of-8": best_of_8,
    "guidance": guided,
    "fk": particles(fk, potential="diff"),
    "tds": particles(tds, adaptive=True),  # the published image sampler's shift, and the paper's:
    "tds, mean": particles(tds, adaptive=True, form="mean", guidance_start=0.0, clip=None),
    "das": particles(das),
    "dts": tree(dts),
    "dts, least visited": tree(dts, allocation="least_visited"),
    "dts-star": tree(dts_star, c_uct=1.0),  # draws need the unvisited, too
    "dts, guided": tree(dts, reward_guidance=1.0),  # weighted; the next is not
    "dts-star, guided": tree(dts_star, c_uct=1.0, reward_guidance=1.0),
}

# Runs ----------------------------------------------------------------------------------------------------------------


def chain_of(model: DigitsModel, task: str, seed: int, budget: int) -> Recording:
    kernel = noisy_of(model.schedule)
    return Recording(
        model, task, ClassReward(TASKS[task]), kernel, seed=seed, ledger=Ledger(max_nfe=budget), batch_size=256
    )


def reference_pool(model: DigitsModel, size: int, out: Path) -> Tensor:
    """Images (size, 3, 8, 8) of the base law, made once."""
    file = out / f"pool-{model.schedule.num_steps}-{size}.pt"
    if not file.is_file():
        chain = chain_of(model, "odd", REFERENCE_SEED, size * model.schedule.num_steps)
        last(best_of_n(chain))
        torch.save(torch.cat(chain.kept), file)
    return model.decode(torch.load(file), [""] * size)


class Referees:
    """What sets are held against, made once: the judge, the pool, and both references of each task."""

    def __init__(self, model: DigitsModel, pool: int, tilt: float, out: Path) -> None:
        self.judge, self.tilt = load_network("judge"), tilt
        self.images = reference_pool(model, pool, out)
        self.pool = look(self.judge, self.images)
        self.made: dict[str, tuple[dict[str, Moments], Tensor]] = {}

    def of(self, task: str) -> tuple[dict[str, Moments], Tensor]:
        """Moments of the tilted law and of the real pictures, and the pool's weights."""
        if task not in self.made:
            reward = ClassReward(TASKS[task])
            with torch.no_grad():
                rewards = torch.cat([reward(part, [""] * len(part)) for part in self.images.split(4096)])
            weights = snis_weights(rewards, self.tilt)
            pictures, digits = (torch.cat(parts) for parts in zip(load_pictures("train"), load_pictures("test")))
            real = look(self.judge, pictures[torch.isin(digits, torch.tensor(TASKS[task]))])
            tilted = weighted_moments(self.pool.features, weights)
            self.made[task] = {"tilted": tilted, "real": weighted_moments(real.features)}, weights
        return self.made[task]

    def measured(self, task: str, images: Tensor) -> dict[str, float]:
        return measure(look(self.judge, images), None, TASKS[task], self.of(task)[0])


def run_one(
    model: DigitsModel, referees: Referees, task: str, method: str, budget: int, seed: int, draws: int
) -> dict[str, Any]:
    """One set and its measures; "floor" draws it from the reference pool."""
    random = torch.Generator().manual_seed(seed)
    if method == "floor":
        weights = referees.of(task)[1]
        images, effective = drawn(referees.images, weights, draws, random)
        spent, seconds = {"nfe": 0, "backwards": 0}, 0.0
    else:
        chain, started = chain_of(model, task, seed, budget), time.monotonic()
        latents, effective = METHODS[method](chain, referees.tilt, draws, random)
        images, seconds = model.decode(latents, [""] * draws), time.monotonic() - started
        spent = {"nfe": chain.ledger.nfe, "backwards": chain.ledger.backwards}
    return {**referees.measured(task, images), "effective": effective, **spent, "seconds": seconds}


# Tables --------------------------------------------------------------------------------------------------------------

KINDS = {"one digit": lambda task: task != "odd", "odd digits": lambda task: task == "odd"}
COLUMNS = ("frechet_tilted", "frechet_real", "accuracy", "entropy", "distance", "effective")

Cell = tuple[str, int]  # method, budget


def by_seed(runs: dict[tuple[str, str, int, int], dict], kind: str) -> dict[Cell, dict[str, np.ndarray]]:
    """Each measure (seeds,) of each method and budget: means over tasks, of seeds that have them all."""
    tasks = sorted({key[0] for key in runs if KINDS[kind](key[0])})
    found: dict[Cell, dict[str, np.ndarray]] = {}
    for cell in dict.fromkeys(key[1:3] for key in runs):
        seeds = sorted({key[3] for key in runs if key[1:3] == cell})
        whole = [s for s in seeds if all((task, *cell, s) in runs for task in tasks)]
        if tasks and whole:
            found[cell] = {
                name: np.array([np.mean([runs[task, *cell, s][name] for task in tasks]) for s in whole])
                for name in (*COLUMNS, "seconds")
            }
    return found


def half_width(values: np.ndarray) -> float:
    """Half the 95 % interval of the mean; not a number for one value."""
    count = len(values)
    return student.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan


def shown(values: np.ndarray, digits: int = 2) -> str:
    half = half_width(values)
    return f"{values.mean():.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def rows_of(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def tables(runs: dict[tuple[str, str, int, int], dict]) -> str:
    """For each kind of task the Frechet distance by budget, and all measures at the largest that has three seeds."""
    text = ""
    for kind in KINDS:
        found = by_seed(runs, kind)
        if not found:
            continue
        budgets = sorted({budget for method, budget in found if method != "floor"})
        methods = [name for name in (*METHODS, "floor") if any(method == name for method, _ in found)]
        tasks = sorted({key[0] for key in runs if KINDS[kind](key[0])})

        def at(method: str, budget: int) -> dict[str, np.ndarray] | None:
            return found.get((method, 0 if method == "floor" else budget))  # noqa: B023, called in this turn

        lines = []
        for method in methods:
            cells = [at(method, budget) for budget in budgets]
            lines.append([method, *(shown(cell["frechet_tilted"]) if cell else "" for cell in cells)])
        text += f"\n{kind} ({', '.join(tasks)}): Frechet distance to the tilted law, by denoiser calls\n\n"
        text += rows_of(["method", *(f"{budget:,}" for budget in budgets)], lines)
        repeated = [b for b in budgets if any(len(c["accuracy"]) > 2 for (_, other), c in found.items() if other == b)]
        most = max(repeated or budgets)
        details = []
        for method in methods:
            if cell := at(method, most):
                places = (2, 2, 3, 2, 2, 0)
                details.append([method, *(shown(cell[name], n) for name, n in zip(COLUMNS, places))])
                details[-1].append(f"{cell['seconds'].mean():.0f}")
        text += f"\n{kind}, {most:,} denoiser calls\n\n"
        text += rows_of(["method", "Frechet", "real", *COLUMNS[2:], "seconds"], details)
    return text


def figure(runs: dict[tuple[str, str, int, int], dict], file: Path) -> None:
    """Frechet distance, accuracy and distance over denoiser calls, a column for each kind of task."""
    kinds = [kind for kind in KINDS if by_seed(runs, kind)]
    colours = ["black", *plt.get_cmap("tab10").colors, "#8c6d31", "#393b79"]  # type: ignore[attr-defined]
    measures = {"frechet_tilted": "Frechet distance to the tilted law", "accuracy": "accuracy", "distance": "distance"}
    picture, axes = plt.subplots(len(measures), len(kinds), figsize=(5.2 * len(kinds), 10), squeeze=False, sharex=True)
    for column, kind in enumerate(kinds):
        found = by_seed(runs, kind)
        for row, (name, label) in enumerate(measures.items()):
            axis = axes[row][column]
            for place, method in enumerate(METHODS):
                budgets = sorted(budget for other, budget in found if other == method)
                if not budgets:
                    continue
                values = [found[method, budget][name] for budget in budgets]
                means, halves = [v.mean() for v in values], [half_width(v) for v in values]
                sideways = np.array(budgets) * 1.03 ** (place - len(METHODS) / 2)  # intervals do not hide each other
                axis.errorbar(
                    sideways,
                    means,
                    yerr=halves,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    label=method,
                    color=colours[place],
                )
            if ("floor", 0) in found:
                axis.axhline(found["floor", 0][name].mean(), color="#777", linestyle=":", label="floor")
            axis.set_xscale("log")
            if name == "frechet_tilted":
                axis.set_yscale("log")
                axis.set_title(kind)
            axis.set_ylabel(label)
        axes[-1][column].set_xlabel("denoiser calls")
    handles, labels = axes[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="lower center", ncol=6, fontsize=8)
    picture.tight_layout(rect=(0, 0.05, 1, 1))  # room for the legend
    picture.savefig(file, dpi=110)
    plt.close(picture)


def file_of(out: Path, task: str, method: str, budget: int, seed: int) -> Path:
    return out / f"{task} - {method} - {budget} - {seed}.json".replace(" ", "_")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(USUAL_TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--budgets", nargs="*", type=int, default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="T: denoiser calls of one sample")
    parser.add_argument("--tilt", type=float, default=1.0)
    parser.add_argument("--draws", type=int, default=1000, help="pictures of a returned set")
    parser.add_argument("--pool", type=int, default=20_000, help="samples behind the reference")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="of one steps, tilt, draws and pool")
    parser.add_argument("--write", type=Path, help="write the tables here, and the figure beside them as .png")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = [
        (t, m, b, s) for b in sorted(given.budgets) for s in given.seeds for m in given.methods for t in given.tasks
    ]
    wanted += [(t, "floor", 0, s) for s in given.seeds for t in given.tasks]
    todo = [] if given.write else [key for key in wanted if not file_of(given.out, *key).is_file()]
    if todo:
        model = DigitsModel(given.steps)
        referees = Referees(model, given.pool, given.tilt, given.out)
        for key in todo:
            result = run_one(model, referees, *key, draws=given.draws)
            file_of(given.out, *key).write_text(json.dumps(result))
            print(*key, f"Frechet {result['frechet_tilted']:.2f}, {result['seconds']:.0f} s", flush=True)
    files = {key: file_of(given.out, *key) for key in wanted}
    runs = {key: json.loads(file.read_text()) for key, file in files.items() if file.is_file()}
    text = tables(runs)
    print(text)
    if given.write:
        given.write.write_text(text.lstrip())
        figure(runs, given.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
