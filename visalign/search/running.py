"""Running a search: from its name to its events."""

from collections.abc import Callable, Iterator
from typing import Any

from visalign.transitions import Transition, make_transition, noisy_of, ode_of, sampler_of

from .chain import Chain
from .ledger import Ledger
from .methods import find_method
from .records import Event


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
    chosen = find_method(method)
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
        method: a name in METHODS, or "file.py:function" of your own.
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
    chosen = find_method(method)
    own = {name: value for name, value in options.items() if name in chosen.options}
    with chain.counted():
        yield from chosen.search(chain, **own)
