"""The exact judge of the shapes world as a reward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.images import check_images
from visalign.rewards.base import Context, RewardError, check_prompts, register_reward


@register_reward("gold")
class GoldReward:
    """How much of a shapes-world caption a picture satisfies, read back from its pixels; higher is better.

    Range [0, 1]: the fraction of the caption's criteria (objects, colours, counts, relation) that hold; with `strict`
    1 if all hold, else 0. Looks at the pixels and the prompt, has no weights, gives no gradient. Defined on 64 x 64
    pictures and captions in the world's grammar; anything else is a RewardError.
    """

    name = "gold"
    differentiable = False
    kind = "pointwise"
    range = (0.0, 1.0)
    needs = ("prompts",)

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, 64, 64) in [0, 1]; prompts: N captions. Returns (N,), float32 on the CPU."""
        from .judge import judge
        from .scenes import SIZE

        check_images(images)
        check_prompts(images, prompts)
        if images.shape[2:] != (SIZE, SIZE):
            got = "x".join(str(side) for side in images.shape[2:])
            raise RewardError(
                self.name, f"got images of {got} pixels, expected {SIZE}x{SIZE}, as the shapes world draws"
            )
        scores = torch.zeros(len(images))
        for n, (image, prompt) in enumerate(zip(images.detach().float().cpu(), prompts)):
            try:
                verdict = judge(image, prompt)
            except ValueError as error:
                raise RewardError(self.name, str(error), sample=n) from error  # the message quotes the prompt
            scores[n] = verdict.strict if self.strict else verdict.score
        return scores
