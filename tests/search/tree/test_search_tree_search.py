"""Tree sampling and search: against the algorithm written naively, against known laws, batches, budgets, refusals."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from search_toys import MixtureModel, Quadrature, ToyChain, flow_schedule, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger, Role, expected_best, snis_weights
from visalign.search.best_of_n import best_of_n
from visalign.search.tree.dts import dts, dts_star
from visalign.search.tree.reading import best_leaf, draw_leaves, greedy_leaf, health, leaf_law, reweighted
from visalign.transitions import Consistency, Gaussian, Schedule, noisy_of, ode_of
from visalign.worlds import resolve_model

PAPER = dict(widening=2, exponent=0.8)
SMALL = dict(widening=1, exponent=0.5)


def grow(chain, method=dts, **options):
    """The tree after the last event, and the events' rewards in order."""
    events = list(method(chain, **options))
    return events[-1].state, [reward for event in events for reward in event.rewards]


@dataclass
class Node:
    level: int
    state: torch.Tensor | None = None
    children: list["Node"] = field(default_factory=list)
    value: float = 0.0
    visits: int = 1


def naive(chain, levels, iterations, widening, exponent, tilt, choose):
    """One rollout after another as the paper has it; rewards in order, and the root. `choose` takes (node, chance)."""
    root, rewards = Node(0), []
    for iteration in range(1, iterations + 1):
        chances = torch.rand(len(levels), generator=chain.random(Role.SELECT, iteration)).tolist()
        path = [root]
        while path[-1].level < chain.num_steps and len(path[-1].children) >= widening * path[-1].visits ** exponent:
            path.append(choose(path[-1], chances[len(path) - 1], rewards))
        if path[-1].level < chain.num_steps:
            entity = [len(rewards)]
            state = chain.initial(entity) if path[-1] is root else path[-1].state
            for step in range(path[-1].level, chain.num_steps):
                state = chain.step(state, step, entity)
                if step + 1 in levels:
                    child = Node(step + 1, state)
                    path[-1].children.append(child)
                    path.append(child)
            path[-1].value = float(chain.value(state))
            rewards.append(path[-1].value)
        for node in reversed(path[:-1]):
            total = sum(math.exp(tilt * child.value) for child in node.children)
            node.value = math.log(total / len(node.children)) / tilt
        for node in path:
            node.visits += 1
    return rewards, root


def by_value(tilt, epsilon=0.0):
    def choose(node, chance, _rewards):
        weights = [math.exp(tilt * child.value) for child in node.children]
        reached = 0.0
        for child, weight in zip(node.children, weights):
            reached += (1 - epsilon) * weight / sum(weights) + epsilon / len(weights)
            if chance < reached:
                return child
        return node.children[-1]

    return choose


def by_bound(c_uct):
    def choose(node, _chance, rewards):
        c = c_uct * np.std(rewards)
        return max(node.children, key=lambda n: n.value + c * math.sqrt(math.log(node.visits) / n.visits))

    return choose


@pytest.mark.parametrize(
    "method, options, choose",
    [
        (dts, {}, by_value(1.5)),
        (dts, {"allocation": "mixed", "epsilon": 0.4}, by_value(1.5, 0.4)),
        (dts, {"allocation": "least_visited"}, lambda node, *_: min(node.children, key=lambda n: n.visits)),
        (dts_star, {"c_uct": 1.0}, by_bound(1.0)),
        (dts_star, {}, by_bound(0.0)),
    ],
)
def test_one_leaf_at_a_time_is_the_papers_algorithm(method, options, choose):
    for widths in (PAPER, SMALL):
        tree, rewards = grow(toy_chain(seed=3), method, tilt=1.5, iterations=120, **widths, **options)
        expected, root = naive(toy_chain(seed=3), (0, 1, 2, 3, 4, 6), 120, **widths, tilt=1.5, choose=choose)
        assert rewards == pytest.approx(expected, abs=1e-12)
        assert tree.value[0] == pytest.approx(root.value, abs=1e-12)
        mine = [(tree.level(n), float(tree.value[n]), int(tree.visits[n])) for n in in_order(tree.children, 0)]
        theirs = [(n.level, n.value, n.visits) for n in in_order(lambda node: node.children, root)]
        assert [m[::2] for m in mine] == [t[::2] for t in theirs]
        assert [m[1] for m in mine] == pytest.approx([t[1] for t in theirs], abs=1e-12)


