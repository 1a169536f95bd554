"""VQAScore on CLIP-FlanT5: a tiny random checkpoint in the published files, against its parts put together by hand."""

import json
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from PIL import Image
from tiny_clip_t5 import D_MODEL, SPARE, published_state, save_clip_t5, save_state
from torch import Tensor

from visalign.images import images_to_pil
from visalign.rewards import make_reward
from visalign.rewards.spec import parse_spec
from visalign.rewards.vlm import clip_t5
from visalign.rewards.vlm.clip_t5 import pad_to_square

SYSTEM = "Look at the picture, then answer."  # words of these tests; the checkpoints were taught others
KINDS = ("pytorch_model.bin in shards", "model.safetensors in shards", "pytorch_model.bin", "model.safetensors")
PROMPTS = ["a red circle", 'a "green" star {0} on the left of two blue squares, as ½ a picture…']


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("clip_t5")
    return SimpleNamespace(folder=folder, **vars(save_clip_t5(folder, KINDS[0])))


@pytest.fixture(scope="module")
def reward(saved):
    return make_reward("vqascore", model=str(saved.folder), template=SYSTEM)


def pictures(count: int = 2, height: int = 32, width: int = 20, seed: int = 0) -> Tensor:
    """8-bit levels whose longer side is the tower's, so that nothing is resized."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


def square(picture: Tensor, mean: list[float]) -> Image.Image:
    image = images_to_pil(picture[None])[0]
    side = max(image.size)
    whole = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole


def direct(
    saved: SimpleNamespace, picture: Tensor, question: str, answer: str = "Yes", system: str = SYSTEM, limit: int = 2048
) -> Tensor:
    """Log-probabilities of the answer's tokens and the end token: no batch, no mask, each part called by itself."""
    from transformers import CLIPImageProcessor

    spiece = sentencepiece.SentencePieceProcessor(model_file=str(saved.folder / "spiece.model"))
    first, last, labels = ([*spiece.encode(t), 1] for t in (f"{system} USER: ", f"\n{question} ASSISTANT: ", answer))
    processor = CLIPImageProcessor.from_pretrained(saved.folder / "tower")
    pixels = processor(square(picture, processor.image_mean), return_tensors="pt")["pixel_values"]
    vision, t5 = saved.vision, saved.t5
    with torch.no_grad():
        patches = vision.encoder.layers[0](vision.pre_layrnorm(vision.embeddings(pixels)), None)  # of two layers
        patches = saved.projector((patches[0] if isinstance(patches, tuple) else patches)[:, 1:])
        ids = [*first, -200, *last][:limit]  # -200 is the picture
        words = [t5.shared(torch.tensor([ids[: len(first)]])), t5.shared(torch.tensor([ids[len(first) + 1 :]]))]
        states = t5.encoder(inputs_embeds=torch.cat([words[0], patches, words[1]], dim=1)).last_hidden_state
        shifted = torch.tensor([[0, *labels[:-1]]])
        hidden = t5.decoder(input_ids=shifted, encoder_hidden_states=states).last_hidden_state[0]
        known = (hidden @ t5.lm_head.weight.T)[:, : len(t5.lm_head.weight) - SPARE].log_softmax(dim=-1)
        return known[range(len(labels)), labels]


def asked(prompt: str) -> str:
    return f'Does this figure show "{prompt}"? Please answer yes or no.'


