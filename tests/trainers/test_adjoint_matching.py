"""Adjoint matching: the scalar Gaussian in closed form, the adjoint as a chain of gradients, the trainer's parts."""

import math
from dataclasses import replace

import pytest
import torch
from trainer_checks import refused

from visalign.data.prompts import iteration_groups
from visalign.objectives.adjoint import adjoint_matching_loss, lean_adjoints, matched_steps, smoothed_gradient
from visalign.trainers import TRAINERS, adjoint_matching
from visalign.trainers.adjoint_matching import AdjointMatching, Config
from visalign.training.before.preflight import make_plan
from visalign.training.loop.batches import cut
from visalign.training.loop.training_loop import TrainingLoop, open_training
from visalign.training.reward_gradient.gradients import OTHERS
from visalign.training.reward_gradient.parts import UpdateLog
from visalign.transitions import MemorylessFlow, Schedule, flow_sde, make_transition
from visalign.transitions.memoryless import memoryless_diffusion, memoryless_flow

M, S, C = 1.0, 0.7, 0.8  # data N(M, S^2), reward C x, lambda 1


def velocity(x, sigma, mean=M):
    """Of the flow whose data are N(mean, S^2)."""
    spread = (1 - sigma) ** 2 * S**2 + sigma**2
    off = (x - (1 - sigma) * mean) / spread
    return sigma * off - mean - (1 - sigma) * S**2 * off


def adjoint_at(sigma):
    return -C * S**2 * (1 - sigma) / ((1 - sigma) ** 2 * S**2 + sigma**2)


def levels(count):
    return [1 - k / count for k in range(count + 1)]


def sampled(count, mean=M, samples=20_000):
    """States of a memoryless rollout."""
    generator, grid = torch.Generator().manual_seed(0), levels(count)
    x = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    states = {}
    for k in range(count):
        states[k] = x
        gaussian = memoryless_flow(x, velocity(x, grid[k], mean), grid[k], grid[k + 1])
        x = gaussian.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return states, x


def base_mean(count):
    grid = levels(count)
    return lambda k, x: memoryless_flow(x, velocity(x, grid[k]), grid[k], grid[k + 1]).mean


# The scalar Gaussian ------------------------------------------------------------------------------------------------


def test_the_memoryless_rollout_samples_the_data_and_with_the_optimum_the_tilted_data():
    final = sampled(400)[1]
    assert final.mean().item() == pytest.approx(1.0, abs=0.02) and final.std().item() == pytest.approx(0.7, abs=0.02)
    tilted = sampled(400, M + C * S**2)[1]  # simulated: 1.396
    assert tilted.mean().item() == pytest.approx(1.392, abs=0.02)


def test_adjoints_are_those_in_closed_form_at_every_state():
    states, final = sampled(400, samples=50)
    found = lean_adjoints(states, torch.full_like(final, -C), base_mean(400))
    for k in (40, 200, 320):
        expected = adjoint_at(levels(400)[k])
        assert found[k].min().item() == pytest.approx(expected, rel=0.02)
        assert found[k].max().item() == pytest.approx(expected, rel=0.02)
    assert adjoint_at(0.5) == pytest.approx(-0.526174, abs=1e-6)


def test_the_optimum_moves_the_velocity_by_half_the_squared_diffusion_times_the_adjoint():
    x = torch.linspace(-2, 3, 7, dtype=torch.float64)
    for sigma in (0.2, 0.5, 0.9):
        moved = velocity(x, sigma, M + C * S**2) - velocity(x, sigma)
        torch.testing.assert_close(moved, torch.full_like(x, sigma / (1 - sigma) * adjoint_at(sigma)))
    half = velocity(x, 0.5, M + C * S**2) - velocity(x, 0.5)
    torch.testing.assert_close(half, torch.full_like(x, -0.526174), atol=1e-6, rtol=0)


def test_the_loss_vanishes_at_the_optimum_and_is_the_adjoints_size_at_the_base():
    states, final = sampled(400, samples=50)
    found, grid = lean_adjoints(states, torch.full_like(final, -C), base_mean(400)), levels(400)
    for k in (40, 200, 320):
        base = base_mean(400)(k, states[k])
        best = memoryless_flow(states[k], velocity(states[k], grid[k], M + C * S**2), grid[k], grid[k + 1]).mean
        std = math.sqrt(1 / 400) * memoryless_diffusion(grid[k], grid[k + 1])
        at_base = adjoint_matching_loss(base, base, std, found[k])
        torch.testing.assert_close(at_base, (std**2 * found[k] ** 2)[:, 0])
        assert (adjoint_matching_loss(best, base, std, found[k]) < 1e-2 * at_base).all()  # its discretisation
    nothing = lean_adjoints(states, torch.zeros_like(final), base_mean(400))
    assert not any(a.any() for a in nothing.values())


