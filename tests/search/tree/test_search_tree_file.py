"""A tree in a folder: continued, killed, refused; the same to the bit as an unbroken search."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from search_toys import flow_schedule, toy_chain

from visalign.search.tree.dts import dts, dts_star
from visalign.search.tree.file import load_tree
from visalign.search.tree.picture import leaf_images

SMALL = dict(widening=1, exponent=0.5)
CASES = [
    (dts, {"leaves_at_once": 1}),
    (dts, {"leaves_at_once": 4, "allocation": "mixed"}),
    (dts, {"leaves_at_once": 4, "cache": True, "tilt": math.inf}),
    (dts_star, {"leaves_at_once": 1, "cache": True}),
    (dts_star, {"leaves_at_once": 5, "standardize": 7}),
    (dts, {"leaves_at_once": 5, "standardize": 7, "reward_guidance": 1.0}),
]


def assert_same(one, other):
    """To the bit."""
    assert one.parent == other.parent and one.rollout == other.rollout and one.queue == other.queue
    assert (one.rules, one.iterations, one.unit, one.leaf) == (other.rules, other.iterations, other.unit, other.leaf)
    size = one.size
    for name in ("value", "visits", "scored", "log_weight"):
        np.testing.assert_array_equal(getattr(one, name)[:size], getattr(other, name)[:size])
    for name in ("states", "predictions"):
        mine, theirs = getattr(one, name), getattr(other, name)
        kept = [n for n in mine if one.scored[n]]
        assert set(kept) <= set(theirs) and all(torch.equal(mine[n], theirs[n]) for n in kept)
    for node in range(size):
        assert one.count(node) == other.count(node) and one.children(node).tolist() == other.children(node).tolist()


def search(method, max_nfe, **options):
    chain = toy_chain(max_nfe=max_nfe)
    events = list(method(chain, **options))
    return chain, events


@pytest.mark.parametrize("method, options", CASES)
def test_a_search_in_parts_is_the_search_in_one(method, options, tmp_path):
    whole, events = search(method, 700, **options, **SMALL)
    rewards = []
    for max_nfe in (100, 101, 260, 397, 700):  # ends within batches
        chain, part = search(method, max_nfe, folder=tmp_path, save_every=30, **options, **SMALL)
        rewards += [reward for event in part for reward in event.rewards]
        assert chain.ledger.max_nfe == max_nfe and chain.ledger.nfe <= max_nfe
    assert rewards == [reward for event in events for reward in event.rewards]
    assert_same(load_tree(tmp_path), events[-1].state)
    counts = ("nfe", "rewards", "decodes")
    assert [getattr(chain.ledger, n) for n in counts] == [getattr(whole.ledger, n) for n in counts]
    assert chain.best.reward == whole.best.reward and chain.best.entity == whole.best.entity
    assert torch.equal(chain.best.latents, whole.best.latents) and torch.equal(chain.best.image, whole.best.image)


@pytest.mark.parametrize("method, options", [*CASES[1::3], CASES[-1]])
def test_a_killed_search_goes_on_from_its_folder(method, options, tmp_path):
    _, events = search(method, 600, **options, **SMALL)
    running, killed, saves = tmp_path / "running", tmp_path / "killed", set()
    for k, event in enumerate(method(toy_chain(max_nfe=600), folder=running, save_every=12, **options, **SMALL)):
        if (running / "tree.json").exists():
            saves.add((running / "tree.json").stat().st_mtime_ns)
        if k == len(events) // 2:
            shutil.copytree(running, killed)  # what a kill here would leave
            lost = event.state.scored_leaves - load_tree(killed).scored_leaves
    assert 0 < lost < 20 and len(saves) > 3
    chain, rest = search(method, 600, folder=killed, **options, **SMALL)
    assert_same(load_tree(killed), events[-1].state)
    assert rest[-1].nfe == events[-1].nfe and rest[-1].best.reward == events[-1].best.reward
    nothing = search(method, 600, folder=killed, **options, **SMALL)
    assert not nothing[1] and nothing[0].best.reward == events[-1].best.reward  # all is spent, the best is known


def test_a_save_that_dies_leaves_the_one_before(tmp_path, monkeypatch):
    search(dts, 200, folder=tmp_path, **SMALL)
    before = load_tree(tmp_path)
    replace = os.replace

    def die_at(name):
        def dying(source, target):
            if str(target).endswith(name):
                raise OSError("killed")
            replace(source, target)

        return dying

    for name in (".safetensors", "tree.json"):
        monkeypatch.setattr(os, "replace", die_at(name))
        with pytest.raises(OSError, match="killed"):
            search(dts, 400, folder=tmp_path, **SMALL)
        assert_same(load_tree(tmp_path), before)
    monkeypatch.setattr(os, "replace", replace)
    search(dts, 400, folder=tmp_path, **SMALL)
    assert_same(load_tree(tmp_path), search(dts, 400, **SMALL)[1][-1].state)


def test_a_search_that_is_left_or_fails_has_saved_what_it_has(tmp_path):
    for _, event in zip(range(7), dts(toy_chain(max_nfe=600), folder=tmp_path / "left", **SMALL)):
        leaves = event.state.scored_leaves
    assert load_tree(tmp_path / "left").scored_leaves == leaves == 7

    chain = toy_chain(max_nfe=600)
    score, calls = chain.result, []

    def failing(latents, entities):
        calls.append(entities)
        if len(calls) == 5:
            raise RuntimeError("the lamp is broken")
        return score(latents, entities)

    chain.result = failing
    with pytest.raises(RuntimeError, match="lamp"):
        list(dts(chain, folder=tmp_path / "failed", leaves_at_once=4, **SMALL))
    tree = load_tree(tmp_path / "failed")
    assert tree.scored_leaves == 16 and tree.queue and not any(n in tree.states for n in tree.queue)
    search(dts, 600, folder=tmp_path / "failed", leaves_at_once=4, **SMALL)
    tree, whole = load_tree(tmp_path / "failed"), search(dts, 600, leaves_at_once=4, **SMALL)[1][-1].state
    assert tree.rewards.tolist() == whole.rewards[: len(tree.rewards)].tolist()  # less by what was spent in vain


def test_a_folder_of_another_search_is_refused_before_anything_is_spent(tmp_path):
    search(dts, 200, folder=tmp_path, **SMALL)
    for message, chain, method, options in (
        ("search has seed 0, expected 1", toy_chain(max_nfe=300, seed=1), dts, {}),
        ("search has method 'dts', expected 'dts-star'", toy_chain(max_nfe=300), dts_star, {}),
        ("search has transition", toy_chain(flow_schedule(), max_nfe=300), dts, {}),
        ("search has reward 'half'", toy_chain(max_nfe=300, reward=twice), dts, {}),
        ("rule has tilt 1.0, expected 2.0", toy_chain(max_nfe=300), dts, {"tilt": 2.0}),
        ("rule has leaves_at_once 1, expected 4", toy_chain(max_nfe=300), dts, {"leaves_at_once": 4}),
    ):
        with pytest.raises(ValueError, match="folder: got a tree whose " + message):
            next(method(chain, folder=tmp_path, **{**SMALL, **options}))
        assert chain.ledger.nfe == 0
    (tmp_path / "tree.json").write_text("{}")
    with pytest.raises(ValueError, match="format None"):
        load_tree(tmp_path)
    with pytest.raises(ValueError, match="expected one with a tree.json"):
        load_tree(tmp_path / "nothing")


def twice(images):
    return images.flatten(1).sum(1)


def test_a_continued_tree_keeps_the_widths_that_its_first_budget_chose(tmp_path):
    search(dts, 200, folder=tmp_path)
    search(dts, 800, folder=tmp_path)
    rules = load_tree(tmp_path).rules
    assert (rules.widening, rules.exponent) == (1, 0.5)
    with pytest.raises(ValueError, match="rule has widening 1.0, expected 2"):
        search(dts, 900, folder=tmp_path, widening=2)


def test_leaves_are_decoded_for_looking_at_without_cost():
    chain, events = search(dts, 200, **SMALL)
    tree, spent = events[-1].state, chain.ledger.decodes
    chain.batch_size = 2
    images = leaf_images(chain, tree, tree.leaves[:5].tolist())
    assert [float(image.sum() / 2) for image in images.values()] == pytest.approx(tree.rewards[:5].tolist())
    assert chain.ledger.decodes == spent and list(images) == tree.leaves[:5].tolist()


def altered(change):
    def harm(folder):
        saved = json.loads((folder / "tree.json").read_text())
        change(saved)
        (folder / "tree.json").write_text(json.dumps(saved))

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "tree.json").write_text("[]"),
        lambda folder: (folder / "tree.json").write_text("[" * 100_000),
        lambda folder: next(folder.glob("states-*")).unlink(),
        lambda folder: os.truncate(next(folder.glob("states-*")), 50),
        altered(lambda s: s["tree"].pop("queue")),
        altered(lambda s: s["tree"]["parent"].__setitem__(3, 900)),
        altered(lambda s: s["tree"]["parent"].__setitem__(0, 5)),
        altered(lambda s: s["tree"]["parent"].__setitem__(2, "x")),
        altered(lambda s: s["tree"]["value"].__setitem__(1, float("nan"))),
        altered(lambda s: s["tree"]["value"].pop()),
        altered(lambda s: s["ledger"].update(nfe=0)),
        altered(lambda s: s.update(rules=None)),
        altered(lambda s: s.update(best={"leaf": 10**6, "reward": 1.0, "entity": 0})),
        altered(lambda s: s.update(files=7)),
    ],
)
def test_a_damaged_tree_is_one_line_and_nothing_is_spent(tmp_path, harm):
    search(dts, 200, folder=tmp_path, **SMALL)
    load_tree(tmp_path)
    harm(tmp_path)
    chain = toy_chain(max_nfe=300)
    with pytest.raises(ValueError, match="^folder: got ") as caught:
        next(dts(chain, folder=tmp_path, **SMALL))
    assert "\n" not in str(caught.value) and chain.ledger.nfe == 0
