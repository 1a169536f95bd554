"""Rollouts that branch, on a toy generator with an exact velocity: form, sharing, noise, and recorded actions."""

import pytest
import torch
from test_rollout import PROMPTS, SEEDS, ToyGenerator

from visalign.sampling.branching import Fork, branched_rollout
from visalign.sampling.rollout import rollout
from visalign.transitions import CPS, DDIM, FlowSDE


class Counting(ToyGenerator):
    """Counts the rows that its model is asked for."""

    rows = 0
    widest = 0

    def predict(self, latents, step_index, prompts):
        self.rows += len(latents)
        self.widest = max(self.widest, len(latents))
        return super().predict(latents, step_index, prompts)


def grow(forks, prompts=PROMPTS, seeds=SEEDS, generator=None, transition=None, **options):
    return branched_rollout(generator or Counting(), prompts, seeds, transition or FlowSDE(), forks, **options)


def test_without_forks_a_tree_is_the_ode():
    generator = Counting()
    tree = grow({}, generator=generator)
    assert torch.equal(tree.final, rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=[]).final)
    assert tree.forwards == tree.separate_forwards == generator.rows == 30
    assert all(len(layer.drawn) == 0 and layer.latents is None for layer in tree.layers)


@pytest.mark.parametrize("kind, transition", [("flow", FlowSDE()), ("diffusion", DDIM())])
def test_a_single_stochastic_child_at_each_step_is_the_plain_rollout(kind, transition):
    steps = [2, 3, 7]
    other = [21, 22, 23]
    tree = grow(
        {i: Fork(grow=1) for i in steps}, generator=Counting(kind=kind), transition=transition, noise_seeds=other
    )
    plain = rollout(ToyGenerator(kind=kind), PROMPTS, SEEDS, transition, sde_steps=steps, noise_seeds=other)
    assert torch.equal(tree.final, plain.final) and torch.equal(tree.images, plain.images)
    for i in steps:
        assert torch.equal(tree.layers[i].latents, plain.latents[i])
        assert torch.equal(tree.layers[i].next_latents, plain.next_latents[i])
        assert torch.equal(tree.layers[i].log_probs, plain.log_probs[i])


def test_siblings_share_their_past_to_the_bit_and_one_forward_serves_them_all():
    generator = Counting()
    tree = grow({3: Fork(grow=4)}, generator=generator)
    layer = tree.layers[3]
    assert len(tree) == 12 and layer.parents.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert layer.latents.shape[0] == 3 and layer.next_latents.shape[0] == 12
    assert (layer.next_latents[0] - layer.next_latents[1]).abs().max() > 0.1
    assert tree.forwards == generator.rows == 3 * (4 + 4 * 6) < tree.separate_forwards == 120
    assert len(generator.calls) == 3  # to the fork, from it on, decoding
    assert tree.leaf_prompts == [p for p in PROMPTS for _ in range(4)]


def test_a_binary_tree_has_two_to_the_splits_leaves_and_the_rows_of_the_docstring():
    generator = Counting()
    tree = grow({i: Fork(grow=2) for i in (0, 3, 6, 9)}, ["a"], [1], generator)
    assert len(tree) == 16 and generator.rows == tree.forwards == 1 + 3 * 2 + 3 * 4 + 3 * 8
    ancestors = tree.ancestors()
    assert ancestors[0].tolist() == [0] * 16 and ancestors[1].tolist() == [0] * 8 + [1] * 8
    assert ancestors[-1].tolist() == list(range(16))
    assert [len(r) for r in tree.roots] == [1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 16]
    assert len({tuple(x.flatten()[:3].tolist()) for x in tree.final}) == 16


def test_log_probabilities_are_of_the_actions_under_their_parents_gaussian():
    transition = FlowSDE(eta=0.5)
    tree = grow({1: Fork(grow=3), 4: Fork(grow=2)}, transition=transition)
    for i in (1, 4):
        layer = tree.layers[i]
        toy = ToyGenerator()
        roots = [PROMPTS[r] for r in tree.roots[i].tolist()]
        prediction = toy.predict(layer.latents, i, roots).detach()
        gaussian = transition(toy.schedule, i, layer.latents, prediction)[0].take(layer.parents)
        torch.testing.assert_close(gaussian.log_prob(layer.next_latents), layer.log_probs)


