"""The hacking watch: does a policy still learn what its reward is meant to say, or has it found the reward's weakness?

Nothing here touches the training. `Monitor.update` takes what an iteration made and returns what is newly wrong; the
trainer decides what to do with it. What is too much is in `visalign.training.watch.hacking`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.advantages.group import group_statistics
from visalign.rewards.groups.sets import vendi_score
from visalign.rewards.verifiers.jpeg import jpeg_kilobytes
from visalign.statistics import pictures as pictures

from .hacking import Finding, MonitorOptions, check, check_heldout
from .trends import Number, Series

Action = Literal["none", "warn", "stop", "rollback"]


class Monitor:
    """Watches one run. Its state is all in `state_dict`: a resumed run finds what the unbroken one does.

    Args:
        encode: pictures (N, 3, H, W) to features (N, D), for the diversity within groups; say DINO's or CLIP's.
            The default sees layout and colour only.
    """

    def __init__(
        self, options: MonitorOptions | None = None, encode: Callable[[Tensor], Tensor] = pictures.embed_pixels
    ) -> None:
        self.options, self.encode = options or MonitorOptions(), encode
        self.series: dict[str, Series] = {}
        self.raised: dict[str, int] = {}  # finding: the step it was last told at
        self.latest: dict[str, float] = {}  # of the last iteration, to log

    def update(
        self,
        step: int,
        images: Tensor,
        group_ids: Tensor,
        rewards: Tensor,
        watched: Mapping[str, Tensor] | None = None,
        kl: float | None = None,
    ) -> list[Finding]:
        """Take in an iteration; returns what was not known to be wrong before.

        Args:
            step: rises from call to call.
            images: (M, 3, H, W) in [0, 1], of the first M <= N samples, groups whole, so that one process may watch
                its own pictures and the rewards of all. Of videos (M, F, 3, H, W) the middle frame is looked at.
            group_ids: (N,), an integer type.
            rewards: (N,), those that are trained on; NaN where scoring failed, not all.
            watched: scores by name that are not trained on, (any number,) each; NaN where one failed. They need not
                come at every step, nor be of these pictures: evaluations on fixed prompts do as well.
            kl: a mean divergence from the reference; must be given where `kl_budget` is.
        """
        if self.options.kl_budget is not None and kl is None:
            raise ValueError("kl: got None, expected a number, as kl_budget is set")
        if len(images) > len(group_ids):
            raise ValueError(f"images: got {len(images)}, expected at most {len(group_ids)}, as group_ids")
        images = images[:, images.shape[1] // 2] if images.dim() == 5 else images
        chosen = first_groups(group_ids[: len(images)], self.options.pictures)
        images, ids = images[chosen.to(images.device)], group_ids[: len(images)][chosen]
        numbers = picture_numbers(images, self.options.grid_periods) | diversity_numbers(self.encode(images), ids)
        groups = group_statistics(rewards, group_ids, valid=rewards.isfinite())
        numbers |= {"reward": _number(rewards), "reward_spread": _number(groups.stds)}
        numbers |= {"zero_variance": (groups.zero_std_fraction, 0.0)} | ({} if kl is None else {"kl": (kl, 0.0)})
        for name, scores in (watched or {}).items():
            if bool(scores.isfinite().any()):
                numbers[f"watched_{name}"] = _number(scores)
        return self.observe(step, numbers)

    def observe(self, step: int, numbers: Mapping[str, Number]) -> list[Finding]:
        """As `update`, of numbers already taken."""
        options = self.options
        self.latest = {name: number[0] for name, number in numbers.items()}
        for name, number in numbers.items():
            self.series.setdefault(name, Series()).add(step, number, options.baseline, max(options.windows))
        return self._new(f for name in numbers for f in check(step, name, self.series, options))

    def compare(self, step: int, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[Finding]:
        """Take in an evaluation on held-out prompts, see `check_heldout`; returns what was not known to be wrong."""
        return self._new(check_heldout(step, before, now, self.options))

    def _new(self, findings: Iterable[Finding]) -> list[Finding]:
        """Those not told yet, or long ago; they are told now."""
        fresh = []
        for finding in findings:
            last = self.raised.get(finding.name)
            if last is None or finding.step - last >= self.options.repeat_after:
                self.raised[finding.name] = finding.step
                fresh.append(finding)
        return fresh

    def action(self, findings: Sequence[Finding]) -> Action:
        """What the options say to do about these: nothing without any, warn of warnings, else as `options.action`."""
        if any(f.severity == "alarm" for f in findings):
            return self.options.action
        return "warn" if findings else "none"

    def state_dict(self) -> dict[str, Any]:
        """All it remembers, as JSON can hold it."""
        return {"series": {name: asdict(series) for name, series in self.series.items()}, "raised": dict(self.raised)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put `state_dict` back.

        Raises:
            ValueError: it is none.
        """
        if set(state) != {"series", "raised"}:
            raise ValueError(f"state: got keys {sorted(state)}, expected ['raised', 'series']")
        state = copy.deepcopy(dict(state))  # it may be another monitor's, which goes on
        self.series = {name: Series(**values) for name, values in state["series"].items()}
        self.raised = state["raised"]


def picture_numbers(images: Tensor, grid_periods: Sequence[int]) -> dict[str, Number]:
    """Mean and spread over pictures (N, 3, H, W) of each of their statistics."""
    numbers = {
        "saturation": pictures.saturation(images),
        "brightness": pictures.brightness(images),
        "contrast": pictures.contrast(images),
        "high_frequency": pictures.high_frequency(images),
        "jpeg_size": jpeg_kilobytes(images),
    }
    for period in grid_periods:
        if min(images.shape[-2:]) >= 4 * period:
            numbers[f"grid_{period}"] = pictures.grid_energy(images, period)
    return {name: _number(values) for name, values in numbers.items()}


def diversity_numbers(features: Tensor, group_ids: Tensor) -> dict[str, Number]:
    """Mean and spread over the groups of two or more of how unlike the features (N, D) within each are; {} without any.

    The Vendi score (Friedman and Dieng 2022, arXiv:2210.02410) as (score - 1) / (n - 1), so that copies give 0 and
    nothing in common 1, as with the mean cosine distance.
    """
    groups = [features.detach()[(group_ids == g).to(features.device)] for g in group_ids.unique()]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return {}
    distances = torch.tensor([pictures.cosine_distance(group) for group in groups])
    vendi = torch.tensor([(float(vendi_score(group)) - 1) / (len(group) - 1) for group in groups])
    return {"diversity_cosine": _number(distances), "diversity_vendi": _number(vendi)}


def first_groups(group_ids: Tensor, most: int) -> Tensor:
    """Which samples (N,), bool, belong to the first groups that together have at most `most`; at least one group."""
    chosen = torch.zeros(len(group_ids), dtype=torch.bool)
    for group in dict.fromkeys(group_ids.tolist()):
        members = (group_ids == group).cpu()
        if chosen.any() and int(chosen.sum() + members.sum()) > most:
            break
        chosen |= members
    return chosen


def _number(values: Tensor) -> Number:
    """Mean and standard deviation of the finite ones."""
    values = values.detach().double().cpu()
    values = values[values.isfinite()]
    return float(values.mean()), float(values.std(correction=0))
