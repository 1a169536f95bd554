"""Learning rates and one optimiser update, at known values."""

import math

import pytest
import torch
from accelerate import Accelerator

from visalign.training.loop.optimization import apply_gradients, learning_rate, mean_over_processes


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", [1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]),
    ],
)
def test_learning_rates_at_known_values(schedule, expected):
    rates = [learning_rate(step, 6, peak=2.0, warmup=2, schedule=schedule) for step in range(6)]
    assert rates == pytest.approx(expected)


def test_a_warm_up_of_the_whole_run_ends_at_the_peak():
    assert [learning_rate(step, 3, 3.0, 3, "cosine") for step in range(3)] == pytest.approx([1.0, 2.0, 3.0])
    assert learning_rate(3, 3, 3.0, 3, "linear") == 3.0


def parameters(first, second):
    """Two parameters at 0 with these gradients, and one that got none, in SGD at a rate that must be overwritten."""
    tensors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for tensor, gradient in zip(tensors, (first, second)):
        tensor.grad = torch.tensor([gradient])
    return tensors, torch.optim.SGD(tensors, lr=100.0)


@pytest.mark.parametrize("max_norm, expected", [(0.0, (-1.5, -2.0)), (1.0, (-0.3, -0.4)), (10.0, (-1.5, -2.0))])
def test_an_update_clips_the_global_norm_and_takes_the_given_rate(max_norm, expected):
    tensors, optimizer = parameters(3.0, 4.0)
    norm, applied = apply_gradients(Accelerator(cpu=True), optimizer, 0.5, max_norm)
    assert (norm, applied) == (5.0, True)
    assert [t.item() for t in tensors] == pytest.approx([*expected, 0.0], abs=1e-5)
    assert all(t.grad is None for t in tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_dropped_whole(bad):
    tensors, optimizer = parameters(3.0, bad)
    norm, applied = apply_gradients(Accelerator(cpu=True), optimizer, 0.5, 1.0)
    assert not math.isfinite(norm) and not applied
    assert [t.item() for t in tensors] == [0, 0, 0] and all(t.grad is None for t in tensors)


class TwoProcesses:
    """Both of two processes hold the same, as if this one's numbers came from either."""

    num_processes, device = 2, torch.device("cpu")

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return 2 * tensor


def test_gradients_are_summed_over_processes_each_to_its_own_parameter():
    tensors, optimizer = parameters(3.0, 4.0)
    assert apply_gradients(TwoProcesses(), optimizer, 0.5, 0.0) == (10.0, True)
    assert [t.item() for t in tensors] == [-3.0, -4.0, 0.0]


def test_means_are_of_what_was_counted_on_all_processes():
    sums = {"loss": torch.tensor(6.0), "kl": torch.tensor(3.0), "count": torch.tensor(4.0)}
    assert mean_over_processes(TwoProcesses(), sums, ["kl", "loss", "missing"]) == {
        "kl": 0.75,
        "loss": 1.5,
        "missing": 0,
    }
    assert mean_over_processes(TwoProcesses(), {}, ["loss"]) == {"loss": 0.0}