@pytest.mark.parametrize("kind", [*KINDS, "pytorch_model.bin without tower"])
def test_a_checkpoint_in_the_published_files_scores_as_its_parts_put_together(tmp_path, kind):
    parts = SimpleNamespace(folder=tmp_path, **vars(save_clip_t5(tmp_path, kind, seed=7)))
    images = pictures()
    found = make_reward("vqascore", model=str(tmp_path), template=SYSTEM)(images, PROMPTS).scores
    expected = torch.stack([direct(parts, x, asked(p)).mean() for x, p in zip(images, PROMPTS)])
    torch.testing.assert_close(found.log(), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs() > 1e-2 and (found > 0).all() and (found < 1).all()


def test_the_score_is_the_geometric_mean_over_the_answer_and_its_end(saved):
    options = {"model": str(saved.folder), "template": SYSTEM, "yes": "Yes indeed", "no": "No"}
    images = pictures(seed=1)
    yes = [direct(saved, x, asked(p), "Yes indeed") for x, p in zip(images, PROMPTS)]
    no = [direct(saved, x, asked(p), "No") for x, p in zip(images, PROMPTS)]
    assert len(yes[0]) > len(no[0]) > 1
    found = make_reward("vqascore", **options)(images, PROMPTS).scores
    expected = torch.stack([row.prod() ** (1 / len(row)) for row in map(torch.exp, yes)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    odds = make_reward("vqascore", output="log_odds", **options)(images, PROMPTS).scores
    expected = torch.stack([a.sum() - b.sum() for a, b in zip(yes, no)])
    torch.testing.assert_close(odds, expected, rtol=1e-5, atol=2e-5)


def test_batches_score_as_singles(saved, reward, monkeypatch):
    images, prompts = pictures(3, seed=2), [*PROMPTS, "two"]
    together = reward(images, prompts).scores
    alone = torch.cat([reward(images[n : n + 1], prompts[n : n + 1]).scores for n in range(3)])
    torch.testing.assert_close(together.log(), alone.log(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(reward.clip_t5, "batch_size", 2)
    torch.testing.assert_close(reward(images, prompts).scores.log(), alone.log(), rtol=1e-5, atol=1e-5)


def test_a_long_conversation_is_cut_as_the_published_code_cuts_it(saved, reward, monkeypatch):
    assert clip_t5.CONTEXT == 2048
    monkeypatch.setattr(clip_t5, "CONTEXT", 100)
    long = "a red circle " * 20
    found = reward(pictures(1), [long]).scores.log()
    expected = direct(saved, pictures(1)[0], asked(long), limit=100).mean()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward(pictures(1), [long + "and a star"]).scores.log(), found)


@pytest.mark.parametrize("size", [(32, 32), (32, 9), (8, 32), (31, 32)])
def test_pictures_are_padded_to_squares_as_pil_pads_them(reward, size):
    picture = pictures(1, *size)
    mean = list(reward.clip_t5.preprocess.mean)
    whole = torch.tensor(list(square(picture[0], mean).getdata())).view(32, 32, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(pad_to_square(picture, mean)[0], whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(100, 60), (20, 24)])
def test_other_sizes_are_resized_as_the_processor_resizes_them(saved, reward, size):
    from transformers import CLIPImageProcessor

    smooth = torch.nn.functional.avg_pool2d(pictures(1, *size), 5, 1, 2)  # what differs is 8-bit rounding only
    processor, prepare = CLIPImageProcessor.from_pretrained(saved.folder / "tower"), reward.clip_t5.preprocess
    expected = processor(square(smooth[0], processor.image_mean), return_tensors="pt")["pixel_values"]
    found = prepare(pad_to_square(smooth, prepare.mean))
    assert found.shape == expected.shape == (1, 3, 32, 32)
    levels = (found - expected).abs() * 255 * min(prepare.std)
    assert levels.max() < 2 and levels.mean() < 0.5


def test_tokens_are_sentencepieces_own(saved, reward):
    spiece = sentencepiece.SentencePieceProcessor(model_file=str(saved.folder / "spiece.model"))
    for text in ("Yes", "\na  red\n circle ASSISTANT: ", "½ … “café” ﬁ\u200b１２", "\t星"):
        assert reward.clip_t5.tokenizer(text)["input_ids"] == [*spiece.encode(text), 1]


def test_the_opening_may_be_left_out_or_come_from_the_folder_of_templates(saved, tmp_path, monkeypatch):
    model, images = str(saved.folder), pictures(1)
    monkeypatch.setenv("VISALIGN_TEMPLATES", str(tmp_path))
    with pytest.raises(ValueError, match="clip_flant5_system.txt.*SYSTEM_MSG in t2v_metrics/constants.py"):
        parse_spec("vqascore", model=model)
    (tmp_path / "clip_flant5_system.txt").write_text(SYSTEM)
    for system, options in ((SYSTEM, {}), ("", {"template": ""})):
        found = make_reward("vqascore", model=model, **options)(images, ["two"]).scores.log()
        expected = direct(saved, images[0], asked("two"), system=system).mean()
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_pictures_and_agree_with_finite_differences(reward):
    images = (0.2 + 0.6 * pictures(seed=3)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).scores.log().sum(), images)
    assert reward.differentiable and all((own.norm() > 1e-3) for own in gradient)
    step = gradient / gradient.norm() * 1e-3
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step, PROMPTS).scores.log().sum() for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / 2e-3, gradient.norm(), rtol=0.05, atol=0)
    assert all(weight.grad is None and not weight.requires_grad for weight in reward.clip_t5.model.parameters())


def test_bfloat16_agrees_with_float32(saved, reward):
    rough = make_reward("vqascore", model=str(saved.folder), template=SYSTEM, dtype="bfloat16")
    found, exact = (r(pictures(), PROMPTS).scores for r in (rough, reward))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.log(), exact.log(), rtol=0, atol=0.3)


