"""Generate, critique, refine (Wang et al. 2026, arXiv:2604.11626): draw, be told what is wrong, ask better, draw again.

Reconstructed from the paper's loop, with a rule of our own for what is kept: the published script keeps the second
picture whatever it is like.
"""

import inspect
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from visalign.names import unknown_name
from visalign.search.chain import Chain
from visalign.search.records import Event

from .critics import Critic, Critique, make_critic

ACCEPT = ("reward", "critic", "always")


@dataclass
class Round:
    """A picture of one wording.

    Attributes:
        words: what the generator was told.
        reward: of the picture, against the prompt.
        latents, image: (1, ...), final, and (1, 3, H, W) on the CPU.
        critiques: of this picture, in order; each proposes other words.
        tried: how many of the proposals have been looked at.
        accepted: whether it took the place of the one before.
    """

    words: str
    reward: float
    latents: Tensor
    image: Tensor
    critiques: list[Critique] = field(default_factory=list)
    tried: int = 0
    accepted: bool = False

    def score(self, accept: str) -> float:
        """What the rule of acceptance compares: the reward, or the first critique's score, NaN where that failed."""
        if accept != "critic":
            return self.reward
        return self.critiques[0].score if self.critiques[0].problem is None else math.nan


@dataclass
class Refinement:
    """All rounds so far, `kept` the number of the one that stands, and how many proposals came to nothing."""

    rounds: list[Round]
    margin: float
    kept: int = 0
    rejections: int = 0

    @property
    def standing(self) -> Round:
        return self.rounds[self.kept]


def refine(
    chain: Chain,
    *,
    critic: str | Critic = "shapes",
    critic_options: Mapping[str, Any] | None = None,
    max_rounds: int = 3,
    accept: str = "reward",
    margin: float = 0.0,
    rescores: int = 0,
    good: float | None = 3.0,
    max_rejections: int = 2,
    min_similarity: float = 0.0,
) -> Iterator[Event]:
    """Draw sample 0, then again with the same noise and the words that a critic proposes; T predictions a picture.

    Rewards and critiques always judge against the chain's prompt, never the refined words. It ends at a picture that
    the critic finds good, after `max_rounds` or `max_rejections`, with the budget, or when the words repeat. Its
    state is a `Refinement`: state.rounds[state.kept] stands; the event's `best` is the best by the reward, as ever.

    Args:
        critic: a `Critic`, its name in CRITICS or "module:attribute"; made with `critic_options`.
        max_rounds: pictures after the first (published: 1).
        accept: "reward" keeps a picture that scores more than the one that stands, plus `margin`; "critic" likewise by
            the critics' scores, one more critique a picture; "always" keeps every one, as published.
        rescores: how often the first picture is scored, to find how much scores scatter: `margin` is then at least
            twice their standard deviation.
        good: both text faithfulness and physical quality marked at least so: nothing is left to refine; None: never.
        max_rejections: pictures not kept, and proposals that fail, are too long or too far off, before it ends.
        min_similarity: the least `kept_words` of a proposal.

    Raises:
        ValueError: an option or prompt that cannot work, before anything is spent.
    """
    _check(max_rounds, accept, margin, rescores, good, max_rejections, min_similarity)
    critic = make_critic(critic, **(critic_options or {}))
    if hasattr(critic, "check_prompt"):
        critic.check_prompt(chain.prompt)
    noise = chain.initial([0])
    state = Refinement([_draw(chain, noise, chain.prompt, 0)], margin)
    yield chain.event(state, "the prompt as it is")

    while state.rejections < max_rejections and len(state.rounds) <= max_rounds:
        if chain.ledger.left < chain.num_steps:
            return
        critique = _next_critique(chain, critic, state.standing)
        if good is not None and critique.is_good(good):
            return
        words = critique.refined or ""
        if any(_plain(words) == _plain(round_.words) for round_ in state.rounds):
            return  # the same noise and words give the same picture
        problem = critique.problem or _unfit(chain, words, min_similarity)
        if problem is not None:
            state.rejections += 1
            yield chain.event(state, f"no proposal: {problem}")
            continue
        if rescores and len(state.rounds) == 1:
            state.margin = max(margin, noise_margin(_rescored(chain, critic, state.standing, accept, rescores)))

        round_ = _draw(chain, noise, words, len(state.rounds))
        if accept == "critic":
            _criticise(chain, critic, state.standing, 1)
            _criticise(chain, critic, round_, 1)
        gain = accept == "always" or accepts(round_.score(accept), state.standing.score(accept), state.margin)
        state.rounds.append(round_)
        if gain:
            round_.accepted, state.kept = True, len(state.rounds) - 1
        else:
            state.rejections += 1
        yield chain.event(state, f"{'kept' if gain else 'rejected'}: {words}")


