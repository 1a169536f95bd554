"""Steps as distributions: known values, limits, marginals on a Gaussian toy, and the schedule's checks."""

import math

import pytest
import torch

from visalign.transitions import (
    CPS,
    DDIM,
    Consistency,
    DanceSDE,
    FlowODE,
    FlowSDE,
    Gaussian,
    Schedule,
    check_transition,
    consistency_step,
    cps,
    dance_sde,
    ddim,
    dpm_solver_2m,
    flow_ddim,
    flow_ode,
    flow_sde,
    make_transition,
    ode_of,
    shift_sigmas,
    unscaled_log_prob,
    velocity_to_denoised,
    velocity_to_noise,
)
from visalign.transitions.consistency import boundary_scalings
from visalign.transitions.diffusion import prediction_to_denoised_and_noise
from visalign.transitions.flow import flow_sde_std

FLOW_KERNELS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}


def scalar(value):
    return torch.tensor([[value]], dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flow_schedule(sigmas):
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
    return Schedule("flow", timesteps=1000 * sigmas[:-1], sigmas=sigmas)


def alpha_schedule(kind, alphas=(0.05, 0.3, 0.7, 1.0), prediction_type="epsilon"):
    alphas = torch.tensor(alphas)
    return Schedule(kind, torch.arange(len(alphas) - 1, 0, -1) * 100, None, alphas, prediction_type=prediction_type)


# Known values -------------------------------------------------------------------------------------------------------


def test_predictions_of_data_noise_and_euler_at_known_values():
    x, v = scalar(1.0), scalar(0.5)
    assert velocity_to_denoised(x, v, 0.7).item() == pytest.approx(0.65, abs=1e-12)
    assert velocity_to_noise(x, v, 0.7).item() == pytest.approx(1.15, abs=1e-12)
    assert -velocity_to_noise(x, v, 0.7).item() / 0.7 == pytest.approx(-1.642857, abs=1e-6)  # the score
    assert flow_ode(x, v, 0.7, 0.6).mean.item() == pytest.approx(0.95, abs=1e-12)


@pytest.mark.parametrize(
    ("kernel", "eta", "mean", "std", "log_prob"),
    [
        (flow_sde, 0.7, 0.8560833, 0.3381321, 0.1569456),
        (dance_sde, 0.3, 0.9426071, 0.0948683, 1.3354730),
        (cps, 0.8, 0.4732217, 0.5706339, -0.6376099),
    ],
)
def test_flow_kernels_at_known_values(kernel, eta, mean, std, log_prob):
    gaussian = kernel(scalar(1.0), scalar(0.5), 0.7, 0.6, eta)
    assert gaussian.mean.item() == pytest.approx(mean, abs=6e-8)
    assert gaussian.std.item() == pytest.approx(std, abs=6e-8)
    assert gaussian.log_prob(scalar(0.9)).item() == pytest.approx(log_prob, abs=6e-8)


def test_flow_sde_diffusion_at_known_value():
    assert flow_sde_std(0.7, 0.6, 0.7) / math.sqrt(0.1) == pytest.approx(1.0692677, abs=6e-8)


def test_unscaled_log_prob_at_known_value():
    mean = cps(scalar(1.0), scalar(0.5), 0.7, 0.6, 0.8).mean
    assert unscaled_log_prob(scalar(0.9), mean).item() == pytest.approx(-0.1821397, abs=6e-8)


def test_ddim_at_known_values_and_the_ddpm_posterior():
    alpha, alpha_prev, x, eps = 0.5, 0.6, scalar(1.0), scalar(0.3)
    gaussian, denoised = ddim(x, eps, alpha, alpha_prev, eta=1.0)
    assert denoised.item() == pytest.approx(1.1142136, abs=6e-8)
    assert gaussian.std.item() == pytest.approx(0.3651484, abs=6e-8)
    assert gaussian.mean.item() == pytest.approx(1.0179855, abs=6e-8)
    assert gaussian.log_prob(scalar(0.9)).item() == pytest.approx(0.0363109, abs=6e-8)


# Limits and identities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", FLOW_KERNELS.values(), ids=FLOW_KERNELS)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.7, 0.6), (0.1, 0.0)])
def test_eta_zero_is_the_euler_step(kernel, sigma, sigma_next):
    x, v = randn(3, 4, 5, dtype=torch.float32), randn(3, 4, 5, seed=1, dtype=torch.float32)
    gaussian = kernel(x, v, sigma, sigma_next, 0.0)
    torch.testing.assert_close(gaussian.mean, x + v * (sigma_next - sigma), atol=1e-6, rtol=0)
    assert gaussian.deterministic and (gaussian.std == 0).all()


@pytest.mark.parametrize("schedule", [[1.0, 0.9, 0.0], [1.0, 0.5, 0.2, 0.0], [1.0, 0.0]])
def test_first_flow_sde_step_from_pure_noise_has_std_eta_whatever_the_schedule(schedule):
    x, v = randn(2, 6), randn(2, 6, seed=1)
    gaussian = flow_sde(x, v, *schedule[:2], eta=0.7)
    dt = schedule[1] - 1
    torch.testing.assert_close(gaussian.std, torch.full((2, 1), 0.7, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(gaussian.mean, x * (1 - 0.7**2 / 2) + v * dt, atol=1e-12, rtol=0)
    assert torch.equal(gaussian.mean, flow_sde(x, v, *schedule[:2], eta=0.7, sigma_cap=schedule[1]).mean)


def test_first_flow_sde_step_at_known_values():
    gaussian = flow_sde(scalar(1.0), scalar(1.0), 1.0, 0.9, 0.7)
    assert gaussian.std.item() / math.sqrt(0.1) == pytest.approx(2.2135944, abs=6e-8)
    assert gaussian.mean.item() == pytest.approx(0.755 - 0.1, abs=1e-12)


def test_flow_sde_and_dance_sde_agree_at_the_same_diffusion():
    x, v, sigma, sigma_next = randn(3, 7), randn(3, 7, seed=1), 0.7, 0.55
    diffusion = 0.7 * math.sqrt(sigma / (1 - sigma))
    flow, dance = flow_sde(x, v, sigma, sigma_next, 0.7), dance_sde(x, v, sigma, sigma_next, diffusion)
    torch.testing.assert_close(flow.mean, dance.mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(flow.std, dance.std, atol=1e-12, rtol=0)


def test_dance_sde_is_the_form_in_its_authors_code():
    x, v, sigma, sigma_next, eta = randn(3, 7), randn(3, 7, seed=1), 0.7, 0.55, 0.3
    dt, x0 = sigma_next - sigma, x - sigma * v
    expected = x + v * dt + 0.5 * eta**2 * (x - (1 - sigma) * x0) / sigma**2 * dt
    torch.testing.assert_close(dance_sde(x, v, sigma, sigma_next, eta).mean, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_cps_keeps_the_coefficients_of_data_and_noise(eta):
    sigma, s = 0.7, 0.6
    # Data alone (x0 = 1, noise = 0) and noise alone read off the two coefficients of the mean.
    on_data = cps(scalar(1 - sigma), scalar(-1.0), sigma, s, eta)
    on_noise = cps(scalar(sigma), scalar(1.0), sigma, s, eta)
    assert on_data.mean.item() == pytest.approx(1 - s, abs=1e-12)
    assert on_noise.mean.item() == pytest.approx(s * math.cos(eta * math.pi / 2), abs=1e-12)
    assert on_noise.mean.item() ** 2 + on_noise.std.item() ** 2 == pytest.approx(s**2, abs=1e-12)


def test_cps_last_step_is_the_denoised_estimate_and_has_no_density():
    x, v = randn(2, 5), randn(2, 5, seed=1)
    gaussian = cps(x, v, 0.1, 0.0, 0.8)
    torch.testing.assert_close(gaussian.mean, velocity_to_denoised(x, v, 0.1))
    assert gaussian.deterministic


@pytest.mark.parametrize(("alpha", "alpha_prev"), [(0.5, 0.6), (0.01, 0.3), (0.9, 0.99)])
def test_ddim_at_eta_one_is_the_ddpm_posterior(alpha, alpha_prev):
    x, eps = randn(3, 7), randn(3, 7, seed=1)
    gaussian, x0 = ddim(x, eps, alpha, alpha_prev, 1.0)
    a = alpha / alpha_prev
    mean = math.sqrt(alpha_prev) * (1 - a) / (1 - alpha) * x0 + math.sqrt(a) * (1 - alpha_prev) / (1 - alpha) * x
    torch.testing.assert_close(gaussian.mean, mean, atol=1e-12, rtol=0)
    var = (1 - a) * (1 - alpha_prev) / (1 - alpha)
    torch.testing.assert_close(gaussian.std**2, torch.full((3, 1), var, dtype=torch.float64), atol=1e-12, rtol=0)


def test_ddim_at_eta_zero_is_deterministic_ddim():
    x, eps = randn(3, 7), randn(3, 7, seed=1)
    gaussian, x0 = ddim(x, eps, 0.5, 0.6, 0.0)
    torch.testing.assert_close(gaussian.mean, math.sqrt(0.6) * x0 + math.sqrt(0.4) * eps, atol=1e-12, rtol=0)
    assert gaussian.deterministic


def test_every_prediction_type_says_the_same_of_a_noised_sample():
    x0, eps, alpha = randn(3, 7), randn(3, 7, seed=1), 0.3
    x = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * x0}
    for kind, output in outputs.items():
        denoised, noise = prediction_to_denoised_and_noise(x, output, alpha, kind)
        torch.testing.assert_close(denoised, x0, atol=1e-12, rtol=0)
        torch.testing.assert_close(noise, eps, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="prediction_type: got 'velocity'"):
        prediction_to_denoised_and_noise(x, eps, alpha, "velocity")


def test_consistency_boundary_condition():
    assert boundary_scalings(0.0) == (1.0, 0.0)
    c_skip, c_out = boundary_scalings(1.0, timestep_scaling=10.0)
    assert c_skip == pytest.approx(0.0024938, abs=6e-8) and c_out == pytest.approx(0.9987523, abs=6e-8)
    x = randn(2, 5)
    gaussian, denoised = consistency_step(x, randn(2, 5, seed=1), 0.0, 0.9, 1.0)
    assert torch.equal(denoised, x) and torch.equal(gaussian.mean, x) and gaussian.deterministic


def test_consistency_step_renoises_the_denoised_estimate():
    x, eps = randn(2, 5), randn(2, 5, seed=1)
    gaussian, denoised = consistency_step(x, eps, 0.1, 0.3, 0.6)
    c_skip, c_out = 0.25 / (1 + 0.25), 1 / math.sqrt(1.25)  # scaled timestep 10 * 0.1
    f = c_out * (x - math.sqrt(0.7) * eps) / math.sqrt(0.3) + c_skip * x
    torch.testing.assert_close(denoised, f)
    torch.testing.assert_close(gaussian.mean, math.sqrt(0.6) * f)
    torch.testing.assert_close(gaussian.std, torch.full((2, 1), math.sqrt(0.4), dtype=torch.float64))


def test_consistency_at_eta_zero_is_ddim_through_the_denoised_estimate():
    x, eps = randn(2, 5), randn(2, 5, seed=1)
    gaussian, f = consistency_step(x, eps, 500.0, 0.3, 0.6, eta=0.0)
    expected, _ = ddim(x, f, 0.3, 0.6, 0.0, "sample")
    torch.testing.assert_close(gaussian.mean, expected.mean)
    assert gaussian.deterministic


def test_shift_three_moves_one_half_to_three_quarters():
    shifted = shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 3.0)
    assert shifted.tolist() == [1.0, 0.75, 0.0]


# The Gaussian -------------------------------------------------------------------------------------------------------


def test_log_prob_of_own_samples_has_the_entropy_as_mean_and_narrows_with_the_dimension():
    n, d, std = 4000, 256, 0.3
    gaussian = Gaussian.of(randn(n, d), std)
    values = gaussian.log_prob(gaussian.sample(randn(n, d, seed=1)))
    assert values.mean().item() == pytest.approx(-0.5 - math.log(std) - 0.5 * math.log(2 * math.pi), abs=3e-3)
    assert values.std().item() == pytest.approx(math.sqrt(1 / (2 * d)), rel=0.05)


def test_log_prob_is_that_of_torch_and_sum_is_mean_times_the_dimension():
    gaussian, x = Gaussian.of(randn(3, 2, 4), 0.4), randn(3, 2, 4, seed=1)
    expected = torch.distributions.Normal(gaussian.mean, 0.4).log_prob(x)
    torch.testing.assert_close(gaussian.log_prob(x), expected.mean(dim=(1, 2)))
    torch.testing.assert_close(gaussian.log_prob(x, reduction="sum"), expected.sum(dim=(1, 2)))


def test_kl_is_that_of_torch_and_zero_with_zero_gradient_to_itself():
    mean = randn(3, 8).requires_grad_()
    policy, reference = Gaussian.of(mean, 0.4), Gaussian.of(randn(3, 8, seed=1), 0.4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(policy.mean, 0.4), normal(reference.mean, 0.4))
    torch.testing.assert_close(policy.kl(reference), expected.mean(dim=1))
    own = policy.kl(Gaussian.of(mean.detach(), 0.4))
    assert (own == 0).all()
    (gradient,) = torch.autograd.grad(own.sum(), mean)
    assert (gradient == 0).all()


def test_a_deterministic_step_has_no_density():
    gaussian = flow_ode(randn(2, 3), randn(2, 3, seed=1), 0.7, 0.6)
    with pytest.raises(ValueError, match=r"log_prob: got a deterministic step \(std 0\), expected std > 0"):
        gaussian.log_prob(gaussian.mean)
    with pytest.raises(ValueError, match="kl: got a deterministic step"):
        gaussian.kl(gaussian)
    assert torch.equal(gaussian.sample(randn(2, 3, seed=2)), gaussian.mean)


def test_gaussian_rejects_wrong_shapes_and_reductions():
    gaussian = Gaussian.of(randn(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"x: got shape \(1, 3\), expected \(2, 3\)"):
        gaussian.log_prob(randn(1, 3))
    with pytest.raises(ValueError, match="reduction: got 'none'"):
        gaussian.log_prob(randn(2, 3), reduction="none")


def test_unscaled_log_prob_is_zero_at_the_mean_and_its_gradient_is_two_errors_over_d():
    x, mean = randn(2, 8), randn(2, 8, seed=1).requires_grad_()
    assert (unscaled_log_prob(mean.detach(), mean) == 0).all()
    (gradient,) = torch.autograd.grad(unscaled_log_prob(x, mean).sum(), mean)
    torch.testing.assert_close(gradient, 2 * (x - mean.detach()) / 8)


# Marginals, on data N(2, 0.5^2) with the exact velocity: kernels are affine in x, so two moments propagate exactly --


M, S0 = 2.0, 0.5


def exact_velocity(x, sigma, mean=M, spread=S0):
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    return (sigma - (1 - sigma) * spread**2) / variance * (x - (1 - sigma) * mean) - mean


def propagate(kernel, sigmas, mean, variance, **data):
    """Mean and variance after the steps, and the variances on the way."""
    variances = []
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        gaussian = kernel(probes, exact_velocity(probes, sigma, **data), sigma, sigma_next)
        offset, slope = gaussian.mean[0].item(), (gaussian.mean[1] - gaussian.mean[0]).item()
        mean, variance = offset + slope * mean, slope**2 * variance + gaussian.std[0].item() ** 2
        variances.append(variance)
    return mean, variance, variances


def marginal(sigma):
    return (1 - sigma) * M, (1 - sigma) ** 2 * S0**2 + sigma**2


@pytest.mark.parametrize(
    ("kernel", "errors"),
    [
        (lambda *a: flow_sde(*a, eta=0.7), [0.0121, 0.0044, 0.0019, 0.00088, 0.00042]),
        (lambda *a: dance_sde(*a, eta=0.3), [-0.0030, -0.0015, -0.00076, -0.00038, -0.00019]),
    ],
    ids=["flow_sde", "dance_sde"],
)
def test_sde_marginals_converge_at_first_order(kernel, errors):
    for n, expected in zip((1, 2, 4, 8, 16), errors):
        sigmas = torch.linspace(0.7, 0.6, n + 1, dtype=torch.float64).tolist()
        mean, variance, _ = propagate(kernel, sigmas, *marginal(sigmas[0]))
        exact_mean, exact_variance = marginal(sigmas[-1])
        digits = 5.1e-5 if abs(expected) >= 0.001 else 5.1e-6
        assert math.sqrt(variance) - math.sqrt(exact_variance) == pytest.approx(expected, abs=digits)
        assert mean == pytest.approx(exact_mean, abs=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stds"),
    [
        (flow_ode, {10: 0.4308, 40: 0.4818, 2560: 0.4997}),
        (lambda *a: flow_sde(*a, eta=0.7), {10: 0.4795, 40: 0.4974, 2560: 0.5007}),
        (lambda *a: dance_sde(*a, eta=0.3), {10: 0.4416, 40: 0.4846, 2560: 0.4998}),
        (lambda *a: cps(*a, eta=0.8), {10: 0.3518, 40: 0.3861, 2560: 0.4036}),
        (lambda *a: cps(*a, eta=1.0), {10: 0.3085, 40: 0.3366, 2560: 0.3526}),
    ],
    ids=["ode", "flow_sde", "dance_sde", "cps_0.8", "cps_1.0"],
)
def test_full_chain_gives_the_known_spread_and_the_exact_mean(kernel, stds):
    for steps, expected in stds.items():
        sigmas = [1 - i / steps for i in range(steps)] + [0.0]
        mean, variance, _ = propagate(kernel, sigmas, 0.0, 1.0)
        assert math.sqrt(variance) == pytest.approx(expected, abs=5.1e-5)
        assert mean == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("steps", [4, 10])
def test_cps_has_exactly_the_noise_level_of_the_schedule_on_point_data(eta, steps):
    sigmas = [1 - i / steps for i in range(steps)] + [0.0]
    _, _, variances = propagate(lambda *a: cps(*a, eta=eta), sigmas, 0.0, 1.0, spread=0.0)
    for variance, sigma in zip(variances, sigmas[1:]):
        assert math.sqrt(variance) == pytest.approx(sigma, abs=1e-9)


@pytest.mark.parametrize(
    ("kernel", "after", "left"),
    [
        (lambda *a: flow_sde(*a, eta=0.7), {1: 1.065, 5: 1.119, 9: 1.381}, 0.083),
        (lambda *a: dance_sde(*a, eta=0.3), {1: 1.001, 5: 1.007, 9: 1.255}, 0.110),
    ],
    ids=["flow_sde", "dance_sde"],
)
def test_sdes_carry_excess_noise_on_point_data(kernel, after, left):
    sigmas = [1 - i / 10 for i in range(10)] + [0.0]
    _, variance, variances = propagate(kernel, sigmas, 0.0, 1.0, spread=0.0)
    for step, excess in after.items():
        assert math.sqrt(variances[step - 1]) / sigmas[step] == pytest.approx(excess, abs=5.1e-4)
    assert math.sqrt(variance) == pytest.approx(left, abs=5.1e-4)


# DPM-Solver++(2M) ---------------------------------------------------------------------------------------------------


def solve(steps, second_order):
    """Error at sigma .05 from x = 1.3 at .95; on Gaussian data the ODE scales (x - mean) with the marginal std."""
    sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64).tolist()
    x = scalar(1.3)
    previous, sigma_prev = None, None
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        denoised = velocity_to_denoised(x, exact_velocity(x, sigma), sigma)
        x = dpm_solver_2m(x, denoised, previous, sigma_prev, sigma, sigma_next)
        previous, sigma_prev = (denoised, sigma) if second_order else (None, None)
    (mean_0, variance_0), (mean_1, variance_1) = marginal(0.95), marginal(0.05)
    return x.item() - mean_1 - (1.3 - mean_0) * math.sqrt(variance_1 / variance_0)


def test_dpm_solver_converges_at_second_order_and_at_first_without_history():
    second, first = [0.0289, 0.0083, 0.0020, 0.00047, 0.00011], [-0.0700, -0.0360, -0.0182, -0.0092, -0.0046]
    for steps, error_2, error_1 in zip((10, 20, 40, 80, 160), second, first):
        assert solve(steps, True) == pytest.approx(error_2, abs=5.1e-5 if error_2 >= 0.001 else 5.1e-6)
        assert solve(steps, False) == pytest.approx(error_1, abs=5.1e-5)
    order = math.log2(solve(80, True) / solve(160, True))
    assert order == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.7, 0.6), (0.1, 0.0)])