def test_options_that_cannot_work_are_refused_before_anything_loads(saved):
    def refused(says: str, **options) -> None:
        with pytest.raises(ValueError, match=says):
            parse_spec("vqascore", **{"model": str(saved.folder), "template": SYSTEM, **options})

    refused("got 'max_pixels'", max_pixels=100)
    refused("got 'tempalte'.*did you mean 'template'", tempalte="x")
    refused("dtype: got 'int8'", dtype="int8")
    refused("batch_size: got 0, expected a whole number >= 1", batch_size=0)
    refused("output: got 'odds'|got 'odds'", output="odds")
    refused("question: got 'Yes\\?', expected {prompt} in it", question="Yes?")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: got 'linear' in .*, expected 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: got 'cls_patch'.*expected 'patch'"),
        ({"mm_hidden_size": None}, "got a config.json without 'mm_hidden_size'"),
        ({"mm_vision_tower": "/no/such"}, "vision_tower: could not load '/no/such'"),
        ({"mm_hidden_size": 16}, "weights of mm_projector: .*size mismatch for 0.weight"),
        ({"num_layers": 3}, "weights of T5: .*encoder.block.2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_cannot_be_followed_are_refused(saved, tmp_path, settings, says):
    for file in saved.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    changed = {**json.loads((saved.folder / "config.json").read_text()), **settings}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    with pytest.raises(ValueError, match=says):
        make_reward("vqascore", model=str(tmp_path), template=SYSTEM)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.pop("mm_projector.2.bias"), 'weights of mm_projector: .*Missing key.* "2.bias"'),
        (lambda s: s.pop("lm_head.weight"), 'weights of T5: .*Missing key.* "lm_head.weight"'),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), 'weights of T5: .*Unexpected key.* "extra.weight"'),
        (
            lambda s: s.pop("vision_tower.vision_tower.vision_model.pre_layrnorm.weight"),
            "weights of the vision tower: got missing or unknown .*pre_layrnorm.weight",
        ),
        (
            lambda s: [s.pop(key) for key in list(s) if "embed_tokens" in key or key == "shared.weight"],
            "T5's embedding",
        ),
    ],
    ids=["projector", "head", "odd", "tower", "embedding"],
)
def test_a_missing_or_an_odd_key_is_named(saved, tmp_path, spoil, says):
    for name in ("config.json", "spiece.model", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(saved.folder / name)
    state = published_state(saved.t5, saved.vision, saved.projector)
    spoil(state)
    save_state(tmp_path, state, "model.safetensors")
    with pytest.raises(ValueError, match=says):
        make_reward("vqascore", model=str(tmp_path), template=SYSTEM)


def test_files_that_are_not_there_are_named(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved.folder / "config.json").read_text())
    with pytest.raises(ValueError, match="weights: got none of .*'pytorch_model.bin'"):
        make_reward("vqascore", model=str(tmp_path), template=SYSTEM)
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weights: got no pytorch_model-00001-of-00002.bin in"):
        make_reward("vqascore", model=str(tmp_path), template=SYSTEM)
    assert saved.projector[0].out_features == D_MODEL


def test_pictures_far_longer_than_wide_are_refused(reward):
    with pytest.raises(ValueError, match="images: got 2010 x 10 pixels, expected an aspect ratio of at most 200"):
        reward(torch.zeros(1, 3, 10, 2010), ["a"])
