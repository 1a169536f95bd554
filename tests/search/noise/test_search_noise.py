"""Search over noise: neighbours, rounds, paths, what each costs, and that it finds more than its start."""

import pytest
import torch
from search_toys import MixtureModel, flow_schedule, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.search import Chain, Ledger
from visalign.search.best_of_n import best_of_n
from visalign.search.noise.noise_search import (
    neighbour_noise,
    noise_level,
    path_rounds,
    paths,
    random_search,
    zero_order,
)
from visalign.transitions import Schedule, ode_of
from visalign.worlds import resolve_model


class Wide(MixtureModel):
    """The mixture in each of 6 dimensions."""

    def noise(self, prompts, seeds):
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(rows)


def wide_chain(schedule=None, **options):
    schedule = vp_schedule() if schedule is None else schedule
    options.setdefault("transition", ode_of(schedule))
    return toy_chain(model=Wide(schedule), **options)


def fine_flow(steps):
    return flow_schedule([1 - i / steps for i in range(steps + 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neighbour_has_the_norm_and_the_angle_asked_for(dtype):
    torch.manual_seed(0)
    noise, gaussian = torch.randn(5, 4, 8, 8, dtype=dtype), torch.randn(5, 4, 8, 8, dtype=dtype)
    for cosine in (0.95, 0.0, -0.3):
        found = neighbour_noise(noise, gaussian, cosine)
        n, y = noise.flatten(1).double(), found.flatten(1).double()
        assert found.dtype == dtype and found.shape == noise.shape
        torch.testing.assert_close(y.norm(dim=1), n.norm(dim=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            (y * n).sum(1) / n.norm(dim=1) ** 2, torch.full((5,), cosine).double(), atol=1e-6, rtol=0
        )
    distance = (neighbour_noise(noise, gaussian, 0.95) - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    torch.testing.assert_close(distance, torch.full_like(distance, 0.3162), atol=1e-4, rtol=0)


def test_the_neighbour_of_one_number_keeps_the_law_of_noise():
    torch.manual_seed(0)
    noise = torch.randn(100_000, 1)
    found = neighbour_noise(noise, torch.randn_like(noise), 0.8)
    assert float(found.std()) == pytest.approx(1, abs=0.01) and float((found * noise).mean()) == pytest.approx(
        0.8, abs=0.01
    )


def test_random_search_is_best_of_n_in_doubling_rounds():
    plain = list(best_of_n(toy_chain(max_nfe=6 * 31)))[-1]
    chain = toy_chain(max_nfe=6 * 31 + 5)
    events = list(random_search(chain))
    assert events[-1].state.rewards == plain.state.rewards and events[-1].best.reward == plain.best.reward
    assert [len(e.rewards) for e in events] == [2, 4, 8, 16, 1] and chain.ledger.nfe == 6 * 31
    parts = list(random_search(toy_chain(max_nfe=6 * 31, batch_size=3)))
    assert [len(e.rewards) for e in parts] == [2, 3, 1, 3, 3, 2, 3, 3, 3, 3, 3, 1, 1]
    assert parts[-1].state.rewards == pytest.approx(plain.state.rewards, abs=1e-12)


def test_zero_order_moves_to_the_best_neighbour_and_else_to_a_fresh_noise_and_pays_for_no_pivot_twice():
    chain = wide_chain(max_nfe=6 * 40 + 3)
    pivots, moves, fresh = [], 0, 0
    for event in zero_order(chain, neighbours=3):
        pivots.append(event.state.pivot_reward)
        if "pivot" in event.note:
            assert len(event.rewards) == 1 and event.state.pivot_reward == event.rewards[0]
            fresh += 1
        elif "to a neighbour" in event.note:
            assert pivots[-1] == max(event.rewards) > pivots[-2] and event.state.pivot is not None
            moves += 1
        else:
            assert max(event.rewards) <= pivots[-2] and event.state.pivot is None
    assert moves >= 2 and fresh >= 2 and chain.ledger.nfe == 6 * 40 and len(event.state.rewards) == 40
    assert event.best.reward == max(event.state.rewards)
    again = list(zero_order(wide_chain(max_nfe=6 * 40, batch_size=2), neighbours=3))[-1]
    assert again.state.rewards == pytest.approx(event.state.rewards, abs=1e-9)


def test_zero_order_keeps_the_step_noise_of_a_noisy_kernel_so_that_a_noise_has_one_result():
    chain = wide_chain(max_nfe=6 * 9, transition=None)
    finished = []
    keep = chain.finish

    def finish(latents, step, entities):
        finished.append((latents.clone(), keep(latents, step, entities)))
        return finished[-1][1]

    chain.finish = finish
    list(zero_order(chain, neighbours=4))
    noise = torch.cat([n for n, _ in finished])
    fresh = wide_chain(transition=None)
    results = torch.cat([r for _, r in finished])
    torch.testing.assert_close(fresh.finish(noise, 0, [0] * len(noise)), results)


def test_zero_order_climbs_faster_than_random_search_in_many_dimensions():
    def climbed(method, seed):
        return list(method(wide_chain(fine_flow(4), max_nfe=4 * 60, seed=seed)))[-1].best.reward

    # Of a smooth reward: the sum of six coordinates, each of which ends near 2 or -2.
    gains = [climbed(zero_order, seed) - climbed(random_search, seed) for seed in range(12)]
    assert sum(gains) / len(gains) > 0


def test_paths_on_a_fine_schedule_take_the_papers_rounds_and_predictions():
    schedule = fine_flow(100)
    low, rounds = path_rounds(schedule)
    assert low == 89 and rounds == [(11, 92), (14, 95), (17, 98), (20, 100)]
    assert len(path_rounds(fine_flow(1000), level=0.12)[1]) == 4
    chain = wide_chain(schedule, max_nfe=2 * 89 + 2 * 3 * (81 + 81 + 81 + 80))
    events = list(paths(chain, starts=2, branches=3))
    assert chain.ledger.left == 0 and len(events[-1].rewards) == 6 and events[-1].best is not None
    assert all(event.best is None for event in events[:-1])


@pytest.mark.parametrize("levels", [(1, 0.5, 0), (1, 0.7, 0.3, 0), tuple(1 - i / 10 for i in range(11))])
def test_paths_advance_on_coarse_schedules(levels):
    low, rounds = path_rounds(flow_schedule(levels))
    at = low
    for high, end in rounds:
        assert 0 <= high < at < end
        at = end
    assert at == len(levels) - 1
    assert path_rounds(flow_schedule((1, 0))) == (0, [])


@pytest.mark.parametrize("schedule", [vp_schedule(), flow_schedule()], ids=lambda s: s.kind)
@pytest.mark.parametrize("noisy", [False, True])
def test_paths_hold_any_budget_and_finish_what_they_began(schedule, noisy):
    for budget in (6, 7, 13, 40, 61, 100, 233):
        chain = wide_chain(schedule, max_nfe=budget, transition=None if noisy else ode_of(schedule))
        events = list(paths(chain, starts=3, branches=3))
        assert chain.ledger.nfe <= budget and chain.ledger.left < 6 and events[-1].best is not None
        final = events[-1].best.latents
        assert final.shape == (1, 6) and (final.abs() < 4).all()
    again = list(
        paths(wide_chain(schedule, max_nfe=233, transition=chain.transition, batch_size=2), starts=3, branches=3)
    )
    assert again[-1].state.rewards == pytest.approx(events[-1].state.rewards, abs=1e-9)


@pytest.mark.parametrize("budget", range(60, 700, 29))
def test_survivors_of_a_round_are_finished_whatever_the_budget(budget):
    chain = wide_chain(fine_flow(30), max_nfe=budget)
    events = list(paths(chain, starts=2, branches=4))
    assert len(path_rounds(chain.schedule)[1]) > 1 and chain.ledger.left < 30
    assert events[-1].best is not None and (events[-1].best.latents.abs() < 4).all()


def test_paths_carry_what_was_selected_into_their_results():
    def results(method, **options):
        chains = [wide_chain(fine_flow(30), max_nfe=4000, seed=seed) for seed in range(10)]
        return torch.tensor([r for chain in chains for r in list(method(chain, **options))[-1].state.rewards])

    base, found = results(best_of_n), results(paths, starts=2, branches=8, level=0.3, forward=0.4, backward=0.5)
    assert found.mean() > base.mean() + 3  # 4.4 and 0.1


def test_branching_without_selection_keeps_the_law():
    def nothing(images, prompts):
        return 0 * images.flatten(1).sum(1)

    schedule = fine_flow(50)
    chain = toy_chain(schedule, transition=ode_of(schedule), max_nfe=400 * (45 + 2 * 160), reward=nothing)
    final, keep = [], chain.result
    chain.result = lambda latents, entities, starts=None: final.append(latents) or keep(latents, entities, starts)
    list(paths(chain, starts=400, branches=2))
    x = torch.cat(final)
    assert len(x) >= 800 and abs(float((x > 0).double().mean()) - 0.5) < 0.06
    assert float(x.abs().mean()) == pytest.approx(2.0, abs=0.03) and float(x.abs().std()) == pytest.approx(
        0.3, abs=0.03
    )


def test_a_level_of_any_path_is_its_share_of_noise():
    flow = flow_schedule((1, 0.25, 0))
    assert [noise_level(flow, i) for i in range(3)] == [1, 0.25, 0]
    vp = Schedule(
        "diffusion", torch.tensor([2.0, 1.0]), alphas_cumprod=torch.tensor([0.0, 0.36, 1.0]), prediction_type="sample"
    )
    assert [noise_level(vp, i) for i in range(3)] == pytest.approx([1, 0.8 / 1.4, 0])


def test_what_cannot_be_searched_is_refused_before_it_costs():
    for method, message, options in [
        (random_search, "first: got 0", dict(first=0)),
        (random_search, "growth: got 0", dict(growth=0)),
        (zero_order, "neighbours: got 0", dict(neighbours=0)),
        (zero_order, "cosine: got 1", dict(cosine=1)),
        (paths, "starts: got 0", dict(starts=0)),
        (paths, "branches: got 1, expected >= 2", dict(branches=1)),
        (paths, "level, forward, backward: got 0.11, 0.9, 0.95", dict(forward=0.9, backward=0.95)),
        (paths, "level, forward, backward: got 0.11, 0.78, 0.7", dict(backward=0.7)),
    ]:
        chain = toy_chain(max_nfe=60)
        with pytest.raises(ValueError, match=message):
            next(method(chain, **options))
        assert chain.ledger.nfe == 0


def test_the_shipped_flow_is_searched_by_all():
    generator = Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=4)
    generator.noise(["a red circle"], [0])

    def brightness(images, prompts):
        return images.flatten(1).mean(1)

    for method, budget in ((random_search, 17), (zero_order, 24), (paths, 50)):
        chain = Chain(generator, "a red circle", brightness, ode_of(generator.schedule), ledger=Ledger(max_nfe=budget))
        events = list(method(chain))
        bests, rewards = [event.best.reward for event in events if event.best], [r for e in events for r in e.rewards]
        assert bests == sorted(bests) and bests[-1] == max(rewards) > min(rewards) and chain.ledger.left < 4
