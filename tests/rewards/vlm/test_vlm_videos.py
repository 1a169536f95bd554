"""Videos in a Qwen-VL run here, against transformers' own processor and model on the same frames."""

import pytest
import torch
from tiny_vlm import save_tiny_vlm

from visalign.images import images_to_pil
from visalign.rewards import make_reward
from visalign.rewards.spec import parse_spec
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.local_chat import LocalChat
from visalign.rewards.vlm.model import VLM
from visalign.rewards.vlm.yes_token import YesNo

FPS = 5.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    families = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    return {family: str(save_tiny_vlm(tmp_path_factory.mktemp(family), family)) for family in families}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def vlm(request, folders) -> VLM:
    return VLM(folders[request.param], fps=FPS)


def frames(count: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random 8-bit levels at a size that no processor changes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 28 * rows, 28 * columns), generator=generator).float() / 255


def conversations() -> list[list[Message]]:
    """Even and odd numbers of frames, one frame, a picture among videos, two videos, and no video at all."""
    picture = frames(1, 2, 2, 0)[0]
    return [
        [Message("system", ("judge",)), Message("user", (frames(4, 2, 2, 1), "is it good?"))],
        [Message("user", (picture, "then ", frames(5, 2, 3, 2), " is it as good? " * 3))],
        [Message("user", (frames(6, 1, 2, 3), " or ", frames(1, 2, 2, 4), picture, "?"))],
        [Message("user", ("is it good?",))],
    ]


def processed(vlm: VLM, conversations: list[list[Message]], fps: float = FPS, more: str = "") -> dict:
    """What the processor makes of the whole batch, padded on the left."""
    parts = [part for c in conversations for m in c for part in m.parts if isinstance(part, torch.Tensor)]
    videos = [images_to_pil(part) for part in parts if part.ndim == 4]
    about = [{"fps": fps, "total_num_frames": len(v), "frames_indices": list(range(len(v)))} for v in videos]
    return vlm.processor(
        text=[vlm.render(c) + more for c in conversations],
        images=[images_to_pil(part[None])[0] for part in parts if part.ndim == 3] or None,
        videos=videos or None,
        **({"video_metadata": about, "do_sample_frames": False} if videos else {}),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def naive_logits(vlm: VLM, conversation: list[Message], fps: float = FPS, more: str = "") -> torch.Tensor:
    """The model's own forward on its own processor's output, one conversation at a time: (T, vocabulary)."""
    with torch.no_grad():
        return vlm.model(**processed(vlm, [conversation], fps, more)).logits[0]


def test_answers_are_those_of_the_whole_model(vlm):
    found = vlm.head(vlm.hidden(vlm.prompts(conversations()))[:, 0]).log_softmax(dim=-1)
    expected = torch.stack([naive_logits(vlm, c)[-1] for c in conversations()]).log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    said = YesNo(vlm, convention="full")(conversations()).probability
    torch.testing.assert_close(said, expected.exp()[:, vlm.tokenizer.encode("Yes")[0]], rtol=1e-5, atol=1e-5)


def test_inputs_are_those_of_the_processor_padded_on_the_left(vlm):
    expected, found = processed(vlm, conversations()), vlm.inputs(vlm.prompts(conversations()))
    assert set(found) == set(expected)
    assert found["attention_mask"][3, 0] == 0 and found["video_grid_thw"][1].tolist() == [3, 4, 6]
    for name, value in expected.items():
        value = torch.as_tensor(value)
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=0, atol=1e-5, msg=name)


def test_batches_and_shared_beginnings_change_nothing(vlm, monkeypatch):
    video = frames(4, 2, 2, 5)
    asked = conversations() + [[Message("user", (video, f"question {k}?"))] for k in range(3)]
    prompts = vlm.prompts(asked)
    together = vlm.hidden(prompts, keep=2)
    singles = torch.cat([vlm.hidden([p], keep=2) for p in prompts])
    monkeypatch.setattr(vlm, "share_prefix", False)
    whole = vlm.hidden(prompts, keep=2)
    torch.testing.assert_close(together, singles, rtol=0, atol=2e-5)
    torch.testing.assert_close(together, whole, rtol=0, atol=2e-5)


def test_chat_generates_what_the_model_generates(vlm):
    for conversation, reply in zip(conversations(), LocalChat(vlm)(conversations(), max_tokens=4, top_logprobs=3)):
        inputs = processed(vlm, [conversation])
        with torch.no_grad():
            made = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply.error is None and reply.text == vlm.tokenizer.decode(made, skip_special_tokens=True)
        first = naive_logits(vlm, conversation)[-1].log_softmax(dim=-1)
        assert reply.tokens[0].log_prob == pytest.approx(float(first.max()), abs=1e-5)
        before = vlm.tokenizer.decode(made[:1])
        second = naive_logits(vlm, conversation, more=before)[-1].log_softmax(dim=-1)
        if vlm.tokenizer.encode(before) == made[:1].tolist() and len(reply.tokens) > 1:
            assert reply.tokens[1].log_prob == pytest.approx(float(second[made[1]]), abs=1e-5)


