"""DDPO's per-prompt baseline: whose rewards normalise a sample, and what is remembered."""

import json

import pytest
import torch

from visalign.advantages.per_prompt import PromptStatistics, normalised


def naive(rewards, base):
    """(r - mean) / std, population std, in plain Python."""
    mean = sum(base) / len(base)
    std = (sum((b - mean) ** 2 for b in base) / len(base)) ** 0.5
    return torch.tensor([(r - mean) / std for r in rewards])


def test_fifteen_rewards_use_the_batch_sixteen_their_own_and_the_seventeenth_evicts_the_first():
    tracker = PromptStatistics()
    random = torch.Generator().manual_seed(0)
    values = torch.rand(17, generator=random, dtype=torch.float64)
    other = torch.tensor([4.0, 5.0], dtype=torch.float64)
    first = tracker.advantages(["a"] * 15 + ["b"] * 2, torch.cat([values[:15], other]))
    everything = [*values[:15].tolist(), *other.tolist()]
    torch.testing.assert_close(first, naive(everything, everything))
    second = tracker.advantages(["a", "b"], torch.stack([values[15], other[0]]))
    torch.testing.assert_close(second[:1], naive(values[15:16].tolist(), values[:16].tolist()))
    torch.testing.assert_close(second[1:], naive([4.0], [values[15].item(), 4.0]))
    third = tracker.advantages(["a"], values[16:])
    torch.testing.assert_close(third, naive(values[16:].tolist(), values[1:17].tolist()))
    assert tracker.state_dict()["a"] == values[1:].tolist() and len(tracker.state_dict()["b"]) == 3
    assert tracker.share_of_own(["a", "b", "c", "a"]) == 0.5


def test_published_floor_and_ours():
    rewards = torch.tensor([0.0, 1.0, 2.0])
    std = (2 / 3) ** 0.5
    ours = PromptStatistics(4, 3).advantages(["a"] * 3, rewards)
    theirs = PromptStatistics(4, 3).advantages(["a"] * 3, rewards, eps=0.5, mode="add")
    torch.testing.assert_close(ours, (rewards - 1) / std)
    torch.testing.assert_close(theirs, (rewards - 1) / (std + 0.5))
    wide = PromptStatistics(4, 3).advantages(["a"] * 3, 1e-6 * rewards)  # a std below the floor
    torch.testing.assert_close(wide, 1e-2 * (rewards - 1))


def test_equal_rewards_give_exactly_zero_and_a_new_one_among_equals_does_not():
    tracker = PromptStatistics(3, 2)
    for value in (0.1, 1 / 3):
        assert tracker.advantages(["a", "b"] * 3, torch.full((6,), value)).tolist() == [0.0] * 6
    assert tracker.advantages(["a"], torch.tensor([0.5])) > 1
    assert normalised(torch.tensor([2.0]), torch.tensor([1.0, 1.0]), eps=1.0) == 1.0


def test_failed_samples_are_neither_counted_nor_remembered():
    tracker, clean = PromptStatistics(8, 2), PromptStatistics(8, 2)
    rewards = torch.tensor([1.0, float("nan"), 3.0, 100.0])
    out = tracker.advantages(["a", "a", "a", "b"], rewards, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    clean.advantages(["a", "a"], rewards[[0, 2]])
    assert tracker.state_dict() == clean.state_dict()
    none = tracker.advantages(["c"], rewards[:1], torch.tensor([False]))
    assert none.tolist() == [0.0] and "c" not in tracker.state_dict()


def test_scale_and_shift_of_all_rewards_change_nothing():
    random, prompts = torch.Generator().manual_seed(1), ["a", "b", "a", "c"] * 5
    rewards = [torch.rand(20, generator=random, dtype=torch.float64) for _ in range(3)]
    results = []
    for change in (lambda r: r, lambda r: 50 * r - 7):
        tracker = PromptStatistics(8, 6)
        results.append(torch.stack([tracker.advantages(prompts, change(r)) for r in rewards]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_a_state_goes_through_json_bit_for_bit():
    tracker, again = PromptStatistics(4), PromptStatistics(4)
    tracker.advantages(["a"] * 6 + ["b"], torch.rand(7) / 3)
    again.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert again.state_dict() == tracker.state_dict() and len(again.state_dict()["a"]) == 4
    new = torch.rand(2)
    assert torch.equal(again.advantages(["a", "b"], new), tracker.advantages(["a", "b"], new))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PromptStatistics(1), "size: got 1"),
        (lambda: PromptStatistics(8, 9), "min_count: got 9, expected within 2 .. size"),
        (lambda: PromptStatistics(8, 1), "min_count: got 1"),
        (lambda: PromptStatistics().advantages(["a"], torch.rand(2)), "rewards: got shape"),
        (lambda: PromptStatistics().advantages(["a"], torch.rand(1), torch.ones(2)), "valid: got shape"),
        (lambda: PromptStatistics().advantages(["a"], torch.tensor([float("nan")])), "not finite"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_equal_rewards_give_exactly_0_though_their_mean_is_rounded():
    for count in range(1, 12):
        equal = torch.full((count,), 0.1, dtype=torch.float64)
        assert normalised(equal, equal, eps=1e-30).tolist() == [0.0] * count


def test_one_prompt_alone_has_its_share_and_no_gradient_passes():
    tracker = PromptStatistics(2)
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not tracker.advantages(["a", "a"], rewards).requires_grad
    assert (
        tracker.share_of_own(["a"]) == 1 and tracker.share_of_own(["a", "b"]) == 0.5 and tracker.share_of_own([]) == 0
    )
