"""Samplers of a tilted law in two dimensions: eight modes, of which the tilt takes the last for three quarters.

Prior: equal Gaussians phi_i of spread 0.3 on a circle of radius 4, w_i proportional to exp(1.5 i);
r(x) = log(sum_i w_i phi_i / sum_i phi_i), so that the prior tilted by exp(r) is the mixture with the weights w.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from search_toys import ToyChain
from torch import Tensor

from visalign.search import Ledger, snis_weights
from visalign.search.best_of_n import best_of_n
from visalign.search.particles.steering import fk
from visalign.search.particles.twisted import das, tds
from visalign.search.tree.dts import dts
from visalign.search.tree.reading import leaf_law
from visalign.transitions import Schedule, noisy_of

ANGLES = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
CENTRES, SPREAD = 4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.3
WANTED = torch.softmax(1.5 * torch.arange(8, dtype=torch.float64), 0)
STEPS = 12


@dataclass
class Circle:
    """The exact denoiser of the prior on a flow, as MixtureModel; latents (N, 2) float64."""

    schedule: Schedule

    def noise(self, prompts, seeds) -> Tensor:
        rows = [torch.randn(2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(rows)

    def predict(self, latents, step_index, prompts) -> Tensor:
        sigma = self.schedule.levels[step_index]
        alpha = 1 - sigma
        variance = alpha**2 * SPREAD**2 + sigma**2
        apart = latents[:, None] - alpha * CENTRES
        shares = torch.softmax(-0.5 * apart.square().sum(-1) / variance, 1)
        denoised = (shares[..., None] * (CENTRES + alpha * SPREAD**2 / variance * apart)).sum(1)
        return (latents - denoised) / sigma

    def decode(self, latents, prompts) -> Tensor:
        return latents[:, :, None, None]


def likely_modes(images, prompts, context=None) -> Tensor:
    near = -0.5 * (images.flatten(1)[:, None] - CENTRES).square().sum(-1) / SPREAD**2
    return torch.logsumexp(near + WANTED.log(), 1) - torch.logsumexp(near, 1)


likely_modes.differentiable = True


def circle_chain(count: int) -> ToyChain:
    sigmas = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    schedule = Schedule("flow", 1000 * sigmas[:-1], sigmas=sigmas)
    ledger = Ledger(max_nfe=count * STEPS)
    return ToyChain(Circle(schedule), "circle", likely_modes, noisy_of(schedule), ledger=ledger, batch_size=10**6)


def shares(latents: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of each mode, (8,)."""
    weights = torch.full((len(latents),), 1 / len(latents), dtype=torch.float64) if weights is None else weights
    mode = torch.cdist(latents, CENTRES).argmin(1)
    return torch.zeros(8, dtype=torch.float64).index_add(0, mode, weights / weights.sum())


def pool(chain):
    state = list(best_of_n(chain, keep_latents=True))[-1].state
    return torch.cat(state.latents), snis_weights(state.rewards, 1.0)


def particles(search, **options):
    def run(chain):
        state = list(search(chain, particles=None, tilt=1.0, output="weighted", **options))[-1].state
        return state.latents, state.weights

    return run


def tree(**options):
    def run(chain):
        grown = list(dts(chain, tilt=1.0, widening=2, exponent=0.8, leaves_at_once=16, **options))[-1].state
        return torch.cat([grown.states[leaf] for leaf in grown.leaves]), torch.from_numpy(leaf_law(grown))

    return run


def test_the_prior_has_its_modes_alike():
    base, _ = pool(circle_chain(4000))
    assert WANTED[-1] == pytest.approx(0.777, abs=5e-4)
    torch.testing.assert_close(shares(base), torch.full((8,), 1 / 8, dtype=torch.float64), atol=0.02, rtol=0)
    assert 0.1 < float(torch.cdist(base, CENTRES).amin(1).square().mean()) < 2 * SPREAD**2  # twelve steps narrow a mode


# Of plain samples the distance is 0.65. An estimate of x0 at pure noise lies amid all modes, and has the reward of a
# random one: potentials that go by it from there on (fk from step 0, tds) lose most ancestors of the wanted mode.
@pytest.mark.parametrize(
    "search, apart",
    {
        "snis": (pool, 0.05),
        "fk": (particles(fk, potential="diff", start_step=5, every=1), 0.05),
        "fk, max": (particles(fk, potential="max", start_step=5, every=1), 0.05),
        "das": (particles(das, guidance_start=0.0), 0.06),
        "dts, least visited": (tree(allocation="least_visited"), 0.05),
        "dts, least visited, guided": (tree(allocation="least_visited", reward_guidance=1.0), 0.06),
        "tds": (particles(tds, form="mean", guidance_start=0.0), 0.2),
        "dts": (tree(), 0.2),
    }.values(),
)
def test_the_modes_have_the_tilted_shares(search, apart):
    latents, weights = search(circle_chain(2000))
    assert float((shares(latents, weights) - WANTED).abs().sum()) / 2 < apart
