import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import EMBEDDING, save_tiny_clip

from visalign.images import images_to_pil
from visalign.rewards import (
    CombinedReward,
    Member,
    Reward,
    RewardError,
    as_reward,
    make_reward,
    parse_spec,
    register_reward,
    reward_names,
    score,
)
from visalign.rewards.embedding.aesthetic import LAYERS
from visalign.rewards.embedding.encoder import SHIPPED, preprocess
from visalign.worlds.shapes.captions import caption
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import place, sample_spec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def head_file(tmp_path_factory) -> Path:
    """A random aesthetic head in the published key layout, for the tiny CLIP."""
    generator = torch.Generator().manual_seed(0)
    widths = [EMBEDDING, 32, 16, 8, 4, 1]
    state = {}
    for k, wide, narrow in zip(LAYERS, widths, widths[1:]):
        state[f"layers.{k}.weight"] = torch.randn(narrow, wide, generator=generator) / wide**0.5
        state[f"layers.{k}.bias"] = torch.randn(narrow, generator=generator)
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def scenes() -> tuple[torch.Tensor, list[str]]:
    """Twelve drawn scenes with their captions."""
    rng = np.random.default_rng(0)
    specs = [sample_spec(rng) for _ in range(12)]
    return draw([place(s, rng) for s in specs]), [caption(s, rng) for s in specs]


@pytest.fixture(
    params=["gold", "gold_strict", "clip", "clip_match", "jpeg_compressibility", "jpeg_incompressibility", "aesthetic"]
)
def any_reward(request, clip_folder, head_file) -> Reward:
    if request.param == "gold_strict":
        return make_reward("gold", strict=True)
    if request.param == "clip":
        return make_reward("clip", model=str(clip_folder))
    if request.param == "clip_match":
        return make_reward("clip_match", model=str(clip_folder), scale=10.0, midpoint=0.0)
    if request.param == "aesthetic":
        return make_reward("aesthetic", weights=str(head_file), model=str(clip_folder), pretrained=None)
    return make_reward(request.param)


# Every reward of the registry


def test_a_batch_scores_as_its_images_do_one_by_one(any_reward, scenes):
    images, prompts = scenes
    batch = score(any_reward, images, prompts).total
    singles = torch.cat([score(any_reward, images[n : n + 1], prompts[n : n + 1]).total for n in range(len(images))])
    assert batch.shape == (12,) and batch.dtype == torch.float32
    torch.testing.assert_close(batch, singles, rtol=1e-6, atol=1e-6)


def test_a_score_does_not_depend_on_the_order_of_the_batch(any_reward, scenes):
    images, prompts = scenes
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mixed = score(any_reward, images[order], [prompts[n] for n in order]).total
    torch.testing.assert_close(mixed, score(any_reward, images, prompts).total[order], rtol=1e-6, atol=1e-6)


def test_scores_lie_in_the_declared_range_and_attributes_are_complete(any_reward, scenes):
    scores = score(any_reward, *scenes).total
    low, high = any_reward.range
    assert isinstance(any_reward, Reward) and any_reward.kind == "pointwise" and any_reward.name in reward_names()
    assert (scores >= low - 1e-6).all() and (scores <= high + 1e-6).all()


def test_gradients_reach_the_images_exactly_where_a_reward_says_so(any_reward, scenes):
    images = scenes[0].clone().requires_grad_()
    scores = any_reward(images, scenes[1])
    assert scores.requires_grad == any_reward.differentiable
    if any_reward.differentiable:
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_score_neither_tracks_gradients_nor_changes_its_images(any_reward, scenes):
    images = scenes[0].clone().requires_grad_()
    assert not score(any_reward, images, scenes[1]).total.requires_grad
    assert torch.equal(images.detach(), scenes[0])


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda x: (x * 255).to(torch.uint8), "images: got torch.uint8"),
        (lambda x: x[:, :1], "greyscale"),
        (lambda x: torch.cat([x, x[:, :1]], dim=1), "RGBA"),
        (lambda x: torch.where(torch.arange(12).view(-1, 1, 1, 1) == 7, torch.nan, x), "got values from nan.*sample 7"),
        (lambda x: x * 2 - 1, "expected within \\[0, 1\\]"),
        (lambda x: x[:11], "prompts: got 12, expected 11"),
    ],
)
def test_unusable_images_are_a_clear_error(any_reward, scenes, spoil, says):
    with pytest.raises(ValueError, match=says):
        score(any_reward, spoil(scenes[0]), scenes[1])


