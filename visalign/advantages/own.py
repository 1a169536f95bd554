"""A user's own advantages: a function (rewards, group_ids) -> advantages, by where it is."""

from collections.abc import Callable

import torch
from torch import Tensor

from visalign.locations import check_location, load_location


def check_advantages(advantages: str, std: str | None) -> None:
    """Refuse what is neither "group" nor the location of a function; nothing is run.

    Raises:
        ValueError: no such location, or a `std`, which is of the advantages by group, with a function.
    """
    if advantages == "group":
        return
    if ":" not in advantages:
        expected = "'group', 'module:function' or 'path/to/file.py:function'"
        raise ValueError(f"advantages: got {advantages!r}, expected {expected}")
    check_location("advantages", advantages)
    if std is not None:
        raise ValueError(f"advantage_std: got {std!r} with advantages {advantages!r}, expected None")


def load_advantages(advantages: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function at a location.

    Raises:
        ValueError: it cannot be imported, or is no function.
    """
    function = load_location("advantages", advantages)
    if not callable(function):
        raise ValueError(f"advantages: got {advantages!r}, a {type(function).__name__}, expected a function")
    return function


def own_advantages(advantages: str, rewards: Tensor, group_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Advantages (M,) of rewards (M,), float64, and group ids (M,), int64, by the function at a location.

    It is given those of the `valid` samples, (M,) bool, alone; the others get 0. None: all are.

    Raises:
        ValueError: what it gives is not (M,) finite numbers.
    """
    if valid is not None and not valid.all():
        out = torch.zeros(len(rewards), dtype=torch.float64)
        out[valid] = own_advantages(advantages, rewards[valid], group_ids[valid]).double()
        return out
    values = torch.as_tensor(load_advantages(advantages)(rewards.clone(), group_ids.clone()))
    if values.shape != rewards.shape or not values.isfinite().all():
        kind = f"shape {tuple(values.shape)}" if values.shape != rewards.shape else "numbers that are not finite"
        raise ValueError(f"advantages: got {kind} from {advantages!r}, expected {tuple(rewards.shape)}, all finite")
    return values
