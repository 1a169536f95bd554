"""What a reward is, the registry of names, and how a plain function becomes a reward."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from visalign.names import unknown_name

from .entry_points import entry_point_names, load_entry_point

KINDS = ("pointwise", "groupwise", "setwise")
Context = Mapping[str, Any]  # further inputs of a reward by name; see CONTEXT
CONTEXT = {  # names that mean the same to all rewards; a reward may need others
    "references": "list of N lists of pictures (3, H, W) in [0, 1]: subjects, edit sources, exemplars",
    "metadata": "list of N dicts: what a verifier is to check, e.g. GenEval's include and exclude",
    "group_ids": "int64 (N,): the same number for samples of the same prompt's group",
    "fps": "frames a second of videos",
}
_F = TypeVar("_F", bound=Callable)
_REWARDS: dict[str, Callable] = {}
_MODULES: dict[str, str] = {}  # names that register themselves when their module is imported


@dataclass(frozen=True)
class RewardOutput:
    """Scores of N samples. A reward may return this, or just its scores.

    A sample that could not be scored (an unreadable answer, a server that gave up on it) has `valid` False; its score
    is not looked at. Only a NaN where `valid` is True is an error.
    """

    scores: Tensor  # (N,), raw, higher is better
    criteria: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each; NaN where one does not apply
    rationale: Sequence[str | None] | None = None  # N reasons in words
    valid: Tensor | None = None  # (N,) bool; None: all
    uncertainty: Tensor | None = None  # (N,), >= 0, in the scores' unit unless the reward says otherwise
    extra: Mapping[str, Any] = field(default_factory=dict)  # whatever else, e.g. lists of N

    @property
    def is_valid(self) -> Tensor:
        """(N,) bool, on the CPU."""
        return torch.ones(len(self.scores), dtype=torch.bool) if self.valid is None else self.valid.cpu()


@runtime_checkable
class Reward(Protocol):
    """Scores pictures: images (N, 3, H, W), float in [0, 1], and N prompts to (N,) raw scores, higher is better.

    Returns the scores, or a `RewardOutput` with what else it knows. Videos are (N, F, 3, H, W).

    A "pointwise" reward scores each picture by itself, so a batch scores as its pictures do one by one. A "groupwise"
    one compares the pictures of a group (`context["group_ids"]`; without it all are one group) and must see each group
    whole. A "setwise" one scores all it is given as one set; its scores are each sample's share in that.

    Further attributes, read where they are set: `media` ("images", "videos" or "both"), `stochastic`, `noisy_ok`
    (whether it may be asked about estimates under way), `checkpoints`, `licence`, `source`.
    """

    @property
    def name(self) -> str: ...
    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images."""

    @property
    def kind(self) -> str:
        """One of KINDS."""

    @property
    def range(self) -> tuple[float, float]:
        """Bounds no score leaves; may be infinite."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What is read besides the images: "prompts", or keys that the context must hold."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], context: Context | None = None
    ) -> Tensor | RewardOutput: ...


class RewardError(ValueError):
    """A reward that cannot give a usable score: one line naming the reward, the sample and its prompt."""

    def __init__(self, reward: str, problem: str, sample: int | None = None, prompt: str | None = None) -> None:
        where = "" if sample is None else f", sample {sample}"
        where += "" if prompt is None else f", prompt {_shortened(repr(prompt), 300)}"
        super().__init__(" ".join(f"reward {reward!r}{where}: {_shortened(problem, 800)}".split()))
        self.reward, self.sample, self.prompt = reward, sample, prompt


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def register_reward(name: str) -> Callable[[_F], _F]:
    """Decorator: make_reward(name, **options) calls this class or function with the options."""

    def add(factory: _F) -> _F:
        if name in _REWARDS:
            raise ValueError(f"name: got {name!r}, already registered, by {_REWARDS[name]!r}")
        _REWARDS[name] = factory
        return factory

    return add


def announce_reward(name: str, module: str) -> None:
    """Say that importing `module` registers `name`, so that it can be listed, and found when asked for."""
    _MODULES[name] = module


def reward_names() -> list[str]:
    """Every name that make_reward knows, sorted."""
    return sorted({*_REWARDS, *_MODULES, *entry_point_names()})


def reward_factory(name: str) -> Callable:
    """The class or function registered as `name`."""
    if name not in _REWARDS and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _REWARDS and name in entry_point_names():
        return load_entry_point(name)
    if name not in _REWARDS:
        raise unknown_name("reward", name, reward_names())
    return _REWARDS[name]


def check_prompts(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless `prompts` are as many strings, in an order, as there are images."""
    ordered = hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")  # an array too, but no set or iterator
    if isinstance(prompts, (str, Mapping)) or not ordered or not all(isinstance(prompt, str) for prompt in prompts):
        kind = "other things than strings" if ordered and not isinstance(prompts, Mapping) else type(prompts).__name__
        kind = "one string" if isinstance(prompts, str) else kind
        raise ValueError(f"prompts: got {kind}, expected a list of {len(images)} strings")
    if len(prompts) != len(images):
        raise ValueError(f"prompts: got {len(prompts)}, expected {len(images)}, one per image")
    for n, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # no tokenizer takes it, and what they say of it is obscure
            problem = f"got a lone surrogate at {n}, in {prompt[:60]!r}, expected Unicode text"
            raise ValueError(f"prompts: {problem}") from error