def in_order(children, node):
    """All nodes, each before its children."""
    yield node
    for child in children(node):
        yield from in_order(children, child)


# Against the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, allocation, leaves_at_once, distance, error",
    [
        (vp_schedule(), "least_visited", 8, 0.10, 0.06),
        (vp_schedule(), "boltzmann", 4, 0.30, None),
        (flow_schedule(), "least_visited", 8, 0.10, 0.06),
        (flow_schedule(), "boltzmann", 8, 0.30, None),
    ],
)
def test_draws_have_the_tilted_law(schedule, allocation, leaves_at_once, distance, error):
    chain, law = toy_chain(schedule), Quadrature(schedule)
    tree, _ = grow(chain, allocation=allocation, leaves_at_once=leaves_at_once, iterations=3000, **PAPER)
    drawn = torch.cat([tree.states[leaf] for leaf in draw_leaves(tree, 4000, torch.Generator().manual_seed(0))])
    assert law.distance(drawn) < distance
    assert float((drawn > 0).double().mean()) > 0.75
    if error is not None:
        assert tree.value[0] == pytest.approx(law.value, abs=error)
        assert float((drawn > 0).double().mean()) == pytest.approx(law.tilted[law.x > 0].sum(), abs=0.03)


def test_without_tilt_draws_have_the_base_law():
    tree, _ = grow(toy_chain(), tilt=0, leaves_at_once=8, iterations=3000, **PAPER)
    drawn = torch.cat([tree.states[leaf] for leaf in draw_leaves(tree, 4000, torch.Generator().manual_seed(0))])
    assert float((drawn > 0).double().mean()) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("schedule, tilt", [(vp_schedule(), 1.0), (flow_schedule(), 1.0), (flow_schedule(), 4.0)])
def test_guided_draws_have_the_tilted_law_by_their_weights(schedule, tilt):
    law, options = Quadrature(schedule, tilt), dict(allocation="least_visited", leaves_at_once=8, tilt=tilt, **PAPER)
    chain = toy_chain(schedule)
    tree, _ = grow(chain, iterations=3000, reward_guidance=1.0, **options)
    drawn = torch.cat([tree.states[leaf] for leaf in draw_leaves(tree, 4000, torch.Generator().manual_seed(0))])
    assert law.distance(drawn) < 0.08 and tree.value[0] == pytest.approx(law.value, abs=0.05)
    base = reweighted(tree, tilt=1e-3)  # the same leaves tell the law without a tilt, too
    drawn = torch.cat([tree.states[leaf] for leaf in draw_leaves(base, 4000, torch.Generator().manual_seed(0))])
    assert float((drawn > 0).double().mean()) == pytest.approx(0.5, abs=0.08)
    assert 0 < chain.ledger.backwards < chain.ledger.nfe

    plain, _ = grow(toy_chain(schedule), iterations=3000, reward_guidance=1.0, weighted=False, **options)
    assert plain.value[0] > law.value + 0.06 and not plain.log_weight.any()
    with pytest.raises(ValueError, match="tilt: got 0 for a guided tree"):
        reweighted(tree, tilt=0)


def test_guidance_saves_a_tree_most_of_its_way_to_a_rare_reward():
    found = {}
    for guidance in (0.0, 1.0):
        rewards = []
        for seed in range(12):
            chain = toy_chain(reward=_far, seed=seed, max_nfe=120)
            grow(chain, dts_star, tilt=4.0, reward_guidance=guidance)
            rewards.append(chain.best.reward)
        found[guidance] = np.mean(rewards)
    assert found[1.0] > found[0.0] + 0.5


def _far(images, prompts, context=None):
    return -2 * (images.flatten(1).sum(1) - 3.1).square()


_far.differentiable = True


def test_while_the_unit_is_measured_nothing_is_guided():
    chain = toy_chain(seed=5)
    tree, rewards = grow(chain, iterations=60, standardize=8, reward_guidance=1.0, leaves_at_once=2, **SMALL)
    base = list(best_of_n(toy_chain(seed=5, max_nfe=6 * 8)))[-1].state.rewards
    assert rewards[:8] == pytest.approx(base, abs=1e-12)
    guided = [leaf for leaf in tree.leaves if tree.log_weight[tree.path(leaf)].any()]
    assert min(tree.rollout[leaf] for leaf in guided) == 8 and len(guided) == tree.scored_leaves - 8


