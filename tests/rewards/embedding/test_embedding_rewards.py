"""PickScore, HPS, likeness to references, goal-baseline and lambda-harmonic rewards, on tiny checkpoints."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny_hf
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_clip import save_tiny_clip

from visalign.images import images_to_pil
from visalign.rewards import RewardError, make_reward, score
from visalign.rewards.embedding.frozen import ReferenceEmbeddings, content_key
from visalign.rewards.embedding.hf_clip import HfEncoder, is_hf
from visalign.rewards.embedding.lambda_harmonic import lambda_harmonic
from visalign.rewards.embedding.preprocessing import CLIP, HALF, IMAGENET, from_processor
from visalign.rewards.embedding.similarity import off_diagonal_mean, split_panels
from visalign.rewards.embedding.vlm_rm import goal_baseline

PROMPTS = ["a red circle", "two blue squares", "a photo of a very green star", "a left star"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of each kind; "hps" is the very CLIP of "clip" in HPS's file."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_hf.save_hf_clip(root / "clip")
    tiny_hf.save_align(root / "align")
    tiny_hf.save_dino(root / "dino")
    save_tiny_clip(root / "open_clip")
    (root / "tiny-hps.json").write_text(json.dumps(tiny_hf.HPS_CONFIG))
    open_clip.add_model_config(root / "tiny-hps.json")
    state = tiny_hf.hf_to_open_clip(model.state_dict())
    torch.save({"epoch": 1, "name": "ViT-H-14", "state_dict": state}, root / "hps.pt")
    names = ("clip", "align", "dino", "open_clip")
    return {name: root / name for name in names} | {"hps": root / "hps.pt"}


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Four smooth, different pictures, 45 wide and 32 high: no resizing, but a crop of odd offset."""
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(4, 3, 4, 6, generator=generator), (32, 45), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="session")
def references(images) -> list[list[torch.Tensor]]:
    """One, two, three and one reference, of other sizes than the images."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.rand(3, 32 + 8 * k, 40, generator=generator) for k in range(n)] for n in (1, 2, 3, 1)]


REWARDS = {
    "pickscore": lambda f: {"model": str(f["clip"]), "processor": str(f["clip"])},
    "hpsv2": lambda f: {"weights": str(f["hps"]), "model": "tiny-hps"},
    "hpsv21": lambda f: {"weights": str(f["hps"]), "model": "tiny-hps"},
    "clip": lambda f: {"model": str(f["clip"])},
    "clip_i": lambda f: {"model": str(f["clip"])},
    "dino": lambda f: {"model": str(f["dino"])},
    "set_consistency": lambda f: {"model": str(f["clip"]), "pretrained": None},
    "vlm_rm": lambda f: {"baseline": "a photo", "goal": ["a red star", "a star"], "model": str(f["clip"])},
    "lambda_harmonic": lambda f: {"model": str(f["align"])},
}


@pytest.fixture(params=REWARDS)
def any_reward(request, folders):
    return make_reward(request.param, **REWARDS[request.param](folders))


# Every reward


def test_a_batch_scores_as_singles_in_any_order_within_the_range(any_reward, images, references):
    result = score(any_reward, images, PROMPTS, {"references": references}).total
    low, high = any_reward.range
    assert result.shape == (4,) and result.dtype == torch.float32
    assert (result >= low).all() and (result <= high).all() and result.std() > 1e-4
    for n in (3, 1, 0, 2):
        one = score(any_reward, images[n : n + 1], PROMPTS[n : n + 1], {"references": references[n : n + 1]}).total
        torch.testing.assert_close(one, result[n : n + 1], rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_images(any_reward, images, references):
    pixels = images.clone().requires_grad_()
    result = any_reward(pixels, PROMPTS, {"references": references})
    (gradient,) = torch.autograd.grad(getattr(result, "scores", result).sum(), pixels)
    assert gradient.isfinite().all() and (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_unusable_images_are_a_clear_error(any_reward, images, references):
    context = {"references": references}
    with pytest.raises(ValueError, match="images: got torch.uint8"):
        any_reward((images * 255).to(torch.uint8), PROMPTS, context)
    with pytest.raises(ValueError, match="expected within"):
        score(any_reward, images * 2 - 1, PROMPTS, context)


def test_a_prompt_longer_than_the_context_is_cut_off(any_reward, images, references):
    if "prompts" in any_reward.needs:
        long = ["a red circle " * 100, "a red circle " * 200]
        context = {"references": references[:1] * 2}
        one, other = score(any_reward, images[:1].repeat(2, 1, 1, 1), long, context).total
        assert one == other


# Preprocessing


@pytest.mark.parametrize("size", [(31, 33), (48, 32), (57, 40), (100, 64), (24, 24)])
@pytest.mark.parametrize("kind", ["clip", "align", "dino"])
def test_pictures_are_prepared_as_the_checkpoint_s_own_processor_does(folders, kind, size):
    from transformers import AutoImageProcessor

    generator = torch.Generator().manual_seed(2)
    smooth = F.interpolate(torch.rand(2, 3, 5, 5, generator=generator), size, mode="bilinear")
    processor = AutoImageProcessor.from_pretrained(folders[kind])
    rules = from_processor(processor.to_dict())
    expected = processor(images_to_pil(smooth), return_tensors="pt")["pixel_values"]
    got = rules(smooth)
    assert got.shape == expected.shape
    unit = torch.tensor(rules.std).view(3, 1, 1)
    # A crop one pixel off would differ by 10 times as much on the odd sizes.
    assert ((got - expected) * unit).abs().mean() < 2 / 255


def test_the_centre_is_cut_out_by_transformers_rule_or_torchvision_s():
    from torchvision.transforms.functional import center_crop

    ramp = torch.arange(37.0).div(36).expand(1, 3, 32, 37)
    rules = CLIP.__class__(32, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(rules(ramp), ramp[..., 2:34])  # (37 - 32) // 2
    near = CLIP.__class__(32, (0.0,) * 3, (1.0,) * 3, round_down=False)
    torch.testing.assert_close(near(ramp), center_crop(ramp, [32, 32]))
    wide = torch.arange(39.0).div(38).expand(1, 3, 32, 39)
    torch.testing.assert_close(rules(wide), wide[..., 3:35])
    torch.testing.assert_close(near(wide), wide[..., 4:36])


def test_a_crop_may_be_smaller_than_what_it_is_cut_from():
    settings = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3}
    rules = from_processor(settings)
    image = torch.rand(1, 3, 256, 300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rules(image), (image[..., 16:240, 38:262] - 0.5) / 0.5)


def test_constants_are_the_published_ones():
    assert CLIP.mean == (0.48145466, 0.4578275, 0.40821073) and CLIP.std == (0.26862954, 0.26130258, 0.27577711)
    assert IMAGENET.mean == (0.485, 0.456, 0.406) and IMAGENET.std == (0.229, 0.224, 0.225)
    assert (HALF.mean, HALF.std, CLIP.size, IMAGENET.size) == ((0.5,) * 3, (0.5,) * 3, 224, 224)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"do_resize": False}, "do_resize: got False"),
        ({"resample": 1}, "resample: got 1"),
        ({"do_center_crop": False}, "do_center_crop: got False"),
        ({"crop_size": {"height": 300, "width": 300}}, "crop_size: got 300, expected at most the size, 224"),
        ({"size": {"height": 224, "width": 200}}, "size: got .*expected a square"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_an_error(change, says):
    settings = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3}
    with pytest.raises(ValueError, match=says):
        from_processor(settings | change)


def test_without_image_settings_the_published_constants_hold_at_the_model_s_size(folders, tmp_path):
    for file in folders["clip"].iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)
    rules = HfEncoder(str(tmp_path)).preprocess
    assert (rules.size, rules.mean, rules.std) == (tiny_hf.SIDE, CLIP.mean, CLIP.std)


# PickScore and HPS


def clip_directly(folder: Path, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, float]:
    """Cosines by CLIPModel.forward and its own processors, and the logit scale."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(folder)(images_to_pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    image, text = out.image_embeds.numpy(), out.text_embeds.numpy()
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    return torch.from_numpy((image * text).sum(axis=1) / norms), float(np.exp(model.logit_scale.item()))


