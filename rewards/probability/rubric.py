"""A rubric file (see `rubric_file`) as a reward: each criterion is a yes/no question to a vision-language model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message
from visalign.rewards.vlm.yes_token import TOP_LOGPROBS, Answers, YesNo, check_judge_options, read_reply

from .rubric_file import Rubric, load_rubric, rubric_scores


class YesNoJudge(Protocol):
    """Answers conversations that each end with a yes/no question; `YesNo` is one."""

    differentiable: bool

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> Answers: ...


class ChatYesNo:
    """Yes/no questions to any chat that gives log-probabilities; no gradient. Conventions as in `yes_token`."""

    differentiable = False

    def __init__(self, chat: Chat, yes: str = "Yes", no: str = "No", convention: str = "canonical") -> None:
        self._chat, self._options = chat, (yes, no, convention)

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> Answers:
        """Answers to N conversations that each end with a question."""
        replies = self._chat(conversations, max_tokens=1, temperature=0.0, top_logprobs=TOP_LOGPROBS)
        read = [read_reply(reply, *self._options) for reply in replies]
        return Answers(
            torch.tensor([r[0] for r in read]), torch.tensor([r[1] for r in read]), tuple(r[2] for r in read)
        )


def ask_all(judge: YesNoJudge, pictures: Sequence[Tensor], questions: Sequence[Sequence[str]]) -> tuple[Tensor, list]:
    """Probabilities (Q,) of "yes" to all pictures' questions in order, and for each why there is none, or None.

    The picture comes first, so that a local model reads it once for all its questions. An answer in which neither yes
    nor no was likely is none.
    """
    chats = [[Message("user", (picture, q))] for picture, own in zip(pictures, questions, strict=True) for q in own]
    if not chats:
        return torch.zeros(0), []
    answers = judge(chats)
    return answers.probability, list(answers.errors)


@register_reward("rubric")
class RubricReward:
    """Weighted mean over a rubric's criteria of the probability that each holds; higher is better, range [0, 1].

    Each criterion is a criterion of the output, NaN where it does not apply to the prompt; see `rubric_scores`. A
    sample is invalid if one of its questions got no answer, or no criterion applies. Gradients reach the images of a
    local Qwen-VL; elsewhere there are none. "shapes" is the rubric of the shapes world, in its own model's wordings.

    Args:
        rubric: a YAML file (see `rubric_file`), the name of one that comes with the project, a mapping or a Rubric.
        model, url, yes, no, convention, options: as for `vlm_yes`; or `chat`, one that gives log-probabilities.
    """

    name = "rubric"
    kind = "pointwise"
    range = (0.0, 1.0)
    needs = ("prompts",)
    media = "images"
    checkpoints = ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    licence = "that of the model"
    source = "this project; the formula is vlm_yes's, weighted"

    def __init__(
        self,
        rubric: str | Path | Mapping[str, Any] | Rubric,
        model: str = "",
        url: str | None = None,
        chat: Chat | None = None,
        yes: str = "Yes",
        no: str = "No",
        convention: str = "binary",
        **options: Any,
    ) -> None:
        known = {"rubric": rubric, "model": model, "url": url, "chat": chat, "convention": convention}
        self.preflight({**known, **options})
        self.rubric = rubric if isinstance(rubric, Rubric) else load_rubric(rubric)
        self._judge: YesNoJudge
        if chat is not None:
            self._judge = ChatYesNo(chat, yes, no, convention)
        else:
            self._judge = YesNo(model, url, yes, no, convention, **options)
        self.differentiable = self._judge.differentiable

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        if not isinstance(options["rubric"], Rubric):
            load_rubric(options["rubric"])
        if options.get("chat") is None and not options.get("model"):
            raise ValueError("model: got none, expected a hub id, a folder or (with url) a server's model name")
        check_judge_options(options, RubricReward)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32."""
        check_images(images)
        check_prompts(images, prompts)
        by_criterion = [self.rubric.questions(prompt) for prompt in prompts]
        questions = [[q for own in criteria for q in own] for criteria in by_criterion]
        places = [(n, c) for n, criteria in enumerate(by_criterion) for c, own in enumerate(criteria) for _ in own]
        probability, errors = ask_all(self._judge, images.unbind(), questions)
        scores, criteria = rubric_scores(probability, places, len(prompts), self.rubric)
        reasons: list[str | None] = [None if own else "no criterion applies to the prompt" for own in questions]
        for (n, _), error in zip(places, errors):
            reasons[n] = reasons[n] or error
        valid = torch.tensor([reason is None for reason in reasons])
        named = {c.name: criteria[:, k].detach() for k, c in enumerate(self.rubric.criteria)}
        return RewardOutput(scores, named, reasons, valid)
