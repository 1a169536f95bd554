"""Regression heads on vision-language models, against direct computations on tiny checkpoints in published layouts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_heads import make_checkpoint, make_head_state
from tiny_vlm import make_model, make_processor, make_tokenizer

from visalign.images import images_to_pil
from visalign.rewards import RewardError, make_reward, score
from visalign.rewards.head.editreward import pool_heads
from visalign.rewards.head.hpsv3 import uncertainty_loss
from visalign.rewards.vlm.chat import Message, Reply
from visalign.rewards.vlm.heads import REWARD_TOKEN, convert_state_dict, make_head
from visalign.rewards.vlm.judging import load_template

SIDE = 56  # of a picture; with this budget of pixels it is not resized
SHORT = "Rate {prompt}: <|Reward|>\n\nEND\n"
TEMPLATES = {  # words of these tests; the checkpoints were taught others
    "hpsv3": "\nHow good is it?  \n- **Looks**\n\nWanted - {prompt}\n\n\nTell: <|Reward|>\n\nEND\n",
    "editreward_following": "\nWas the wish obeyed?  \nWish - {prompt}\n\nTell: <|Reward|>\n\nEND\n",
    "editreward_quality": "\nDoes the edit look real?  \nWish - {prompt}\n\nTell: <|Reward|>\n\nEND\n",
}


@pytest.fixture(autouse=True)
def templates(tmp_path_factory, monkeypatch):
    """The user's folder of templates, filled."""
    folder = tmp_path_factory.mktemp("templates")
    for name, text in TEMPLATES.items():
        (folder / f"{name}.txt").write_text(text)
    monkeypatch.setenv("VISALIGN_TEMPLATES", str(folder))