@dataclass(frozen=True)
class Coin:
    """Steps of +1 or -1."""

    name = "coin"
    stochastic = True

    def std(self, schedule, step_index):
        return 1.0

    def __call__(self, schedule, step_index, latents, prediction):
        return Flip(latents, torch.ones_like(latents)), latents


class Flip(Gaussian):
    def sample(self, noise):
        return self.mean + noise.sign()


class FromZero(MixtureModel):
    def noise(self, prompts, seeds):
        return torch.zeros(len(seeds), 1, dtype=torch.float64)

    def predict(self, latents, step_index, prompts):
        return latents


def test_values_of_a_coin_chain_are_those_by_enumeration():
    chain = ToyChain(
        FromZero(flow_schedule((0.9, 0.6, 0.3, 0))),
        "p",
        lambda images: 0.7 * images.flatten(1).sum(1),
        Coin(),
        batch_size=99,
    )
    tree, _ = grow(chain, allocation="least_visited", leaves_at_once=8, iterations=3000, **PAPER)
    assert tree.rules.branch_at == (1, 2)  # the last step has noise, too
    assert tree.value[0] == pytest.approx(3 * math.log(math.cosh(0.7)), abs=0.06)
    means = {}
    for node in range(1, tree.size):
        means.setdefault((tree.level(node), round(float(tree.states[node]))), []).append(math.exp(tree.value[node]))
    for (level, place), found in means.items():  # exp(value) is unbiased
        exact = math.exp(0.7 * place) * math.cosh(0.7) ** (3 - level)
        assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / math.sqrt(len(found)) + 1e-12)


def test_a_tree_that_only_widens_at_the_root_is_importance_sampling():
    chain = toy_chain(max_nfe=600)
    tree, rewards = grow(chain, widening=math.inf, tilt=2.0)
    base = list(best_of_n(toy_chain(max_nfe=600)))[-1].state.rewards
    assert rewards == pytest.approx(base, abs=1e-12) and len(rewards) == 100
    np.testing.assert_allclose(leaf_law(tree), snis_weights(rewards, 2.0).numpy())


def test_search_finds_a_narrow_spike_cheaper_than_draws():
    def spike(images, prompts):
        return -8 * (images.flatten(1).sum(1) - 3.1).abs()

    pool = list(best_of_n(toy_chain(reward=spike, max_nfe=6 * 10_000)))[-1].state.rewards
    found = []
    for seed in range(12):
        chain = toy_chain(reward=spike, seed=seed, max_nfe=300)
        grow(chain, dts_star, c_uct=0)  # small: C = 1, alpha = 0.5
        found.append(chain.best.reward)
    # measured with 40 seeds: -5.32 +- 0.12 for 300 predictions, as 300 draws for 1800; 50 draws have -6.5
    assert np.mean(found) > expected_best(pool, 100) > expected_best(pool, 50)


# Bookkeeping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "widening, exponent, first", [(2, 0.8, 36), (2, 0.7, 13), (2, 0.5, 5), (1, 0.8, 4), (1, 0.5, 2)]
)
def test_the_first_rollouts_are_those_of_best_of_n(widening, exponent, first):
    tree, rewards = grow(toy_chain(seed=5), iterations=first + 1, widening=widening, exponent=exponent)
    base = list(best_of_n(toy_chain(seed=5, max_nfe=6 * first)))[-1].state.rewards
    assert rewards[:first] == pytest.approx(base, abs=1e-12)
    assert tree.count(0) == first  # the next one starts from a child of the root


@pytest.mark.parametrize("method", [dts, dts_star])
@pytest.mark.parametrize("leaves_at_once", [1, 5])
@pytest.mark.parametrize("cache", [False, True])
def test_the_ledger_is_the_sum_of_what_rollouts_cost(method, leaves_at_once, cache):
    chain = toy_chain(max_nfe=403)
    events = list(method(chain, leaves_at_once=leaves_at_once, cache=cache, **SMALL))
    tree = events[-1].state
    origins = [
        next(n for n in reversed(tree.path(leaf)) if tree.rollout[n] != tree.rollout[leaf]) for leaf in tree.leaves
    ]
    costs = [6 - tree.level(node) - (1 if cache and node else 0) for node in origins]
    assert chain.ledger.nfe == sum(costs) and 403 - 6 < chain.ledger.nfe <= 403
    assert chain.ledger.rewards == chain.ledger.decodes == len(costs) == sum(len(e.rewards) for e in events)
    bests = [event.best.reward for event in events]
    assert bests == sorted(bests) and bests[-1] == tree.value[best_leaf(tree)] == max(tree.rewards)
    torch.testing.assert_close(tree.states[best_leaf(tree)], chain.best.latents)
    for node in range(tree.size):
        if not tree.is_leaf(node):
            children = [n for n in range(1, tree.size) if tree.parent[n] == node]
            assert sum(tree.visits[children] - 1) == tree.visits[node] - 1
    finals = torch.cat([tree.states[leaf] for leaf in tree.leaves])
    assert len(finals.unique()) == len(finals)  # siblings are no copies


