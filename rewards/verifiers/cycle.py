"""Cycle consistency of conditional generation: does a picture give back the condition it was drawn from?

ControlNet++ (Li et al. 2024, arXiv:2404.07987) and Ctrl-U (arXiv:2410.11236). The losses are pure functions for a
trainer that works on one-step estimates of noised training pictures; `controlnet_cycle` is the reward.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.images import check_images
from visalign.locations import load_callable
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardError, register_reward

IGNORE = 255  # label of pixels that do not count
CONDITIONS = ("edge", "segmentation", "depth")
SMALLEST = 32  # side of a picture for an UperNet, whose backbone divides it by as much
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each pixel, (N, h, w), 0 where ignored.

    Args:
        logits: (N, C, h, w).
        labels: int64 (N, H, W), resized to the logits by nearest neighbour; 255 is ignored.
    """
    labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest")[:, 0].long()
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def depth_loss(depth: Tensor, target: Tensor) -> Tensor:
    """Squared difference of each pixel, (N, h, w), each map (N, h, w) divided by its maximum."""
    target = F.interpolate(target[:, None].float(), depth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    depth, target = (d / d.amax(dim=(1, 2), keepdim=True).clamp(min=1e-8) for d in (depth.float(), target))
    return (depth - target) ** 2


def edge_loss(edges: Tensor, target: Tensor) -> Tensor:
    """Squared difference of each pixel of edge maps (N, h, w)."""
    return (edges - target) ** 2


def edge_magnitude(images: Tensor) -> Tensor:
    """Gradient magnitude of images (N, 3, H, W), (N, H, W): grey, Gaussian blur (5 x 5, sigma 1), Sobel.

    The differentiable first half of Canny's detector; it neither thins nor thresholds, as kornia's does. 0 on a flat
    picture, 1 at most for a straight step from black to white (a corner may pass it a little).
    """
    grey = (images.float() * images.new_tensor([0.299, 0.587, 0.114]).float().view(1, 3, 1, 1)).sum(1, keepdim=True)
    blur = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2).to(grey)
    blur = (blur / blur.sum()).outer(blur / blur.sum())
    grey = F.conv2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), blur[None, None])
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(grey) / 4  # a step of height 1 gives at most 1
    slopes = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    return ((slopes**2).sum(dim=1) + 1e-12).sqrt() - 1e-6  # the root's slope at 0 is infinite


