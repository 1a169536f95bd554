"""Rollover budget forcing: its budget, moves and results; and a flow's path seen as a variance-preserving one."""

import math

import numpy as np
import pytest
import torch
from search_toys import MixtureModel, flow_schedule, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.best_of_n import best_of_n
from visalign.search.noise.rollover import Place, Rollover, Walk, _move, rbf, step_quota
from visalign.transitions import FlowDDIM, FlowODE, FlowSDE, noisy_of, ode_of
from visalign.transitions.interpolant import (
    VPSDE,
    flow_time,
    flow_time_rate,
    path_denoised,
    path_score,
    vp_path,
    vp_rates,
    vp_scale,
    vp_scale_rate,
    vp_sde_step,
    vp_time,
    vp_time_grid,
    vp_velocity,
)
from visalign.worlds import resolve_model

RHOS = (0.02, 0.1, 0.4, 0.7, 0.95, 1.0)


def mixture_denoised(x, alpha, sigma):
    """E[x0 | x] of the toys' data, at any level."""
    variance = alpha**2 * 0.3**2 + sigma**2
    centres = torch.tensor([-2.0, 2.0], dtype=x.dtype)
    weights = torch.softmax(-0.5 * (x[..., None] - alpha * centres) ** 2 / variance, -1)
    return (weights * (centres + alpha * 0.09 / variance * (x[..., None] - alpha * centres))).sum(-1)


def flow_velocity(x, t):
    """Of the mixture, alpha = 1 - t."""
    denoised = mixture_denoised(x, 1 - t, t)
    return (x - denoised) / t


def derivative(function, at, h=1e-5):
    return (function(at + h) - function(at - h)) / (2 * h)


@pytest.mark.parametrize("rho", RHOS[:-1])
def test_the_conversion_has_its_rates_and_its_scale(rho):
    alpha, sigma = vp_path(rho)
    assert alpha**2 + sigma**2 == pytest.approx(1) and vp_scale(rho) == pytest.approx(alpha + sigma, abs=1e-15)
    t = flow_time(rho)
    assert vp_scale(rho) == pytest.approx(sigma / t, rel=1e-12) and (1 - t) / t == pytest.approx(alpha / sigma)
    assert [vp_time(alpha, sigma), vp_time(1 - t, t)] == pytest.approx([rho, rho], abs=1e-12)
    assert vp_rates(rho)[0] == pytest.approx(derivative(lambda r: vp_path(r)[0], rho), rel=1e-6)
    assert vp_rates(rho)[1] == pytest.approx(derivative(lambda r: vp_path(r)[1], rho), rel=1e-6)
    assert flow_time_rate(rho) == pytest.approx(derivative(flow_time, rho), rel=1e-6)
    assert vp_scale_rate(rho) == pytest.approx(derivative(vp_scale, rho), rel=1e-5)
    written = (t * vp_rates(rho)[1] - sigma * flow_time_rate(rho)) / t**2  # as in the paper
    assert vp_scale_rate(rho) == pytest.approx(written, rel=1e-9)


