"""ImageReward and Hummingbird on tiny checkpoints, against the models written out and transformers' own forward."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_hf
import torch
import torch.nn.functional as F

from visalign.images import images_to_pil
from visalign.rewards import make_reward, score
from visalign.rewards.embedding.imagereward import MEAN, STD, build_model, convert_state_dict

PROMPTS = ["a red circle", "two blue squares of the star", "a photo of a very green star", "left"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("blip")
    tiny_hf.save_imagereward(root / "imagereward")
    tiny_hf.save_blip2(root / "blip2")
    return {"imagereward": root / "imagereward", "blip2": root / "blip2"}


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(4, 3, 4, 4, generator=generator), (32, 32), mode="bicubic").clamp(0, 1)


def options(name: str, folders: dict[str, Path]) -> dict[str, str]:
    folder = folders["imagereward"]
    if name == "imagereward":
        return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")}
    return {"model": str(folders["blip2"])}


@pytest.fixture(params=["imagereward", "hummingbird"])
def any_reward(request, folders):
    return make_reward(request.param, **options(request.param, folders))


def test_a_batch_scores_as_singles_in_any_order(any_reward, images):
    result = score(any_reward, images, PROMPTS).total
    assert result.shape == (4,) and result.dtype == torch.float32 and result.std() > 1e-3
    for n in (3, 1, 0, 2):
        one = score(any_reward, images[n : n + 1], PROMPTS[n : n + 1]).total
        torch.testing.assert_close(one, result[n : n + 1], rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_images_and_no_weight(any_reward, images):
    pixels = images.clone().requires_grad_()
    result = any_reward(pixels, PROMPTS)
    (gradient,) = torch.autograd.grad(getattr(result, "scores", result).sum(), pixels)
    assert gradient.isfinite().all() and (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert not any(weight.requires_grad for weight in any_reward._frozen.model.parameters())


def test_bfloat16_stays_near_float32(folders, images):
    for name in ("imagereward", "hummingbird"):
        full = score(make_reward(name, **options(name, folders)), images, PROMPTS).total
        half = score(make_reward(name, dtype="bfloat16", **options(name, folders)), images, PROMPTS).total
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.1, atol=0.1 * full.abs().max().item())


# ImageReward


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> torch.Tensor:
    q, k, v = (heads(x, count) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


def imagereward_directly(state: dict, image: torch.Tensor, ids: list[int]) -> float:
    """Score of one picture (3, 32, 32) and its unpadded token ids, from the file's own keys."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    v = "blip.visual_encoder"
    patches = F.conv2d(pixels[None], state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], 8)
    x = torch.cat([state[f"{v}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{v}.pos_embed"][0]
    for k in range(2):
        block = f"{v}.blocks.{k}"
        q, key, value = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(q, key, value, 1), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{v}.norm", 1e-6)

    t = "blip.text_encoder"
    words, places = (state[f"{t}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    h = norm(words[ids] + places[: len(ids)], f"{t}.embeddings.LayerNorm", 1e-12)
    for k in range(2):
        layer = f"{t}.encoder.layer.{k}"
        for name, source in (("attention", None), ("crossattention", seen)):
            at = f"{layer}.{name}"
            other = h if source is None else source
            got = attend(
                linear(h, f"{at}.self.query"), linear(other, f"{at}.self.key"), linear(other, f"{at}.self.value"), 2
            )
            h = norm(linear(got, f"{at}.output.dense") + h, f"{at}.output.LayerNorm", 1e-12)
        wide = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(linear(wide, f"{layer}.output.dense") + h, f"{layer}.output.LayerNorm", 1e-12)
    y = h[0]
    for k in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{k}")
    return float((y - 0.16717362830052426) / 1.0333394966054072)


def token_ids(prompt: str) -> list[int]:
    words = [tiny_hf.WORDS.index(word) if word in tiny_hf.WORDS else 1 for word in prompt.split()]
    return [tiny_hf.WORDS.index("[CLS]"), *words, tiny_hf.WORDS.index("[SEP]")]


def test_imagereward_is_blip_and_its_head_as_the_file_spells_them(folders, images):
    state = torch.load(folders["imagereward"] / "ImageReward.pt", weights_only=True)
    got = score(make_reward("imagereward", **options("imagereward", folders)), images, PROMPTS).total
    expected = [imagereward_directly(state, image, token_ids(prompt)) for image, prompt in zip(images, PROMPTS)]
    assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_imagereward_cuts_prompts_off_at_35_tokens(folders, images):
    reward = make_reward("imagereward", **options("imagereward", folders))
    state = torch.load(folders["imagereward"] / "ImageReward.pt", weights_only=True)
    long, longer, short = ("red " * 33, "red " * 33 + "star", "red " * 32)  # with [CLS] and [SEP]: 35, 36 and 34
    same = score(reward, images[:1].repeat(3, 1, 1, 1), [long, longer, short]).total
    assert same[0] == same[1] != same[2]
    assert same[0].item() == pytest.approx(imagereward_directly(state, images[0], token_ids(long)), rel=1e-3, abs=1e-3)


def test_imagereward_s_head_is_one_affine_map_and_its_constants_come_once(folders):
    model = make_reward("imagereward", **options("imagereward", folders))._frozen.model
    state = torch.load(folders["imagereward"] / "ImageReward.pt", weights_only=True)
    matrix, offset = np.eye(32), np.zeros(32)
    for k in (0, 2, 4, 6, 7):
        weight, bias = (state[f"mlp.layers.{k}.{part}"].double().numpy() for part in ("weight", "bias"))
        matrix, offset = weight @ matrix, weight @ offset + bias
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    got = model["head"](x).squeeze(-1)
    np.testing.assert_allclose(got.numpy(), (x.double().numpy() @ matrix.T + offset)[:, 0], rtol=1e-3, atol=1e-4)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_every_key_of_the_file_finds_its_place_and_unused_ones_are_left_out():
    state = tiny_hf.imagereward_state()
    converted = convert_state_dict(state)
    unused = [k for k in state if k.startswith(("blip.vision_proj", "blip.text_proj")) or k.endswith("position_ids")]
    assert len(converted) == len(state) - len(unused)
    build_model(converted, tiny_hf.MED_CONFIG)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda s: s | {"blip.visual_encoder.blocks.0.gamma": torch.zeros(1)}, "blip.visual_encoder.blocks.0.gamma"),
        (lambda s: s | {"rm_head.weight": torch.zeros(1)}, "unknown key 'rm_head.weight'"),
        (lambda s: s | {"blip.text_encoder.pooler.dense.weight": torch.zeros(1)}, "text.pooler.dense.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "mlp.layers.4.bias"}, "head.4.bias"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("mlp")}, "none for 'head.0.weight'"),
        (lambda s: s | {"mlp.layers.7.weight": torch.zeros(2, 16)}, "head.7.weight"),
    ],
)
def test_a_file_of_another_layout_is_refused_with_the_key(spoil, says):
    with pytest.raises(ValueError, match=says):
        build_model(convert_state_dict(spoil(tiny_hf.imagereward_state())), tiny_hf.MED_CONFIG)


def test_med_config_is_taken_from_beside_the_weights_or_where_the_option_says(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    weights = tmp_path / "ImageReward.pt"
    weights.symlink_to(folders["imagereward"] / "ImageReward.pt")
    bert = {"tokenizer": str(folders["imagereward"] / "bert")}
    with pytest.raises(ValueError, match="config: med_config.json of 'THUDM/ImageReward' is not in the local cache"):
        make_reward("imagereward", weights=str(weights), **bert)
    config = tmp_path / "other.json"
    config.write_text(json.dumps(tiny_hf.MED_CONFIG | {"vocab_size": 3}))
    with pytest.raises(ValueError, match="word_embeddings"):
        make_reward("imagereward", weights=str(weights), config=str(config), **bert)
    with pytest.raises(ValueError, match="tokenizer: got './nowhere'"):
        make_reward("imagereward", weights=str(weights), config=str(config), tokenizer="./nowhere")


# Hummingbird


def blip2_directly(folder: Path, images: torch.Tensor, match: bool) -> torch.Tensor:
    """logits_per_image of transformers' forward: (N, N) highest cosines, or with `match` (N, 2) matching logits."""
    from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

    model = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(folder)(images_to_pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(pixels, tokens["input_ids"], tokens["attention_mask"], use_image_text_matching_head=match)
    return out.logits_per_image


def test_hummingbird_s_parts_are_blip2_s_two_readings(folders, images):
    levels = (images * 255).round() / 255  # the processor's pixels have 8 bits
    result = score(make_reward("hummingbird", **options("hummingbird", folders)), levels, PROMPTS)
    parts = result.outputs["hummingbird"].criteria
    torch.testing.assert_close(
        parts["global"], blip2_directly(folders["blip2"], levels, False).diag(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        parts["fine"], blip2_directly(folders["blip2"], levels, True)[:, 1], atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(result.total, parts["global"] + parts["fine"])
    weighted = make_reward("hummingbird", global_weight=0.5, fine_weight=-2.0, **options("hummingbird", folders))
    expected = 0.5 * parts["global"] - 2 * parts["fine"]
    torch.testing.assert_close(score(weighted, levels, PROMPTS).total, expected, rtol=1e-4, atol=1e-4)


def test_the_best_query_is_at_least_as_near_as_the_queries_mean(folders, images):
    from visalign.rewards.embedding.hummingbird import global_likeness

    reward = make_reward("hummingbird", **options("hummingbird", folders))
    model = reward._frozen.model
    vision = model.vision_model(pixel_values=reward.preprocess(images)).last_hidden_state
    ids = torch.tensor([token_ids("a red star")] * 4)
    best = global_likeness(model, vision, ids, torch.ones_like(ids))
    queries = model.qformer(model.query_tokens.expand(4, -1, -1), encoder_hidden_states=vision).last_hidden_state
    text = model.qformer(model.embeddings(input_ids=ids), query_length=0).last_hidden_state[:, 0]
    unit = F.normalize(model.vision_projection(queries), dim=-1).mean(dim=1)
    mean = (unit * F.normalize(model.text_projection(text), dim=-1)).sum(dim=-1)
    assert (best > mean).all() and (best.abs() <= 1).all()


def test_hummingbird_reads_descriptions_where_told(folders, images):
    told = make_reward("hummingbird", text="descriptions", **options("hummingbird", folders))
    assert told.needs == ("descriptions",)
    by_prompt = score(make_reward("hummingbird", **options("hummingbird", folders)), images, PROMPTS).total
    by_text = score(told, images, ["x"] * 4, {"descriptions": PROMPTS}).total
    torch.testing.assert_close(by_text, by_prompt)
    with pytest.raises(ValueError, match="descriptions"):
        score(told, images, PROMPTS)
    with pytest.raises(ValueError, match="text: got 'captions', expected one of"):
        make_reward("hummingbird", text="captions", **options("hummingbird", folders))