def per_item(pixel_losses: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over each item's pixels, (N,), of losses (N, h, w); over those `counted`, (N, h, w) bool, where given."""
    if counted is None:
        return pixel_losses.flatten(1).mean(dim=1)
    weights = counted.flatten(1).to(pixel_losses)
    return (pixel_losses.flatten(1) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def segmentation_doubt(auxiliary: Tensor, main: Tensor, scale: float = 1.0) -> Tensor:
    """Ctrl-U's doubt of each pixel, (N, h, w): scale * KL(softmax(auxiliary) || softmax(main)) of logits (N, C, h, w).

    The auxiliary prediction is of the estimate one timestep further up.
    """
    log_p, log_q = auxiliary.float().log_softmax(dim=1), main.float().log_softmax(dim=1)
    return scale * (log_p.exp() * (log_p - log_q)).sum(dim=1)


def map_doubt(auxiliary: Tensor, main: Tensor, scale: float = 0.1) -> Tensor:
    """Ctrl-U's doubt of each pixel of depth or edge maps (N, h, w): scale * |auxiliary - main|."""
    return scale * (auxiliary.float() - main.float()).abs()


@register_reward("controlnet_cycle")
class ControlnetCycle:
    """Minus the ControlNet++ loss between the condition read back from a picture and the one it was drawn from.

    Range (-inf, 0], 0 where they agree (segmentation: where it is certain); gradients reach the images. By `condition`:
    "edge": mean squared difference of `edge_magnitude`, no weights; "segmentation": cross-entropy of an UperNet;
    "depth": mean squared difference of a DPT's depth, each map divided by its maximum.

    The target is read from `context["condition"]`, N maps (H, W): edge magnitudes, labels (int64, 255 ignored), depths;
    or with `target="references"` by the same extractor from each sample's one reference, of the images' size.

    Args:
        condition: see above.
        target: "condition" or "references".
        model: for "segmentation" an UperNet, for "depth" a DPT: folder or hub id in transformers' layout. Pictures go
            into an UperNet at their own size, into a DPT at the size of its configuration (384).
        extractor: instead of `model`, or of `edge_magnitude`: a callable, or where one is found, from images to logits
            (N, C, h, w) or maps (N, h, w).
        device: where the model runs; None follows the images.
        download: fetch weights that are not in the local cache; without it they are an error.
    """

    name = "controlnet_cycle"
    differentiable = True
    kind = "pointwise"
    media = "images"
    range = (-math.inf, 0.0)
    checkpoints = ("openmmlab/upernet-convnext-small", "Intel/dpt-large")
    source = "arXiv:2404.07987"
    needs: tuple[str, ...] = ("condition",)

    def __init__(
        self,
        condition: str = "edge",
        target: str = "condition",
        model: str | None = None,
        extractor: str | Callable[[Tensor], Tensor] | None = None,
        device: str | None = None,
        download: bool = False,
    ) -> None:
        self.preflight({"condition": condition, "target": target, "model": model, "extractor": extractor})
        self.condition, self.target, self.needs = condition, target, (target,)
        self._extract: Callable[[Tensor], Tensor] = edge_magnitude
        if extractor is not None:
            self._extract = load_callable("extractor", extractor)
        elif model is not None:
            self._extract = (load_upernet if condition == "segmentation" else load_dpt)(model, device, download)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        condition, target = options.get("condition", "edge"), options.get("target", "condition")
        if condition not in CONDITIONS:
            raise unknown_name("condition", condition, CONDITIONS)
        if target not in ("condition", "references"):
            raise unknown_name("target", target, ("condition", "references"))
        model, extractor = options.get("model"), options.get("extractor")
        if model is not None and (extractor is not None or condition == "edge"):
            beside = "edge" if extractor is None else "an extractor"
            raise ValueError(f"model: got {model!r} for {beside}, expected None")
        if condition != "edge" and model is None and extractor is None:
            raise ValueError(f"model: got None for {condition!r}, expected a folder or hub id, or an extractor")

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. Returns (N,), float32."""
        _, losses, counted = self.pixel_losses(images, context)
        return -per_item(losses, counted)

    def pixel_losses(self, images: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What was read back, logits (N, C, h, w) or maps (N, h, w), each pixel's loss (N, h, w), and which count."""
        check_images(images)
        maps = self._extract(images)
        targets = self._targets(images, context or {}).to(maps.device)
        if self.condition == "segmentation":
            losses = segmentation_loss(maps, targets)
            resized = F.interpolate(targets[:, None].float(), losses.shape[-2:], mode="nearest")[:, 0]
            return maps, losses, resized != IGNORE
        if self.condition == "depth":
            return maps, depth_loss(maps, targets), None
        if targets.shape != maps.shape:
            got = f"got edge maps of shape {tuple(targets.shape)}, expected {tuple(maps.shape)}"
            raise RewardError(self.name, got)
        return maps, edge_loss(maps, targets.float()), None

    def doubt(self, auxiliary: Tensor, main: Tensor) -> Tensor:
        """Ctrl-U's disagreement of two readings of `pixel_losses`, (N, h, w): a KL of classes, else |difference|."""
        if self.condition == "segmentation":
            return segmentation_doubt(auxiliary, main)
        return map_doubt(auxiliary, main, scale=1.0)

    def _targets(self, images: Tensor, context: Context) -> Tensor:
        if self.target == "condition":
            maps = context["condition"]
            if len(maps) != len(images) or any(m.ndim != 2 for m in maps):
                raise RewardError(self.name, f"got {len(maps)} conditions, expected {len(images)} maps (H, W)")
            if self.condition == "segmentation" and any(m.is_floating_point() for m in maps):
                raise RewardError(self.name, "got labels of a float type, expected integers")
            return torch.stack(list(maps))
        references = context["references"]
        for n, pictures in enumerate(references):
            if len(pictures) != 1 or pictures[0].shape != images.shape[1:]:
                got = f"got {len(pictures)} references, expected one of shape {tuple(images.shape[1:])}"
                raise RewardError(self.name, got, sample=n)
        with torch.no_grad():
            extracted = self._extract(torch.stack([pictures[0] for pictures in references]).to(images))
        return extracted.argmax(dim=1) if self.condition == "segmentation" else extracted


def load_upernet(model: str, device: str | None = None, download: bool = False) -> Callable[[Tensor], Tensor]:
    """Images (N, 3, H, W) in [0, 1] to logits (N, classes, H, W) of a frozen UperNet."""
    from transformers import UperNetForSemanticSegmentation

    network = _frozen(UperNetForSemanticSegmentation, model, download)

    def logits(images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < SMALLEST:
            got = f"{images.shape[-1]} x {images.shape[-2]}"
            raise ValueError(f"images: got {got} pixels, expected at least {SMALLEST} pixels a side")
        network.to(device or images.device)
        images = images.float()
        pixels = (images - images.new_tensor(MEAN).view(3, 1, 1)) / images.new_tensor(STD).view(3, 1, 1)
        return network(pixel_values=pixels.to(network.device)).logits.float()

    return logits


def load_dpt(model: str, device: str | None = None, download: bool = False) -> Callable[[Tensor], Tensor]:
    """Images (N, 3, H, W) in [0, 1] to depths (N, h, w), near is large, of a frozen DPT at its own size."""
    from transformers import DPTForDepthEstimation

    network = _frozen(DPTForDepthEstimation, model, download)
    side = network.config.image_size

    def depth(images: Tensor) -> Tensor:
        network.to(device or images.device)
        pixels = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
        return network(pixel_values=(pixels.clamp(0, 1).to(network.device) - 0.5) / 0.5).predicted_depth.float()

    return depth


def _frozen(kind: Any, model: str, download: bool) -> Any:
    try:
        network = kind.from_pretrained(model, local_files_only=not download, dtype=torch.float32)
    except (OSError, ValueError) as error:
        advice = "" if download else "; pass a folder, or download=True to fetch it"
        raise ValueError(f"model: could not load {model!r}: {' '.join(str(error).split())[:200]}{advice}") from error
    return network.eval().requires_grad_(False)
