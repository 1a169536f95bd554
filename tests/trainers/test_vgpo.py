"""The VGPO trainer: projections at no further forward, one score call, its advantages, its options, whole runs."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from trainer_checks import refused, scored

from visalign.advantages.group import clip_advantages, group_advantages
from visalign.advantages.process_values import dual_advantages, process_values, temporal_weights
from visalign.data.prompts import iteration_groups
from visalign.rewards import as_reward, make_reward
from visalign.trainers import vgpo
from visalign.trainers.vgpo import VGPO, Config
from visalign.training.before.config import parse_config
from visalign.training.before.preflight import make_plan
from visalign.training.loop.scoring import Scorer
from visalign.training.loop.training_loop import TrainingLoop, open_training


@pytest.fixture(scope="module")
def small(options, world_files):
    dark = world_files / "dark.py"  # below 0
    dark.write_text("def dark(images, prompts):\n    return -1 - images.flatten(1).mean(1)\n")
    kept = {k: v for k, v in options.items() if k != "window"}
    return {**kept, "group_size": 3}


@pytest.fixture(scope="module")
def loop(small, tmp_path_factory):
    cfg = Config(**small, absolute=0.0, timestep_fraction=1.0, run_dir=str(tmp_path_factory.mktemp("vgpo") / "run"))
    with open_training(cfg, make_plan(cfg, "vgpo"), cfg.prompts_per_step) as loop:
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


def trainer_of(loop, scorer=None, **changes) -> VGPO:
    parts = replace(loop.state, scorer=scorer) if scorer else loop.state
    return VGPO(TrainingLoop(replace(loop.cfg, **changes), loop.plan, loop.accelerator, parts, loop.run))


def sampled(trainer):
    cfg = trainer.cfg
    groups = iteration_groups(
        trainer.loop.plan.prompts, 0, cfg.prompts_per_step, cfg.group_size, cfg.seed, cfg.same_latents
    )
    return scored(trainer, trainer.sample(groups))


def advantages(trainer, batches, valid=None):
    """Of the trained steps (T, N), what is logged, and the batches with theirs."""
    submitted, scores = batches
    scores = scores if valid is None else replace(scores, valid=valid)
    found, values, _ = trainer.advantages(scores)
    (batches,) = scores.assign([submitted], found.flatten())
    by_step = torch.cat([b.advantages.view(trainer.cfg.num_steps, -1) for b in batches], 1)
    return by_step[trainer.trained], values, batches


class Counting:
    """Brightness, with a record of how many images each call had."""

    name, kind, differentiable, range, needs = "counting", "pointwise", False, (0.0, 1.0), ()

    def __init__(self, constant=False, kind="pointwise"):
        self.calls, self.constant, self.kind = [], constant, kind

    def __call__(self, images, prompts, context=None):
        self.calls.append((len(images), context))
        if self.constant:  # the same for a trajectory's steps: by the prompt and the place in the group
            return torch.arange(len(images)).remainder(6).float() / 6
        return images.flatten(1).mean(1)


def test_projections_cost_no_forward_and_are_the_one_step_estimates(loop):
    trainer, forwards, kept = trainer_of(loop, batch_size=6), [], {}
    block = loop.state.policy.module.transformer_blocks[0]  # not run where the denoiser is passed at no cost
    hook = block.register_forward_pre_hook(lambda *_: forwards.append(1))
    project = trainer.project

    def keep(trajectory):
        kept["trajectory"], kept["images"] = trajectory, project(trajectory)
        return kept["images"]

    trainer.project = keep
    sampled(trainer)
    hook.remove()
    assert len(forwards) == 4  # T, as a plain rollout
    trajectory, images = kept["trajectory"], kept["images"]
    assert len(images) == 4 and torch.equal(images[-1], trajectory.images) and trajectory.denoised == {}
    with torch.no_grad():
        for i in range(3):
            state = trajectory.next_latents[i]
            velocity = loop.state.generator.predict(state, i + 1, trajectory.prompts, trajectory.seeds)
            x0 = state - trainer.schedule.levels[i + 1] * velocity
            wanted = loop.state.generator.decode(x0, trajectory.prompts, trajectory.seeds)
            torch.testing.assert_close(images[i], wanted, atol=1e-5, rtol=0)


def test_the_value_pass_scores_a_batch_in_one_call_and_a_group_reward_sees_each_step_apart(loop):
    pointwise = Counting()
    sampled(trainer_of(loop, Scorer(pointwise, torch.device("cpu")), batch_size=4))
    assert [n for n, _ in pointwise.calls] == [4 * 4, 2 * 4]
    groupwise = Counting(kind="groupwise")
    sampled(trainer_of(loop, Scorer(groupwise, torch.device("cpu")), batch_size=4))
    ((count, context),) = groupwise.calls
    assert count == 6 * 4 and context["group_ids"].bincount().tolist() == [3] * (2 * 4)


def test_before_the_first_update_every_ratio_is_1_and_the_loss_is_minus_the_steps_advantage(loop):
    trainer = trainer_of(loop, batch_size=6)
    by_step, _, (batch,) = advantages(trainer, sampled(trainer))
    seen = []

    def look(i, _latents, prediction):
        loss, stats = trainer.loss(batch.trajectory, i, prediction, by_step[i], None)
        assert torch.equal(loss, -by_step[i]) and stats["clip_fraction"] == 0
        seen.append(i)

    states = batch.trajectory.latents
    loop.state.generator.denoise(batch.trajectory.prompts, batch.trajectory.seeds, look, latents=states)
    assert seen == [0, 1, 2, 3]
    assert not torch.equal(by_step[0], by_step[3])


def test_with_rewards_that_do_not_change_along_the_way_the_advantage_is_flow_grpos(loop):
    scorer = Scorer(Counting(constant=True), torch.device("cpu"))
    trainer = trainer_of(loop, scorer, discount=0.0, batch_size=6)
    result, *_ = advantages(trainer, sampled(trainer))
    rewards = torch.arange(6).float() / 6
    wanted = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1]))
    wanted[0] = 0.0  # its reward is 0 at all steps, so its weight is, too
    torch.testing.assert_close(result, wanted.expand(4, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        dict(discount=0.1),
        dict(absolute=3.0),
        dict(absolute=3.0, absolute_steps=1),
        dict(max_weight=1.0),
        dict(advantage_std="global"),
        dict(max_advantage=0.5),
    ],
    ids=str,
)
def test_each_option_of_the_advantages_changes_them(loop, changes):
    trainer = trainer_of(loop)
    batches = sampled(trainer)
    base, *_ = advantages(trainer, batches)
    other, *_ = advantages(trainer_of(loop, **changes), batches)
    assert (other - base).abs().max() > 1e-3
    if changes == dict(absolute=3.0, absolute_steps=1):
        assert torch.equal(other[1:], base[1:])


def test_the_absolute_term_is_by_default_a_tenth_on_average_and_pulls_where_all_are_alike(loop):
    assert Config().absolute is None
    trainer = trainer_of(loop, absolute=None)
    batches = sampled(trainer)
    plain, *_ = advantages(trainer_of(loop), batches)
    both, *_ = advantages(trainer, batches)
    cfg, values = trainer.cfg, process_values(batches[1].total.view(4, 6), trainer.cfg.discount)
    weights = temporal_weights(values, limit=cfg.max_weight).float()
    term = (0.1 * values / values[: cfg.horizon].mean()).float()
    torch.testing.assert_close(both, clip_advantages(plain + weights * term, cfg.max_advantage), rtol=1e-4, atol=1e-5)
    constant = Scorer(lambda_reward(0.5), torch.device("cpu"))
    alike, *_ = advantages(trainer_of(loop, constant, absolute=None), sampled(trainer_of(loop, constant)))
    assert alike.min() > 0, "a group without spread still learns"
    zero = Scorer(lambda_reward(0.0), torch.device("cpu"))
    assert advantages(trainer_of(loop, zero, absolute=None), sampled(trainer_of(loop, zero)))[0].abs().max() == 0


def lambda_reward(value):
    return as_reward(lambda images: torch.full((len(images),), value), "constant")


@pytest.mark.parametrize(
    "changes", [dict(eta=0.3), dict(sampler="cps"), dict(sampler="dance_sde"), dict(same_latents=True)], ids=str
)
def test_each_option_of_sampling_changes_the_images(loop, changes):
    base, other = (sampled(trainer_of(loop, batch_size=6, **given))[0].batches[0].trajectory for given in ({}, changes))
    assert (other.images - base.images).abs().max() > 1e-3
    first = other.latents[0]
    assert torch.equal(first[0], first[1]) == ("same_latents" in changes)


def test_the_last_step_is_not_trained_by_default_nor_one_without_noise(loop):
    assert trainer_of(loop, timestep_fraction=0.99).trained == [0, 1, 2]
    assert trainer_of(loop).trained == [0, 1, 2, 3]
    assert trainer_of(loop, sampler="cps").trained == [0, 1, 2]
    assert trainer_of(loop, timestep_fraction=0.5).trained == [0, 1]


def test_negative_rewards_are_shifted_and_remembered_or_refused(loop, world_files):
    scorer = Scorer(make_reward(f"{world_files / 'dark.py'}:dark"), torch.device("cpu"))
    trainer = trainer_of(loop, scorer)
    batches = sampled(trainer)
    result, values, _ = advantages(trainer, batches)
    lowest = loop.state.extra["reward_minimum"]
    assert result.isfinite().all() and lowest < -1 and values["reward_mean"] < -1
    assert trainer.advantages(batches[1])[2][1].max() < -1, "the watch sees rewards as they are"
    loop.state.extra["reward_minimum"] = -100.0
    again, *_ = advantages(trainer, batches)
    assert loop.state.extra["reward_minimum"] == -100 and (again - result).abs().max() > 1e-3
    with pytest.raises(ValueError, match="^reward: got -.* expected >= 0"):
        trainer_of(loop, scorer, negative_rewards="refuse").advantages(batches[1])


def test_a_failed_score_leaves_its_sample_without_an_advantage(loop):
    trainer = trainer_of(loop, batch_size=6)
    batches = sampled(trainer)
    base, *_ = advantages(trainer, batches)
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[1, 2] = False
    result, values, _ = advantages(trainer, batches, valid.flatten())
    assert values["failed_scores"] == 1 and result[:, 2].abs().max() == 0
    others, mates = [3, 4, 5], [0, 1]  # of the other group, and of its own: as if there had been these two alone
    assert torch.equal(result[:, others], base[:, others])
    cfg, rewards = trainer.cfg, batches[1].total.view(4, 6)[:, mates]
    values = process_values(rewards, cfg.discount)
    alone = dual_advantages(values, torch.zeros(2, dtype=torch.int64), cfg.absolute, cfg.horizon, cfg.advantage_std)
    wanted = clip_advantages(temporal_weights(values, limit=cfg.max_weight).float() * alone, cfg.max_advantage)
    torch.testing.assert_close(result[:, mates], wanted[trainer.trained])


def gradient(trainer, batches):
    for batch in batches:
        trainer.backward(batch, 1.0)
    parameters = trainer.state.policy.trained.values()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    trainer.state.optimizer.zero_grad(set_to_none=True)
    return flat


def test_options_of_the_objective_change_the_gradient(loop):
    trainer = trainer_of(loop, clip_range=10.0)
    *_, batches = advantages(trainer, sampled(trainer))
    generator = torch.Generator().manual_seed(0)
    for p in loop.state.policy.trained.values():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    base = gradient(trainer, batches)
    kinds = {}
    for changes in (
        dict(clip_range=1e-9),
        *(dict(kl_weight=1.0, kl_type=k) for k in ("gaussian", "flow_grpo", "x", "v")),
    ):
        other = gradient(trainer_of(loop, **{"clip_range": 10.0, **changes}), batches)
        assert other.isfinite().all() and (other - base).norm() > 1e-3 * base.norm(), changes
        kinds[str(changes)] = other
    assert len({float(g.norm()) for g in kinds.values()}) == len(kinds)


def test_samples_and_advantages_do_not_depend_on_the_batch_size(loop):
    results = []
    for size in (6, 4, 1):
        trainer = trainer_of(loop, batch_size=size)
        results.append(advantages(trainer, sampled(trainer))[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-3, rtol=0)


def test_inner_epochs_make_that_many_updates(loop):
    trainer = trainer_of(loop, inner_epochs=2)
    *_, batches = advantages(trainer, sampled(trainer))
    trainer.update(0, batches)
    assert next(iter(loop.state.optimizer.state.values()))["step"] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(group_size=1), "group_size: got 1, expected >= 2"),
        (dict(eta=0), "eta: got 0.0, expected > 0"),
        (dict(sampler="cps", eta=2), "eta: got 2"),
        (dict(discount=2), "discount: got 2.*expected within"),
        (dict(absolute=-1), "absolute: got -1"),
        (dict(absolute=1, absolute_steps=5), "absolute_steps: got 5, expected 1 .. 4"),
        (dict(absolute=0, absolute_steps=2), "absolute_steps: got 2 with absolute 0, expected None"),
        (dict(max_weight=0.5), "max_weight: got 0.5"),
        (dict(timestep_fraction=0.2), "timestep_fraction: got 0.2 of 4"),
        (dict(kl_weight=-1), "kl_weight: got -1"),
        (dict(kl_type="u"), "kl_type: got 'u'"),
    ],
)
def test_wrong_values_end_with_one_line_before_loading(small, changes, message, monkeypatch, capsys):
    error = refused(vgpo, [f"--{k}={v}" for k, v in {**small, **changes}.items()], monkeypatch, capsys)
    assert re.search(message, error), error


def test_a_reward_without_a_value_for_single_samples_is_refused(loop, monkeypatch):
    reward = make_reward({"rewards": ["jpeg_compressibility", "gold"], "combine": "correlation"})
    monkeypatch.setattr(loop.state, "scorer", Scorer(reward, torch.device("cpu")))
    with pytest.raises(ValueError, match="^reward: .*which has no value for a sample by itself"):
        VGPO(loop)


def test_recipe_resolves_and_differs_from_the_defaults():
    recipe = Path(vgpo.__file__).parent / "recipes" / "vgpo.yaml"
    cfg = parse_config(Config, ["--config", str(recipe)], prog="vgpo", description="")
    assert asdict(cfg) != asdict(Config()) and cfg.model.count("/") == 1
