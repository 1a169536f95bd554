"""Rollouts of a toy generator whose velocity is that of Gaussian data, exactly."""

import dataclasses
import math

import pytest
import torch

from visalign.sampling.rollout import recompute, rollout, step_log_prob
from visalign.sampling.seeds import derived_seed, step_noise
from visalign.transitions import (
    CPS,
    DDIM,
    DanceSDE,
    FlowODE,
    FlowSDE,
    Schedule,
    dpm_solver_2m,
    ode_of,
    velocity_to_denoised,
)

SHAPE = (2, 4, 4)
SPREAD = 0.5  # of the data; their mean is the length of the prompt


class ToyGenerator:
    """The interface of a Generator over an exact model; records its calls and its model calls."""

    def __init__(self, num_steps=10, kind="flow", scale=1.0):
        levels = torch.linspace(1, 0, num_steps + 1)
        timesteps = 1000 * levels[:-1]
        if kind == "flow":
            self.schedule = Schedule("flow", timesteps, levels)
        else:
            self.schedule = Schedule(kind, timesteps, None, 1 - 0.99 * levels, prediction_type="epsilon")
        self.scale = torch.tensor(scale, requires_grad=True)
        self.calls, self.evaluated = [], []

    def predict(self, latents, step_index, prompts):
        self.evaluated.append(step_index)
        level = self.schedule.levels[step_index]
        mean = torch.tensor([float(len(prompt)) for prompt in prompts]).view(-1, 1, 1, 1)
        if self.schedule.kind != "flow":
            return self.scale * (latents - math.sqrt(level) * mean)
        variance = (1 - level) ** 2 * SPREAD**2 + level**2
        return self.scale * ((level - (1 - level) * SPREAD**2) / variance * (latents - (1 - level) * mean) - mean)

    def noise(self, prompts, seeds):
        return torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def decode(self, latents, prompts, seeds=None):
        self.calls.append({"decode_only": True, "grad": torch.is_grad_enabled()})
        return latents[:, :1].expand(-1, 3, -1, -1).sigmoid()

    def denoise(
        self, prompts, seeds, step_fn, *, latents=None, start=0, stop=None, decode=False, grad_steps=None, color=None
    ):
        self.calls.append({"start": start, "stop": stop, "decode": decode, "grad": torch.is_grad_enabled()})
        self.colors = color
        latents = self.noise(prompts, seeds) if latents is None else latents
        for i in range(start, self.schedule.num_steps if stop is None else stop):
            prediction = self.predict(latents, i, prompts)
            assert prediction.requires_grad == torch.is_grad_enabled()
            latents = step_fn(i, latents, prediction)
        return (latents, latents[:, :1].expand(-1, 3, -1, -1).sigmoid()) if decode else latents


PROMPTS, SEEDS = ["a", "bb", "ccc"], [11, 12, 13]


def test_trajectory_holds_what_its_docstring_says():
    generator = ToyGenerator()
    trajectory = rollout(generator, PROMPTS, SEEDS, FlowSDE(), sde_steps=[2, 3], store_means=True)
    assert trajectory.prompts == PROMPTS and trajectory.seeds == SEEDS and len(trajectory) == 3
    assert trajectory.steps == [2, 3]
    for record in (trajectory.latents, trajectory.next_latents, trajectory.means):
        assert sorted(record) == [2, 3]
        assert all(values.shape == (3, *SHAPE) and values.dtype == torch.float32 for values in record.values())
    assert all(values.shape == (3,) for values in trajectory.log_probs.values())
    assert trajectory.stds == {i: FlowSDE().std(generator.schedule, i) for i in (2, 3)}
    assert torch.equal(trajectory.next_latents[2], trajectory.latents[3])  # w steps are w + 1 states
    assert trajectory.final.shape == (3, *SHAPE) and trajectory.images.shape == (3, 3, 4, 4)
    assert len(generator.calls) == 1 and generator.evaluated == list(range(10))
    tensors = [trajectory.final, trajectory.images, *trajectory.log_probs.values(), *trajectory.means.values()]
    assert not any(values.requires_grad for values in tensors)


def test_means_and_images_are_kept_only_where_asked():
    trajectory = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[2], decode=False)
    assert trajectory.means == {} and trajectory.images is None


