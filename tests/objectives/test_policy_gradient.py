"""Policy-gradient losses: known values, where the gradient vanishes, ratios and KL."""

import math

import pytest
import torch

from visalign.advantages.group import group_advantages
from visalign.objectives.policy_gradient import (
    clipped_loss,
    clipped_surrogate,
    flow_grpo_kl_dt,
    kl_penalty,
    ppo_stats,
    ratio_norm_log_ratio,
    step_weights,
    tempflow_weights,
)
from visalign.transitions import Gaussian, cps, flow_ode, flow_sde
from visalign.transitions.flow import cps_std, flow_sde_std

STD = flow_sde_std(0.7, 0.6, 0.7)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# The clipped surrogate ----------------------------------------------------------------------------------------------


def test_loss_is_minus_the_advantage_before_the_first_update():
    log_prob, advantages = randn(6).requires_grad_(), randn(6, seed=1)
    loss, stats = clipped_surrogate(log_prob, log_prob.detach().clone(), advantages, 1e-4)
    assert torch.equal(loss, -advantages)
    assert stats["ratio_mean"] == 1 and stats["ratio_std"] == 0 and stats["approx_kl"] == 0
    assert stats["clip_fraction"] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    torch.testing.assert_close(gradient, -advantages)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [
        (1.0, 1.3, -1.2, False),  # good sample, already more likely: clipped
        (1.0, 1.1, -1.1, True),
        (1.0, 0.5, -0.5, True),
        (-1.0, 0.5, 0.8, False),  # bad sample, already less likely: clipped
        (-1.0, 0.9, 0.9, True),
        (-1.0, 1.3, 1.3, True),
    ],
)
def test_gradient_vanishes_only_where_the_sample_has_moved_its_way(advantage, ratio, loss, has_gradient):
    log_prob = tensor(math.log(ratio) - 2.0).requires_grad_()
    value, _ = clipped_surrogate(log_prob, tensor(-2.0), tensor(advantage), 0.2)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    assert gradient.item() == pytest.approx(-advantage * ratio if has_gradient else 0.0, abs=1e-12)


def test_stats_count_clipped_samples_by_sign():
    log_ratio, advantages = tensor(1.5, 1.5, 0.5, 0.5, 1.0).log(), tensor(1.0, -1.0, -1.0, 1.0, 1.0)
    stats = ppo_stats(log_ratio, advantages, 0.2)
    assert stats["clip_fraction_positive"].item() == stats["clip_fraction_negative"].item() == pytest.approx(0.2)
    assert stats["clip_fraction"].item() == pytest.approx(0.4)
    assert stats["ratio_mean"].item() == pytest.approx(1.0)
    assert stats["ratio_std"].item() == pytest.approx(math.sqrt(0.2))
    assert stats["approx_kl"].item() == pytest.approx((2 * math.log(1.5) ** 2 + 2 * math.log(2) ** 2) / 10)
    assert all(
        not value.requires_grad for value in clipped_loss(log_ratio.requires_grad_(), advantages, 0.2)[1].values()
    )


def test_a_group_of_equal_rewards_gives_no_gradient():
    log_prob = randn(4).requires_grad_()
    advantages = group_advantages(torch.tensor([0.3] * 4), torch.zeros(4, dtype=torch.int64), std="global")
    loss, _ = clipped_surrogate(log_prob, randn(4, seed=1), advantages, 1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert (gradient == 0).all()


def test_dropping_samples_of_zero_advantage_changes_no_gradient():
    log_prob, old, advantages = randn(6).requires_grad_(), randn(6, seed=1), tensor(1, 0, -2, 0, 0.5, 0)
    kept = advantages != 0
    (whole,) = torch.autograd.grad(clipped_surrogate(log_prob, old, advantages, 5.0)[0].sum(), log_prob)
    loss, _ = clipped_surrogate(log_prob[kept], old[kept], advantages[kept], 5.0)
    assert torch.equal(whole, torch.autograd.grad(loss.sum(), log_prob)[0])
    assert (whole != 0).any()


def test_order_of_steps_does_not_change_the_sum_of_losses():
    log_prob, old, advantages = randn(10, 4), randn(10, 4, seed=1), randn(4, seed=2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))

    def total(steps):
        return sum(clipped_surrogate(log_prob[i], old[i], advantages, 0.2)[0].sum() for i in steps)

    torch.testing.assert_close(total(range(10)), total(order.tolist()), atol=1e-12, rtol=0)


def test_surrogate_rejects_wrong_shapes_and_ranges():
    with pytest.raises(ValueError, match=r"log_ratio, advantages: got shapes \(4,\), \(4, 1\)"):
        clipped_loss(randn(4), randn(4, 1), 0.2)
    with pytest.raises(ValueError, match="clip_range: got 0"):
        clipped_loss(randn(4), randn(4), 0)


