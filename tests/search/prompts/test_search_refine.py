"""Generate, critique, refine: what is kept, when it ends, what it costs; on a toy that obeys its words."""

import dataclasses
import math

import pytest
import torch
from search_toys import MixtureModel, ToyChain, half, toy_chain, vp_schedule

from visalign.pipeline.generator import Generator
from visalign.rewards import make_reward
from visalign.search import Chain, Ledger
from visalign.search.best_of_n import best_of_n
from visalign.search.prompts.critics import Critique
from visalign.search.prompts.refine import accepts, kept_words, lost_tokens, noise_margin, refine
from visalign.transitions import ode_of
from visalign.worlds import resolve_model

STEPS = 6
PROMPTS = (
    "a picture of a green triangle, one red star and one orange square",
    "one yellow circle, a red square and one orange square",
    "a drawing of one blue square, a red triangle and a yellow star",
)


class Obedient(MixtureModel):
    """The toy, whose samples move by the number that its words end in."""

    def predict(self, latents, step_index, prompts):
        prediction = super().predict(latents, step_index, prompts)
        if step_index < STEPS - 1:
            return prediction
        return prediction + torch.tensor([[float(p.split()[-1]) if " " in p else 0.0] for p in prompts])


class Scripted:
    """A critic that proposes these in turn, then nothing; remembers what it was asked."""

    def __init__(self, *proposals, marks=None, tokens=0):
        self.proposals, self.marks, self.tokens, self.asked = list(proposals), marks or {}, tokens, []

    def __call__(self, images, prompts, attempt=0, context=None):
        self.asked.append((float(images.sum()), prompts[0], attempt))
        proposal = self.proposals.pop(0) if self.proposals else None
        given = proposal if isinstance(proposal, Critique) else Critique(self.marks, refined=proposal)
        return [dataclasses.replace(given, tokens=self.tokens)]


def obedient(max_nfe=None, reward=half, **options) -> ToyChain:
    return toy_chain(model=Obedient(vp_schedule()), max_nfe=max_nfe, reward=reward, **options)


def first_reward() -> float:
    return next(best_of_n(obedient(max_nfe=STEPS))).best.reward


def test_the_first_picture_is_that_of_every_search_and_a_better_wording_takes_its_place_by_its_reward():
    chain, critic = obedient(), Scripted("toy 1", "toy 3", "toy 2", "toy 0.5")
    events = list(refine(chain, critic=critic, max_rounds=9))
    rounds = events[-1].state.rounds
    assert rounds[0].reward == first_reward()  # the same noise and words give the same picture
    gains = [round_.reward - rounds[0].reward for round_ in rounds]
    assert gains == pytest.approx([0, 0.5, 1.5, 1, 0.25], abs=1e-12)  # the shift of the same noise, times 0.5
    assert [round_.accepted for round_ in rounds] == [False, True, True, False, False]
    assert events[-1].state.kept == 2 and events[-1].best.reward == rounds[2].reward and events[-1].best.entity == 2
    assert chain.ledger.nfe == len(rounds) * STEPS and chain.ledger.rewards == len(rounds) and chain.words == "toy"
    pictures = [float(rounds[k].image.sum()) for k in (0, 1, 2, 2)]  # it is the one that stands that is criticised
    assert critic.asked == [(picture, "toy", k) for picture, k in zip(pictures, (0, 0, 0, 1))]
    assert [len(round_.critiques) for round_ in rounds] == [1, 1, 2, 0, 0]


def test_rewards_and_critics_are_shown_the_original_prompt_only():
    seen = []

    def reward(images, prompts, context=None):
        seen.extend(prompts)
        return half(images, prompts)

    critic = Scripted("toy 1", "toy 2")
    list(refine(obedient(reward=reward), critic=critic))
    assert set(seen) == {"toy"} and len(seen) == 3 and {prompt for _, prompt, _ in critic.asked} == {"toy"}


def test_a_critic_that_never_helps_leaves_the_first_picture_and_is_heard_twice():
    chain = obedient(max_nfe=100)
    *_, last = refine(chain, critic=Scripted("toy -1", "toy -2", "toy 5"), max_rounds=9)
    assert last.state.kept == 0 and last.best.reward == first_reward() and last.state.rejections == 2
    assert chain.ledger.nfe == 3 * STEPS and [r.words for r in last.state.rounds] == ["toy", "toy -1", "toy -2"]


