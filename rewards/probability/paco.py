"""PaCo-Reward: whether two pictures belong together, for grids of pictures and for edits."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardError, RewardOutput, check_prompts, register_reward
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.judging import load_template
from visalign.rewards.vlm.yes_token import Answers, YesNo, check_judge_options

UPSTREAM = "https://github.com/X-GenGroup/PaCo-RL"
CONSISTENT = (
    'These two images were made for one theme: "{main_prompt}". Are they consistent with each other in {criterion}? '
    "Answer Yes or No first, then explain."
)
PRESERVED = (
    "The second image is an edit of the first. Is everything that the edit was not meant to change still the same in "
    "{criterion}? Answer Yes or No first, then explain."
)
FOLLOWED = (
    'The second image is an edit of the first, made on the instruction "{prompt}". Was the instruction carried out? '
    "Answer Yes or No first, then explain."
)
WHOLE = "style, logic and identity"
GRID = re.compile(r"(\d+)\s*[x⨉]\s*(\d+)")
CELL_TAG = re.compile(r"""[."”']\s+(?:\[[^\]]*\]|[A-Z][A-Za-z0-9 _-]*)\s*:""")


def grid_of(prompt: str) -> tuple[int, int]:
    """Rows and columns: the first "2x3" (or "2 ⨉ 3") in the prompt; (1, 1) without one."""
    match = GRID.search(prompt)
    return (int(match[1]), int(match[2])) if match else (1, 1)


def main_prompt(prompt: str) -> str:
    """What all cells have in common: the prompt up to the sentence end before the first tag of a cell ("Cell 1:")."""
    match = CELL_TAG.search(prompt)
    return prompt[: match.start() + 1] if match else prompt


