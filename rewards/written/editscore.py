"""EditScore (Luo et al. 2025, arXiv:2509.23909): a judge of image edits that writes its scores, asked several times."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Chat, Message, Part, Reply
from visalign.rewards.vlm.judging import (
    Answer,
    SamplingParams,
    ask,
    check_count,
    column,
    fill,
    load_templates,
    open_chat,
    source_images,
)
from visalign.rewards.vlm.parsing import as_numbers, read_json

SCORE_RANGE = 25.0  # the judges were taught 0 to 25 where the template says 0 to 10
TEMPLATES = {"sc": "editscore_sc", "pq": "editscore_pq"}
FAMILIES = ("qwen3", "qwen2.5")
REDUCTIONS = ("average_last", "average_first")
QUIRKS = {
    "pq_sees_source": "the question of looks is asked with both pictures (the published batched path)",
    "first_by_following": "average_first takes prompt following for SC (the published single path)",
    "midpoint": "an unreadable answer counts as the middle of the scale (the published batched path)",
    "overflow": "scores beyond the scale count as 12.5 on a scale that ends at 10 (the published batched path)",
}


@dataclass(frozen=True)
class EditPass:
    """One pass over one edit: lists as written, 0 to 25. SC: success, restraint; PQ: naturalness, lack of artefacts."""

    sc: tuple[float, ...]
    pq: tuple[float, ...]


def edit_scores(
    passes: Sequence[EditPass], reduction: str = "average_last", quirks: Sequence[str] = ()
) -> dict[str, float]:
    """The scores of one edit, each in [0, 10], from K >= 1 passes.

    SC = min(list) / 2.5 and PQ = min(list) / 2.5. "average_last" is the mean over passes of sqrt(SC PQ),
    "average_first" sqrt(mean SC * mean PQ).
    """
    to_ten = 10 / SCORE_RANGE
    sc = [_on_scale(min(p.sc) * to_ten, quirks) for p in passes]
    pq = [_on_scale(min(p.pq) * to_ten, quirks) for p in passes]
    following = _mean([p.sc[0] * to_ten for p in passes])
    if reduction == "average_last":
        overall = _mean([math.sqrt(s * q) for s, q in zip(sc, pq)])
    else:
        first = following if "first_by_following" in quirks else _mean(sc)
        overall = math.sqrt(first * _mean(pq))
    consistency = _mean([p.sc[-1] * to_ten for p in passes])
    return {
        "overall": overall,
        "prompt_following": following,
        "consistency": consistency,
        "semantic_consistency": _mean(sc),
        "perceptual_quality": _mean(pq),
    }


def _on_scale(score: float, quirks: Sequence[str]) -> float:
    return SCORE_RANGE / 2 if "overflow" in quirks and not 0 <= score <= 10 else score


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@register_reward("editscore")
class EditScoreReward:
    """How well an edit obeys and looks: sqrt(SC PQ), 0 to 10, higher is better; no gradient.

    Images are edits, prompts their instructions, `references` hold each source image first. Two questions an edit and
    pass, in the published words with 10 replaced by 25: SC about source and edit, PQ about the edit.
    Criteria: prompt_following, consistency, semantic_consistency, perceptual_quality, each 0 to 10; uncertainty is the
    standard deviation over the passes. A pass that stays unreadable is left out; an edit without any is invalid.
    The published sampling also cuts to the 20 likeliest tokens, which not every endpoint offers: left to its settings.

    Args:
        model, url, chat_options: of `make_chat`; a LoRA must be merged, or served by name. `chat`: one already made.
        family: "qwen3" or "qwen2.5", whose message names the pictures.
        templates: the questions "sc", with "<instruction>", and "pq", both still from 0 to 10, each a .txt file or the
            text; those left out are editscore_*.txt in the folder of templates, see `load_template`.
        num_pass, seed: passes, with seeds seed + k.
        reduction: "average_last" or "average_first", see `edit_scores`.
        quirks: published bugs to reproduce, of QUIRKS.
        retries: further tries at an unreadable answer.
    """

    name = "editscore"
    differentiable = False
    kind = "pointwise"
    media = "images"
    needs = ("prompts", "references")
    range = (0.0, 10.0)
    stochastic = True
    checkpoints = (
        "EditScore/EditScore-7B",
        "EditScore/EditScore-32B",
        "EditScore/EditScore-72B",
        "EditScore/EditScore-Qwen3-VL-4B-Instruct",
        "EditScore/EditScore-Qwen3-VL-8B-Instruct",
    )
    licence = "Apache-2.0"
    source = "arXiv:2509.23909"

    def __init__(
        self,
        model: str = "EditScore/EditScore-Qwen3-VL-8B-Instruct",
        url: str | None = None,
        chat: Chat | None = None,
        chat_options: Mapping[str, Any] | None = None,
        family: str = "qwen3",
        templates: Mapping[str, str | Path] | None = None,
        num_pass: int = 1,
        reduction: str = "average_last",
        quirks: Sequence[str] = (),
        temperature: float = 0.7,
        max_tokens: int = 512,
        seed: int = 42,
        retries: int = 3,
    ) -> None:
        options: dict[str, Any] = {"family": family, "num_pass": num_pass, "reduction": reduction, "quirks": quirks}
        self.preflight({**options, "templates": templates})
        self.params = SamplingParams(max_tokens, temperature, top_p=0.9, seed=seed, retries=retries)
        self.chat = open_chat(chat, model, url, chat_options)
        self.family, self.num_pass, self.reduction, self.quirks = family, num_pass, reduction, tuple(quirks)
        if "overflow" in self.quirks:
            self.range = (0.0, SCORE_RANGE / 2)
        self._sc, self._pq = (text.replace("10", "25") for text in load_templates(TEMPLATES, templates).values())

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        for name, known in (("family", FAMILIES), ("reduction", REDUCTIONS)):
            if options.get(name, known[0]) not in known:
                raise unknown_name(name, options[name], known)
        quirks = options.get("quirks", ())
        if isinstance(quirks, str):
            raise ValueError(f"quirks: got {quirks!r}, expected a list of some of {sorted(QUIRKS)}")
        for quirk in quirks:
            if quirk not in QUIRKS:
                raise unknown_name("quirks", quirk, QUIRKS)
        check_count(options, num_pass=1)
        SamplingParams.of(options)
        load_templates(TEMPLATES, options.get("templates"))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) edits in [0, 1]; prompts: N instructions; context["references"]: the source images."""
        check_images(images)
        check_prompts(images, prompts)
        sources = source_images(context, len(images), self.name)
        questions = [
            *(self._message((source, edit), self._sc, text) for source, edit, text in zip(sources, images, prompts)),
            *(self._message(self._seen_for_looks(source, edit), self._pq, "") for source, edit in zip(sources, images)),
        ]
        passes: list[list[EditPass]] = [[] for _ in prompts]
        rationale: list[list[str]] = [[] for _ in prompts]
        for k in range(self.num_pass):
            answers = ask(self.chat, questions, self._read, replace(self.params, seed=self.params.seed + k))
            for n, (sc, pq) in enumerate(zip(answers, answers[len(prompts) :])):
                rationale[n] += [_reason("SC", sc), _reason("PQ", pq)]
                lists = [self._numbers(answer) for answer in (sc, pq)]
                if None not in lists:
                    passes[n].append(EditPass(*lists))  # type: ignore[arg-type]
        return self._output(passes, ["\n".join(lines) for lines in rationale])

    def _output(self, passes: Sequence[Sequence[EditPass]], rationale: Sequence[str]) -> RewardOutput:
        results = [edit_scores(own, self.reduction, self.quirks) if own else None for own in passes]
        keys = ("overall", "prompt_following", "consistency", "semantic_consistency", "perceptual_quality")
        columns = {key: column([None if own is None else own[key] for own in results]) for key in keys}
        single = [[edit_scores([p], quirks=self.quirks)["overall"] for p in own] for own in passes]
        spread = [float(torch.tensor(own).std(correction=0)) if own else 0.0 for own in single]
        return RewardOutput(
            columns.pop("overall"),
            columns,
            rationale,
            torch.tensor([bool(own) for own in passes]),
            torch.tensor(spread),
            {"passes_read": [len(own) for own in passes]},
        )

    def _seen_for_looks(self, source: Tensor, edit: Tensor) -> tuple[Tensor, ...]:
        return (source, edit) if "pq_sees_source" in self.quirks else (edit,)

    def _message(self, pictures: Sequence[Part], template: str, instruction: str) -> list[Message]:
        (text,) = fill(template, instruction, placeholder="<instruction>")
        if self.family == "qwen3":
            return [Message("user", (*pictures, text))]
        named = [part for k, picture in enumerate(pictures, 1) for part in (f"<img{k}>: ", picture)]
        return [Message("system", ("You are a helpful assistant.",)), Message("user", (*named, text))]

    def _read(self, reply: Reply) -> tuple[tuple[float, ...], str]:
        value = read_json(reply.text, keys=("score",))
        high = math.inf if "overflow" in self.quirks else SCORE_RANGE
        scores = as_numbers(value["score"], 2, -high if high == math.inf else 0.0, high)
        return tuple(scores), str(value.get("reasoning", ""))

    def _numbers(self, answer: Answer) -> tuple[float, ...] | None:
        if answer.value is not None:
            return answer.value[0]
        return (SCORE_RANGE / 2, SCORE_RANGE / 2) if "midpoint" in self.quirks and answer.reply.error is None else None


def _reason(question: str, answer: Answer) -> str:
    return f"{question}: {answer.problem if answer.value is None else answer.value[1]}"
