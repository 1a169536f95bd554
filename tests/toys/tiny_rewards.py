"""Every registered reward, made small: on tiny random models, or with a scripted judge in a large one's place."""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tiny_hf
import torch
from live_server import LiveServer
from tiny_clip import EMBEDDING, save_tiny_clip
from tiny_clip_t5 import save_clip_t5
from tiny_heads import make_checkpoint, make_head_state
from tiny_maps import tiny_dpt, tiny_upernet
from tiny_vlm import make_model, make_processor, make_tokenizer, save_tiny_vlm
from torch import Tensor

from visalign.images import images_to_numpy
from visalign.rewards import Reward, as_reward
from visalign.rewards.base import reward_factory
from visalign.rewards.embedding.aesthetic import LAYERS
from visalign.rewards.vlm.chat import Reply, Token
from visalign.rewards.vlm.model import VLM
from visalign.rewards.written.auto_rubric import AutoRubric, Theme
from visalign.serving.server import Limits, make_app
from visalign.worlds.shapes.captions import caption
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import place, sample_spec

RUBRIC = {"criteria": [{"text": "x", "question": "Is it {prompt}?"}, {"text": "y", "question": "Is it bright?"}]}
SIDE = 56  # of pictures to the reward heads, whose budget of pixels is this squared


def taste(text: str, pictures: Sequence[Tensor]) -> float:
    """What the scripted judge thinks: a smooth function of the pictures' light, in [0, 1], that each text turns."""
    light = sum(float(picture.double().mean()) for picture in pictures) / len(pictures)
    return 0.5 + 0.5 * math.cos(2 * math.pi * (light + zlib.crc32(text.encode()) / 2**32))