# The formulas -------------------------------------------------------------------------------------------------------


def test_the_lean_adjoint_is_the_gradient_along_the_trajectory_of_the_base():
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    noises = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)

    def mean(k, x):
        return x - 0.2 * torch.tanh(x @ weights[k])

    start = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    x, states = start, {}
    for k in range(5):
        states[k] = x
        x = mean(k, x) + 0.1 * noises[k]
    reward = (x**3).sum()
    (expected,) = torch.autograd.grad(-7 * reward, start)
    found = lean_adjoints({k: s.detach() for k, s in states.items()}, -7 * 3 * x.detach() ** 2, mean)
    torch.testing.assert_close(found[0], expected)
    assert sorted(found) == list(range(6)) and not found[0].requires_grad
    with pytest.raises(ValueError, match=r"states: got those of steps \[1\]"):
        lean_adjoints({1: start}, start, mean)


def test_of_a_flow_it_is_the_papers_recursion_and_loss():
    sigma, sigma_next, h = 0.7, 0.5, 0.2
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, a = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = lean_adjoints({0: x}, a, lambda k, x: memoryless_flow(x, x @ matrix.T, sigma, sigma_next).mean)[0]
    torch.testing.assert_close(found, a - h * (2 * a @ matrix + a / (1 - sigma + h)))
    other = x @ matrix.T + 0.1 * x
    means = [memoryless_flow(x, v, sigma, sigma_next).mean for v in (other, x @ matrix.T)]
    diffusion = memoryless_diffusion(sigma, sigma_next)
    loss = adjoint_matching_loss(*means, math.sqrt(h) * diffusion, a) / h
    torch.testing.assert_close(loss, (2 / diffusion * 0.1 * x - diffusion * a).square().sum(1))


def test_the_memoryless_step_is_flow_sde_with_eta_root_two_to_first_order():
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours, theirs = memoryless_flow(x, v, 0.6, 0.5999), flow_sde(x, v, 0.6, 0.5999, eta=math.sqrt(2))
    torch.testing.assert_close(ours.mean - x, theirs.mean - x, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(ours.std, theirs.std, rtol=1e-3, atol=0)
    assert isinstance(make_transition("memoryless_flow"), MemorylessFlow)
    first, last = memoryless_flow(x, v, 1.0, 0.75), memoryless_flow(x, v, 0.25, 0.0)
    torch.testing.assert_close(first.mean, x - 0.25 * (2 * v + x / 0.25))
    assert first.std.flatten()[0].item() == pytest.approx(0.5 * math.sqrt(2 * 1.25 / 0.25))
    assert last.deterministic
    torch.testing.assert_close(last.mean, x - 0.25 * v)


def test_copies_of_the_gradient_are_clipped_at_a_quantile_of_their_norms():
    gradients = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]], [[1.0, 0.0]]])
    even = smoothed_gradient(gradients, quantile=1.0)
    torch.testing.assert_close(even, gradients.mean(0))
    clipped = smoothed_gradient(gradients, quantile=0.5)  # median norm 1
    torch.testing.assert_close(clipped, torch.tensor([[1.6 / 3, 1.8 / 3]]))
    torch.testing.assert_close(smoothed_gradient(gradients[:1]), gradients[0])
    pictures = gradients.view(3, 1, 2, 1, 1)  # of any number of dimensions
    torch.testing.assert_close(smoothed_gradient(pictures, quantile=0.5), clipped.view(1, 2, 1, 1))
    two = torch.cat([gradients, 10 * gradients.flip(0)], dim=1)  # each sample by itself
    torch.testing.assert_close(smoothed_gradient(two, quantile=0.5)[:1], clipped)


def test_the_last_steps_are_always_trained_and_others_at_random():
    drawn = {tuple(matched_steps(list(range(12)), torch.Generator().manual_seed(s))) for s in range(20)}
    assert len(drawn) > 5
    for steps in drawn:
        assert len(steps) == 5 and {9, 10, 11} <= set(steps) and list(steps) == sorted(set(steps))
    assert matched_steps([0, 1], torch.Generator()) == [0, 1]