def _pictures(count: int, seed: int = 0, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


def _old_layout(state: dict) -> dict:
    """The names from before transformers 4.52."""
    return {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for key, value in state.items()
    }


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    model, processor, state = make_checkpoint(folder, "qwen2_vl", make_head_state("rm_head", 32, seed=1))
    save_file({key: value.contiguous() for key, value in _old_layout(state).items()}, folder / "HPSv3.safetensors")
    return folder, model, processor, state


@pytest.fixture(scope="module")
def editreward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editreward")
    heads = {**make_head_state("rm_heads.head_0", 32, seed=2), **make_head_state("rm_heads.head_1", 32, seed=3)}
    model, processor, state = make_checkpoint(folder, "qwen2_5_vl", heads)
    torch.save({"model": _old_layout(state)}, folder / "model.pth")
    return folder, model, processor, state


def _make(checkpoint, name="hpsv3", file="HPSv3.safetensors", **options):
    folder = checkpoint[0]
    options = {"base": str(folder), "weights": str(folder / file), "dtype": "float32", "pixels": SIDE * SIDE, **options}
    return make_reward(name, **options)


def _direct(checkpoint, texts, pictures, prefixes):
    """Head outputs (N, 2): the whole sequences padded on the right, the published way, written out."""
    _, model, processor, state = checkpoint
    turns = [
        [{"role": "user", "content": [{"type": "image"}] * len(own) + [{"type": "text", "text": text}]}]
        for text, own in zip(texts, pictures)
    ]
    inputs = processor(
        text=processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
        images=[images_to_pil(own) for own in pictures],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        images_kwargs={"size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}},
    )
    with torch.no_grad():
        ids = inputs["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        seen = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        places = (ids == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(places, torch.cat(list(seen.pooler_output)))
        positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], position_ids=positions
        ).last_hidden_state
        token = processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        at = hidden[torch.arange(len(ids)), (ids == token).int().argmax(1)]
        rows = []
        for h, prefix in zip(at, prefixes):
            h = F.relu(state[f"{prefix}.0.weight"] @ h + state[f"{prefix}.0.bias"])
            h = F.relu(state[f"{prefix}.3.weight"] @ h + state[f"{prefix}.3.bias"])
            rows.append(state[f"{prefix}.5.weight"] @ h + state[f"{prefix}.5.bias"])
        return torch.stack(rows)


# HPSv3


@pytest.mark.parametrize("template", [None, SHORT], ids=["from the folder", "given"])
def test_hpsv3_is_the_published_computation_on_the_published_layout(hpsv3, template):
    images, prompts = _pictures(2), ["a cat", "a much longer prompt about {two} dogs"]
    output = _make(hpsv3, template=template)(images, prompts)
    text = load_template("hpsv3", template)
    expected = _direct(hpsv3, [text.replace("{prompt}", p) for p in prompts], images[:, None], ["rm_head"] * 2)
    torch.testing.assert_close(output.scores, expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.uncertainty, expected[:, 1].exp(), rtol=1e-4, atol=1e-4)
    assert expected[:, 0].std() > 1e-3  # the pictures matter


@pytest.mark.parametrize("kind", ["new names", "nested"])
def test_hpsv3_reads_both_layouts_and_a_nested_file(hpsv3, tmp_path, kind):
    state = hpsv3[3] if kind == "new names" else {"model": _old_layout(hpsv3[3])}
    torch.save(state, tmp_path / "weights.pth")
    same = _make(hpsv3, template=SHORT)(_pictures(2), ["a", "b"]).scores
    other = _make(hpsv3, template=SHORT, weights=str(tmp_path / "weights.pth"))(_pictures(2), ["a", "b"]).scores
    torch.testing.assert_close(other, same)


def test_padding_and_company_do_not_change_a_score(hpsv3):
    reward, images = _make(hpsv3, template=SHORT), _pictures(3)
    prompts = ["a", "a prompt that is longer, so that the first is padded", "b" * 60]
    whole = score(reward, images, prompts)
    alone = [score(reward, images[n : n + 1], prompts[n : n + 1]).total for n in range(3)]
    torch.testing.assert_close(whole.total, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert whole.total.dtype == torch.float32


def test_gradients_reach_the_pixels_and_agree_with_a_finite_difference(hpsv3):
    reward, images = _make(hpsv3, template=SHORT), _pictures(2).mul(0.8).add(0.1).requires_grad_()
    scores = reward(images, ["a", "b"]).scores
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all() and reward.differentiable
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ends = [reward(images + sign * 5e-3 * direction, ["a", "b"]).scores.sum() for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 1e-2 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_a_second_reward_token_is_refused(hpsv3):
    with pytest.raises(RewardError, match=r"sample 1.*got 2 <\|Reward\|> tokens in one conversation, expected 1"):
        score(_make(hpsv3, template=SHORT), _pictures(2), ["a", f"b {REWARD_TOKEN}"])
    with pytest.raises(RewardError, match="got 0"):
        score(_make(hpsv3, template="rate {prompt}"), _pictures(1), ["a"])


@pytest.mark.parametrize("size", [(75, 131), (300, 40), (56, 56), (20, 30)])
def test_patches_match_the_familys_own_processor(hpsv3, size):
    smooth = F.interpolate(_pictures(1, 4, 4, 4), size, mode="bicubic", align_corners=False).clamp(0, 1)
    smooth = ((0.2 + 0.6 * smooth) * 255).round() / 255  # 8 bits, and no overshoot for the processor to cut off midway
    patches = _make(hpsv3, pixels=8 * 28 * 28).vlm.vision.patches
    budget = {"shortest_edge": 8 * 28 * 28, "longest_edge": 8 * 28 * 28}
    for image, worst in ((smooth, 2e-2), (_pictures(1, 4, *size), math.inf)):  # noise overshoots: on the mean only
        theirs = hpsv3[2].image_processor(images_to_pil(image), size=budget, return_tensors="pt")
        assert tuple(theirs["image_grid_thw"][0]) == patches.grid(*size)
        difference = (patches(image)[0] - theirs["pixel_values"]).abs()
        assert difference.max() < worst and difference.mean() < 2e-2


def test_without_spread_the_uncertainty_loss_is_that_of_bradley_and_terry():
    chosen, rejected, none = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0]), torch.zeros(2)
    loss = uncertainty_loss(chosen, none, rejected, none)
    torch.testing.assert_close(loss, -F.logsigmoid(chosen - rejected))


def test_the_uncertainty_loss_is_the_mean_over_a_gaussian():
    mean, std_c, std_r = 0.7, 1.2, 0.5
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.tensor([x], dtype=torch.float64) for x in (mean, std_c, 0.0, std_r)]
    loss = uncertainty_loss(*inputs, generator=generator, samples=400_000).item()
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = mean + math.hypot(std_c, std_r) * nodes
    assert loss == pytest.approx((weights * np.logaddexp(0, -z)).sum() / weights.sum(), abs=5e-3)