# GRPO-Guard ---------------------------------------------------------------------------------------------------------


def guard(shift, noise, std=STD):
    """Plain and normalised log-ratios (N,) of a mean moved by `shift`, at actions old_mean + std * noise."""
    old_mean = randn(*shift.shape, seed=9)
    old, new = Gaussian.of(old_mean, std), Gaussian.of(old_mean + shift, std)
    x = old.sample(noise)
    log_prob, old_log_prob = new.log_prob(x.detach()), old.log_prob(x)
    return log_prob - old_log_prob, ratio_norm_log_ratio(log_prob, old_log_prob, new.mean, old_mean, std)


def test_normalised_and_plain_log_ratio_at_known_values():
    plain, normalised = guard(tensor(0.01, 0.02, 0, -0.01)[None], tensor(1, -1, 0.5, 0)[None], std=0.3381321)
    assert normalised.item() == pytest.approx(-0.0025, abs=1e-9)
    assert plain.item() == pytest.approx(-0.0080495, abs=6e-8)


def test_normalised_log_ratio_is_the_mean_of_noise_times_shift_per_sample():
    shift, noise = 0.1 * randn(5, 3, 4), randn(5, 3, 4, seed=1)
    _, normalised = guard(shift, noise)
    torch.testing.assert_close(normalised, (noise * shift).mean(dim=(1, 2)), atol=1e-9, rtol=0)


def test_normalised_log_ratio_has_zero_mean_and_the_plain_one_sinks():
    shift = (0.2 * randn(1, 16)).expand(40_000, 16)
    plain, normalised = guard(shift, randn(40_000, 16, seed=1))
    sink = -(shift[0] ** 2).mean().item() / (2 * STD**2)
    standard_error = math.sqrt((shift[0] ** 2).mean().item() / 16 / 40_000)
    assert abs(normalised.mean().item()) < 4 * standard_error
    assert plain.mean().item() == pytest.approx(sink, abs=4 * standard_error / STD)
    assert sink < -20 * standard_error


def test_gradient_of_the_normalised_ratio_at_the_old_weights_is_std_times_the_plain_one():
    shift = torch.zeros(5, 8, dtype=torch.float64, requires_grad=True)
    plain, normalised = guard(shift, randn(5, 8, seed=1))
    assert (normalised == 0).all()
    advantages = randn(5, seed=2)
    (plain_gradient,) = torch.autograd.grad(clipped_loss(plain, advantages, 1e-4)[0].sum(), shift, retain_graph=True)
    (gradient,) = torch.autograd.grad(clipped_loss(normalised, advantages, 1e-4)[0].sum(), shift)
    torch.testing.assert_close(gradient, STD * plain_gradient)
    assert gradient.abs().max() > 0


def test_std_may_be_a_number_or_one_per_sample():
    log_prob, old, mean, old_mean = randn(3), randn(3, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3)
    expected = ratio_norm_log_ratio(log_prob, old, mean, old_mean, 0.4)
    for shape in ((3,), (3, 1)):
        std = torch.full(shape, 0.4, dtype=torch.float64)
        torch.testing.assert_close(ratio_norm_log_ratio(log_prob, old, mean, old_mean, std), expected)
    with pytest.raises(ValueError, match=r"std: got shape \(2,\), expected 3 elements"):
        ratio_norm_log_ratio(log_prob, old, mean, old_mean, torch.ones(2))
    with pytest.raises(ValueError, match="std: got 0"):
        ratio_norm_log_ratio(log_prob, old, mean, old_mean, 0)


# KL to the reference ------------------------------------------------------------------------------------------------


def two_policies(sigma=0.7, sigma_next=0.6, eta=0.7):
    x, v, v_ref = randn(3, 8), randn(3, 8, seed=1).requires_grad_(), randn(3, 8, seed=2)
    policy, reference = flow_sde(x, v, sigma, sigma_next, eta), flow_sde(x, v_ref, sigma, sigma_next, eta)
    return v, v_ref, policy, reference


def test_kl_at_known_values():
    x = tensor(1.0)[None]
    policy = flow_sde(x, tensor(0.5)[None], 0.7, 0.6, 0.7)
    reference = flow_sde(x, tensor(0.6)[None], 0.7, 0.6, 0.7)
    assert (policy.mean - reference.mean).item() == pytest.approx(0.01245, abs=6e-8)
    assert kl_penalty("gaussian", policy, reference).item() == pytest.approx(6.778535e-4, abs=6e-11)
    assert kl_penalty("flow_grpo", policy, reference, dt=-0.1).item() == pytest.approx(6.778535e-5, abs=6e-12)


