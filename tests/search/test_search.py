"""The parts that every search stands on: the toys themselves, the ledger, best of n, refusals."""

import numpy as np
import pytest
import torch
from search_toys import MixtureModel, Quadrature, ToyChain, flow_schedule, half, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.rewards import CombinedReward, Member, as_reward, make_reward, score
from visalign.search import BudgetExceeded, Ledger, best_of_n_kl, expected_best, run, snis_weights
from visalign.search.best_of_n import best_of_n, mean_rank
from visalign.transitions import flow_ddim, flow_ode, noisy_of
from visalign.worlds import resolve_model


@pytest.mark.parametrize(
    "schedule, tilt, right, mean, value",
    [(vp_schedule(), 1, 0.8682, 1.4213, 0.39940), (flow_schedule(), 1, 0.8656, 1.4045, 0.39355)],
)
def test_the_toys_have_the_tabulated_laws(schedule, tilt, right, mean, value):
    toy = Quadrature(schedule, tilt)
    assert toy.base[toy.x > 0].sum() == pytest.approx(0.5, abs=3e-3)  # half a cell lies at 0
    assert toy.tilted[toy.x > 0].sum() == pytest.approx(right, abs=2e-3)
    assert toy.tilted @ toy.x == pytest.approx(mean, abs=3e-3)
    assert toy.value == pytest.approx(value, abs=1e-3)


def test_flow_ddim_without_noise_is_the_euler_step_and_with_it_keeps_the_marginal_variance():
    torch.manual_seed(0)
    x, v = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(flow_ddim(x, v, 0.7, 0.4, 0.0).mean, flow_ode(x, v, 0.7, 0.4).mean)
    assert float(flow_ddim(x, v, 1.0, 0.4, 1.0).std[0]) == pytest.approx(0.4)  # all noise afresh from sigma 1
    n, spread = 200_000, 0.5  # x0 ~ N(0, spread^2): one step keeps (1 - s)^2 spread^2 + s^2 where x0 is given
    x0, noise = spread * torch.randn(n, 1), torch.randn(n, 1)
    for eta in (0.0, 0.5, 1.0):
        gaussian = flow_ddim(0.3 * x0 + 0.7 * noise, noise - x0, 0.7, 0.4, eta)
        result = gaussian.sample(torch.randn(n, 1)) - 0.6 * x0
        assert float(result.std()) == pytest.approx(0.4, rel=0.01)


def test_a_ledger_refuses_to_be_overdrawn_and_goes_on_from_its_file():
    ledger = Ledger(max_nfe=10)
    ledger.spend(7)
    with pytest.raises(BudgetExceeded, match="max_nfe is 10"):
        ledger.spend(4)
    again = Ledger.from_dict(ledger.to_dict())
    assert again.nfe == 7 and again.left == 3 and again.seconds >= ledger.to_dict()["seconds"] - 1


def test_the_best_of_n_normal_draws_and_its_divergence_have_their_known_values():
    rng = np.random.default_rng(0)
    pools = rng.standard_normal((400, 64))
    for n, expected in {2: 0.5642, 4: 1.0294, 8: 1.4236, 16: 1.7660, 32: 2.0697, 64: 2.3437}.items():
        curve = [expected_best(pool, n) for pool in pools]
        assert np.mean(curve) == pytest.approx(expected, abs=3 * np.std(curve) / 20)
    kl = [best_of_n_kl(n) for n in (2, 4, 8, 16, 32, 64)]
    assert kl == pytest.approx([0.1931, 0.6363, 1.2044, 1.8351, 2.4970, 3.1745], abs=1e-4)
    assert expected_best([3.0, 1.0, 2.0], 1) == pytest.approx(2) and expected_best([3.0, 1.0, 2.0], 3) == pytest.approx(
        3
    )
    assert expected_best([3.0, 1.0, 2.0], 2, [10.0, 0.0, 1.0]) == pytest.approx((10 + 10 + 1) / 3)  # each pair's better
    with pytest.raises(ValueError, match="1 .. 3"):
        expected_best([1, 2, 3], 4)


