"""Questions whose answers are known: they agree with the judge, and the small model's inputs with its processor's."""

import numpy as np
import pytest
import torch

from visalign.images import images_to_pil
from visalign.worlds.shapes.building.tasks import make_task
from visalign.worlds.shapes.building.vlm_tasks import AsideLosses, batch_of, conversation, side_of, turns
from visalign.worlds.shapes.captions import parse
from visalign.worlds.shapes.judge import judge
from visalign.worlds.shapes.questions import DESCRIBE, Question, ask, match_question, relation_question
from visalign.worlds.shapes.scenes import COLOURS, SHAPES, Spec
from visalign.worlds.shapes.vlm import make_processor, make_vlm, merge_order, patches


@pytest.fixture(scope="module")
def task():
    return make_task(40, np.random.default_rng(0))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_match_questions_are_answered_as_the_strict_judge_does(task):
    rng = np.random.default_rng(1)
    images, differ = task.pictures.float() / 255, 0
    for k, spec in enumerate(task.specs):
        for said in (spec, task.specs[k ^ 1]):
            question = match_question(spec, said, rng)
            differ += judge(images[k], said).strict != (question.answer == "Yes")
    assert differ <= 2  # a picture drawn for "left of" may also stand "above", by the judge's margin


def test_questions_about_objects_counts_and_relations_are_true_of_the_picture(task):
    rng, kinds = np.random.default_rng(2), set()
    for k, spec in enumerate(task.specs * 10):
        question = ask(spec, task.specs[k % 80 ^ 1], rng)
        kinds.add(question.kind)
        have = {(c, s): n for c, s, n in spec.groups}
        words = question.text.removesuffix(" in the picture?").split()
        if question.kind == "object":
            assert ((words[-2], words[-1]) in have) == (question.answer == "Yes")
        if question.kind == "count":
            number = {"one": 1, "two": 2, "three": 3, "four": 4}[words[3]]
            assert (have[words[4], words[5].removesuffix("s")] == number) == (question.answer == "Yes")
        if question.kind == "describe":
            assert question.text == DESCRIBE and parse(question.answer).groups == spec.groups
    assert kinds == {"match", "object", "shape", "colour", "count", "relation", "describe"}


def test_a_relation_question_says_yes_to_the_relation_and_no_to_its_opposite(task):
    rng = np.random.default_rng(3)
    spec = next(s for s in task.specs if s.relation == "left of")
    (c0, s0, _), (c1, s1, _) = spec.groups
    texts = {(q.text, q.answer) for q in (relation_question(spec, rng) for _ in range(50))}
    assert texts == {
        (f"Is the {c0} {s0} left of the {c1} {s1}?", "Yes"),
        (f"Is the {c1} {s1} right of the {c0} {s0}?", "Yes"),
        (f"Is the {c0} {s0} right of the {c1} {s1}?", "No"),
        (f"Is the {c1} {s1} left of the {c0} {s0}?", "No"),
    }


def test_patches_are_those_of_the_processor_and_labels_follow_their_order(task, processor):
    images = task.pictures[:3].float() / 255
    theirs = processor.image_processor(images_to_pil(images), return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 8]] * 3
    torch.testing.assert_close(patches(images * 2 - 1), theirs["pixel_values"], atol=1e-5, rtol=0)
    places = torch.arange(64).view(1, 64)  # a picture whose patches hold their own number
    numbered = (places.view(1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)).expand(1, 3, 64, 64).float()
    assert torch.equal(patches(numbered)[:, 0].long(), merge_order(places)[0])


