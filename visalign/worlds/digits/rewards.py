"""Rewards of the digits world: log-probabilities of the shipped classifier, so that exp(r) p is a posterior.

With tilt 1 the tilted law is that of the model's samples given what the classifier is asked for.

    make_reward({"name": "visalign.worlds.digits.rewards:DigitReward", "digit": 3})
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visalign.images import check_images

from . import load_network
from .network import CLASSES, to_grey


class ClassReward:
    """Log-probability that a picture shows one of some digits; in (-inf, 0], higher is surer.

    Ignores prompts; gradients reach the images. Pictures of other sizes are averaged down to 8 x 8, and colours to
    grey; ink is light on dark. The classifier is shipped, Apache-2.0.

    Args:
        digits: one or more of 0 .. 9.
    """

    differentiable = True
    kind = "pointwise"
    range = (-math.inf, 0.0)
    needs = ()
    media = "images"
    licence = "Apache-2.0, shipped"
    source = "this project's own"

    def __init__(self, digits: Sequence[int]) -> None:
        if not digits or len(set(digits)) != len(digits) or not all(0 <= digit < CLASSES for digit in digits):
            raise ValueError(f"digits: got {list(digits)}, expected one or more different ones of 0 .. 9")
        self.digits = tuple(int(digit) for digit in digits)
        self.name = f"digits_{''.join(map(str, self.digits))}"
        self._classifier = load_network("classifier")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: dict[str, Any] | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. Returns (N,), float32 on the images' device."""
        check_images(images)
        logits = self._classifier.to(images.device)(to_grey(images))
        return logits.log_softmax(1)[:, list(self.digits)].logsumexp(1)


class DigitReward(ClassReward):
    """Log-probability that a picture shows this digit."""

    def __init__(self, digit: int) -> None:
        super().__init__([digit])


class OddDigitsReward(ClassReward):
    """Log-probability that a picture shows 1, 3, 5, 7 or 9."""

    def __init__(self) -> None:
        super().__init__(range(1, CLASSES, 2))