def test_the_curve_of_a_pool_is_that_of_direct_draws():
    pool = toy_chain(max_nfe=6 * 512)
    rewards = list(best_of_n(pool))[-1].state.rewards
    direct = np.array(rewards).reshape(-1, 8).max(1)
    assert expected_best(rewards, 8) == pytest.approx(direct.mean(), abs=3 * direct.std() / 8)


def test_weighted_draws_of_the_base_have_the_tilted_law():
    chain = toy_chain(max_nfe=6 * 4000)
    pool = list(best_of_n(chain, keep_latents=True))[-1].state
    toy = Quadrature(vp_schedule())
    assert toy.distance(torch.cat(pool.latents), snis_weights(pool.rewards, 1.0)) < 0.06
    assert toy.distance(torch.cat(pool.latents)) > 1.2  # untilted: far


def test_neither_chunks_nor_the_budget_change_a_sample():
    whole = list(best_of_n(toy_chain(max_nfe=600)))[-1].state.rewards
    chunked = list(best_of_n(toy_chain(max_nfe=605, batch_size=7)))[-1].state.rewards
    assert len(whole) == 100 and chunked == pytest.approx(whole, abs=1e-12)


def test_best_never_falls_and_the_budget_holds():
    chain = toy_chain(max_nfe=1000, batch_size=3)
    events = list(best_of_n(chain))
    bests = [event.best.reward for event in events]
    assert bests == sorted(bests) and chain.ledger.nfe == 996 and bests[-1] == max(r for e in events for r in e.rewards)
    assert chain.ledger.rewards == chain.ledger.decodes == 166


def test_a_value_has_the_gradient_of_finite_differences():
    chain = toy_chain()
    x = torch.tensor([[0.3], [-1.1]], dtype=torch.float64)
    found = chain.value_gradient(x, 2)
    assert chain.ledger.nfe == chain.ledger.backwards == chain.ledger.reward_gradients == 2
    up, down = (0.5 * chain.model.denoised(x + h, 2) for h in (1e-5, -1e-5))
    torch.testing.assert_close(found.gradient, (up - down) / 2e-5, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.values, 0.5 * chain.model.denoised(x, 2)[:, 0])


def test_what_cannot_be_searched_is_refused_before_it_costs(monkeypatch):
    chain = toy_chain()
    model = chain.model

    def groupwise(images, prompts):
        return half(images, prompts)

    half = chain.reward
    groupwise.kind = "groupwise"
    spent = []
    monkeypatch.setattr(model, "predict", lambda *args: spent.append(args))
    for message, call in {
        "budget: got 5 .* expected >= 6": lambda: run(model, "p", half, budget=5),
        "search: got 'best-of-m'.*did you mean 'best-of-n'": lambda: run(model, "p", half, "best-of-m", budget=60),
        "option of 'best-of-n': got 'keep_latent'": lambda: run(model, "p", half, budget=60, keep_latent=True),
        "groupwise, expected a pointwise": lambda: run(model, "p", as_reward(groupwise), budget=60),
        "batch_size: got 0": lambda: run(model, "p", half, budget=60, batch_size=0),
        "transition: got 'ddmi'": lambda: run(model, "p", half, budget=60, transition="ddmi"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert not spent


def test_a_reward_that_is_no_number_is_said_also_where_it_is_differentiated():
    def broken(images, prompts):
        return images.flatten(1).sum(1) * float("nan")

    broken.differentiable = True
    chain = toy_chain(reward=broken)
    with pytest.raises(ValueError, match="reward 'broken', sample 0, prompt 'toy': gave nan, expected a number"):
        chain.result_gradient(torch.zeros(2, 1, dtype=torch.float64), [0, 1])


def test_the_mean_rank_of_verifiers_ignores_their_scales_and_shares_ties():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [1000.0, 3000.0, 4000.0, -5.0]])
    expected = torch.tensor([(4 + 3) / 2, (1 + 2) / 2, (2.5 + 1) / 2, (2.5 + 4) / 2], dtype=torch.float64)
    torch.testing.assert_close(mean_rank(scores), expected)
    assert int(mean_rank(scores).argmin()) == 1
    torch.testing.assert_close(mean_rank(scores.flip(1)), expected.flip(0))
    torch.testing.assert_close(mean_rank(torch.stack([scores[0].exp(), scores[1] * 7 - 1])), expected)