def test_only_qwen2_5_tells_time_by_the_frames_a_second(vlm):
    slow = VLM.of(vlm.model, vlm.processor, fps=0.5)
    conversation = conversations()[0]
    expected = naive_logits(vlm, conversation, fps=0.5)[-1]
    found = slow.head(slow.hidden([slow.prompt(conversation)])[:, 0])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    same = torch.allclose(expected, naive_logits(vlm, conversation)[-1], atol=1e-4)
    assert same == (vlm.model.config.model_type == "qwen2_vl")


def test_gradients_reach_the_frames_and_agree_with_finite_differences(vlm):
    video = (0.2 + 0.6 * frames(3, 1, 2, 6)).requires_grad_()
    judge = YesNo(vlm)

    def odds(x: torch.Tensor) -> torch.Tensor:
        return judge([[Message("user", (x, "better?"))], [Message("user", (x, "sharper?"))]]).log_odds.sum()

    (gradient,) = torch.autograd.grad(odds(video), video)
    assert all(frame.norm() > 1e-5 for frame in gradient)
    step = gradient / gradient.norm() * 1e-2
    with torch.no_grad():
        slope = (odds(video + step) - odds(video - step)) / 2e-2
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("size", [(120, 90), (300, 40), (20, 20)])
def test_patches_are_those_of_the_processor(vlm, size):
    pixels = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(size[0]))
    smooth = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)  # differences are 8-bit rounding, not overshoot
    made = vlm.processor.video_processor([images_to_pil(smooth)], return_tensors="pt", do_sample_frames=False)
    cut = vlm.vision.video_patches
    assert made["video_grid_thw"].tolist() == [list(cut.grid(*size, frames=5))]
    levels = (cut(smooth[None])[0] - made["pixel_values_videos"]).abs() * min(cut.std)
    assert levels.max() < 2e-2 and levels.mean() < 2 / 255


def test_videoscore2_asks_a_model_run_here(folders):
    template = "Judge {prompt}."
    videos = torch.stack([frames(4, 2, 2, 7), frames(4, 2, 2, 8)])
    options = {"model": folders["qwen2_5_vl"], "template": template, "max_tokens": 3, "retries": 0, "temperature": 0.0}
    reward = make_reward("videoscore2", chat_options={"fps": FPS}, **options)
    output = reward(videos, ["a", "b"])
    vlm = reward.chat.vlm
    assert not output.is_valid.any()  # a random model writes no marks; what it wrote is what it would write alone
    for video, prompt, said in zip(videos, "ab", output.rationale):
        inputs = processed(vlm, [[Message("user", (video, f"Judge {prompt}."))]])
        with torch.no_grad():
            made = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = vlm.tokenizer.decode(made, skip_special_tokens=True)
        assert said.startswith("unreadable answer") and said.endswith(f"it ends {text!r}")
    with pytest.raises(ValueError, match="model: got '.*', which takes no videos here, expected a Qwen2.5-VL or a url"):
        make_reward("videoscore2", **{**options, "model": folders["qwen3_vl"]})
    parse_spec("videoscore2", template=template, model="somewhere/else")  # nothing is loaded


def test_what_is_no_video_or_cannot_be_one_is_refused(vlm, folders):
    def asked(part: torch.Tensor) -> list[Message]:
        return [Message("user", (part, "?"))]

    with pytest.raises(
        ValueError, match=r"video: got \(2, 3, 56, 56\) for a model of type 'qwen3_vl', expected one of"
    ):
        VLM(folders["qwen3_vl"]).prompt(asked(frames(2, 2, 2, 0)))
    for odd in (torch.zeros(2, 1, 28, 28), torch.zeros(0, 3, 28, 28), torch.zeros(1, 2, 3, 28, 28)):
        with pytest.raises(ValueError, match=r"expected floats \(3, H, W\), or a video \(F, 3, H, W\)"):
            vlm.prompt(asked(odd))
    with pytest.raises(ValueError, match="fps: got 0, expected a number above 0"):
        VLM(folders["qwen2_5_vl"], fps=0)
    with pytest.raises(ValueError, match="1 places for 0 pictures and 1 for 1 videos"):
        vlm.prompt([Message("user", (frames(2, 1, 2, 0), "<|image_pad|>"))])
