import math

import numpy as np
import pytest
import torch
from tiny_vlm import FAMILIES, save_tiny_vlm

from visalign.images import images_to_pil
from visalign.rewards.vlm.chat import Message
from visalign.rewards.vlm.local_chat import LocalChat
from visalign.rewards.vlm.model import VLM
from visalign.rewards.vlm.qwen_patches import smart_resize
from visalign.rewards.vlm.shared_prefix import common_length
from visalign.rewards.vlm.yes_token import YesNo, token_log_probs


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request, tmp_path_factory) -> VLM:
    return VLM(str(save_tiny_vlm(tmp_path_factory.mktemp(request.param), request.param)))


def picture(vlm: VLM, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random 8-bit levels at a size that no processor changes."""
    side = vlm.vision.patches.patch * vlm.vision.patches.merge
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, rows * side, columns * side), generator=generator).float() / 255


def questions(vlm: VLM) -> list[list[Message]]:
    """A reference before four candidates of three sizes, and questions of different lengths."""
    reference = picture(vlm, 2, 2, 0)
    candidates = [picture(vlm, 2, 2, 1), picture(vlm, 2, 3, 2), picture(vlm, 1, 2, 3), picture(vlm, 2, 2, 4)]
    return [
        [Message("system", ("judge",)), Message("user", ("1: ", reference, " 2: ", c, f"better{'!' * k}?"))]
        for k, c in enumerate(candidates)
    ]


def naive_logits(vlm: VLM, conversation: list[Message], more: str = "") -> torch.Tensor:
    """The model's own forward on its own processor's output, one conversation at a time: (T, vocabulary)."""
    pixels = [part for m in conversation for part in m.parts if isinstance(part, torch.Tensor)]
    pil = [images_to_pil(p[None])[0] for p in pixels]
    inputs = vlm.processor(text=[vlm.render(conversation) + more], images=pil or None, return_tensors="pt")
    with torch.no_grad():
        return vlm.model(**inputs).logits[0]


def test_answers_are_those_of_the_whole_model_in_each_convention(vlm):
    conversations = questions(vlm)
    last = torch.stack([naive_logits(vlm, c)[-1] for c in conversations]).double()
    yes, no = (vlm.tokenizer.encode(word)[0] for word in ("Yes", "No"))
    words = [vlm.tokenizer.decode([k]).strip().lower() for k in range(last.shape[1])]
    p = last.softmax(dim=1)
    canonical_yes = p[:, [k for k, word in enumerate(words) if word == "yes"]].sum(dim=1)
    canonical_no = p[:, [k for k, word in enumerate(words) if word == "no"]].sum(dim=1)
    expected = {
        "full": p[:, yes],
        "binary": (last[:, yes] - last[:, no]).sigmoid(),
        "canonical": canonical_yes / (canonical_yes + canonical_no),
    }
    assert (canonical_yes > p[:, yes] + 1e-9).all()  # there are several variants
    found = {name: YesNo(vlm, convention=name)(conversations) for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].probability.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["binary"].log_odds.double(), last[:, yes] - last[:, no], rtol=0, atol=2e-5)
    assert (found["full"].probability <= found["binary"].probability).all()
    assert torch.equal(found["binary"].probability, YesNo(vlm)(conversations).probability)  # nothing is drawn


def test_sharing_a_prefix_changes_nothing_and_batches_score_as_singles(vlm, monkeypatch):
    conversations = questions(vlm)
    conversations += [
        [Message("user", (p, f"q{k}"))] for p in (picture(vlm, 2, 2, 5), picture(vlm, 1, 2, 6)) for k in range(3)
    ]
    prompts = [vlm.prompt(c) for c in conversations]
    shared = vlm.hidden(prompts, keep=3)
    singles = torch.cat([vlm.hidden([p], keep=3) for p in prompts])
    monkeypatch.setattr(vlm, "share_prefix", False)
    whole = vlm.hidden(prompts, keep=3)
    torch.testing.assert_close(shared, whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(shared, singles, rtol=0, atol=2e-5)
    monkeypatch.setattr(vlm, "share_prefix", True)
    monkeypatch.setattr(vlm, "batch_size", 3)
    torch.testing.assert_close(vlm.hidden(prompts, keep=3), whole, rtol=0, atol=2e-5)


def test_shared_tokens_run_once(vlm, monkeypatch):
    seen = []
    forward = type(vlm.base.language_model).forward

    def counted(self, **kwargs):
        seen.append(kwargs["inputs_embeds"].shape[:2].numel())
        return forward(self, **kwargs)

    p = picture(vlm, 3, 3, 0)
    prompts = [vlm.prompt([Message("user", (p, f"question {k}?"))]) for k in range(8)]
    monkeypatch.setattr(type(vlm.base.language_model), "forward", counted)
    vlm.hidden(prompts)
    shared = sum(seen)
    seen.clear()
    monkeypatch.setattr(vlm, "share_prefix", False)
    vlm.hidden(prompts)
    length, trunk = len(prompts[0].ids), common_length(prompts, keep=1)
    assert trunk > 15 and shared == trunk + 8 * (length - trunk) and sum(seen) == 8 * length


def test_vision_outputs_are_kept_by_content(vlm, monkeypatch):
    vlm._seen.clear()
    calls = []
    look = vlm._look
    monkeypatch.setattr(vlm, "_look", lambda pictures, graph: calls.append(len(pictures)) or look(pictures, graph))
    first = YesNo(vlm)(questions(vlm))
    again = YesNo(vlm)(questions(vlm))  # equal pictures, other tensors
    assert sum(calls) == 5 and torch.equal(first.probability, again.probability)
    monkeypatch.setattr(vlm, "_picture_cache", 2)
    YesNo(vlm)(questions(vlm))
    assert len(vlm._seen) == 2


def test_gradients_reach_the_pixels_and_agree_with_finite_differences(vlm):
    reference = picture(vlm, 1, 2, 0).requires_grad_()
    candidate = (0.2 + 0.6 * picture(vlm, 1, 2, 1)).requires_grad_()
    judge = YesNo(vlm)

    def odds(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return judge([[Message("user", (r, x, "better?"))], [Message("user", (r, x, "sharper?"))]]).log_odds.sum()

    (gradient,) = torch.autograd.grad(odds(candidate, reference.detach()), candidate)
    with torch.no_grad():
        step = gradient / gradient.norm() * 1e-2
        slope = (odds(candidate + step, reference) - odds(candidate - step, reference)) / 2e-2
    assert gradient.norm() > 1e-4
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.05, atol=0)
    assert all(weight.grad is None for weight in vlm.model.parameters())
    whole = VLM.of(vlm.model, vlm.processor, gradient_checkpointing=True)
    try:
        judge = YesNo(whole)
        (other,) = torch.autograd.grad(odds(candidate, reference.detach()), candidate)
    finally:
        vlm.model.gradient_checkpointing_disable()
        vlm.model.eval()
    torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-6)


def test_patches_are_those_of_the_processor(vlm):
    for height, width in ((120, 90), (300, 40), (20, 20), (64, 200)):
        pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        smooth = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)  # differences are 8-bit rounding, not overshoot
        made = vlm.processor.image_processor(images_to_pil(smooth), return_tensors="pt")
        mine = vlm.vision.patches(smooth)[0]
        assert made["image_grid_thw"].tolist() == [list(vlm.vision.patches.grid(height, width))]
        levels = (mine - made["pixel_values"]).abs() * min(vlm.vision.patches.std)
        assert levels.max() < 2e-2 and levels.mean() < 2 / 255


def test_smart_resize_keeps_the_budget_and_the_factor():
    assert smart_resize(100, 200, 28, 56 * 56, 10**7) == (112, 196)
    assert smart_resize(1000, 1000, 28, 56 * 56, 28 * 28 * 16) == (112, 112)
    assert smart_resize(20, 20, 28, 56 * 56, 10**7) == (56, 56)
    assert smart_resize(448, 448, 28, 200704, 200704) == (448, 448)
    for height, width in ((900, 300), (31, 555), (700, 900)):
        h, w = smart_resize(height, width, 28, 4 * 784, 64 * 784)
        assert h % 28 == w % 28 == 0 and h * w <= 64 * 784
    with pytest.raises(ValueError, match="picture: got 2001 x 10 pixels, expected an aspect ratio of at most 200"):
        smart_resize(10, 2001, 28, 1, 10**9)


def test_left_padding_leaves_scores_as_they_are(vlm):
    """The same question, next to a short one and next to a far longer one."""
    p = picture(vlm, 2, 2, 0)
    asked = vlm.prompt([Message("user", (p, "is it good?"))])
    for other in ("?", "is it good " * 30):
        both = vlm.hidden([asked, vlm.prompt([Message("user", (other,))])])
        torch.testing.assert_close(both[:1], vlm.hidden([asked]), rtol=0, atol=2e-5)


def test_a_label_is_scored_as_the_whole_model_scores_it(vlm):
    conversations, label = questions(vlm)[:2], "a red circle"
    prompts = [vlm.prompt(c) for c in conversations]
    ids = [vlm.tokenizer.encode(label), vlm.tokenizer.encode("a")]
    found = token_log_probs(vlm, prompts, ids, chunk=3)
    for n, (conversation, row) in enumerate(zip(conversations, ids)):
        logits = naive_logits(vlm, conversation, vlm.tokenizer.decode(row))
        expected = logits.log_softmax(dim=-1)[range(len(logits) - len(row) - 1, len(logits) - 1), row]
        torch.testing.assert_close(found[n, : len(row)], expected, rtol=0, atol=2e-5)
        assert (found[n, len(row) :] == 0).all()


def test_answers_of_several_tokens_are_teacher_forced(vlm):
    conversation = questions(vlm)[0]
    long = "Yes indeed"
    ids = vlm.tokenizer.encode(long)
    assert len(ids) > 1
    logits = naive_logits(vlm, conversation, long).log_softmax(dim=-1)
    expected = logits[range(len(logits) - len(ids) - 1, len(logits) - 1), ids].mean().exp()
    found = YesNo(vlm, yes=long, convention="full")([conversation]).probability
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)


def test_soft_capped_logits_are_capped_before_they_are_compared(vlm, monkeypatch):
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 20
    plain = vlm.head(hidden)
    monkeypatch.setattr(vlm.model.config.get_text_config(), "final_logit_softcapping", 3.0, raising=False)
    rows = torch.tensor([5, 7])
    np.testing.assert_allclose(vlm.head(hidden, rows), 3 * np.tanh(plain[:, rows].numpy() / 3), rtol=1e-5)


def test_bf16_agrees_with_float32_and_its_softmax_is_float32(vlm):
    exact = YesNo(vlm, convention="full")(questions(vlm)).probability
    try:
        vlm._seen.clear()
        vlm.model.bfloat16()
        rough = YesNo(vlm, convention="full")(questions(vlm))
    finally:
        vlm._seen.clear()
        vlm.model.float()
    assert rough.probability.dtype == torch.float32
    torch.testing.assert_close(rough.probability, exact, rtol=0, atol=2e-2)


def test_chat_generates_what_the_model_generates(vlm):
    conversations = questions(vlm)
    chat = LocalChat(vlm)
    replies = chat(conversations, max_tokens=5, top_logprobs=4)
    for conversation, reply in zip(conversations, replies):
        pixels = [part for m in conversation for part in m.parts if isinstance(part, torch.Tensor)]
        inputs = vlm.processor(
            text=[vlm.render(conversation)], images=[images_to_pil(p[None])[0] for p in pixels], return_tensors="pt"
        )
        with torch.no_grad():
            made = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply.error is None and reply.text == vlm.tokenizer.decode(made, skip_special_tokens=True)
        first = naive_logits(vlm, conversation)[-1].log_softmax(dim=-1)
        assert reply.tokens[0].log_prob == pytest.approx(float(first.max()), abs=1e-4)
        assert len(reply.tokens[0].top) <= 4 and max(reply.tokens[0].top.values()) == pytest.approx(
            float(first.max()), abs=1e-4
        )


def test_draws_repeat_with_a_seed_and_do_not_depend_on_the_batch(vlm):
    conversations, chat = questions(vlm), LocalChat(vlm)
    options = {"max_tokens": 6, "temperature": 1.5, "top_p": 0.95}
    together = chat(conversations, seed=3, **options)
    alone = [chat([c], seed=3, **options)[0] for c in conversations]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.text for r in together] != [r.text for r in chat(conversations, seed=4, **options)]


def test_a_conversation_that_fails_does_not_spoil_its_neighbours_answers(vlm):
    first, *rest = questions(vlm)
    bad = [Message("user", (torch.zeros(1, 8, 8), "?"))]
    options = {"max_tokens": 5, "temperature": 1.5, "seed": 3}
    assert vlm.batch_size > len(rest) + 1  # all in one batch
    replies = LocalChat(vlm)([first, bad, *rest], **options)
    failed = replies.pop(1)
    assert failed.text == "" and "expected floats (3, H, W)" in failed.error
    assert [r.error for r in replies] == [None] * len(replies)
    assert [r.text for r in replies] == [r.text for r in LocalChat(vlm)([first, *rest], **options)]


def test_a_conversation_that_fails_says_so_and_bad_options_are_refused(vlm, tmp_path):
    bad = [Message("user", (torch.zeros(1, 8, 8), "?"))]
    reply = LocalChat(vlm)([bad], max_tokens=2)[0]
    assert "picture: got torch.float32 (1, 8, 8), expected floats (3, H, W)" in reply.error
    with pytest.raises(ValueError, match="places for 1 pictures"):
        vlm.prompt([Message("user", (picture(vlm, 1, 2, 0), "<|image_pad|>"))])
    with pytest.raises(ValueError, match=r"temperature -1, top_p 1.0.*expected temperature >= 0"):
        LocalChat(vlm)([bad], max_tokens=2, temperature=-1)
    with pytest.raises(ValueError, match="model: could not load .*pass download=True"):
        VLM(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="dtype: got 'int8', expected one of"):
        VLM("x", dtype="int8")
    with pytest.raises(ValueError, match="convention: got 'odd', expected one of"):
        YesNo(vlm, convention="odd")


def test_draws_follow_the_models_distribution():
    from visalign.rewards.vlm.local_chat import _Draw

    scores = torch.tensor([[2.0, 1.0, 0.0, -3.0]]).expand(4000, -1)
    draw = _Draw(1, temperature=0.5, top_p=0.95, seed=0)
    draw.generators = [torch.Generator().manual_seed(k) for k in range(4000)]
    found = torch.bincount(draw(None, scores).argmax(dim=1), minlength=4) / 4000
    p = torch.tensor([math.exp(4), math.exp(2), 0.0, 0.0])  # temperature 1/2; the third lies past 95 %
    torch.testing.assert_close(found, p / p.sum(), rtol=0, atol=0.025)


def test_other_families_are_read_through_their_own_processor():
    from tiny_vlm import TEMPLATE, make_tokenizer
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(**size, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    processor = LlavaProcessor(images, tokenizer, 14, "default", template, num_additional_image_tokens=1)
    vlm = VLM.of(model, processor)
    pictures = torch.randint(0, 256, (3, 3, 28, 28), generator=torch.Generator().manual_seed(0)) / 255
    conversations = [[Message("user", (p, f"good{'!' * n}?"))] for n, p in enumerate(pictures)]
    last = torch.stack([naive_logits(vlm, c)[-1] for c in conversations])
    expected = last.softmax(dim=1)[:, tokenizer.encode("Yes")[0]]
    judge = YesNo(vlm, convention="full")
    torch.testing.assert_close(judge(conversations).probability, expected, rtol=1e-5, atol=1e-6)
    assert not judge.differentiable
    label = tokenizer.encode("Yes no")
    whole = naive_logits(vlm, conversations[0], "Yes no").log_softmax(dim=-1)
    terms = whole[range(len(whole) - len(label) - 1, len(whole) - 1), label]
    found = token_log_probs(vlm, [vlm.prompt(conversations[0])], [label])[0]
    torch.testing.assert_close(found, terms, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="max_pixels: got a budget for 'model', expected none"):
        VLM.of(model, processor, max_pixels=100)