@pytest.mark.parametrize("rho", RHOS)
def test_estimate_and_score_from_the_converted_velocity_are_those_of_the_flow(rho):
    torch.manual_seed(0)
    x0, noise = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    t, path, rates = flow_time(rho), vp_path(rho), vp_rates(rho)
    x = (1 - t) * x0 + t * noise
    latents = vp_scale(rho) * x
    torch.testing.assert_close(latents, path[0] * x0 + path[1] * noise, atol=1e-12, rtol=0)
    velocity = vp_velocity(latents, noise - x0, rho)
    torch.testing.assert_close(velocity, rates[0] * x0 + rates[1] * noise, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(path_denoised(latents, velocity, path, rates), x0, atol=1e-9, rtol=0)
    torch.testing.assert_close(path_score(latents, velocity, path, rates), -noise / path[1], atol=1e-9, rtol=0)
    # The flow's own path is one case of the general rows.
    torch.testing.assert_close(path_denoised(x, noise - x0, (1 - t, t), (-1, 1)), x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(path_score(x, noise - x0, (1 - t, t), (-1, 1)), -noise / t, atol=1e-12, rtol=1e-12)


def test_the_ode_ends_at_the_same_place_on_either_path():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    ends = []
    for steps in (50, 400):
        rhos = [1 - 0.98 * i / steps for i in range(steps + 1)]
        one = x / vp_scale(1.0)
        other = x.clone()
        for a, b in zip(rhos, rhos[1:]):
            velocity = flow_velocity(other / vp_scale(a), flow_time(a))
            other = vp_sde_step(other, vp_velocity(other, velocity, a), 0 * x, a, b, strength=0.0).mean
            one = one + (flow_time(b) - flow_time(a)) * flow_velocity(one, flow_time(a))
        ends.append(float((one - other / vp_scale(rhos[-1])).abs().max()))
    assert ends[1] < 0.05 and ends[1] < 0.3 * ends[0]


def to_data(x):
    """W1 of samples to the mixture, by its quantiles."""
    shares = (torch.arange(len(x) // 2, dtype=torch.float64) + 0.5) / (len(x) // 2)
    mode = 0.3 * torch.distributions.Normal(0.0, 1.0).icdf(shares)
    return float((x[:, 0].sort().values - torch.cat([mode - 2, mode + 2])).abs().mean())


def drawn(count, generator):
    return torch.randn(count, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("steps, most", [(28, 0.06), (100, 0.04), (500, 0.04)])
@pytest.mark.parametrize("transition", [FlowDDIM(), FlowSDE(), VPSDE()], ids=lambda t: t.name)
def test_noisy_kernels_in_uniform_steps_end_at_the_data(transition, steps, most):
    generator, schedule = torch.Generator().manual_seed(steps), flow_schedule([1 - i / steps for i in range(steps + 1)])
    model, x = MixtureModel(schedule), drawn(20_000, generator)
    for i in range(steps):
        gaussian, _ = transition(schedule, i, x, model.predict(x, i, []))
        x = gaussian.sample(drawn(20_000, generator))
    assert to_data(x) < most


def test_euler_maruyama_of_the_converted_path_ends_at_the_data_in_uniform_steps_and_slowly_on_its_own_grid():
    def ended(grid):
        generator = torch.Generator().manual_seed(1)
        x = drawn(20_000, generator)
        for a, b in zip(grid, grid[1:]):
            path, rates = vp_path(a), vp_rates(a)
            velocity = vp_velocity(x, flow_velocity(x / vp_scale(a), flow_time(a)), a)
            gaussian = vp_sde_step(x, velocity, path_score(x, velocity, path, rates), a, b)
            x = gaussian.sample(drawn(20_000, generator))
        return to_data(x / vp_scale(grid[-1]))

    assert ended([1 - 0.998 * i / 28 for i in range(29)]) < 0.06
    assert ended([1 - 0.998 * i / 100 for i in range(101)]) < 0.06
    coarse, fine = ([0.002 + 0.998 * rho for rho in vp_time_grid(steps)] for steps in (28, 200))
    assert ended(fine) < 0.12 < 0.25 < ended(coarse)


def test_the_vp_sde_is_of_ddims_family_with_the_spread_of_the_papers_step():
    grid = vp_time_grid(40)
    levels = [flow_time(rho) for rho in grid]
    flow = flow_schedule(levels)
    model = MixtureModel(flow)
    x = torch.randn(6, 1, dtype=torch.float64)
    for i in (3, 15, 30):
        gaussian, denoised = VPSDE()(flow, i, x, model.predict(x, i, []))
        scale = vp_scale(grid[i + 1])
        spread = 3 * grid[i] ** 2 * math.sqrt(grid[i] - grid[i + 1])
        assert float(gaussian.std[0]) * scale == pytest.approx(spread, rel=1e-9) == VPSDE().std(flow, i) * scale
        torch.testing.assert_close(denoised, model.denoised(x, i))
    # The same step, of a short step: Euler-Maruyama's mean up to the square of its length.
    for gap in (1e-2, 1e-3):
        flow = flow_schedule([flow_time(0.6), flow_time(0.6 - gap), 0.0])
        mean = VPSDE()(flow, 0, x, flow_velocity(x, flow.levels[0]))[0].mean * vp_scale(0.6 - gap)
        latents = vp_scale(0.6) * x
        velocity = vp_velocity(latents, flow_velocity(x, flow.levels[0]), 0.6)
        score = path_score(latents, velocity, vp_path(0.6), vp_rates(0.6))
        step = vp_sde_step(latents, velocity, score, 0.6, 0.6 - gap)
        torch.testing.assert_close(mean, step.mean, atol=40 * gap**2, rtol=0)
    for schedule in (flow_schedule(), vp_schedule()):  # long steps: no more noise than the path has, none at strength 0
        for i in range(schedule.num_steps):
            most = toy_chain(schedule).stds[i]
            assert 0 <= VPSDE().std(schedule, i) <= most + 1e-12 and VPSDE(strength=0).std(schedule, i) == 0


def test_quota_of_the_defaults_is_22():
    assert step_quota(500, 2, 25, 10) == 22 and step_quota(60, 2, 25, 10) == 1


@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule()], ids=lambda s: s.kind)
def test_rounds_are_paid_for_as_said_and_records_never_fall(schedule):
    chain = toy_chain(schedule, max_nfe=203, seed=4)
    records, steps, last = [], [], None
    for last in rbf(chain, chains=3, initial=10):
        records.append([walk.record for walk in last.state.walks])
        steps.append([walk.place.step for walk in last.state.walks])
    assert (np.diff(records, axis=0) >= 0).all() and (np.diff(steps, axis=0) >= 0).all()
    assert chain.ledger.nfe == 3 * 10 + 3 * last.state.rounds == 201  # of 203, 3 a round
    assert last.state.rollovers + last.state.forced == 3 * 4 and steps[-1] == [4, 4, 4]
    assert last.best.reward <= max(records[-1])


@pytest.mark.parametrize("batch_size", [1, 10**9])
def test_any_budget_holds_and_gives_a_finished_sample(batch_size):
    for budget in (6, 11, 12, 20, 31, 47, 90):
        chain = toy_chain(flow_schedule(), max_nfe=budget, seed=budget, batch_size=batch_size)
        events = list(rbf(chain))
        assert chain.ledger.nfe <= budget and events[-1].best is not None and chain.ledger.left <= 6
        other = toy_chain(flow_schedule(), max_nfe=budget, seed=budget, batch_size=3)
        assert list(rbf(other))[-1].best.reward == pytest.approx(events[-1].best.reward, abs=1e-9)


def test_one_chain_with_nothing_to_spare_is_the_ode_of_the_first_noise():
    chain = toy_chain(max_nfe=6)
    best = list(rbf(chain))[-1].best
    plain = list(best_of_n(toy_chain(max_nfe=6, transition=ode_of(vp_schedule()))))[-1].best
    assert best.reward == plain.reward and chain.ledger.nfe == 6


def test_one_step_and_two_step_chains_are_searched_too():
    one = toy_chain(flow_schedule((0.9, 0)), max_nfe=12, transition=OneStep())
    assert list(rbf(one, chains=1, initial=12))[-1].best is not None and one.ledger.nfe == 12
    two = toy_chain(flow_schedule((0.9, 0.5, 0)), max_nfe=30)
    last = list(rbf(two, chains=2, initial=5))[-1]
    assert two.ledger.nfe == 30 and last.state.rounds == 10 and last.state.rollovers == last.state.forced == 0


class OneStep(FlowODE):
    """Claims a noise that its only step would draw."""

    def std(self, schedule, step_index):
        return 0.1


def test_a_step_ends_at_a_record_or_with_its_quota_and_what_is_left_rolls_over():
    def place(step):
        return Place(step, torch.zeros(1, 1), torch.zeros(1, 1))

    found = Rollover(quota=3)
    walk = Walk(place(0), record=1.0, quota=3)
    log = []
    for reward in (0.5, 2.0, 0.1, 0.2, 1.9, 1.8, 0.0, 0.3, 0.4, 3.0, 5.0):
        if reward > walk.best_reward:
            walk.best, walk.best_reward = place(walk.place.step + 1), reward
        _move(walk, reward, 5, found)
        log.append((walk.place.step, walk.quota, walk.spent, walk.record))
    assert log == [
        (0, 3, 2, 1.0),
        (1, 4, 1, 2.0),  # the second of three: one left, and three more
        (1, 4, 2, 2.0),
        (1, 4, 3, 2.0),
        (1, 4, 4, 2.0),
        (2, 3, 1, 2.0),  # forced after four
        (2, 3, 2, 2.0),
        (2, 3, 3, 2.0),
        (3, 3, 1, 2.0),  # forced after three
        (3, 3, 2, 3.0),  # the last noisy step is never left
        (3, 3, 3, 5.0),
    ]
    assert (found.rollovers, found.forced) == (1, 2)


def test_rollover_finds_more_than_as_many_independent_samples():
    def found(method, seed):
        chain = toy_chain(flow_schedule(), max_nfe=120, seed=seed, reward=hill, batch_size=16)
        return list(method(chain))[-1].best.reward

    def hill(images, prompts):
        return -(images.flatten(1).sum(1) - 2.4).abs()

    gains = [found(rbf, seed) - found(best_of_n, seed) for seed in range(20)]
    assert np.mean(gains) > 0


def test_what_cannot_be_searched_is_refused_before_it_costs():
    for message, options in {"chains: got 0": dict(chains=0), "initial: got 0": dict(initial=0)}.items():
        chain = toy_chain(max_nfe=60)
        with pytest.raises(ValueError, match=message):
            next(rbf(chain, **options))
        assert chain.ledger.nfe == 0
    with pytest.raises(ValueError, match="budget: got none"):
        next(rbf(toy_chain()))
    with pytest.raises(ValueError, match="steps are deterministic"):
        next(rbf(toy_chain(transition=ode_of(vp_schedule()), max_nfe=60)))


@pytest.mark.parametrize("model", ["shapes-flow", "shapes-diffusion", "shapes-consistency"])
def test_a_shipped_model_is_searched(model):
    def brightness(images, prompts):
        return images.flatten(1).mean(1)

    generator = Generator.from_pretrained(resolve_model(model), num_steps=3)
    generator.noise(["a red circle"], [0])
    chain = Chain(generator, "a red circle", brightness, noisy_of(generator.schedule), ledger=Ledger(max_nfe=20))
    events = list(rbf(chain, chains=2, initial=4))
    bests = [event.best.reward for event in events if event.best]
    assert bests == sorted(bests) and chain.ledger.nfe == 20 and events[-1].best.image.shape == (1, 3, 64, 64)