def test_a_conversation_is_the_chat_templates_and_only_answers_are_taught(processor):
    ids, labels = conversation(processor, [Question("match", "What?", "Yes"), Question("match", "And?", "No")], 1)
    turns_ = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "No"},
    ]
    text = processor.apply_chat_template(turns_, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert ids == processor.tokenizer(text)["input_ids"]
    taught = processor.tokenizer.decode([i for i, label in zip(ids, labels) if label != -100])
    assert taught == "Yes<|im_end|>No<|im_end|>"


def test_answers_do_not_depend_on_what_shares_the_batch(task, processor):
    torch.manual_seed(0)
    model, rng = make_vlm(processor, width=64, layers=2).eval(), np.random.default_rng(4)
    asked, shown, counts = turns(task, list(range(12)), rng)
    pixels = patches(task.pictures[[max(k, 0) for k in shown]].float() / 127.5 - 1)
    grids = torch.tensor([[1, 8, 8]] * len(shown))
    with torch.no_grad():
        inputs, labels = batch_of(processor, asked, counts)
        together = model(**inputs, pixel_values=pixels, image_grid_thw=grids).logits
        inputs, alone_labels = batch_of(processor, asked[:1], counts[:1])
        alone = model(**inputs, pixel_values=pixels[: 64 * counts[0]], image_grid_thw=grids[: counts[0]]).logits
    length = inputs["input_ids"].shape[1]
    assert torch.equal(labels[0, :length], alone_labels[0])
    torch.testing.assert_close(together[0, :length], alone[0], atol=1e-4, rtol=1e-4)


def test_named_objects_are_marked_where_their_name_ends(processor):
    aside = AsideLosses(make_vlm(processor, width=64, layers=2), processor)
    text = 'Does this figure show "two red circles and an orange star"? Is the square blue left of the blue square?'
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    marked = aside.named(ids)[0]
    found = {processor.tokenizer.decode([ids[0, k]]).strip(): int(marked[k]) for k in (marked >= 0).nonzero().flatten()}
    cell = {f"{c} {s}": k * 4 + j for k, c in enumerate(COLOURS) for j, s in enumerate(SHAPES)}
    assert found == {"circles": cell["red circle"], "star": cell["orange star"], "square": cell["blue square"]}


def test_sides_are_those_of_the_relation_from_either_object():
    spec = Spec((("red", "circle", 1), ("blue", "star", 1)), "left of")
    red, blue = (list(COLOURS).index(c) * 4 + SHAPES.index(s) for c, s in (("red", "circle"), ("blue", "star")))
    assert [side_of(spec, red), side_of(spec, blue), side_of(spec, red + 1)] == [0, 1, -100]  # left of, right of
    assert side_of(Spec(spec.groups), red) == -100


def test_the_losses_beside_the_answers_vanish_for_heads_that_know(task, processor):
    """Counts and sides: hidden states that hold the truth, read by heads that look at it, cost nothing."""
    model = make_vlm(processor, width=64, layers=2)
    aside, rng = AsideLosses(model, processor), np.random.default_rng(5)
    rows = [k for k, spec in enumerate(task.specs) if spec.relation][:6]
    asked = [[ask(task.specs[k], task.specs[k ^ 1], rng) for _ in range(3)] for k in rows]
    ids = batch_of(processor, asked, [1] * len(rows))[0]["input_ids"]
    words = torch.zeros(*ids.shape, 64)
    for n, k in enumerate(rows):
        there = {list(COLOURS).index(c) * 4 + SHAPES.index(s): count for c, s, count in task.specs[k].groups}
        for place, cell in enumerate(aside.named(ids)[n].tolist()):
            if cell >= 0:
                words[n, place, there.get(cell, 0)] = 100
                if (side := side_of(task.specs[k], cell)) >= 0:
                    words[n, place, 8 + side] = 100
    with torch.no_grad():
        for head, first in ((aside.count, 0), (aside.side, 8)):
            head.weight.zero_()
            head.weight[:, first : first + len(head.weight)] = torch.eye(len(head.weight))
            head.bias.zero_()
        aside.seen = {"patches": torch.zeros(len(rows) * 64, 64), "merged": torch.zeros(len(rows) * 16, 64)}
        aside.seen["words"] = words
        losses = aside(task, rows, [1] * len(rows), ids)
    assert losses["counts"] < 1e-6 and losses["sides"] < 1e-6
    assert losses["patches"].item() == pytest.approx(np.log(25), abs=0.5)  # a head that knows nothing
