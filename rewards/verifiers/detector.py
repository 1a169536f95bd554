"""Finding objects in pictures, for verifiers: any detection or instance segmentation model of transformers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.images import check_images, images_to_pil

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, right and bottom exclusive
# Names that GenEval's metadata or checkpoints use, to those of COCO
ALIASES = {
    "computer mouse": "mouse",
    "computer keyboard": "keyboard",
    "tv remote": "remote",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


@dataclass(frozen=True)
class Detection:
    """One object found: what, how surely (0 to 1), where, and its pixels (H, W) bool where the detector tells."""

    label: str
    score: float
    box: Box
    mask: Tensor | None = None


Detector = Callable[[Tensor], Sequence[Sequence[Detection]]]  # images (N, 3, H, W) to N lists, in any order


def canonical(label: str) -> str:
    """The name by which labels are compared: lower case, plain spaces, COCO's word for it."""
    plain = " ".join(label.lower().replace("_", " ").replace("-", " ").split())
    return ALIASES.get(plain, plain)


class TransformersDetector:
    """Detections by a checkpoint whose architecture is one of transformers' for segmentation or object detection.

    Masks come from models for instance segmentation (Mask2Former, MaskFormer, RF-DETR); their boxes are the masks'
    bounds. Models for object detection (DETR, RT-DETR, YOLOS, ...) give boxes alone.

    Args:
        model: a folder or a hub id with config, weights and image processor.
        threshold: what scores below is not reported.
        device: where to run; None follows the images.
        dtype: of the weights.
        batch_size: pictures a forward pass.
        download: fetch what is not in the local cache; without it that is an error.

    Raises:
        ValueError: not there, or an architecture that finds no objects.
    """

    def __init__(
        self,
        model: str,
        threshold: float = 0.3,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        download: bool = False,
    ) -> None:
        import transformers

        local = {"local_files_only": not download}
        try:
            config = transformers.AutoConfig.from_pretrained(model, **local)
            architecture = (config.architectures or ["none"])[0]
            self._masks = architecture.endswith("Segmentation")
            known = getattr(transformers, architecture, None)
            if known is None or not (self._masks or architecture.endswith("ObjectDetection")):
                raise ValueError(
                    f"model: got {model!r} of architecture {architecture}, expected one for object detection or "
                    "instance segmentation, such as Mask2FormerForUniversalSegmentation"
                )
            self._processor = transformers.AutoImageProcessor.from_pretrained(model, **local)
            self._model = known.from_pretrained(model, dtype=dtype, **local).eval().requires_grad_(False)
        except OSError as error:
            advice = "" if download else " (download=True fetches a hub checkpoint)"
            raise ValueError(f"model: could not load {model!r}: {str(error).splitlines()[0][:300]}{advice}") from error
        self._post_process = self._find_post_processing(model)
        self._threshold, self._device, self._batch_size = threshold, device, batch_size
        self._labels = {int(key): canonical(name) for key, name in config.id2label.items()}
        self.labels = frozenset(self._labels.values())  # what it can find

    def _find_post_processing(self, model: str) -> Callable[..., list[Mapping[str, Any]]]:
        name = "post_process_instance_segmentation" if self._masks else "post_process_object_detection"
        method = getattr(self._processor, name, None)
        if method is None or self._masks and "return_binary_maps" not in inspect.signature(method).parameters:
            raise ValueError(f"model: got {model!r}, whose {type(self._processor).__name__} has no {name} giving maps")
        return method

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """images: (N, 3, H, W) in [0, 1]. Returns N lists."""
        check_images(images)
        self._model.to(self._device or images.device)
        return [objects for part in images.split(self._batch_size) for objects in self._detect(part)]

    @torch.no_grad()
    def _detect(self, images: Tensor) -> list[list[Detection]]:
        inputs = self._processor(images=images_to_pil(images), return_tensors="pt").to(self._model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        outputs = self._model(**inputs)
        for key, value in outputs.items():  # the processors' maps are made on the CPU, whatever the logits' device
            if isinstance(value, Tensor):
                outputs[key] = value.float().cpu()
        sizes = [tuple(images.shape[2:])] * len(images)
        if not self._masks:
            return [self._boxes(r) for r in self._post_process(outputs, threshold=self._threshold, target_sizes=sizes)]
        options = {"threshold": self._threshold, "target_sizes": sizes, "return_binary_maps": True}
        return [self._instances(r) for r in self._post_process(outputs, **options)]

    def _boxes(self, result: Mapping[str, Any]) -> list[Detection]:
        rows = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist())
        return [Detection(self._labels[label], score, (x0, y0, x1, y1)) for label, score, (x0, y0, x1, y1) in rows]

    def _instances(self, result: Mapping[str, Any]) -> list[Detection]:
        objects = []
        for mask, info in zip(result["segmentation"], result["segments_info"]):
            mask = mask.bool()
            if mask.any():
                objects.append(Detection(self._labels[info["label_id"]], float(info["score"]), mask_box(mask), mask))
        return objects


def mask_box(mask: Tensor) -> Box:
    """The bounds of a mask (H, W) with at least one pixel."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
