"""REBEL's loss on pairs: known values, its gradient, and what it makes a policy do."""

import pytest
import torch

from visalign.objectives.rebel import rebel_loss, rebel_residuals, rebel_weights


def test_at_the_old_weights_the_loss_is_the_squared_difference_of_advantages_and_its_gradient_is_not_zero():
    log_ratios, advantages = torch.zeros(4, requires_grad=True), torch.tensor([1.0, -0.5, 0.2, 0.2])
    loss = rebel_loss(log_ratios, advantages)
    torch.testing.assert_close(loss, torch.tensor([2.25, 0.0]))
    loss.mean().backward()
    torch.testing.assert_close(log_ratios.grad, torch.tensor([-1.5, 1.5, 0.0, 0.0]))  # descent lifts the better one


def test_the_residual_in_full():
    log_ratios, advantages = torch.tensor([0.3, -0.1]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(rebel_residuals(log_ratios, advantages, 2.0), torch.tensor([2 * 0.4 - 1.0]))
    torch.testing.assert_close(rebel_loss(log_ratios, advantages, 2.0), torch.tensor([0.04]))
    shifted = rebel_residuals(log_ratios + 5, advantages + 3, 2.0)
    torch.testing.assert_close(shifted, torch.tensor([-0.2]), rtol=0, atol=1e-5)


def test_weights_are_the_gradient_so_that_backward_can_go_step_by_step():
    random = torch.Generator().manual_seed(0)
    parameter = torch.randn(5, generator=random, dtype=torch.float64, requires_grad=True)
    features = torch.randn(6, 3, 5, generator=random, dtype=torch.float64)  # samples, steps, parameters
    advantages = torch.randn(6, generator=random, dtype=torch.float64)
    steps = (features @ parameter).tanh()
    (whole,) = torch.autograd.grad(rebel_loss(steps.sum(1), advantages, 0.7).sum(), parameter)
    weights = rebel_weights(steps.sum(1), advantages, 0.7)
    assert not weights.requires_grad
    piecewise = torch.zeros_like(parameter)
    for i in range(3):
        step = (features[:, i] @ parameter).tanh()
        piecewise += torch.autograd.grad((weights * step).sum(), parameter)[0]
    torch.testing.assert_close(piecewise, whole)


def test_descent_ends_where_the_log_ratio_is_the_difference_of_advantages():
    logits = torch.zeros(3, requires_grad=True)
    old, chosen = torch.full((3,), 1 / 3).log(), torch.tensor([0, 1, 1, 2])
    advantages = torch.tensor([0.5, 0.0, 0.0, -0.25])
    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        rebel_loss((logits.log_softmax(0) - old)[chosen], advantages, 0.5).mean().backward()
        optimizer.step()
    ratio = (logits.log_softmax(0) - old).detach()
    torch.testing.assert_close(ratio[0] - ratio[1], torch.tensor(1.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(ratio[1] - ratio[2], torch.tensor(0.5), rtol=0, atol=1e-3)


def test_no_gradient_passes_to_the_advantages():
    log_ratios, advantages = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(rebel_loss(log_ratios, advantages).sum(), advantages, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(3), torch.zeros(3)), "N even"),
        ((torch.zeros(4), torch.zeros(2)), "got shapes"),
        ((torch.zeros(2), torch.zeros(2), 0.0), "scale: got 0"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        rebel_loss(*args)