def test_a_step_without_noise_is_refused():
    with pytest.raises(ValueError, match="std: got 0.0, expected > 0"):
        adjoint_matching_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.0, torch.zeros(1, 2))


# The trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(options, world_files, tmp_path_factory):
    (world_files / "light.py").write_text(
        "def light(images, prompts):\n    return images.flatten(1).mean(1)\n\n\nlight.differentiable = True\n"
    )
    kept = {k: v for k, v in options.items() if k in Config.__dataclass_fields__}
    changes = dict(reward=f"{world_files / 'light.py'}:light", num_steps=4, group_size=1, outlier_limit=0.0)
    cfg = Config(**{**kept, **changes, "run_dir": str(tmp_path_factory.mktemp("adjoint") / "run")})
    with open_training(cfg, make_plan(cfg, "adjoint_matching"), cfg.prompts_per_step) as loop:
        yield loop


def trainer_of(loop, **changes) -> AdjointMatching:
    cfg = replace(loop.cfg, **changes)
    return AdjointMatching(TrainingLoop(cfg, loop.plan, loop.accelerator, loop.state, loop.run))


def drawn(trainer):
    cfg = trainer.cfg
    groups = iteration_groups(trainer.loop.plan.prompts, 0, cfg.prompts_per_step, cfg.group_size, cfg.seed)
    [some] = cut(groups, 100)
    return some, trainer.sample(some)


def test_the_first_adjoint_is_the_gradient_of_the_reward_along_the_whole_trajectory(loop):
    trainer = trainer_of(loop, reward_scale=3.0)
    some, trajectory = drawn(trainer)
    states, found = trainer.adjoints(some, trajectory, UpdateLog())
    x, steps = states[0].clone().requires_grad_(), {}
    state = x
    for k in range(4):  # with the noise that was drawn, held fixed
        prediction = trainer.generator.predict(state, k, some.prompts, some.seeds)
        mean = trainer.transition(trainer.schedule, k, state, prediction)[0].mean
        following = states[k + 1] if k < 3 else trajectory.final
        steps[k] = (following - mean).detach()
        state = mean + steps[k]
    reward = trainer.generator.decode(state, some.prompts).flatten(1).mean(1).sum()
    (expected,) = torch.autograd.grad(-3 * reward, x)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-6)
    assert steps[3].abs().max() < 1e-4  # the last step has no noise


def test_adjoints_belong_to_the_base_and_the_loss_to_the_policy(loop):
    trainer = trainer_of(loop)
    some, trajectory = drawn(trainer)
    states, found = trainer.adjoints(some, trajectory, UpdateLog())
    prediction = trainer.generator.predict(states[1], 1, some.prompts, some.seeds).detach()
    loss = trainer.loss(states, found, 1, prediction, prediction)
    sigma, sigma_next = trainer.schedule.step(1)
    expected = trainer.stds[1] ** 2 * found[1].square().flatten(1).sum(1) / (sigma - sigma_next)
    torch.testing.assert_close(loss, expected)
    fresh = {k: v.clone() for k, v in loop.state.policy.tensors().items()}
    for p in loop.state.policy.trained.values():
        p.data += 0.05
    again = trainer.adjoints(some, trajectory, UpdateLog())[1]
    loop.state.policy.load(fresh)
    torch.testing.assert_close(again[0], found[0])
    following = trainer_of(loop, pairing="next").loss(states, found, 1, prediction, prediction)
    sizes = [found[k].square().flatten(1).sum(1) for k in (1, 2)]
    torch.testing.assert_close(following, expected / sizes[0] * sizes[1])
    assert trainer.noisy == [0, 1, 2] and trainer.stds[3] == 0
    limit = float(expected.min()) / trainer.cfg.reward_scale**2 / 2
    assert (trainer_of(loop, outlier_limit=limit).loss(states, found, 1, prediction, prediction) < expected).all()


def test_smoothing_averages_gradients_of_copies(loop):
    trainer, rough = trainer_of(loop, smoothing=3, smoothing_noise=0.5), trainer_of(loop)
    some, trajectory = drawn(rough)
    smooth, plain = (t.terminal(some, trajectory.final, UpdateLog()) for t in (trainer, rough))
    assert smooth.shape == plain.shape and (smooth - plain).norm() > 0.01 * plain.norm()
    still = trainer_of(loop, smoothing=3, smoothing_noise=0.0).terminal(some, trajectory.final, UpdateLog())
    torch.testing.assert_close(still, plain)
    assert isinstance(rough.transition, MemorylessFlow)