# State dicts


def test_names_of_both_layouts_become_those_of_today():
    tensor = torch.zeros(1)
    today = [
        "model.visual.blocks.0.attn.qkv.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ]
    today += ["model.language_model.embed_tokens.weight", "rm_head.0.bias", "rm_heads.head_1.5.weight"]
    state = dict.fromkeys(today, tensor)
    assert set(convert_state_dict(state)) == set(today) == set(convert_state_dict(_old_layout(state)))


@pytest.mark.parametrize("odd", ["visual.x", "model.layers.0.x", "transformer.h.0.x", "base_model.model.x"])
def test_a_key_of_another_layout_is_named(odd):
    state = {"model.visual.a": torch.zeros(1), "model.language_model.b": torch.zeros(1), odd: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"weights: got key '{odd}', expected the layout of transformers since 4.52"):
        convert_state_dict(state)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "head shape", "no head"])
def test_a_checkpoint_that_does_not_fit_names_the_key(hpsv3, tmp_path, change):
    state, key = dict(hpsv3[3]), "model.language_model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        state.pop(key)
        expected = f"got no key '{key}'"
    elif change == "extra":
        state[f"{key}.more"] = torch.zeros(1)
        expected = f"got an unexpected key '{key}.more'"
    elif change == "shape":
        state[key] = torch.zeros(3, 3)
        expected = rf"got shape \(3, 3\) for '{key}', expected \(64, 32\)"
    elif change == "head shape":
        state["rm_head.5.weight"] = torch.zeros(4, 16)
        expected = r"got shape \(4, 16\) for 'rm_head.5.weight', expected \(2, 16\)"
    else:
        state = {name: value for name, value in state.items() if not name.startswith("rm_head")}
        expected = "got no key 'rm_head.0.bias'"
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=expected):
        _make(hpsv3, weights=str(tmp_path / "weights.pth"))


