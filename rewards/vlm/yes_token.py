"""Yes/no questions to a vision-language model, answered by the probability of its first token.

Three conventions, which differ and are never mixed (z are logits at the answer's place):
  "full"       P(yes) = exp(z_yes - logsumexp(z)), over the whole vocabulary;
  "binary"     P(yes) = sigmoid(z_yes - z_no), of the two answers only;
  "canonical"  the same with each answer's tokens of any case and with or without a space taken together.

A model here answers by one row product with the last hidden state, no generation; what questions begin with in common
(system turn, references, a picture that many questions are about) runs once. To ask K questions on one picture:

    judge = YesNo("Qwen/Qwen2.5-VL-7B-Instruct")
    answers = judge.ask([Message("user", (picture,))], ["Is it sharp? ...", "Is there a cat? ..."])
    answers.probability  # (K,)
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visalign.names import unknown_name

from .chat import Message, Reply
from .judging import make_chat

if TYPE_CHECKING:
    from .model import VLM
    from .prompt import Prompt

CONVENTIONS = ("full", "binary", "canonical")
TOP_LOGPROBS = 20  # the most that servers give unless told otherwise

Conversation = Sequence[Message]


@dataclass(frozen=True)
class Answers:
    """Answers to N questions, float32."""

    probability: Tensor  # (N,), by the judge's convention
    log_odds: Tensor  # (N,), log of yes against no: unbounded, and steeper than a saturated probability
    errors: tuple[str | None, ...]  # why a question got no answer; its numbers mean nothing

    @property
    def valid(self) -> Tensor:
        return torch.tensor([error is None for error in self.errors])


def check_judge_options(options: Mapping[str, Any], own: Callable) -> None:
    """Raise ValueError for options of a judge that neither `own` (a reward's class) nor its model takes."""
    from .loading import check_vlm_options
    from .model import VLM

    if not isinstance(options.get("model", ""), str):
        raise ValueError(f"model: got {options['model']!r}, expected a hub id, a folder or a server's model name")
    convention = options.get("convention", "binary")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: got {convention!r}, expected one of {CONVENTIONS}")
    if options.get("output", "probability") not in ("probability", "log_odds"):
        raise ValueError(f"output: got {options['output']!r}, expected 'probability' or 'log_odds'")
    if options.get("url") is None:
        maker: Callable = VLM
        check_vlm_options(options.get("dtype", "float32"), options.get("batch_size", 16))
    else:
        from .remote_chat import RemoteChat

        maker = RemoteChat
    known = {*inspect.signature(own).parameters, *inspect.signature(maker).parameters} - {"options"}
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)


def with_question(conversation: Conversation, question: str) -> list[Message]:
    """The conversation with a question at its end, in the last turn if that is the user's, else in one of its own."""
    turns = list(conversation)
    if turns and turns[-1].role == "user":
        return [*turns[:-1], Message("user", (*turns[-1].parts, question))]
    return [*turns, Message("user", (question,))]