@pytest.mark.parametrize(
    ("transition", "steps"), [(FlowSDE(), range(10)), (DanceSDE(), range(10)), (CPS(), range(9)), (FlowODE(), ())]
)
def test_every_step_with_a_density_is_recorded_by_default(transition, steps):
    assert rollout(ToyGenerator(), PROMPTS, SEEDS, transition).steps == list(steps)


def test_deterministic_steps_are_the_ode_and_draw_nothing():
    generator = ToyGenerator()
    state = torch.random.get_rng_state()
    final = rollout(generator, PROMPTS, SEEDS, FlowSDE(), sde_steps=[]).final
    assert torch.equal(torch.random.get_rng_state(), state)
    x = generator.noise(PROMPTS, SEEDS)
    for i in range(10):
        x = ode_of(generator.schedule)(generator.schedule, i, x, generator.predict(x, i, PROMPTS).detach())[0].mean
    assert torch.equal(final, x)
    assert torch.equal(final, rollout(generator, PROMPTS, SEEDS, FlowODE()).final)
    assert torch.equal(final, rollout(generator, PROMPTS, SEEDS, FlowSDE(), sde_steps=[], noise_seeds=[1, 2, 3]).final)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_global_random_state_is_neither_read_nor_moved_by_stochastic_steps():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE()).final, first.final)


def test_noise_seeds_change_nothing_before_the_window_and_everything_after():
    runs = [
        rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[4], noise_seeds=noise_seeds)
        for noise_seeds in ([1, 2, 3], [1, 5, 6])
    ]
    assert torch.equal(runs[0].latents[4], runs[1].latents[4])
    assert torch.equal(runs[0].final[0], runs[1].final[0])
    assert not torch.isclose(runs[0].final[1:], runs[1].final[1:]).all(dim=(1, 2, 3)).any()


def test_runs_agree_bit_for_bit_where_their_noise_in_the_window_does(monkeypatch):
    """Different seeds, but the same noise put in their place in the window: outside it the seeds must not count."""
    expected = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[3, 4])
    monkeypatch.setattr("visalign.sampling.rollout.step_noise", lambda _seeds, i, like: step_noise(SEEDS, i, like))
    again = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[3, 4], noise_seeds=[7, 8, 9])
    assert torch.equal(again.final, expected.final) and torch.equal(again.images, expected.images)


def test_a_sample_is_the_same_alone_and_in_any_batch_and_order():
    whole = rollout(ToyGenerator(), PROMPTS, SEEDS, CPS())
    for order in ([1], [2, 0], [2, 1, 0]):
        part = rollout(ToyGenerator(), [PROMPTS[i] for i in order], [SEEDS[i] for i in order], CPS())
        assert torch.equal(part.final, whole.final[order])
        assert torch.equal(part.log_probs[5], whole.log_probs[5][order])


def test_noise_of_a_step_does_not_depend_on_which_other_steps_have_any():
    whole = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), store_means=True)
    part = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[6], store_means=True)
    noises = [(run.next_latents[6] - run.means[6]) / run.stds[6] for run in (whole, part)]
    torch.testing.assert_close(*noises, atol=1e-5, rtol=0)


def test_group_members_share_their_state_up_to_the_branch_and_differ_after():
    trajectory = rollout(ToyGenerator(), ["a"] * 4, [5] * 4, FlowSDE(), sde_steps=[0, 3], noise_seeds=[1, 1, 2, 3])
    assert all(torch.equal(state, trajectory.latents[0][0]) for state in trajectory.latents[0])
    assert torch.equal(trajectory.final[0], trajectory.final[1])
    assert not torch.allclose(trajectory.latents[3][1], trajectory.latents[3][2])


def test_step_noise_is_standard_normal_and_differs_by_seed_and_step():
    like = torch.empty(2, 20_000)
    noise = step_noise([0, 1], 0, like)
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    rows = torch.stack([noise[0], noise[1], step_noise([0, 1], 1, like)[0], step_noise([1, 0], 1, like)[0]])
    rows = torch.cat([rows, torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))])  # the initial noise
    correlation = torch.corrcoef(rows) - torch.eye(5)
    assert correlation.abs().max() < 0.04
    assert step_noise([0], 0, like[:1].double()).dtype == torch.float64
    assert derived_seed(1, 23) != derived_seed(12, 3)
    with pytest.raises(ValueError, match="seeds: got 1, expected 2"):
        step_noise([0], 0, like)


