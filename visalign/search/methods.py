"""The searches by name, what each needs, and what its smallest run costs. Importing this imports none of them."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from visalign.locations import check_location, load_location
from visalign.names import unknown_name

if TYPE_CHECKING:
    from .records import Event


@dataclass(frozen=True)
class Method:
    """A search.

    Attributes:
        location: of its function (chain, **options) -> its events.
        summary: one line.
        noisy: whether its kernel must draw noise.
        gradient: whether its reward must be differentiable.
        plain: whether it runs on the model's usual sampler (for most the ODE) where none is asked for; others take the
            one with noise.
        smallest: the function beside it (T, its options) -> guided predictions of its smallest run; "": T.
    """

    location: str
    summary: str
    noisy: bool = False
    gradient: bool = False
    plain: bool = False
    smallest: str = ""

    @functools.cached_property
    def search(self) -> "Callable[..., Iterator[Event]]":
        return load_location("search", self.location)

    def least(self, num_steps: int, options: dict[str, Any]) -> int:
        """The guided predictions of its smallest run."""
        if not self.smallest:
            return num_steps
        return load_location("search", f"{self.location.partition(':')[0]}:{self.smallest}")(num_steps, options)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Its own options, by name."""
        return {k: p for k, p in inspect.signature(self.search).parameters.items() if p.kind is p.KEYWORD_ONLY}

    def check(self, name: str, options: dict[str, Any]) -> None:
        """Refuse options that it does not have, or of another type; values are checked where the search begins.

        Raises:
            ValueError: names the option.
        """
        for option, value in options.items():
            if option not in self.options:
                raise unknown_name(f"option of {name!r}", option, self.options)
            expected = inspect.formatannotation(self.options[option].annotation)
            if not _fits(value, expected):
                raise ValueError(f"{option}: got {value!r}, expected {expected}")


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of one of the plain types that an annotation names; what it names besides is not looked at."""
    kinds: dict[str, Any] = {"int": Integral, "float": Real, "bool": bool, "str": str, "None": type(None)}
    names = {part.strip() for part in annotation.split("|")}
    if not names <= set(kinds):
        return True
    if isinstance(value, bool):
        return "bool" in names
    return isinstance(value, tuple(kinds[name] for name in names))


def find_method(name: str) -> Method:
    """A search by its name in METHODS ("_" and "-" alike), or a user's function (chain, **options) by where it is.

    A user's function may set `noisy`, `gradient` and `plain` on itself, as `Method` has them.

    Raises:
        ValueError: an unknown name (names the nearest) or location.
    """
    if ":" not in name:
        if (key := name.replace("_", "-")) not in METHODS:
            raise unknown_name("search", name, [*METHODS, "module:function", "file.py:function"])
        return METHODS[key]
    check_location("search", name)
    function = load_location("search", name)
    if not callable(function):
        raise ValueError(f"search: got {name!r}, a {type(function).__name__}, expected a function of a chain")
    flags: dict[str, Any] = {flag: bool(getattr(function, flag, False)) for flag in ("noisy", "gradient", "plain")}
    return Method(name, (function.__doc__ or "").strip().partition("\n")[0], **flags)


def _ours(where: str, summary: str, **more: Any) -> Method:
    return Method(f"{__package__}.{where}", summary, **more)


METHODS: dict[str, Method] = {
    "best-of-n": _ours("best_of_n:best_of_n", "independent draws, the best is kept"),
    "random": _ours("noise.noise_search:random_search", "best of n in rounds of twice as many", plain=True),
    "zero-order": _ours("noise.noise_search:zero_order", "climbs among neighbours of the initial noise", plain=True),
    "paths": _ours("noise.noise_search:paths", "puts noise back into good samples, branches and selects", plain=True),
    "fk": _ours(
        "particles.steering:fk",
        "Feynman-Kac steering: particles weighted and resampled on the way",
        noisy=True,
        smallest="fk_least",
    ),
    "svdd": _ours(
        "particles.svdd:svdd",
        "at each step the best of several next states",
        noisy=True,
        smallest="svdd_least",
    ),
    "dts": _ours("tree.dts:dts", "diffusion tree sampling: draws follow the tilted law", noisy=True),
    "dts-star": _ours("tree.dts:dts_star", "diffusion tree search: rollouts from promising states", noisy=True),
    "rbf": _ours("noise.rollover:rbf", "rollover budget forcing: proposals until one is better", noisy=True),
    "guidance": _ours(
        "guidance:guidance",
        "steps pushed along the reward's gradient",
        gradient=True,
        smallest="guidance_least",
    ),
    "tds": _ours(
        "particles.twisted:tds",
        "particles pushed by the gradient and weighted for it",
        noisy=True,
        gradient=True,
        smallest="twisted_least",
    ),
    "das": _ours(
        "particles.twisted:das",
        "as tds, tempered from the first noise on",
        noisy=True,
        gradient=True,
        smallest="twisted_least",
    ),
    "reno": _ours("noise.noise_optimization:reno", "gradient ascent on the initial noise", gradient=True, plain=True),
    "dno": _ours("noise.noise_optimization:dno", "gradient ascent on the noises of all steps"),
    "refine": _ours("prompts.refine:refine", "a critic says what is wrong; reworded, drawn again", plain=True),
    "enhance": _ours("prompts.rewriting:enhance", "the prompt rewritten by a language model, if that scores better"),
}
