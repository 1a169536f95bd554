"""Formulas of training with a reward's gradient: closed forms, finite differences, known numbers."""

import math

import pytest
import torch
from torch import nn

from visalign.objectives import reward_gradient as rg
from visalign.objectives import single_step as ss
from visalign.rewards import make_reward
from visalign.rewards.base import as_reward
from visalign.rewards.video.measures import segment_frames, segment_weights
from visalign.sampling.backprop import checkpointed, truncated_rollout
from visalign.sampling.noising import add_noise, one_step_estimate, training_target
from visalign.transitions import DDIM, FlowODE, FlowSDE, Schedule, ddim, flow_sde
from visalign.transitions.consistency import boundary_scalings


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def flow(steps):
    sigmas = torch.linspace(1, 0, steps + 1)
    return Schedule("flow", 1000 * sigmas[:-1], sigmas=sigmas)


def diffusion(steps):
    alphas = torch.linspace(0.05, 1, steps + 1)
    return Schedule("diffusion", torch.arange(steps, 0, -1), alphas_cumprod=alphas, prediction_type="epsilon")


class Toy(nn.Module):
    """A denoiser in float64, W + B A as its LoRA, driven as a Generator drives a pipeline; counts calls with grad."""

    def __init__(self, schedule, width=3, hidden=5):
        super().__init__()
        self.schedule, self.calls = schedule, []
        self.w, self.out = randn(hidden, width, seed=1) / 2, randn(width, hidden, seed=2) / 2
        self.a = nn.Parameter(randn(2, width, seed=3) / 2)
        self.b = nn.Parameter(randn(hidden, 2, seed=4) / 2)

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return torch.tanh(x @ (self.w + self.b @ self.a).T) @ self.out.T

    def denoise(self, prompts, seeds, step_fn, *, latents=None, start=None, stop=None, grad_steps=None):
        x = torch.stack([randn(self.w.shape[1], seed=s) for s in seeds]) if latents is None else latents
        for i in range(start or 0, stop or self.schedule.num_steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (grad_steps is None or i in grad_steps)):
                prediction = self(x)
            x = step_fn(i, x, prediction)
        return x


class Chain:
    """Section 15's scalar chain: pred = theta x, states given by the sampler."""

    def __init__(self, steps, theta=0.7):
        self.schedule, self.theta = flow(steps), torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def denoise(self, prompts, seeds, step_fn, *, latents=None, start=None, stop=None, grad_steps=None):
        x, self.states = latents if latents is not None else torch.full((1, 1), 1.3, dtype=torch.float64), []
        for i in range(start or 0, stop or self.schedule.num_steps):
            self.states.append(x.item())
            theta = self.theta if grad_steps is None or i in grad_steps else self.theta.detach()
            x = step_fn(i, x, theta * x)
        return x


def final(toy, cut, transition=None, **options):
    return truncated_rollout(toy, ["a", "b"], [5, 6], transition or FlowODE(), cut, **options)


def objective(x):
    return -((x - 0.3) ** 2).sum()


def assert_is_gradient(function, parameter, gradient, rtol):
    """Central differences of a function of no argument by every entry of a parameter."""
    found = torch.zeros_like(parameter)
    with torch.no_grad():
        for k in range(parameter.numel()):
            entry, values = parameter.view(-1)[k].item(), []
            for sign in (1, -1):
                parameter.view(-1)[k] = entry + sign * 1e-5
                values.append(float(function()))
            parameter.view(-1)[k] = entry
            found.view(-1)[k] = (values[0] - values[1]) / 2e-5
    assert (gradient - found).norm() < rtol * found.norm() and found.norm() > 1e-3


# Truncated backpropagation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, transition", [(flow(4), FlowODE()), (diffusion(4), DDIM(1.0)), (flow(4), FlowSDE())]
)
def test_draft_over_all_steps_is_the_gradient_of_the_final_reward(schedule, transition):
    toy = Toy(schedule)
    objective(final(toy, 0, transition).result).backward()
    for parameter in (toy.a, toy.b):
        assert_is_gradient(lambda: objective(final(toy, 0, transition).result), parameter, parameter.grad, 1e-5)


