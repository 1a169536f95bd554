"""Is the quoted text of a prompt written in the picture? The text-rendering reward of Flow-GRPO (arXiv:2505.05470)."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visalign.images import check_images, images_to_pil
from visalign.locations import load_callable
from visalign.names import unknown_name
from visalign.rewards.base import Context, RewardOutput, check_prompts, register_reward

Engine = Callable[[Image.Image], str | Sequence[str]]  # an RGB picture to its text, or its lines in reading order
QUOTED = re.compile('["\u201c\u201d\u201e]([^"\u201c\u201d\u201e]*)["\u201c\u201d]')  # straight, English, low


def quoted_text(prompt: str) -> str | None:
    """What stands between the first pair of double quotes, straight or curly; None without such a pair."""
    match = QUOTED.search(prompt)
    return None if match is None else match[1]


def normalise(text: str) -> str:
    """Lower case, without any white space."""
    return "".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def text_score(target: str, recognised: str) -> float:
    """1 - d / len(target) in [0, 1], both sides normalised.

    d is 0 where the target is part of what was recognised, else their edit distance, at most len(target).

    Raises:
        ValueError: nothing is left of the target.
    """
    target, recognised = normalise(target), normalise(recognised)
    if not target:
        raise ValueError("target: got no letters, expected some text")
    distance = 0 if target in recognised else min(edit_distance(recognised, target), len(target))
    return 1 - distance / len(target)


def tesseract(download: bool = False, **options: Any) -> Engine:
    """pytesseract; the options are those of its `image_to_string`. Tesseract itself is the user's to install."""
    import pytesseract

    return lambda picture: pytesseract.image_to_string(picture, **options).splitlines()


def easyocr(download: bool = False, **options: Any) -> Engine:
    """easyocr; the options are those of its `Reader`, English unless `lang_list` says otherwise."""
    import easyocr

    reader = easyocr.Reader(**{"lang_list": ["en"], "verbose": False, "download_enabled": download, **options})
    return lambda picture: reader.readtext(np.asarray(picture), detail=0)


def paddleocr(download: bool = False, **options: Any) -> Engine:
    """PaddleOCR, version 2 or 3; the options are those of its class. English, pages taken as upright.

    It fetches models that it misses without asking, so either `download` or the folders of local models (options
    ending in "model_dir") must be given.
    """
    if not download and not any(name.endswith("model_dir") for name in options):
        raise ValueError(
            "engine: got 'paddleocr' with download=False, but it fetches missing models itself; expected download=True "
            "or engine_options with its ..._model_dir"
        )
    from paddleocr import PaddleOCR

    if hasattr(PaddleOCR, "predict"):  # version 3
        upright = ("use_doc_orientation_classify", "use_doc_unwarping", "use_textline_orientation")
        new = PaddleOCR(**{"lang": "en", **dict.fromkeys(upright, False), **options})
        return lambda picture: [line for page in new.predict(np.asarray(picture)) for line in page["rec_texts"]]
    old = PaddleOCR(**{"lang": "en", "use_angle_cls": False, "show_log": False, **options})

    def read(picture: Image.Image) -> list[str]:
        pages = old.ocr(np.asarray(picture), cls=False)
        return [text for page in pages or () for _, (text, confidence) in page or () if confidence > 0]

    return read


ENGINES: Mapping[str, Callable[..., Engine]] = {
    "tesseract": tesseract,
    "easyocr": easyocr,
    "paddleocr": paddleocr,
}


@register_reward("ocr")
class OcrReward:
    """How closely the text read in a picture matches the prompt's quoted text; range [0, 1], 1 exact or more.

    See `text_score`; what is read is joined line by line. The target stands between the prompt's first pair of double
    quotes. Invalid are prompts without such a text ([R]: the reference code knows none), and pictures on which the
    engine fails (there 0, as `score(..., on_fail="zero")` makes it). Extra: "recognised", N strings. No gradient.

    Args:
        engine: "tesseract", "easyocr", "paddleocr" (the reference's; each under its own licence, to be installed by the
            user), "module:attribute", or a callable from an RGB picture to its text or lines.
        engine_options: of the built-in engine; see its function.
        download: let the engine fetch its models.
    """

    name = "ocr"
    differentiable = False
    kind = "pointwise"
    range = (0.0, 1.0)
    needs = ("prompts",)
    media = "images"
    checkpoints = ("the engine's own",)
    licence = "the engine's own (all three: Apache-2.0)"
    source = "Liu et al. 2025 (Flow-GRPO), arXiv:2505.05470"

    def __init__(
        self,
        engine: str | Engine,
        engine_options: Mapping[str, Any] | None = None,
        download: bool = False,
    ) -> None:
        self.preflight({"engine": engine, "engine_options": engine_options})
        if isinstance(engine, str) and engine in ENGINES:
            try:
                self._engine = ENGINES[engine](download, **(engine_options or {}))
            except ImportError as error:
                raise ValueError(f"engine: got {engine!r}, which is not installed here ({error})") from error
        else:
            self._engine = load_callable("engine", engine)

    @staticmethod
    def preflight(options: Mapping[str, Any]) -> None:
        """Raise ValueError for options that cannot work, without loading anything."""
        engine = options["engine"]
        if isinstance(engine, str) and ":" not in engine and engine not in ENGINES:
            raise unknown_name("engine", engine, [*ENGINES, "module:attribute"])
        if options.get("engine_options") and not (isinstance(engine, str) and engine in ENGINES):
            raise ValueError(
                f"engine_options: got {sorted(options['engine_options'])}, expected none for your own engine"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str], context: Context | None = None) -> RewardOutput:
        """images: (N, 3, H, W) in [0, 1]; prompts: N strings. Returns (N,), float32 on the CPU."""
        check_images(images)
        check_prompts(images, prompts)
        scores, reasons, texts = [], [], []
        for picture, prompt in zip(images_to_pil(images), prompts):
            score, reason, text = self._score(picture, quoted_text(prompt))
            scores.append(score)
            reasons.append(reason)
            texts.append(text)
        valid = torch.tensor([reason is None for reason in reasons])
        return RewardOutput(torch.tensor(scores), rationale=reasons, valid=valid, extra={"recognised": texts})

    def _score(self, picture: Image.Image, target: str | None) -> tuple[float, str | None, str]:
        """Score, why there is none, and the text recognised."""
        if target is None or not normalise(target):
            return 0.0, "the prompt has no text between double quotes", ""
        try:
            read = self._engine(picture)
        except Exception as error:  # engines fail in ways of their own; one picture must not end a training
            return 0.0, f"the engine failed: {type(error).__name__}: {str(error)[:200]}", ""
        text = read if isinstance(read, str) else "".join(read)
        return text_score(target, text), None, text