class Judges(ToyChain):
    """Three verifiers of a number that have nothing in common."""

    @staticmethod
    def judged(x):
        return torch.stack([(31 * x).sin(), (53 * x).sin(), (77 * x).sin()])

    def _rewards(self, images, prompts):
        x = images.flatten(1).sum(1)
        self.member_scores.append(self.judged(x))
        self._scored.append(torch.ones(len(x), dtype=torch.bool))
        return self.member_scores[-1].sum(0)


def test_what_stands_for_a_failed_score_never_wins_and_is_not_reported():
    chain, latents = toy_chain(), torch.zeros(3, 1)
    chain._valid = torch.tensor([False, True, True])
    chain._keep(torch.tensor([0.9, 0.9, 0.1]), latents, latents, [0, 1, 2])
    assert chain.best.entity == 1 and chain.event().rewards == pytest.approx((0.9, 0.1))
    chain._valid = torch.tensor([False])
    chain._keep(torch.tensor([5.0]), latents[:1], latents[:1], [3])
    assert chain.best.entity == 1


def test_an_ensemble_chooses_by_mean_rank_among_all_so_far():
    reward = CombinedReward([Member(name, 1.0, as_reward(half)) for name in "abc"])
    model, came_back, unlike_the_sum = MixtureModel(vp_schedule()), 0, 0
    for seed in range(6):
        found = {}
        for batch_size in (1, 40):
            ledger = Ledger(max_nfe=6 * 40)
            chain = Judges(
                model, "toy", reward, noisy_of(model.schedule), seed=seed, ledger=ledger, batch_size=batch_size
            )
            chosen = []
            for event in best_of_n(chain, ensemble=True):
                x = torch.cat(event.state.latents)[:, 0]
                k = int(mean_rank(chain.judged(x)).argmin())
                assert event.best.entity == k and event.best.reward == event.state.rewards[k]
                assert event.best.latents.item() == event.best.image.item() == x[k]
                chosen.append(k)
            again = sum(k < batch_size * n and k != chosen[n - 1] for n, k in enumerate(chosen) if n)
            assert ledger.decodes == 40 + again  # of those that had been passed over
            came_back += again
            found[batch_size] = event.best
        assert found[1].entity == found[40].entity and torch.equal(found[1].start, found[40].start)
        unlike_the_sum += found[1].entity != int(torch.tensor(event.state.rewards).argmax())
    assert came_back and unlike_the_sum


def test_an_ensemble_reads_the_members_of_a_reward_and_turns_those_with_a_negative_weight():
    generator = Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=2)
    for spec, signs in (
        ("jpeg_compressibility:1+clip_match:0.001", (1, 1)),
        ("jpeg_compressibility:-1+clip_match:0.001", (-1, 1)),
    ):
        reward = make_reward(spec)
        event = list(run(generator, "a red circle", reward, "best-of-n", budget=16, batch_size=3, ensemble=True))[-1]
        images = generator.decode(torch.cat(event.state.latents), ["a red circle"] * 8)
        parts = score(reward, images, ["a red circle"] * 8).parts
        ranks = mean_rank(torch.stack([sign * part for sign, part in zip(signs, parts.values())]))
        assert event.best.entity == int(ranks.argmin())
    with pytest.raises(ValueError, match="ensemble: got reward 'clip_match', expected at least two"):
        next(run(generator, "a red circle", make_reward("clip_match"), "best-of-n", budget=4, ensemble=True))