@pytest.mark.parametrize("cut", [1, 3])
def test_a_truncated_gradient_is_that_of_the_objective_with_earlier_predictions_constant(cut):
    toy = Toy(flow(4))
    path = final(toy, cut)
    objective(path.result).backward()
    assert sorted(path.states) == list(range(cut, 4)) and not path.states[cut].requires_grad

    def rest():
        return objective(final(toy, cut, latents=path.states[cut], start=cut).result)

    assert_is_gradient(rest, toy.b, toy.b.grad, 1e-6)
    whole = torch.autograd.grad(objective(final(toy, 0).result), toy.b)[0]
    assert (whole - toy.b.grad).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("cut", range(5))
def test_the_scalar_chain_has_its_closed_form_at_every_cut(cut):
    chain, theta, dt = Chain(5), 0.7, -0.2
    result = truncated_rollout(chain, ["a"], [0], FlowODE(), cut).result
    (gradient,) = torch.autograd.grad(result.sum(), chain.theta)
    wanted = sum(dt * chain.states[i] * (1 + dt * theta) ** (4 - i) for i in range(cut, 5))
    assert gradient.item() == pytest.approx(wanted, rel=1e-6)


def test_calls_with_gradient_are_exactly_the_last_ones_and_a_cut_that_leaves_none_is_refused():
    toy = Toy(flow(6))
    final(toy, 4)
    assert toy.calls == [False] * 4 + [True] * 2
    for cut in (6, -1):
        with pytest.raises(ValueError, match=f"cut: got {cut}, expected 0 .. 5"):
            final(toy, cut)
    with pytest.raises(ValueError, match="cut: got 2, expected 3 .. 5"):
        final(toy, 2, latents=randn(2, 3), start=3)
    with pytest.raises(ValueError, match="noise_seeds: got 1, expected 2"):
        final(toy, 0, noise_seeds=[1])


def test_cuts_follow_their_distributions_and_repeat():
    for kind, low, high in (("uniform", 0, 49), ("gaussian", 20, 49), ("fixed", 49, 49)):
        cuts = [rg.draw_cut(kind, 50, seeded(k)) for k in range(300)]
        assert cuts == [rg.draw_cut(kind, 50, seeded(k)) for k in range(300)]
        assert low <= min(cuts) and max(cuts) <= high and (len(set(cuts)) > 10) == (kind != "fixed")
        if kind == "gaussian":
            assert abs(sum(cuts) / 300 - 41.5) < 1.5
        if kind == "uniform":
            assert abs(sum(cuts) / 300 - 24.5) < 3
    assert rg.draw_cut("gaussian", 1, seeded()) == 0
    with pytest.raises(ValueError, match="cut: got 'late'"):
        rg.draw_cut("late", 5, seeded())


def test_refl_is_one_call_and_stops_there_with_its_estimate():
    toy = Toy(flow(8))
    path = final(toy, 6, jump=True)
    assert toy.calls == [False] * 6 + [True]
    state = path.states[6]
    torch.testing.assert_close(path.result, state - toy.schedule.levels[6] * toy(state), rtol=0, atol=1e-12)
    objective(path.result).backward()
    assert_is_gradient(lambda: objective(state - toy.schedule.levels[6] * toy(state)), toy.b, toy.b.grad, 1e-6)
    chain = Chain(5)
    (gradient,) = torch.autograd.grad(truncated_rollout(chain, ["a"], [0], FlowODE(), 3, jump=True).result, chain.theta)
    assert gradient.item() == pytest.approx(-chain.schedule.levels[3] * chain.states[3], rel=1e-9)


def test_refl_at_the_last_step_is_draft_1_and_alignprop_fixed_too():
    toy = Toy(flow(5))
    grads = [torch.autograd.grad(objective(final(toy, 4, jump=j).result), toy.b)[0] for j in (False, True)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=0)
    assert rg.draw_cut("fixed", 5, seeded()) == 4


def test_draft_lv_with_the_noise_of_the_last_step_is_draft_1_and_its_variance_falls():
    toy = Toy(flow(5))
    path = final(toy, 4)
    wanted = torch.autograd.grad(objective(path.result), toy.b)[0]
    state, level, x0 = path.states[4], toy.schedule.levels[4], path.result.detach()
    with torch.no_grad():
        own = state + (1 - level) * toy(state)
    again = add_noise(x0, own, level, "velocity")
    torch.testing.assert_close(again, state, rtol=0, atol=1e-9)

    def gradient(noise):
        x = add_noise(x0, noise, level, "velocity")
        return torch.autograd.grad(objective(one_step_estimate(x, toy(x), level, "velocity")), toy.b)[0]

    torch.testing.assert_close(gradient(own), wanted, rtol=1e-6, atol=1e-9)
    single = torch.stack([gradient(randn(2, 3, seed=k)) for k in range(200)])
    fours = single.view(50, 4, *single.shape[1:]).mean(1)
    assert 0.15 < (fours.var(0).sum() / single.var(0).sum()).item() < 0.4


