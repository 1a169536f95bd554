"""Guidance: its forms where the answer is known, the options that change nothing, and the paths of transitions."""

import dataclasses
import math

import pytest
import torch
from search_toys import MixtureModel, Quadrature, flow_schedule, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.best_of_n import best_of_n
from visalign.search.guidance import (
    Guided,
    Push,
    climb,
    clip_rows,
    guidance,
    guided_kernel,
    twisted_denoised,
    twisted_mean,
)
from visalign.transitions import Schedule, noisy_of, ode_of
from visalign.transitions.interpolant import denoised_to_prediction, path_at, renoise
from visalign.worlds import resolve_model


class Normal(MixtureModel):
    """Data N(0, 1), on a VP path: the exact estimate is alpha x."""

    def denoised(self, x, step):
        return self.path(step)[0] * x


def plain(images, prompts):
    """r(x) = x."""
    return images.flatten(1).sum(1)


plain.differentiable = True  # type: ignore[attr-defined]


def linear_chain(steps, seed=0, rows=1):
    """Of data N(0, 1) with T uniform levels of the VP path and the reward x."""
    return toy_chain(model=Normal(vp_schedule([1 - i / steps for i in range(steps + 1)])), reward=plain, seed=seed)


def consistency_schedule():
    levels = [0.02, 0.3, 0.8, 1.0]
    times = torch.tensor([900.0, 500.0, 0.1])  # the last so low that c_skip matters
    return Schedule("consistency", times, alphas_cumprod=torch.tensor(levels), prediction_type="epsilon")


class Straight(MixtureModel):
    """A smooth network of any kind of prediction, for what holds whatever it answers."""

    def path(self, step):
        return path_at(self.schedule, step)

    def predict(self, latents, step_index, prompts):
        return 0.3 * torch.tanh(latents) + 0.1 * step_index


def finished(chain, method=guidance, rows=8, **options):
    """The final latents of the first rows, by entity."""
    kept = {}
    keep = chain.result

    def result(latents, entities, starts=None):
        kept.update(zip(entities, latents))
        return keep(latents, entities, starts)

    chain.result = result
    chain.ledger.max_nfe = options.pop("max_nfe", rows * chain.num_steps)
    list(method(chain, **options))
    return torch.stack([kept[n] for n in sorted(kept)])


@pytest.mark.parametrize(
    "steps, by_state, by_next",
    [(10, 0.3893, 0.5487), (20, 0.6070, 0.7110), (50, 0.8081, 0.8575), (200, 0.9448, 0.9583), (1000, 0.9882, 0.9910)],
)
def test_the_twisted_mean_of_a_linear_gaussian_chain_is_the_tabulated_one(steps, by_state, by_next):
    # All is linear, so guided minus plain, by the same noise, is the change of the mean.
    plainly = finished(linear_chain(steps), best_of_n, rows=2)
    guided = finished(linear_chain(steps), rows=2, scale=1.0, guidance_start=0.0, clip=None)
    torch.testing.assert_close(guided - plainly, torch.full_like(plainly, by_state), atol=1e-4, rtol=0)
    chain = linear_chain(steps)  # by the gradient at the level of the next state: the exact tilted mean
    x, variance = torch.zeros(1, 1, dtype=torch.float64), torch.ones(())
    for i in range(steps):
        gaussian, _ = chain.kernel(x, i, chain.predict(x, i))
        ahead = path_at(chain.schedule, i + 1)[0]
        slope = float(chain.kernel(x + 1, i, chain.predict(x + 1, i))[0].mean - gaussian.mean)
        variance = slope**2 * variance + float(gaussian.std[0]) ** 2
        x = twisted_mean(gaussian.mean, gaussian.std, torch.full_like(x, ahead), 1.0)
    assert float(x) == pytest.approx(by_next, abs=1e-4) and float(variance) == pytest.approx(by_next, abs=2e-4)


