"""What counts as a sign of reward hacking: limits, and tests of the series of a training against them.

Each check takes the series of a run and returns a finding or None. The limits are in units that mean the same on any
model: the spread of the first iterations' pictures, the share that is left of a diversity. They were set on simulated
runs (tests/training/test_monitor.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from .trends import Series, shift_p_value, trend

PICTURE = ("saturation", "brightness", "contrast", "high_frequency", "jpeg_size", "grid_")  # beginnings of names
DIVERSITY = ("diversity_cosine", "diversity_vendi")
WATCHED = "watched_"
FEWEST_POINTS = 8  # of a trend; with fewer, no order of them is unlikely enough


@dataclass(frozen=True)
class MonitorOptions:
    """What is looked at, and what is too much. An iteration is one call of `Monitor.update`."""

    action: Literal["warn", "stop", "rollback"] = "warn"  # upon an alarm
    baseline: int = 8  # first iterations, with which later ones are compared
    recent: int = 8  # last iterations, which are compared with them
    windows: tuple[int, ...] = (50, 200)  # steps over which trends are taken, each by itself
    drift_limit: float = 1.0  # of a picture statistic, in spreads of the first iterations' pictures
    fall_limit: float = 0.2  # of a watched reward within a window, in spreads of its first scores
    gap_limit: float = 1.0  # of the reward's gain over the gold judge's, in spreads of each
    heldout_limit: float = 0.25  # of the reward's gain on held-out prompts, in spreads; from there gold must follow
    heldout_share: float = 0.25  # of that gain, in the gold judge's own spreads, that it must have
    diversity_limit: float = 0.5  # share of the first iterations' diversity that must be left
    reward_spread_limit: float = 0.25  # as much for the rewards' spread within groups
    zero_variance_limit: float = 0.75  # share of groups whose rewards are all equal
    kl_budget: float | None = None  # in the unit of the `kl` given; None: not watched
    confidence: float = 0.999  # of a shift, and of the reward's own rise
    fall_confidence: float = 0.998  # of a watched reward's fall
    heldout_confidence: float = 0.99  # of what evaluations on held-out prompts tell
    gold: tuple[str, ...] = ("gold", "gold_strict")  # watched rewards that are the truth
    grid_periods: tuple[int, ...] = (8, 16)  # pixels; used where four periods fit
    pictures: int = 64  # looked at in an iteration, in whole groups
    repeat_after: int = 50  # steps until a finding that still holds is told again

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop", "rollback"):
            raise ValueError(f"action: got {self.action!r}, expected 'warn', 'stop' or 'rollback'")
        for name in ("baseline", "recent"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 8 (fewer cannot reach confidence)")
        for name in ("drift_limit", "fall_limit", "gap_limit", "heldout_limit", "pictures", "repeat_after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        shares = ("diversity_limit", "reward_spread_limit", "zero_variance_limit", "heldout_share")
        for name in (*shares, "confidence", "fall_confidence", "heldout_confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected within (0, 1)")
        if not self.windows or min(self.windows) < FEWEST_POINTS:
            raise ValueError(f"windows: got {self.windows}, expected numbers of steps >= {FEWEST_POINTS}")
        if self.grid_periods and min(self.grid_periods) < 2:
            raise ValueError(f"grid_periods: got {self.grid_periods}, expected pixels >= 2")
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise ValueError(f"kl_budget: got {self.kl_budget}, expected > 0, or None")


@dataclass(frozen=True)
class Finding:
    """Something wrong. An "alarm" speaks of hacking; a "warning" of a training that has little to learn from."""

    name: str
    step: int
    severity: Literal["warning", "alarm"]
    message: str
    value: float
    threshold: float

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


def check(step: int, name: str, series: Mapping[str, Series], options: MonitorOptions) -> list[Finding]:
    """All findings that the newest value of the series `name` gives rise to."""
    findings: list[Finding | None] = []
    own = series[name]
    if name.startswith(PICTURE):
        findings.append(_drift(step, name, own, options))
    elif name in DIVERSITY:
        findings.append(_collapse(step, name, own, options.diversity_limit, "alarm", options))
    elif name == "reward_spread":
        findings.append(_collapse(step, name, own, options.reward_spread_limit, "warning", options))
    elif name == "zero_variance":
        findings.append(_zero_variance(step, own, options))
    elif name == "kl":
        findings.append(_kl(step, own, options))
    elif name.startswith(WATCHED):
        findings.append(_divergence(step, name, own, series["reward"], options))
        if name.removeprefix(WATCHED) in options.gold:
            findings.append(_gap(step, name, own, series["reward"], options))
    return [f for f in findings if f is not None]


def check_heldout(
    step: int, before: Mapping[str, Tensor], now: Mapping[str, Tensor], options: MonitorOptions
) -> list[Finding]:
    """Findings of an evaluation, set against the one before training, prompt by prompt.

    The same prompts and seeds make this far more sensitive than the pictures trained on. Where the reward has gained,
    a judge that knows the truth must gain a share of it, and no other watched reward may fall; gains are in spreads of
    each one's scores before. One-sided tests on paired differences.

    Args:
        before, now: scores (N,) by name, "reward" among them; of `before` the first N are taken.
    """
    sure = NormalDist().inv_cdf(options.heldout_confidence)
    gains = {name: gain for name in now if (gain := _gain(before[name], now[name])) is not None}
    reward = gains.pop("reward", None)
    if reward is None or _mean(reward) < options.heldout_limit or _z(reward) < sure:
        return []
    risen, findings = _mean(reward), []
    for name, gain in sorted(gains.items()):
        change = _mean(gain)
        what = f"on held-out prompts the reward gained {risen:.2f} spreads and {name} {change:+.2f}"
        if name in options.gold:
            limit, behind = options.heldout_share * risen, gain - options.heldout_share * reward
            finding, words = f"heldout_gap_{name}", f"at least {options.heldout_share} of it expected"
        else:
            limit, behind = -options.fall_limit, gain
            finding, words = f"heldout_fall_{name}", f"limit {limit}"
        if change < limit and _z(behind) < -sure:
            findings.append(Finding(finding, step, "alarm", f"{what} ({words})", change, limit))
    return findings


def _gain(before: Tensor, now: Tensor) -> Tensor | None:
    """Differences (N,) in spreads of `before`, NaN where one is; None where nothing varied or too little is known."""
    before, now = before[: len(now)].double(), now.double()
    known = before.isfinite() & now.isfinite()
    spread = float(before[known].std(correction=0)) if int(known.sum()) >= FEWEST_POINTS else 0.0
    return torch.where(known, now - before, torch.nan) / spread if spread > 0 else None


def _mean(differences: Tensor) -> float:
    return float(differences.nanmean())


def _z(differences: Tensor) -> float:
    known = differences[differences.isfinite()]
    error = float(known.std()) / len(known) ** 0.5
    return float(known.mean()) / max(error, 1e-12)


def _drift(step: int, name: str, own: Series, options: MonitorOptions) -> Finding | None:
    if not own.has(options.baseline + options.recent):
        return None
    change, limit = own.change(options.recent), options.drift_limit
    if abs(change) < limit or not _shifted(own, options):
        return None
    what = f"{name.replace('_', ' ')} of the pictures went from {own.start:.3g} to {own.now(options.recent):.3g}"
    return Finding(f"drift_{name}", step, "alarm", f"{what}, {change:+.2f} spreads (limit {limit})", change, limit)


def _collapse(
    step: int, name: str, own: Series, limit: float, severity: Literal["warning", "alarm"], options: MonitorOptions
) -> Finding | None:
    if not own.has(options.baseline + options.recent) or own.start <= 1e-6:
        return None
    left = own.now(options.recent) / own.start
    if left > limit or not _shifted(own, options):
        return None
    what = {"reward_spread": "the rewards' spread", "diversity_vendi": "the Vendi score above 1"}
    message = (
        f"{what.get(name, 'the distance of pictures')} within groups is {left:.0%} of what it was (limit {limit:.0%})"
    )
    return Finding(f"collapse_{name}", step, severity, message, left, limit)


def _zero_variance(step: int, own: Series, options: MonitorOptions) -> Finding | None:
    share, limit = own.now(options.recent), options.zero_variance_limit
    if not own.has(options.recent) or share <= limit:
        return None
    message = f"{share:.0%} of the groups have equal rewards and teach nothing (limit {limit:.0%})"
    return Finding("zero_variance_groups", step, "warning", message, share, limit)


def _kl(step: int, own: Series, options: MonitorOptions) -> Finding | None:
    if options.kl_budget is None or not own.has(3):
        return None
    value = sorted(own.values[-3:])[1]  # one outlying batch is not the policy
    if value <= options.kl_budget:
        return None
    message = f"the KL from the reference is {value:.4g} (budget {options.kl_budget:.4g})"
    return Finding("kl_budget", step, "alarm", message, value, options.kl_budget)


def _divergence(step: int, name: str, own: Series, reward: Series, options: MonitorOptions) -> Finding | None:
    """The reward rises while a watched one falls, over one of the windows."""
    rise, fall = (NormalDist().inv_cdf((1 + c) / 2) for c in (options.confidence, options.fall_confidence))
    for points in sorted({own.within(window, FEWEST_POINTS) for window in options.windows}):
        steps, values = own.steps[-points:], own.values[-points:]
        third = max(1, points // 3)
        rough = (sum(values[:third]) - sum(values[-third:])) / third  # of a straight line, two thirds of its fall
        if points < FEWEST_POINTS or rough < options.fall_limit * own.spread / 3:  # spares most of the work
            continue
        watched = trend(steps, values)
        change = watched.change / own.spread
        if change > -options.fall_limit or watched.z > -fall:
            continue
        since = [(s, v) for s, v in zip(reward.steps, reward.values) if s >= steps[0]]
        if len(since) >= FEWEST_POINTS and trend(*zip(*since)).z >= rise:
            judge = name.removeprefix(WATCHED)
            what = f"over {steps[-1] - steps[0] + 1} steps the reward rose while {judge} fell by {-change:.2f} spreads"
            message = f"{what} (limit {options.fall_limit})"
            return Finding(f"divergence_{judge}", step, "alarm", message, change, -options.fall_limit)
    return None


def _gap(step: int, name: str, gold: Series, reward: Series, options: MonitorOptions) -> Finding | None:
    """The reward has gained much, and the judge that knows the truth less than a tenth of it."""
    enough = options.baseline + options.recent
    if not (gold.has(enough) and reward.has(enough)):
        return None
    gain, gold_gain = reward.change(options.recent), gold.change(options.recent)
    if gold_gain > 0.1 * gain or gain - gold_gain < options.gap_limit or not _shifted(reward, options):
        return None
    judge = name.removeprefix(WATCHED)
    what = f"since the first steps the reward gained {gain:.2f} spreads and {judge} {gold_gain:+.2f}"
    message = f"{what} (limit of the gap {options.gap_limit})"
    return Finding(f"proxy_gap_{judge}", step, "alarm", message, gain - gold_gain, options.gap_limit)


def _shifted(own: Series, options: MonitorOptions) -> bool:
    """Whether the last values are of another level than the first."""
    return shift_p_value(own.first, own.values[-options.recent :]) < 1 - options.confidence
