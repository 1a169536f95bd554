"""Twisted samplers: shifts and their densities, tempering, the law and evidence of the particles, limits and costs."""

import math

import pytest
import torch
from search_particle_toys import distance, final, quick_chain
from search_toys import MixtureModel, Quadrature, flow_schedule, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.particles.resampling import effective_sample_size
from visalign.search.particles.steering import fk
from visalign.search.particles.twisted import das, tds, temper, temper_by_ess, twisted_least, usual_rate
from visalign.search.twist import log_ratio, twist, twist_scale
from visalign.transitions import Gaussian, Schedule, noisy_of
from visalign.worlds import resolve_model

VP = {tilt: Quadrature(vp_schedule(), tilt) for tilt in (1, 4)}
RUNS = {"tds": (tds, {}), "tds mean": (tds, {"form": "mean"}), "das": (das, {}),
        "das adaptive": (das, {"adaptive_tempering": True})}  # fmt: skip


def consistency_schedule():
    alphas = torch.tensor([0.01, 0.2, 0.6, 0.9, 0.99], dtype=torch.float64)
    return Schedule("consistency", torch.arange(4, 0, -1.0) * 100, alphas_cumprod=alphas, prediction_type="sample")


def plain(count):
    chain = toy_chain()
    return chain.finish(chain.initial(range(count)), 0, range(count))


def test_the_ratio_of_densities_is_that_of_the_gaussians():
    torch.manual_seed(0)
    mean, shift, noise = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    x, std = mean + shift + 0.3 * noise, 0.3
    expected = Gaussian.of(mean, std).log_prob(x, "sum") - Gaussian.of(mean + shift, std).log_prob(x, "sum")
    torch.testing.assert_close(log_ratio(shift, noise, std), expected)


def test_a_shift_is_bounded_by_the_noise_and_left_out_where_it_is_broken():
    gradient = torch.tensor([[[3.0, 4.0]], [[0.03, 0.04]], [[math.nan, 1.0]], [[0.0, 0.0]]])
    shift = twist(gradient, 2.0, std=0.5, clip=1.0)
    assert shift[0].norm() == pytest.approx(0.5 * math.sqrt(2)) and shift[0, 0, 1] / shift[0, 0, 0] == pytest.approx(
        4 / 3
    )
    assert torch.equal(shift[1], 2 * gradient[1]) and not shift[2:].any()
    assert torch.equal(twist(gradient, 2.0, 0.5, None)[:2], 2 * gradient[:2])


@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule(), consistency_schedule()], ids=lambda s: s.kind)
def test_the_scale_of_a_shift_is_that_of_the_mean_after_a_moved_estimate(schedule):
    chain = toy_chain(schedule)
    x, gradient = torch.tensor([[0.7]], dtype=torch.float64), 0.25
    for i in range(schedule.num_steps - 1):
        alpha, sigma = chain.model.path(i)
        assert twist_scale(chain, i, "mean", x) == chain.stds[i] ** 2
        prediction = chain.predict(x, i)
        gaussian, denoised = chain.kernel(x, i, prediction)
        moved = denoised + sigma**2 / alpha * gradient
        after = x / sigma - moved * alpha / sigma  # the noise that goes with it
        if schedule.kind == "flow":
            other = after - moved
        elif schedule.kind == "diffusion":
            other = moved
        else:  # f = c_out x0 + c_skip x
            c_out = float(chain.kernel(x, i, prediction + 1)[1] - denoised)
            other = prediction + (moved - denoised) / c_out
        shifted, found = chain.kernel(x, i, other)
        torch.testing.assert_close(found, moved)
        expected = shifted.mean - gaussian.mean
        torch.testing.assert_close(twist_scale(chain, i, "denoised", x) * torch.full_like(x, gradient), expected)
    if schedule.kind == "diffusion":  # beta / sqrt(1 - beta), written out
        beta = 1 - schedule.levels[2] / schedule.levels[3]
        assert twist_scale(chain, 2, "denoised", x) == pytest.approx(beta / math.sqrt(1 - beta))


def test_pure_noise_is_not_shifted():
    chain = toy_chain(flow_schedule((1, 0.5, 0)))
    assert twist_scale(chain, 0, "denoised", torch.zeros(1, 1, dtype=torch.float64)) == 0