def test_the_twisted_estimate_is_the_mean_of_the_tilted_posterior():
    x, alpha, sigma, tilt = torch.tensor([[0.4], [-1.0]]), 0.8, 0.6, 1.7
    # x0 ~ N(0, 1) given x is N(alpha x, sigma^2); the tilt by exp(tilt x0) adds tilt sigma^2
    found = twisted_denoised(alpha * x, torch.full_like(x, alpha), tilt, alpha, sigma)
    torch.testing.assert_close(found, alpha * x + tilt * sigma**2)


@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule(), consistency_schedule()], ids=lambda s: s.kind)
@pytest.mark.parametrize("form", ["twisted", "tds", "dps", "universal"])
def test_without_scale_a_sample_is_the_plain_one_to_the_bit_and_a_small_scale_is_near(schedule, form):
    def chain():
        return toy_chain(model=Straight(schedule))

    base = finished(chain(), best_of_n)
    unguided = chain()
    assert torch.equal(finished(unguided, form=form, scale=0.0), base) and unguided.ledger.backwards == 0
    near = finished(chain(), form=form, scale=1e-7, guidance_start=0.0)
    torch.testing.assert_close(near, base, atol=1e-5, rtol=0)
    guided = chain()
    far = finished(guided, form=form, scale=0.3, guidance_start=0.0)
    assert (far > base).all() and guided.ledger.nfe == 8 * guided.num_steps
    noisy = sum(std > 0 for std in guided.stds)
    assert guided.ledger.backwards == 8 * (noisy if form == "twisted" else guided.num_steps)


def test_universal_guidance_taken_once_is_the_form_of_tds_and_its_noise_loses_sigma_times_the_gradient():
    for schedule in (vp_schedule(), flow_schedule()):
        one, other = (finished(toy_chain(schedule), form=form, scale=0.5) for form in ("tds", "universal"))
        assert torch.equal(one, other)
        chain, i = toy_chain(schedule, transition=ode_of(schedule)), 2
        x = chain.initial([0, 1])
        valued = chain.value_gradient(x, i)
        (alpha, sigma), (ahead, level) = path_at(schedule, i), path_at(schedule, i + 1)
        noise = (x - alpha * valued.denoised) / sigma - 0.5 * sigma * valued.gradient
        expected = ahead * (x - sigma * noise) / alpha + level * noise
        found = guided_kernel(chain, x, i, Push("universal", 0.5, None, 0, 0.01), Guided()).mean
        torch.testing.assert_close(found, expected)


