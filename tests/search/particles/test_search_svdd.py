"""Value-based decoding: which child goes on, its costs, and its limits: plain sampling, best of M paths."""

import math

import pytest
import torch
from search_particle_toys import final, quick_chain
from search_toys import flow_schedule, toy_chain

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.particles.svdd import choose_children, svdd, svdd_least, svdd_nfe
from visalign.transitions import DanceSDE, noisy_of
from visalign.worlds import resolve_model


def plain(count, **options):
    chain = toy_chain(**options)
    return chain.finish(chain.initial(range(count)), 0, range(count))


def test_a_child_is_chosen_in_proportion_to_its_tilted_value():
    values = torch.tensor([[0.0, math.log(3), math.log(6), -math.inf]], dtype=torch.float64)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for tilt, shares in ((1, (100, 300, 600, 0)), (0.5, (193, 334, 473, 0))):
        counts = choose_children(values.expand(1000, 4), tilt, uniforms).bincount(minlength=4)
        assert counts.tolist() == pytest.approx(shares, abs=1), tilt
    best = choose_children(torch.tensor([[1.0, 4, 4], [2, 1, 0]]), math.inf, torch.zeros(2))
    assert best.tolist() == [1, 0]  # the first of equals
    even = choose_children(values[:, :2].expand(1000, 2), 0.0, uniforms).bincount()
    assert even.tolist() == [500, 500]


@pytest.mark.parametrize("options", [{}, {"tilt": 3.0}, {"block": 4}])
def test_with_one_child_it_samples_plainly_to_the_bit(options):
    chain = toy_chain()
    state = final(svdd(chain, chains=5, children=1, **options))
    assert torch.equal(state.latents, plain(5)) and chain.ledger.nfe == 30 and chain.ledger.rewards == 5


def test_the_best_of_the_children_goes_on_with_its_own_prediction():
    chain, shown = toy_chain(), toy_chain()
    events = svdd(chain, chains=1, children=8)
    latents = shown.initial([0])
    for i in range(5):  # the last step has no noise and no choice
        gaussian, _ = shown.kernel(latents, i, shown.predict(latents, i))
        children = shown.draw(gaussian.take(torch.zeros(8).long()), i, range(8))
        values = 0.5 * shown.model.denoised(children, i + 1)[:, 0]
        latents = children[values.argmax()][None]
        state = next(events).state
        torch.testing.assert_close(state.values[0], values)
        torch.testing.assert_close(state.latents, latents)
    last = next(events)
    torch.testing.assert_close(last.state.latents, shown.step(latents, 5, [0]))
    assert last.best.reward == pytest.approx(0.5 * float(last.state.latents)) and last.nfe == 1 + 8 * 5


@pytest.mark.parametrize("block, events, rewards", [(1, 6, 5 * 7 + 1), (2, 3, 3 * 7), (4, 2, 2 * 7), (9, 1, 7)])
def test_costs_by_block(block, events, rewards):
    chain = toy_chain(max_nfe=3 * svdd_nfe(6, 7) + 5)
    assert len(list(svdd(chain, chains=None, children=7, block=block))) == events
    assert chain.ledger.nfe == 3 * (1 + 7 * 5) and chain.ledger.rewards == chain.ledger.decodes == 3 * rewards


def test_one_block_is_the_best_of_m_paths_from_one_noise():
    chain, shown = toy_chain(), toy_chain()
    state = final(svdd(chain, chains=1, children=12, block=6))
    paths = shown.finish(shown.initial([0]).expand(12, 1), 0, range(12))
    torch.testing.assert_close(state.values[0], 0.5 * paths[:, 0])
    assert chain.best.reward == pytest.approx(0.5 * float(paths.max())) == pytest.approx(0.5 * float(state.latents))


def test_a_last_step_with_noise_is_chosen_at_as_well():
    chain = toy_chain(flow_schedule(), transition=DanceSDE())
    assert all(chain.stds)
    events = list(svdd(chain, chains=1, children=4))
    assert chain.ledger.rewards == 6 * 4 and len(events[-1].rewards) == 4 and chain.ledger.nfe == 1 + 4 * 5
    assert events[-1].best.reward == max(events[-1].rewards) == pytest.approx(0.5 * float(events[-1].state.latents))


def test_more_children_and_more_tilt_raise_the_reward():
    def mean(**options):
        return float(final(svdd(quick_chain(), chains=400, **options)).latents.mean()) / 2

    by_children = [mean(children=m) for m in (1, 2, 5, 20)]
    assert by_children == sorted(by_children) and abs(by_children[0]) < 0.2 and by_children[-1] > 1.1
    by_tilt = [mean(children=5, tilt=tilt) for tilt in (0.0, 1.0, 5.0, math.inf)]
    assert by_tilt == sorted(by_tilt) and abs(by_tilt[0]) < 0.2 and by_tilt[-1] == by_children[2]


@pytest.mark.parametrize("options", [{}, {"tilt": 2.0}, {"block": 2}])
def test_neither_chunks_nor_further_chains_change_a_chain(options):
    one, many = (
        final(svdd(toy_chain(batch_size=size), chains=n, children=5, **options)) for n, size in ((2, 3), (6, 64))
    )
    torch.testing.assert_close(one.latents, many.latents[:2], rtol=1e-12, atol=1e-12)


def test_chains_choose_independently():
    chosen = next(svdd(toy_chain(), chains=400, children=2, tilt=0.0)).state.chosen
    assert 150 < int(chosen.sum()) < 250


@pytest.mark.parametrize("message, options", [
    ("children: got 0", dict(children=0)), ("tilt: got -1", dict(tilt=-1.0)), ("tilt: got nan", dict(tilt=math.nan)),
    ("block: got 0", dict(block=0)), ("chains: got 6, expected 1 .. 5, at 101", dict(chains=6)),
    ("chains: got 0", dict(chains=0)),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_before_they_cost(message, options):
    chain = toy_chain(max_nfe=600)
    with pytest.raises(ValueError, match=message):
        next(svdd(chain, **options))
    with pytest.raises(ValueError, match="chains: got None without a budget"):
        next(svdd(toy_chain(), chains=None))
    assert chain.ledger.nfe == 0 and svdd_least(6, {}) == 101
    assert svdd_least(6, {"chains": 2, "children": 3}) == 32 and svdd_least(6, {"chains": None, "children": 3}) == 16


def test_a_real_generator_is_decoded():
    generator = Generator.from_pretrained(resolve_model("shapes-flow"))

    def red(images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    ledger = Ledger(max_nfe=1 + 3 * (generator.num_steps - 1))
    chain = Chain(generator, "a red circle", red, noisy_of(generator.schedule), ledger=ledger)
    events = list(svdd(chain, chains=1, children=3))
    assert ledger.nfe == ledger.max_nfe and events[0].best is None and events[-1].best.latents.isfinite().all()
    assert events[-1].best.reward == events[-1].state.values.max()
