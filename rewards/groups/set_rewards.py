"""Setwise rewards: how diverse the pictures are (Vendi), and how far from exemplars (Frechet), as each one's share."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, picture_files, pil_to_images, read_picture
from visalign.locations import load_callable
from visalign.rewards.base import Context, RewardError, RewardOutput, register_reward
from visalign.rewards.embedding.encoder import SHIPPED, ClipEncoder, check_clip_options

from .sets import frechet_distance, leave_one_out, moments, vendi_score

Encoder = str | Callable[[Tensor], Tensor]


class _SetReward:
    """Embeds the pictures and gives each its leave-one-out share; the set's own score is in `extra["set"]`."""

    differentiable = True
    kind = "setwise"
    media = "images"
    range = (-math.inf, math.inf)
    needs: tuple[str, ...] = ()
    name: str
    least: int

    def _load(self, encoder: Encoder | None, clip: Mapping[str, Any]) -> None:
        if encoder is None:
            self._embed: Callable[[Tensor], Tensor] = ClipEncoder(**clip).embed_images
        else:
            self._embed = load_callable("encoder", encoder)

    def _shares(self, images: Tensor, group_ids: Tensor | None, score: Callable[[Tensor], Tensor]) -> RewardOutput:
        features = self._embed(images)
        ids = torch.zeros(len(images), dtype=torch.long) if group_ids is None else group_ids.cpu()
        shares, values = features.new_zeros(len(images), dtype=torch.float64), features.new_zeros(len(images))
        for number in ids.unique():
            here = (ids == number).nonzero().squeeze(1).to(features.device)
            if len(here) < self.least:
                raise RewardError(self.name, f"got a set of {len(here)}, expected at least {self.least} pictures")
            value, credit = leave_one_out(score, features[here])
            shares = shares.index_copy(0, here, credit)
            values[here] = value.detach().to(values.dtype)
        return RewardOutput(shares.float(), extra={"set": values})


@register_reward("vendi")
class VendiReward(_SetReward):
    """What a picture adds to the diversity of its set: n times the fall of the Vendi score without it.

    The score is the effective number of different pictures, by cosines of embeddings (arXiv:2210.02410); a share is
    near 0 for a copy and large for an odd one out. Ignores prompts; gradients reach the images.

    Args:
        order: of the entropy; see `vendi_score`.
        per_group: sets are the groups of `group_ids` (the reward is then "groupwise"), not all pictures together.
        encoder: images (N, 3, H, W) to features (N, D), a callable or where one is found; None: open_clip's.
        model, pretrained, device, dtype, download: of the latter, as for `clip`.
    """

    name = "vendi"
    source = "arXiv:2210.02410"
    least = 2

    def __init__(
        self,
        order: float = 1.0,
        per_group: bool = False,
        encoder: Encoder | None = None,
        model: str = str(SHIPPED),
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        clip = {"model": model, "pretrained": pretrained, "device": device, "dtype": dtype, "download": download}
        self.preflight({"order": order, "encoder": encoder, **clip})
        self._load(encoder, clip)
        self.order, self.per_group = order, per_group
        self.kind = "groupwise" if per_group else "setwise"

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        order = options.get("order", 1.0)
        if not order >= 0:
            raise ValueError(f"order: got {order}, expected >= 0")
        _check_encoder(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]. Returns shares (N,), and in `extra["set"]` each one's set's score."""
        check_images(images)
        ids = (context or {}).get("group_ids") if self.per_group else None
        return self._shares(images, ids, lambda features: vendi_score(features, self.order))


@register_reward("neg_fd")
class NegFrechetReward(_SetReward):
    """What a picture does for its set's nearness to exemplars: n times the rise of the Frechet distance without it.

    The distance is of embeddings' means and covariances (arXiv:1706.08500), CLIP's here instead of Inception's, so it
    does not compare with published FIDs. Ignores prompts; gradients reach the images.

    Args:
        exemplars: a folder of pictures; None: all in `context["references"]`, at least two.
        shrinkage: of both covariances towards round ones; sets of fewer pictures than features need it (own choice).
        encoder, model, pretrained, device, dtype, download: as for `vendi`.
    """

    name = "neg_fd"
    source = "arXiv:1706.08500, arXiv:2504.15217"
    least = 3

    def __init__(
        self,
        exemplars: str | None = None,
        shrinkage: float = 0.1,
        encoder: Encoder | None = None,
        model: str = str(SHIPPED),
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        download: bool = False,
    ) -> None:
        clip = {"model": model, "pretrained": pretrained, "device": device, "dtype": dtype, "download": download}
        self.preflight({"exemplars": exemplars, "shrinkage": shrinkage, "encoder": encoder, **clip})
        self._load(encoder, clip)
        self.shrinkage, self._stored = shrinkage, None
        self.needs = ("references",) if exemplars is None else ()
        if exemplars is not None:
            self._stored = self._moments(_read_folder(exemplars))

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        shrinkage, folder = options.get("shrinkage", 0.1), options.get("exemplars")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage: got {shrinkage}, expected between 0 and 1")
        if folder is not None and len(_files(folder)) < 2:
            raise ValueError(f"exemplars: got {folder!r} with {len(_files(folder))} pictures, expected at least 2")
        _check_encoder(options)

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]. Returns shares (N,), and in `extra["set"]` minus the whole set's distance."""
        check_images(images)
        exemplars = self._stored
        if exemplars is None:
            pictures = [picture for references_of in (context or {}).get("references", ()) for picture in references_of]
            if len(pictures) < 2:
                raise RewardError(self.name, f"got {len(pictures)} references, expected at least 2")
            exemplars = self._moments([picture.to(images.device) for picture in pictures])
        return self._shares(
            images, None, lambda features: -frechet_distance(moments(features, self.shrinkage), exemplars)
        )

    def _moments(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # one by one: their sizes may differ
            return moments(torch.cat([self._embed(picture[None]) for picture in pictures]), self.shrinkage)


def _check_encoder(options: Mapping[str, Any]) -> None:
    if options.get("encoder") is None:
        model = options.get("model", str(SHIPPED))
        check_clip_options(model, options.get("pretrained"), options.get("dtype", "float32"))


def _files(folder: str) -> list[Path]:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"exemplars: got {folder!r}, which is no folder")
    return picture_files(path)


def _read_folder(folder: str) -> list[Tensor]:
    return [pil_to_images([read_picture(file)])[0] for file in _files(folder)]