def test_tempering_rises_from_0_to_1_as_published():
    assert temper(0, 0.008) == 0 and temper(1, 0.008) == pytest.approx(0.008)
    assert temper(86, 0.008) < 1 == temper(87, 0.008) == temper(100, 0.008)
    assert usual_rate(100) == pytest.approx(0.008, abs=1e-4) and usual_rate(8) == pytest.approx(0.1, abs=0.01)
    for steps in (5, 10, 50):
        assert temper(steps, usual_rate(steps)) == 1 > temper(math.floor(0.85 * steps), usual_rate(steps))


def test_adaptive_tempering_stops_at_the_threshold():
    torch.manual_seed(0)
    log_weights, slopes = torch.randn(2, 30, dtype=torch.float64) * torch.tensor([[0.1], [5.0]])
    gamma = temper_by_ess(log_weights, slopes, 0.5, 0.0)
    size = effective_sample_size(log_weights + gamma * slopes)
    assert 0 < gamma < 1 and size < 15 and size == pytest.approx(15, abs=1e-6)
    assert temper_by_ess(log_weights, 0.01 * slopes, 0.5, 0.2) == 1  # never so uneven
    assert temper_by_ess(log_weights, slopes, 0.5, 0.9) == 0.9  # already
    assert temper_by_ess(log_weights[:1], slopes[:1], 0.5, 0.0) == 1


@pytest.mark.parametrize("name", RUNS)
def test_without_tilt_they_sample_plainly_to_the_bit(name):
    method, options = RUNS[name]
    state = final(method(toy_chain(), particles=9, tilt=0.0, **options))
    assert torch.equal(state.latents, plain(9)) and state.resamples == 0 and state.log_z == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name, bounds", [("tds", (0.13, 0.05)), ("tds mean", (0.10, 0.04)), ("das", (0.06, 0.03)),
                                          ("das adaptive", (0.06, 0.03))])  # fmt: skip
def test_particles_follow_the_tilted_law(name, bounds):
    method, options = RUNS[name]
    for tilt, bound in zip((1, 4), bounds):
        assert distance(method, VP[tilt], particles=2000, guidance_start=0.0, **options) < bound


@pytest.mark.parametrize("schedule", [flow_schedule(), consistency_schedule()], ids=lambda s: s.kind)
def test_so_they_do_on_a_flow_and_a_consistency_model(schedule):
    toy = Quadrature(schedule, 2)
    assert toy.distance(final(fk(quick_chain(0, schedule), particles=2000, tilt=0.0)).latents) > 0.3
    for method, options, bound in ((tds, {}, 0.15), (tds, {"form": "mean"}, 0.10), (das, {}, 0.07), (fk, {}, 0.10)):
        found = distance(method, toy, schedule=schedule, particles=2000, **options)
        assert found < bound, (method, options)


@pytest.mark.parametrize("name", RUNS)
def test_the_evidence_is_estimated_without_bias(name):
    method, options = RUNS[name]
    states = [final(method(quick_chain(s), particles=32, tilt=1.0, guidance_start=0.0, **options)) for s in range(150)]
    z = torch.tensor([state.log_z for state in states]).exp()
    error = float(z.std()) / math.sqrt(len(z))
    assert float(z.mean()) == pytest.approx(math.exp(VP[1].value), abs=3 * error) and error < 0.05 * float(z.mean())


def test_what_belongs_to_a_particle_moves_with_it():
    for i, event in enumerate(das(toy_chain(), particles=60, tilt=4.0, tempering=0.2)):
        state = event.state
        if i < 6:
            torch.testing.assert_close(state.applied, temper(i, 0.2) * 4 * state.rewards, atol=1e-12, rtol=0)
    assert state.resamples > 0 and state.unique_ancestors < 60
    torch.testing.assert_close(state.rewards, 0.5 * state.latents[:, 0])


