"""Rewards that other installed packages bring, by the entry point group `visalign.rewards`.

In such a package's pyproject.toml:

    [project.entry-points."visalign.rewards"]
    sharpness = "my_package.rewards:Sharpness"

where the value is what `register_reward` takes: a class or function that is called with the options and gives the
reward, or a reward function whose first argument is `images`. A name of this project's own always means its own.
"""

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

GROUP = "visalign.rewards"


@functools.cache
def _found() -> dict[str, list[EntryPoint]]:
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    return points


def entry_point_names() -> list[str]:
    """Names that installed packages announce; none is imported."""
    return sorted(_found())


def load_entry_point(name: str) -> Callable:
    """The factory that a package announced as `name`.

    Raises:
        ValueError: two packages announce it, importing fails, or it is not callable; names the package.
    """
    points = _found()[name]
    where = [f"{point.value!r} of package {point.dist.name if point.dist else 'unknown'!r}" for point in points]
    if len(set(where)) > 1:
        raise ValueError(f"reward {name!r}: got several entry points, {' and '.join(where)}, expected one")
    try:
        loaded = points[0].load()
    except Exception as error:  # importing another's package may fail in any way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"reward {name!r}: could not load {where[0]}: {problem}") from error
    if not callable(loaded):
        raise ValueError(f"reward {name!r}: got {where[0]}, which is a {type(loaded).__name__}, expected a callable")
    if not isinstance(loaded, type) and next(iter(inspect.signature(loaded).parameters), None) == "images":
        return lambda: loaded  # the reward itself
    return loaded