def accepts(new: float, old: float, margin: float = 0.0) -> bool:
    """Whether a new score replaces the old one: new > old + margin. A missing score (NaN) loses to any other."""
    return not math.isnan(new) and (math.isnan(old) or new > old + margin)


def noise_margin(scores: Sequence[float]) -> float:
    """Twice the standard deviation of scores of one picture: what a gain must exceed to be more than scatter."""
    return 2 * statistics.stdev(scores)


def kept_words(original: str, refined: str) -> float:
    """The share of an original's words that a refined version still has, in [0, 1]: sees what is dropped, not added."""
    wanted, there = (set(re.findall(r"\w+", text.lower())) for text in (original, refined))
    return len(wanted & there) / len(wanted) if wanted else 1.0


def lost_tokens(chain: Chain, text: str) -> int:
    """Tokens at the end of a text that no text encoder of the chain's generator reads; 0 where it has none."""
    pipeline = getattr(chain.model, "pipeline", None)
    if pipeline is None:
        return 0
    call = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    given = {**getattr(chain.model, "call_kwargs", {}), **chain.inputs}
    limit = given.get("max_sequence_length", call.default if call else None) or math.inf
    lost = []
    for name, part in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and part is not None and encoder is not None:
            room = part.model_max_length  # CLIP always reads so much; the limit is for the encoders beside it
            room = room if type(encoder).__name__.startswith("CLIP") else min(room, limit)
            lost.append(len(part(text, truncation=False).input_ids) - room)
    return int(max(0, min(lost, default=0)))


def _check(
    max_rounds: int,
    accept: str,
    margin: float,
    rescores: int,
    good: float | None,
    max_rejections: int,
    min_similarity: float,
) -> None:
    for name, value, least in (("max_rounds", max_rounds, 0), ("max_rejections", max_rejections, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected >= {least}")
    if accept not in ACCEPT:
        raise unknown_name("accept", accept, ACCEPT)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin: got {margin}, expected >= 0")
    if rescores < 0 or rescores == 1:
        raise ValueError(f"rescores: got {rescores}, expected 0, or at least 2 scores to compare")
    if accept == "always" and (rescores or margin):
        raise ValueError(f"margin, rescores: got {margin}, {rescores}, expected 0 where accept is 'always'")
    if good is not None and not 1 <= good <= 4:
        raise ValueError(f"good: got {good}, expected a mark, 1 .. 4, or None")
    if not 0 <= min_similarity <= 1:
        raise ValueError(f"min_similarity: got {min_similarity}, expected 0 .. 1")


def _draw(chain: Chain, noise: Tensor, words: str, number: int) -> Round:
    with chain.worded(words):
        latents = chain.finish(noise, 0, [0])
        reward = float(chain.result(latents, [number])[0])
    assert chain.images is not None
    return Round(words, reward, latents, chain.images)


def _criticise(chain: Chain, critic: Critic, round_: Round, count: int) -> None:
    """Have a picture criticised until it has `count` critiques."""
    while len(round_.critiques) < count:
        [critique] = critic(round_.image, [chain.prompt], attempt=len(round_.critiques), context=chain.context)
        chain.ledger.tokens += critique.tokens
        round_.critiques.append(critique)


def _next_critique(chain: Chain, critic: Critic, standing: Round) -> Critique:
    _criticise(chain, critic, standing, standing.tried + 1)
    standing.tried += 1
    return standing.critiques[standing.tried - 1]


def _rescored(chain: Chain, critic: Critic, first: Round, accept: str, count: int) -> list[float]:
    if accept == "critic":
        _criticise(chain, critic, first, count)
        scores = [critique.score for critique in first.critiques if critique.problem is None]
        return scores if len(scores) > 1 else [0.0, 0.0]  # too few to tell
    return [float(chain.value(first.latents)[0]) for _ in range(count)]


def _unfit(chain: Chain, words: str, min_similarity: float) -> str | None:
    """Why a proposal is not drawn, or None."""
    if not words:
        return "no refined request"
    lost = lost_tokens(chain, words)
    if lost > lost_tokens(chain, chain.prompt):
        return f"{lost} tokens longer than the generator reads"
    similarity = kept_words(chain.prompt, words)
    return f"keeps {similarity:.0%} of the prompt's words" if similarity < min_similarity else None


def _plain(words: str) -> str:
    return " ".join(words.split())