def tasteful(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`taste` as a user's reward."""
    return torch.tensor([taste(prompt, [image]) for image, prompt in zip(images, prompts)])


def tasteful_pair(first: Tensor, second: Tensor, prompts: Sequence[str], context: Any = None) -> Tensor:
    """`taste` as a judge of pairs: log-odds that the first is better."""
    return 3 * (tasteful(first, prompts) - tasteful(second, prompts))


def letters(picture) -> str:
    """`taste` of an engine that reads text: seven letters by the picture's light."""
    light = int(np.asarray(picture).mean())
    return "".join("abcdefg"[(light + k) % 7] for k in range(7))


class Judge:
    """A chat that answers in each judge's format, by `taste` of all the words and pictures that it was sent."""

    name = "judge"

    def __call__(self, conversations, *, max_tokens, temperature=0.0, top_p=1.0, seed=None, top_logprobs=0):
        return [self._reply([part for message in turns for part in message.parts]) for turns in conversations]

    def _reply(self, parts: Sequence[str | Tensor]) -> Reply:
        text = "\n".join(part for part in parts if isinstance(part, str))
        seen = [part if part.ndim == 4 else part[None] for part in parts if isinstance(part, Tensor)]
        pictures = [torch.from_numpy(images_to_numpy(part)) / 255 for part in seen]  # 8 bits, as at an endpoint
        x, each = taste(text, pictures), [taste(text, [picture]) for picture in pictures]
        order = sorted(range(len(each)), key=lambda k: -each[k])
        ranks = [order.index(k) + 1 for k in range(len(each))]
        better = f"Image {1 if ranks[0] == 1 else 2}"
        if "checklist" in text:
            return Reply(json.dumps({"checklist": [f"Is it {k + zlib.crc32(text.encode()) % 97}?" for k in range(5)]}))
        if text.startswith("Is it "):
            return _token({"Yes": 0.01 + 0.98 * x, "No": 0.99 - 0.98 * x})
        if '"rank"' in text:
            return Reply(json.dumps({"rank": ranks}))
        if '"winner"' in text:
            return Reply(json.dumps({"categories": [{"cat_winner": better}] * 3, "winner": better}))
        if "THINK" in text:
            return Reply(f"<think>.</think><answer>{better} is better</answer>")
        if "JSON" in text:
            return Reply(json.dumps({"reasoning": "", "score": [25 * x, 20 * x]}))
        if "VIDEO" in text:
            labels = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")
            digits = _token({"4": 0.1 + 0.8 * x, "2": 0.9 - 0.8 * x}).tokens
            tokens = [t for label in labels for t in (Token(f"{label}: ", 0.0), *digits, Token(";\n", 0.0))]
            return Reply("".join(token.text for token in tokens), tuple(tokens))
        if "SIDES" in text:
            names = ("Alignment", "Coherence", "Physics", "Style")
            return Reply("".join(f"{name} Score (1-5): {1 + 4 * x:.6f}\n" for name in names))
        if "ASPECTS" in text:
            names = ("Text Faithfulness", "Physical and Visual Quality", "Text Rendering")
            return Reply("".join(f"{k}. {name}:\n## Score: {1 + 3 * x:.6f}\n" for k, name in enumerate(names, 1)))
        return _token({"7": 0.1 + 0.8 * x, "2": 0.9 - 0.8 * x})


def _token(probabilities: dict[str, float]) -> Reply:
    top = {text: math.log(p) for text, p in probabilities.items()}
    first = next(iter(top))
    return Reply(first, (Token(first, top[first], top),))


@dataclass(frozen=True)
class Row:
    """A reward with three samples for it; the context is made for the pictures (or videos) that are given."""

    reward: Reward
    images: Tensor
    prompts: list[str]
    context: Callable[[Tensor], dict[str, Any]]


class TinyRewards:
    """Makes a registered reward's row; models are saved in `folder`, and those that several share are made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, ExitStack()
        rng = np.random.default_rng(0)
        specs = [sample_spec(rng) for _ in range(3)]
        self.images, self.prompts = draw([place(spec, rng) for spec in specs]), [caption(spec, rng) for spec in specs]
        generator = torch.Generator().manual_seed(0)
        self.videos = torch.rand(3, 4, 3, 64, 64, generator=generator) * torch.rand(3, 1, 1, 1, 1, generator=generator)
        sizes = (40, 32), (64, 64), (33, 50), (64, 64)
        pictures = [torch.rand(3, *size, generator=generator) for size in sizes]
        self.references = [[pictures[0]], pictures[1:3], [pictures[3]]]

    def close(self) -> None:
        self._open.close()

    def __call__(self, name: str) -> Row:
        """The row of `name`, or of a variant, "name variant"."""
        reward = reward_factory(name.split()[0])(**OPTIONS[name](self))
        images = self.videos if getattr(reward, "media", "images") == "videos" else self.images
        prompts = self.prompts if reward.kind == "pointwise" else self.prompts[:1] * 3  # of one group
        if name == "paco_consistency":
            prompts = [f"a 1x2 grid of {prompt}" for prompt in prompts]
        if name == "ocr":
            prompts = ['"abc" in a book', '"bcdefga"', 'a sign: "efga"']
        needs = ("references",) if name == "rewarddance" else reward.needs
        return Row(reward, images, prompts, lambda images: self._context(name, needs, images))

    def _context(self, name: str, needs: Sequence[str], images: Tensor) -> dict[str, Any]:
        maps = images.float().flip(2).mean(dim=1) if images.ndim == 4 else images
        include = [{"class": "tv", "count": 3}, {"class": "airplane", "count": 2, "color": "red"}]
        known = {
            "references": self.references[: len(images)],
            "condition": list((4 * maps).long() if "segmentation" in name else maps),
            "metadata": [{"include": include}] * len(images),
        }
        return {need: known[need] for need in needs if need in known}

    def saved(self, save: Callable[[Path], Any], name: str = "") -> str:
        """The folder into which `save` wrote a checkpoint, once."""
        folder = self._folder / (name or save.__name__)
        if not folder.exists():
            folder.mkdir()
            save(folder)
        return str(folder)

    @cached_property
    def vlm(self) -> VLM:
        return VLM(self.saved(save_tiny_vlm))

    @cached_property
    def url(self) -> str:
        """Of a server that gives `tasteful`."""
        app = make_app(as_reward(tasteful), "tasteful", None, Limits(linger=0.0))
        return self._open.enter_context(LiveServer(app)).url


def save_hps(folder: Path) -> None:
    """HPS's file, of a model that open_clip then knows as "fuzz-hps"."""
    state = tiny_hf.save_hf_clip(folder / "clip").state_dict()
    (folder / "fuzz-hps.json").write_text(json.dumps(tiny_hf.HPS_CONFIG))
    open_clip.add_model_config(folder / "fuzz-hps.json")
    torch.save({"state_dict": tiny_hf.hf_to_open_clip(state)}, folder / "hps.pt")


def save_aesthetic(folder: Path) -> None:
    """A head in the published layout, for the tiny CLIP."""
    generator, widths, state = torch.Generator().manual_seed(0), [EMBEDDING, 32, 16, 8, 4, 1], {}
    for k, wide, narrow in zip(LAYERS, widths, widths[1:]):
        state[f"layers.{k}.weight"] = torch.randn(narrow, wide, generator=generator) / wide**0.5
        state[f"layers.{k}.bias"] = torch.randn(narrow, generator=generator)
    torch.save(state, folder / "head.pth")


def save_hpsv3(folder: Path) -> None:
    state = make_checkpoint(folder, "qwen2_vl", make_head_state("rm_head", 32, seed=1))[2]
    torch.save(state, folder / "weights.pth")


def save_editreward(folder: Path) -> None:
    heads = {**make_head_state("rm_heads.head_0", 32, seed=2), **make_head_state("rm_heads.head_1", 32, seed=3)}
    torch.save(make_checkpoint(folder, "qwen2_5_vl", heads)[2], folder / "weights.pth")


def save_descore(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<Reward>"], special_tokens=True)
    processor = make_processor("qwen3_vl", tokenizer)
    make_model("qwen3_vl", tokenizer, seed=6).save_pretrained(folder)
    processor.save_pretrained(folder)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(7))
    torch.save({"rm_head.weight": weight}, folder / "rm_head.pth")


def _clip(tiny: TinyRewards, **options: Any) -> dict[str, Any]:
    return {"model": tiny.saved(save_tiny_clip), **options}


def _hf_clip(tiny: TinyRewards, **options: Any) -> dict[str, Any]:
    return {"model": tiny.saved(tiny_hf.save_hf_clip), **options}


def _hps(tiny: TinyRewards) -> dict[str, Any]:
    return {"weights": f"{tiny.saved(save_hps)}/hps.pt", "model": "fuzz-hps"}


def _head_on_vlm(folder: str, **options: Any) -> dict[str, Any]:
    weights = {"base": folder, "weights": f"{folder}/weights.pth"}
    return {**weights, "dtype": "float32", "pixels": SIDE * SIDE, **options}


def _judge(**options: Any) -> Callable[[TinyRewards], dict[str, Any]]:
    return lambda tiny: {"chat": Judge(), **options}


def _vlm(tiny: TinyRewards) -> dict[str, Any]:
    return {"model": tiny.vlm}


ASKED = "Tell of {prompt}: <|Reward|> END"
OPTIONS: dict[str, Callable[[TinyRewards], dict[str, Any]]] = {
    "aesthetic": lambda t: _clip(t, pretrained=None, weights=f"{t.saved(save_aesthetic)}/head.pth"),
    "auto_rubric": _judge(rubric=AutoRubric((Theme("Light", ("Brighter is better.",)),))),
    "clip": _clip,
    "clip_i": _hf_clip,
    "clip_match": lambda t: _clip(t, scale=10.0, midpoint=0.0),
    "controlnet_cycle": lambda t: {},
    "controlnet_cycle segmentation": lambda t: {"condition": "segmentation", "model": t.saved(tiny_upernet)},
    "controlnet_cycle depth": lambda t: {"condition": "depth", "model": t.saved(tiny_dpt)},
    "delta_rubric": _judge(),
    "descore": lambda t: {"model": t.saved(save_descore), "template": "Judge {prompt}.", "dtype": "float32"},
    "dino": lambda t: {"model": t.saved(tiny_hf.save_dino)},
    "dynamic_degree": lambda t: {"enough": 0.5},
    "editreward": lambda t: _head_on_vlm(
        t.saved(save_editreward), templates={"following": f"1 {ASKED}", "quality": f"2 {ASKED}"}
    ),
    "editscore": _judge(templates={"sc": "Write JSON for <instruction>", "pq": "Write JSON"}),
    "geneval": lambda t: {
        "detector": t.saved(tiny_hf.save_mask2former),
        "colour_model": t.saved(save_tiny_clip),
        "colour_pretrained": None,
        "threshold": 0.05,
    },
    "gold": lambda t: {},
    "hpsv2": _hps,
    "hpsv21": _hps,
    "hpsv3": lambda t: _head_on_vlm(t.saved(save_hpsv3), template=ASKED),
    "hummingbird": lambda t: {"model": t.saved(tiny_hf.save_blip2)},
    "imagereward": lambda t: {
        "weights": f"{t.saved(tiny_hf.save_imagereward)}/ImageReward.pt",
        "tokenizer": f"{t.saved(tiny_hf.save_imagereward)}/bert",
    },
    "jpeg_compressibility": lambda t: {},
    "jpeg_incompressibility": lambda t: {},
    "lambda_harmonic": lambda t: {"model": t.saved(tiny_hf.save_align)},
    "motion_smoothness": lambda t: {},
    "neg_fd": _clip,
    "ocr": lambda t: {"engine": letters},
    "ordinal": _judge(),
    "over_frames": lambda t: {"reward": {"name": "clip", **_clip(t)}},
    "paco_consistency": _vlm,
    "paco_edit": _vlm,
    "pickscore": lambda t: _hf_clip(t, processor=t.saved(tiny_hf.save_hf_clip)),
    "prompt_echo": _vlm,
    "rational_rewards": _judge(templates={"system": "Mark.", "question": "ASPECTS of {prompt} <image>"}),
    "remote": lambda t: {"url": t.url},
    "rewarddance": _vlm,
    "rubric": lambda t: {"rubric": RUBRIC, "model": t.saved(save_tiny_vlm)},
    "segmental": lambda t: {"reward": tasteful},
    "set_consistency": lambda t: _hf_clip(t, pretrained=None),
    "shapes_taste": lambda t: {},
    "temporal_flicker": lambda t: {},
    "unifiedreward": _judge(templates={"image": "SIDES of {prompt}", "video": "SIDES of {prompt}"}),
    "unifiedreward_flex": _judge(),
    "unifiedreward_pair": _judge(template="THINK of {prompt}"),
    "vendi": _clip,
    "video_consistency": _clip,
    "videoscore2": _judge(template="VIDEO of {prompt}"),
    "vlm_rm": lambda t: _clip(t, baseline="a picture"),
    "vlm_yes": _vlm,
    "vqascore": _vlm,
    "vqascore clip_t5": lambda t: {"model": t.saved(save_clip_t5), "template": "Look."},
    "win_rate": lambda t: {"judge": tasteful_pair, "outcome": "soft"},
}
