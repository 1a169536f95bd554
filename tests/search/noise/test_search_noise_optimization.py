"""Noise optimisation: the regularisers' least values, gradients through the chain, what iterations cost and gain."""

import math

import pytest
import torch
from search_toys import MixtureModel, flow_schedule, half, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.noise.noise_optimization import (
    deviation_loss,
    dno,
    probability_loss,
    probed_gradient,
    radius_loss,
    reno,
    sample,
)
from visalign.transitions import ode_of
from visalign.worlds import resolve_model


class Wide(MixtureModel):
    """The mixture in each of 6 dimensions."""

    def noise(self, prompts, seeds):
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(rows)


def wide_chain(schedule=None, ode=True, **options):
    schedule = vp_schedule() if schedule is None else schedule
    return toy_chain(model=Wide(schedule), transition=ode_of(schedule) if ode else None, **options)


def test_the_radius_is_likeliest_at_the_root_of_d_minus_1():
    torch.manual_seed(0)
    noise = torch.randn(3, 4, 5, dtype=torch.float64)
    noise = noise / noise.flatten(1).norm(dim=1).view(3, 1, 1) * math.sqrt(19)
    noise.requires_grad_()
    (gradient,) = torch.autograd.grad(radius_loss(noise).sum(), noise)
    assert float(gradient.abs().max()) < 1e-12
    least = radius_loss(noise.detach())
    assert (radius_loss(1.1 * noise) > least).all() and (radius_loss(0.9 * noise) > least).all()
    # Of the chi law: radius_loss = -log p(radius) + constant, at any radius.
    radii = torch.tensor([[3.0], [4.0], [5.0]], dtype=torch.float64)
    chi = torch.distributions.Chi2(torch.tensor(20.0, dtype=torch.float64))
    log_density = chi.log_prob(radii[:, 0] ** 2) + radii[:, 0].log() + math.log(2)
    constant = radius_loss(radii * noise.detach()[:1].flatten(1) / math.sqrt(19)) + log_density
    assert float(constant.max() - constant.min()) < 1e-6


def test_the_probability_loss_of_a_gaussian_is_its_least_and_rises_off_it():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4096, generator=generator)
    orders = [torch.randperm(4096, generator=generator) for _ in range(20)]
    assert float(probability_loss(noise, orders)) == pytest.approx(4 * math.log(2), abs=0.01)  # 2.77
    for worse in (2 * noise, noise + 0.5, noise.sort().values, 0.5 * noise):
        assert float(probability_loss(worse, orders)) > 20
    # What sorting does to rows of four is seen in place, and what repeats a block only where it is not shuffled.
    assert float(deviation_loss(torch.randn(1024, generator=generator).repeat_interleave(4))) > 20