def test_words_that_were_drawn_before_end_it_unpaid():
    for proposals, drawn in (("toy",), 1), ((" toy\n",), 1), (("toy 1", "toy  1"), 2), (("toy 1", "toy"), 2):
        chain = obedient()
        *_, last = refine(chain, critic=Scripted(*proposals, "toy 7"))
        assert len(last.state.rounds) == drawn and chain.ledger.nfe == drawn * STEPS


def test_critiques_without_use_count_as_rejections_and_raise_nothing():
    chain = obedient()
    events = list(refine(chain, critic=Scripted(Critique(problem="unreadable answer"), None)))
    assert [event.note for event in events[1:]] == ["no proposal: unreadable answer", "no proposal: no refined request"]
    assert chain.ledger.nfe == STEPS and events[-1].state.rejections == 2
    *_, last = refine(obedient(), critic=Scripted(Critique(problem="busy"), "toy 1"), max_rounds=1)
    assert last.state.kept == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("accept", ["reward", "critic", "always"])
def test_best_never_falls_and_neither_rounds_nor_budget_are_exceeded(seed, accept):
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randn(20, generator=generator).tolist()
    for budget in (STEPS, 2 * STEPS - 1, 2 * STEPS, 3 * STEPS + 2, 100):
        critic = Scripted(*[Critique({"text_faithfulness": 2 + s / 9}, refined=f"toy {s}") for s in shifts])
        chain = obedient(max_nfe=budget)
        events = list(refine(chain, critic=critic, max_rounds=4, max_rejections=99, accept=accept))
        bests, drawn = [event.best.reward for event in events], events[-1].state.rounds
        assert bests == sorted(bests) and bests[-1] == max(r.reward for r in drawn)
        assert len(drawn) == min(5, budget // STEPS) and chain.ledger.nfe == len(drawn) * STEPS
        kept = [drawn[0], *(r for r in drawn if r.accepted)]
        assert accept != "reward" or [r.reward for r in kept] == sorted(r.reward for r in kept)


def test_a_picture_that_is_good_is_left_alone_and_both_aspects_must_be():
    good = {"text_faithfulness": 3.0, "physical_quality": 3.5}
    assert len(list(refine(obedient(), critic=Scripted("toy 1", marks=good)))) == 1
    assert len(list(refine(obedient(), critic=Scripted("toy 1", marks=good), good=None, max_rounds=1))) == 2
    for poor in ({"text_faithfulness": 4.0}, good | {"physical_quality": 2.9}, good | {"text_faithfulness": None}):
        assert len(list(refine(obedient(), critic=Scripted("toy 1", marks=poor), max_rounds=1))) == 2


def test_what_is_kept_can_go_by_the_critic_or_as_published_by_nothing():
    def marked(mark, words=None):
        return Critique({"text_faithfulness": mark}, refined=words)

    # asked of the first, then of both pictures drawn: the one with the worse reward is marked higher
    critic = Scripted(marked(1.0, "toy -1"), marked(2.0, "toy -2"), marked(1.5), tokens=5)
    chain = obedient()
    *_, last = refine(chain, critic=critic, accept="critic", max_rounds=2)
    assert [r.accepted for r in last.state.rounds] == [False, True, False] and last.state.kept == 1
    assert last.best.reward == last.state.rounds[0].reward  # the event's best is the reward's
    assert chain.ledger.tokens == 15 and len(critic.asked) == 3  # one critique a picture
    failed = Scripted(marked(1.0, "toy 1"), Critique(problem="busy"))
    *_, last = refine(obedient(), critic=failed, accept="critic", max_rounds=1)
    assert last.state.kept == 0
    *_, last = refine(obedient(), critic=Scripted("toy -1", "toy -2"), accept="always", max_rounds=2)
    assert last.state.kept == 2 and last.state.rejections == 0


def test_gains_within_the_scatter_of_the_scores_are_rejected():
    spread = iter([0.0, *[1.0, -1.0] * 2, 1.0, *[0.0] * 9])  # of the first picture, five scores again, and all others

    def shaky(images, prompts, context=None):
        return half(images, prompts) + torch.tensor([next(spread) for _ in images])

    chain = obedient(reward=shaky)
    *_, last = refine(chain, critic=Scripted("toy 2", "toy 6"), rescores=5)
    margin = 2 * math.sqrt(6 / 5)  # of 1, -1, 1, -1, 1 about their mean 0.2
    assert last.state.margin == pytest.approx(margin) and noise_margin([1, -1, 1, -1, 1]) == pytest.approx(margin)
    assert [r.accepted for r in last.state.rounds] == [False, False, True]  # gains of 1 and 3
    assert chain.ledger.rewards == 8 and chain.ledger.nfe == 3 * STEPS
    marks = [Critique({"text_faithfulness": m}, refined=w) for m, w in ((1.0, "toy 1"), (4.0, None), (3.0, None))]
    *_, last = refine(obedient(), critic=Scripted(*marks), accept="critic", rescores=2, max_rounds=1)
    assert last.state.margin == pytest.approx(2 * math.sqrt(0.5)) and last.state.kept == 0  # scores 0, 1; then 2/3


def test_the_rule_of_acceptance_is_strict():
    assert accepts(1.1, 1.0) and not accepts(1.0, 1.0) and not accepts(1.5, 1.0, 0.5) and accepts(1.6, 1.0, 0.5)
    assert not accepts(math.nan, 1.0) and accepts(1.0, math.nan) and not accepts(math.nan, math.nan)


def test_a_proposal_that_drops_the_prompts_words_can_be_refused():
    assert kept_words("a red circle", "two Red stars, a night") == pytest.approx(2 / 3) and kept_words("", "x") == 1
    assert kept_words("a red circle", "The picture shows a red circle on grass") == 1
    chain = obedient()
    events = list(refine(chain, critic=Scripted("cat 1", "toy 1"), min_similarity=0.6, max_rounds=1))
    assert events[1].note == "no proposal: keeps 0% of the prompt's words" and events[-1].state.kept == 1


@pytest.mark.parametrize(
    "options, says",
    [
        ({"max_rounds": -1}, "max_rounds: got -1, expected >= 0"),
        ({"max_rejections": 0}, "max_rejections: got 0, expected >= 1"),
        ({"accept": "rewards"}, "accept: got 'rewards'.*did you mean 'reward'"),
        ({"margin": -0.1}, "margin: got -0.1"),
        ({"rescores": 1}, "rescores: got 1"),
        ({"accept": "always", "rescores": 5}, "margin, rescores: got 0.0, 5, expected 0"),
        ({"good": 5}, "good: got 5, expected a mark, 1 .. 4"),
        ({"min_similarity": 1.1}, "min_similarity: got 1.1"),
        ({"critic": "shape"}, "critic: got 'shape'.*did you mean 'shapes'"),
        ({"critic": "shapes"}, "which the shapes world cannot read"),
        ({"critic": "shapes", "critic_options": {"strict": True}}, "option of critic 'shapes': got 'strict'"),
    ],
)
def test_what_cannot_work_is_refused_before_it_costs(options, says):
    chain = obedient(max_nfe=100)
    with pytest.raises(ValueError, match=says):
        next(refine(chain, **{"critic": Scripted("toy 1"), **options}))
    assert chain.ledger.nfe == 0


@pytest.fixture(scope="module")
def shapes_flow():
    return Generator.from_pretrained(resolve_model("shapes-flow"))


def shapes_chain(generator, prompt, max_nfe=None) -> Chain:
    generator.noise([prompt], [0])
    reward, transition = make_reward("gold"), ode_of(generator.schedule)
    return Chain(generator, prompt, reward, transition, seed=3, ledger=Ledger(max_nfe=max_nfe))


def test_a_proposal_longer_than_the_text_encoders_read_is_not_drawn(shapes_flow):
    chain, long = shapes_chain(shapes_flow, "a red circle", 40), "a red circle, a blue star and " * 4 + "a red star"
    assert lost_tokens(chain, "a red circle") == 0 and lost_tokens(chain, long) == 4 * 8 + 3 + 2 - 16
    events = list(refine(chain, critic=Scripted(long), max_rejections=1))
    assert events[-1].note == "no proposal: 21 tokens longer than the generator reads" and chain.ledger.nfe == 10
    assert lost_tokens(obedient(), long) == 0  # nothing is known of a toy


def test_refining_mends_pictures_of_the_shapes_world(shapes_flow):
    gains = []
    for prompt in PROMPTS:
        chain = shapes_chain(shapes_flow, prompt, 40)
        events = list(refine(chain, critic="shapes"))
        rounds = events[-1].state.rounds
        gains.append(events[-1].best.reward - rounds[0].reward)
        assert chain.ledger.nfe == 10 * len(rounds) <= 40 and chain.words == prompt
        assert all(r.words != prompt for r in rounds[1:]) and events[-1].best.image.shape == (1, 3, 64, 64)
    assert min(gains) >= 0 and max(gains) > 0.5
