"""The toys of `search_toys`, with noise drawn a batch at a time: for tests of laws, which need many particles."""

import torch
from search_toys import MixtureModel, Quadrature, ToyChain, half, vp_schedule

from visalign.sampling.seeds import derived_seed
from visalign.search import Ledger, Role
from visalign.transitions import noisy_of

EVERY_STEP = dict(start_step=0, every=1, end_step=5)  # of the toys' six


class QuickChain(ToyChain):
    """Noise of a batch from the first entity and the size: as independent as the real one's, but not a row's own."""

    def initial(self, entities):
        return self.noise(entities, -1, torch.zeros(len(entities), 1, dtype=torch.float64), Role.INIT)

    def noise(self, entities, step_index, like, role=Role.STEP):
        seed = derived_seed(self.seed, role, step_index + 1, entities[0], len(entities))
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def quick_chain(seed=0, schedule=None, max_nfe=None, reward=half) -> QuickChain:
    """Of the VP toy by default."""
    model = MixtureModel(vp_schedule() if schedule is None else schedule)
    ledger = Ledger(max_nfe=max_nfe)
    return QuickChain(model, "toy", reward, noisy_of(model.schedule), seed=seed, ledger=ledger, batch_size=10**9)


def final(events):
    """The last event's state."""
    return list(events)[-1].state


def distance(method, toy: Quadrature, seeds=range(4), schedule=None, **options) -> float:
    """Mean W1 of a method's weighted particles to the tilted law."""
    states = [final(method(quick_chain(seed, schedule), tilt=float(toy.tilt), **options)) for seed in seeds]
    return sum(toy.distance(state.latents, state.weights) for state in states) / len(states)