def test_the_deviation_is_the_formula_in_its_mean_and_in_its_largest_singular_value():
    rows = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [3.0, 1.0]], dtype=torch.float64)
    n, k = 4, 2
    mean = 1.5**2 + 0.5**2
    second = rows.T @ rows / n - torch.eye(2, dtype=torch.float64)  # [[2, 1], [1, 0]]: 1 + sqrt(2)
    excess = max(math.sqrt(2 + math.sqrt(2)) - 1 - math.sqrt(k / n), 0)
    assert torch.equal(second, torch.tensor([[2.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    expected = -min(-n * mean / (2 * k), -math.log(2)) - min(-n * excess**2 / 2, -math.log(2))
    assert float(deviation_loss(rows.flatten(), block=2)) == pytest.approx(expected)
    longer = torch.cat([rows.flatten(), rows.new_tensor([9.0])])
    assert float(deviation_loss(longer, block=2)) == pytest.approx(expected)  # what is left over is left out
    with pytest.raises(ValueError, match="noise: got 3 numbers, expected >= 4"):
        deviation_loss(torch.zeros(3))


@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule()], ids=lambda s: s.kind)
@pytest.mark.parametrize("ode", [True, False])
def test_the_gradient_through_the_chain_is_that_of_finite_differences(schedule, ode):
    chain = wide_chain(schedule, ode=ode)
    noise = chain.initial([0]).requires_grad_()
    steps = {i: chain.noise([0], i, noise.detach()).requires_grad_() for i, std in enumerate(chain.stds) if std}
    gradients = torch.autograd.grad(sample(chain, noise, steps, gradient=True).sin().sum(), [noise, *steps.values()])
    assert chain.ledger.nfe == chain.ledger.backwards == chain.num_steps
    for tensor, gradient in zip([noise, *steps.values()], gradients):
        for k in (0, 5):
            ends = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    tensor[0, k] += h
                    ends.append(sample(chain, noise, steps, gradient=False).sin().sum())
                    tensor[0, k] -= h
            assert float(gradient[0, k]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_the_first_steps_of_reno_and_dno_are_those_of_their_optimisers():
    chain = wide_chain(max_nfe=12)
    noise = chain.initial([0]).requires_grad_()
    final = sample(chain, noise, {}, gradient=True)
    (slope,) = torch.autograd.grad(
        -3 * half(final[:, :, None, None], []).sum() + 0.02 * radius_loss(noise).sum(), noise
    )
    options = dict(lr=0.1, momentum=0.9, clip=1e9, reward_weight=3, regularizer=0.02)
    events = list(reno(wide_chain(max_nfe=12), iterations=2, **options))
    moved = noise.detach() - 0.1 * 1.9 * slope  # Nesterov: g + momentum g, on the first step
    check = wide_chain()
    expected = [float(check.value(check.finish(z, 0, [0]))) for z in (noise.detach(), moved)]
    assert events[-1].state.rewards == pytest.approx(expected, rel=1e-6)
    final = sample(chain, noise, {}, gradient=True)
    (slope,) = torch.autograd.grad(-half(final[:, :, None, None], []).sum(), noise)
    events = list(dno(wide_chain(max_nfe=12), iterations=2, lr=0.1))
    adam = noise.detach() * (1 - 0.1 * 0.01) - 0.1 * slope.sign()
    assert events[-1].state.rewards[1] == pytest.approx(float(check.value(check.finish(adam, 0, [0]))), rel=1e-5)


@pytest.mark.parametrize("ode", [True, False])
def test_a_start_costs_its_iterations_and_all_but_the_last_a_backward(ode):
    for method, budget, nfe, backwards, results in [
        (reno, 6 * 7 + 5, 42, 6 * (4 + 1), 7),  # 5 and 2 iterations
        (dno, 6 * 11, 66, 6 * (4 + 4 + 0), 11),
    ]:
        chain = wide_chain(ode=ode, max_nfe=budget)
        events = list(method(chain, iterations=5))
        assert (chain.ledger.nfe, chain.ledger.backwards, len(events)) == (nfe, backwards, results)
        assert events[-1].best.reward == max(events[-1].state.rewards) and len(events[-1].state.rewards) == results
        assert [e.state.start for e in events[-1:]] == [results // 5 + 1]
    chain = wide_chain(ode=ode, max_nfe=6 * 30)
    events = list(dno(chain, iterations=4, probes=3))  # (1 + 3) 6 thrice and 6: 78 a start; then 2 starts, then 24
    assert chain.ledger.nfe == 6 * 30 and chain.ledger.reward_gradients == 0 and chain.ledger.rewards == 30


@pytest.mark.parametrize("method", [reno, dno])
@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule()], ids=lambda s: s.kind)
def test_iterations_climb_from_where_they_start(method, schedule):
    gains = []
    for seed in range(4):
        options = dict(lr=1.0, clip=1.0) if method is reno else dict(lr=0.1)
        chain = wide_chain(schedule, ode=method is reno, max_nfe=6 * 30, seed=seed)
        rewards = list(method(chain, iterations=30, **options))[-1].state.rewards
        gains.append(max(rewards) - rewards[0])
    assert min(gains) > 0.5 and sum(gains) / 4 > 2  # each of six numbers that changes its mode is worth 2


def test_the_regulariser_holds_the_noise_on_its_shell():
    def norm(regularizer):
        chain = wide_chain(flow_schedule((1.0, 0.0)), max_nfe=40, seed=3)
        return list(reno(chain, iterations=40, lr=0.02, momentum=0.5, clip=10.0, regularizer=regularizer))[
            -1
        ].state.norm

    def far(images, prompts):
        return 3 * images.flatten(1).sum(1)

    assert norm(10.0) == pytest.approx(math.sqrt(5), abs=0.05)
    norms = [
        list(dno(wide_chain(max_nfe=360, reward=_differentiable(far)), iterations=60, lr=0.2, **options))[-1].state.norm
        for options in ({}, dict(regularizer=100.0, permutations=3))
    ]
    assert norms[1] < 0.8 * norms[0]


def _differentiable(reward):
    reward.differentiable = True
    return reward


def test_probes_point_up_a_reward_without_gradient():
    torch.manual_seed(0)
    slope = torch.randn(1, 8, dtype=torch.float64)
    displacements = 0.01 * torch.randn(4000, 8, dtype=torch.float64)
    found = probed_gradient((displacements * slope).sum(1), displacements)
    assert float((found * slope).sum() / slope.norm()) > 0.99 and float(found.norm()) == pytest.approx(1, abs=0.01)
    assert float(probed_gradient(torch.zeros(5), displacements[:5]).norm()) == 0

    def steps(images, prompts):
        return (4 * images.flatten(1)).round().sum(1) / 8  # no gradient

    gains = []
    for seed in range(4):
        chain = wide_chain(max_nfe=6 * 9 * 20, seed=seed, reward=steps)
        rewards = list(dno(chain, iterations=20, lr=0.1, probes=8, probe_scale=0.1))[-1].state.rewards
        gains.append(max(rewards) - rewards[0])
    assert min(gains) > 0 and sum(gains) / 4 > 1.5


def test_what_cannot_be_optimised_is_refused_before_it_costs():
    for method, message, options in [
        (reno, "iterations: got 0", dict(iterations=0)),
        (reno, "lr: got 0", dict(lr=0)),
        (reno, "momentum: got 1", dict(momentum=1)),
        (reno, "clip: got -1", dict(clip=-1)),
        (reno, "reward_weight: got 0", dict(reward_weight=0)),
        (reno, "regularizer: got -1", dict(regularizer=-1)),
        (dno, "iterations: got 0", dict(iterations=0)),
        (dno, "permutations: got 0", dict(permutations=0)),
        (dno, "probes: got -1", dict(probes=-1)),
        (dno, "probe_scale: got 0", dict(probe_scale=0)),
    ]:
        chain = toy_chain(max_nfe=60)
        with pytest.raises(ValueError, match=message):
            next(method(chain, **options))
        assert chain.ledger.nfe == 0
    for method in (reno, dno):
        with pytest.raises(ValueError, match="has no gradient"):
            next(method(toy_chain(reward=lambda images, prompts: images.flatten(1).sum(1), max_nfe=60)))

    def broken(images, prompts):
        return (images - images).flatten(1).sum(1).sqrt() * 0 + images.flatten(1).sum(1)

    with pytest.raises(ValueError, match="gradient of norm nan"):
        list(reno(toy_chain(reward=_differentiable(broken), max_nfe=60)))


@pytest.mark.parametrize("model", ["shapes-flow", "shapes-consistency"])
def test_a_shipped_model_is_optimised_with_no_gradient_left_on_its_weights(model):
    def brightness(images, prompts):
        return images.flatten(1).mean(1)

    generator = Generator.from_pretrained(resolve_model(model), num_steps=2)
    generator.noise(["a red circle"], [0])
    for method, options in ((reno, {}), (dno, dict(lr=0.05, regularizer=0.01, permutations=2))):
        ledger = Ledger(max_nfe=6)
        chain = Chain(generator, "a red circle", _differentiable(brightness), ode_of(generator.schedule), ledger=ledger)
        with chain.counted():
            rewards = list(method(chain, **options))[-1].state.rewards
        assert len(rewards) == 3 and max(rewards) > rewards[0] + 1e-4
        guided = ledger.forwards / (ledger.nfe + ledger.backwards)
        assert guided in (1, 2)  # what a backward computes again is counted too, a pair for guidance twice
    assert all(p.grad is None for p in generator.denoiser.parameters())