class YesNo:
    """A judge of yes/no questions: a model here, or one at an OpenAI-compatible endpoint where `url` is given.

    `differentiable` says whether gradients reach the pictures.

    Args:
        model: hub id or folder, or the server's name of it; or a VLM that is loaded already.
        yes, no: the answers as the model writes them after its prompt, case and spaces included.
        convention: one of CONVENTIONS.
        options: of `VLM` (device, dtype, download, ...), or of `RemoteChat` where `url` is given.
    """

    def __init__(
        self,
        model: "str | VLM",
        url: str | None = None,
        yes: str = "Yes",
        no: str = "No",
        convention: str = "binary",
        **options: Any,
    ) -> None:
        from .model import VLM

        check_judge_options({"convention": convention}, YesNo)
        self.yes, self.no, self.convention = yes, no, convention
        self.vlm = None
        if url is not None:
            self._chat = make_chat(str(model), url, **options)
        else:
            self.vlm = VLM(model, **options) if isinstance(model, str) else model
        self.differentiable = self.vlm is not None and self.vlm.differentiable
        self._rows: dict[str, list[list[int]]] = {}

    def __call__(self, conversations: Sequence[Conversation]) -> Answers:
        """Answers to N conversations that each end with a question."""
        if not conversations:
            raise ValueError("conversations: got none, expected at least one")
        if self.vlm is None:
            replies = self._chat(conversations, max_tokens=1, temperature=0.0, top_logprobs=TOP_LOGPROBS)
            read = [read_reply(reply, self.yes, self.no, self.convention) for reply in replies]
            probability, log_odds = (torch.tensor([r[k] for r in read]) for k in (0, 1))
            return Answers(probability, log_odds, tuple(r[2] for r in read))
        prompts = self.vlm.prompts(conversations)
        words = [self.vlm.continuation(_tail(prompts[0].text), answer) for answer in (self.yes, self.no)]
        if self.convention == "canonical":
            probability, log_odds = self._canonical(prompts)
        elif all(len(word) == 1 for word in words):
            probability, log_odds = self._first_token(prompts, [word[0] for word in words])
        else:
            probability, log_odds = self._teacher_forced(prompts, words)
        return Answers(probability, log_odds, (None,) * len(prompts))

    def ask(self, prefix: Conversation, questions: Sequence[str]) -> Answers:
        """Answers to K questions that are asked after the same beginning (turns, pictures), which runs once."""
        return self([with_question(prefix, question) for question in questions])

    def _first_token(self, prompts: "Sequence[Prompt]", words: list[int]) -> tuple[Tensor, Tensor]:
        assert self.vlm is not None
        hidden = self.vlm.hidden(prompts)[:, 0]
        if self.convention == "binary":
            z = self.vlm.head(hidden, torch.tensor(words, device=hidden.device))
            return (z[:, 0] - z[:, 1]).sigmoid(), z[:, 0] - z[:, 1]
        z = self.vlm.head(hidden)
        return (z[:, words[0]] - z.logsumexp(dim=-1)).exp(), z[:, words[0]] - z[:, words[1]]

    def _canonical(self, prompts: "Sequence[Prompt]") -> tuple[Tensor, Tensor]:
        assert self.vlm is not None
        hidden, variants = self.vlm.hidden(prompts)[:, 0], self._variants()
        rows = torch.tensor([row for group in variants for row in group], device=hidden.device)
        z = self.vlm.head(hidden, rows)
        log_odds = z[:, : len(variants[0])].logsumexp(dim=1) - z[:, len(variants[0]) :].logsumexp(dim=1)
        return log_odds.sigmoid(), log_odds

    def _teacher_forced(self, prompts: "Sequence[Prompt]", words: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Answers of several tokens: their likelihoods given the prompt. "full" is their geometric mean."""
        yes, no = (token_log_probs(self.vlm, prompts, [word] * len(prompts)) for word in words)  # type: ignore[arg-type]
        log_odds = yes.sum(dim=1) - no.sum(dim=1)
        return (yes.mean(dim=1).exp() if self.convention == "full" else log_odds.sigmoid()), log_odds

    def _variants(self) -> list[list[int]]:
        """Ids of all tokens that say yes, and of all that say no."""
        if "variants" not in self._rows:
            assert self.vlm is not None
            tokenizer, variants = self.vlm.tokenizer, []
            for answer in (self.yes.strip().lower(), self.no.strip().lower()):
                likely = [row for token, row in tokenizer.get_vocab().items() if answer in token.lower()]
                variants.append(sorted(row for row in likely if tokenizer.decode([row]).strip().lower() == answer))
                if not variants[-1]:
                    raise ValueError(f"yes, no: got {answer!r}, expected a token of {self.vlm.name!r} in some case")
            self._rows["variants"] = variants
        return self._rows["variants"]


def token_log_probs(
    vlm: "VLM", prompts: "Sequence[Prompt]", labels: Sequence[Sequence[int]], chunk: int = 256
) -> Tensor:
    """Log-probabilities (N, longest label) of label tokens after their prompts, float32, 0 past a label's end.

    Logits are made at label places only, `chunk` of them at a time: never (N, T, vocabulary).
    """
    longest = max(len(label) for label in labels)
    # The state at a token speaks of the next one, so the label's last token need not be read.
    states = vlm.hidden([prompt.followed_by(label[:-1]) for prompt, label in zip(prompts, labels)], keep=longest)
    padded = torch.tensor([[0] * (longest - len(label)) + list(label) for label in labels], device=states.device)
    flat, targets = states.flatten(0, 1), padded.flatten()
    parts = []
    for k in range(0, len(targets), chunk):
        logits = vlm.head(flat[k : k + chunk])
        parts.append(logits.gather(1, targets[k : k + chunk, None])[:, 0] - logits.logsumexp(dim=-1))
    log_probs = torch.cat(parts).view(len(labels), longest)
    # From padded on the left, as they were computed, to padded on the right, as one reads them.
    rows = [
        torch.nn.functional.pad(row[longest - len(label) :], (0, longest - len(label)))
        for row, label in zip(log_probs, labels)
    ]
    return torch.stack(rows)


def read_reply(reply: Reply, yes: str, no: str, convention: str) -> tuple[float, float, str | None]:
    """Probability, log-odds and error of an endpoint's answer, from the log-probabilities of its first token.

    A word's tokens with and without blanks around it are taken together, for a server decides by its template which of
    them comes. A side that is not among the likeliest tokens counts 0 (as in PaCo-RL's code), and in the log-odds is
    bounded by the least likely token that came back. With neither there is no answer: a preamble, or thoughts.
    """
    if reply.error is not None:
        return 0.0, 0.0, reply.error
    if not reply.tokens:
        return 0.0, 0.0, "the endpoint gave no log-probabilities"
    top = {reply.tokens[0].text: reply.tokens[0].log_prob, **reply.tokens[0].top}
    plain: Callable[[str], str] = (lambda t: t.strip().lower()) if convention == "canonical" else str.strip
    sides = [sum(math.exp(p) for token, p in top.items() if plain(token) == plain(a)) for a in (yes, no)]
    if not any(sides):
        first = reply.tokens[0].text
        return 0.0, 0.0, f"neither {yes!r} nor {no!r} is among the likeliest first tokens (the answer begins {first!r})"
    least = math.exp(min(top.values()))
    log_odds = math.log(max(sides[0], least, 1e-30)) - math.log(max(sides[1], least, 1e-30))
    if convention == "full":
        return sides[0], log_odds, None
    return sides[0] / sum(sides), log_odds, None


def _tail(text: str) -> str:
    """The last line of a rendered conversation and the line break before it: enough for the tokens that follow."""
    return text[-64:]