@pytest.mark.parametrize(("sigma", "sigma_next", "eta"), [(0.7, 0.6, 0.7), (0.95, 0.9, 0.3), (0.2, 0.1, 1.0)])
def test_true_kl_is_the_closed_form_of_the_velocities(sigma, sigma_next, eta):
    v, v_ref, policy, reference = two_policies(sigma, sigma_next, eta)
    diffusion, dt = eta * math.sqrt(sigma / (1 - sigma)), sigma - sigma_next
    factor = dt / 2 * (diffusion * (1 - sigma) / (2 * sigma) + 1 / diffusion) ** 2
    expected = factor * ((v - v_ref) ** 2).mean(dim=1)
    torch.testing.assert_close(kl_penalty("gaussian", policy, reference), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(kl_penalty("flow_grpo", policy, reference, dt=-dt), dt * expected)


def test_x_and_v_kinds_are_squared_differences():
    v, v_ref, policy, reference = two_policies()
    kl_x = kl_penalty("x", policy, reference)
    torch.testing.assert_close(kl_x, ((policy.mean - reference.mean) ** 2).mean(dim=1))
    torch.testing.assert_close(kl_x, 2 * STD**2 * kl_penalty("gaussian", policy, reference))
    kl_v = kl_penalty("v", policy, reference, prediction=v, ref_prediction=v_ref)
    torch.testing.assert_close(kl_v, ((v - v_ref) ** 2).mean(dim=1))


@pytest.mark.parametrize("kind", ["gaussian", "flow_grpo", "x", "v"])
def test_kl_to_itself_is_zero_with_zero_gradient_and_otherwise_has_one(kind):
    v, v_ref, policy, reference = two_policies()

    def penalty(other, other_prediction):
        extra = {"dt": -0.1} if kind == "flow_grpo" else {}
        if kind == "v":
            extra = {"prediction": v, "ref_prediction": other_prediction}
        value = kl_penalty(kind, policy, other, **extra)
        return value, torch.autograd.grad(value.sum(), v, retain_graph=True)[0]

    value, gradient = penalty(policy, v)
    assert (value == 0).all() and (gradient == 0).all()
    value, gradient = penalty(reference, v_ref)
    assert value.shape == (3,) and (value > 0).all() and gradient.abs().min() > 0


def test_no_gradient_reaches_the_reference():
    x, v, v_ref = randn(3, 8), randn(3, 8, seed=1).requires_grad_(), randn(3, 8, seed=2).requires_grad_()
    value = kl_penalty("gaussian", flow_sde(x, v, 0.7, 0.6), flow_sde(x, v_ref, 0.7, 0.6)).sum()
    gradient, ref_gradient = torch.autograd.grad(value, (v, v_ref), allow_unused=True)
    assert gradient.abs().max() > 0 and ref_gradient is None


def test_kl_is_finite_at_every_stochastic_step_and_refused_at_others():
    sigmas = [1 - i / 10 for i in range(10)] + [0.0]
    x, v, v_ref = randn(3, 8), randn(3, 8, seed=1), randn(3, 8, seed=2)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        kl = kl_penalty("gaussian", flow_sde(x, v, sigma, sigma_next), flow_sde(x, v_ref, sigma, sigma_next))
        assert kl.isfinite().all() and (kl > 0).all()
    with pytest.raises(ValueError, match="kl: got a deterministic step"):
        kl_penalty("gaussian", flow_ode(x, v, 0.7, 0.6), flow_ode(x, v_ref, 0.7, 0.6))


def test_kl_takes_exactly_the_arguments_of_its_kind():
    v, v_ref, policy, reference = two_policies()
    with pytest.raises(ValueError, match="kind: got 'gausian', .*did you mean 'gaussian'"):
        kl_penalty("gausian", policy, reference)
    with pytest.raises(ValueError, match="dt: got None"):
        kl_penalty("flow_grpo", policy, reference)
    with pytest.raises(ValueError, match="dt: got -0.1"):
        kl_penalty("gaussian", policy, reference, dt=-0.1)
    with pytest.raises(ValueError, match="prediction, ref_prediction: expected both"):
        kl_penalty("v", policy, reference, prediction=v)
    with pytest.raises(ValueError, match="prediction, ref_prediction: expected both"):
        kl_penalty("x", policy, reference, prediction=v, ref_prediction=v_ref)


# TempFlow -----------------------------------------------------------------------------------------------------------


def test_tempflow_weights_have_mean_one_and_follow_the_std():
    sigmas = [1 - i / 10 for i in range(10)] + [0.0]
    stds = [flow_sde_std(*pair, 0.7) for pair in zip(sigmas, sigmas[1:])]
    weights = tempflow_weights(stds)
    assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-12)
    assert weights[0] / weights[4] == pytest.approx(stds[0] / stds[4], abs=1e-12)
    assert tempflow_weights([0.3] * 7) == pytest.approx([1.0] * 7)
    assert tempflow_weights([cps_std(*pair) for pair in zip(sigmas, sigmas[1:])])[-1] == 0
    with pytest.raises(ValueError, match="stds: got"):
        tempflow_weights([0.0, 0.0])


