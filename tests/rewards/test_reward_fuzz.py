"""Odd pictures and prompts, given to every registered reward: a clear error, or the score of what they stand for."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_rewards import OPTIONS, Row, TinyRewards
from torch import Tensor

from visalign.images import images_to_pil
from visalign.rewards import reward_names, score

# What is refused. Pictures are (N, 3, H, W) or videos (N, F, 3, H, W).

PICTURES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda x: None, "got NoneType"),
    "a path": (lambda x: "picture.png", "got str"),
    "a list": (list, "got list"),
    "a list of sizes": (lambda x: [x[0], x[1, ..., 1:], x[2]], "got list"),
    "PIL": (lambda x: images_to_pil(x[:, 0] if x.ndim == 5 else x), "got list"),
    "numpy": (lambda x: x.numpy(), "got ndarray"),
    "no pictures": (lambda x: x[:0], "at least one"),
    "no rows": (lambda x: x[..., :0, :], "at least one"),
    "no batch": (lambda x: x[0], "got shape|scores videos, got images"),
    "a batch of batches": (lambda x: x[None, None], "got shape"),
    "channels last": (lambda x: x.movedim(-3, -1), "channels last"),
    "no channels": (lambda x: x[..., 0, :, :], "got shape"),
    "greyscale": (lambda x: x[..., :1, :, :], "greyscale"),
    "greyscale with alpha": (lambda x: x[..., :2, :, :], "got shape"),
    "RGBA": (lambda x: torch.cat([x, x[..., :1, :, :]], dim=-3), "RGBA"),
    "uint8": (lambda x: (x * 255).to(torch.uint8), "got torch.uint8"),
    "int64": (lambda x: (x * 255).long(), "got torch.int64"),
    "bool": (lambda x: x > 0.5, "got torch.bool"),
    "complex": (lambda x: x + 0j, "got torch.complex64"),
}
PIXELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda x: _pixel(x, math.nan), "got values from nan to nan in sample 1"),
    "infinity": (lambda x: _pixel(x, math.inf), "to inf in sample 1"),
    "minus infinity": (lambda x: _pixel(x, -math.inf), "from -inf"),
    "[-1, 1]": (lambda x: 2 * x - 1, "expected within \\[0, 1\\]"),
    "[0, 255]": (lambda x: 255 * x, "expected within \\[0, 1\\]"),
    "half precision NaN": (lambda x: _pixel(x.half(), math.nan), "got values from nan"),
}
PROMPTS: dict[str, tuple[Callable[[list[str]], Any], str]] = {
    "nothing": (lambda p: None, "got NoneType"),
    "one string": (lambda p: p[0], "got one string"),
    "a number": (lambda p: 3, "got int"),
    "a set": (set, "got set"),
    "a mapping": (lambda p: {f"{k}": prompt for k, prompt in enumerate(p)}, "got dict"),
    "a generator": (iter, "got list_iterator"),
    "bytes": (lambda p: [prompt.encode() for prompt in p], "other things than strings"),
    "a None among them": (lambda p: [p[0], None, p[2]], "other things than strings"),
    "lists": (lambda p: [[prompt] for prompt in p], "other things than strings"),
    "none": (lambda p: [], "got 0, expected 3"),
    "one too few": (lambda p: p[:2], "got 2, expected 3"),
    "one too many": (lambda p: [*p, p[0]], "got 4, expected 3"),
    "half a character": (lambda p: [p[0], "a \ud800 b", p[2]], "lone surrogate at 1"),
}
REFERENCES: dict[str, tuple[Callable[[list[list[Tensor]]], Any], str]] = {
    "one too few": (lambda r: r[:2], "got 2 references"),
    "one tensor": (lambda r: torch.rand(3, 3, 8, 8), "got Tensor, expected 3 lists"),
    "no lists": (lambda r: [own[0] for own in r], "got \\(40, 32\\) for image 0"),
    "a batch": (lambda r: _reference(r, r[1][0][None]), "got \\(1, 3, 64, 64\\) for image 1"),
    "PIL": (lambda r: _reference(r, images_to_pil(r[1][0][None])[0]), "got Image for image 1"),
    "a path": (lambda r: _reference(r, "x.png"), "got str for image 1"),
    "channels last": (lambda r: _reference(r, r[1][0].movedim(0, -1)), "for image 1.*got shape"),
    "greyscale": (lambda r: _reference(r, r[1][0][:1]), "for image 1.*greyscale"),
    "uint8": (lambda r: _reference(r, (r[1][0] * 255).byte()), "for image 1.*got torch.uint8"),
    "NaN": (lambda r: _reference(r, _pixel(r[1][0], math.nan)), "for image 1.*got values from nan"),
    "[-1, 1]": (lambda r: _reference(r, 2 * r[1][0] - 1), "for image 1.*expected within \\[0, 1\\]"),
}

# What is the same as something else: what is given, and what it stands for.

SAME: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "float64": (lambda x: x.double(), lambda x: x),
    "float16": (lambda x: x.half(), lambda x: x.half().float()),
    "bfloat16": (lambda x: x.bfloat16(), lambda x: x.bfloat16().float()),
    "another layout": (lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3), lambda x: x),
    "one picture expanded": (lambda x: x[:1].expand_as(x), lambda x: x[:1].repeat(3, *[1] * (x.ndim - 1))),
    "with gradient": (lambda x: x.clone().requires_grad_(), lambda x: x),
    "rounded past the ends": (lambda x: _edges(x, 9e-4), lambda x: _edges(x, 0.0)),
}

# What each reward may refuse, or score: odd sizes and odd prompts.

SIZES = {
    "1 x 1": (1, 1),
    "37 x 53": (37, 53),
    "10000 x 8": (8, 10_000),
    "8 x 10000": (10_000, 8),
    "10000 x 1": (1, 10_000),
}
WIDE = ("10000 x 8", "8 x 10000", "10000 x 1")
TEXTS = {
    "empty": "",
    "blank": " \n\t ",
    "odd": "\x00 \u202e \U0001f600 e\u0301 <b>{prompt}</b> %s {0} <image>",
    "long": "Describe this image in detail " * 340,  # 10,200 characters
}
CLIP = ("aesthetic", "clip", "clip_i", "clip_match", "hpsv2", "hpsv21", "imagereward", "neg_fd", "over_frames")
CLIP += ("pickscore", "set_consistency", "shapes_taste", "vendi", "video_consistency", "vlm_rm")
VLM = ("descore", "editreward", "hpsv3", "paco_consistency", "paco_edit", "prompt_echo", "rewarddance", "rubric")
VLM += ("vlm_yes", "vqascore")
REFUSED = {(name, size): "aspect ratio" for name in (*CLIP, *VLM, "vqascore clip_t5") for size in WIDE}
REFUSED |= {("gold", size): "got images of .* pixels, expected 64x64" for size in SIZES}
REFUSED |= {("gold", text): "prompt: got .*the shapes world cannot read" for text in TEXTS}
REFUSED |= {("ocr", text): "the prompt has no text between double quotes" for text in TEXTS}
REFUSED |= {("controlnet_cycle segmentation", size): "at least 32 pixels" for size in SIZES if size != "37 x 53"}
REFUSED |= {
    ("paco_consistency", "1 x 1"): "got a grid of 1x2 for \\(1, 1\\) pixels",
    ("set_consistency", "1 x 1"): "at least 2 by 2 pixels",
    ("set_consistency", "10000 x 1"): "at least 2 by 2 pixels",
    **{("descore", size): "at least 4 pixels a side" for size in ("1 x 1", "10000 x 1")},
    ("prompt_echo", "empty"): "prompts: got an empty one at 0",
}
CUT = ("clip", "clip_match", "hpsv2", "hpsv21", "hummingbird", "imagereward", "lambda_harmonic", "over_frames")
CUT += ("pickscore", "vlm_rm")  # docs/rewards.md says so
PIXELWISE = ("geneval",)  # cuts boxes at whole pixels, so that a flat picture's size tells
# Without variance the tiny detector's norms amplify rounding: class scores move by 0.4 % with the size of the batch.
NOISY = {("geneval", "1 x 1")}
FLAT = dict.fromkeys(VLM, (28, 28))  # the size at which a flat picture is seen as one pixel is; else any
FLAT |= dict.fromkeys(("jpeg_compressibility", "jpeg_incompressibility"), (1, 1))


def _pixel(x: Tensor, value: float) -> Tensor:
    """One pixel of the second sample changed."""
    x = x.clone()
    (x[1] if x.ndim > 3 else x)[..., x.shape[-2] // 2, x.shape[-1] // 2] = value
    return x


def _edges(x: Tensor, by: float) -> Tensor:
    """The first row white, the last one black, and a little more."""
    x = x.clone()
    x[..., 0, :], x[..., -1, :] = 1 + by, -by
    return x


def _reference(references: list[list[Tensor]], picture: Any) -> list[list[Any]]:
    """The second image's first reference replaced."""
    return [references[0], [picture, *references[1][1:]], *references[2:]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = TinyRewards(tmp_path_factory.mktemp("tiny"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=OPTIONS)
def named(request, tiny) -> tuple[str, Row]:
    return request.param, tiny(request.param)


def through_the_door(row: Row, images: Any, prompts: Any, context: dict[str, Any]) -> Tensor | str:
    """What `score` gives, NaN where invalid, or the message of its ValueError."""
    try:
        output = score(row.reward, images, prompts, context).outputs[row.reward.name]
    except ValueError as error:
        return str(error)
    return torch.where(output.is_valid, output.scores, math.nan)


def directly(row: Row, images: Any, prompts: Any, context: dict[str, Any]) -> Tensor | str:
    """What the reward itself gives, likewise; other errors than ValueErrors begin with their type."""
    try:
        with torch.no_grad():
            output = row.reward(images, prompts, context)
    except Exception as error:
        return f"{'' if isinstance(error, (ValueError, TypeError)) else type(error).__name__}{error}"
    valid = getattr(output, "valid", None)
    scores = getattr(output, "scores", output)
    return scores if valid is None else torch.where(valid, scores, math.nan)


def is_clear(message: Tensor | str, says: str, about: str) -> bool:
    """One line that names the argument, what was given and what is expected."""
    return isinstance(message, str) and all(
        re.search(pattern, message) for pattern in (says, rf"\b({about})\b", "^.{20,1200}$", "got .*expected ")
    )


def test_every_registered_reward_is_here():
    assert {name.split()[0] for name in OPTIONS} == set(reward_names())


@pytest.mark.parametrize("call", [through_the_door, directly])
def test_pictures_that_are_none_are_refused(named, call):
    name, row = named
    wrong, context = {}, row.context(row.images)
    for label, (spoil, says) in PICTURES.items():
        said = call(row, spoil(row.images), row.prompts, context)
        if not is_clear(said, says if call is through_the_door else "", "images|videos"):
            wrong[label] = said
    assert not wrong


def test_pixels_that_are_none_are_refused_and_never_scored(named):
    name, row = named
    wrong, context = {}, row.context(row.images)
    for label, (spoil, says) in PIXELS.items():
        spoilt = spoil(row.images)
        said = through_the_door(row, spoilt, row.prompts, context)
        if not is_clear(said, says, "images|videos"):
            wrong[label] = said
        if "NaN" in label:
            said = directly(row, spoilt, row.prompts, context)
            if not isinstance(said, str) and not said[1].isnan():
                wrong[f"{label}, directly"] = said
    assert not wrong


@pytest.mark.parametrize("call", [through_the_door, directly])
def test_prompts_that_are_none_are_refused(named, call):
    name, row = named
    if call is directly and "prompts" not in row.reward.needs:
        pytest.skip("ignores prompts")
    wrong, context = {}, row.context(row.images)
    for label, (spoil, says) in PROMPTS.items():
        said = call(row, row.images, spoil(row.prompts), context)
        if not is_clear(said, says, "prompts"):
            wrong[label] = said
    assert not wrong


def test_references_that_are_none_are_refused(named):
    name, row = named
    context, wrong = row.context(row.images), {}
    if "references" not in context:
        pytest.skip("takes no references")
    for label, (spoil, says) in REFERENCES.items():
        said = through_the_door(row, row.images, row.prompts, {**context, "references": spoil(context["references"])})
        if not is_clear(said, says, "references"):
            wrong[label] = said
    assert not wrong


def test_the_same_in_another_form_scores_the_same(named):
    name, row = named
    wrong = {}
    for label, (give, means) in SAME.items():
        canonical = means(row.images)
        context = row.context(canonical)
        said = through_the_door(row, give(row.images), row.prompts, context)
        expected = through_the_door(row, canonical, row.prompts, context)
        if not agree(said, expected, 1e-2 if "rounded" in label else 1e-4):
            wrong[label] = said, expected
    context, expected = row.context(row.images), through_the_door(row, row.images, row.prompts, row.context(row.images))
    for label, prompts in {"a tuple": tuple(row.prompts), "an array": np.array(row.prompts)}.items():
        if not agree(said := through_the_door(row, row.images, prompts, context), expected):
            wrong[label] = said
    assert not wrong


def test_odd_sizes_are_refused_or_score_as_they_do_alone(named):
    name, row = named
    wrong, generator = {}, torch.Generator().manual_seed(1)
    for label, size in SIZES.items():
        images = torch.rand(*row.images.shape[:-2], *size, generator=generator)
        wrong |= check(name, row, label, images, row.prompts)
        if label == "1 x 1" and (name, label) not in REFUSED and name not in PIXELWISE:
            flat = images.expand(*images.shape[:-2], *FLAT.get(name, (64, 64)))
            said, expected = (through_the_door(row, x, row.prompts, row.context(x)) for x in (images, flat))
            if not agree(said, expected):
                wrong["flat"] = said, expected
    assert not wrong


def test_odd_prompts_are_refused_or_score_as_they_do_alone(named):
    name, row = named
    wrong = {}
    usual = through_the_door(row, row.images, row.prompts, row.context(row.images))
    for label, text in TEXTS.items():
        together = [text, *row.prompts[1:]] if row.reward.kind == "pointwise" and label == "long" else [text] * 3
        wrong |= check(name, row, label, row.images, together)
        said = through_the_door(row, row.images, together, row.context(row.images))
        if "prompts" not in row.reward.needs and name != "remote" and not agree(said, usual):
            wrong[f"{label}, ignored"] = said, usual
    assert not wrong


def check(name: str, row: Row, label: str, images: Tensor, prompts: list[str]) -> dict[str, Any]:
    """Nothing, or by its label what is wrong: the refusal that was expected, or each sample's score by itself."""
    context = row.context(images)
    said = through_the_door(row, images, prompts, context)
    if (name, label) in REFUSED:
        if label == "long" and isinstance(said, Tensor):  # one sample has it: that one is invalid
            return {} if said.isnan().tolist() == [True, False, False] else {label: said}
        return {} if isinstance(said, str) and re.search(REFUSED[name, label], said) else {label: said}
    low, high = row.reward.range
    if isinstance(said, str) or not ((said >= low - 1e-5) & (said <= high + 1e-5)).all():
        return {label: said}
    if (name, label) in NOISY:
        return {}
    if row.reward.kind == "pointwise":
        alone = torch.cat([torch.as_tensor(through_the_door(row, *one)) for one in singles(images, prompts, context)])
    else:  # in another order
        turned = {key: value[::-1] for key, value in context.items()}
        alone = torch.as_tensor(through_the_door(row, images.flip(0), prompts[::-1], turned)).flip(0)
    return {} if agree(said, alone) else {label: (said, alone)}


def singles(images: Tensor, prompts: list[str], context: dict[str, Any]) -> Iterator[tuple]:
    for n in range(len(images)):
        yield images[n : n + 1], prompts[n : n + 1], {key: value[n : n + 1] for key, value in context.items()}


def agree(said: Tensor | str, expected: Tensor | str, tolerance: float = 1e-4) -> bool:
    scored = isinstance(said, Tensor) and isinstance(expected, Tensor)
    return scored and torch.allclose(said.double(), expected.double(), tolerance, tolerance)