def test_dpm_solver_without_history_is_the_euler_step(sigma, sigma_next):
    x, v = randn(3, 7), randn(3, 7, seed=1)
    step = dpm_solver_2m(x, velocity_to_denoised(x, v, sigma), None, None, sigma, sigma_next)
    torch.testing.assert_close(step, flow_ode(x, v, sigma, sigma_next).mean, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sigmas", [(1.0, 0.9, 0.8), (0.3, 0.2, 0.0)])
def test_dpm_solver_is_first_order_where_a_log_snr_is_infinite(sigmas):
    x, m0, m1 = randn(2, 5), randn(2, 5, seed=1), randn(2, 5, seed=2)
    first = dpm_solver_2m(x, m0, None, None, *sigmas[1:])
    assert torch.equal(dpm_solver_2m(x, m0, m1, *sigmas), first)
    assert first.isfinite().all()


def test_dpm_solver_wants_the_sigma_of_its_history():
    x = randn(2, 5)
    with pytest.raises(ValueError, match="sigma_prev: got None, expected within"):
        dpm_solver_2m(x, x, x, None, 0.5, 0.4)


# Schedules and transitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1 - 5e-7, 0.5, 0.0], "expected exactly 1 or at most"),
        ([1.0, 0.5, 0.1], "expected at most 1 to exactly 0"),
        ([1.5, 0.5, 0.0], "expected at most 1 to exactly 0"),
        ([1.0, 0.5, 0.5, 0.0], "expected strictly falling"),
        ([1.0, float("nan"), 0.0], "expected finite"),
    ],
)
def test_bad_sigmas_are_rejected(sigmas, message):
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"sigmas: got .*{message}"):
        Schedule("flow", timesteps=sigmas[:-1] * 1000, sigmas=sigmas)


