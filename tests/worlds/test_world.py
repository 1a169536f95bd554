"""The shapes world: captions and their meanings, splits, drawing, and how well the judge reads."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from visalign.images import images_to_pil, pil_to_images
from visalign.worlds.shapes import world_prompts
from visalign.worlds.shapes.captions import NUMBERS, PREFIXES, RELATION_WORDS, caption, parse
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.judge import judge, read
from visalign.worlds.shapes.scenes import (
    COLOURS,
    HELD_OUT,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZE,
    SPLITS,
    Placed,
    Scene,
    Spec,
    place,
    sample_spec,
)
from visalign.worlds.shapes.text import END, MAX_TOKENS, START, grammar_words, make_tokenizer


def specs(count, seed=0, splits=SPLITS):
    rng = np.random.default_rng(seed)
    return [sample_spec(rng, splits[k % len(splits)], KINDS[k // len(splits) % len(KINDS)]) for k in range(count)], rng


# Captions --------------------------------------------------------------------------------------------------------


def test_every_wording_parses_back_to_its_meaning():
    drawn, rng = specs(1200)
    assert {s.kind for s in drawn} == set(KINDS) and {s.split() for s in drawn} == set(SPLITS)
    for spec in drawn:
        assert parse(caption(spec)) == spec
        text = caption(spec, rng)
        assert parse(text) == spec
        assert parse("  " + text.upper().replace(" ", "  ") + ".") == spec


def test_paraphrases_are_used():
    spec = Spec((("orange", "star", 1), ("red", "square", 1)), "left of")
    rng = np.random.default_rng(0)
    seen = {caption(spec, rng) for _ in range(300)}
    assert len(seen) == len(PREFIXES) * 2 * 2 * len(RELATION_WORDS["left of"])
    assert "an orange star to the left of one red square" in seen and not any("a orange" in t for t in seen)


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a red circle and", "red circle", "a pink circle", "a red circle a blue square", "five red circles",
     "a red circle and a red circle", "a red circle above a blue square above a red star", "xa red circle"],
)  # fmt: skip
def test_what_the_world_cannot_read_is_an_error_with_an_example(text):
    with pytest.raises(ValueError, match="the shapes world cannot read; expected e.g. 'a red circle'"):
        parse(text)


def test_the_key_is_the_same_for_the_same_meaning_only():
    a, b = ("red", "circle", 1), ("blue", "star", 1)
    assert Spec((a, b), "left of").key() == Spec((b, a), "right of").key()
    assert Spec((a, b), "above").key() == Spec((b, a), "below").key()
    assert Spec((a, b)).key() == Spec((b, a)).key()
    different = [Spec((a, b), r) for r in RELATIONS] + [Spec((a, b)), Spec((a,)), Spec((("red", "circle", 2),))]
    assert len({s.key() for s in different}) == len(different)


# Splits ----------------------------------------------------------------------------------------------------------


def test_splits_share_no_meaning_and_held_out_pairs_are_never_trained_on():
    keys = {split: {parse(p).key() for p in world_prompts(split, 300)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    for split in SPLITS:
        for prompt in world_prompts(split, 300, seed=1):
            spec = parse(prompt)
            named = {(colour, shape) for colour, shape, _ in spec.groups}
            assert bool(named & HELD_OUT) == (split == "compositional")
    assert {c for c, _ in HELD_OUT} <= COLOURS.keys() and {s for _, s in HELD_OUT} == set(SHAPES)


def test_prompts_of_the_world_are_repeatable_distinct_and_of_all_kinds():
    prompts = world_prompts("test", 200)
    assert prompts == world_prompts("test", 200) == world_prompts("test", 300)[:200]
    assert prompts != world_prompts("test", 200, seed=1) and len(world_prompts("train", 2000)) == 2000
    assert len({parse(p).key() for p in prompts}) == 200
    assert 400 < len({parse(p).key() for p in world_prompts("test", 500)}) < 500, "few are left: some repeat"
    assert {parse(p).kind for p in prompts} == set(KINDS)
    with pytest.raises(ValueError, match="split: got 'tests', expected one of"):
        world_prompts("tests", 3)


# Drawing ---------------------------------------------------------------------------------------------------------


def test_scenes_keep_their_objects_inside_apart_and_in_relation():
    drawn, rng = specs(300, seed=3)
    for spec in drawn:
        scene = place(spec, rng)
        counts = {(c, s): n for c, s, n in spec.groups}
        assert {k: sum((o.colour, o.shape) == k for o in scene.objects) for k in counts} == counts
        for o in scene.objects:
            assert o.radius <= min(o.x, o.y, SIZE - o.x, SIZE - o.y)
        for a, b in itertools.combinations(scene.objects, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        if spec.relation:
            a, b = scene.objects
            side = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
            assert side[spec.relation] == max(side.values()) > 17


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_drawn_in_their_colour_where_they_are_placed_with_soft_edges(shape):
    scene = Scene((Placed("blue", shape, 20.0, 40.0, 12.0),))
    image = draw([scene])[0]
    background, blue = torch.tensor(scene.background), torch.tensor(COLOURS["blue"])
    torch.testing.assert_close(image[:, 40, 20], blue)
    torch.testing.assert_close(image[:, 5, 60], background)
    coverage = ((image - background[:, None, None]) / (blue - background)[:, None, None]).mean(0)
    soft = (coverage > 0.02) & (coverage < 0.98)
    assert 8 < soft.sum() < 200, "antialiased, over one pixel"
    rows, columns = (coverage > 0.5).nonzero().T
    middle = [(float(x.min()) + float(x.max()) + 1) / 2 for x in (columns, rows)]
    assert middle == pytest.approx([20, 40], abs=1), "the bounding box lies around the place"
    assert coverage.sum() / (math.pi * 12**2) == pytest.approx(0.68, abs=0.25)


def test_a_scene_is_the_same_alone_and_in_any_batch_and_at_twice_the_size():
    drawn, rng = specs(24, seed=5)
    scenes = [place(s, rng) for s in drawn]
    together = draw(scenes)
    assert together.shape == (24, 3, SIZE, SIZE) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    for k in (0, 7, 23):
        assert torch.equal(draw([scenes[k]])[0], together[k])
    half = torch.nn.functional.avg_pool2d(draw(scenes, 2 * SIZE), 2)
    assert (half - together).abs().mean() < 0.01
    assert draw([Scene(())]).shape == (1, 3, SIZE, SIZE)


# The judge -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renders():
    drawn, rng = specs(420, seed=7)
    return drawn, draw([place(s, rng) for s in drawn])


def noisy(images):
    return (images + 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def jpeg(images):
    pictures = []
    for picture in images_to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=75)
        pictures.append(Image.open(buffer).convert("RGB"))
    return pil_to_images(pictures)


@pytest.mark.parametrize("change, wanted", [(lambda x: x, 0.995), (noisy, 0.98), (jpeg, 0.98)])
def test_the_judge_agrees_with_the_truth(renders, change, wanted):
    truths, images = renders
    agreed = [judge(image, spec).strict for image, spec in zip(change(images), truths)]
    assert sum(agreed) / len(agreed) >= wanted


def altered(spec, what):
    (colour, shape, count), *others = spec.groups
    taken = {(c, s) for c, s, _ in spec.groups}
    if what == "colour":
        colour = next(c for c in COLOURS if (c, shape) not in taken)
    elif what == "shape":
        shape = next(s for s in SHAPES if (colour, s) not in taken)
    elif what == "count":
        count += 1
    elif what == "relation":
        opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above")))
        return Spec(spec.groups, opposite[spec.relation])
    elif what == "left out":
        return Spec(spec.groups[1:])
    return Spec(((colour, shape, count), *others), spec.relation)


@pytest.mark.parametrize("what", ["colour", "shape", "count", "relation", "left out"])
def test_the_judge_tells_a_wrong_caption(renders, what):
    pairs = [(s, x) for s, x in zip(*renders)][:150]
    pairs = [(s, x) for s, x in pairs if (s.relation if what == "relation" else True)]
    pairs = [(s, x) for s, x in pairs if len(s.groups) > 1 or what != "left out"]
    verdicts = [judge(image, altered(spec, what)) for spec, image in pairs]
    assert sum(v.strict for v in verdicts) / len(verdicts) <= 0.005
    criterion = {
        "colour": "colours",
        "shape": "colours",
        "count": "counts",
        "relation": "relation",
        "left out": "counts",
    }
    assert sum(v.criteria[criterion[what]] for v in verdicts) / len(verdicts) <= 0.01
    if what in ("count", "relation", "left out"):
        assert sum(v.criteria["colours"] for v in verdicts) / len(verdicts) >= 0.99, "the rest still holds"


def useless_pictures():
    generator, grid = torch.Generator().manual_seed(1), torch.zeros(3, SIZE, SIZE)
    colours = torch.tensor(list(COLOURS.values()))
    for k in range(64):
        grid[:, k // 8 * 8 : k // 8 * 8 + 8, k % 8 * 8 : k % 8 * 8 + 8] = colours[k % 6][:, None, None]
    stripes = colours[torch.arange(SIZE) // 6 % 6].T[:, None].expand(3, SIZE, SIZE)
    return {
        "white": torch.ones(3, SIZE, SIZE),
        "black": torch.zeros(3, SIZE, SIZE),
        "red": colours[0][:, None, None].expand(3, SIZE, SIZE),
        "grid": grid,
        "stripes": stripes,
        "noise": torch.rand(3, SIZE, SIZE, generator=generator),
        "smooth noise": torch.nn.functional.interpolate(
            torch.rand(1, 3, 8, 8, generator=generator), size=SIZE, mode="bicubic"
        )[0].clamp(0, 1),
    }


@pytest.mark.parametrize("name", useless_pictures())
def test_blank_grid_and_noise_pictures_score_low(name):
    image = useless_pictures()[name]
    verdicts = [judge(image, p) for p in world_prompts("test", 60)]  # many: chance hits average out
    assert not any(v.strict for v in verdicts)
    assert sum(v.score for v in verdicts) / len(verdicts) <= 0.1


def figures():
    """Regions of no shape of the world, 64 x 64, drawn at four times the size."""
    places = (torch.arange(4 * SIZE) + 0.5) / 4 - SIZE / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    near, far, radius = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs()), torch.hypot(x, y)
    rising, falling = (x + y).abs(), (x - y).abs()
    masks = {
        "plus": (near < 4) & (far < 12),
        "cross": (torch.minimum(rising, falling) < 5) & (torch.maximum(rising, falling) < 17),
        "ring": (radius < 12) & (radius > 6),
        "corner": (far < 11) & ~((x > -3) & (y < 3)),
        "hourglass": (y.abs() < 11) & (x.abs() < y.abs()),
        "upside-down triangle": (y > -8) & (y < 12) & (x.abs() < 0.58 * (12 - y)),
    }
    return {name: torch.nn.functional.avg_pool2d(mask[None].float(), 4)[0] for name, mask in masks.items()}


@pytest.mark.parametrize("name", figures())
def test_a_figure_that_fits_no_shape_is_an_object_of_unknown_shape(name):
    coverage, red = figures()[name], torch.tensor(COLOURS["red"])[:, None, None]
    picture = 1 - coverage + coverage * red
    assert [(o.colour, o.shape) for o in read(picture)] == [("red", "unknown")]
    assert not any(any(judge(picture, f"a red {shape}").criteria.values()) for shape in SHAPES)


def test_the_judge_reads_places_and_refuses_unusable_pictures():
    objects = (Placed("red", "star", 16.0, 20.0, 11.0), Placed("green", "circle", 46.0, 44.0, 12.0))
    found = read(draw([Scene(objects)])[0])
    assert [(o.colour, o.shape) for o in found] == [("red", "star"), ("green", "circle")]
    for seen, true in zip(found, objects):
        assert (seen.x, seen.y, seen.radius) == pytest.approx((true.x, true.y, true.radius), abs=0.7)
    with pytest.raises(ValueError, match="expected \\(3, H, W\\)"):
        read(torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="NaN"):
        read(torch.full((3, 64, 64), float("nan")))


# Tokens ----------------------------------------------------------------------------------------------------------


def test_every_word_of_the_grammar_is_one_token_and_every_caption_fits():
    tokenizer = make_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    ids = {word: tokenizer(word).input_ids for word in grammar_words()}
    assert all(len(i) == 3 and (i[0], i[2]) == (start, end) for i in ids.values())
    assert len({i[1] for i in ids.values()}) == len(ids)
    words = {w for options in NUMBERS.values() for w in options} | COLOURS.keys() | set(SHAPES) | {"and", "left"}
    assert words <= ids.keys()
    drawn, rng = specs(600, seed=9)
    longest = max(len(tokenizer(caption(s, rng)).input_ids) for s in drawn)
    assert longest <= MAX_TOKENS
    assert end == max(tokenizer.get_vocab().values())
    other = tokenizer("a photo of Zürich").input_ids
    assert tokenizer.unk_token_id not in other[1:-1] or tokenizer.unk_token_id == end


def test_a_relation_must_be_the_main_direction_not_a_little_of_it():
    objects = (Placed("red", "circle", 22.0, 14.0, 11.0), Placed("blue", "square", 30.0, 48.0, 11.0))
    picture = draw([Scene(objects)])[0]
    assert judge(picture, "a red circle above a blue square").strict
    assert not judge(picture, "a red circle left of a blue square").criteria["relation"]