def test_gradients_alone_lead_upwards():
    """Never resampled and not weighted; the base has a mean reward of 0 +- 0.03."""
    for name, (method, options) in RUNS.items():
        options = dict(particles=1000, tilt=4.0, adaptive=True, ess_threshold=1e-9, **options)
        state = final(method(quick_chain(), **options))
        assert float(state.rewards.mean()) > 0.3 and state.resamples == 0, name
        assert abs(float(final(method(quick_chain(), guidance_start=1.0, **options)).rewards.mean())) < 0.1, name
    assert torch.equal(final(tds(toy_chain(), particles=1, guidance_start=1.0)).latents, plain(1))


def test_paths_that_are_not_guided_weigh_their_tilted_reward():
    state = final(das(toy_chain(), particles=20, tilt=3.0, guidance_start=1.0, ess_threshold=1e-9))
    torch.testing.assert_close(state.log_weights, 1.5 * state.latents[:, 0], atol=1e-9, rtol=0)


def test_adaptive_tempering_never_falls_and_the_output_is_the_heaviest():
    events = list(das(toy_chain(), particles=40, tilt=20.0, adaptive_tempering=True))
    gammas = [float(event.note.rsplit(" ", 1)[1]) for event in events[:-1]]
    assert gammas[0] == 0 and gammas == sorted(gammas) and 0 < gammas[1] < 1
    state = events[-1].state
    assert state.chosen == (int(state.log_weights.argmax()),) and events[-1].best.reward == state.rewards.max()


def test_costs_and_budgets():
    chain = toy_chain(max_nfe=47)
    events = list(tds(chain, particles=None))
    ledger = chain.ledger
    assert events[-1].state.size == 7 and ledger.nfe == ledger.backwards == ledger.reward_gradients == 42
    assert ledger.rewards == 7 and len(events) == 7 and len(events[-1].state.ess) == 7
    assert twisted_least(6, {"particles": 4}) == 24 and twisted_least(6, {}) == 6


@pytest.mark.parametrize("message, method, options", [
    ("form: got 'means'.*'mean'", tds, dict(form="means")), ("clip: got 0", tds, dict(clip=0.0)),
    ("guidance_start: got 2", das, dict(guidance_start=2.0)), ("tempering: got 0", das, dict(tempering=0.0)),
    ("tempering: got 0.1, expected None", das, dict(tempering=0.1, adaptive_tempering=True)),
    ("particles: got 101, expected 1 .. 100", das, dict(particles=101)), ("tilt: got -1", tds, dict(tilt=-1.0)),
    ("resampling: got 'spp'", das, dict(resampling="spp")), ("output: got 'all'", das, dict(output="all")),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_before_they_cost(message, method, options):
    chain = toy_chain(max_nfe=600)
    with pytest.raises(ValueError, match=message):
        next(method(chain, **options))
    blind = toy_chain(reward=lambda images, prompts: images.flatten(1).sum(1).detach())
    with pytest.raises(ValueError, match="which has no gradient"):
        next(method(blind))
    assert chain.ledger.nfe == blind.ledger.nfe == 0


@pytest.mark.parametrize("name", ["tds", "das"])
def test_chunks_change_nothing(name):
    method, options = RUNS[name]
    whole, chunked = (final(method(toy_chain(batch_size=size), particles=30, tilt=4.0)) for size in (10**9, 7))
    torch.testing.assert_close(whole.latents, chunked.latents, rtol=1e-9, atol=1e-9)
    assert whole.resamples == chunked.resamples > 0


def test_the_toy_of_the_consistency_model_has_noise_on_all_steps_but_the_last():
    chain = toy_chain(model=MixtureModel(consistency_schedule()))
    assert all(chain.stds[:-1]) and not chain.stds[-1]


def test_a_real_generator_is_twisted():
    generator = Generator.from_pretrained(resolve_model("shapes-flow"))

    def red(images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    red.differentiable = True
    best = {}
    for tilt in (0.0, 300.0):
        ledger = Ledger(max_nfe=2 * generator.num_steps)
        chain = Chain(generator, "a red circle", red, noisy_of(generator.schedule), ledger=ledger, seed=1)
        event = list(tds(chain, particles=2, tilt=tilt))[-1]
        assert ledger.nfe == ledger.backwards == 2 * generator.num_steps and event.state.latents.isfinite().all()
        best[tilt] = float(event.state.rewards.mean())
    assert best[300.0] > best[0.0]