def test_prompts_must_be_a_list_of_strings(scenes):
    reward = make_reward("jpeg_compressibility")
    with pytest.raises(ValueError, match="got one string"):
        score(reward, scenes[0], "a red circle")
    with pytest.raises(ValueError, match="other things than strings"):
        score(reward, scenes[0], [None] * 12)


# gold


def test_gold_gives_drawn_scenes_full_marks_and_blank_ones_none(scenes):
    images, prompts = scenes
    assert score(make_reward("gold"), images, prompts).total.tolist() == [1.0] * 12
    assert score(make_reward("gold", strict=True), images * 0 + 0.5, prompts).total.tolist() == [0.0] * 12


def test_gold_counts_criteria_unless_strict():
    rng = np.random.default_rng(0)
    spec = next(s for s in iter(lambda: sample_spec(rng), None) if len(s.groups) == 1 and s.groups[0][2] == 1)
    image, prompt = draw([place(spec, rng)]), caption(spec).replace("a ", "two ").replace("an ", "two ")
    partial = score(make_reward("gold"), image, [prompt]).total.item()
    assert partial == pytest.approx(2 / 3)  # the object and its colour are there, the number is wrong
    assert score(make_reward("gold", strict=True), image, [prompt]).total.item() == 0


def test_gold_refuses_prompts_and_sizes_of_another_world(scenes):
    images, prompts = scenes
    with pytest.raises(RewardError, match="reward 'gold', sample 3: prompt: got 'a cat'") as error:
        score(make_reward("gold"), images, [*prompts[:3], "a cat", *prompts[4:]])
    assert error.value.sample == 3 and "\n" not in str(error.value)
    with pytest.raises(RewardError, match="got images of 32x64 pixels, expected 64x64"):
        score(make_reward("gold"), images[:, :, :32], prompts)


# jpeg


def test_jpeg_rewards_are_the_file_size_in_thousands_of_bytes(scenes):
    images, prompts = scenes
    sizes = []
    for picture in images_to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    expected = torch.tensor(sizes) / 1000
    torch.testing.assert_close(score(make_reward("jpeg_incompressibility"), images, prompts).total, expected)
    torch.testing.assert_close(score(make_reward("jpeg_compressibility"), images, prompts).total, -expected)
    in_flow_grpo_units = score(make_reward("jpeg_compressibility", unit_kb=500), images, prompts).total
    torch.testing.assert_close(in_flow_grpo_units, -expected / 500)


def test_blur_compresses_and_noise_does_not():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = [noise, F.avg_pool2d(noise, 3, 1, 1), F.avg_pool2d(noise, 7, 1, 3), torch.full_like(noise, 0.5)]
    scores = score(make_reward("jpeg_compressibility"), torch.cat(blurred), [""] * 4).total
    assert (scores.diff() > 0).all()


# clip


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (97, 50), (20, 33), (32, 32)])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_tensor_preprocessing_equals_open_clips_on_pictures(size, resize):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    coarse = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size, mode="bilinear")
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    transform = image_transform_v2(PreprocessCfg(size=32, mean=mean, std=std, resize_mode=resize), is_train=False)
    theirs = torch.stack([transform(picture) for picture in images_to_pil(images)])
    ours = preprocess(images, 32, mean, std, "bicubic", resize)
    # PIL rounds to uint8 before, between and after its two passes: up to 1.5 levels, over a std of 0.26.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.6 / 255 / 0.26)
    assert (ours - theirs).abs().mean() < 0.5 / 255 / 0.26