def test_a_diffusion_whose_last_step_has_noise_is_trained_too(loop, tmp_path):
    changes = dict(model="shapes-diffusion", num_steps=4, steps=1, run_dir=str(tmp_path / "run"), judges="")
    cfg = replace(loop.cfg, **changes)
    with open_training(cfg, make_plan(cfg, "adjoint_matching"), cfg.prompts_per_step) as other:
        trainer = AdjointMatching(other)
        some, trajectory = drawn(trainer)
        states, found = trainer.adjoints(some, trajectory, UpdateLog())
        assert sorted(states) == [0, 1, 2, 3] and sorted(found) == [0, 1, 2, 3, 4]
        groups = iteration_groups(other.plan.prompts, 0, cfg.prompts_per_step, cfg.group_size, cfg.seed)
        values = trainer.update(0, groups)[0]
        assert values["skipped_updates"] == 0 and values["matching_loss"] > 0


def test_updates_raise_the_reward(loop):
    trainer = trainer_of(loop, learning_rate=3e-3, reward_scale=30.0)
    groups = iteration_groups(trainer.loop.plan.prompts, 0, 2, 1, 0)
    fresh, rewards = {k: v.clone() for k, v in loop.state.policy.tensors().items()}, []
    loop.state.learning_rate, known = (lambda step: 3e-3), loop.state.learning_rate
    for step in range(8):
        rewards.append(trainer.update(step, groups)[0]["reward_mean"])
    loop.state.learning_rate = known
    loop.state.policy.load(fresh)
    assert rewards[-1] > rewards[0]


def test_every_trainer_takes_rewards_without_gradient_or_differentiates_them():
    assert {*OTHERS, "adjoint_matching", "reward_backprop"} == set(TRAINERS)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(reward_scale=0), "reward_scale: got 0"),
        (dict(num_steps=2), "num_steps: got 2, expected >= 3"),
        (dict(trained_share=0.6), "trained_share: got 0.6"),
        (dict(outlier_limit=-1), "outlier_limit: got -1"),
        (dict(train_guidance=0), "train_guidance: got 0"),
        (dict(reward="jpeg_compressibility"), "can be used by ddpo, flow_grpo, tree_grpo, vgpo"),
        (dict(model="shapes-consistency"), "model: got 'shapes-consistency', a consistency model"),
    ],
)
def test_wrong_values_end_with_one_line_before_loading(changes, message, monkeypatch, capsys):
    assert message in refused(adjoint_matching, [f"--{k}={v}" for k, v in changes.items()], monkeypatch, capsys)


def test_adjoints_and_states_that_carry_gradient_pass_none_on():
    start, terminal = torch.ones(2, 3, requires_grad=True), torch.full((2, 3), 2.0, requires_grad=True)
    adjoints = lean_adjoints({0: start}, terminal, lambda k, x: x.square())
    assert adjoints[0].tolist() == [[4.0] * 3] * 2 and adjoints[1].tolist() == [[2.0] * 3] * 2
    assert not any(a.requires_grad for a in adjoints.values())
    weights = torch.ones(2, 3, requires_grad=True)
    states = {0: torch.ones(2, 3)}
    through = lean_adjoints(states, terminal, lambda k, x: weights * x)
    assert not any(a.requires_grad for a in through.values())
    assert not states[0].requires_grad


def test_as_many_of_the_first_steps_as_their_share_and_one_at_least():
    generator = torch.Generator().manual_seed(0)
    for count, first in ((4, 1), (6, 1), (8, 2), (10, 2), (20, 4)):  # a quarter of the rest, rounded; 6 - 2 gives 1
        last = list(range(count - max(1, round(0.25 * count)), count))
        steps = matched_steps(list(range(count)), generator)
        assert steps[-len(last) :] == last and len(steps) == first + len(last)


def test_the_memoryless_spread_is_the_steps_and_none_at_the_end():
    schedule = Schedule("flow", torch.tensor([1000.0, 600.0]), sigmas=torch.tensor([1.0, 0.6, 0.0]))
    x = torch.zeros(1, 2)
    for step in range(2):
        gaussian, _ = MemorylessFlow()(schedule, step, x, x)
        assert MemorylessFlow().std(schedule, step) == pytest.approx(float(gaussian.std))
    assert MemorylessFlow().std(schedule, 0) == pytest.approx(math.sqrt(0.4 * 2 * 1.4 / 0.4))
    assert MemorylessFlow().std(schedule, 1) == 0
