"""The searches by name, what each needs, and what its smallest run costs."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from visalign.names import unknown_name

from .best_of_n import best_of_n
from .guidance import guidance, guidance_least
from .noise.noise_optimization import dno, reno
from .noise.noise_search import paths, random_search, zero_order
from .noise.rollover import rbf
from .particles.steering import fk, fk_least
from .particles.svdd import svdd, svdd_least
from .particles.twisted import das, tds, twisted_least
from .prompts.refine import refine
from .prompts.rewriting import enhance
from .records import Event
from .tree.dts import dts, dts_star

Least = Callable[[int, dict[str, Any]], int]


@dataclass(frozen=True)
class Method:
    """A search by name.

    Attributes:
        search: (chain, **options) -> its events.
        summary: one line.
        noisy: whether its kernel must draw noise.
        gradient: whether its reward must be differentiable.
        plain: whether it runs on the model's usual sampler (for most the ODE) where none is asked for; others take the
            one with noise.
        least: the guided predictions of its smallest run, from T and its options.
    """

    search: Callable[..., Iterator[Event]]
    summary: str
    noisy: bool = False
    gradient: bool = False
    plain: bool = False
    least: Least = lambda steps, options: steps

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


METHODS: dict[str, Method] = {
    "best-of-n": Method(best_of_n, "independent draws, the best is kept"),
    "random": Method(random_search, "best of n in rounds of twice as many", plain=True),
    "zero-order": Method(zero_order, "climbs among neighbours of the initial noise", plain=True),
    "paths": Method(paths, "puts noise back into good samples, branches and selects", plain=True),
    "fk": Method(fk, "Feynman-Kac steering: particles weighted and resampled on the way", noisy=True, least=fk_least),
    "svdd": Method(svdd, "at each step the best of several next states", noisy=True, least=svdd_least),
    "dts": Method(dts, "diffusion tree sampling: draws follow the tilted law", noisy=True),
    "dts-star": Method(dts_star, "diffusion tree search: rollouts from promising states", noisy=True),
    "rbf": Method(rbf, "rollover budget forcing: proposals until one is better", noisy=True),
    "guidance": Method(guidance, "steps pushed along the reward's gradient", gradient=True, least=guidance_least),
    "tds": Method(
        tds, "particles pushed by the gradient and weighted for it", noisy=True, gradient=True, least=twisted_least
    ),
    "das": Method(das, "as tds, tempered from the first noise on", noisy=True, gradient=True, least=twisted_least),
    "reno": Method(reno, "gradient ascent on the initial noise", gradient=True, plain=True),
    "dno": Method(dno, "gradient ascent on the noises of all steps"),
    "refine": Method(refine, "a critic says what is wrong, the prompt is reworded, drawn again", plain=True),
    "enhance": Method(enhance, "the prompt rewritten by a language model, if that scores better"),
}
