"""Search with few steps, then draw the noise that won with more (Ma et al. 2025, arXiv:2501.09732, section 4)."""

from typing import Any

from visalign.transitions import ode_of

from .chain import Chain
from .ledger import Ledger
from .records import Best

STARTS = ("best-of-n", "random", "zero-order")  # searches that choose an initial noise


def check_render(chain: Chain, method: str, num_steps: int) -> None:
    """Refuse a search whose winner is not its initial noise alone.

    Raises:
        ValueError: another method, steps that draw noise, or no more steps than the search has.
    """
    if method not in STARTS:
        raise ValueError(f"search: got {method!r} with render_steps, expected one of {STARTS}, which choose a noise")
    if any(chain.stds):
        raise ValueError(
            f"transition: got {chain.transition!r} with render_steps, expected 'ode': noise drawn on the way would be "
            "another with other steps"
        )
    if num_steps <= chain.num_steps:
        raise ValueError(
            f"render_steps: got {num_steps}, expected more than the search's own steps, here {chain.num_steps}"
        )


def render(chain: Chain, model: Any) -> tuple[Best, Ledger]:
    """The best noise of a search drawn by the ODE of a model with more steps; the result, and what it cost.

    What wins with few steps need not win with more, so compare the two rewards, and `step_agreement` of some noises.

    Args:
        model: as the chain's, a `visalign.pipeline.generator.Generator` of the same pipeline, with more steps.

    Raises:
        ValueError: the search has finished nothing, or does not choose an initial noise.
    """
    if chain.best is None or chain.best.start is None:
        got = "nothing finished yet" if chain.best is None else "a search that does not choose an initial noise"
        raise ValueError(f"chain: got {got}, expected one with a best noise")
    if model.schedule is None:
        model.noise([chain.prompt], [0], **chain.inputs)
    ledger = Ledger(max_nfe=model.schedule.num_steps)
    settings: dict[str, Any] = dict(seed=chain.seed, ledger=ledger, batch_size=chain.batch_size, context=chain.context)
    fine = Chain(model, chain.prompt, chain.reward, ode_of(model.schedule), **settings, **chain.inputs)
    entities = [chain.best.entity]
    with fine.counted():
        fine.result(fine.finish(chain.best.start, 0, entities), entities, chain.best.start)
    assert fine.best is not None
    return fine.best, ledger