@pytest.mark.parametrize("transition", [FlowSDE(), DanceSDE(), CPS()])
def test_recomputed_log_prob_is_that_of_the_rollout_for_the_same_weights(transition):
    generator = ToyGenerator()
    trajectory = rollout(generator, PROMPTS, SEEDS, transition, store_means=True)
    for step in trajectory.steps:
        prediction = generator.predict(trajectory.latents[step], step, PROMPTS)
        log_prob = step_log_prob(trajectory, step, prediction, transition)
        torch.testing.assert_close(log_prob.detach(), trajectory.log_probs[step], atol=1e-6, rtol=0)
        gaussian = recompute(trajectory, step, prediction, transition, generator.schedule)
        assert torch.equal(gaussian.mean.detach(), trajectory.means[step])
        (gradient,) = torch.autograd.grad(log_prob.sum(), generator.scale)
        assert gradient != 0
    with pytest.raises(ValueError, match="step: got 99, expected one of the recorded steps"):
        recompute(trajectory, 99, prediction, transition)


def test_log_prob_changes_with_the_weights():
    trajectory = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE())
    prediction = ToyGenerator(scale=1.1).predict(trajectory.latents[4], 4, PROMPTS)
    change = step_log_prob(trajectory, 4, prediction, FlowSDE()) - trajectory.log_probs[4]
    assert change.abs().min() > 1e-4


def error_of(steps, solver, **options):
    """Distance to the exact end of the ODE from step 1's state of pure noise: the mean plus noise times the spread."""
    generator = ToyGenerator(steps)
    final = rollout(generator, PROMPTS, SEEDS, FlowODE(), solver=solver, **options).final
    mean = torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1, 1)
    return (final - mean - SPREAD * generator.noise(PROMPTS, SEEDS)).abs().max().item()


def test_the_second_order_solver_is_closer_to_the_exact_end():
    assert error_of(20, "dpm2m") < 0.5 * error_of(20, "ode")
    assert error_of(40, "dpm2m") < 0.5 * error_of(20, "dpm2m")


def test_the_solver_starts_after_the_window_and_leaves_it_alone():
    runs = [
        rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[2, 3], solver=solver)
        for solver in ("ode", "dpm2m")
    ]
    for step in (2, 3):
        assert torch.equal(runs[0].latents[step], runs[1].latents[step])
        assert torch.equal(runs[0].log_probs[step], runs[1].log_probs[step])
    assert not torch.allclose(runs[0].final, runs[1].final, atol=1e-3)


