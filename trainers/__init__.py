"""Training methods, a file each, run by `accelerate launch trainers/NAME.py` or `visalign train NAME`.

`TRAINERS` lists them: the command, messages, the README and the tests of every trainer read it. From outside:
`TRAINERS`, `load_trainer`.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from visalign.locations import check_location, load_location
from visalign.names import unknown_name

ANY = ("flow", "diffusion", "consistency")


@dataclass(frozen=True)
class Entry:
    """A trainer that ships: class NAME of module `visalign.trainers.KEY`, what it is, and for what.

    Attributes:
        kinds: of model that it takes.
        gradient: whether its reward must be differentiable.
        default_for: kinds of model for which it is the first to try.
    """

    name: str
    summary: str
    kinds: tuple[str, ...]
    gradient: bool = False
    default_for: tuple[str, ...] = ()


TRAINERS: dict[str, Entry] = {
    "flow_grpo": Entry("FlowGRPO", "GRPO for flow-matching models (the default)", ("flow",), default_for=("flow",)),
    "ddpo": Entry(
        "DDPO",
        "DDPO, RLCM and TexForce for diffusion and consistency models",
        ("diffusion", "consistency"),
        default_for=("diffusion", "consistency"),
    ),
    "adjoint_matching": Entry(
        "AdjointMatching",
        "the base tilted by a differentiable reward, by regression on adjoints",
        ("flow", "diffusion"),
        gradient=True,
    ),
    "reward_backprop": Entry(
        "RewardBackprop",
        "gradients of a differentiable reward: DRaFT, AlignProp, ReFL, SRPO and others",
        ANY,
        gradient=True,
    ),
    "vgpo": Entry("VGPO", "a value for each denoising step", ("flow",)),
    "tree_grpo": Entry(
        "TreeGRPO",
        "images of a prompt branch: BranchGRPO, TreeGRPO, TempFlow-GRPO, TP-GRPO, B2-DiffuRL",
        ("flow", "diffusion"),
    ),
}


def trainer_for(kind: str) -> str:
    """The trainer to try first on a kind of model."""
    return next(name for name, entry in TRAINERS.items() if kind in entry.default_for)


def load_trainer(name: str) -> Any:
    """A trainer's class by its name in TRAINERS ("-" and "_" alike), or a user's own by where it is.

    Raises:
        ValueError: an unknown name or location.
    """
    key = name.replace("-", "_")
    if key in TRAINERS:
        return getattr(importlib.import_module(f"visalign.trainers.{key}"), TRAINERS[key].name)
    if ":" not in name:
        raise unknown_name("trainer", name, [*TRAINERS, "file.py:Class"])
    check_location("trainer", name)
    return load_location("trainer", name)
