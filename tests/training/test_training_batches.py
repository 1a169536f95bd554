"""Micro-batches hold whole groups in order, and what is found for all samples comes back to each process's own."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from visalign.advantages.group import group_advantages, group_statistics
from visalign.data.prompts import iteration_groups
from visalign.rewards import CombinedReward, Member, RewardError, RewardOutput, as_reward
from visalign.rewards.combine import read_combine
from visalign.training.loop.batches import Batch, GatheredScores, Submitted, cut
from visalign.training.loop.scoring import Scorer
from visalign.training.loop.training_loop import TrainingLoop


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
    made = (ordered, {"r": ordered}, ordered[None], valid, {"r": valid})
    return GatheredScores(*made, group_ids=ids[order], order=order, share=share)


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
    assert ids.tolist() == [0, 0, 2, 2, 1, 1, 3, 3] and rewards[5].isnan()
    assert rewards[[0, 1, 2, 3, 4, 6, 7]].tolist() == [0, 1, 2, 3, 4, 6, 7]
    values = gathered(0).values()
    assert values == gathered(1).values() and values["failed_scores"] == 1
    assert values["reward_mean"] == pytest.approx(23 / 7)  # without the failed one


def flawed(images, prompts):
    """Brightness; a picture above 0.9 cannot be scored."""
    scores = images.mean(dim=(1, 2, 3))
    return RewardOutput(scores, valid=scores < 0.9, rationale=["too bright" if s >= 0.9 else None for s in scores])


def scored(reward, shades, ids, size):
    """Of grey pictures, as a loop on one process gathers them, `size` scored at a time."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0, gather=lambda t: t)
    run = SimpleNamespace(stage=lambda name: nullcontext())
    loop = SimpleNamespace(state=SimpleNamespace(scorer=Scorer(reward, accelerator.device)), run=run)
    loop.accelerator = accelerator
    pictures = shades.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return TrainingLoop.score(loop, pictures, ["p"] * len(shades), ids, size), loop.state.scorer


SHADES, IDS = torch.tensor([0.80, 0.82, 0.84, 1.0, 0.1, 0.2, 0.3, 0.4]), torch.tensor([0] * 4 + [1] * 4)
GOOD = torch.arange(8) != 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_a_failed_score_is_in_no_statistic_whatever_else_was_in_its_batch(size):
    scores, _ = scored(as_reward(flawed), SHADES, IDS, size)
    assert scores.valid.tolist() == GOOD.tolist() and scores.problem == "flawed: too bright"
    for std in ("group", "global"):
        advantages = group_advantages(scores.total, scores.group_ids, std=std, valid=scores.valid)
        wanted = group_advantages(SHADES[GOOD], IDS[GOOD], std=std)
        torch.testing.assert_close(advantages[GOOD], wanted, rtol=1e-5, atol=1e-5)
        assert advantages[3] == 0
    values = scores.values()
    assert values["reward_mean"] == pytest.approx(SHADES[GOOD].mean().item()) and values["failed_scores"] == 1
    assert values["reward_std_in_group"] == pytest.approx(group_statistics(SHADES[GOOD], IDS[GOOD]).stds.mean().item())


@pytest.mark.parametrize("combine", ["weighted", "normalised", "log_tamed", "correlation"])
def test_of_a_combination_neither(combine):
    """A reward that never fails beside it: each statistic is of what that member could score."""
    red = as_reward(lambda images: images[:, 0].mean(dim=(1, 2)) ** 2, "red")
    members = [Member("flawed", 1.0, as_reward(flawed)), Member("red", 1.0, red)]
    reward = CombinedReward(members, read_combine({"combine": combine}))
    results = []
    for size in (1, 3, 8):
        scores, scorer = scored(reward, SHADES, IDS, size)
        results.append(scorer.combine(scores.shaped, scores.group_ids, scores.scored)[GOOD])
        assert not scores.scored["flawed"][3] and scores.scored["red"].all()
    for result in results:
        torch.testing.assert_close(result, results[0])
    if combine == "normalised":
        both = group_advantages(SHADES[GOOD], IDS[GOOD], mode="add"), group_advantages(SHADES**2, IDS, mode="add")[GOOD]
        alone = sum(both)
        torch.testing.assert_close(results[0].float(), alone, rtol=1e-4, atol=1e-4)


def test_an_iteration_of_failures_alone_ends_the_run_with_the_reason():
    with pytest.raises(RewardError, match=r"'flawed': could score none of 2 images \(flawed: too bright\)"):
        scored(as_reward(flawed), torch.ones(2), torch.zeros(2, dtype=torch.int64), 1)