def test_pickscore_is_the_scaled_cosine_of_the_checkpoint(folders, images):
    options = {"model": str(folders["clip"]), "processor": str(folders["clip"])}
    got = score(make_reward("pickscore", **options), images, PROMPTS).total
    cosine, scale = clip_directly(folders["clip"], images, PROMPTS)
    assert 5 < scale < 20
    torch.testing.assert_close(got, scale * cosine, rtol=0, atol=0.05)  # the processor rounds pixels to 8 bits
    assert (got.abs() / scale <= 1).all()
    divided = score(make_reward("pickscore", normalise="div26", **options), images, PROMPTS).total
    torch.testing.assert_close(divided, got / 26)


def test_two_equal_pictures_are_picked_with_probability_one_half(folders, images):
    reward = make_reward("pickscore", model=str(folders["clip"]), processor=str(folders["clip"]))
    pair = score(reward, images[:1].repeat(2, 1, 1, 1), PROMPTS[:1] * 2).total
    torch.testing.assert_close(pair.softmax(dim=0), torch.tensor([0.5, 0.5]))


def test_hps_is_pickscore_without_the_logit_scale_on_shared_weights(folders, images, tmp_path):
    for file in folders["clip"].iterdir():  # HPS's model has CLIP's own mean and std
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)
    pick = make_reward("pickscore", model=str(tmp_path), processor=str(tmp_path))
    square = images[..., :32]  # on odd sizes the two crop a pixel apart
    hps = score(make_reward("hpsv21", weights=str(folders["hps"]), model="tiny-hps"), square, PROMPTS).total
    factor = math.exp(load_file(folders["clip"] / "model.safetensors")["logit_scale"].item())
    torch.testing.assert_close(score(pick, square, PROMPTS).total, factor * hps, rtol=1e-4, atol=1e-4)