def test_no_budget_is_overdrawn_or_left_where_a_rollout_fits():
    for cache in (False, True):
        for leaves_at_once in (1, 3):
            for max_nfe in range(6, 36):
                chain = toy_chain(max_nfe=max_nfe)
                tree, _ = grow(chain, leaves_at_once=leaves_at_once, cache=cache, **SMALL)
                assert chain.ledger.left < (6 if tree.queue else 2 - cache or 1)


def test_kept_predictions_change_only_the_cost():
    plain, cached = toy_chain(), toy_chain()
    for leaves_at_once in (1, 6):
        options = dict(iterations=90, leaves_at_once=leaves_at_once, **SMALL)
        plain, cached = toy_chain(), toy_chain()
        one, rewards = grow(plain, **options)
        other, again = grow(cached, cache=True, **options)
        assert again == pytest.approx(rewards, abs=1e-12)
        assert plain.ledger.nfe - cached.ledger.nfe == len(rewards) - one.count(0) > 20
        assert not one.predictions and len(other.predictions) == other.size - 1 - len(rewards)


def test_neither_chunks_nor_a_budgets_end_change_a_rollout():
    for leaves_at_once in (1, 8):
        options = dict(leaves_at_once=leaves_at_once, **PAPER)
        _, whole = grow(toy_chain(max_nfe=900), dts_star, **options)
        tree, chunked = grow(toy_chain(max_nfe=700, batch_size=3), dts_star, **options)
        assert chunked == pytest.approx(whole[: len(chunked)], abs=1e-12)


def test_rollouts_of_a_batch_are_blind_to_each_other():
    tree, _ = grow(toy_chain(), iterations=8, leaves_at_once=8, **SMALL)
    assert tree.count(0) == 8  # all from the root: none had a scored child to descend to
    tree, _ = grow(toy_chain(), iterations=16, leaves_at_once=8, **SMALL)
    assert tree.count(0) == 8 and tree.scored_leaves == 16  # then the bound sends all of them deeper


def test_a_deterministic_kernel_branches_at_the_root_alone():
    chain = toy_chain(max_nfe=123, transition=ode_of(vp_schedule()))
    tree, rewards = grow(chain, leaves_at_once=4, **SMALL)
    assert tree.iterations == tree.count(0) == len(rewards) == 20  # no selection is lost on scored leaves
    assert health(tree)["most_children"] == 0
    assert any("best of n" in warning for warning in health(tree)["warnings"])


def test_the_default_branches_are_where_children_differ():
    assert grow(toy_chain(), iterations=1)[0].rules.branch_at == (1, 2, 3, 4)
    long = toy_chain(flow_schedule(tuple(1 - k / 50 for k in range(1, 50)) + (0.01, 0)))
    assert grow(long, iterations=1)[0].rules.branch_at == (10, 20, 30, 40)
    alphas = torch.tensor([0.005, 0.1, 0.4, 0.8, 1.0], dtype=torch.float64)
    schedule = Schedule(
        "consistency", torch.tensor([999.0, 700, 400, 100]), alphas_cumprod=alphas, prediction_type="sample"
    )
    tree, rewards = grow(toy_chain(schedule, transition=Consistency()), iterations=40, **SMALL)
    assert tree.rules.branch_at == (1, 2) and len(set(rewards)) == len(rewards)


def test_the_widths_follow_the_budget():
    for max_nfe, expected in ((599, (1, 0.5)), (600, (2, 0.8)), (None, (2, 0.8))):
        rules = grow(toy_chain(max_nfe=max_nfe), iterations=1)[0].rules
        assert (rules.widening, rules.exponent) == expected
    rules = grow(toy_chain(max_nfe=60), iterations=1, exponent=0.7)[0].rules
    assert (rules.widening, rules.exponent) == (1, 0.7)


