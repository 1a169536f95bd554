"""Feynman-Kac steering: potentials, the law of the particles, what is gathered, its limits and its costs."""

import math
from dataclasses import fields, replace

import pytest
import torch
from search_particle_toys import EVERY_STEP, distance, final, quick_chain
from search_toys import Quadrature, flow_schedule, half, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.particles.particles import Particles
from visalign.search.particles.steering import POTENTIALS, fk, fk_least, fk_nfe, rewarded_steps
from visalign.transitions import noisy_of
from visalign.worlds import resolve_model

VP = {tilt: Quadrature(vp_schedule(), tilt) for tilt in (1, 4)}


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def plain(count, seed=0):
    """The latents of plain samples."""
    chain = toy_chain(seed=seed)
    return chain.finish(chain.initial(range(count)), 0, range(count))


def test_potentials_have_their_known_values():
    rewards, kept = rows(0.5, -1.0), rows(0.25, 0.75)
    for name, log_g, keeps in (
        ("max", rows(1.0, 1.5), rows(0.5, 0.75)),
        ("diff", rows(0.5, -3.5), rewards),
        ("add", rows(1.5, -0.5), rows(0.75, -0.25)),
        ("rt", rows(1.0, -2.0), kept),
    ):
        found = POTENTIALS[name][0](rewards, kept, 2.0)
        torch.testing.assert_close(found, (log_g, keeps), msg=name)
    first = POTENTIALS["max"]
    assert first[0](rows(-3.0), rows(first[1]), 2.0)[0].item() == -6  # a negative reward is seen


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("options", [{}, {"adaptive": False}, {"lag": 1}, {"compat": True}])
def test_without_tilt_it_samples_plainly_to_the_bit(potential, options):
    state = final(fk(toy_chain(), particles=9, tilt=0.0, potential=potential, **EVERY_STEP, **options))
    assert torch.equal(state.latents, plain(9)) and state.resamples == 0 and state.unique_ancestors == 9
    assert state.log_z == pytest.approx(0, abs=1e-12) and state.ess == pytest.approx((9,) * 7)


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "resampling": "multinomial"}, {"compat": True}])
def test_one_particle_is_never_changed(options):
    for potential in POTENTIALS:
        state = final(fk(toy_chain(), particles=1, tilt=5.0, potential=potential, **EVERY_STEP, **options))
        assert torch.equal(state.latents, plain(1))


@pytest.mark.parametrize("potential", POTENTIALS)
def test_potentials_of_a_path_and_the_last_make_up_the_tilted_reward(potential):
    """Never resampled, so that all of them are in the weights at the end."""
    options = dict(tilt=3.0, potential=potential, ess_threshold=1e-9, **EVERY_STEP)
    for lag in (0, 1):
        state = final(fk(toy_chain(), particles=20, lag=lag, **options))
        torch.testing.assert_close(state.log_weights, 1.5 * state.latents[:, 0], atol=1e-6, rtol=0)
        assert state.resamples == 0


def test_what_was_applied_is_what_the_path_keeps_through_resampling():
    for event in list(fk(toy_chain(), particles=50, tilt=3.0, potential="diff", **EVERY_STEP))[:-1]:
        torch.testing.assert_close(event.state.applied, 3 * event.state.memory, atol=1e-12, rtol=0)
        torch.testing.assert_close(event.state.rewards, event.state.memory, atol=0, rtol=0)
    final_state = final(fk(toy_chain(), particles=50, tilt=3.0, potential="diff", **EVERY_STEP))
    assert final_state.resamples > 0 and final_state.unique_ancestors < 50
    torch.testing.assert_close(final_state.rewards, 0.5 * final_state.latents[:, 0])


def test_every_tensor_is_gathered_by_take():
    tensors = {f.name: torch.arange(4.0) for f in fields(Particles) if "Tensor" in str(f.type)}
    particles = Particles(**tensors)
    assert len(tensors) == 8
    taken = particles.take(torch.tensor([2, 2, 0, 3]))
    assert all(getattr(taken, name).tolist() == [2, 2, 0, 3] for name in tensors)
    back = replace(particles, prediction=None).take(torch.tensor([3, 1, 0, 2])).take(torch.tensor([2, 1, 3, 0]))
    assert back.latents.tolist() == [0, 1, 2, 3] and back.prediction is None  # a permutation, and its inverse


