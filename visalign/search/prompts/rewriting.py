"""Rewriting the prompt before the picture is drawn: the inference of PromptEnhancer (arXiv:2509.04545).

A language model says the same in more words, in the order that generators follow best. It helps on average and hurts
at times (text layout, interactions), so `choose_words` compares both wordings on the same noise and keeps the better.

A rewriter is any function of a prompt that returns a prompt; every search takes one by `reword` or `choose_words`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visalign.locations import load_location
from visalign.rewards.vlm.chat import Chat, Message
from visalign.rewards.vlm.judging import SamplingParams, load_template, open_chat
from visalign.search.chain import Chain
from visalign.search.records import Event

from .critics import count_tokens
from .key_points import KEY_POINTS
from .refine import accepts
from .text_chat import TextChat

Rewrite = Callable[[str], str]

SYSTEM = f"""You reword requests for an image generator so that it misses nothing.
Keep everything that is asked for: subjects, actions, counts, style, layout, relations, attributes, and text, letter by
letter. Add nothing that changes what is meant, and nothing that is a matter of taste.
Start with one sentence on the whole picture. Then describe its parts, from the main subject to the background, in an
order that follows their places. Sum up at the end, and close with one sentence on the style.
Write plainly, without praise. Take particular care of what generators get wrong: {", ".join(KEY_POINTS)}.
Write the reworded request, in the language of the request, between <answer> and </answer>."""


def read_rewrite(text: str, original: str) -> str:
    """The rewritten prompt in a language model's answer; the original where there is none, or it is cut off.

    The last <answer> counts; without any, what is left beside <think>. Templates that open <think> themselves leave
    only its end.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    text = text.rpartition("</think>")[2]
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if not answers and re.search(r"<think>|<answer>", text):
        return original
    return (answers[-1] if answers else text).strip() or original