def test_a_tree_depends_on_neither_batch_size_nor_neighbours():
    forks = {1: Fork(grow=2), 3: Fork(leave=2, ode=True), 6: Fork(grow=1)}
    whole = grow(forks)
    for size in (1, 4):
        generator = Counting()
        other = grow(forks, generator=generator, batch_size=size)
        assert torch.equal(other.final, whole.final) and generator.widest <= size
        assert torch.equal(other.images, whole.images)
        for one, two in zip(whole.layers, other.layers):
            assert torch.equal(one.parents, two.parents) and torch.equal(one.drawn, two.drawn)
            assert torch.equal(one.log_probs, two.log_probs)
            assert (one.latents is None) == (two.latents is None)
    alone = grow(forks, PROMPTS[1:2], SEEDS[1:2])
    each = len(whole) // 3
    assert torch.equal(alone.final, whole.final[each : 2 * each])


def test_completions_that_leave_a_stochastic_trunk_are_rollouts_of_fewer_stochastic_steps():
    """TP-GRPO's leaves: the trunk's first, then the ODE's completions, the latest first."""
    window = [2, 3, 4]
    tree = grow({i: Fork(grow=1, ode_leave=True) for i in window})
    assert len(tree) == 3 * 4
    final = tree.final.view(3, 4, *tree.final.shape[1:]).flip(1)
    for count in range(4):
        wanted = rollout(ToyGenerator(), PROMPTS, SEEDS, FlowSDE(), sde_steps=window[:count]).final
        torch.testing.assert_close(final[:, count], wanted, rtol=0, atol=0)


def test_branches_off_the_odes_path_differ_from_it_by_one_stochastic_step():
    """TempFlow-GRPO's: each leaf has one stochastic edge, and begins it on the path of the ODE."""
    tree = grow({1: Fork(leave=2, ode=True), 3: Fork(leave=3)}, PROMPTS[:1], SEEDS[:1])
    assert len(tree) == 5 and tree.layers[1].drawn.tolist() == [0, 1] and tree.layers[3].drawn.tolist() == [2, 3, 4]
    path = rollout(ToyGenerator(), PROMPTS[:1], SEEDS[:1], FlowSDE(), sde_steps=[5], decode=False)
    ode = grow({5: Fork(grow=1)}, PROMPTS[:1], SEEDS[:1])
    assert torch.equal(path.latents[5], ode.layers[5].latents)
    long = rollout(ToyGenerator(), PROMPTS[:1], SEEDS[:1], FlowSDE(), sde_steps=[3], decode=False)
    assert torch.equal(tree.layers[3].latents[2:], long.latents[3])  # two have left by then


def test_nothing_carries_gradient_and_compiled_models_run_with_it():
    generator = Counting()
    tree = grow({2: Fork(grow=2)}, generator=generator, grad_mode=True)
    assert [call["grad"] for call in generator.calls] == [True, True, False]
    assert not any(t.requires_grad for t in (tree.final, tree.images, tree.layers[2].log_probs))
    assert torch.equal(tree.final, grow({2: Fork(grow=2)}).final)
    assert grow({}, decode=False).images is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: grow({10: Fork(grow=2)}), "forks: got step 10, expected within 0 .. 9"),
        (lambda: grow({9: Fork(grow=2)}, transition=CPS()), "at step 9, where CPS.* has std 0"),
        (lambda: grow({}, seeds=[1]), "seeds: got 1, expected 3"),
        (lambda: grow({}, noise_seeds=[1]), "noise_seeds: got 1, expected 3"),
        (lambda: grow({}, batch_size=0), "batch_size: got 0"),
        (lambda: Fork(), "fork: got .*expected at least one child"),
        (lambda: Fork(grow=-1, ode=True), "fork: got"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