@pytest.mark.parametrize("tilt, potential, adaptive, bound", [
    (1, "diff", True, 0.06), (1, "diff", False, 0.06), (1, "max", True, 0.07), (1, "max", False, 0.10),
    (1, "rt", True, 0.07), (1, "add", True, 0.16), (4, "diff", True, 0.03), (4, "diff", False, 0.03),
    (4, "max", True, 0.10), (4, "max", False, 0.08), (4, "add", True, 0.25),
])  # fmt: skip
def test_particles_follow_the_tilted_law(tilt, potential, adaptive, bound):
    options = dict(particles=2000, potential=potential, adaptive=adaptive, **EVERY_STEP)
    assert distance(fk, VP[tilt], **options) < bound  # the base is 1.41 away at tilt 1


@pytest.mark.parametrize("options", [{"lag": 1}, {"value_samples": 4}, {"resampling": "ssp"}, {"start_step": None}])
def test_so_they_do_with_other_options(options):
    assert distance(fk, VP[1], particles=2000, potential="diff", **{**EVERY_STEP, **options}) < 0.06


def test_and_on_a_flow():
    toy = Quadrature(flow_schedule(), 1)
    assert distance(fk, toy, schedule=flow_schedule(), particles=2000, potential="diff", **EVERY_STEP) < 0.06


def test_the_published_code_loses_what_it_does_not_resample_by():
    options = dict(particles=2000, potential="diff", compat=True, start_step=0, every=1, end_step=4)
    assert distance(fk, VP[1], **options) == pytest.approx(1.40, abs=0.06)
    assert distance(fk, VP[1], adaptive=False, **options) < 0.08


def test_the_published_code_divides_the_last_weight_by_those_applied_and_keeps_none():
    options = dict(particles=2000, potential="rt", compat=True, start_step=0, every=1, end_step=4)
    assert distance(fk, VP[1], adaptive=False, **options) < 0.12
    assert not final(fk(quick_chain(), tilt=1.0, **options)).log_weights.any()


def test_the_published_maximum_hides_negative_rewards():
    def below(images, prompts):
        return half(images, prompts) - 9

    options = dict(particles=8, tilt=4.0, potential="max", adaptive=False, **EVERY_STEP)
    assert final(fk(quick_chain(reward=below), compat=True, **options)).resamples == 0
    assert final(fk(quick_chain(reward=below), **options)).resamples > 0


@pytest.mark.parametrize("potential, runs", [("diff", 300), ("max", 300)])
def test_the_evidence_is_estimated_without_bias(potential, runs):
    options = dict(particles=32, tilt=1.0, potential=potential, **EVERY_STEP)
    z = torch.tensor([final(fk(quick_chain(seed), **options)).log_z for seed in range(runs)]).exp()
    assert float(z.mean()) == pytest.approx(math.exp(VP[1].value), abs=3 * float(z.std()) / math.sqrt(runs))
    assert float(z.std()) / math.sqrt(runs) < 0.02 * float(z.mean())


def test_more_samples_bring_values_to_the_soft_value():
    """At the first step the soft value is that of the root; and one sample a particle is its own result."""
    state = next(fk(quick_chain(), particles=400, tilt=1.0, value_samples=40, start_step=0, end_step=0)).state
    assert float(state.rewards.mean()) == pytest.approx(VP[1].value, abs=0.03)
    chain = toy_chain()
    events = list(fk(chain, particles=3, tilt=1.0, value_samples=2, start_step=2, every=2, end_step=4))
    assert chain.ledger.nfe == 3 * (6 + 2 * 3 + 2 * 1) and chain.ledger.rewards == 3 * (2 + 2 + 1)
    assert events[-1].best.reward == max(r for e in events for r in e.rewards)


def test_a_particle_is_valued_by_results_of_its_own_but_not_by_its_future():
    """Late, results from a state are alike: within half the distance of the modes, but for few."""
    options = dict(particles=60, tilt=1.0, ess_threshold=1e-9, start_step=4, end_step=4)
    for samples in (1, 3):
        first, last = fk(toy_chain(), value_samples=samples, **options)
        apart = (first.state.rewards - last.state.rewards).abs()
        assert float((apart < 0.5).double().mean()) > 0.9 and float(apart.min()) > 0


