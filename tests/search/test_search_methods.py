"""What holds for every search on every kind of model: budget, best, seeds, batches, refusals."""

import numpy as np
import pytest
import tiny_pipelines
import torch

from visalign.pipeline.generator import Generator
from visalign.rewards import score
from visalign.search import METHODS, prepare, run
from visalign.search.methods import _fits
from visalign.worlds import resolve_model

PROMPT, BUDGET = "two blue squares", 36
OPTIONS = {  # small enough for the budget
    "svdd": {"children": 3},
    "rbf": {"initial": 2},
    "reno": {"iterations": 3},
    "dno": {"iterations": 3},
    "enhance": {"rewrite": lambda prompt: f"a picture of {prompt}"},
}


def blueness(images, prompts):
    return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3))


blueness.differentiable = True


FAMILIES = {"flow": "Stable Diffusion 3", "diffusion": "Stable Diffusion 1.5", "consistency": "LCM"}


@pytest.fixture(scope="module", params=FAMILIES)
def generator(request):
    """A tiny model of random weights, of each kind."""
    sizes = dict(height=32, width=32, guidance_scale=1.0)
    return Generator(tiny_pipelines.make(FAMILIES[request.param]), num_steps=3, calibrate=False, **sizes)


@pytest.fixture(scope="module")
def flow():
    return Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_keeps_its_budget_and_its_best_and_follows_from_its_seed(generator, method):
    chain = prepare(generator, PROMPT, blueness, method, budget=BUDGET, **OPTIONS.get(method, {}))
    assert chain.ledger.nfe == 0
    options = {"budget": BUDGET, "seed": 5, **OPTIONS.get(method, {})}
    events = list(run(generator, PROMPT, blueness, method, **options))
    bests = [event.best.reward for event in events if event.best]
    found = events[-1].best
    assert 3 <= events[-1].nfe <= BUDGET and bests == sorted(bests)
    assert [e.nfe for e in events] == sorted(e.nfe for e in events)
    assert float(score(blueness, found.image, [PROMPT]).total) == pytest.approx(found.reward, abs=1e-4)
    decoded = generator.decode(found.latents, [PROMPT])
    torch.testing.assert_close(decoded, found.image, atol=1e-3, rtol=0)
    again = list(run(generator, PROMPT, blueness, method, batch_size=3, **options))[-1]
    assert again.nfe == events[-1].nfe and again.best.reward == pytest.approx(found.reward, abs=2e-4)
    torch.testing.assert_close(again.best.image, found.image, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if name not in ("refine", "enhance")])
def test_more_calls_find_more(flow, method):
    """Than the first plain sample: blueness is easy to raise, by choice as by gradient."""
    one = list(run(flow, PROMPT, blueness, "best-of-n", budget=3, seed=5))[-1].best.reward
    found = list(run(flow, PROMPT, blueness, method, budget=BUDGET, seed=5, **OPTIONS.get(method, {})))[-1]
    assert found.best.reward > one + 0.002 and found.nfe > BUDGET // 2


def test_first_samples_are_shared_by_the_methods_that_draw_them(flow):
    drawn = {}
    for method in ("best-of-n", "dts", "dts-star", "guidance"):
        options = {"scale": 0.0} if method == "guidance" else {}
        events = run(flow, PROMPT, blueness, method, budget=30, seed=1, **options)
        drawn[method] = [reward for event in events for reward in event.rewards][:2]
    for method, rewards in drawn.items():
        assert rewards == pytest.approx(drawn["best-of-n"], abs=1e-4), method


def test_with_a_budget_of_one_sample_methods_of_one_kernel_draw_the_same_picture(generator):
    steps = generator.schedule.num_steps
    options = {"svdd": {"children": 1}, "guidance": {"scale": 0.0}, "fk": {}, "dts": {}, "dts-star": {}}
    plain = list(run(generator, PROMPT, blueness, "best-of-n", budget=steps, seed=2))[-1]
    for method, given in options.items():
        alone = list(run(generator, PROMPT, blueness, method, budget=steps, seed=2, **given))[-1]
        assert alone.nfe == plain.nfe == steps
        torch.testing.assert_close(alone.best.image, plain.best.image, atol=1e-4, rtol=0)
    ode = list(run(generator, PROMPT, blueness, "random", budget=steps, seed=2))[-1].best.image
    climbed = list(run(generator, PROMPT, blueness, "zero-order", budget=steps, seed=2))[-1].best.image
    torch.testing.assert_close(climbed, ode, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.noisy])
def test_methods_that_need_noise_refuse_a_step_without(flow, method):
    with pytest.raises(ValueError, match="deterministic, expected a stochastic one.*best-of-n"):
        run(flow, PROMPT, blueness, method, budget=BUDGET, transition="ode")


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.gradient])
def test_methods_that_need_a_gradient_refuse_a_reward_without(flow, method):
    with pytest.raises(ValueError, match="no gradient, expected a differentiable one.*best-of-n"):
        run(flow, PROMPT, lambda images, prompts: images.mean((1, 2, 3)), method, budget=BUDGET)


@pytest.mark.parametrize("method", METHODS)
def test_budgets_below_the_smallest_run_and_options_of_another_type_are_refused(flow, method):
    with pytest.raises(ValueError, match="budget: got 2 denoiser calls, expected >= "):
        run(flow, PROMPT, blueness, method, budget=2)
    for name, parameter in METHODS[method].options.items():
        if isinstance(parameter.default, int | float):  # and so a number
            with pytest.raises(ValueError, match=f"{name}: got 'many', expected "):
                run(flow, PROMPT, blueness, method, budget=BUDGET, **{name: "many"})


def test_repeated_guidance_needs_a_larger_budget(flow):
    with pytest.raises(ValueError, match="budget: got 8 denoiser calls, expected >= 9"):
        run(flow, PROMPT, blueness, "guidance", budget=8, recurrences=3, guidance_start=0.0, form="universal")
    events = list(
        run(flow, PROMPT, blueness, "guidance", budget=9, recurrences=3, guidance_start=0.0, form="universal")
    )
    assert events[-1].nfe == 9 and events[-1].best


def test_a_number_fits_what_it_may_stand_for():
    assert _fits(3, "float") and _fits(None, "int | None") and not _fits(True, "int") and not _fits(None, "float")
    assert _fits(np.float64(0.5), "float") and _fits(np.int64(3), "int") and not _fits(0.5, "int")
    assert _fits("x", "Sequence[int] | None")  # left to the method