class FunctionReward:
    """A user's callable as a reward; its signature is read once. Attributes it does not set get cautious defaults."""

    def __init__(self, function: Callable, name: str) -> None:
        takes = reward_arguments(function, name)
        self._function, self._takes = function, takes
        self.name: str = getattr(function, "name", name)
        self.differentiable: bool = getattr(function, "differentiable", False)
        self.kind: str = getattr(function, "kind", "pointwise")
        self.range: tuple[float, float] = getattr(function, "range", (-math.inf, math.inf))
        self.media: str = getattr(function, "media", "images")
        default = ("prompts",) if "prompts" in takes else ()
        self.needs: tuple[str, ...] = tuple(getattr(function, "needs", default))
        if self.kind not in KINDS:
            raise ValueError(f"kind of reward {name!r}: got {self.kind!r}, expected one of {KINDS}")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor | RewardOutput:
        given = {"prompts": prompts, "context": context}
        return self._function(images, **{argument: given[argument] for argument in self._takes})


def reward_arguments(function: Callable, name: str) -> tuple[str, ...]:
    """Which of "prompts" and "context" the callable takes after its images.

    Raises:
        ValueError: it is no callable `(images[, prompts[, context]])`; arguments of other names need defaults.
    """
    expected = "expected (images), (images, prompts) or (images, prompts, context)"
    if not callable(function):
        raise ValueError(f"reward {name!r}: got {type(function).__name__}, expected a function of (images, prompts)")
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].name != "images":
        raise ValueError(f"arguments of reward {name!r}: got {inspect.signature(function)}, {expected}")
    for p in parameters[1:]:
        optional = p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        known = p.name in ("prompts", "context") and p.kind is not p.POSITIONAL_ONLY
        if not known and not optional:
            raise ValueError(f"arguments of reward {name!r}: got {inspect.signature(function)}, {expected}")
    return tuple(p.name for p in parameters[1:] if p.name in ("prompts", "context"))


def as_reward(function: Callable, name: str | None = None) -> Reward:
    """`function` itself if it is a reward in full, else wrapped into one."""
    name = str(name or getattr(function, "name", "") or getattr(function, "__name__", type(function).__name__))
    if isinstance(function, Reward) and reward_arguments(function, name) == ("prompts", "context"):
        if function.kind not in KINDS:
            raise ValueError(f"kind of reward {name!r}: got {function.kind!r}, expected one of {KINDS}")
        return function
    return FunctionReward(function, name)


def as_scores(scores: Any, name: str, prompts: Sequence[str]) -> Tensor:
    """What a reward returned as a float32 tensor (N,), wherever it lies, with its gradient.

    Raises:
        RewardError: not (N,) numbers. Values are not looked at.
    """
    n = len(prompts)
    try:
        scores = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"got {type(scores).__name__}, expected a tensor ({n},), one score per image"
        raise RewardError(name, problem, prompt=prompts[0]) from error
    if scores.shape != (n,):
        problem = f"got scores of shape {tuple(scores.shape)} for {n} images, expected ({n},), one score per image"
        raise RewardError(name, problem, prompt=prompts[0])
    if scores.is_complex():
        raise RewardError(name, f"got scores of {scores.dtype}, expected real numbers", prompt=prompts[0])
    return scores.float()


def as_output(result: Any, name: str, prompts: Sequence[str]) -> RewardOutput:
    """What a reward returned, checked: (N,) float32 scores and as many of everything that comes with them.

    Raises:
        RewardError: wrong lengths or types. Values are not looked at.
    """
    if not isinstance(result, RewardOutput):
        return RewardOutput(as_scores(result, name, prompts))
    n = len(prompts)
    criteria = {key: as_scores(value, f"{name}.{key}", prompts) for key, value in result.criteria.items()}
    doubt = None if result.uncertainty is None else as_scores(result.uncertainty, f"{name}.uncertainty", prompts)
    valid = result.valid
    if valid is not None:
        valid = torch.as_tensor(valid)
        if valid.dtype != torch.bool or valid.shape != (n,):
            raise RewardError(name, f"got valid {valid.dtype} {tuple(valid.shape)}, expected bool ({n},)")
    if result.rationale is not None and len(result.rationale) != n:
        raise RewardError(name, f"got {len(result.rationale)} rationales for {n} images, expected {n}")
    scores = as_scores(result.scores, name, prompts)
    return RewardOutput(scores, criteria, result.rationale, valid, doubt, result.extra)