def test_schedules_reject_what_does_not_go_together():
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="kind: got 'karras'"):
        Schedule("karras", sigmas[:-1], sigmas)
    with pytest.raises(ValueError, match="prediction_type: got 'epsilon'"):
        Schedule("flow", sigmas[:-1], sigmas, prediction_type="epsilon")
    with pytest.raises(ValueError, match="sigmas: got None"):
        Schedule("flow", sigmas[:-1])
    with pytest.raises(ValueError, match="sigmas: got 3 levels for 3 timesteps"):
        Schedule("flow", sigmas, sigmas)
    with pytest.raises(ValueError, match="alphas_cumprod: got .*never falling"):
        alpha_schedule("diffusion", (0.5, 0.3, 1.0))
    with pytest.raises(ValueError, match="alphas_cumprod: got 0 with epsilon"):
        alpha_schedule("diffusion", (0.0, 0.3, 1.0))
    assert alpha_schedule("diffusion", (0.0, 0.3, 1.0), "v_prediction").num_steps == 2


@pytest.mark.parametrize("transition", [FlowODE(), FlowSDE(), DanceSDE(), CPS(), DDIM(), Consistency()])
def test_a_transition_says_its_std_beforehand_and_whether_it_is_stochastic(transition):
    schedules = {"ddim": alpha_schedule("diffusion"), "consistency": alpha_schedule("consistency")}
    schedule = schedules.get(transition.name, flow_schedule([1.0, 0.8, 0.5, 0.0]))
    x, prediction = randn(2, 3, 4, dtype=torch.float32), randn(2, 3, 4, seed=1, dtype=torch.float32)
    stds = []
    for i in range(schedule.num_steps):
        gaussian, denoised = transition(schedule, i, x, prediction)
        stds.append(transition.std(schedule, i))
        assert gaussian.std.shape == (2, 1, 1) and denoised.shape == x.shape
        torch.testing.assert_close(gaussian.std, torch.full((2, 1, 1), stds[-1]))
        assert gaussian.deterministic == (stds[-1] == 0)
    assert transition.stochastic == any(stds)
    assert make_transition(transition.name) == transition
    with pytest.raises(ValueError, match="step_index: got 3, expected 0 .. 2"):
        transition(schedule, 3, x, prediction)


