"""The shapes world's taste as a reward: a small head on its CLIP, in the way of the LAION aesthetic predictor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visalign.rewards.base import Context, register_reward
from visalign.rewards.embedding.encoder import SHIPPED, ClipEncoder, check_clip_options

from . import WEIGHTS

SHIPPED_HEAD = WEIGHTS / "taste" / "taste.safetensors"


@register_reward("shapes_taste")
class ShapesTasteReward:
    """Predicted taste of a shapes picture, a stand-in for an aesthetic score; higher is prettier; range [1, 10].

    Trained on a known formula of the drawn scene (`visalign/worlds/shapes/taste.py`): objects that stand out from the
    ground, stand in balance and have room. Ignores prompts; gradients reach the images. Learnt from drawings alone,
    so it means nothing on other pictures. Head and CLIP are shipped.

    Args:
        weights: file of a head that `visalign world build taste` made; None: the shipped one.
        model: folder of the CLIP that the head was trained on, in open_clip's layout.
        device, dtype: as for `clip`.
    """

    name = "shapes_taste"
    differentiable = True
    kind = "pointwise"
    range = (1.0, 10.0)
    needs = ()
    media = "images"
    licence = "Apache-2.0, shipped"
    source = "this project's own; the form is LAION's aesthetic predictor's"

    def __init__(
        self,
        weights: str | Path | None = None,
        model: str = str(SHIPPED),
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        from .taste import load_head

        check_clip_options(model, None, dtype)
        self._head = load_head(_file(weights))
        self.encoder = ClipEncoder(model, None, device, dtype)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        check_clip_options(options.get("model", str(SHIPPED)), None, options.get("dtype", "float32"))
        file = _file(options.get("weights"))
        if not file.is_file():
            raise ValueError(f"weights: got no file at {str(file)!r}; `visalign world build taste` makes one")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. Returns (N,), float32 on the model's device."""
        tokens = self.encoder.patch_tokens(images)
        return self._head.to(tokens.device)(tokens)


def _file(weights: str | Path | None) -> Path:
    return Path(SHIPPED_HEAD if weights is None else weights).expanduser()
