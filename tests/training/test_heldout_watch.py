"""The hacking watch on evaluations: paired scores of the same held-out prompts, before and now."""

from statistics import NormalDist

import pytest
import torch

from visalign.training.watch.hacking import MonitorOptions, check_heldout
from visalign.training.watch.monitor import Monitor

PROMPTS = 200


def evaluations(reward: float, gold: float, noise: float = 0.3, seed: int = 0, **others: float):
    """Scores before, of spread 1, and after gains of so many spreads with noise a prompt."""
    generator = torch.Generator().manual_seed(seed)
    before, now = {}, {}
    for name, gain in {"reward": reward, "gold": gold, **others}.items():
        scores = torch.randn(PROMPTS, generator=generator, dtype=torch.float64)
        scores = (scores - scores.mean()) / scores.std(correction=0)
        change = noise * torch.randn(PROMPTS, generator=generator, dtype=torch.float64)
        before[name], now[name] = scores, scores + gain + change - change.mean()
    return before, now


def names(before, now, **options) -> list[str]:
    return [finding.name for finding in check_heldout(7, before, now, MonitorOptions(**options))]


def test_a_gain_that_gold_does_not_share_is_an_alarm_and_one_that_it_shares_is_none():
    assert names(*evaluations(0.5, 0.0)) == ["heldout_gap_gold"]
    assert names(*evaluations(0.5, -0.3)) == ["heldout_gap_gold"]
    assert names(*evaluations(0.5, 0.13)) == []  # a quarter of it is enough
    assert names(*evaluations(0.5, 0.05)) == ["heldout_gap_gold"]
    assert names(*evaluations(0.5, 0.05), heldout_share=0.1) == []


def test_the_reward_must_have_gained_enough_and_surely():
    assert names(*evaluations(0.24, -0.5)) == []
    assert names(*evaluations(0.26, -0.5)) == ["heldout_gap_gold"]
    assert names(*evaluations(0.26, -0.5), heldout_limit=0.3) == []
    assert names(*evaluations(-0.5, -0.5)) == []
    before, now = evaluations(0.5, -5.0, noise=8.0)  # 0.5 is less than one standard error of 200 differences
    assert names(before, now) == []


def test_gold_must_be_surely_behind():
    before, now = evaluations(0.5, 0.0, noise=0.7)
    behind = now["gold"] - before["gold"] - 0.25 * (now["reward"] - before["reward"])
    z = float(behind.mean() / behind.std() * PROMPTS**0.5)
    assert -3 < z < -2  # its standard error counts both judges' noise
    sure = NormalDist().cdf(-z)
    assert names(before, now, heldout_confidence=sure - 1e-6) == ["heldout_gap_gold"]
    assert names(before, now, heldout_confidence=sure + 1e-6) == []
    assert names(*evaluations(0.5, 0.0, noise=1.0)) == []  # z -1.7
    assert names(*evaluations(0.5, 0.0, noise=1.0), heldout_confidence=0.9) == ["heldout_gap_gold"]


def test_gains_are_in_spreads_of_the_scores_before():
    before, now = evaluations(0.5, 0.0)
    for name, scale in (("reward", 40.0), ("gold", 0.001)):
        before[name], now[name] = before[name] * scale + 3, now[name] * scale + 3
    [finding] = check_heldout(7, before, now, MonitorOptions())
    assert finding.severity == "alarm" and finding.step == 7
    assert finding.value == pytest.approx(0.0, abs=1e-9) and finding.threshold == pytest.approx(0.125)
    assert "the reward gained 0.50 spreads and gold +0.00" in str(finding).replace("-0.00", "+0.00")


def test_another_watched_reward_may_stand_still_but_not_fall():
    assert names(*evaluations(0.5, 0.3, clip=0.0)) == []
    assert names(*evaluations(0.5, 0.3, clip=-0.19)) == []
    assert names(*evaluations(0.5, 0.3, clip=-0.21)) == ["heldout_fall_clip"]
    assert names(*evaluations(0.5, 0.3, clip=-0.21, noise=2.0)) == []  # not surely


def test_an_evaluation_of_fewer_prompts_is_set_against_the_same_ones():
    before, now = evaluations(0.5, 0.0)
    before = {name: torch.cat([scores, torch.full((50,), 1e6)]) for name, scores in before.items()}
    assert names(before, now) == ["heldout_gap_gold"]


def test_failed_scores_and_scores_that_never_vary_are_left_out():
    before, now = evaluations(0.5, 0.0)
    whole = {
        name: {f: s[[n for n in range(PROMPTS) if n not in (3, 5)]] for f, s in at.items()}
        for name, at in {"before": before, "now": now}.items()
    }
    now["reward"][3], now["gold"][3], before["gold"][5], now["reward"][5] = (float("nan"),) * 4
    assert names(before, now) == names(**whole) == ["heldout_gap_gold"]
    [finding], [same] = (check_heldout(7, *at, MonitorOptions()) for at in ((before, now), whole.values()))
    assert str(finding) == str(same)
    now["gold"][8] = float("nan")  # known to one alone: the gap is of pairs
    assert names(before, now) == ["heldout_gap_gold"]
    assert names({**before, "gold": torch.ones(PROMPTS)}, now) == []
    assert names({**before, "reward": torch.ones(PROMPTS)}, now) == []


def test_it_is_told_once_and_the_action_is_as_for_other_alarms():
    monitor = Monitor(MonitorOptions(action="stop"))
    before, now = evaluations(0.5, 0.0)
    found = monitor.compare(4, before, now)
    assert monitor.action(found) == "stop"
    assert monitor.compare(8, before, now) == []
    resumed = Monitor(MonitorOptions())
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.compare(12, before, now) == []
    assert [finding.step for finding in resumed.compare(54, before, now)] == [54]
