"""Micro-batches hold whole groups in order, and what is found for all samples comes back to each process's own."""

from types import SimpleNamespace

import pytest
import torch

from visalign.data.prompts import iteration_groups
from visalign.training.loop.batches import Batch, GatheredScores, Submitted, cut


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_batches_hold_every_member_once_in_order(size):
    groups = iteration_groups(["a", "b", "c"], 0, 3, 4, seed=0)
    batches = list(cut(groups, size))
    assert all(len(b.ids) == len(b.prompts) == len(b.seeds) == len(b.noise_seeds) <= size for b in batches)
    assert torch.cat([b.ids for b in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [s for b in batches for s in b.seeds] == [s for g in groups for s in g.seeds]
    assert [s for b in batches for s in b.noise_seeds] == [s for g in groups for s in g.noise_seeds]
    assert [p for b in batches for p in b.prompts] == [g.prompt for g in groups for _ in range(4)]


def gathered(process: int) -> GatheredScores:
    """Of two processes with groups 0, 2 and 1, 3, whose rewards are their place in the order of gathering."""
    ids, rewards = torch.tensor([0, 0, 2, 2, 1, 1, 3, 3]), torch.arange(8.0).double()
    order = torch.argsort(ids, stable=True)
    valid = rewards[order] != 5
    share = slice(4 * process, 4 * process + 4)
    ordered = rewards[order]
    return GatheredScores(ordered, {"r": ordered}, ordered[None], valid, group_ids=ids[order], order=order, share=share)


def test_each_process_gets_its_own_advantages_and_none_where_scoring_failed():
    for process, wanted in ((0, [0, 1, 2, 3]), (1, [4, 0, 6, 7])):
        scores = gathered(process)
        trajectory = SimpleNamespace(final=torch.zeros(2))
        batches = [Batch(trajectory, torch.zeros(n, dtype=torch.int64)) for n in (3, 1)]
        shares = [Submitted(batches[:1], []), Submitted(batches[1:], [])]
        (first,), (second,) = scores.assign(shares, scores.total)
        assert torch.cat([first.advantages, second.advantages]).tolist() == wanted
        assert torch.cat([first.valid, second.valid]).tolist() == [w == 4 * process + k for k, w in enumerate(wanted)]
        assert scores.local(scores.total).tolist() == [4 * process + k for k in range(4)]


def test_the_watch_sees_the_main_processs_samples_first_and_the_log_is_the_same_on_all():
    ids, rewards = gathered(0).as_gathered
    assert ids.tolist() == [0, 0, 2, 2, 1, 1, 3, 3] and rewards.tolist() == list(range(8))
    values = gathered(0).values()
    assert values == gathered(1).values() and values["reward_mean"] == 3.5 and values["failed_scores"] == 1