def test_weights_of_steps_by_name():
    levels, stds = [1.0, 0.75, 0.25, 0.0], [0.5, 0.3, 0.1]
    assert step_weights("none", stds, levels) == [1.0, 1.0, 1.0]
    assert step_weights("inverse_dt", stds, levels) == [4.0, 2.0, 4.0]
    assert step_weights("tempflow", stds, levels) == tempflow_weights(stds)
    with pytest.raises(ValueError, match="kind: got 'dt', expected one of"):
        step_weights("dt", stds, levels)


def test_clip_fraction_counts_each_side_where_its_gradient_is_cut():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    stats = ppo_stats(log_ratio, advantages, 0.1)
    assert stats["clip_fraction_positive"].item() == pytest.approx(0.2)  # A > 0, ratio above: the first
    assert stats["clip_fraction_negative"].item() == pytest.approx(0.2)  # A < 0, ratio below: the third
    assert ppo_stats(log_ratio[3:4], advantages[3:4], 0.1)["clip_fraction"].item() == 0  # A > 0, ratio below


def test_stats_do_not_count_what_lies_on_the_bound_nor_what_has_no_advantage():
    """At the bound the clamp still passes the gradient; without an advantage there is none to cut."""
    on = ppo_stats(tensor(math.log(1.5), math.log(0.5)), tensor(1.0, -1.0), 0.5)
    assert on["clip_fraction_positive"] == on["clip_fraction_negative"] == 0
    none = ppo_stats(tensor(math.log(3.0), math.log(0.1)), tensor(0.0, 0.0), 0.5)
    assert none["clip_fraction_positive"] == none["clip_fraction_negative"] == 0
    mild = ppo_stats(tensor(math.log(0.1), math.log(3.0)), tensor(0.5, -0.5), 0.5)
    assert mild["clip_fraction"] == 0


@pytest.mark.parametrize("bound, advantage", [(0.3, -1.0), (0.3, 2.0), (0.05, -2.0)])
def test_the_two_bounds_of_the_ratio_lie_at_equal_distances_of_1(bound, advantage):
    ratios = tensor(0.2, 0.9, 1.02, 1.2, 2.0)
    advantages = torch.full_like(ratios, advantage)
    loss, _ = clipped_loss(ratios.log(), advantages, bound)
    wanted = [-min(r * advantage, min(max(r, 1 - bound), 1 + bound) * advantage) for r in ratios.tolist()]
    assert loss.tolist() == pytest.approx(wanted)


def test_no_gradient_reaches_what_was_sampled_before():
    log_prob, old, advantages = (randn(3, seed=k).requires_grad_() for k in range(3))
    mean, old_mean, reference = (randn(3, 4, seed=k).requires_grad_() for k in range(3))
    loss, stats = clipped_surrogate(log_prob, old, advantages, 0.2)
    loss = loss.sum() + ratio_norm_log_ratio(log_prob, old, mean, old_mean, 0.4).sum()
    policy = Gaussian.of(mean, 0.5)
    loss = loss + kl_penalty("x", policy, Gaussian.of(reference, 0.5)).sum()
    loss = loss + kl_penalty("v", policy, policy, prediction=mean, ref_prediction=reference).sum()
    gradients = torch.autograd.grad(loss, (log_prob, mean, old, advantages, old_mean, reference), allow_unused=True)
    assert [g is None for g in gradients] == [False, False, True, True, True, True]
    assert not any(value.requires_grad for value in ppo_stats(log_prob, advantages, 0.2).values())


def test_flow_grpos_kl_is_its_codes_for_the_sde_and_for_cps():
    """mean_d (mean - mean_ref)^2 / (2 std_dev_t^2), std_dev_t the SDE's diffusion, and cps's whole spread."""
    x, v, w = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, sigma_next = 0.6, 0.5
    for name, step, spread in (
        ("flow_sde", lambda u: flow_sde(x, u, sigma, sigma_next, 0.7), 0.7 * math.sqrt(0.6 / 0.4)),
        ("cps", lambda u: cps(x, u, sigma, sigma_next, 0.8), 0.5 * math.sin(0.8 * math.pi / 2)),
    ):
        policy, base = step(v), step(w)
        dt = flow_grpo_kl_dt(name, sigma, sigma_next)
        expected = ((policy.mean - base.mean) ** 2).mean(1) / (2 * spread**2)
        torch.testing.assert_close(kl_penalty("flow_grpo", policy, base, dt=dt), expected)