@pytest.mark.parametrize("scale", ["cosine", "percent", "hessel", "logit"])
def test_clip_is_the_scaled_cosine_of_open_clips_own_features(clip_folder, scenes, scale):
    import open_clip

    images, prompts = scenes
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.no_grad():
        pictures = torch.stack([transform(picture) for picture in images_to_pil(images)])
        seen, said = model.eval().encode_image(pictures), model.encode_text(tokenize(prompts))
        cosine = F.cosine_similarity(seen, said)
        logit = float(model.logit_scale.exp())
    expected = {
        "cosine": cosine,
        "percent": 100 * cosine.clamp(min=0),
        "hessel": 2.5 * cosine.clamp(min=0),
        "logit": logit * cosine,
    }[scale]
    reward = make_reward("clip", model=f"local-dir:{clip_folder}", scale=scale)
    torch.testing.assert_close(score(reward, images, prompts).total, expected, rtol=0, atol=5e-3 * reward.range[1])


def test_clip_ranks_prompts_differently_and_takes_long_ones(clip_folder, scenes):
    reward = make_reward("clip", model=str(clip_folder))
    picture = scenes[0][:1].expand(3, -1, -1, -1)
    scores = score(reward, picture, ["a red circle", "two blue stars", "a red circle " * 200]).total
    assert len(set(scores.tolist())) == 3


def test_each_distinct_prompt_is_encoded_once(clip_folder, scenes):
    reward = make_reward("clip", model=str(clip_folder))
    seen: list[int] = []
    encode = reward.encoder.model.encode_text
    reward.encoder.model.encode_text = lambda ids: seen.append(len(ids)) or encode(ids)
    prompts = ["a red circle", "a blue star"] * 6
    first = score(reward, scenes[0], prompts).total
    assert torch.equal(score(reward, scenes[0], prompts).total, first) and seen == [2]


def test_prompts_remembered_in_inference_mode_still_allow_gradients(clip_folder, scenes):
    reward = make_reward("clip", model=str(clip_folder))
    with torch.inference_mode():
        reward(scenes[0], scenes[1])
    images = scenes[0].clone().requires_grad_()
    reward(images, scenes[1]).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_following_the_gradient_of_clip_raises_its_score(clip_folder, scenes):
    reward = make_reward("clip", model=str(clip_folder))
    images = scenes[0].clone().requires_grad_()
    before = reward(images, scenes[1])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    moved = (images + 0.002 * gradient.sign()).clamp(0, 1).detach()
    assert (reward(moved, scenes[1]) > before.detach()).all()


def test_clip_in_half_precision_stays_close(clip_folder, scenes):
    full, half = (make_reward("clip", model=str(clip_folder), dtype=d) for d in ("float32", "bfloat16"))
    scores = score(half, *scenes).total
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, score(full, *scenes).total, rtol=0, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_clip_follows_its_images_to_the_gpu_and_back(clip_folder, scenes):
    reward, (images, prompts) = make_reward("clip", model=str(clip_folder)), scenes
    before = score(reward, images, prompts).total
    assert reward(images.cuda(), prompts).is_cuda
    torch.testing.assert_close(score(reward, images.cuda(), prompts).total, before, rtol=0, atol=1e-3)
    torch.testing.assert_close(score(reward, images, prompts).total, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model": "./nowhere"}, "which is no folder"),
        ({"model": "local-dir:nowhere"}, "which is no folder"),
        ({"model": "ViT-B-32"}, "pretrained: got None"),
        ({"model": "."}, "expected an open_clip_config.json"),
        ({"dtype": "float33"}, "did you mean 'float32'"),
        ({"scale": "cosin"}, "did you mean 'cosine'"),
        ({"modell": "x"}, "did you mean 'model'"),
    ],
)
def test_clip_options_are_checked_before_anything_loads(options, says):
    with pytest.raises(ValueError, match=says):
        parse_spec("clip", **options)


