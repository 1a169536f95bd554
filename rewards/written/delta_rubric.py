"""DeltaRubric: a planner lists what two pictures differ in, a verifier checks each point on each picture by itself.

From the paper alone. As built here ([R]) the planner writes yes/no questions, the verifier's answers are probabilities
of "yes", and a picture's score is their mean over the questions that tell the two apart. The published verifier reasons
in words before it picks; training the two roles is not part of this file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.groups.candidates import group_places, picture_digest, shown_pairs
from visalign.rewards.groups.pairwise import win_rates
from visalign.rewards.probability.rubric import ChatYesNo, YesNoJudge, ask_all
from visalign.rewards.vlm.chat import Chat, Reply
from visalign.rewards.vlm.judging import DEFAULTS, SamplingParams, ask, open_chat
from visalign.rewards.vlm.parsing import Unreadable, read_json
from visalign.rewards.vlm.yes_token import YesNo

from .auto_rubric import check_judge, show
from .cdrrm import IDENTIFIER

MAX_QUESTIONS = 10
PLAN = (
    "Write a checklist of what these two pictures differ in and what matters to the prompt or to their quality. Do not "
    "say which is better. Each point is a question that can be asked of one picture alone and answered by yes or no, "
    'where "yes" speaks for that picture. At most {count} points; none if the pictures are equally good.\n'
    'Answer with JSON: {"checklist": ["question", ...]}'
)


def delta_scores(first: Tensor, second: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """sum_k w_k p_k / sum_k w_k of two pictures, over the questions they answer differently; 1/2 each if there is none.

    Args:
        first, second: (K,) probabilities of "yes"; the answer is yes from 1/2 on.
        weights: (K,), above 0; None: all 1.
    """
    weights = torch.ones_like(first) if weights is None else weights
    telling = (first >= 0.5) != (second >= 0.5)
    if not telling.any():
        return 0.5, 0.5
    own = weights[telling]
    return float((first[telling] * own).sum() / own.sum()), float((second[telling] * own).sum() / own.sum())


def plan(
    chat: Chat,
    prompts: Sequence[str],
    pairs: Sequence[tuple[Tensor, Tensor]],
    params: SamplingParams = DEFAULTS,
) -> list[tuple[str, ...] | None]:
    """A checklist for each pair, maybe empty; None where the answer could not be read."""
    instruction = PLAN.replace("{count}", str(MAX_QUESTIONS))
    conversations = [show(instruction, prompt, pair) for prompt, pair in zip(prompts, pairs, strict=True)]
    answers = ask(chat, conversations, _read_checklist, params)
    return [answer.value for answer in answers]


def _read_checklist(reply: Reply) -> tuple[str, ...]:
    points = read_json(reply.text, ["checklist"])["checklist"]
    if not isinstance(points, list) or not all(isinstance(p, str) and p.strip() for p in points):
        raise Unreadable(f"checklist: got {str(points)[:80]}, expected a list of questions")
    for point in points:
        if match := IDENTIFIER.search(point):
            raise Unreadable(f"checklist: {match[0]!r} points at one of the pictures")
    return tuple(" ".join(p.split()) for p in points[:MAX_QUESTIONS])


@register_reward("delta_rubric")
class DeltaRubricReward:
    """How often a picture beats the others of its group on checklists made for each pair; range [0, 1].

    Of each pair (see `delta_scores`) the higher score wins, equal ones are half a win each; 1/2 in a group of one. A
    sample none of whose pairs could be judged is invalid. Rationale: each sample's questions. No gradient.

    Args:
        model, url, chat, chat_options, max_tokens, retries, seed: of the planner, as for `auto_rubric`.
        verifier: who answers: a `YesNo` or another chat that gives log-probabilities; None: the planner.
    """

    name = "delta_rubric"
    differentiable = False
    kind = "groupwise"
    range = (0.0, 1.0)
    needs = ("prompts",)
    media = "images"
    checkpoints = ("any vision-language model that follows instructions and gives log-probabilities",)
    licence = "the model's own"
    source = "DeltaRubric (paper only)"

    def __init__(
        self,
        model: str = "",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        verifier: Chat | YesNo | None = None,
        max_tokens: int = 512,
        retries: int = 3,
        seed: int = 0,
    ) -> None:
        self.preflight({"model": model, "chat": chat, "max_tokens": max_tokens, "retries": retries})
        self._params = SamplingParams(max_tokens, seed=seed, retries=retries)
        self._chat = open_chat(chat, model, url, chat_options)
        self._verifier: YesNoJudge = verifier if isinstance(verifier, YesNo) else ChatYesNo(verifier or self._chat)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; context["group_ids"]: (N,). Returns (N,), float32 on the CPU."""
        check_images(images)
        check_prompts(images, prompts)
        images = images.detach()
        groups, digests = group_places(prompts, context, self.name), [picture_digest(image) for image in images]
        pairs = [(m[i], m[j]) for m in groups for i, j in shown_pairs([digests[n] for n in m], self._params.seed)]
        first = [prompts[i] for i, _ in pairs]
        checklists = plan(self._chat, first, [(images[i], images[j]) for i, j in pairs], self._params)
        pictures = [images[n] for pair in pairs for n in pair]
        answers, errors = ask_all(self._verifier, pictures, [list(c or ()) for c in checklists for _ in range(2)])
        outcomes = torch.full((len(pairs),), 0.5)
        read = {members[0] for members in groups if len(members) == 1}
        questions: list[list[str]] = [[] for _ in prompts]
        at = 0
        for k, (pair, checklist) in enumerate(zip(pairs, checklists)):
            size = len(checklist or ())
            of_pair, failed = answers[at : at + 2 * size].detach().cpu(), any(errors[at : at + 2 * size])
            at += 2 * size
            if checklist is None or failed:
                continue
            read.update(pair)
            a, b = delta_scores(of_pair[:size], of_pair[size:])
            outcomes[k] = 0.5 if a == b else float(a > b)
            for n in pair:
                questions[n] += checklist
        valid = torch.tensor([n in read for n in range(len(images))])
        reasons = ["; ".join(dict.fromkeys(own)) or None for own in questions]
        return RewardOutput(win_rates(pairs, outcomes, len(images)), rationale=reasons, valid=valid)