def cells(picture: Tensor, rows: int, columns: int) -> list[Tensor]:
    """A picture (3, H, W) cut into rows x columns cells, row by row; pixels beyond a whole number are left out.

    Raises:
        ValueError: more cells than pixels.
    """
    height, width = picture.shape[1] // rows, picture.shape[2] // columns
    if not (height and width):
        raise ValueError(f"prompt: got a grid of {rows}x{columns} for {tuple(picture.shape[1:])} pixels")
    return [
        picture[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
        for i in range(rows)
        for j in range(columns)
    ]


def read_template(template: str | None, default: str, model: str) -> str:
    """The text of a question: given, in a .txt file that is given (see `load_template`), or our own.

    Raises:
        ValueError: none given for the published checkpoint, which was trained with words of its own; or no such file.
    """
    if template is None:
        if "paco-reward" in model.lower():
            problem = (
                f"got none for {model!r}, which was trained with its own words, expected the template's text or file"
            )
            raise ValueError(f"template: {problem}: consistency_scorer.py and consistency_for_editing.py of {UPSTREAM}")
        return default
    return load_template("", template)


def _pair(first: Tensor, second: Tensor, text: str) -> list[Message]:
    return [Message("user", (first, second, text))]


@register_reward("paco_consistency")
class PacoConsistency:
    """Mean over all pairs of a picture's cells of P(Yes, the two are consistent); higher is better; range [0, 1].

    The grid is read from the prompt ("a 2x2 grid of ..."); a picture without one has no pairs and scores 0. With
    `context["metadata"][n]["criteria"]`, a mapping of dimensions to lists of criteria, the mean goes over pairs, then
    over a dimension's criteria, then over dimensions. Two cells that are copies of each other are consistent: watch
    diversity. Gradients reach the images of a local Qwen-VL. Source: PaCo-RL, arXiv:2512.04784. The scores follow its
    code; the words of the question are ours, and the published checkpoint wants its own (`template`).

    Args:
        model: "X-GenGroup/PaCo-Reward-7B", any other hub id or folder, or with `url` the server's name of it.
        template: the question, or a .txt file that holds it, with {main_prompt} and {criterion} where these go.
        swap: ask each pair in both orders and average; the criterion "position_bias" is their mean difference.
        convention: "binary" as published, or "canonical".
        options: of `VLM`, or with `url` of `RemoteChat`.
    """

    name = "paco_consistency"
    kind = "pointwise"
    media = "images"
    range = (0.0, 1.0)
    needs = ("prompts",)
    checkpoints = ("X-GenGroup/PaCo-Reward-7B",)
    licence = "see the checkpoint's page"
    source = "arXiv:2512.04784"

    def __init__(
        self,
        model: str,
        url: str | None = None,
        template: str | None = None,
        swap: bool = False,
        convention: str = "binary",
        **options: Any,
    ) -> None:
        self.template, self.swap = read_template(template, CONSISTENT, str(model)), swap
        self.judge = YesNo(model, url, convention=convention, **options)
        self.differentiable = self.judge.differentiable

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge_options(options, PacoConsistency)
        read_template(options.get("template"), CONSISTENT, str(options["model"]))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1], each a grid."""
        check_images(images)
        check_prompts(images, prompts)
        metadata = (context or {}).get("metadata") or [{}] * len(prompts)
        questions: list[list[Message]] = []
        owners: list[tuple[int, float]] = []  # sample, and its share of that sample's score
        for n, (picture, prompt) in enumerate(zip(images.unbind(), prompts)):
            try:
                pairs = list(combinations(cells(picture, *grid_of(prompt)), 2))
            except ValueError as error:
                raise RewardError(self.name, str(error), n, prompt) from error
            dimensions = (metadata[n].get("criteria") or {"": [WHOLE]}) if pairs else {}
            for criteria in dimensions.values():
                for criterion in criteria:
                    text = self.template.replace("{criterion}", criterion).replace("{main_prompt}", main_prompt(prompt))
                    questions += [_pair(a, b, text) for a, b in pairs]
                    owners += [(n, 1 / (len(pairs) * len(criteria) * len(dimensions)))] * len(pairs)
        if not questions:
            return RewardOutput(torch.zeros(len(prompts), device=images.device))
        forward = self.judge(questions)
        values, valid, bias = forward.probability, forward.valid, {}
        if self.swap:
            backward = self.judge(
                [[Message("user", (b, a, text))] for [turn] in questions for a, b, text in [turn.parts]]
            )
            difference = (values - backward.probability).detach()
            bias["position_bias"] = _weighted(owners, difference, len(prompts))
            values, valid = (values + backward.probability) / 2, valid & backward.valid
        failed = {n for (n, _), fine in zip(owners, valid.tolist()) if not fine}
        alright = torch.tensor([n not in failed for n in range(len(prompts))])
        return RewardOutput(_weighted(owners, values, len(prompts)), bias, valid=alright)


@register_reward("paco_edit")
class PacoEdit:
    """sqrt(P(Yes, the rest is unchanged) * P(Yes, the instruction was followed)); higher is better; range [0, 1].

    The source picture is the first of `context["references"]`; the prompt is the instruction. Both questions show the
    source first. Gradients reach the images of a local Qwen-VL. Source: PaCo-RL, arXiv:2512.04784; words as in
    paco_consistency.

    Args:
        preserved, followed: the two questions, or .txt files that hold them, with {prompt} where the instruction goes.
    """

    name = "paco_edit"
    kind = "pointwise"
    media = "images"
    range = (0.0, 1.0)
    needs = ("prompts", "references")
    checkpoints = ("X-GenGroup/PaCo-Reward-7B",)
    licence = "see the checkpoint's page"
    source = "arXiv:2512.04784"

    def __init__(
        self,
        model: str,
        url: str | None = None,
        preserved: str | None = None,
        followed: str | None = None,
        convention: str = "binary",
        **options: Any,
    ) -> None:
        self.preserved = read_template(preserved, PRESERVED, str(model)).replace("{criterion}", WHOLE)
        self.followed = read_template(followed, FOLLOWED, str(model))
        self.judge = YesNo(model, url, convention=convention, **options)
        self.differentiable = self.judge.differentiable

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_judge_options(options, PacoEdit)
        for name in ("preserved", "followed"):
            read_template(options.get(name), PRESERVED, str(options["model"]))

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1], the edited pictures."""
        check_images(images)
        check_prompts(images, prompts)
        references = (context or {}).get("references") or [[]] * len(prompts)
        for n, own in enumerate(references):
            if not len(own):
                raise RewardError(
                    self.name, "got no source picture, expected one in context['references']", n, prompts[n]
                )
        questions = [
            _pair(own[0].detach().to(images.device), picture, text.replace("{prompt}", prompt))
            for picture, prompt, own in zip(images.unbind(), prompts, references)
            for text in (self.preserved, self.followed)
        ]
        answers: Answers = self.judge(questions)
        consistent, done = answers.probability.view(-1, 2).unbind(dim=1)
        criteria = {"preserved": consistent.detach(), "followed": done.detach()}
        return RewardOutput((consistent * done).sqrt(), criteria, valid=answers.valid.view(-1, 2).all(dim=1))


def _weighted(owners: Sequence[tuple[int, float]], values: Tensor, count: int) -> Tensor:
    """Sum of share * value for each sample, (count,)."""
    places = torch.tensor([n for n, _ in owners], device=values.device)
    shares = torch.tensor([share for _, share in owners], device=values.device)
    return torch.zeros(count, device=values.device).index_add(0, places, shares * values)