class Wide(nn.Module):
    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.up, self.down = nn.Parameter(torch.full((4, 1), 0.1)), 4096

    def forward(self, x):
        return (torch.tanh(x.unsqueeze(-1) * self.up.expand(4, self.down)).mean(-1)).contiguous()

    denoise = Toy.denoise


def saved_bytes(function):
    """What autograd keeps while the function runs; each storage once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor  # kept: no address again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return sum(size for size, _ in seen.values()), out


def test_checkpointed_calls_change_nothing_but_memory_which_no_longer_grows_with_the_steps():
    results, kept = {}, {}
    for steps in (10, 40):
        net = Wide(flow(steps))
        net.w = torch.zeros(1, 4)
        for recompute in (False, True):
            with checkpointed(*[(net, "forward")] * recompute):
                latents = torch.linspace(-1, 1, 8).view(2, 4)
                kept[steps, recompute], path = saved_bytes(lambda net=net, x=latents: final(net, 0, latents=x))
            results[steps, recompute] = torch.autograd.grad(objective(path.result), net.up)[0]
        torch.testing.assert_close(results[steps, True], results[steps, False], rtol=1e-6, atol=1e-9)
        assert "forward" not in net.__dict__
    one_call = kept[10, False] / 10
    assert (kept[40, True] + one_call) / (kept[10, True] + one_call) <= 1.05
    assert kept[40, False] / kept[10, False] > 3.5


# Noising, and one-step estimates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "sample", "v_prediction"])
def test_the_true_prediction_gives_the_data_back(kind):
    x0, noise = randn(2, 3), randn(2, 3, seed=1)
    for level in (0.1, 0.5, 0.9):
        state, target = add_noise(x0, noise, level, kind), training_target(x0, noise, level, kind)
        torch.testing.assert_close(one_step_estimate(state, target, level, kind), x0, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="prediction_type: got 'x'"):
        one_step_estimate(x0, x0, 0.5, "x")
    with pytest.raises(ValueError, match="level: got 1.5"):
        add_noise(x0, noise, 1.5, kind)


@pytest.mark.parametrize("timestep, slope", [(20, 0.138), (200, 0.572), (551, 1.92), (999, 14.6)])
def test_the_estimates_slope_at_the_levels_of_stable_diffusion(timestep, slope):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[timestep].item()
    prediction = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    one_step_estimate(torch.ones(1, 1), prediction, alpha, "epsilon").sum().backward()
    assert -prediction.grad.item() == pytest.approx(slope, rel=5e-3)
    prediction.grad = None
    one_step_estimate(torch.ones(1, 1), prediction, 0.6, "velocity").sum().backward()
    assert prediction.grad.item() == pytest.approx(-0.6)


def test_min_snr_weights_errors_of_the_data_alike():
    for kind, level in (("epsilon", 0.3), ("v_prediction", 0.3), ("velocity", 1 / (1 + (0.3 / 0.7) ** 0.5))):
        prediction = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        one_step_estimate(torch.ones(1, 1), prediction, level, kind).sum().backward()
        assert ss.min_snr_weight(level, kind) == pytest.approx(0.3 / 0.7 * prediction.grad.item() ** 2)
    assert ss.min_snr_weight(0.99, "epsilon") == pytest.approx(5 / 99)
    with pytest.raises(ValueError, match="level, gamma: got 1.0"):
        ss.min_snr_weight(1.0, "epsilon")


# Losses and regularisers -----------------------------------------------------------------------------------------


def test_losses_of_a_reward():
    rewards = torch.tensor([0.5, 2.5], requires_grad=True)
    assert rg.reward_loss(rewards).tolist() == [-0.5, -2.5]
    hinge = rg.reward_loss(rewards, "hinge", 2.0)
    (gradient,) = torch.autograd.grad(hinge.sum(), rewards)
    assert hinge.tolist() == [1.5, 0.0] and gradient.tolist() == [-1.0, 0.0]
    assert rg.reward_loss(rewards, "target", 2.0).tolist() == [1.5, 0.5]
    for kind, threshold in (("hinge", None), ("reward", 1.0)):
        with pytest.raises(ValueError, match="threshold: got"):
            rg.reward_loss(rewards, kind, threshold)


def test_the_kl_of_a_step_has_its_closed_form_and_vanishes_at_the_reference():
    x, v = randn(1, 4), randn(1, 4, seed=1).requires_grad_()
    dv = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    base = flow_sde(x, v.detach() - dv, 0.5, 0.45, 0.7)
    assert rg.step_kl(flow_sde(x, v, 0.5, 0.45, 0.7), base).item() == pytest.approx(0.0790829, abs=1e-6)
    for value in (rg.step_kl(*[flow_sde(x, v, 0.5, 0.45, 0.7)] * 2), rg.output_anchor(v, v)):
        (gradient,) = torch.autograd.grad(value.sum(), v)
        assert value.item() == 0 and gradient.abs().max() == 0
    assert rg.output_anchor(v, v.detach() - dv).item() == pytest.approx(0.25)


def test_penalties_on_the_change_of_the_weights():
    a, b = randn(2, 5), randn(7, 2, seed=1)
    assert rg.lora_penalty([(a, b), (2 * a, b)], 3.0).item() == pytest.approx(5 * 9 * (b @ a).square().sum().item())
    assert rg.start_penalty([a, b], [a - 1, b]).item() == pytest.approx(10)


def test_a_normalised_mix_ignores_the_scale_of_a_reward_and_adds_unit_vectors():
    g, h = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    mixed = rg.normalised_mix([g, h], [1.0, 0.5])
    torch.testing.assert_close(rg.normalised_mix([1000 * g, h], [1.0, 0.5]), mixed, rtol=1e-6, atol=1e-9)
    for n in range(2):
        wanted = g[n] / g[n].norm() + 0.5 * h[n] / h[n].norm()
        torch.testing.assert_close(mixed[n], wanted, rtol=1e-6, atol=1e-9)


def test_the_worst_case_lies_against_the_reward_at_the_given_distance():
    images, g = torch.full((2, 3, 4, 4), 0.5, requires_grad=True), randn(2, 3, 4, 4).float()
    moved = rg.worst_case(images, g, 0.1)
    assert torch.allclose((moved - images).flatten(1).norm(dim=1), torch.tensor(0.1))
    assert ((moved - images) * g).flatten(1).sum(1).max() < 0
    (gradient,) = torch.autograd.grad(moved.sum(), images)
    assert (gradient == 1).all() and torch.equal(rg.worst_case(images, g, 0.0), images)


def test_augmentation_is_each_images_own_and_each_part_does_something():
    images = torch.rand(3, 3, 16, 16, generator=seeded())
    made = rg.augment(images, [1, 2, 3])
    torch.testing.assert_close(rg.augment(images[1:2], [2]), made[1:2])
    assert torch.equal(rg.augment(images, [1, 2, 3], crop=1.0, noise=0.0), images)
    assert (rg.augment(images, [1, 2, 3], crop=0.5, noise=0.0) - images).abs().max() > 0.1
    assert 0.015 < (rg.augment(images, [1, 2, 3], crop=1.0) - images).std() < 0.025
    flips = rg.augment(images, [1, 2, 3], crop=1.0, noise=0.0, flip=True)
    assert {torch.equal(f, i.flip(-1)) for f, i in zip(flips, images)} == {True, False}


@pytest.mark.parametrize("guard", ["augment", "relative"])
def test_a_guard_ends_with_less_high_frequency_energy_than_none_at_equal_brightness(guard):
    """Reward: brightness up to a half, plus energy between neighbouring pixels, which blurring and biases give away."""

    def score(images, prompts=("bright",)):
        rough = (images[..., 1:] - images[..., :-1]).square().flatten(1).mean(1)
        return 10 * rough - (images.flatten(1).mean(1) - 0.5).square() * (100 if prompts[0] == "bright" else 0)

    ends = {}
    for name in ("none", guard):
        image = (0.3 + 0.01 * torch.randn(1, 3, 8, 8, generator=seeded())).requires_grad_()
        optimizer = torch.optim.SGD([image], lr=1.0)
        for k in range(30):
            if name == "augment":
                reward = torch.stack([score(rg.augment(image, [40 * k + c], 0.5, 0.0)) for c in range(8)]).mean(0)
            elif name == "relative":
                reward = rg.relative_reward(score(image), score(image, ("rough",)))
            else:
                reward = score(image)
            optimizer.zero_grad()
            (-reward.sum()).backward()
            optimizer.step()
        ends[name] = (image[..., 1:] - image[..., :-1]).square().mean().item(), image.mean().item()
    assert ends[guard][0] < 0.9 * ends["none"][0] and abs(ends[guard][1] - ends["none"][1]) < 0.02


def test_saturated_pixels_are_counted():
    assert rg.saturated_fraction(torch.tensor([0.0, 1.0, 0.5, 0.999])).item() == 0.5


# Direct-Align ----------------------------------------------------------------------------------------------------


def test_direct_align_recovers_the_data_and_has_its_slope():
    x0, noise = randn(2, 3), randn(2, 3, seed=1)
    for sigma, landing in ((0.9, 0.6), (0.6, 0.9), (1.0, 0.2), (0.5, 0.5), (0.3, 0.0)):
        velocity = (noise - x0).requires_grad_()
        estimate = ss.direct_align(x0, noise, sigma, landing, velocity)
        torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-6)
        (slope,) = torch.autograd.grad(estimate.sum(), velocity)
        assert slope.flatten()[0].item() == pytest.approx((landing - sigma) / (1 - landing))
    off = ss.direct_align(x0, noise, 0.5, 0.5, randn(2, 3, seed=2))
    torch.testing.assert_close(off, x0, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="sigma, sigma_next: got 0.5, 1.0"):
        ss.direct_align(x0, noise, 0.5, 1.0, x0)


def test_the_levels_of_srpo_lie_on_both_sides_of_the_landing_and_near_it():
    from visalign.transitions import shift_sigmas

    levels = shift_sigmas(torch.tensor([0.9, 0.5]), 3.0).tolist()
    assert levels == pytest.approx([0.964286, 0.75], abs=1e-6)
    drawn = [ss.align_levels(0.9643, 0.75, seeded(k)) for k in range(300)]
    for at in drawn:
        assert 0.75 <= at.inversion_from < at.landing < at.denoise_from <= 0.9643
        assert at.denoise_from - at.landing <= 0.0218 and at.landing - at.inversion_from <= 0.0218
        assert 0.1 < at.denoise_excess < 0.25 and 0.01 < at.inversion_excess <= 0.3
    assert max(at.landing for at in drawn) > 0.95 and min(at.landing for at in drawn) < 0.765
    m = 5 + int(torch.randint(5, 996, (), generator=seeded(3))) - 5
    assert ss.align_levels(0.9643, 0.75, seeded(3)).landing == pytest.approx(0.9643 - 0.2143 * (1000 - m) / 999)
    with pytest.raises(ValueError, match="high, low: got 0.995"):
        ss.align_levels(0.995, 0.75, seeded())


def test_a_relative_reward_of_equal_prompts_is_nothing():
    r = randn(3)
    assert rg.relative_reward(r, r).abs().max() == 0
    torch.testing.assert_close(rg.relative_reward(r, 0 * r, 0.2), 1.2 * r)


# Cycles, editing, consistency ------------------------------------------------------------------------------------


def test_masked_means():
    values, times = torch.tensor([1.0, 2.0, 4.0], requires_grad=True), torch.tensor([0.0, 200.0, 201.0])
    assert ss.masked_mean(values, times, 0, 200).item() == pytest.approx(1.5)
    (gradient,) = torch.autograd.grad(ss.masked_mean(values, times, 0, 200), values)
    assert gradient[2] == 0 and gradient[0] == pytest.approx(0.5)
    none = ss.masked_mean(values, times, 300, 400)
    assert none.item() == 0 and torch.autograd.grad(none, values)[0].abs().max() == 0
    assert ss.masked_mean(values, times, 0, 200, 10).item() == pytest.approx(0.3)


def test_doubt_discounts_only_where_it_pays():
    losses = torch.tensor([0.1, 5.0], dtype=torch.float64)
    assert torch.equal(ss.doubt_weighted(losses, torch.zeros(2)), losses)
    scale, cost = 0.5, 0.2
    grid = torch.linspace(0, 5, 5001, dtype=torch.float64)
    for loss in losses.tolist():
        total = scale * ss.doubt_weighted(torch.full_like(grid, loss), grid) + cost * grid
        assert grid[total.argmin()].item() == pytest.approx(max(0.0, math.log(scale * loss / cost)), abs=1e-3)
    share = ss.doubt_weighted(torch.ones(100), torch.rand(100, generator=seeded()) * 9)
    assert share.min() > 0 and share.max() <= 1
    assert (ss.ramp(0, 5000), ss.ramp(2500, 5000), ss.ramp(9999, 5000), ss.ramp(0, 0)) == (0, 0.5, 1, 1)


def test_editing_starts_where_instructvideo_does():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    start = ss.edit_start(20, 0.6)
    assert int(scheduler.timesteps[start]) == 551 and len(scheduler.timesteps) - start == 12
    assert (ss.edit_start(20, 0.0), ss.edit_start(20, 1.0)) == (20, 0)
    with pytest.raises(ValueError, match="strength: got 1.2"):
        ss.edit_start(20, 1.2)


def test_offset_noise_is_constant_over_space():
    noise, offsets = randn(2, 3, 5, 4, 4), randn(2, 3, 5, 1, 1, seed=1)
    shift = ss.offset_noise(noise, offsets, 0.1) - noise
    assert torch.allclose(shift, 0.1 * offsets.expand_as(noise)) and shift.std(dim=(0, 1, 2)).min() > 0
    with pytest.raises(ValueError, match="offsets: got shape"):
        ss.offset_noise(noise, noise, 0.1)


def test_segments_and_their_weights():
    chosen = segment_frames(16, 4, seeded())
    assert [int(c) // 4 for c in chosen] == [0, 1, 2, 3]
    weights = segment_weights(torch.tensor([8, 7, 0]), 16) * 3
    assert weights.tolist() == pytest.approx([1.0, 0.3679, 3.3546e-4], rel=1e-3)
    assert segment_weights(chosen, 16, decay=0.0).tolist() == [0.25] * 4


def test_frames_that_were_not_chosen_get_no_gradient():
    def bright(images, prompts):
        return images.flatten(1).mean(1)

    bright.differentiable = True
    videos = torch.rand(1, 16, 3, 4, 4, generator=seeded()).requires_grad_()
    output = make_reward("segmental", reward=as_reward(bright))(videos, ["a"], {"segment_seed": 3})
    (gradient,) = torch.autograd.grad(output.scores.sum(), videos)
    assert gradient.flatten(2).abs().sum((0, 2)).nonzero().flatten().tolist() == output.extra["frames"].tolist()


def test_the_consistency_loss_and_its_boundary():
    assert boundary_scalings(0) == (1.0, 0.0)
    estimate, target = randn(2, 6).requires_grad_(), randn(2, 6, seed=1).requires_grad_()
    loss = ss.consistency_loss(estimate, target)
    assert (loss <= (estimate - target).abs().mean(1)).all() and (loss > 0).all()
    assert ss.consistency_loss(estimate, estimate).abs().max() == 0
    loss.sum().backward()
    assert target.grad is None and estimate.grad.abs().max() > 0


def test_guidance_of_the_teacher_commutes_with_the_estimate():
    """x0 = x0_c + w (x0_c - x0_u) is the pipeline's guidance at scale w + 1, before or after the estimate."""
    x, cond, uncond, w = randn(1, 4), randn(1, 4, seed=1), randn(1, 4, seed=2), 7.0
    guided = uncond + (w + 1) * (cond - uncond)
    one, other, both = (ddim(x, p, 0.4, 0.5, 0.0)[1] for p in (cond, uncond, guided))
    torch.testing.assert_close(both, one + w * (one - other))