def test_a_head_is_its_three_layers_in_float32():
    state = {key: value.bfloat16() for key, value in make_head_state("rm_head", 8, seed=0).items()}
    head, x = make_head(state, "rm_head", 8), torch.randn(5, 8)
    w = {key.removeprefix("rm_head."): value.float() for key, value in state.items()}
    expected = F.relu(F.relu(x @ w["0.weight"].T + w["0.bias"]) @ w["3.weight"].T + w["3.bias"])
    torch.testing.assert_close(head(x), expected @ w["5.weight"].T + w["5.bias"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float8"}, "dtype: got 'float8', expected one of"),
        ({"pixels": 10}, "pixels: got 10, expected a whole number of at least 784"),
        ({"weights": "no/file.safetensors"}, "weights: got no file at 'no/file.safetensors'"),
        ({"template": "no prompt"}, "template: got a text without '{prompt}'"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_unusable_options_are_refused(hpsv3, options, message):
    with pytest.raises(ValueError, match=message):
        _make(hpsv3, **options)


def test_a_base_that_is_not_there_says_how_to_get_it(hpsv3):
    with pytest.raises(ValueError, match="base: could not load 'no/such-base' .*pass download=True"):
        _make(hpsv3, base="no/such-base")
    with pytest.raises(ValueError, match="could not find HPSv3.safetensors of 'MizzenAI/HPSv3'.*download=True"):
        make_reward("hpsv3")
    with pytest.raises(ValueError, match="weights: got none, expected a file model.safetensors or model.pth"):
        make_reward("editreward", weights="")


# EditReward


def _edit(checkpoint, **options):
    return _make(checkpoint, "editreward", "model.pth", **options)


def _edit_direct(checkpoint, images, sources, prompts):
    outputs = []
    for k, kind in enumerate(("following", "quality")):
        texts = [load_template(f"editreward_{kind}").replace("{prompt}", p) for p in prompts]
        pictures = torch.stack([sources, images], dim=1)
        outputs.append(_direct(checkpoint, texts, pictures, [f"rm_heads.head_{k}"] * len(prompts)))
    return torch.stack(outputs)


def test_editreward_is_the_published_computation_with_two_questions_an_edit(editreward):
    images, sources, prompts = _pictures(2, 1), _pictures(2, 2), ["make it blue", "remove the cat"]
    outputs = _edit_direct(editreward, images, sources, prompts)
    assert outputs.shape == (2, 2, 2)
    for pooling in ("mean", "min", "sum"):
        found = _edit(editreward, pooling=pooling)(images, prompts, {"references": [[s] for s in sources]})
        expected = {"mean": outputs.mean(0), "min": outputs.amin(0)}.get(pooling)
        if pooling == "sum":
            deviation = (outputs[..., 1].exp() ** 2).sum(0).sqrt()
            expected = torch.stack([outputs[..., 0].sum(0), deviation.log()], dim=-1)
        torch.testing.assert_close(found.scores, expected[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.uncertainty, expected[:, 1].exp(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.criteria["quality"], outputs[1, :, 0], rtol=1e-4, atol=1e-4)


def test_each_edit_is_asked_about_in_two_sequences(editreward):
    reward, seen = _edit(editreward), []
    at_token = reward.vlm.at_token
    reward.vlm.at_token = lambda asked, name: seen.append(asked) or at_token(asked, name)
    reward(_pictures(2), ["a", "b"], {"references": [[s] for s in _pictures(2, 3)]})
    assert [len(asked) for asked in seen] == [4]


def test_edits_are_differentiable_and_depend_on_both_pictures(editreward):
    reward, images = _edit(editreward), _pictures(1, 1).requires_grad_()
    scores = reward(images, ["a"], {"references": [[_pictures(1, 2)[0]]]}).scores
    assert torch.autograd.grad(scores.sum(), images)[0].abs().max() > 0
    other = reward(images.detach(), ["a"], {"references": [[_pictures(1, 3)[0]]]}).scores
    assert not torch.allclose(scores, other)


def test_equal_heads_pool_to_one_and_variances_add():
    one = torch.randn(1, 4, 2)
    both = one.expand(2, 4, 2)
    torch.testing.assert_close(pool_heads(both, "mean"), one[0])
    torch.testing.assert_close(pool_heads(both, "min"), one[0])
    summed = pool_heads(both, "sum")
    torch.testing.assert_close(summed[:, 0], 2 * one[0, :, 0])
    torch.testing.assert_close(summed[:, 1].exp() ** 2, 2 * one[0, :, 1].exp() ** 2)


# DeScore


@pytest.fixture(scope="module")
def descore(tmp_path_factory):
    folder = tmp_path_factory.mktemp("descore")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<Reward>"], special_tokens=True)
    model, processor = make_model("qwen3_vl", tokenizer, seed=6), make_processor("qwen3_vl", tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(7))
    torch.save({"rm_head.weight": weight}, folder / "rm_head.pth")
    return folder, model, processor, weight[0]


VIDEOS = _pictures(8, 5, 64, 64).view(2, 4, 3, 64, 64)


class Thinker:
    name = "thinker"

    def __init__(self, thoughts: str) -> None:
        self.thoughts = thoughts

    def __call__(self, conversations, **options):
        return [Reply(self.thoughts) for _ in conversations]


def _descore(descore, **options):
    return make_reward("descore", model=str(descore[0]), template="Judge {prompt}.", dtype="float32", **options)


@pytest.mark.parametrize("thoughts", ["", "The cat melts."])
def test_descore_is_its_head_on_the_reward_token_after_the_thoughts(descore, thoughts):
    thinker = Thinker(thoughts) if thoughts else None
    output = _descore(descore, thinker=thinker)(VIDEOS, ["a cat", "dogs"], {"fps": 4.0})
    _, model, processor, weight = descore
    for video, prompt, found in zip(VIDEOS, ("a cat", "dogs"), output.scores):
        text = f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Judge {prompt}.<|im_end|>\n"
        inputs = processor(
            text=[f"{text}<|im_start|>assistant\n{thoughts}<Reward>"],
            videos=[images_to_pil(video)],
            video_metadata=[{"fps": 4.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}],
            do_sample_frames=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0, -1]  # the token is the last
        torch.testing.assert_close(found, hidden @ weight, rtol=1e-4, atol=1e-4)
    assert output.rationale == [thoughts] * 2


def test_descore_reads_only_the_reward_tokens_state(descore):
    reward = _descore(descore)
    forward = reward.model.base_model.forward

    def noisy(*args, **kwargs):
        out = forward(*args, **kwargs)
        elsewhere = (kwargs["input_ids"] != reward.token)[..., None]
        out.last_hidden_state = out.last_hidden_state + 100 * elsewhere
        return out

    before = reward(VIDEOS, ["a", "b"]).scores
    reward.model.base_model.forward = noisy
    assert torch.equal(reward(VIDEOS, ["a", "b"]).scores, before)


def test_a_little_change_of_a_video_changes_descore_a_little(descore):
    reward = _descore(descore)
    base = VIDEOS * 0.9
    steps = [
        (reward(base + eps, ["a", "b"]).scores - reward(base, ["a", "b"]).scores).abs().max() for eps in (0.1, 0.02)
    ]
    assert 0 < steps[1] < steps[0]


def test_an_adapters_head_key_is_read_and_others_are_named(descore, tmp_path):
    weight = descore[3][None]
    torch.save({"base_model.model.rm_head.weight": weight}, tmp_path / "a.pth")
    same = _descore(descore, head=str(tmp_path / "a.pth"))(VIDEOS, ["a", "b"]).scores
    assert torch.equal(same, _descore(descore)(VIDEOS, ["a", "b"]).scores)
    torch.save({"head.weight": weight}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"head: got keys \['head.weight'\]"):
        _descore(descore, head=str(tmp_path / "b.pth"))
    torch.save({"rm_head.weight": weight[:, :5]}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"got shape \(1, 5\) for 'rm_head.weight', expected \(1, 32\)"):
        _descore(descore, head=str(tmp_path / "c.pth"))


def test_without_thoughts_from_a_failing_thinker_a_video_is_invalid(descore):
    class Broken(Thinker):
        def __call__(self, conversations, **options):
            return [Reply("", error="gone"), Reply("fine")]

    output = _descore(descore, thinker=Broken(""))(VIDEOS, ["a", "b"])
    assert output.is_valid.tolist() == [False, True] and output.rationale == ["no answer: gone", "fine"]


def test_descore_refuses_a_second_token_and_a_model_without_one(descore, hpsv3):
    with pytest.raises(RewardError, match="got 2 <Reward> tokens, expected 1"):
        score(_descore(descore), VIDEOS, ["a", "b <Reward>"])
    with pytest.raises(ValueError, match="template: expected the question the model was taught"):
        make_reward("descore", model=str(descore[0]))


def test_messages_reach_the_model_as_one_user_turn(hpsv3):
    reward = _make(hpsv3, template=SHORT)
    text = reward.vlm.render([Message("user", (_pictures(1)[0], SHORT))])
    assert (
        text
        == f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{SHORT}<|im_end|>\n<|im_start|>assistant\n"
    )