def test_the_first_solver_step_is_of_second_order_with_the_windows_last_estimate():
    generator = ToyGenerator()
    trajectory = rollout(generator, PROMPTS, SEEDS, FlowSDE(), sde_steps=[2], solver="dpm2m", store_denoised=True)
    levels, before = generator.schedule.levels, trajectory.denoised
    x = trajectory.next_latents[2]
    x = dpm_solver_2m(x, before[3], before[2], levels[2], levels[3], levels[4])
    again = generator.predict(x, 4, PROMPTS).detach()
    torch.testing.assert_close(velocity_to_denoised(x, again, levels[4]), before[4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["ode", "dpm2m"])
def test_post_steps_saves_model_calls_after_the_window(solver):
    generator = ToyGenerator(25)
    trajectory = rollout(generator, PROMPTS, SEEDS, FlowSDE(), sde_steps=[0, 1, 2, 3], solver=solver, post_steps=8)
    assert generator.evaluated[:4] == [0, 1, 2, 3] and len(generator.evaluated) == 4 + 8
    assert generator.evaluated[4] == 4 and generator.evaluated == sorted(set(generator.evaluated))
    whole = rollout(ToyGenerator(25), PROMPTS, SEEDS, FlowSDE(), sde_steps=[0, 1, 2, 3], solver=solver)
    assert torch.equal(trajectory.next_latents[3], whole.next_latents[3])
    assert trajectory.images.shape == (3, 3, 4, 4)
    assert (trajectory.final - whole.final).abs().max() < 0.25
    every = rollout(ToyGenerator(25), PROMPTS, SEEDS, FlowSDE(), sde_steps=[0, 1, 2, 3], solver=solver, post_steps=21)
    assert torch.equal(every.final, whole.final)


def test_diffusion_schedules_roll_out_with_ddim_in_and_outside_the_window():
    generator = ToyGenerator(kind="diffusion")
    trajectory = rollout(generator, PROMPTS, SEEDS, DDIM(), sde_steps=[1, 2])
    assert trajectory.steps == [1, 2]
    assert rollout(generator, PROMPTS, SEEDS, DDIM()).steps == list(range(9))  # the last level is 1
    with pytest.raises(ValueError, match="solver: got 'dpm2m' on a diffusion schedule"):
        rollout(generator, PROMPTS, SEEDS, DDIM(), solver="dpm2m")
    with pytest.raises(ValueError, match="post_steps: got 2 on a diffusion schedule"):
        rollout(generator, PROMPTS, SEEDS, DDIM(), sde_steps=[1], post_steps=2)


@pytest.mark.parametrize("post_steps", [None, 3])
def test_grad_mode_gives_the_same_without_a_graph(post_steps):
    generator = ToyGenerator()
    options = {"sde_steps": [1, 2], "store_means": True, "post_steps": post_steps}
    plain = rollout(generator, PROMPTS, SEEDS, FlowSDE(), **options)
    assert not any(call["grad"] for call in generator.calls)
    generator.calls.clear()
    traced = rollout(generator, PROMPTS, SEEDS, FlowSDE(), grad_mode=True, **options)
    assert [call["grad"] for call in generator.calls] == [True] * (len(generator.calls) - 1) + [False]
    assert torch.equal(traced.final, plain.final) and torch.equal(traced.images, plain.images)
    for record in (traced.latents, traced.next_latents, traced.log_probs, traced.means):
        assert not any(values.requires_grad for values in record.values())


def test_take_gives_a_minibatch_in_the_order_asked():
    whole = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[2], store_means=True)
    part = whole.take([2, 0])
    assert part.prompts == ["ccc", "a"] and part.seeds == [13, 11] and part.steps == [2] and len(part) == 2
    assert part.whole is whole and part.rows.tolist() == [2, 0]
    alone = rollout(ToyGenerator(), part.prompts, part.seeds, FlowSDE(), sde_steps=[2], store_means=True)
    for field in dataclasses.fields(part):
        taken, expected = getattr(part, field.name), getattr(alone, field.name)
        if isinstance(taken, torch.Tensor) and field.name != "rows":
            assert torch.equal(taken, expected)
        elif isinstance(taken, dict) and field.name != "stds":
            assert taken.keys() == expected.keys() and all(torch.equal(taken[i], expected[i]) for i in taken)


def test_inputs_reach_the_pipeline_call():
    generator = ToyGenerator()
    rollout(generator, PROMPTS, SEEDS, FlowSDE(), color="red")
    assert generator.colors == "red"


@pytest.mark.parametrize(
    ("transition", "options", "message"),
    [
        (FlowSDE(), {"sde_steps": [10]}, "sde_steps: got 10, expected within 0 .. 9"),
        (CPS(), {"sde_steps": [9]}, r"sde_steps: got step 9, where CPS\(eta=0.8\) has std 0"),
        (FlowODE(), {"sde_steps": [1]}, "sde_steps: got step 1, where FlowODE"),
        (FlowSDE(), {"noise_seeds": [1]}, "noise_seeds: got 1, expected 3, one per prompt"),
        (FlowSDE(), {"solver": "heun"}, "solver: got 'heun'"),
        (FlowSDE(), {"post_steps": 3}, "sde_steps: got None, expected at least one step, with post_steps"),
        (FlowSDE(), {"sde_steps": [7], "post_steps": 3}, r"post_steps: got 3, expected 1 .. 2, the steps after"),
    ],
)
def test_bad_arguments_are_rejected(transition, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(ToyGenerator(), PROMPTS, SEEDS, transition, **options)


def test_a_row_of_step_noise_belongs_to_its_own_seed():
    together = step_noise([1, 2, 3], 4, torch.zeros(3, 5))
    for row, seed in enumerate([1, 2, 3]):
        torch.testing.assert_close(together[row : row + 1], step_noise([seed], 4, torch.zeros(1, 5)), rtol=0, atol=0)
