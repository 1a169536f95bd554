"""Any Gaussian path, and the variance-preserving one: known answers, finite differences, inverses."""

import math

import pytest
import torch

from visalign.transitions import Schedule
from visalign.transitions.consistency import boundary_scalings
from visalign.transitions.interpolant import (
    denoised_to_prediction,
    flow_time,
    path_at,
    path_denoised,
    path_score,
    renoise,
    vp_path,
    vp_rates,
    vp_sde_step,
    vp_time,
    vp_time_grid,
)

X0, NOISE = torch.tensor([[0.3, -1.2]], dtype=torch.float64), torch.tensor([[-0.7, 0.4]], dtype=torch.float64)


def schedule(kind, prediction_type):
    levels = torch.tensor([0.8, 0.3, 0.0]) if kind == "flow" else torch.tensor([0.2, 0.7, 0.9])
    name = "sigmas" if kind == "flow" else "alphas_cumprod"
    return Schedule(kind, torch.tensor([0.06, 0.02]), prediction_type=prediction_type, **{name: levels})


def test_levels_of_each_kind_as_coefficients_of_data_and_noise():
    assert path_at(schedule("flow", "velocity"), 1) == pytest.approx((0.7, 0.3))
    assert path_at(schedule("diffusion", "epsilon"), 1) == pytest.approx((math.sqrt(0.7), math.sqrt(0.3)))
    assert path_at(schedule("diffusion", "epsilon"), 2) == pytest.approx((math.sqrt(0.9), math.sqrt(0.1)))
    assert path_at(schedule("consistency", "epsilon"), 1) == pytest.approx((math.sqrt(0.7), math.sqrt(0.3)))
    assert path_at(schedule("consistency", "epsilon"), 2) == (1.0, 0.0)


def test_data_and_score_come_back_from_the_velocity_of_any_path():
    path, rates = (0.7, 0.4), (-1.3, 0.9)
    latents, velocity = path[0] * X0 + path[1] * NOISE, rates[0] * X0 + rates[1] * NOISE
    torch.testing.assert_close(path_denoised(latents, velocity, path, rates), X0)
    torch.testing.assert_close(path_score(latents, velocity, path, rates), -NOISE / path[1])


def test_going_back_to_a_noisier_level_gives_the_law_of_the_path_there():
    moved = renoise(X0, (0.8, 0.6), (0.5, math.sqrt(0.75)), NOISE)
    torch.testing.assert_close(moved, 0.625 * X0 + math.sqrt(0.75 - 0.375**2) * NOISE)
    assert torch.equal(renoise(X0, (0.8, 0.6), (0.8, 0.6), NOISE), X0)
    with pytest.raises(ValueError, match="noisier: got"):
        renoise(X0, (0.5, 0.8), (0.8, 0.6), NOISE)


@pytest.mark.parametrize("kind", ["diffusion", "consistency"])
def test_the_prediction_that_says_this_data(kind):
    alpha, sigma = path_at(schedule(kind, "epsilon"), 0)
    latents = alpha * X0 + sigma * NOISE
    denoised = X0
    if kind == "consistency":  # its estimate is a mixture of x0 and the state
        skip, out = boundary_scalings(0.06)
        denoised = out * X0 + skip * latents
    for name, wanted in (("epsilon", NOISE), ("sample", X0), ("v_prediction", alpha * NOISE - sigma * X0)):
        got = denoised_to_prediction(schedule(kind, name), 0, latents, denoised)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_velocity_that_says_this_data():
    latents = 0.2 * X0 + 0.8 * NOISE
    got = denoised_to_prediction(schedule("flow", "velocity"), 0, latents, X0)
    torch.testing.assert_close(got, NOISE - X0, rtol=1e-5, atol=1e-6)


def test_the_variance_preserving_path_at_known_values():
    assert vp_path(0.0) == (1.0, 0.0)
    assert vp_path(1.0) == pytest.approx((math.exp(-5.025), math.sqrt(1 - math.exp(-10.05))))
    assert vp_path(0.5)[0] == pytest.approx(math.exp(-0.5 * (0.5 * 19.9 * 0.25 + 0.05)))
    assert vp_time_grid(2) == pytest.approx([1.0, math.sqrt(0.75), 0.0])
    for rho in (0.1, 0.4, 0.9):
        assert vp_time(*vp_path(rho)) == pytest.approx(rho)
        alpha, sigma = vp_path(rho)
        assert flow_time(rho) == pytest.approx(sigma / (alpha + sigma))
        up, down = vp_path(rho + 1e-5), vp_path(rho - 1e-5)
        assert vp_rates(rho) == pytest.approx([(u - d) / 2e-5 for u, d in zip(up, down)], rel=1e-6)
    assert vp_time(0.0, 1.0) == 1.0 and vp_time(1e-4, 1.0) == 1.0


def test_a_step_of_euler_maruyama_at_known_values():
    velocity, score = torch.full((1, 2), 2.0).double(), torch.full((1, 2), -3.0).double()
    step = vp_sde_step(X0, velocity, score, 0.8, 0.55, strength=2.0)
    diffusion = 2 * 0.64
    torch.testing.assert_close(step.mean, X0 - 0.25 * 2 - 0.5 * diffusion**2 * 0.25 * 3)
    assert step.std.item() == pytest.approx(diffusion * 0.5)