# Known numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [20, 150, 1000])
def test_the_levels_of_srpo_are_those_of_its_grids(count, seed):
    m = int(torch.randint(5, count - 4, (), generator=seeded(seed)))
    k = min(101, count - m, m)
    grid, first, second = (torch.linspace(a, b, count).tolist() for a, b in ((0.96, 0.7), (0.1, 0.25), (0.3, 0.01)))
    at = ss.align_levels(0.96, 0.7, seeded(seed), count)
    assert (at.landing, at.denoise_from) == pytest.approx((grid[count - m], grid[count - m - k]), abs=1e-6)
    assert at.inversion_from == pytest.approx(grid[count - max(m - k, 1)], abs=1e-6)
    assert (at.denoise_excess, at.inversion_excess) == pytest.approx((first[m], second[max(m - k, 1)]), abs=1e-6)


def test_single_steps_at_known_values():
    one = torch.ones(1, 1, dtype=torch.float64)
    # x = 0.4 * 2 + 0.6 * 3 = 2.6, moved by -0.35 * 5 to 0.85, less 0.25 * 3, over 0.75
    assert ss.direct_align(2 * one, 3 * one, 0.6, 0.25, 5 * one).item() == pytest.approx(0.1 / 0.75)
    assert ss.consistency_loss(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), huber=4.0).item() == pytest.approx(0.5)
    assert [ss.ramp(0, 0), ss.ramp(0, 4), ss.ramp(1, 4), ss.ramp(9, 4)] == [1, 0, 0.25, 1]
    assert [ss.edit_start(20, s) for s in (0.0, 0.6, 1.0)] == [20, 8, 0]
    noise, offsets = torch.ones(1, 2, 3, 3), torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    assert ss.offset_noise(noise, offsets, 0.1).mean((2, 3)).flatten().tolist() == pytest.approx([1.1, 0.8])
    assert ss.min_snr_weight(0.4, "velocity", gamma=2.0) == pytest.approx(2 * 0.4**2)
    assert ss.min_snr_weight(0.4, "sample") == pytest.approx(0.4 / 0.6)
    assert ss.min_snr_weight(0.9, "sample") == 5


