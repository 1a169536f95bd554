import numpy as np
import pytest
import tiny_hf
import torch
import torch.nn.functional as F
from tiny_clip import save_tiny_clip

from visalign.images import images_to_pil
from visalign.rewards import RewardError, score
from visalign.rewards.embedding.encoder import ClipEncoder
from visalign.rewards.verifiers.detector import Detection, TransformersDetector, canonical, mask_box
from visalign.rewards.verifiers.geneval import ClipColours, GenevalReward, crop_object
from visalign.rewards.verifiers.geneval_rules import (
    COLOURS,
    box_iou,
    check_metadata,
    judge_objects,
    keep_objects,
    relations,
    tag_accuracies,
)

DOG = {"class": "dog", "count": 1}


def found(label: str, x: float = 0, y: float = 0, size: float = 10, score: float = 0.95) -> Detection:
    return Detection(label, score, (x, y, x + size, y + size))


def verdict(detections, metadata, colour="red"):
    return judge_objects(keep_objects(detections, 0.3), metadata, lambda objects, name: [colour] * len(objects))


# Objects and relations


def test_kept_are_those_above_the_threshold_surest_first_and_no_more_than_asked():
    scores = (0.3, 0.31, 0.9, 0.5)
    kept = keep_objects([found("Dog", score=s) for s in scores] + [found("cat", score=0.4)], 0.3, max_objects=2)
    assert [d.score for d in kept["dog"]] == [0.9, 0.5] and len(kept["cat"]) == 1
    assert "dog" not in keep_objects([found("dog", score=0.3)], 0.3)


def test_overlapping_objects_stay_unless_a_bound_is_set():
    pair = [found("dog"), found("dog", x=1, score=0.5), found("dog", x=40, score=0.4)]
    assert len(keep_objects(pair, 0.3)["dog"]) == 3
    assert [d.box[0] for d in keep_objects(pair, 0.3, max_overlap=0.5)["dog"]] == [0, 40]


def test_iou_counts_the_border_pixel():
    assert box_iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert box_iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)  # 5 of 10 columns shared
    assert box_iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0