def test_both_marks_of_a_text_s_end_give_the_same_embedding(folders, tmp_path):
    """Old checkpoints say 2 and mean the largest id, new ones say 49407."""
    tiny_hf.save_hf_clip(tmp_path, eos=2)
    old, new = HfEncoder(str(tmp_path)).embed_texts(PROMPTS), HfEncoder(str(folders["clip"])).embed_texts(PROMPTS)
    torch.testing.assert_close(old, new)


def test_hps_weights_must_be_complete_and_of_the_architecture_s_shape(folders, tmp_path):
    state = torch.load(folders["hps"], weights_only=True)["state_dict"]
    for name, spoilt, says in [
        ("missing", {k: v for k, v in state.items() if k != "text_projection"}, "text_projection"),
        ("extra", state | {"rm_head.weight": torch.zeros(1)}, "rm_head.weight"),
        ("shape", state | {"visual.proj": torch.zeros(3, 3)}, "visual.proj"),
    ]:
        torch.save({"state_dict": spoilt}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=says):
            make_reward("hpsv2", weights=str(tmp_path / f"{name}.pt"), model="tiny-hps")


def test_a_checkpoint_without_some_weight_is_refused_instead_of_made_up(folders, tmp_path):
    for file in folders["clip"].iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    state = load_file(folders["clip"] / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="visual_projection.weight"):
        make_reward("pickscore", model=str(tmp_path), processor=str(tmp_path))


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("pickscore", {"normalise": "div100"}, "normalise: got 'div100', expected one of \\['div26', 'none'\\]"),
        ("pickscore", {}, "config.json of 'yuvalkirstain/PickScore_v1' is not in the local cache; pass download=True"),
        ("pickscore", {"model": "./nowhere"}, "model: got './nowhere', expected a folder with config.json"),
        ("pickscore", {"model": "a/b/c"}, "expected a folder or a hub id"),
        ("hpsv2", {}, "weights: HPS_v2_compressed.pt of 'xswu/HPSv2' is not in the local cache"),
        ("hpsv21", {"weights": "/nowhere.pt"}, "no file at '/nowhere.pt', expected HPS_v2.1_compressed.pt"),
        ("hpsv2", {"dtype": "float8"}, "dtype: got 'float8'"),
        ("clip_i", {"pretrained": "openai"}, "pretrained: got 'openai', expected None"),
        ("dino", {"model": "/nowhere"}, "model: got '/nowhere', expected a folder with config.json"),
        ("set_consistency", {"rows": 0}, "rows: got 0, expected a whole number of at least 1"),
        ("vlm_rm", {"baseline": ""}, "baseline: got '', expected a prompt"),
        ("vlm_rm", {"baseline": "a", "goal": "a"}, "baseline: got .* expected other prompts than the goal's"),
        ("vlm_rm", {"baseline": "a", "alpha": 2}, "alpha: got 2, expected within \\[0, 1\\]"),
        ("lambda_harmonic", {"lam": -1}, "lam: got -1, expected within \\[0, 1\\]"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_loads(name, options, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    with pytest.raises(ValueError, match=says):
        make_reward(name, **options)


def test_folders_are_told_apart_by_their_layout(folders):
    assert is_hf(str(folders["clip"])) and is_hf("openai/clip-vit-base-patch32")
    assert not is_hf(str(folders["open_clip"])) and not is_hf("ViT-B-32") and not is_hf("hf-hub:laion/x")


# Likeness to references


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ["clip_i", "dino"])
def test_likeness_is_the_mean_cosine_over_an_image_s_references(name, folders, images, references):
    reward = make_reward(name, **REWARDS[name](folders))
    got = score(reward, images, PROMPTS, {"references": references}).total
    embed = reward.encoder.embed_images
    for n in range(4):
        x = embed(images[n : n + 1])[0] * 3  # the cosine does not care for the features' length
        expected = np.mean([cosine(x, embed(own[None])[0]) for own in references[n]])
        assert got[n].item() == pytest.approx(expected, abs=1e-5)


def test_dino_s_features_are_the_class_token_of_the_last_layer(folders, images):
    from transformers import AutoImageProcessor, ViTModel

    pixels = AutoImageProcessor.from_pretrained(folders["dino"])(images_to_pil(images), return_tensors="pt")
    model = ViTModel.from_pretrained(folders["dino"], add_pooling_layer=False).eval()
    with torch.no_grad():
        token = model(pixels["pixel_values"]).last_hidden_state[:, 0]
    got = make_reward("dino", model=str(folders["dino"])).encoder.embed_images(images)
    torch.testing.assert_close(got, F.normalize(token, dim=-1), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["clip_i", "dino"])
def test_likeness_is_1_for_the_image_itself_symmetric_and_blind_to_repeats(name, folders, images):
    reward = make_reward(name, **REWARDS[name](folders))

    def likeness(image, own):
        return score(reward, image[None], ["x"], {"references": [own]}).total.item()

    a, b = images[0], images[1]
    assert likeness(a, [a]) == pytest.approx(1, abs=1e-6)
    assert likeness(a, [b]) == pytest.approx(likeness(b, [a]), abs=1e-6)
    assert likeness(a, [b]) == pytest.approx(likeness(a, [b, b]), abs=1e-6)
    assert likeness(a, [b]) < 0.999


def test_an_image_without_references_is_invalid_and_gets_no_gradient(folders, images):
    reward = make_reward("clip_i", **REWARDS["clip_i"](folders))
    pixels = images.clone().requires_grad_()
    context = {"references": [[images[1]], [], [images[2]], [images[3]]]}
    output = reward(pixels, PROMPTS, context)
    assert output.valid.tolist() == [True, False, True, True] and output.rationale[1] == "no references"
    (gradient,) = torch.autograd.grad(output.scores.sum(), pixels)
    assert gradient[1].abs().max() == 0 and gradient[0].abs().max() > 0
    result = score(reward, images, PROMPTS, context)
    assert result.failed == {"clip_i": 1} and result.total[1] == pytest.approx(result.total[[0, 2, 3]].mean().item())
    with pytest.raises(RewardError, match="no references"):
        score(reward, images, PROMPTS, {"references": [[]] * 4})


@pytest.mark.parametrize(
    "references, says",
    [
        (None, "references"),
        ([[]] * 3, "got 3 references in the context, expected 4"),
        ([[torch.zeros(1, 3, 8, 8)]] * 4, "references: got \\(1, 3, 8, 8\\) for image 0"),
        ([["picture.png"]] * 4, "references: got str for image 0"),
        ([[torch.full((3, 8, 8), 3.0)]] * 4, "expected within \\[0, 1\\]"),
        ([[torch.zeros(1, 8, 8)]] * 4, "greyscale"),
    ],
)
def test_unusable_references_are_a_clear_error(folders, images, references, says):
    reward = make_reward("clip_i", **REWARDS["clip_i"](folders))
    with pytest.raises(ValueError, match=says):
        score(reward, images, PROMPTS, None if references is None else {"references": references})


def test_no_reference_is_embedded_twice():
    seen: list[int] = []

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(len(pictures))
        return pictures.mean(dim=(2, 3))

    remember = ReferenceEmbeddings(embed, limit=3)
    pictures = [torch.full((3, 4, 4), 0.1 * k) for k in range(3)]
    first = remember([pictures[0], pictures[1].clone(), pictures[0]], torch.device("cpu"))
    assert seen == [2] and torch.allclose(first[:, 0], torch.tensor([0.0, 0.1, 0.0]))
    assert torch.allclose(remember([pictures[1], pictures[2]], torch.device("cpu"))[:, 0], torch.tensor([0.1, 0.2]))
    assert seen == [2, 1]
    remember([torch.ones(3, 2, 2)], torch.device("cpu"))  # the fourth: the one asked for longest ago goes
    remember(pictures[1:], torch.device("cpu"))
    assert seen == [2, 1, 1]
    remember(pictures[:1], torch.device("cpu"))
    assert seen == [2, 1, 1, 1]


def test_content_keys_differ_with_shape_type_and_pixels():
    x = torch.rand(3, 4, 6)
    others = [x.reshape(3, 6, 4), x.double(), x + 1e-3]
    assert content_key(x) == content_key(x.clone()) == content_key(x.flip(0).flip(0))
    assert len({content_key(y) for y in [x, *others]}) == 4


def test_references_embedded_in_inference_mode_serve_a_backward_pass_later(folders, images):
    reward = make_reward("clip_i", **REWARDS["clip_i"](folders))
    with torch.inference_mode():
        score(reward, images, PROMPTS, {"references": [[x] for x in images.flip(0)]})
    pixels = images.clone().requires_grad_()
    reward(pixels, PROMPTS, {"references": [[x] for x in images.flip(0)]}).scores.sum().backward()
    assert pixels.grad.abs().max() > 0


# Within a picture


def test_consistency_is_the_mean_cosine_over_pairs_of_panels(folders, images):
    reward = make_reward("set_consistency", columns=3, rows=1, model=str(folders["clip"]), pretrained=None)
    got = score(reward, images, PROMPTS).total
    panels = split_panels(images, 1, 3)
    assert torch.equal(panels[2, 1], images[2, :, :, 15:30])
    for n in range(4):
        e = reward.encoder.embed_images(panels[n])
        expected = np.mean([cosine(e[i], e[j]) for i in range(3) for j in range(3) if i != j])
        assert got[n].item() == pytest.approx(expected, abs=1e-5)


def test_panels_are_cut_row_by_row_and_what_does_not_divide_is_left_out(images):
    panels = split_panels(images, 2, 2)
    assert panels.shape == (4, 4, 3, 16, 22)
    assert torch.equal(panels[1, 1], images[1, :, :16, 22:44]) and torch.equal(panels[1, 2], images[1, :, 16:, :22])
    with pytest.raises(ValueError, match="at least 40 by 1 pixels"):
        split_panels(images, 40, 1)


def test_equal_panels_are_fully_consistent_and_a_single_one_is_invalid(folders, images):
    options = {"model": str(folders["clip"]), "pretrained": None}
    tiled = images[:1, ..., :32].repeat(2, 1, 2, 2)
    assert score(make_reward("set_consistency", **options), tiled, ["x"] * 2).total.tolist() == pytest.approx([1, 1])
    video = images[:, None].repeat(1, 3, 1, 1, 1)
    assert score(make_reward("set_consistency", **options), video, PROMPTS).total.tolist() == pytest.approx([1] * 4)
    alone = make_reward("set_consistency", rows=1, columns=1, **options)
    assert not alone(images, PROMPTS).valid.any()
    with pytest.raises(RewardError, match="one panel"):
        score(alone, images, PROMPTS)


def test_off_diagonal_mean_of_orthogonal_features_is_zero():
    assert off_diagonal_mean(torch.eye(4)[None]).item() == 0
    assert off_diagonal_mean(torch.tensor([[[1.0, 0], [-1, 0]]])).item() == -1


# Goal and baseline


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_goal_baseline_is_the_published_projection(alpha):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    g, b = rng.normal(size=8) * 0.3, rng.normal(size=8) * 0.3
    d = (g - b)[:, None]
    project = d @ d.T / (d.T @ d)
    np.testing.assert_allclose(project @ project, project, atol=1e-12)
    np.testing.assert_allclose(project, project.T)
    mixed = alpha * project + (1 - alpha) * np.eye(8)
    expected = 1 - 0.5 * np.sum(((x - g) @ mixed) ** 2, axis=1)
    got = goal_baseline(*(torch.from_numpy(a) for a in (x, g, b)), alpha)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def test_goal_baseline_in_its_limits():
    generator = torch.Generator().manual_seed(0)
    x, g, b = (F.normalize(torch.randn(6, generator=generator), dim=0) for _ in range(3))
    for alpha in (0.0, 0.4, 1.0):
        assert goal_baseline(g[None], g, b, alpha).item() == pytest.approx(1)
    assert goal_baseline(x[None], g, b, 0.0).item() == pytest.approx((x @ g).item(), abs=1e-6)
    steps = torch.linspace(-1, 1, 9)[:, None]
    along = goal_baseline(b + steps * (g - b), g, b, 1.0)
    assert (along.diff() > 0).all()
    across = x - (x @ (g - b)) * (g - b) / (g - b).pow(2).sum()
    torch.testing.assert_close(goal_baseline((x + across)[None], g, b, 1.0), goal_baseline(x[None], g, b, 1.0))
    with pytest.raises(ValueError, match="baseline: got the embedding of the goal"):
        goal_baseline(x[None], g, g, 0.5)


def test_goals_are_averaged_without_normalising_the_mean(folders, images):
    options = REWARDS["vlm_rm"](folders)
    reward = make_reward("vlm_rm", alpha=0.3, **options)
    got = score(reward, images, PROMPTS).total
    x, e = reward.encoder.embed_images(images), reward.encoder.embed_texts(["a red star", "a star", "a photo"])
    torch.testing.assert_close(got, goal_baseline(x, (e[0] + e[1]) / 2, e[2], 0.3))
    own = make_reward("vlm_rm", baseline="a photo", alpha=0.0, model=options["model"])
    assert own.needs == ("prompts",) and reward.needs == ()
    cosines = (x * own.encoder.embed_texts(PROMPTS)).sum(dim=1)
    torch.testing.assert_close(score(own, images, PROMPTS).total, cosines, rtol=1e-4, atol=1e-5)


def test_the_shipped_encoder_is_the_default():
    reward = make_reward("vlm_rm", baseline="a circle", goal="a red circle", alpha=1.0)
    red = torch.zeros(1, 3, 64, 64)
    assert score(reward, red, ["x"]).total.isfinite().all()


# Lambda-harmonic


def test_lambda_harmonic_lies_between_its_parts_and_nearer_the_smaller():
    image, text = torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.3, 0.8, 0.5])
    torch.testing.assert_close(lambda_harmonic(image, text, 1.0), image)
    torch.testing.assert_close(lambda_harmonic(image, text, 0.0), text)
    half = lambda_harmonic(image, text, 0.5)
    torch.testing.assert_close(half, 2 * image * text / (image + text))
    assert (half >= torch.minimum(image, text) - 1e-6).all() and (half <= (image + text) / 2 + 1e-6).all()
    assert lambda_harmonic(torch.tensor([0.0]), torch.tensor([1.0]), 0.3).item() < 1e-6