def test_outputs():
    states = {name: final(fk(toy_chain(), particles=40, tilt=2.0, output=name)) for name in
              ("best", "heaviest", "weighted", "resampled")}  # fmt: skip
    state = states["best"]
    assert state.rewards[list(state.chosen)].item() == state.rewards.max()
    assert states["heaviest"].chosen == (int(state.log_weights.argmax()),)
    assert states["weighted"].chosen == tuple(range(40))
    counts = torch.tensor(states["resampled"].chosen).bincount(minlength=40)
    assert bool(((counts - 40 * state.weights).abs() < 1).all()) and counts.max() > 1


def test_the_rewarded_steps_are_the_published_ones():
    assert list(rewarded_steps(100, None, None, None)) == [20, 40, 60, 80]
    assert list(rewarded_steps(10, None, None, None)) == [2, 4, 6, 8] and not rewarded_steps(1, None, None, None)
    assert list(rewarded_steps(6, 0, 2, 5)) == [0, 2, 4]
    chain = toy_chain()
    events = list(fk(chain, particles=5, start_step=1, every=2, end_step=4))
    assert len(events) == 3 and chain.ledger.nfe == 30 and chain.ledger.rewards == chain.ledger.decodes == 15
    assert len(events[-1].state.ess) == 3 and all(1 <= ess <= 5 for ess in events[-1].state.ess)


def test_the_budget_makes_the_particles_or_refuses_them():
    chain = toy_chain(max_nfe=47)
    assert final(fk(chain, particles=None)).size == 7 and chain.ledger.nfe == 42
    chain = toy_chain(max_nfe=47)
    with pytest.raises(ValueError, match=r"particles: got 8, expected 1 .. 7, at 6 denoiser calls each"):
        next(fk(chain, particles=8))
    with pytest.raises(ValueError, match="particles: got None without a budget"):
        next(fk(toy_chain(), particles=None))
    assert fk_least(6, {"particles": 4}) == 24 and fk_least(6, {}) == 6
    assert fk_least(6, {"particles": 2, "value_samples": 3, "start_step": 4, "end_step": 4}) == 2 * (6 + 3)
    assert fk_nfe(6, range(0, 6)) == 6 and chain.ledger.nfe == 0


@pytest.mark.parametrize("message, options", [
    ("tilt: got -1", dict(tilt=-1.0)), ("tilt: got inf", dict(tilt=math.inf)),
    ("ess_threshold: got 0", dict(ess_threshold=0.0)), ("resampling: got 'x'", dict(resampling="x")),
    ("output: got 'bst'.*'best'", dict(output="bst")), ("potential: got 'dif'.*'diff'", dict(potential="dif")),
    ("lag: got 2", dict(lag=2)), ("value_samples: got -1", dict(value_samples=-1)),
    ("start_step: got -1", dict(start_step=-1)), ("start_step: got 5, expected <= 4", dict(start_step=5)),
    ("every: got 0", dict(every=0)), ("end_step: got 6, expected <= 5", dict(end_step=6)),
    ("particles: got 0", dict(particles=0)),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_before_they_cost(message, options):
    chain = toy_chain(max_nfe=600)
    with pytest.raises(ValueError, match=message):
        next(fk(chain, **options))
    assert chain.ledger.nfe == chain.ledger.rewards == 0


def test_chunks_change_nothing():
    options = dict(particles=30, tilt=4.0, **EVERY_STEP)
    whole, chunked = (final(fk(toy_chain(batch_size=size), **options)) for size in (10**9, 7))
    assert whole.resamples == chunked.resamples > 0
    torch.testing.assert_close(whole.latents, chunked.latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.log_weights, chunked.log_weights)


def test_a_real_generator_is_steered():
    generator = Generator.from_pretrained(resolve_model("shapes-flow"))

    def red(images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    chain = Chain(
        generator, "a red circle", red, noisy_of(generator.schedule), ledger=Ledger(max_nfe=4 * generator.num_steps)
    )
    events = list(fk(chain, particles=None, tilt=50.0, potential="diff"))
    state, bests = events[-1].state, [event.best for event in events]
    assert chain.ledger.nfe == 4 * generator.num_steps and state.size == 4 and state.latents.isfinite().all()
    assert bests[0] is None and bests[-1].reward == state.rewards.max() and bests[-1].image.shape[1] == 3
    assert all(1 <= ess <= 4 for ess in state.ess)
