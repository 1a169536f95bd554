"""Goal-baseline projection (VLM-RM, Rocamonde et al. 2023, arXiv:2310.12921): how far a picture is on the way from what
is there anyway to what is wanted."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.rewards.base import Context, check_prompts, register_reward

from .encoder import SHIPPED
from .hf_clip import check_encoder, load_encoder


def goal_baseline(features: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """R = 1 - ||P_alpha (x - g)||^2 / 2, where P_alpha = alpha P + (1 - alpha) I and P projects onto the line g - b.

    alpha 0 and a goal of length 1 give the cosine with the goal; with alpha 1 only the distance along the line counts.

    Args:
        features: x, (N, D), L2-normalised.
        goal, baseline: g and b, (N, D) or (D,): means of L2-normalised embeddings, themselves not normalised.

    Returns:
        (N,), at most 1.

    Raises:
        ValueError: g = b, to float32's accuracy.
    """
    line = goal - baseline
    length = line.pow(2).sum(dim=-1, keepdim=True)
    if bool((length < 1e-10).any()):
        raise ValueError("baseline: got the embedding of the goal, expected one that differs from it")
    away = features - goal
    along = (away * line).sum(dim=-1, keepdim=True) * line / length
    return 1 - (alpha * along + (1 - alpha) * away).pow(2).sum(dim=-1) / 2


@register_reward("vlm_rm")
class GoalBaselineReward:
    """CLIP reward for a goal, with what the baseline describes projected out; at most 1; gradients reach the images.

    Args:
        baseline: prompt, or several to average, for what a picture shows without the goal, e.g. "a picture".
        goal: prompt, or several to average; None: each picture's own prompt (not in the paper, whose goal is fixed).
        alpha: from 0, the cosine with the goal, to 1, only what lies along the line from baseline to goal.
        model, pretrained, device, dtype, download: as for `load_encoder`; the default is the shapes world's own. The
            paper uses open_clip models, the larger the better.
    """

    name = "vlm_rm"
    differentiable = True
    kind = "pointwise"
    range = (-1.0, 1.0)  # x and g lie in the unit ball, so that no distance exceeds 2
    media = "images"
    checkpoints: tuple[str, ...] = ()
    licence = "Apache-2.0 (the shapes world's encoder)"
    source = "arXiv:2310.12921"

    def __init__(
        self,
        baseline: str | Sequence[str],
        goal: str | Sequence[str] | None = None,
        alpha: float = 0.5,
        model: str = str(SHIPPED),
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        self._baseline = _texts("baseline", baseline)
        self._goal = None if goal is None else _texts("goal", goal)
        _check_alpha(alpha)
        self.alpha = alpha
        self.needs: tuple[str, ...] = () if self._goal else ("prompts",)
        self.encoder = load_encoder(model, pretrained, device, dtype, download)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        baseline, goal = _texts("baseline", options["baseline"]), options.get("goal")
        if goal is not None and sorted(_texts("goal", goal)) == sorted(baseline):
            raise ValueError(f"baseline: got {baseline}, expected other prompts than the goal's")
        _check_alpha(options.get("alpha", 0.5))
        check_encoder(
            options.get("model", str(SHIPPED)),
            options.get("pretrained"),
            options.get("dtype", "float32"),
            options.get("download", False),
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the model's device."""
        features = self.encoder.embed_images(images)
        if self._goal is None:
            check_prompts(images, prompts)
        goal = self.encoder.embed_texts(prompts) if self._goal is None else self._mean(self._goal)
        return goal_baseline(features, goal, self._mean(self._baseline), self.alpha)

    def _mean(self, texts: Sequence[str]) -> Tensor:
        return torch.mean(self.encoder.embed_texts(texts), dim=0)


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name}: got {value!r}, expected a prompt, or a list of prompts")
    return texts


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected within [0, 1]")