def test_clip_match_is_the_calibrated_sigmoid_of_the_cosine(clip_folder, tmp_path, scenes):
    images, prompts = scenes
    cosine = make_reward("clip", model=str(clip_folder))(images, prompts)
    with pytest.raises(ValueError, match="^scale: got None for model .*, which brings none"):
        parse_spec("clip_match", model=str(clip_folder))
    given = make_reward("clip_match", model=str(clip_folder), scale=20.0, midpoint=0.1)
    torch.testing.assert_close(given(images, prompts), 1 / (1 + (-20 * (cosine - 0.1)).exp()))
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "visalign.json").write_text('{"match": {"scale": 7.0, "midpoint": -0.2}}')
    stored = make_reward("clip_match", model=str(tmp_path / "clip"), midpoint=0.3)  # an option wins over the folder
    torch.testing.assert_close(stored(images, prompts), 1 / (1 + (-7 * (cosine - 0.3)).exp()))
    with pytest.raises(ValueError, match="^scale: got -1.0, expected a finite number above 0"):
        parse_spec("clip_match", scale=-1.0)


def test_clip_never_falls_back_to_random_weights_or_a_download(clip_folder, tmp_path, monkeypatch):
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="expected weights"):
        make_reward("clip", model=str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="could not load"):
        make_reward("clip", model=str(tmp_path))
    monkeypatch.setattr("visalign.rewards.embedding.encoder._cached", lambda repo, names: None)
    with pytest.raises(ValueError, match="not in the local cache; pass download=True"):
        make_reward("clip", model="ViT-B-32", pretrained="laion2b_s34b_b79k")
    with pytest.raises(ValueError, match="did you mean 'laion2b_s34b_b79k'"):
        make_reward("clip", model="ViT-B-32", pretrained="laion2b_s34b_b79")
    with pytest.raises(ValueError, match="did you mean 'ViT-B-32'"):
        make_reward("clip", model="ViT-B-3", pretrained="openai")


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the world's CLIP has not been built")
def test_the_shipped_clip_prefers_a_scenes_own_caption(scenes):
    images, prompts = scenes
    reward = make_reward("clip")
    own = score(reward, images, prompts).total
    others = score(reward, images, prompts[1:] + prompts[:1]).total
    assert (own > others).float().mean() >= 0.9


# aesthetic


def test_aesthetic_is_the_head_on_normalised_clip_features(clip_folder, head_file, scenes):
    images, _ = scenes
    reward = make_reward("aesthetic", weights=str(head_file), model=str(clip_folder), pretrained=None)
    state = {k: v.double() for k, v in torch.load(head_file, weights_only=True).items()}
    weight, bias = torch.eye(EMBEDDING).double(), torch.zeros(EMBEDDING).double()
    for k in LAYERS:  # no activations, so the head is one affine map
        weight, bias = (
            state[f"layers.{k}.weight"] @ weight,
            state[f"layers.{k}.weight"] @ bias + state[f"layers.{k}.bias"],
        )
    with torch.no_grad():
        encoder = reward.encoder
        features = encoder.model.encode_image(preprocess(images, *encoder._preprocess))
    features = (features / features.norm(dim=-1, keepdim=True)).double()
    expected = (features @ weight.T + bias).squeeze(-1).float()
    torch.testing.assert_close(score(reward, images, [""] * 12).total, expected, rtol=1e-4, atol=1e-4)


def test_the_aesthetic_head_may_be_safetensors(clip_folder, head_file, scenes, tmp_path):
    save_file(torch.load(head_file, weights_only=True), str(tmp_path / "head.safetensors"))
    options = {"model": str(clip_folder), "pretrained": None}
    one = make_reward("aesthetic", weights=str(head_file), **options)
    two = make_reward("aesthetic", weights=str(tmp_path / "head.safetensors"), **options)
    assert torch.equal(score(one, *scenes).total, score(two, *scenes).total)


def test_a_missing_aesthetic_head_says_which_file_to_get_and_where_to_put_it():
    with pytest.raises(ValueError, match=r"sac\+logos\+ava1-l14-linearMSE.pth.*get it from https://.*put it there"):
        parse_spec("aesthetic", weights="nowhere.pth")