def test_consistency_returns_the_denoised_estimate_at_the_last_step_whatever_the_last_level():
    schedule = alpha_schedule("consistency", (0.05, 0.3, 0.7, 0.9))
    gaussian, denoised = Consistency()(schedule, 2, randn(2, 3), randn(2, 3, seed=1))
    assert gaussian.deterministic and torch.equal(gaussian.mean, denoised)


def test_options_reach_the_transition_and_misspelt_ones_name_the_nearest():
    assert make_transition("cps", eta=0.5) == CPS(eta=0.5)
    with pytest.raises(ValueError, match="transition: got 'flow_sd', .*did you mean 'flow_sde'"):
        make_transition("flow_sd")
    with pytest.raises(ValueError, match="option of 'cps': got 'etta', .*did you mean 'eta'"):
        make_transition("cps", etta=0.5)


def test_a_transition_refuses_another_kind_of_schedule():
    with pytest.raises(ValueError, match="schedule: got kind 'diffusion', expected 'flow'"):
        FlowSDE().std(alpha_schedule("diffusion"), 0)


def test_ode_of_each_kind_is_deterministic():
    for schedule in (flow_schedule([1.0, 0.5, 0.0]), alpha_schedule("diffusion"), alpha_schedule("consistency")):
        assert not ode_of(schedule).stochastic
        assert all(ode_of(schedule).std(schedule, i) == 0 for i in range(schedule.num_steps))


