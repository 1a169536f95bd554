"""Align image and video generators with what people want: any diffusers pipeline, any visual reward.

The public face, imported when used: `Generator` (a pipeline, driven step by step), `rollout` (samples with their
log-probabilities), `make_reward` and `score`, and the package `search` (`search.run`). What else is public is listed in
`docs/releasing.md`.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from visalign.lazy import lazily

if TYPE_CHECKING:
    from visalign import search
    from visalign.pipeline.generator import Generator
    from visalign.rewards import make_reward, score
    from visalign.sampling.rollout import rollout

__all__ = ["Generator", "__version__", "make_reward", "rollout", "score", "search"]
__version__ = version("visalign")

_lazy = lazily(
    __name__,
    pipeline__generator=("Generator",),
    rewards=("make_reward", "score"),
    sampling__rollout=("rollout",),
)


def __getattr__(name: str) -> Any:
    if name == "search":
        import visalign.search as search

        return search
    return _lazy(name)


def __dir__() -> list[str]:
    return __all__