class Rewriter:
    """A language model as rewriter; where it fails, the prompt stays as it is and `problems` says why.

    Args:
        model, url, chat_options: a text model run here (`TextChat`), or with a `url` one at an OpenAI-compatible
            endpoint (`RemoteChat`, which tries again); `chat`: one already made.
        system: the instruction, words or a .txt file; None: SYSTEM. A fine-tuned checkpoint wants those of its authors.
        temperature, top_p, max_tokens, seed: of the answer; 0 is greedy.
        thinking: whether a model that can think before it answers does; at endpoints None leaves the field out, for
            servers that refuse it.

    Raises:
        ValueError: options that cannot work.
    """

    def __init__(
        self,
        model: str = "PromptEnhancer/PromptEnhancer-7B",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        system: str | Path | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        seed: int = 0,
        thinking: bool | None = False,
    ) -> None:
        self.params = SamplingParams(max_tokens, temperature, top_p, seed)
        self.system = SYSTEM if system is None else load_template("prompt_enhancer", system)
        self.tokens = 0  # written so far
        self.problems: list[str] = []
        options = dict(chat_options or {})
        if chat is None and url is None:
            chat = TextChat(model, **{"thinking": thinking, **options})
        elif chat is None and thinking is not None:
            body = dict(options.get("extra_body") or {})
            options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": thinking}, **body}
        self.chat = open_chat(chat, model, url, options)

    def __call__(self, prompt: str) -> str:
        return self.rewrite([prompt])[0]

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """A rewritten prompt for each, all asked for at once."""
        turns = [[Message("system", (self.system,)), Message("user", (prompt,))] for prompt in prompts]
        drawn = {name: getattr(self.params, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        replies = self.chat(turns, **drawn)
        self.problems += [f"no answer: {reply.error}" for reply in replies if reply.error is not None]
        self.tokens += sum(count_tokens(self.chat, reply.text) for reply in replies)
        return [read_rewrite(reply.text, prompt) for prompt, reply in zip(prompts, replies)]


def make_rewriter(rewrite: str | Rewrite | None, **options: Any) -> Rewrite:
    """A rewriter: a function of a prompt as it is, "module:attribute", or with `options` the model of a `Rewriter`.

    Raises:
        ValueError: nothing given, or options for what takes none.
    """
    if rewrite is None:
        raise ValueError("rewrite: got None, expected a function of a prompt, 'module:attribute', or a model's name")
    named = isinstance(rewrite, str) and re.fullmatch(r"(.+\.py|[\w.]+):\w+", rewrite)
    if (named or not isinstance(rewrite, str)) and options:
        raise ValueError(f"rewrite_options: got {sorted(options)}, expected none for a function")
    if named and isinstance(rewrite, str):
        return load_location("rewrite", rewrite)
    if isinstance(rewrite, str):
        return Rewriter(rewrite, **options)
    if not callable(rewrite):
        raise ValueError(f"rewrite: got {rewrite!r}, expected a function of a prompt")
    return rewrite


@dataclass
class Rewording:
    """A prompt and its rewrite; `rewards` of both where they were compared, and the `words` that were chosen."""

    prompt: str
    rewritten: str
    words: str
    rewards: dict[str, list[float]] = field(default_factory=dict)


def reword(chain: Chain, rewrite: Rewrite) -> Rewording:
    """Tell the chain's generator the rewritten prompt from now on, unseen. Tokens are paid; an empty one is refused."""
    before = getattr(rewrite, "tokens", 0)
    words = rewrite(chain.prompt).strip() or chain.prompt
    chain.ledger.tokens += getattr(rewrite, "tokens", 0) - before
    chain.words = words
    return Rewording(chain.prompt, words, words)


def choose_words(chain: Chain, rewrite: Rewrite, samples: int = 1, margin: float = 0.0) -> Rewording:
    """As `reword`, if pictures of the rewritten prompt are better: then, and only then, its words stay.

    Compares the mean rewards, against the prompt, of samples 0 .. samples - 1 drawn with either wording from the same
    noise: 2 * samples * T predictions, fewer samples where fewer are left. The pictures count as results.
    """
    rewording = reword(chain, rewrite)
    count = min(samples, chain.ledger.left // (2 * chain.num_steps))
    chain.words = rewording.words = chain.prompt
    if rewording.rewritten == chain.prompt or not count:
        return rewording
    noise, entities = chain.initial(range(count)), range(count)
    for words in (chain.prompt, rewording.rewritten):
        with chain.worded(words):
            rewording.rewards[words] = chain.result(chain.finish(noise, 0, entities), entities).tolist()
    old, new = (math.fsum(rewards) / count for rewards in rewording.rewards.values())
    if accepts(new, old, margin):
        chain.words = rewording.words = rewording.rewritten
    return rewording


def enhance(
    chain: Chain,
    *,
    rewrite: str | Rewrite | None = None,
    rewrite_options: Mapping[str, Any] | None = None,
    samples: int = 1,
    margin: float = 0.0,
) -> Iterator[Event]:
    """Rewrite the prompt, keep the better wording (`choose_words`), and draw the rest of the budget with it.

    Args:
        rewrite: see `make_rewriter`, as for `rewrite_options`.
        samples: pictures of either wording that are compared.
        margin: how much better those of the rewritten prompt must be.

    Raises:
        ValueError: options that cannot work, before anything is spent.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected >= 1")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin: got {margin}, expected >= 0")
    before = chain.words
    rewording = choose_words(chain, make_rewriter(rewrite, **(rewrite_options or {})), samples, margin)
    words, chain.words = chain.words, before
    count_drawn = max((len(rewards) for rewards in rewording.rewards.values()), default=0)
    if count_drawn:
        yield chain.event(rewording, f"drawn with: {words}")
    while count := min(chain.batch_size, chain.ledger.left // chain.num_steps):
        entities = range(count_drawn, count_drawn + count)
        with chain.worded(words):
            chain.result(chain.finish(chain.initial(entities), 0, entities), entities)
        count_drawn += count
        yield chain.event(rewording, f"{count_drawn} drawn with: {words}")
