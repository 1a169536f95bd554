"""The trainer on branching rollouts: the trees, credits and edges of each method, sharing, options, whole runs."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from trainer_checks import refused

from visalign.advantages.group import group_advantages
from visalign.advantages.process_values import turning_point_rewards
from visalign.data.prompts import iteration_groups
from visalign.objectives.policy_gradient import clipped_surrogate, tempflow_weights
from visalign.trainers import tree_grpo
from visalign.trainers.tree_grpo import METHODS, Config, TreeGRPO, main
from visalign.training.before.config import parse_config
from visalign.training.before.preflight import make_plan
from visalign.training.loop.training_loop import open_training
from visalign.training.run.folder import read_metrics

SMALL = {
    "branch_grpo": dict(split_steps=(0, 2)),
    "tree_grpo": dict(window_size=2, window_iterations=1),
    "tempflow": dict(split_steps=(0, 2), children=2),
    "tp_grpo": dict(window_size=2, trees=2),
    "b2_diffurl": dict(children=3, trained_steps=(2, 3), stages=2, keep_above=0.1, keep_below=-0.1),
}


@pytest.fixture(scope="module")
def small(options):
    return {k: v for k, v in options.items() if k not in ("window", "group_size")} | {"batch_size": 4}


@pytest.fixture(scope="module")
def loop(small, tmp_path_factory):
    cfg = Config(**small, **SMALL["branch_grpo"], run_dir=str(tmp_path_factory.mktemp("tree") / "run"))
    with open_training(cfg, make_plan(cfg, "tree"), cfg.prompts_per_step) as loop:
        loop.fresh = {k: v.clone() for k, v in loop.state.policy.tensors().items()}
        yield loop


@pytest.fixture(autouse=True)
def as_built(request):
    yield
    if "loop" in request.fixturenames:
        loop = request.getfixturevalue("loop")
        loop.state.policy.load(loop.fresh)
        loop.state.optimizer.zero_grad(set_to_none=True)
        loop.state.optimizer.state.clear()
        loop.state.extra.clear()


def trainer_of(loop, method="branch_grpo", **changes) -> TreeGRPO:
    bare = {k: v for k, v in asdict(loop.cfg).items() if k not in ("split_steps", "method")}
    given, loop.cfg = loop.cfg, Config(**{**bare, "method": method, **SMALL[method], **changes})
    try:
        return TreeGRPO(loop)
    finally:
        loop.cfg = given


def sampled(trainer, step=0):
    cfg = trainer.cfg
    trees = cfg.of("trees") if "trees" in METHODS[cfg.method] else 1
    groups = iteration_groups(trainer.loop.plan.prompts, step, cfg.prompts_per_step, trees, cfg.seed)
    with torch.no_grad():
        branches = trainer.sample(step, groups)
    return branches, groups


def assigned(trainer, step=0):
    branches, groups = sampled(trainer, step)
    return branches, trainer.assign_advantages(step, branches, groups)[0]


def brightness(tree):
    return tree.images.flatten(1).mean(1)


def move(loop, size=0.02):
    generator = torch.Generator().manual_seed(0)
    for p in loop.state.policy.trained.values():
        p.data += size * torch.randn(p.shape, generator=generator)


def gradient(trainer, branches):
    sums = trainer.backward(branches, 1.0)
    parameters = trainer.state.policy.trained.values()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    trainer.state.optimizer.zero_grad(set_to_none=True)
    return flat, sums


def naive_gradient(trainer, branches):
    """Every edge by itself: a forward each."""
    tree, loop = branches.tree, trainer.loop
    weights = tempflow_weights(trainer.stds)
    for i, advantages in branches.advantages.items():
        layer = tree.layers[i]
        for k, edge in enumerate(layer.drawn.tolist()):
            node = int(layer.parents[edge])
            root = int(tree.roots[i][node])
            latents = layer.latents[node : node + 1]
            prediction = loop.state.generator.predict(latents, i, [tree.prompts[root]], [tree.seeds[root]])
            gaussian = trainer.transition(trainer.schedule, i, latents, prediction)[0]
            log_prob = gaussian.log_prob(layer.next_latents[k : k + 1])
            loss, _ = clipped_surrogate(
                log_prob, layer.log_probs[k : k + 1], advantages[k : k + 1], trainer.cfg.clip_range
            )
            (loss.sum() * (weights[i] if trainer.cfg.method == "tempflow" else 1.0)).backward()
    parameters = loop.state.policy.trained.values()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    loop.state.optimizer.zero_grad(set_to_none=True)
    return flat


# Each method's trees and credits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, leaves, steps, rows",
    [
        ("branch_grpo", 8, [0, 2], 2 * (1 + 2 + 2 + 4)),
        ("tree_grpo", 8, [0, 1], 2 * (1 + 2 + 4 + 4)),
        ("tempflow", 8, [0, 2], 2 * (1 + 3 + 3 + 4)),
        ("tp_grpo", 12, None, None),
        ("b2_diffurl", 6, [0, 1, 2, 3], 2 * (1 + 1 + 1 + 3)),
    ],
)
def test_trees_have_the_methods_form_and_their_prefix_is_denoised_once(loop, method, leaves, steps, rows):
    trainer, counted = trainer_of(loop, method), []
    block = loop.state.policy.module.transformer_blocks[0]  # not run where the denoiser is passed at no cost
    hook = block.register_forward_pre_hook(lambda _m, args, kwargs: counted.append(kwargs), with_kwargs=True)
    branches, _ = sampled(trainer)
    hook.remove()
    tree = branches.tree
    assert len(tree) == leaves and branches.group_ids.tolist() == sorted(branches.group_ids.tolist())
    assert sum(len(kwargs["hidden_states"]) for kwargs in counted) == tree.forwards < tree.separate_forwards
    assert rows is None or tree.forwards == rows
    assert steps is None or trainer.noisy_steps(tree) == steps
    assert loop.state.extra == {"denoiser_rows": tree.forwards, "denoiser_rows_unshared": leaves * 4}


def test_branch_advantages_are_of_the_nodes_means_at_their_depth(loop):
    trainer = trainer_of(loop)
    branches, _ = assigned(trainer)
    rewards = brightness(branches.tree).view(2, 2, 2)  # tree, first split, second split
    nodes = rewards.mean(2)
    wanted = (nodes - nodes.mean(1, keepdim=True)) / nodes.std(1, keepdim=True)
    torch.testing.assert_close(branches.advantages[0], wanted.flatten(), atol=1e-4, rtol=0)
    leaves = rewards.flatten(1)
    wanted = (leaves - leaves.mean(1, keepdim=True)) / leaves.std(1, keepdim=True)
    torch.testing.assert_close(branches.advantages[2], wanted.flatten(), atol=1e-4, rtol=0)


def test_stochastic_steps_between_the_splits_are_trained_with_their_nodes(loop):
    branches, _ = assigned(trainer_of(loop, between="sde"))
    assert list(branches.advantages) == [0, 1, 2, 3]
    assert torch.equal(branches.advantages[0], branches.advantages[1])
    assert torch.equal(branches.advantages[2], branches.advantages[3])
    alone, _ = assigned(trainer_of(loop, between="sde", split_steps=(2,)))
    assert alone.advantages[0].abs().max() == 0 < alone.advantages[2].abs().max(), "one node at that depth"


def test_pruning_leaves_edges_out_and_keeps_the_others_as_they_are(loop):
    whole, _ = assigned(trainer_of(loop))
    best, _ = assigned(trainer_of(loop, prune="half_leaves"))
    rewards = brightness(whole.tree).view(-1, 2)  # pairs of the last split, of two children
    kept = torch.stack([rewards[:, 0] >= rewards[:, 1], rewards[:, 0] < rewards[:, 1]], 1).flatten()
    assert torch.equal(best.advantages[2], whole.advantages[2] * kept) and kept.sum() == 4
    assert torch.equal(best.advantages[0], whole.advantages[0])  # each first branch has a leaf that is kept
    both, _ = assigned(trainer_of(loop, prune="extreme_leaves"))
    assert all(torch.equal(both.advantages[i], whole.advantages[i]) for i in (0, 2))  # of two, both
    for step, left_out in ((0, None), (2, 2), (9, None)):  # depth 4 has no edge, 3 has the last split's, 2 none again
        some, _ = assigned(trainer_of(loop, prune_depths=1, window_iterations=2), step)
        again, _ = assigned(trainer_of(loop), step)
        for i in (0, 2):
            assert torch.equal(some.advantages[i], again.advantages[i] * (i != left_out))


def test_pruning_as_in_the_code_touches_the_steps_after_the_last_split_alone(loop):
    whole, _ = assigned(trainer_of(loop, between="sde", split_steps=(0, 1)))
    for mode in ("half", "extremes"):
        some, _ = assigned(trainer_of(loop, between="sde", split_steps=(0, 1), prune=mode))
        for i in (0, 1):
            assert torch.equal(some.advantages[i], whole.advantages[i])
        late = torch.stack([whole.advantages[2], whole.advantages[3]])  # each branch is a chain of two
        kept = torch.stack([some.advantages[2], some.advantages[3]])
        assert torch.equal(kept[kept != 0], late[kept != 0])
        if mode == "half":  # one of two: where they are equal the first
            assert torch.equal(kept[0], late[0]) and kept[1].abs().max() == 0
        else:  # of a tree's eight four: its two largest and its two smallest
            for tree in (slice(0, 4), slice(4, 8)):
                values = late[:, tree].flatten().sort().values
                expected = torch.cat([values[:2], values[-2:]])
                assert torch.equal(kept[:, tree][kept[:, tree] != 0].sort().values, expected[expected != 0])
    with pytest.raises(ValueError, match="prune: got 'half', which is of the stochastic steps after the last split"):
        trainer_of(loop, prune="half")


def test_tree_advantages_are_the_leaves_and_backwards_their_mean_without_normalising_again(loop):
    trainer = trainer_of(loop, "tree_grpo")
    branches, _ = assigned(trainer)
    leaves = brightness(branches.tree).view(2, 4)
    wanted = (leaves - leaves.mean(1, keepdim=True)) / leaves.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(branches.advantages[1], wanted.flatten(), atol=1e-4, rtol=0)
    torch.testing.assert_close(branches.advantages[0], wanted.view(2, 2, 2).mean(2).flatten(), atol=1e-4, rtol=0)
    weighted, _ = assigned(trainer_of(loop, "tree_grpo", backup="softmax"))
    assert torch.equal(weighted.advantages[1], branches.advantages[1])
    assert 0 < (weighted.advantages[0] - branches.advantages[0]).abs().max() < 0.1, "almost uniform"


def test_tempflow_compares_what_branched_off_at_the_same_step(loop):
    branches, _ = assigned(trainer_of(loop, "tempflow"))
    rewards = brightness(branches.tree).view(2, 4)
    for i, columns in ((0, [0, 1]), (2, [2, 3])):
        wanted = group_advantages(rewards[:, columns].flatten(), torch.tensor([0, 0, 1, 1]))
        assert torch.equal(branches.advantages[i], wanted)


def test_turning_point_credit_is_normalised_by_prompt_and_step(loop):
    trainer = trainer_of(loop, "tp_grpo", trees=3)
    branches, _ = assigned(trainer)
    along = brightness(branches.tree).view(6, 3).flip(1).T  # 6 trees; without a stochastic step, with 1, with 2
    steps = turning_point_rewards(along)
    assert list(branches.advantages) == trainer.cfg.window(0) and steps.shape == (2, 6)
    for i, row in zip(branches.advantages, steps):
        wanted = group_advantages(row, torch.tensor([0, 0, 0, 1, 1, 1]))
        torch.testing.assert_close(branches.advantages[i], wanted, atol=1e-3, rtol=0)
    other, _ = assigned(trainer_of(loop, "tp_grpo", trees=3, bonus=50.0))
    assert max((branches.advantages[i] - other.advantages[i]).abs().max() for i in other.advantages) > 0.01


def test_b2_trains_the_last_steps_of_the_best_and_the_worst_of_each_branching(loop):
    trainer = trainer_of(loop, "b2_diffurl")
    branches, _ = assigned(trainer)
    assert list(branches.advantages) == [2, 3] and len(branches.tree) == 6
    kept = branches.advantages[2] != 0
    assert torch.equal(branches.advantages[2], branches.advantages[3]) and kept.view(2, 3).sum(1).tolist() == [2, 2]
    rewards = brightness(branches.tree).view(2, 3)
    best, worst = branches.advantages[2].view(2, 3).argmax(1), branches.advantages[2].view(2, 3).argmin(1)
    assert torch.equal(best, rewards.argmax(1)) and torch.equal(worst, rewards.argmin(1))
    assert torch.equal(branches.tree.layers[2].parents, torch.tensor([0, 0, 0, 1, 1, 1]))
    later, _ = sampled(trainer, step=1)
    assert later.tree.layers[1].parents.tolist() == [0, 0, 0, 1, 1, 1], "one more step is trained"


def test_b2_remembers_a_prompts_rewards_for_some_stages(loop):
    trainer = trainer_of(loop, "b2_diffurl", history=1)
    prompts = loop.plan.prompts
    groups = iteration_groups(prompts, 0, 2, 1, 0)
    ids, rewards = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    every = torch.ones(6, dtype=torch.bool)
    first = trainer.history_scores(0, rewards, ids, groups, every)
    assert [entry[:2] for entry in loop.state.extra["history"]] == [[0, g.prompt] for g in groups]
    second = trainer.history_scores(1, rewards + 1, ids, groups, every)
    assert second.min() > 0.5 and first.view(2, 3).sum(1).abs().max() < 1e-5
    assert torch.equal(trainer.history_scores(5, rewards, ids, groups, every), first), "all has been forgotten"
    assert json.loads(json.dumps(loop.state.extra)) == loop.state.extra
    trainer.cfg = replace(trainer.cfg, history=0)
    assert torch.equal(trainer.history_scores(6, rewards, ids, groups, every), first)
    some = torch.tensor([True, False, True, True, True, True])
    scores = trainer.history_scores(7, rewards, ids, groups, some)
    torch.testing.assert_close(scores[:3], torch.tensor([-1.0, 0.0, 1.0]) / 2**0.5, atol=1e-5, rtol=0)
    assert loop.state.extra["history"][-2][2] == pytest.approx([0.1, 0.3]), "what failed is not remembered"


def test_an_empty_selection_makes_no_update(loop):
    trainer = trainer_of(loop, "b2_diffurl", keep_above=9.0, keep_below=-9.0)
    branches, _ = assigned(trainer)
    values = trainer.update(0, branches)
    assert values["trained_edges"] == 0 and not loop.state.optimizer.state
    assert all(torch.equal(v, loop.fresh[k]) for k, v in loop.state.policy.tensors().items())


# Learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(SMALL))
def test_the_gradient_is_that_of_every_edge_by_itself_and_ratios_begin_at_1(loop, method):
    trainer = trainer_of(loop, method, clip_range=10.0, eta=0.5)
    branches, _ = assigned(trainer)
    _, sums = gradient(trainer, branches)
    assert float(sums["ratio_mean"] / sums["count"]) == pytest.approx(1, abs=1e-6)
    move(loop)
    shared, sums = gradient(trainer, branches)
    assert float(sums["count"]) == sum(int(a.ne(0).sum()) for a in branches.advantages.values())
    wanted = naive_gradient(trainer, branches)
    torch.testing.assert_close(shared, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_a_failed_score_leaves_its_own_edges_without_signal_and_is_in_no_mean_above(loop, monkeypatch):
    trainer, seen = trainer_of(loop), []
    score = trainer.scorer.submit

    def failing(images, prompts, ids):
        future = score(images, prompts, ids)
        scored = future.result()
        seen.append(torch.cat([s.total for s in scored]))
        scored[0] = replace(scored[0], valid=torch.tensor([False] + [True] * 3))
        return future

    monkeypatch.setattr(trainer.scorer, "submit", failing)
    branches, values = assigned(trainer)
    assert values["failed_scores"] == 2  # the first leaf of each tree
    assert branches.advantages[2].eq(0).tolist() == [True, False, False, False] * 2
    leaves = torch.cat(seen).view(2, 4).double()
    nodes = torch.stack([leaves[:, 1], leaves[:, 2:].mean(1)], 1)  # of the first node one leaf is known
    sign = (nodes[:, 0] - nodes[:, 1]).sign()
    wanted = torch.stack([sign, -sign], 1) / 2**0.5
    torch.testing.assert_close(branches.advantages[0].view(2, 2).double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "method, changes",
    [
        ("branch_grpo", dict(max_advantage=0.1)),
        ("branch_grpo", dict(clip_range=1e-9)),
        ("tempflow", dict(noise_weight=False)),
        ("branch_grpo", dict(prune="half_leaves")),
        ("branch_grpo", dict(prune_depths=2)),
        ("b2_diffurl", dict(positive_weight=0.0)),
        ("b2_diffurl", dict(negative_weight=0.5)),
        ("b2_diffurl", dict(keep_above=9.0)),
        ("b2_diffurl", dict(keep_below=-9.0)),
    ],
    ids=str,
)
def test_options_of_the_objective_change_the_gradient(loop, method, changes):
    results = []
    for given in ({}, changes):
        trainer = trainer_of(loop, method, **{"clip_range": 1.0, **given})
        branches, _ = assigned(trainer)
        loop.state.extra.clear()
        move(loop)
        results.append(gradient(trainer, branches)[0])
        loop.state.policy.load(loop.fresh)
    assert results[1].isfinite().all() and (results[1] - results[0]).norm() > 1e-3 * results[0].norm()


@pytest.mark.parametrize(
    "method, changes",
    [
        ("branch_grpo", dict(children=3)),
        ("branch_grpo", dict(split_steps=(1,))),
        ("branch_grpo", dict(between="sde")),
        ("branch_grpo", dict(eta=0.3)),
        ("branch_grpo", dict(sampler="cps")),
        ("tree_grpo", dict(window_size=1)),
        ("tp_grpo", dict(trees=3)),
        ("b2_diffurl", dict(trees=2)),
        ("b2_diffurl", dict(trained_steps=(1, 3))),
    ],
    ids=str,
)
def test_options_of_sampling_change_the_trees(loop, method, changes):
    base, _ = sampled(trainer_of(loop, method))
    other, _ = sampled(trainer_of(loop, method, **changes))
    same = [len(layer.parents) for layer in base.tree.layers] == [len(layer.parents) for layer in other.tree.layers]
    assert not same or (base.tree.final - other.tree.final).abs().max() > 1e-3


def test_windows_move_on_or_lie_anywhere_and_stages_pass():
    cfg = Config(method="tree_grpo", window_iterations=2)
    assert [cfg.window(k)[0] for k in range(6)] == [0, 0, 1, 1, 2, 2]
    cfg = Config(method="tp_grpo")
    assert len({cfg.window(k)[0] for k in range(20)}) > 2 and cfg.window(3) == cfg.window(3)
    assert Config(method="b2_diffurl").interval == (7, 10)


def test_inner_epochs_make_that_many_updates(loop):
    trainer = trainer_of(loop, inner_epochs=2)
    trainer.update(0, assigned(trainer)[0])
    assert next(iter(loop.state.optimizer.state.values()))["step"] == 2


# Whole runs ------------------------------------------------------------------------------------------------------


def test_b2_trains_a_diffusion_model(small, tmp_path):
    """A tiny Stable Diffusion with random weights."""
    tiny_pipelines.make("Stable Diffusion 1.5").save_pretrained(tmp_path / "sd")
    own = dict(method="b2_diffurl", model=str(tmp_path / "sd"), sampler="ddim", eta=1.0, guidance_scale=1.0, height=32)
    own |= dict(width=32, judges="jpeg_compressibility", inner_epochs=2, clip_range=0.1, steps=1)
    folder = main(Config(**{**small, **own, **SMALL["b2_diffurl"]}, run_dir=str(tmp_path / "run")))
    line = read_metrics(folder / "metrics.jsonl")[1]
    assert line["trained_edges"] > 0 and line["ratio_mean"] == pytest.approx(1, abs=0.01)
    assert line["forwards_per_image"] < 4


def test_the_summary_tells_what_was_shared(small, tmp_path, capfd):
    folder = main(Config(**{**small, **SMALL["branch_grpo"]}, run_dir=str(tmp_path / "run")))
    assert "rows of the denoiser" in capfd.readouterr().err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["denoiser_rows"] == 2 * 2 * (1 + 2 + 2 + 4) and summary["denoiser_rows_unshared"] == 2 * 2 * 4 * 4
    assert summary["images_sampled"] == 2 * 2 * 4


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(trees=2), "trees: got 2 with method 'branch_grpo', expected .*'tp_grpo', 'b2_diffurl'"),
        (dict(method="tempflow", between="sde"), "between: got 'sde' with method 'tempflow'"),
        (dict(method="tempflow", prune="half"), "prune: got 'half' with method 'tempflow'"),
        (dict(prune_depths=-1), "prune_depths: got -1, expected >= 0"),
        (dict(children=1), "children: got 1, expected >= 2"),
        (dict(method="tp_grpo", window_size=2, trees=1), "trees: got 1, expected >= 2"),
        (dict(split_steps="[4]"), r"split_steps: got \(4,\), expected rising steps within 0 .. 3"),
        (dict(split_steps="[2,1]"), r"split_steps: got \(2, 1\)"),
        (dict(split_steps="[3]", sampler="cps"), r"split_steps: got \(3,\), expected .* 0 .. 2"),
        (dict(method="tree_grpo", window_size=3), "size: got 3, expected at most 2"),
        (dict(method="tp_grpo", window_size=4), "size: got 4, expected at most 3"),
        (dict(method="b2_diffurl", trained_steps="[3,5]"), r"trained_steps: got \(3, 5\)"),
        (dict(method="b2_diffurl", trained_steps="[1,3]", sampler="cps"), r"trained_steps: got \(1, 3\), expected 2"),
        (dict(method="b2_diffurl", keep_below=1.0), "keep_below: got 1.0, expected <= 0.5"),
        (dict(method="b2_diffurl", history=-1), "history: got -1, expected >= 0"),
        (dict(eta=0), "eta: got 0.0, expected > 0"),
        (dict(sampler="ddim", eta=2), "eta: got 2.0, expected within"),
        (dict(method="tree"), "method: got 'tree'"),
    ],
    ids=str,
)
def test_wrong_values_end_with_one_line_before_loading(small, changes, message, monkeypatch, capsys):
    error = refused(tree_grpo, [f"--{k}={v}" for k, v in {**small, **changes}.items()], monkeypatch, capsys)
    assert re.search(message, error), error


def test_a_sampler_of_another_kind_of_model_is_refused(loop):
    with pytest.raises(ValueError, match="^sampler: got 'ddim' on a flow model"):
        trainer_of(loop, sampler="ddim", eta=1.0)


RECIPES = sorted((Path(tree_grpo.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", [p for p in RECIPES if "# For trainers/tree_grpo.py" in p.read_text()], ids=str)
def test_recipes_resolve_and_differ_from_the_defaults(recipe):
    cfg = parse_config(Config, ["--config", str(recipe)], prog="tree_grpo", description="")
    assert asdict(cfg) != asdict(Config(method=cfg.method)) and cfg.model.count("/") == 1


def test_every_method_has_a_recipe():
    texts = [p.read_text() for p in RECIPES]
    assert all(any(f"\nmethod: {method}\n" in text for text in texts) for method in METHODS)