def test_no_gradient_reaches_what_a_penalty_compares_with():
    here, there = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    policy, frozen = (flow_sde(randn(2, 3, seed=2), v, 0.5, 0.4, 0.7) for v in (here, there))
    total = rg.output_anchor(here, there).sum() + rg.start_penalty([here], [there]) + rg.step_kl(policy, frozen).sum()
    moved = rg.worst_case(here, there, 0.1).sum()
    gradients = torch.autograd.grad(total + moved, (here, there), allow_unused=True)
    assert gradients[0].abs().max() > 0 and gradients[1] is None


def test_the_worst_case_stays_a_picture_and_every_saturated_value_is_counted():
    images = torch.tensor([0.0, 0.002, 1.0]).view(1, 3, 1, 1)
    moved = rg.worst_case(images, torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1), 0.1)
    assert moved.flatten().tolist() == [0.0, 0.0, 1.0]
    assert rg.saturated_fraction(torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]).view(1, 1, 1, 5)).item() == pytest.approx(0.8)


def test_crops_have_every_size_and_place_that_they_may_have():
    """On a ramp the part's lowest and highest value say where it was cut, and how large."""
    side = 64
    ramp = torch.linspace(0, 1, side).expand(300, 3, side, side)
    cut = rg.augment(ramp, range(300), crop=0.5, noise=0.0)
    low, high = cut.amin((1, 2, 3)), cut.amax((1, 2, 3))
    size = high - low
    assert 0.47 < size.min() < 0.53 and 0.97 < size.max() <= 1 and abs(size.mean() - 0.75) < 0.03
    room = 1 - size > 0.2
    place = (low / (1 - size).clamp(min=1e-3))[room]
    assert place.min() < 0.05 and place.max() > 0.95 and abs(place.mean() - 0.5) < 0.06
    down = rg.augment(ramp.transpose(2, 3), range(300), crop=0.5, noise=0.0)
    assert torch.allclose(down.amax((1, 2, 3)) - down.amin((1, 2, 3)), size, atol=0.02)
    pixels = 63 * 64 * (cut[:, 0, 0, 33] - cut[:, 0, 0, 31]) / 2  # half-pixel centres: the slope is the part's share
    assert (pixels - pixels.round()).abs().max() < 0.05
    flipped = rg.augment(ramp, range(300), crop=1.0, noise=0.0, flip=True)
    assert 0.4 < (flipped[:, 0, 0, 0] > flipped[:, 0, 0, -1]).double().mean() < 0.6


def test_the_gaussian_cut_of_few_steps_may_be_any_but_the_first():
    assert {rg.draw_cut("gaussian", 3, seeded(k)) for k in range(200)} == {1, 2}