@pytest.mark.parametrize("kernel", FLOW_KERNELS.values(), ids=FLOW_KERNELS)
def test_maths_is_in_float32_for_narrow_inputs_and_float64_is_kept(kernel):
    x, v = randn(2, 5), randn(2, 5, seed=1)
    assert kernel(x, v, 0.7, 0.6).mean.dtype == torch.float64
    narrow = kernel(x.bfloat16(), v.bfloat16(), 0.7, 0.6)
    assert narrow.mean.dtype == torch.float32
    torch.testing.assert_close(narrow.mean, kernel(x.bfloat16().double(), v.bfloat16().double(), 0.7, 0.6).mean.float())


def test_steps_reject_wrong_order_shape_and_strength():
    x = randn(2, 5)
    with pytest.raises(ValueError, match="sigma, sigma_next: got 0.5, 0.6"):
        flow_ode(x, x, 0.5, 0.6)
    with pytest.raises(ValueError, match=r"prediction: got shape \(1, 5\)"):
        flow_sde(x, x[:1], 0.5, 0.4)
    with pytest.raises(ValueError, match="eta: got 1.5"):
        cps(x, x, 0.5, 0.4, 1.5)
    with pytest.raises(ValueError, match="eta: got -1"):
        dance_sde(x, x, 0.5, 0.4, -1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_ddim_at_known_values(eta):
    """At sigma 0.6 and 0.4: x0 = x - 0.6 v, noise = x + 0.4 v, and the posterior's variance."""
    x, v = randn(1, 4), randn(1, 4, seed=1)
    std = eta * 0.4 * math.sqrt(1 - (0.4 * 0.4 / (0.6 * 0.6)) ** 2)
    step = flow_ddim(x, v, 0.6, 0.4, eta)
    torch.testing.assert_close(step.mean, 0.6 * (x - 0.6 * v) + math.sqrt(0.16 - std**2) * (x + 0.4 * v))
    assert step.std.item() == pytest.approx(std)


def test_names_of_transitions_are_checked_before_anything_runs():
    check_transition("sampler", "cps", ["cps", "ddim"])
    with pytest.raises(ValueError, match="sampler: got 'cpd', .*did you mean 'cps'"):
        check_transition("sampler", "cpd", ["cps", "ddim"])
    with pytest.raises(ValueError, match="sampler: "):
        check_transition("sampler", "missing_file.py:Step", ["cps", "ddim"])


def test_a_consistency_step_between_the_extremes_fills_the_noise_level_as_ddim_does():
    """Half of the noise is drawn; the mean has sqrt(1 - 1/4) of that which the estimate implies."""
    x, output = randn(1, 4), randn(1, 4, seed=1)
    step, denoised = consistency_step(x, output, 0.05, 0.3, 0.6, eta=0.5)
    implied = (x - math.sqrt(0.3) * denoised) / math.sqrt(0.7)
    torch.testing.assert_close(step.mean, math.sqrt(0.6) * denoised + math.sqrt(0.4 * 0.75) * implied)
    assert step.std.item() == pytest.approx(0.5 * math.sqrt(0.4))


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps", "flow_ddim", "ddim"])
def test_a_step_without_eta_is_not_stochastic(name):
    assert not make_transition(name, eta=0.0).stochastic and make_transition(name, eta=1e-3).stochastic
