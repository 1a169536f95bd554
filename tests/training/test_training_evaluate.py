"""Evaluation: N prompts give N scores on any number of processes, pairs share seeds, intervals cover."""

import numpy as np
import pytest
import torch

from visalign.statistics.bootstrap import paired_interval
from visalign.training.loop import evaluate as module
from visalign.training.loop.evaluate import evaluate, mean_interval
from visalign.transitions import FlowODE


class FakeRollout:
    """Images that say which seed they were drawn from."""

    def __init__(self):
        self.calls = []

    def __call__(self, generator, prompts, seeds, transition, sde_steps):
        self.calls.append(list(zip(prompts, seeds)))
        assert sde_steps == []
        self.images = torch.tensor(seeds, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 2, 2)
        return self


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRollout()
    monkeypatch.setattr(module, "rollout", fake)
    return fake


JUDGES = {"seed": lambda images, prompts: images[:, 0, 0, 0], "length": lambda _, p: torch.tensor([len(x) for x in p])}


def prompts(count):
    return ["x" * (k + 1) for k in range(count)]


def run(count, processes=1, **options):
    """The result on process 0, with `gather` played by running every process."""
    parts = {}
    for joining in (False, True):
        results = []
        for process in range(processes):
            sent = []

            def gather(t, sent=sent, joining=joining):
                sent.append(t)
                if not joining:
                    return torch.cat([t] * processes)
                return torch.cat([parts[p][len(sent) - 1] for p in range(processes)])

            sharing = dict(process=process, processes=processes, gather=gather)
            results.append(evaluate(None, FlowODE(), prompts(count), JUDGES, **sharing, **options))
            parts[process] = sent
    for result in results[1:]:
        assert all(torch.equal(result.scores[k], results[0].scores[k]) for k in JUDGES)
    return results[0]


@pytest.mark.parametrize("count, processes", [(1, 1), (5, 2), (4, 2), (7, 3), (1, 3), (8, 3)])
def test_n_prompts_give_n_scores_in_order_on_any_number_of_processes(fake, count, processes):
    one, many = run(count, batch_size=2), run(count, processes, batch_size=3)
    assert many.prompts == prompts(count)
    assert many.scores["length"].tolist() == list(range(1, count + 1))
    assert torch.equal(one.scores["seed"], many.scores["seed"]) and len(one.scores["seed"]) == count


def test_two_evaluations_are_pairs_and_other_seeds_are_not(fake):
    first, second, other = run(6), run(6, batch_size=4), run(6, seed=1)
    assert torch.equal(first.scores["seed"], second.scores["seed"])
    assert not (first.scores["seed"] == other.scores["seed"]).any()
    assert len(set(first.scores["seed"].tolist())) == 6


def test_means_and_intervals_are_those_of_the_scores(fake):
    result = run(9)
    assert result.mean("length") == 5
    low, high = result.interval("length")
    assert low < 5 < high and abs(high - 5 - (5 - low)) < 1e-9


def test_the_wilson_interval_of_a_success_rate():
    low, high = mean_interval(np.array([1.0] * 8 + [0.0] * 2))
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # Wilson 1927 for 8 of 10
    low, high = mean_interval(np.zeros(10))
    assert low == 0 and 0.2 < high < 0.35


def test_the_t_interval_covers_the_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = mean_interval(rng.normal(3, 2, size=8))
        covered += low < 3 < high
    assert 925 < covered < 975


def test_the_paired_interval_is_narrow_where_pairs_move_together():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, size=200)
    gain = paired_interval(before + 1 + 0.1 * rng.normal(size=200), before)
    assert 0.95 < gain.low < 1 < gain.high < 1.05 and gain.low < gain.mean < gain.high
    with pytest.raises(ValueError, match="as the base"):
        paired_interval(before, before[:5])
    with pytest.raises(ValueError, match="got none"):
        mean_interval(np.array([]))