def test_lambda_harmonic_weighs_references_and_prompt_of_align(folders, images, references):
    from transformers import AlignModel, AutoImageProcessor, AutoTokenizer

    model = AlignModel.from_pretrained(folders["align"]).eval()
    processor = AutoImageProcessor.from_pretrained(folders["align"])
    tokens = AutoTokenizer.from_pretrained(folders["align"])(
        PROMPTS, padding="max_length", max_length=64, return_tensors="pt"
    )

    def embed(pictures):
        pixels = torch.cat([processor(images_to_pil(p[None]), return_tensors="pt")["pixel_values"] for p in pictures])
        return model.get_image_features(pixels).pooler_output

    with torch.no_grad():
        texts = model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        x = embed(images)
        expected = []
        for n in range(4):
            s_image = np.mean([(cosine(x[n], r) + 1) / 2 for r in embed(references[n])])
            s_text = (cosine(x[n], texts[n]) + 1) / 2
            expected.append(1 / (0.3 / (s_image + 1e-8) + 0.7 / (s_text + 1e-8)))
    result = score(
        make_reward("lambda_harmonic", model=str(folders["align"])), images, PROMPTS, {"references": references}
    )
    assert result.total.tolist() == pytest.approx(expected, abs=5e-3)
    text_only = make_reward("lambda_harmonic", lam=0.0, model=str(folders["align"]))
    assert text_only.needs == ("prompts",)
    torch.testing.assert_close(
        score(text_only, images, PROMPTS).total, result.outputs["lambda_harmonic"].criteria["text"]
    )
