"""Reward models by name. Importing this loads none of them; each is imported when it is made."""

from .base import (
    FunctionReward,
    Reward,
    RewardError,
    announce_reward,
    as_reward,
    register_reward,
    reward_names,
)
from .scoring import CombinedReward, Member, ScoreResult, score
from .spec import RewardSpec, Term, make_reward, parse_spec

__all__ = [
    "CombinedReward",
    "FunctionReward",
    "Member",
    "Reward",
    "RewardError",
    "RewardSpec",
    "ScoreResult",
    "Term",
    "as_reward",
    "make_reward",
    "parse_spec",
    "register_reward",
    "reward_names",
    "score",
]

for _name, _module in {
    "aesthetic": "aesthetic",
    "clip": "clip",
    "clip_match": "clip",
    "gold": "gold",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
}.items():
    announce_reward(_name, f"visalign.rewards.{_module}")