def test_relations_agree_with_the_formula_in_numpy():
    rng = np.random.default_rng(0)
    for _ in range(300):
        corner, size = rng.uniform(0, 60, (2, 2)), rng.uniform(2, 40, (2, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        o = (boxes[0, :2] + boxes[0, 2:] - boxes[1, :2] - boxes[1, 2:]) / 2
        share = np.sign(o) * np.maximum(np.abs(o) - 0.1 * size.sum(0), 0) / np.linalg.norm(o)
        names = np.array([["left of", "right of"], ["above", "below"]])
        expected = {names[k, int(share[k] > 0)] for k in range(2) if abs(share[k]) > 0.5}
        assert relations(tuple(boxes[0]), tuple(boxes[1])) == expected


def test_relations_turn_round_when_the_two_change_places():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for b in ((30, 0, 40, 10), (0, 30, 10, 40), (30, 30, 40, 40), (30, 12, 40, 22)):
        there = relations((0, 0, 10, 10), b)
        assert {opposite[r] for r in there} == relations(b, (0, 0, 10, 10)) and there


def test_boxes_that_crowd_each_other_have_no_relation():
    assert relations((0, 0, 10, 10), (0, 0, 10, 10)) == set()
    assert relations((0, 0, 10, 10), (2, 0, 12, 10)) == set()  # a tenth of both widths apart
    assert relations((0, 0, 10, 10), (6, 0, 16, 10)) == {"left of"}


# Clauses


def test_strict_wants_at_least_the_count_and_soft_the_exact_one():
    two = {"include": [{"class": "dog", "count": 2}]}
    for number, strict, soft in ((0, False, 0.0), (1, False, 0.5), (2, True, 1.0), (3, True, 0.5), (5, True, 0.0)):
        v = verdict([found("dog", x=20 * k) for k in range(number)], two)
        assert (v.strict, v.soft) == (strict, pytest.approx(soft))


def test_the_soft_score_does_not_go_below_zero():
    v = verdict([found("dog", x=20 * k) for k in range(7)], {"include": [DOG]})
    assert v.count == (-5,) and v.soft == 0


def test_exclude_fails_once_its_count_is_reached_and_has_no_soft_term():
    metadata = {"include": [DOG], "exclude": [{"class": "dog", "count": 2}]}
    assert verdict([found("dog")], metadata).strict
    v = verdict([found("dog"), found("dog", x=30)], metadata)
    assert not v.strict and v.count == (0,) and "fewer than 2" in v.reasons[0]


def test_all_clauses_are_needed():
    metadata = {"include": [DOG, {"class": "cat", "count": 1}]}
    assert verdict([found("dog"), found("cat", x=30)], metadata).strict
    v = verdict([found("dog")], metadata)
    assert not v.strict and v.soft == 0.5


def test_colour_counts_the_objects_of_that_colour():
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    dogs = [found("dog"), found("dog", x=30, score=0.5)]

    def colours(objects, name):
        assert name == "dog" and [d.score for d in objects] == [0.95, 0.5]
        return ["red", "blue"]

    v = judge_objects(keep_objects(dogs, 0.3), metadata, colours)
    assert not v.strict and v.colour == (0.5,) and v.soft == 0.75
    assert verdict(dogs, metadata, "red").soft == 1 and verdict(dogs, metadata, "red").strict


def test_strict_colour_looks_at_the_surest_objects_only():
    metadata = {"include": [{**DOG, "color": "red"}]}
    dogs = {"dog": [found("dog"), found("dog", x=30)]}
    assert judge_objects(dogs, metadata, lambda objects, _: ["red"] if len(objects) == 1 else ["blue"] * 2).strict


def test_an_unmet_count_zeroes_its_colour_and_position_terms():
    metadata = {"include": [DOG, {"class": "cat", "count": 1, "color": "red", "position": ["right of", 0]}]}
    v = verdict([found("dog")], metadata)
    assert v.count == (1, 0) and v.colour == (0,) and v.position == (0,) and v.soft == 0.25
    crowded = verdict([found("dog"), found("cat", x=40), found("cat", x=60)], metadata)
    assert crowded.colour == (0,) and crowded.position == (0,) and crowded.strict  # two cats are at least one


def test_position_is_of_each_object_to_each_of_the_target():
    metadata = {"include": [{"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
    assert verdict([found("dog"), found("dog", y=15), found("cat", x=50)], metadata).soft == 1
    v = verdict([found("dog"), found("dog", x=80), found("cat", x=50)], metadata)
    assert not v.strict and v.position == (0,) and v.soft == pytest.approx(2 / 3)


def test_position_fails_without_a_matched_target():
    metadata = {"include": [{**DOG, "color": "blue"}, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
    v = verdict([found("dog"), found("cat", x=50)], metadata, "red")
    assert not v.strict and v.position == (0,) and len(v.reasons) == 2


def test_tag_accuracies_weigh_tags_alike():
    metadata = [{"tag": "counting"}] * 3 + [{"tag": "colors"}]
    table = tag_accuracies(torch.tensor([1.0, 0.0, 0.0, 1.0]), metadata)
    assert table == {"counting": pytest.approx(1 / 3), "colors": 1, "overall": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "expected {'tag'"),
        (
            {"include": [{"class": "dog"}]},
            "include 0: got {'class': 'dog'}, expected a mapping with 'class' and 'count'",
        ),
        ({"include": [{"class": "dog", "count": 0}]}, "got count 0, expected an integer >= 1"),
        ({"include": [{**DOG, "color": "rad"}]}, "did you mean 'red'"),
        ({"include": [DOG, {**DOG, "position": ["left", 0]}]}, "did you mean 'left of'"),
        ({"include": [{**DOG, "position": ["left of", 0]}]}, "position names clause 0, expected one before it"),
        ({"include": [{"class": "dgo", "count": 1}]}, "did you mean 'dog'"),
    ],
)
def test_metadata_that_cannot_be_checked_is_refused(metadata, message):
    with pytest.raises(ValueError) as error:
        check_metadata(metadata, frozenset({"dog", "cat"}))
    assert message in str(error.value)


def test_genevals_names_are_those_of_coco():
    assert canonical("Computer_Mouse") == "mouse" and canonical("dining-table") == canonical("diningtable")


# Colours


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return ClipEncoder(str(save_tiny_clip(tmp_path_factory.mktemp("clip"))))


def test_a_crop_is_grey_outside_the_mask_and_never_empty():
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 10:16] = True
    crop = crop_object(image, Detection("dog", 1.0, (8.4, 5, 16, 9), mask))
    assert crop.shape == (3, 4, 8)
    assert torch.equal(crop[:, :, 2:], image[:, 5:9, 10:16]) and (crop[:, :, :2] == 0x99 / 255).all()
    assert torch.equal(crop_object(image, found("dog", 4, 3)), image[:, 3:13, 4:14])
    assert crop_object(image, Detection("dog", 1.0, (40, -5, 40.2, 0))).shape == (3, 1, 1)


def test_colours_are_the_nearest_mean_of_three_normalised_templates(encoder):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 64, 64, generator=generator)
    objects = [found("tree", *torch.randint(0, 40, (2,), generator=generator).tolist(), 12 + k) for k in range(6)]
    expected = []
    for d in objects:
        features = encoder.embed_images(crop_object(image, d)[None])[0].numpy()
        means = []
        for c in COLOURS:
            texts = [f"a photo of a {c} tree", f"a photo of a {c}-colored tree", f"a photo of a {c} object"]
            mean = encoder.embed_texts(texts).numpy().mean(0)
            means.append(mean / np.linalg.norm(mean))
        expected.append(COLOURS[int(np.argmax(np.stack(means) @ features))])
    assert ClipColours(encoder)(image, objects, "tree") == expected


# The reward


class Scripted:
    """Detections by the picture's first pixel: its red value in tenths picks the list."""

    labels = frozenset({"dog", "cat"})

    def __init__(self, *lists):
        self.lists = lists

    def __call__(self, images):
        return [self.lists[round(float(image[0, 0, 0]) * 10)] for image in images]


def pictures(*tenths):
    return torch.stack([torch.full((3, 8, 8), t / 10) for t in tenths])


def test_the_reward_judges_each_picture_by_its_own_metadata():
    detector = Scripted([found("dog")], [found("dog", score=0.8), found("dog", x=30)], [])
    metadata = [{"tag": "single_object", "include": [DOG]}] * 3 + [{"tag": "counting", "include": [DOG]}]
    context = {"metadata": metadata}
    reward = GenevalReward(detector, colours=lambda *_: [])
    result = score(reward, pictures(0, 1, 2, 1), [""] * 4, context)
    assert result.total.tolist() == [1, 0, 0, 1]  # when counting, the one at 0.8 is not sure enough
    output = result.outputs["geneval"]
    assert output.criteria["strict"].tolist() == [1, 1, 0, 1] and output.criteria["colour"].isnan().all()
    assert output.rationale == [None, None, "0 dog, expected 1", None]
    strict = GenevalReward(detector, strict=True, colours=lambda *_: [])
    assert score(strict, pictures(0, 1, 2, 1), [""] * 4, context).total.tolist() == [1, 1, 0, 1]
    singles = [score(reward, pictures(t), [""], {"metadata": [m]}).total[0] for t, m in zip((0, 1, 2, 1), metadata)]
    assert torch.equal(torch.stack(singles), result.total)


def test_the_reward_names_what_it_cannot_check():
    reward = GenevalReward(Scripted([]), colours=lambda *_: [])
    with pytest.raises(RewardError, match="sample 0, prompt 'a cow': include 0: class .*did you mean 'cat'"):
        score(reward, pictures(0), ["a cow"], {"metadata": [{"include": [{"class": "catt", "count": 1}]}]})
    with pytest.raises(RewardError, match="got a context without 'metadata'"):
        score(reward, pictures(0), [""])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 2}, "threshold: got 2, expected a number in [0, 1]"),
        ({"max_objects": 0}, "max_objects: got 0, expected >= 1"),
        ({"detector": "nowhere:thing"}, "detector: could not import 'nowhere:thing'"),
        ({"detector": "/no/such/folder"}, "could not load '/no/such/folder'"),
        ({"colours": None, "colour_pretrained": None}, "pretrained: got None for model 'ViT-L-14'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        GenevalReward(**{"detector": Scripted(), "colours": lambda *_: [], **options})
    assert message in str(error.value)


# Detectors of transformers


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    return tiny_hf.save_mask2former(tmp_path_factory.mktemp("mask2former"))


def noise(number, height=48, width=64):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(2))


def test_mask2former_gives_masks_labels_and_scores_as_computed_by_hand(mask2former):
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    images = noise(2)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    inputs = AutoImageProcessor.from_pretrained(mask2former)(images=images_to_pil(images), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    detector = TransformersDetector(str(mask2former), threshold=0.05)
    assert detector.labels == {"dog", "airplane", "tv"}
    for n, detections in enumerate(detector(images)):
        logits = F.interpolate(outputs.masks_queries_logits[n : n + 1], (384, 384), mode="bilinear")[0]
        probability = outputs.class_queries_logits[n].softmax(-1)[:, :-1]
        best, index = probability.flatten().topk(6)  # as many as there are queries
        expected = []
        for p, k in zip(best, index):
            mask = logits[k // 3] > 0
            if mask.any() and (value := p * logits[k // 3].sigmoid()[mask].mean()) >= 0.05:
                small = F.interpolate(mask[None, None].float(), (48, 64), mode="nearest")[0, 0].bool()
                if small.any():
                    expected.append((float(value), ("dog", "airplane", "tv")[int(k % 3)], small))
        expected.sort(key=lambda e: -e[0])
        detections = sorted(detections, key=lambda d: -d.score)
        assert len(detections) == len(expected) > 0
        for d, (value, label, mask) in zip(detections, expected):
            assert d.score == pytest.approx(value, abs=1e-5) and d.label == label and torch.equal(d.mask, mask)
            ys, xs = np.nonzero(mask.numpy())
            assert d.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == mask_box(mask)


def test_geneval_runs_on_a_mask2former_folder_and_batches_as_singles(mask2former, tmp_path):
    clip = save_tiny_clip(tmp_path / "clip")
    options = {"colour_model": str(clip), "colour_pretrained": None, "threshold": 0.05, "counting_threshold": 0.05}
    reward = GenevalReward(str(mask2former), **options)
    images = noise(3)
    metadata = [
        {"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"}]} for name in ("dog", "tv", "dog")
    ]
    whole = score(reward, images, [""] * 3, {"metadata": metadata})
    for n in range(3):
        single = score(reward, images[n : n + 1], [""], {"metadata": metadata[n : n + 1]})
        assert single.total[0] == whole.total[n]
    with pytest.raises(RewardError, match="class .as the detector knows them.: got 'zebra'"):
        score(reward, images[:1], [""], {"metadata": [{"include": [{"class": "zebra", "count": 1}]}]})


def test_a_model_for_object_detection_gives_boxes(tmp_path):
    from transformers import AutoImageProcessor, YolosConfig, YolosForObjectDetection, YolosImageProcessor

    shape = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_detection_tokens=5
    )
    config = YolosConfig(image_size=[32, 32], patch_size=8, id2label=tiny_hf.LABELS, label2id={}, **shape)
    torch.manual_seed(0)
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = noise(1)
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(images=images_to_pil(images), return_tensors="pt")
    with torch.no_grad():
        outputs = YolosForObjectDetection.from_pretrained(tmp_path).eval()(pixel_values=inputs["pixel_values"])
    value, label = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    x, y, w, h = outputs.pred_boxes[0].unbind(-1)
    corners = torch.stack([(x - w / 2) * 64, (y - h / 2) * 48, (x + w / 2) * 64, (y + h / 2) * 48], -1)
    detections = TransformersDetector(str(tmp_path), threshold=0.0)(images)[0]
    assert len(detections) == 5
    for k, d in enumerate(detections):
        assert d.score == pytest.approx(float(value[k]), abs=1e-5) and d.mask is None
        assert d.label == ("dog", "airplane", "tv")[int(label[k])]
        assert d.box == pytest.approx(corners[k].tolist(), abs=1e-3)


def test_a_model_that_finds_no_objects_is_refused(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    ViTForImageClassification(ViTConfig(patch_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture ViTForImageClassification, expected one for object detection"):
        TransformersDetector(str(tmp_path))