@pytest.mark.parametrize("leaves_at_once", [1, 3])
def test_a_standardized_search_does_not_depend_on_the_unit_of_reward(leaves_at_once):
    options = dict(standardize=8, iterations=60, leaves_at_once=leaves_at_once, **SMALL)
    tree, rewards = grow(toy_chain(), tilt=2.0, **options)
    scaled, thousands = grow(toy_chain(reward=lambda images: 500 * images.flatten(1).sum(1) + 7), tilt=2.0, **options)
    np.testing.assert_allclose(thousands, 1000 * np.array(rewards) + 7)
    assert tree.unit == pytest.approx(np.std(rewards[:8])) and tree.tilt == pytest.approx(2 / tree.unit)
    assert tree.count(0) >= 8 and all(tree.parent[tree.path(leaf)[1]] == 0 for leaf in tree.leaves[:8])
    same, _ = grow(toy_chain(reward=lambda images: 0 * images.flatten(1).sum(1) + 4), standardize=2, iterations=9)
    assert same.unit == 1 and same.value[0] == 4


def test_a_search_whose_bound_lets_no_child_in_ends():
    for exponent, few in ((0.01, 30), (0.5, 101)):
        chain = toy_chain(max_nfe=600)
        tree, rewards = grow(chain, dts_star, widening=1, exponent=exponent)
        assert tree.iterations >= len(rewards)
        assert (len(rewards) < few) == (exponent == 0.01) and (chain.ledger.left < 6) == (exponent == 0.5)


def test_an_infinite_tilt_backs_up_the_maximum_and_follows_it():
    tree, rewards = grow(toy_chain(), tilt=math.inf, iterations=60, **SMALL)
    assert tree.value[0] == max(rewards) == tree.value[greedy_leaf(tree)]


def test_options_that_cannot_work_are_refused_before_anything_is_spent():
    for message, options in {
        "allocation: got 'uct'": dict(allocation="uct"),
        "epsilon: got 0.2 with allocation 'boltzmann'": dict(epsilon=0.2),
        "branch_at: got .* rising": dict(branch_at=[3, 2]),
        r"branch_at: got \(2, 5\), whose steps 5 to 6 draw no noise": dict(branch_at=[2, 5]),
        "save_every: got 0": dict(save_every=0),
        "tilt: got -1": dict(tilt=-1),
        "reward_guidance: got -1": dict(reward_guidance=-1.0),
        "reward_guidance: got 1.0, expected 0 with tilt 0": dict(reward_guidance=1.0, tilt=0.0),
        "reward_guidance: got 1.0, expected 0 with tilt inf": dict(reward_guidance=1.0, tilt=math.inf),
        "cache: got True, expected False with reward_guidance": dict(reward_guidance=1.0, cache=True),
        "guidance_start: got 1": dict(reward_guidance=1.0, guidance_start=1.0),
        "clip: got 0": dict(reward_guidance=1.0, clip=0.0),
        "which has no gradient": dict(reward_guidance=1.0, reward=brightness),
    }.items():
        chain = toy_chain(max_nfe=60, **{k: options.pop(k) for k in ("reward",) if k in options})
        with pytest.raises(ValueError, match=message):
            next(dts(chain, **options))
        assert chain.ledger.nfe == 0
    for method in (dts, dts_star):
        with pytest.raises(ValueError, match="iterations: got None"):
            next(method(toy_chain()))


# On a shipped model ---------------------------------------------------------------------------------------------------


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def test_a_tree_grows_on_a_shipped_model():
    generator = Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=4)
    options = dict(seed=2, batch_size=8)
    chain = Chain(generator, "a red circle", brightness, noisy_of(generator.schedule), ledger=Ledger(40), **options)
    base = Chain(generator, "a red circle", brightness, noisy_of(generator.schedule), ledger=Ledger(24), **options)
    with chain.counted():
        tree, rewards = grow(chain, dts_star, leaves_at_once=6, cache=True)
    first = list(best_of_n(base))[-1].state.rewards
    assert rewards[:6] == pytest.approx(first, rel=1e-4)
    assert chain.ledger.nfe == chain.ledger.forwards and 36 < chain.ledger.nfe <= 40
    assert tree.rules.branch_at == (1, 2) and tree.scored_leaves > 10 and tree.count(0) < tree.scored_leaves
    assert chain.best.reward == max(rewards) and chain.best.image.shape[1] == 3
    assert tree.states[best_leaf(tree)].dtype == torch.float32
