"""Reward models by name. Importing this loads none of them; each is imported when it is made.

Here: what a reward is (`base`), how one is named (`spec`), called safely (`scoring`), combined (`combine`, `shaping`,
`aggregate`), the table of names (`registry`); the rewards themselves in rooms by what they look at. From outside: the
names below, `vlm` for judges of one's own, `groups.pairwise`, `groups.sets`, `audit`.
"""

from .base import (
    FunctionReward,
    Reward,
    RewardError,
    RewardOutput,
    as_reward,
    register_reward,
    reward_names,
)
from .failures import fill_invalid
from .registry import REWARDS
from .scoring import CombinedReward, Member, Scores, score
from .spec import RewardSpec, Term, make_reward, parse_spec

__all__ = [
    "REWARDS",
    "CombinedReward",
    "FunctionReward",
    "Member",
    "Reward",
    "RewardError",
    "RewardOutput",
    "RewardSpec",
    "Scores",
    "Term",
    "as_reward",
    "fill_invalid",
    "make_reward",
    "parse_spec",
    "register_reward",
    "reward_names",
    "score",
]
