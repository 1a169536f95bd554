"""Policy gradients on branching rollouts: images of a prompt share their first steps, and differ by what is trained.

    accelerate launch trainers/tree_grpo.py                                       # BranchGRPO, the shipped shapes world
    accelerate launch trainers/tree_grpo.py --method tempflow
    accelerate launch trainers/tree_grpo.py --config trainers/recipes/b2_diffurl.yaml --reward my_reward.py:score

What images share is denoised once. Methods differ in where trees fork and how leaves' rewards become edges' advantages:

    branch_grpo  BranchGRPO (arXiv:2509.06040): every node forks at some steps; a node is worth the mean of its leaves,
                 compared with the nodes of its depth. Without its scaled noise, which the likelihoods do not describe.
    tree_grpo    TreeGRPO (2512.08153): every node forks in a window that moves on; leaves are compared, and nodes have
                 the weighted mean of their children. The clipped loss is a reconstruction: the source shows none.
    tempflow     TempFlow-GRPO (2508.04324): at some steps of the ODE's path, images branch off by one stochastic step;
                 those of one step are compared, and weighted by its noise.
    tp_grpo      TP-GRPO (2602.06422): after each stochastic step of a window the ODE's image is scored, too; a step is
                 credited with the whole gain, and at turning points with its own on top.
    b2_diffurl   B2-DiffuRL (2503.11240): only the last steps are trained, more and more of them; they branch from one
                 prefix, and the best and the worst of each branching are kept. For diffusion models, too.

Departures: no KL term, as in the sources; the latents are kept in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.advantages.group import clip_advantages, group_advantages
from visalign.advantages.process_values import turning_point_rewards
from visalign.advantages.tree import (
    depth_advantages,
    history_scores,
    keep_leaves,
    keep_transitions,
    node_means,
    progressive_steps,
    pruned_depths,
    select_branches,
    tree_backup,
)
from visalign.data.prompts import Group
from visalign.objectives.policy_gradient import CLIPPED_STATS, clipped_surrogate, step_weights
from visalign.sampling.branching import Fork, Tree, branched_rollout
from visalign.sampling.windows import make_window
from visalign.training.before import options, preflight
from visalign.training.loop.batches import GatheredScores
from visalign.training.loop.learning import Updates, add_gradients, add_sums
from visalign.training.loop.trainer import Trainer, launch, train
from visalign.training.loop.training_loop import Iteration, TrainingLoop
from visalign.transitions import check_transition, make_transition

Prune = Literal["none", "half", "extremes", "half_leaves", "extreme_leaves"]  # see docs/methods/tree_grpo.md
Method = Literal["branch_grpo", "tree_grpo", "tempflow", "tp_grpo", "b2_diffurl"]

# The options that a method has, beside those of all, and what None means for it.
METHODS: dict[str, dict[str, Any]] = {
    "branch_grpo": dict(
        children=2, split_steps=(0, 1, 2), between="ode", prune="none", prune_depths=0, window_iterations=30
    ),
    "tree_grpo": dict(children=2, window_size=3, window_iterations=50, backup="uniform"),
    "tempflow": dict(children=8, split_steps=(0, 1, 2), noise_weight=True),
    "tp_grpo": dict(trees=8, window_size=3, bonus=1.0),
    "b2_diffurl": dict(children=5, trees=1, trained_steps=None, stages=100, history=8, keep_above=0.5, keep_below=-0.5)
    | dict(positive_weight=1.0, negative_weight=1.0),
}


@dataclass(frozen=True)
class Config(options.CommonConfig):
    """Options of the trainer; those of every trainer are in `visalign.training.before.options.CommonConfig`."""

    # Sampling
    method: Method = "branch_grpo"
    num_steps: int = 10  # denoising steps of a training image
    sampler: str = "flow_sde"  # flow_sde, dance_sde, cps, ddim (diffusion), or your own: file.py:Class, called with eta
    eta: float = 0.7  # noise strength: 0.7 for flow_sde, 0.3 for dance_sde, 0.8 for cps, 1 for ddim
    prompts_per_step: int = 16  # prompts an iteration
    # Of some methods only; None: the method's own default, see METHODS
    children: int | None = None  # of a node at a fork
    trees: int | None = None  # initial noises a prompt
    split_steps: tuple[int, ...] | None = None  # steps at which there is a fork
    between: Literal["ode", "sde"] | None = None  # steps that do not fork; sde trains them, too
    prune: Prune | None = None  # what is not trained after, or of, a last split
    prune_depths: int | None = None  # so many depths are not trained, in a window that moves on
    window_size: int | None = None  # stochastic steps
    window_iterations: int | None = None  # before the window moves on by one step
    backup: Literal["uniform", "softmax"] | None = None  # weights of a node's children
    noise_weight: bool | None = None  # weigh a step's loss by its noise
    bonus: float | None = None  # of a turning point's own gain
    trained_steps: tuple[int, int] | None = None  # last steps trained, at first and in the end; None: 70 % and all
    stages: int | None = None  # iterations from the first to the second of these
    history: int | None = None  # earlier iterations whose rewards a prompt's are normalised with, too
    keep_above: float | None = None  # least normalised reward of a branching's best to be trained
    keep_below: float | None = None  # and what its worst must fall below
    positive_weight: float | None = None  # of advantages above 0
    negative_weight: float | None = None  # of those below
    # Objective
    max_advantage: float = 5.0
    clip_range: float = 1e-4  # on the ratio of mean-reduced likelihoods
    inner_epochs: int = 1  # passes over the edges of an iteration, with an update each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_transition("sampler", self.sampler, ("flow_sde", "dance_sde", "cps", "ddim"))
        own = METHODS[self.method]
        for name in dict.fromkeys(name for options_ in METHODS.values() for name in options_):
            if getattr(self, name) is not None and name not in own:
                having = [m for m in METHODS if name in METHODS[m]]
                raise ValueError(f"{name}: got {getattr(self, name)!r} with method {self.method!r}, expected {having}")
        for name in ("eta", "clip_range", "max_advantage", "inner_epochs", "prompts_per_step", "num_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        if self.sampler in ("cps", "ddim") and self.eta > 1:
            raise ValueError(f"eta: got {self.eta}, expected within (0, 1] for {self.sampler}, a share of the noise")
        least = {"children": 2, "trees": 2 if self.method == "tp_grpo" else 1, "stages": 1, "window_iterations": 1}
        zero = dict.fromkeys(("history", "positive_weight", "negative_weight", "bonus", "prune_depths"), 0)
        for name, low in {**least, **zero}.items():
            if name in own and not self.of(name) >= low:
                raise ValueError(f"{name}: got {self.of(name)}, expected >= {low}")
        if "window_size" in own:
            self.window(0)
        if "split_steps" in own:
            last = self.num_steps - (self.sampler == "cps")  # whose last step has no noise
            steps = self.of("split_steps")
            if not steps or list(steps) != sorted(set(steps)) or not 0 <= steps[0] <= steps[-1] < last:
                raise ValueError(f"split_steps: got {steps}, expected rising steps within 0 .. {last - 1}")
        late = "prune" in own and self.of("prune") in ("half", "extremes")
        if late and (self.of("between") != "sde" or self.of("split_steps")[-1] + 1 >= last):
            raise ValueError(
                f"prune: got {self.prune!r}, which is of the stochastic steps after the last split; there are none, "
                "expected between 'sde', or 'half_leaves' or 'extreme_leaves'"
            )
        if self.method == "b2_diffurl":
            low, high = self.interval
            least_steps = 1 + (self.sampler == "cps")  # whose last step has no noise
            if not least_steps <= low <= high <= self.num_steps:
                raise ValueError(
                    f"trained_steps: got {(low, high)}, expected {least_steps} <= first <= last <= {self.num_steps}"
                )
            if self.of("keep_below") > self.of("keep_above"):
                raise ValueError(f"keep_below: got {self.of('keep_below')}, expected <= {self.of('keep_above')}")

    def of(self, name: str) -> Any:
        """An option of the method: as given, or the method's default."""
        given = getattr(self, name)
        return METHODS[self.method][name] if given is None else given

    @property
    def interval(self) -> tuple[int, int]:
        """B2-DiffuRL's numbers of trained steps."""
        return self.trained_steps or (max(1, 7 * self.num_steps // 10), self.num_steps)

    def check_kind(self, kind: str | None) -> None:
        """Refuse a model of another kind than the sampler's; None: not known yet."""
        wanted = kind if ":" in self.sampler else "diffusion" if self.sampler == "ddim" else "flow"
        if kind not in (None, wanted):
            raise ValueError(f"sampler: got {self.sampler!r} on a {kind} model, expected a {wanted} model")

    def window(self, step: int) -> list[int]:
        """The stochastic steps of an iteration: TreeGRPO's moves on, TP-GRPO's lies anywhere."""
        if self.method == "tree_grpo":
            dwell = self.of("window_iterations")
            return make_window("progressive", self.num_steps, self.of("window_size"), iterations=dwell)(step)
        return make_window("random", self.num_steps, self.of("window_size"), seed=self.seed)(step)


@dataclass
class Branches:
    """The trees of this process in one iteration, and each layer's advantages, of its drawn edges, (K,)."""

    tree: Tree
    group_ids: Tensor  # (L,), of the leaves
    advantages: dict[int, Tensor]


class TreeGRPO(Trainer):
    """Growing trees, scoring their leaves, crediting and training their edges."""

    name, config = "tree_grpo", Config

    @classmethod
    def plan(cls, cfg: Config) -> preflight.Plan:
        plan = preflight.make_plan(cfg, cfg.method)
        cfg.check_kind(preflight.kind_of_folder(plan.model))
        return plan

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__(loop)
        self.transition = make_transition(self.cfg.sampler, eta=self.cfg.eta)
        self.cfg.check_kind(self.schedule.kind)
        if self.scorer.is_setwise and loop.accelerator.num_processes > 1:
            raise ValueError(f"reward: got {self.cfg.reward!r}, which scores samples as one set, expected 1 process")
        self.stds = [self.transition.std(self.schedule, i) for i in range(self.cfg.num_steps)]
        weighted = self.cfg.method == "tempflow" and self.cfg.of("noise_weight")
        self.step_weights = step_weights("tempflow" if weighted else "none", self.stds, self.schedule.levels)

    def iteration(self, step: int) -> Iteration:
        """Grow, score and credit this process's trees; then learn."""
        trees = self.cfg.of("trees") if "trees" in METHODS[self.cfg.method] else 1
        groups, (local,) = self.loop.groups(step, trees)
        branches = self.sample(step, local)
        values, scores = self.assign_advantages(step, branches, groups)
        images, count = branches.tree.images, len(branches.tree) * self.loop.accelerator.num_processes
        assert images is not None
        drawn = [(images, branches.tree.leaf_prompts)]
        return Iteration(values | self.update(step, branches), drawn, *scores.as_gathered, count)

    def finish(self) -> None:
        extra = self.state.extra
        if self.state.step == self.cfg.steps and (alone := extra.get("denoiser_rows_unshared")):
            rows = extra["denoiser_rows"]
            self.run.say(f"sampling took {rows} rows of the denoiser, {1 - rows / alone:.0%} fewer than image by image")

    def forks(self, step: int) -> dict[int, Fork]:
        """Where this iteration's trees fork; growing nodes follow the ODE at all other steps."""
        cfg, noisy = self.cfg, [i for i, std in enumerate(self.stds) if std > 0]
        if cfg.method == "branch_grpo":
            between = {i: Fork(grow=1) for i in noisy} if cfg.of("between") == "sde" else {}
            return between | {i: Fork(grow=cfg.of("children")) for i in cfg.of("split_steps")}
        if cfg.method == "tree_grpo":
            return {i: Fork(grow=cfg.of("children")) for i in cfg.window(step)}
        if cfg.method == "tempflow":  # the trunk follows the ODE, and ends with its last fork
            steps = cfg.of("split_steps")
            return {i: Fork(leave=cfg.of("children"), ode=i != steps[-1]) for i in steps}
        if cfg.method == "tp_grpo":  # the trunk is stochastic, and the ODE's completions leave it
            return {i: Fork(grow=1, ode_leave=True) for i in cfg.window(step)}
        split = cfg.num_steps - progressive_steps(step, cfg.interval[0], cfg.interval[1], cfg.of("stages"))
        return {i: Fork(grow=cfg.of("children") if i == split else 1) for i in noisy}

    def sample(self, step: int, groups: list[Group]) -> Branches:
        """Trees of some groups, all steps of which are on record."""
        roots = [(g, k) for g in groups for k in range(len(g.seeds))]
        with self.run.stage("rollout"):
            tree = branched_rollout(
                self.generator,
                [g.prompt for g, _ in roots],
                [g.seeds[k] for g, k in roots],
                self.transition,
                self.forks(step),
                noise_seeds=[g.noise_seeds[k] for g, k in roots],
                batch_size=self.cfg.batch_size,
                grad_mode=self.cfg.compile,
            )
        for name, rows in (("denoiser_rows", tree.forwards), ("denoiser_rows_unshared", tree.separate_forwards)):
            rows *= self.loop.accelerator.num_processes
            self.state.extra[name] = self.state.extra.get(name, 0) + rows
        return Branches(tree, torch.tensor([g.index for g, _ in roots])[tree.roots[-1]], {})

    def assign_advantages(
        self, step: int, branches: Branches, groups: list[Group]
    ) -> tuple[dict[str, float], GatheredScores]:
        """Advantages of the edges, from the leaves' rewards; returns what to log, and the scores.

        Args:
            groups: of all processes.
        """
        tree, images = branches.tree, branches.tree.images
        assert images is not None
        scores = self.loop.score(images, tree.leaf_prompts, branches.group_ids, self.cfg.batch_size)
        rewards = self.scorer.combine(scores.shaped, scores.group_ids, scores.scored)
        if self.cfg.method == "b2_diffurl":
            rewards = self.history_scores(step, rewards, scores.group_ids, groups, scores.valid)
        credit = {
            "branch_grpo": self.branch_credit,
            "tree_grpo": self.tree_credit,
            "tempflow": self.tempflow_credit,
            "tp_grpo": self.turning_point_credit,
            "b2_diffurl": self.selected_credit,
        }[self.cfg.method]
        local, valid = scores.local(rewards), scores.local(scores.valid)
        edges = credit(tree, branches.group_ids, local, valid)
        if self.cfg.method == "branch_grpo":
            kept = self.kept(step, tree, edges, local, valid)
        for i, advantages in edges.items():
            layer = tree.layers[i]
            spoilt = ~self.scored(tree, i, valid)
            advantages = clip_advantages(advantages.float(), self.cfg.max_advantage)[layer.drawn]
            if self.cfg.method == "b2_diffurl":
                signs = advantages > 0
                advantages *= torch.where(signs, self.cfg.of("positive_weight"), self.cfg.of("negative_weight"))
            if self.cfg.method == "branch_grpo":
                spoilt |= ~kept[i]
            branches.advantages[i] = advantages.masked_fill(spoilt[layer.drawn], 0.0).to(tree.final.device)
        sizes = torch.cat([a.abs() for a in branches.advantages.values()]).mean()
        values = scores.values() | {
            "advantage_abs_mean": float(self.loop.accelerator.reduce(sizes, "mean")),
            "forwards_per_image": tree.forwards / len(tree),
        }
        return values, scores

    # Credit: {step: advantages (E,) of all nodes after the step}; those that came by the ODE are not used ------------

    def scored(self, tree: Tree, i: int, valid: Tensor) -> Tensor:
        """Which nodes after a step have a scored leaf below, (E,)."""
        none = torch.zeros(len(tree.layers[i].parents), dtype=torch.bool)
        return none.index_fill(0, tree.ancestors()[i + 1][valid], True)

    def branch_credit(self, tree: Tree, _ids: Tensor, rewards: Tensor, valid: Tensor) -> dict[int, Tensor]:
        """BranchGRPO: a node's mean reward among the nodes of its depth in its tree."""
        ancestors, edges = tree.ancestors(), {}
        for i in self.noisy_steps(tree):
            values = node_means(rewards, ancestors[i + 1], len(tree.layers[i].parents), valid)
            edges[i] = depth_advantages(values, tree.roots[i + 1], valid=self.scored(tree, i, valid))
        return edges

    def kept(
        self, step: int, tree: Tree, edges: Mapping[int, Tensor], rewards: Tensor, valid: Tensor
    ) -> dict[int, Tensor]:
        """BranchGRPO's pruning: which edges of each layer are trained, (E,) bool."""
        of, ancestors, split = self.cfg.of, tree.ancestors(), self.cfg.of("split_steps")[-1]
        kept = {i: torch.ones(len(advantages), dtype=torch.bool) for i, advantages in edges.items()}
        if of("prune") in ("half_leaves", "extreme_leaves"):
            leaves = keep_leaves(rewards, ancestors[split], of("prune").split("_")[0], valid)
            kept = {i: torch.zeros_like(k).index_fill(0, ancestors[i + 1][leaves], True) for i, k in kept.items()}
        pruned = pruned_depths(step, of("prune_depths"), of("window_iterations"), self.cfg.num_steps, split)
        kept = {i: k & (i + 1 not in pruned) for i, k in kept.items()}
        if of("prune") in ("half", "extremes"):  # after the depths, of what they leave
            late = [i for i in edges if i > split]
            branch = {
                i: torch.zeros_like(tree.roots[i + 1]).scatter(0, ancestors[i + 1], ancestors[split + 1]) for i in late
            }
            rows = {i: kept[i].nonzero().flatten() for i in late}
            advantages, branches, trees = (
                torch.cat([values[i][rows[i]] for i in late])
                for values in (edges, branch, {i: tree.roots[i + 1] for i in late})
            )
            chosen = keep_transitions(advantages, branches, trees, of("prune"))
            for i, part in zip(late, chosen.split([len(rows[i]) for i in late])):
                kept[i][rows[i]] = part
        return kept

    def tree_credit(self, tree: Tree, ids: Tensor, rewards: Tensor, valid: Tensor) -> dict[int, Tensor]:
        """TreeGRPO: a leaf among those of its prompt, then backwards the weighted mean of the children."""
        advantages = group_advantages(rewards, ids, eps=1e-8, mode="add", valid=valid).double()
        steps = self.noisy_steps(tree)
        last = len(tree.layers[steps[-1]].parents)
        advantages = node_means(advantages, tree.ancestors()[steps[-1] + 1], last, valid)
        edges = {steps[-1]: advantages}
        for i in reversed(steps[:-1]):  # the window has no gap
            layer, count, below = tree.layers[i + 1], len(tree.layers[i].parents), self.scored(tree, i + 1, valid)
            given = (advantages, layer.log_probs.cpu(), layer.parents, count, self.cfg.of("backup"))
            advantages = tree_backup(*given, below)
            edges[i] = advantages
        return edges

    def tempflow_credit(self, tree: Tree, ids: Tensor, rewards: Tensor, valid: Tensor) -> dict[int, Tensor]:
        """TempFlow-GRPO: an image among those that branched off at the same step of the same prompt's path."""
        ancestors, edges = tree.ancestors(), {}
        for i in self.noisy_steps(tree):
            layer = tree.layers[i]
            below = torch.isin(ancestors[i + 1], layer.drawn)
            advantages = torch.zeros(len(layer.parents))
            advantages[ancestors[i + 1][below]] = group_advantages(rewards[below], ids[below], valid=valid[below])
            edges[i] = advantages
        return edges

    def turning_point_credit(self, tree: Tree, ids: Tensor, rewards: Tensor, valid: Tensor) -> dict[int, Tensor]:
        """TP-GRPO: the steps' rewards, each among those of the same step and prompt."""
        steps = self.noisy_steps(tree)
        count = len(steps) + 1  # leaves of a tree: the trunk's first, then the completions, the latest first
        along = turning_point_rewards(rewards.view(-1, count).flip(1).T, self.cfg.of("bonus"))
        edges, groups, whole = {}, ids.view(-1, count)[:, 0], valid.view(-1, count).all(1)
        for i, row in zip(steps, along):
            advantages = torch.zeros(len(tree.layers[i].parents))
            advantages[tree.layers[i].drawn] = group_advantages(row, groups, valid=whole)
            edges[i] = advantages
        return edges

    def selected_credit(self, tree: Tree, _ids: Tensor, scores: Tensor, _valid: Tensor) -> dict[int, Tensor]:
        """B2-DiffuRL: the normalised reward, of the best and the worst of each branching, from the branching on."""
        selected = select_branches(scores, tree.roots[-1], self.cfg.of("keep_above"), self.cfg.of("keep_below"))
        split = [len(layer.parents) for layer in tree.layers].index(len(tree))  # what is before is not trained
        return {i: scores * selected for i in self.noisy_steps(tree) if i >= split}

    def history_scores(self, step: int, rewards: Tensor, ids: Tensor, groups: list[Group], valid: Tensor) -> Tensor:
        """B2-DiffuRL's normalised rewards of all leaves, with the last stages' of the same prompt; 0 where failed."""
        memory = self.state.extra
        past = [(k, p, values) for k, p, values in memory.get("history", []) if k >= step - self.cfg.of("history")]
        scores = torch.zeros(len(rewards))
        texts = [groups[k].prompt for k in ids.tolist()]
        now = []
        for prompt in dict.fromkeys(texts):
            rows = torch.tensor([k for k, text in enumerate(texts) if text == prompt and valid[k]], dtype=torch.long)
            before = [v for _, p, values in past if p == prompt for v in values]
            scores[rows] = history_scores(rewards[rows], torch.tensor(before))
            now.append([step, prompt, rewards[rows].tolist()])
        memory["history"] = [list(entry) for entry in past] + now
        return scores

    def noisy_steps(self, tree: Tree) -> list[int]:
        return [i for i, layer in enumerate(tree.layers) if len(layer.drawn)]

    # Learning --------------------------------------------------------------------------------------------------------

    def backward(self, branches: Branches, scale: float) -> dict[str, Tensor]:
        """Add the gradient of all edges, with one forward for those that begin at one node. Returns sums to log."""
        tree = branches.tree
        sums: dict[str, Tensor] = {}
        for i, advantages in branches.advantages.items():
            layer, weight = tree.layers[i], self.step_weights[i]
            assert layer.latents is not None
            live = advantages.cpu().ne(0).nonzero().flatten()  # no forward for edges without signal
            nodes = layer.parents[layer.drawn[live]].unique()
            for rows in nodes.split(self.cfg.batch_size) if len(live) else ():
                local = live[torch.isin(layer.parents[layer.drawn[live]], rows)]
                starts = torch.searchsorted(rows, layer.parents[layer.drawn[local]]).to(tree.final.device)
                roots = [(tree.prompts[r], tree.seeds[r]) for r in tree.roots[i][rows].tolist()]
                latents, edges = layer.latents[rows.to(tree.final.device)], local.to(tree.final.device)
                actions, credit = layer.next_latents[edges], advantages[edges]

                def loss(
                    i: int, prediction: Tensor, _others: Mapping[str, Tensor], latents=latents, starts=starts,
                    actions=actions, edges=edges, credit=credit, weight=weight,
                ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
                    gaussian = self.transition(self.schedule, i, latents, prediction)[0].take(starts)
                    log_prob = gaussian.log_prob(actions)
                    old = tree.old_log_probs(i, edges, log_prob)
                    surrogate, stats = clipped_surrogate(log_prob, old, credit, self.cfg.clip_range)
                    return surrogate * weight, stats

                prompts, seeds = [p for p, _ in roots], [s for _, s in roots]
                add_sums(sums, add_gradients(self.generator, prompts, seeds, {i: latents}, loss, scale))
        return sums

    def update(self, step: int, branches: Branches) -> dict[str, float]:
        """The optimiser updates of an iteration; returns what to log."""
        cfg, accelerator = self.cfg, self.loop.accelerator
        count = sum(int(a.ne(0).sum()) if cfg.method == "b2_diffurl" else len(a) for a in branches.advantages.values())
        edges = int(accelerator.reduce(torch.tensor(count, device=accelerator.device), "sum"))
        updates = Updates(self.state, accelerator, step, [branches.tree])
        for _ in range(cfg.inner_epochs if edges else 0):  # where nothing is kept, no update is made
            with self.run.stage("train"):
                updates.add(self.backward(branches, 1 / edges))
                updates.apply()
        return updates.values(CLIPPED_STATS) | {"trained_edges": edges}


def main(cfg: Config) -> Path:
    """Train; returns the run folder."""
    return train(TreeGRPO, cfg)


def cli(argv: list[str] | None = None) -> None:
    launch(TreeGRPO, argv)


if __name__ == "__main__":
    cli()
