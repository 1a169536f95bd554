"""Alignment at test time: searches that spend denoiser calls, not weights, on a reward.

for event in run(generator, "three red circles", make_reward("clip"), "dts-star", budget=500, seed=7):
    print(event.nfe, event.best.reward if event.best else "-")
images_to_pil(event.best.image)[0].save("best.png")
"""

from collections.abc import Callable, Iterator
from typing import Any

from visalign.names import unknown_name
from visalign.transitions import Transition, make_transition, noisy_of, ode_of, sampler_of

from .best_of_n import best_of_n_kl, expected_best, snis_weights
from .chain import Chain
from .ledger import BudgetExceeded, Ledger
from .methods import METHODS, Method
from .records import Best, Event, Role

__all__ = [
    "METHODS",
    "Best",
    "BudgetExceeded",
    "Chain",
    "Event",
    "Ledger",
    "Method",
    "Role",
    "best_of_n_kl",
    "events_of",
    "expected_best",
    "prepare",
    "run",
    "snis_weights",
]


def prepare(
    generator: Any,
    prompt: str,
    reward: Callable,
    method: str = "best-of-n",
    *,
    budget: int,
    seed: int = 0,
    transition: str | Transition | None = None,
    batch_size: int = 16,
    context: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    **options: Any,
) -> Chain:
    """The chain that `run` searches, after all that can be refused has been; nothing is spent yet.

    Args and raises: as `run`.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    chosen = METHODS[method]
    chosen.check(method, options)
    inputs = inputs or {}
    if generator.schedule is None:
        generator.noise([prompt], [0], **inputs)
    if transition is None:
        transition = (sampler_of if chosen.plain else noisy_of)(generator.schedule)
    elif isinstance(transition, str):
        transition = ode_of(generator.schedule) if transition == "ode" else make_transition(transition)
    ledger = Ledger(max_nfe=budget)
    chain = Chain(
        generator,
        prompt,
        reward,
        transition,
        seed=seed,
        ledger=ledger,
        batch_size=batch_size,
        context=context,
        **inputs,
    )
    if chosen.noisy:
        chain.require_noise()
    if chosen.gradient:
        chain.require_gradient()
    least = chosen.least(chain.num_steps, options)
    if budget < least:
        raise ValueError(
            f"budget: got {budget} denoiser calls, expected >= {least}, the smallest run of {method!r} with "
            f"{chain.num_steps} steps a sample; raise the budget or take fewer steps"
        )
    return chain


def run(
    generator: Any, prompt: str, reward: Callable, method: str = "best-of-n", *, budget: int, **options: Any
) -> Iterator[Event]:
    """Search for the picture of a prompt that a reward likes; yields how it stands, the result is the last `best`.

    Args:
        generator: a `visalign.pipeline.generator.Generator`, with or without a LoRA loaded.
        reward: pointwise, higher is better; see `visalign.rewards.make_reward`.
        method: one of METHODS.
        budget: guided predictions (NFE) that may be made, never exceeded.
        options: seed (0); transition: a name or a Transition (None: the DDIM family's step with noise, "ode" for none);
            batch_size (16) rows at once, which changes no result; context for the reward; inputs of the pipeline's
            call; and the method's own.

    Raises:
        ValueError: at once, before anything is spent: unknown names and options, a deterministic transition or a
            reward without gradient for a method that needs more, a budget below one sample.
    """
    return events_of(prepare(generator, prompt, reward, method, budget=budget, **options), method, options)


def events_of(chain: Chain, method: str, options: dict[str, Any]) -> Iterator[Event]:
    """The events of a prepared chain's search; of the options those that the method has."""
    own = {name: value for name, value in options.items() if name in METHODS[method].options}
    with chain.counted():
        yield from METHODS[method].search(chain, **own)