def test_the_dps_form_adds_the_gradient_to_the_next_state():
    chain = toy_chain(flow_schedule(), transition=ode_of(flow_schedule()))
    x = chain.initial([0, 1, 2])
    moved = guided_kernel(chain, x, 5, Push("dps", 0.4, None, 0, 0.01), Guided()).mean
    up, down = (0.5 * chain.model.denoised(x + h, 5) for h in (1e-5, -1e-5))
    torch.testing.assert_close(moved, chain.step(x, 5, [0, 1, 2]) + 0.4 * (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


def test_a_gradient_is_cut_to_a_norm_and_one_that_is_not_a_number_is_left_out():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0], [float("inf"), 0.0], [0.0, 0.0]])
    found, clipped, broken = clip_rows(gradient, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert clipped.tolist() == [True, False, False, False, False]
    assert broken.tolist() == [False, False, True, True, False]
    assert torch.equal(clip_rows(gradient, None)[0][:2], gradient[:2])


@pytest.mark.parametrize("form", ["twisted", "tds", "dps", "universal"])
def test_a_push_is_at_most_the_clip_in_units_of_noise(form):
    chain = toy_chain()
    x = chain.initial(range(5))
    (alpha, sigma), (ahead, level), q = path_at(chain.schedule, 2), path_at(chain.schedule, 3), chain.stds[2]
    found = Guided()
    moved = guided_kernel(chain, x, 2, Push(form, 1e6, 0.25, 0, 0.01), found)
    change = (moved.mean - chain.kernel(x, 2, chain.predict(x, 2))[0].mean).abs()
    # A change of the noise by p moves the mean by -p (ahead sigma / alpha - the weight of the noise).
    weight = ahead * sigma / alpha - math.sqrt(level**2 - q**2)
    unit = {"twisted": q, "dps": sigma}.get(form, weight)
    torch.testing.assert_close(change, torch.full_like(change, 0.25 * unit))
    assert found.clipped == found.gradients == 5


def test_guided_samples_score_higher_and_lie_near_the_tilted_law():
    toy = Quadrature(vp_schedule())
    base = finished(toy_chain(), best_of_n, rows=1000)
    for form in ("twisted", "tds"):
        guided = finished(toy_chain(), rows=1000, form=form, guidance_start=0.0)
        assert guided.mean() > base.mean() + 0.3 and toy.distance(guided) < 0.8 * toy.distance(base)


def test_recurrences_put_the_noise_back_and_are_paid():
    chain = toy_chain(batch_size=3)
    options = dict(form="universal", recurrences=3, guidance_start=0.5, scale=0.3)
    found = finished(chain, max_nfe=5 * 12 + 11, **options)
    assert len(found) == 5 and chain.ledger.nfe == 5 * 12 and chain.ledger.backwards == 5 * 9
    torch.testing.assert_close(finished(toy_chain(), max_nfe=60, **options), found)
    # What is put back between the visits of a level is the noise that its step took away, normal and of size 1.
    chain, visits = toy_chain(transition=ode_of(vp_schedule())), []
    predict = chain.predict
    chain.predict = lambda x, i: visits.append((i, x)) or predict(x, i)
    finished(chain, max_nfe=12 * 2000, form="universal", recurrences=2, guidance_start=0.0, scale=0.0)
    assert [i for i, _ in visits] == [i for i in range(6) for _ in range(2)]
    for (i, x), (_, again) in zip(visits[::2], visits[1::2]):
        (alpha, sigma), (ahead, level) = path_at(chain.schedule, i), path_at(chain.schedule, i + 1)
        stepped = chain.kernel(x, i, chain.model.predict(x, i, []))[0].mean
        put = (again - alpha / ahead * stepped) / math.sqrt(sigma**2 - (alpha / ahead * level) ** 2)
        assert abs(float(put.mean())) < 0.1 and float(put.std()) == pytest.approx(1, abs=0.07)
    # Recurrence alone leads from the law of the chain, E|x| 1.887, to that of the data, 2 and even on both sides.
    again = finished(toy_chain(), max_nfe=18 * 1500, form="universal", recurrences=3, guidance_start=0.0, scale=0.0)
    assert abs(float(again.mean())) < 0.2 and float(again.abs().mean()) == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize("form", ["twisted", "tds", "dps", "universal"])
def test_a_flow_is_guided_from_pure_noise_on(form):
    chain = toy_chain(flow_schedule((1.0, 0.7, 0.4, 0)))
    found = finished(chain, form=form, guidance_start=0.0)
    assert found.isfinite().all() and (found > finished(toy_chain(flow_schedule((1.0, 0.7, 0.4, 0))), best_of_n)).any()
    assert chain.ledger.backwards == 8 * (3 if form == "dps" else 2)  # no signal at 1, no noise at the last step


def test_backward_guidance_climbs_the_reward_of_the_estimate_without_the_denoiser():
    def peak(images, prompts):
        return -((images.flatten(1) - 1.5) ** 2).sum(1)

    peak.differentiable = True
    chain = toy_chain(reward=peak)
    x0 = torch.tensor([[0.0], [1.4], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(x0 + climb(chain, x0, 600, 0.02), torch.full_like(x0, 1.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(climb(chain, x0, 1, 0.02), 0.02 * (1.5 - x0).sign())  # Adam's first step
    assert chain.ledger.nfe == 0 and chain.ledger.backwards == 0
    chain = toy_chain(reward=peak)
    options = dict(form="universal", scale=0.0, backward_steps=20, backward_lr=0.1)
    near, base = finished(chain, rows=50, **options), finished(toy_chain(reward=peak), best_of_n, rows=50)
    assert chain.ledger.backwards == 0 and (near - 1.5).abs().mean() < 0.3 * (base - 1.5).abs().mean()


@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule(), consistency_schedule()], ids=lambda s: s.kind)
def test_an_estimate_becomes_the_prediction_that_it_came_from(schedule):
    kinds = ["velocity"] if schedule.kind == "flow" else ["epsilon", "sample", "v_prediction"]
    for kind in kinds:
        taken = dataclasses.replace(schedule, prediction_type=kind)
        torch.manual_seed(0)
        x, output = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        for i in range(taken.num_steps):
            _, denoised = noisy_of(taken)(taken, i, x, output)
            torch.testing.assert_close(denoised_to_prediction(taken, i, x, denoised), output, rtol=1e-6, atol=1e-6)


def test_noise_put_back_gives_the_law_of_the_noisier_level():
    torch.manual_seed(0)
    x0 = torch.full((200_000,), 0.7)
    for path, noisier in (((0.8, 0.2), (0.3, 0.7)), ((0.8, 0.6), (0.6, 0.8)), ((1.0, 0.0), (0.0, 1.0))):
        x = path[0] * x0 + path[1] * torch.randn(x0.shape)
        back = renoise(x, path, noisier, torch.randn(x0.shape))
        assert float(back.mean()) == pytest.approx(0.7 * noisier[0], abs=0.01)
        assert float(back.std()) == pytest.approx(noisier[1], rel=0.01)
    with pytest.raises(ValueError, match="more noise than"):
        renoise(x0, (0.3, 0.7), (0.8, 0.2), x0)


def test_what_cannot_guide_is_refused_before_it_costs():
    for message, options in {
        "form: got 'twsited'.*'twisted'": dict(form="twsited"),
        "scale: got -1": dict(scale=-1),
        "guidance_start: got 1": dict(guidance_start=1),
        "clip: got 0": dict(clip=0),
        "recurrences: got 2, expected 1 for the form 'tds'": dict(form="tds", recurrences=2),
        "recurrences: got 0, expected >= 1": dict(form="universal", recurrences=0),
        "backward_steps: got 1, expected 0": dict(backward_steps=1),
        "backward_lr: got 0": dict(backward_lr=0),
    }.items():
        chain = toy_chain(max_nfe=60)
        with pytest.raises(ValueError, match=message):
            next(guidance(chain, **options))
        assert chain.ledger.nfe == 0
    with pytest.raises(ValueError, match="steps are deterministic"):
        next(guidance(toy_chain(transition=ode_of(vp_schedule()), max_nfe=60)))
    with pytest.raises(ValueError, match="has no gradient"):
        next(guidance(toy_chain(reward=lambda images, prompts: images.flatten(1).sum(1), max_nfe=60)))


def test_the_shipped_flow_is_guided_to_brighter_pictures():
    def brightness(images, prompts):
        return images.flatten(1).mean(1)

    brightness.differentiable = True
    generator = Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=4)
    prompt = "a red circle"
    generator.noise([prompt], [0])
    means = {}
    for name, options in {"plain": dict(scale=0.0), "tds": dict(form="tds", scale=300.0)}.items():
        chain = Chain(generator, prompt, brightness, ode_of(generator.schedule), ledger=Ledger(max_nfe=8))
        options = {"form": "tds", **options}
        means[name] = list(guidance(chain, **options))[-1].state.rewards
    assert len(means["tds"]) == 2 and all(a > b + 0.01 for a, b in zip(means["tds"], means["plain"]))
