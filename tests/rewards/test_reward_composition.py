import math

import pytest
import torch

from visalign.rewards import (
    CombinedReward,
    Member,
    RewardError,
    RewardOutput,
    aggregate,
    as_reward,
    make_reward,
    parse_spec,
    score,
)
from visalign.rewards.combine import COMBINERS, read_combine
from visalign.rewards.shaping import TRANSFORMS, read_transforms

IDS = torch.tensor([5, 5, 5, 9, 9, 9])
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = list("abcdef")
FILE = """
import torch
from visalign.rewards import RewardOutput

def bright(images):
    return images.mean(dim=(1, 2, 3))

bright.differentiable, bright.range = True, (0.0, 1.0)

def red(images):
    return 10 * images[:, 0].mean(dim=(1, 2)) ** 3

red.differentiable, red.range = True, (0.0, 10.0)

def doubtful(images):
    return RewardOutput(images.mean(dim=(1, 2, 3)), uncertainty=images[:, 0, 0, 0])
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def rows() -> torch.Tensor:
    return torch.stack([IMAGES.mean(dim=(1, 2, 3)), 10 * IMAGES[:, 0].mean(dim=(1, 2)) ** 3])


def mix(file, combine, weights=(1.0, 1.0), **options):
    terms = [{"name": f"{file}:{name}", "weight": w} for name, w in zip(("bright", "red"), weights)]
    return {"rewards": terms, "combine": combine, **options}


EXPECTED = {
    "weighted": lambda r, w: aggregate.weighted_sum(r, w),
    "log_tamed": lambda r, w: aggregate.log_tamed_sum(r, w, "mean")[0],
    "harmonic": lambda r, w: aggregate.harmonic_mean(r, w),
    "geometric": lambda r, w: aggregate.geometric_mean(r, w),
    "mean": lambda r, w: r.mean(dim=0),
    "min": lambda r, w: r.amin(dim=0),
    "mean_minus_variance": lambda r, w: r.mean(dim=0) - 0.5 * r.var(dim=0),
    "normalised": lambda r, w: aggregate.normalised_sum(r, w, IDS),
    "correlation": lambda r, w: aggregate.correlation_weighted(r, IDS),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_combiner_is_its_aggregate_and_reports_raw_parts(file, name):
    reward = make_reward(mix(file, name))
    result = score(reward, IMAGES, PROMPTS, {"group_ids": IDS})
    torch.testing.assert_close(result.total, EXPECTED[name](rows(), torch.ones(2)).float())
    torch.testing.assert_close(torch.stack([result.parts["bright"], result.parts["red"]]), rows())
    torch.testing.assert_close(result.shaped, rows())
    torch.testing.assert_close(reward(IMAGES, PROMPTS, {"group_ids": IDS}), result.total)
    low, high = reward.range
    assert (result.total >= low - 1e-6).all() and (result.total <= high + 1e-6).all()
    assert reward.output_kind == ("advantages" if name in ("normalised", "correlation") else "scores")


def test_every_combiner_is_tested_here():
    assert set(EXPECTED) | {"gated"} == set(COMBINERS)


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_gathered_from_batches_combine_as_those_of_one_batch(file, name):
    reward = make_reward(mix(file, name))
    whole = score(reward, IMAGES, PROMPTS, {"group_ids": IDS}).total
    halves = [
        score(reward, IMAGES[half], PROMPTS[half], {"group_ids": IDS[half]}).shaped for half in (slice(4), slice(4, 6))
    ]
    torch.testing.assert_close(reward.combine(torch.cat(halves, dim=1), IDS), whole)


@pytest.mark.parametrize("name", EXPECTED)
def test_kind_says_what_must_be_seen_at_once(file, name):
    reward = make_reward(mix(file, name))
    whole = score(reward, IMAGES, PROMPTS, {"group_ids": IDS}).total
    groups = [score(reward, IMAGES[g == IDS], PROMPTS[:3], {"group_ids": IDS[g == IDS]}).total for g in (5, 9)]
    singles = [score(reward, IMAGES[n : n + 1], ["a"], {"group_ids": IDS[n : n + 1]}).total for n in range(6)]
    by_group, alone = (torch.allclose(torch.cat(parts), whole, atol=1e-6) for parts in (groups, singles))
    if reward.kind == "pointwise":
        assert by_group and alone
    elif reward.kind == "groupwise":
        assert by_group and not alone
    assert (name in ("log_tamed", "correlation")) == (reward.kind == "setwise")


def test_a_plain_sum_rounds_as_it_always_did():
    rewards = [as_reward(lambda images, k=k: images[:, k].mean(dim=(1, 2)), str(k)) for k in range(3)]
    weights = (0.7, -0.31, 1.1)
    combined = CombinedReward([Member(r.name, w, r) for r, w in zip(rewards, weights)])
    total = torch.zeros(6)
    for reward, weight in zip(rewards, weights):
        total = total + weight * reward(IMAGES, PROMPTS)
    assert torch.equal(combined(IMAGES, PROMPTS), total) and torch.equal(score(combined, IMAGES, PROMPTS).total, total)
    assert combined.name == "0:0.7+1:-0.31+2:1.1" and combined.kind == "pointwise"


def test_gradients_reach_the_images_through_a_combination_of_differentiable_rewards(file):
    for name in COMBINERS:
        if name == "gated":
            continue
        reward = make_reward(mix(file, name))
        leaf = IMAGES.clone().requires_grad_()
        got = reward(leaf, PROMPTS, {"group_ids": IDS})
        assert got.requires_grad == reward.differentiable == (reward.output_kind == "scores")


def test_a_gate_of_weight_zero_decides_without_being_added(file):
    threshold = float(rows()[1].median())
    reward = make_reward(mix(file, "gated", (2.0, 0.0), gates={"red": threshold}))
    total = score(reward, IMAGES, PROMPTS).total
    bright, red = rows()
    torch.testing.assert_close(total, torch.where(red >= threshold, 2 * bright, 0.0))
    assert 0 < (total == 0).sum() < 6 and reward.range == (0.0, 2.0)
    unbounded = {"name": "jpeg_compressibility", "weight": 0}
    spec = {"rewards": [f"{file}:bright", unbounded], "combine": "gated", "gates": {"jpeg_compressibility": -1}}
    assert make_reward(spec).range == (0.0, 1.0)  # 0 times infinity is no number


def test_yaml_holds_any_spec(file, tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "rewards:\n  - mine.py:bright:0.7\n  - {name: mine.py:red, weight: 0.3, transform: /10}\n"
        "combine: log_tamed\nthreshold: median\n"
    )
    got = score(make_reward("mix.yaml"), IMAGES, PROMPTS).total
    r = rows() / torch.tensor([[1.0], [10.0]])
    torch.testing.assert_close(got, aggregate.log_tamed_sum(r, torch.tensor([0.7, 0.3]), "median")[0])
    assert [(t.label, t.weight) for t in parse_spec("mix.yaml")] == [("bright", 0.7), ("red", 0.3)]
    (tmp_path / "sum.yml").write_text("mine.py:bright:0.7+mine.py:red:0.3\n")
    torch.testing.assert_close(
        score(make_reward("sum.yml"), IMAGES, PROMPTS).total, rows().T @ torch.tensor([0.7, 0.3])
    )


@pytest.mark.parametrize(
    "transform, expected",
    [
        ("/26", lambda r: r / 26),
        ("*100", lambda r: 100 * r),
        ("exp", lambda r: r.exp()),
        ("tanh", lambda r: r.tanh()),
        ("log1p", lambda r: (1 + r).log()),
        ("log_odds", lambda r: (r / (1 - r)).log()),
        ({"name": "scale", "by": -2, "add": 1}, lambda r: 1 - 2 * r),
        ({"name": "standardise", "mean": 0.5, "std": 0.1}, lambda r: (r - 0.5) / 0.1),
        ({"name": "clip", "low": 0.49, "high": 0.5}, lambda r: r.clamp(0.49, 0.5)),
        (
            {"name": "par", "references": [0.4, 0.6], "k": 3},
            lambda r: ((3 * (r - 0.4)).sigmoid() + (3 * (r - 0.6)).sigmoid()) / 2,
        ),
        ({"name": "log_sigmoid", "reference": 0.5, "scale": 4}, lambda r: (4 * (r - 0.5)).sigmoid().log()),
        (["/2", {"name": "scale", "add": 1}], lambda r: r / 2 + 1),
    ],
)
def test_transforms_act_on_the_scores_and_keep_to_their_range(file, transform, expected):
    reward = make_reward({"name": f"{file}:bright", "transform": transform})
    result = score(reward, IMAGES, PROMPTS)
    torch.testing.assert_close(result.total, expected(rows()[0]))
    torch.testing.assert_close(result.parts["bright"], rows()[0])  # logs show what the reward said
    low, high = reward.range
    assert (result.total >= low - 1e-6).all() and (result.total <= high + 1e-6).all() and math.isfinite(low + high)


def test_doubt_discounts_or_lowers_a_score(file):
    mean, doubt = IMAGES.mean(dim=(1, 2, 3)), IMAGES[:, 0, 0, 0]
    by = make_reward({"name": f"{file}:doubtful", "transform": "discount"})
    torch.testing.assert_close(score(by, IMAGES, PROMPTS).total, mean * (-doubt).exp())
    below = make_reward({"name": f"{file}:doubtful", "transform": {"name": "lower_bound", "kappa": 2}})
    torch.testing.assert_close(score(below, IMAGES, PROMPTS).total, mean - 2 * doubt)
    with pytest.raises(
        RewardError, match="reward 'bright': gives no uncertainty, which the transform 'discount' needs"
    ):
        score(make_reward({"name": f"{file}:bright", "transform": "discount"}), IMAGES, PROMPTS)


def test_failed_samples_are_in_no_statistic_of_a_combination():
    valid = torch.tensor([True, True, False, True, True, True])
    broken = as_reward(lambda images: RewardOutput(images.mean(dim=(1, 2, 3)), valid=valid), "broken")
    fine = as_reward(lambda images: images[:, 0].mean(dim=(1, 2)), "fine")
    members = [Member("broken", 1.0, broken, read_transforms("exp")), Member("fine", 1.0, fine)]
    result = score(
        CombinedReward(members, read_combine({"combine": "normalised"})), IMAGES, PROMPTS, {"group_ids": IDS}
    )
    scores, rest = IMAGES.mean(dim=(1, 2, 3)).exp(), IMAGES[:, 0].mean(dim=(1, 2))
    expected = aggregate.normalised_sum(rest[None], torch.ones(1), IDS)
    expected[valid] += aggregate.normalised_sum(scores[None, valid], torch.ones(1), IDS[valid])
    torch.testing.assert_close(result.total, expected)
    assert result.valid.tolist() == result.scored["broken"].tolist() == valid.tolist() and result.scored["fine"].all()


def test_scores_that_cannot_be_combined_name_the_rewards(file):
    spec = mix(file, "harmonic")
    spec["rewards"][0]["transform"] = {"name": "scale", "add": -5}
    with pytest.raises(RewardError, match=r"reward 'harmonic\(bright:1\+red:1\)': scores: got -4.*\['bright', 'red'\]"):
        score(make_reward(spec), IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'bright', sample 0.*got nan"):
        score(make_reward({"name": f"{file}:bright", "transform": ["*-9", "log1p"]}), IMAGES, PROMPTS)
    with pytest.raises(ValueError, match=r"scores: got shape \(3, 6\), expected \(2, N\)"):
        make_reward(mix(file, "min")).combine(torch.zeros(3, 6))


TERMS = ["jpeg_compressibility", "jpeg_incompressibility:0.5"]


@pytest.mark.parametrize(
    "spec, says",
    [
        ("none.yaml", "spec: got 'none.yaml', but there is no such file"),
        ({"rewards": TERMS, "combine": "log_tame"}, "combine: got 'log_tame'.*did you mean 'log_tamed'"),
        (
            {"rewards": TERMS, "combine": "log_tamed", "treshold": 1},
            "option of combine 'log_tamed': got 'treshold'.*did",
        ),
        ({"rewards": TERMS, "combine": "log_tamed", "threshold": "max"}, "threshold: got 'max', expected a number"),
        ({"rewards": TERMS, "combine": "log_tamed", "valid": 1}, "option of combine 'log_tamed': got 'valid'"),
        (
            {"rewards": TERMS, "combine": "correlation"},
            r"weight: got \[1.0, 0.5\], expected 1 .*'correlation' has its own",
        ),
        ({"rewards": TERMS, "combine": "correlation", "temperature": "hot"}, "options of combine 'correlation'"),
        ({"rewards": ["jpeg_compressibility:-1"], "combine": "harmonic"}, "weight: got -1.0, expected >= 0"),
        ({"rewards": ["jpeg_compressibility:0"], "combine": "min"}, "rewards that all have weight 0"),
        ({"rewards": TERMS, "combine": "gated"}, "gates: got None, expected a mapping"),
        ({"rewards": TERMS, "combine": "gated", "gates": {"ocr": 1}}, "gates: got 'ocr', expected one of"),
        ({"rewards": TERMS, "combine": "gated", "gates": {"ocr": "1"}}, "gates: got '1' for 'ocr'"),
        ({"rewards": [], "combine": "min"}, "spec: got an empty list"),
        ({"rewards": 3}, "spec: got 3, expected a string, a mapping or a list"),
        ({"name": "gold", "transform": "log_ods"}, "transform: got 'log_ods'.*did you mean 'log_odds'"),
        ({"name": "gold", "transform": "/0"}, "by of transform 'divide': got 0"),
        ({"name": "gold", "transform": "/x"}, "transform: got '/x', expected a number after '/'"),
        ({"name": "gold", "transform": {"name": "par"}}, "transform: got 'par' without 'references'"),
        ({"name": "gold", "transform": {"name": "par", "references": []}}, r"references of transform 'par': got \[\]"),
        ({"name": "gold", "transform": {"name": "clip", "low": 0, "high": "1"}}, "high of transform 'clip': got '1'"),
        ({"name": "gold", "transform": {"name": "exp", "by": 2}}, "option of transform 'exp': got 'by'"),
        ({"name": "gold", "transform": 26}, "transform: got 26, expected a name"),
    ],
)
def test_a_bad_mix_is_one_clear_line_before_anything_loads(spec, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_spec(spec)
    assert "\n" not in str(error.value)


def test_broken_yaml_is_named(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("rewards: [clip\ncombine: }")
    with pytest.raises(ValueError, match=f"spec: '{path}': is not YAML") as error:
        parse_spec(str(path))
    assert "\n" not in str(error.value)


def test_every_transform_can_be_read():
    options = {"divide": {"by": 2}, "standardise": {"mean": 0, "std": 1}, "clip": {"low": 0, "high": 1}}
    options |= {"par": {"references": [0.0]}, "log_sigmoid": {"reference": 0.0}}
    for name in TRANSFORMS:
        (transform,) = read_transforms({"name": name, **options.get(name, {})})
        assert transform.name == name


def test_a_discount_moves_a_range_to_0_from_either_side():
    (transform,) = read_transforms("discount")
    assert [transform.bounds(ends) for ends in ((2.0, 5.0), (-3.0, -1.0), (-3.0, 5.0))] == [(0, 5), (-3, 0), (-3, 5)]
    assert read_transforms({"name": "lower_bound"})[0].bounds((2.0, 5.0)) == (-torch.inf, 5)