def test_foreign_aesthetic_heads_are_refused(clip_folder, head_file, tmp_path):
    options = {"model": str(clip_folder), "pretrained": None, "weights": str(tmp_path / "head.pth")}
    state = torch.load(head_file, weights_only=True)
    wide = state | {"layers.0.weight": torch.zeros(32, EMBEDDING + 1)}
    broken = state | {"layers.4.weight": torch.zeros(8, 99)}
    extra = state | {"layers.9.weight": torch.zeros(1)}
    for bad, says in [(wide, f"head for {EMBEDDING + 1} features"), (broken, "layers.4"), (extra, "layers.9.weight")]:
        torch.save(bad, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=says):
            make_reward("aesthetic", **options)
    (tmp_path / "head.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="could not read"):
        make_reward("aesthetic", **options)


# Specs


def test_a_weighted_spec_is_the_weighted_sum_and_reports_raw_parts(clip_folder, scenes):
    combined = make_reward(
        [{"name": "clip", "weight": 0.7, "model": str(clip_folder)}, "jpeg_compressibility:0.3+gold:0"]
    )
    result = score(combined, *scenes)
    assert list(result.parts) == ["clip", "jpeg_compressibility", "gold"]
    torch.testing.assert_close(result.parts["jpeg_compressibility"], make_reward("jpeg_compressibility")(*scenes))
    assert result.parts["gold"].eq(1).all()  # weight 0: reported, not used
    torch.testing.assert_close(result.total, 0.7 * result.parts["clip"] + 0.3 * result.parts["jpeg_compressibility"])
    torch.testing.assert_close(combined(*scenes).detach(), result.total)
    assert combined.needs == ("prompts",) and not combined.differentiable
    assert combined.range == (-float("inf"), pytest.approx(0.7))


def test_a_sum_of_differentiable_rewards_has_the_sum_of_their_gradients(clip_folder, scenes):
    clip = make_reward("clip", model=str(clip_folder))
    bright = as_reward(lambda images: images.mean(dim=(1, 2, 3)), "bright")
    bright.differentiable = True
    combined = CombinedReward([Member("clip", 2.0, clip), Member("bright", -1.0, bright)])
    images = scenes[0].clone().requires_grad_()
    (both,) = torch.autograd.grad(combined(images, scenes[1]).sum(), images)
    (one,) = torch.autograd.grad(clip(images, scenes[1]).sum(), images)
    assert combined.differentiable
    torch.testing.assert_close(both, 2 * one - 1 / images[0].numel(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "spec, says",
    [
        ("clop", "did you mean 'clip'"),
        ("gold:0.5+jpeg_compresibility:0.5", "did you mean 'jpeg_compressibility'"),
        ("gold:o.5", "expected 'gold:WEIGHT' with a number"),
        ("gold:nan", "weight: got nan"),
        ({"name": "gold", "weight": "0.5"}, "weight: got '0.5'"),
        ({"name": "gold", "weigth": 0.5}, "option of reward 'gold': got 'weigth'"),
        ({"weight": 0.5}, "a mapping with 'name'"),
        ("gold+", "spec: got ''"),
        ([], "empty list"),
        ("nowhere.py:f", "no file 'nowhere.py'"),
        ("my_reward.py", "expected 'path/to/file.py:attribute'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("json:dumpz", "did you mean 'dump"),
    ],
)
def test_a_bad_spec_is_one_clear_line(spec, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_spec(spec)
    assert "\n" not in str(error.value)


def test_parsing_runs_no_user_code_and_loads_no_reward_library(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\ndef sharp(images): return images.mean((1, 2, 3))\n")
    code = (
        "import sys; from visalign.rewards import parse_spec; "
        f"parse_spec('{tmp_path}/mine.py:sharp+gold+jpeg_compressibility'); "
        "sys.exit(bool({'open_clip', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_options_of_a_sum_are_refused_and_a_reward_twice_gets_two_labels():
    with pytest.raises(ValueError, match="give options by mapping"):
        parse_spec("gold+jpeg_compressibility", strict=True)
    labels = [term.label for term in parse_spec(["gold", {"name": "gold", "strict": True}])]
    assert labels == ["gold", "gold_2"]


def test_registering_a_name_makes_it_known_and_twice_is_an_error(monkeypatch):
    monkeypatch.setattr("visalign.rewards.base._REWARDS", {})

    @register_reward("test_only_contrast")
    class Contrast:
        def __init__(self, gain=1.0):
            self.gain = gain

        def __call__(self, images, prompts):
            return self.gain * images.flatten(1).std(dim=1)

    images = torch.rand(2, 3, 8, 8)
    one, two = (score(make_reward("test_only_contrast", gain=g), images, ["", ""]).total for g in (1.0, 2.0))
    torch.testing.assert_close(two, 2 * one)
    with pytest.raises(ValueError, match="already registered"):
        register_reward("test_only_contrast")(Contrast)


# A user's own


def test_the_documented_examples_work(tmp_path, scenes):
    page = (ROOT / "docs" / "custom_rewards.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        name = re.match(r"# (\w+\.py)", block)
        assert name is not None
        (tmp_path / name[1]).write_text(block if "import torch" in block else "import torch\n" + block)
    images, prompts = scenes
    brightness = make_reward(f"{tmp_path}/my_reward.py:brightness")
    assert brightness.differentiable and brightness.range == (0.0, 1.0) and brightness.needs == ()
    torch.testing.assert_close(score(brightness, images, prompts).total, images.mean(dim=(1, 2, 3)))
    contrast = make_reward(f"{tmp_path}/my_models.py:Contrast", gain=2.0)
    torch.testing.assert_close(score(contrast, images, prompts).total, 2 * images.flatten(1).std(dim=1))
    brightest, light = make_reward(f"{tmp_path}/my_ranks.py:Brightest"), images.flatten(1).mean(1)
    assert brightest.kind == "groupwise"
    ranks = score(brightest, images, prompts).total  # without group ids all are one group
    torch.testing.assert_close(ranks[light.argsort()], torch.linspace(0, 1, len(images)))
    both = score(make_reward(f"gold:0.5+{tmp_path}/my_reward.py:brightness:-1"), images, prompts)
    torch.testing.assert_close(both.total, 0.5 - both.parts["brightness"])


def test_a_function_gets_what_it_asks_for_by_name():
    images, prompts, context = torch.rand(2, 3, 4, 4), ["a", "bb"], {"bonus": [1.0, 2.0]}
    zero = images.mean(dim=(1, 2, 3)) * 0

    def only_images(images):
        return zero + 1

    def with_prompts(images, prompts):
        return [len(p) for p in prompts]

    def with_context(images, context):
        return torch.tensor(context["bonus"])

    def with_all(images, prompts, context, extra=1.0):
        return zero + len(context) + len(prompts) + extra

    expected = {only_images: [1.0, 1.0], with_prompts: [1.0, 2.0], with_context: [1.0, 2.0], with_all: [4.0, 4.0]}
    for function, scores in expected.items():
        assert score(function, images, prompts, context).total.tolist() == scores
    for bad in (lambda: zero, lambda images, captions: zero, lambda pixels: zero):
        with pytest.raises(ValueError, match="expected \\(images\\)"):
            as_reward(bad)


def test_what_a_reward_needs_must_be_in_the_context():
    def similar(images, context):
        return images.mean(dim=(1, 2, 3))

    similar.needs = ("references",)
    with pytest.raises(RewardError, match="reward 'similar': got a context without 'references'"):
        score(similar, torch.rand(2, 3, 4, 4), ["a", "b"])
    assert len(score(similar, torch.rand(2, 3, 4, 4), ["a", "b"], {"references": [[], []]}).total) == 2


@pytest.mark.parametrize(
    "source, options, says",
    [
        ("def f(pixels): return 0", {}, "first argument is called 'images'"),
        ("def f(images): return 0", {"gain": 1}, "expected none for a function of images"),
        (
            "class f:\n    def __init__(self, gain=1): pass\n    def __call__(self, images): return 0",
            {"gian": 1},
            "'gain'",
        ),
        (
            "class f:\n    def __init__(self, path): pass\n    def __call__(self, images): return 0",
            {},
            "missing.*'path'",
        ),
        ("f = 3", {}, "which is a int"),
        ("import nowhere_to_be_found\ndef f(images): return 0", {}, "could not import.*nowhere_to_be_found"),
        ("def f(images) return 0", {}, "not valid Python"),
        ("def g(images): return 0", {}, "attribute of .*: got 'f', expected one of \\['g'\\]"),
    ],
)
def test_a_users_file_that_cannot_work_says_why(tmp_path, source, options, says):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=says):
        make_reward(f"{tmp_path}/mine.py:f", **options)


# Bad rewards


def bad_sample_raises(images, prompts):
    if any("bad" in p for p in prompts):
        raise KeyError("no such\nthing")
    return images.mean(dim=(1, 2, 3))


def batch_raises(images):
    if len(images) > 1:
        raise MemoryError("too large")
    return images.mean(dim=(1, 2, 3))


def nan_score(images, prompts):
    return torch.tensor([float("nan") if "bad" in p else 1.0 for p in prompts])


def inf_score(images, prompts):
    return [float("inf") if "bad" in p else 1.0 for p in prompts]


@pytest.mark.parametrize(
    "reward, sample, says",
    [
        (bad_sample_raises, 2, "raised KeyError"),
        (nan_score, 2, "got nan \\(1 of 4 scores not finite\\)"),
        (inf_score, 2, "got inf"),
        (batch_raises, None, "raised MemoryError: too large \\(on the batch of 4"),
        (lambda images: images.mean(), None, "shape \\(\\) for 4 images, expected \\(4,\\)"),
        (lambda images: images.mean(dim=(2, 3)), None, "shape \\(4, 3\\) for 4 images"),
        (lambda images: images.mean(dim=(1, 2, 3))[:3], None, "shape \\(3,\\) for 4 images"),
        (lambda images: images.mean(dim=(1, 2, 3), keepdim=True)[..., 0, 0], None, "shape \\(4, 1\\)"),
        (lambda images: None, None, "got NoneType, expected a tensor \\(4,\\)"),
        (lambda images: ["a"] * 4, None, "got list, expected a tensor"),
        (lambda images: images.mean(dim=(1, 2, 3)) * 1j, None, "complex"),
    ],
)
def test_a_bad_reward_is_named_with_its_prompt_and_sample(reward, sample, says):
    images, prompts = torch.rand(4, 3, 8, 8), ["first", "second", "the bad one", "last"]
    combined = CombinedReward([Member("fine", 1.0, as_reward(lambda images: images.mean(dim=(1, 2, 3)), "fine"))])
    combined = CombinedReward([*combined.members, Member("culprit", 0.5, as_reward(reward, "culprit"))])
    with pytest.raises(RewardError, match=says) as error:
        score(combined, images, prompts)
    assert error.value.reward == "culprit" and error.value.sample == sample
    assert error.value.prompt == prompts[sample or 0] and repr(prompts[sample or 0]) in str(error.value)
    assert "\n" not in str(error.value)


def test_scores_too_large_for_float32_are_not_finite():
    with pytest.raises(RewardError, match="got inf"):
        score(lambda images: torch.full((2,), 1e300, dtype=torch.float64), torch.rand(2, 3, 8, 8), ["a", "b"])


def test_an_interrupt_is_not_taken_for_a_failed_reward():
    def interrupted(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, torch.rand(2, 3, 8, 8), ["a", "b"])


def test_png_pictures_score_as_their_tensors(tmp_path, scenes):
    from visalign.images import pil_to_images

    images_to_pil(scenes[0][:1])[0].save(tmp_path / "scene.png")
    with Image.open(tmp_path / "scene.png") as picture:
        loaded = pil_to_images([picture.convert("RGB")])
    assert score(make_reward("gold"), loaded, scenes[1][:1]).total.item() == 1.0
