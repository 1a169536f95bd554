"""Noise optimisation: gradients of the reward through the whole chain change the noise that a picture is made from.

`reno`: the initial noise, made for chains of one step or few (Eyring et al. 2024, arXiv:2406.04312). `dno`: the noises
of all steps (Tang et al. 2024, arXiv:2405.18881). Both take a noise for some iterations and then the next one, while
the budget lasts; the denoiser keeps no activations, so memory grows by a state a step.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visalign.search.chain import Chain
from visalign.search.records import Event, Role


@dataclass
class NoiseOptimization:
    """Rewards in order, of all iterations; which start is at work, its iteration, and the norm of its initial noise."""

    rewards: list[float] = field(default_factory=list)
    start: int = 0
    iteration: int = 0
    norm: float = 0.0


def reno(
    chain: Chain,
    *,
    iterations: int = 50,
    lr: float = 5.0,
    momentum: float = 0.9,
    clip: float = 0.1,
    reward_weight: float = 1.0,
    regularizer: float = 0.01,
) -> Iterator[Event]:
    """ReNO: SGD with Nesterov momentum on the initial noise z, of -weight r(z) + regularizer `radius_loss`(z).

    An iteration costs T predictions and T backward passes, the last of a start T predictions alone. The result is the
    best by the reward, not by the loss. Step noise, where the kernel has any, stays that of the start.

    Args:
        iterations: a start; >= 1.
        lr, momentum: of the optimiser; its state is float32 at least.
        clip: norm that the gradient of a noise is cut to.
        reward_weight: the paper's, of rewards in their own units: HPS 5, ImageReward 1, CLIP 0.01, PickScore 0.05.
        regularizer: weight of the radius's; 0: none.

    Raises:
        ValueError: options out of range; a reward without gradient.
    """
    _check(iterations, lr=lr, clip=clip, reward_weight=reward_weight)
    _check_weight("regularizer", regularizer)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum}, expected within [0, 1)")
    chain.require_gradient()
    state = NoiseOptimization()
    while chain.ledger.left >= chain.num_steps:
        noise = chain.initial([state.start]).requires_grad_()
        optimizer = torch.optim.SGD([noise], lr=lr, momentum=momentum, nesterov=momentum > 0)
        for iteration in range(1, iterations + 1):
            state.iteration = iteration
            last = _is_last(chain, iteration, iterations, chain.num_steps)
            final = sample(chain, noise, _step_noises(chain, noise, state.start), gradient=not last)
            gradient = _score(chain, final, state, gradient=not last)
            state.norm = float(noise.detach().norm())
            yield chain.event(state, f"start {state.start}, iteration {iteration}: {state.rewards[-1]:.4g}")
            if last:
                break
            loss = -reward_weight * (gradient * final).sum() + regularizer * radius_loss(noise).sum()
            _descend(optimizer, [noise], loss, clip)
        state.start += 1


def dno(
    chain: Chain,
    *,
    iterations: int = 100,
    lr: float = 0.01,
    clip: float = 1.0,
    regularizer: float = 0.0,
    permutations: int = 100,
    probes: int = 0,
    probe_scale: float = 0.01,
) -> Iterator[Event]:
    """DNO: AdamW on the noises z of all steps that draw any, of -r(z) + regularizer `probability_loss`(z).

    An iteration costs (1 + probes) T predictions and T backward passes, the last of a start T predictions alone.

    Args:
        iterations: a start; >= 1.
        lr: of AdamW, with torch's own further settings.
        clip: norm that the gradient of all noises together is cut to.
        regularizer: weight of the probability's, 1 in the paper against hacking; 0: none.
        permutations: of the noise in it, anew each iteration.
        probes: 0 for the reward's gradient; else the reward needs none, and it is estimated by so many neighbours of
            the noises (4 in the paper), see `probed_gradient`. The denoiser is differentiated all the same.
        probe_scale: how far these are.

    Raises:
        ValueError: options out of range; a reward without gradient and no probes.
    """
    _check(iterations, lr=lr, clip=clip, permutations=permutations, probe_scale=probe_scale)
    _check_weight("regularizer", regularizer)
    _check_weight("probes", probes)
    if not probes:
        chain.require_gradient()
    state, cost = NoiseOptimization(), (1 + probes) * chain.num_steps
    while chain.ledger.left >= chain.num_steps:
        noise = chain.initial([state.start])
        noises = [row.clone().requires_grad_() for row in (noise, *_step_noises(chain, noise, state.start).values())]
        optimizer = torch.optim.AdamW(noises, lr=lr)
        for iteration in range(1, iterations + 1):
            state.iteration = iteration
            last = _is_last(chain, iteration, iterations, cost)
            final = sample(chain, noises[0], _by_step(chain, noises[1:]), gradient=not last)
            gradient = _score(chain, final, state, gradient=not (last or probes))
            state.norm = float(noises[0].detach().norm())
            yield chain.event(state, f"start {state.start}, iteration {iteration}: {state.rewards[-1]:.4g}")
            if last:
                break
            if probes:
                gradient = _probed(chain, noises, final.detach(), state, probes, probe_scale)
            loss = -(gradient * final).sum()
            if regularizer:
                orders = _orders(chain, state, sum(n.numel() for n in noises), permutations)
                loss = loss + regularizer * probability_loss(torch.cat([n.flatten() for n in noises]), orders)
            _descend(optimizer, noises, loss, clip)
        state.start += 1


# Formulas ------------------------------------------------------------------------------------------------------------


def radius_loss(noise: Tensor) -> Tensor:
    """|z|^2 / 2 - (d - 1) log |z|, (N,): minus the log-density of a Gaussian's radius but for a constant (ReNO).

    Least at |z| = sqrt(d - 1). In float32 at least.
    """
    flat = noise.flatten(1)
    norm = flat.to(torch.promote_types(flat.dtype, torch.float32)).norm(dim=1)
    return norm**2 / 2 - (flat.shape[1] - 1) * norm.log()


def deviation_loss(noise: Tensor, block: int = 4) -> Tensor:
    """How unlikely a Gaussian's noise (D,) is in its mean and covariance, a scalar >= 2 log 2 (DNO).

    The noise as n = D / block rows X of `block` numbers (what is left over is left out): with M1 = |mean row| and
    M2 = |X'X / n - 1| (its largest singular value), minus
    min(-n M1^2 / (2 block), -log 2) + min(-n max(sqrt(1 + M2) - 1 - sqrt(block / n), 0)^2 / 2, -log 2), the logs of
    bounds of the probability that Gaussian rows deviate as much.
    """
    n = noise.numel() // block
    if n < 1:
        raise ValueError(f"noise: got {noise.numel()} numbers, expected >= {block}")
    rows = noise.flatten()[: n * block].view(n, block)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = rows.mean(0).square().sum()
    covariance = rows.T @ rows / n - torch.eye(block, dtype=rows.dtype, device=rows.device)
    spread = torch.linalg.matrix_norm(covariance, ord=2)
    excess = ((1 + spread).sqrt() - 1 - math.sqrt(block / n)).clamp_min(0)
    return -((-n * mean / (2 * block)).clamp_max(-math.log(2)) + (-n * excess**2 / 2).clamp_max(-math.log(2)))


def probability_loss(noise: Tensor, orders: Iterable[Tensor], block: int = 4) -> Tensor:
    """DNO's regulariser of noise (D,): `deviation_loss` plus its mean over permutations (D,). Least 4 log 2 = 2.77."""
    shuffled = [deviation_loss(noise[order.to(noise.device)], block) for order in orders]
    return deviation_loss(noise, block) + torch.stack(shuffled).mean()


def probed_gradient(differences: Tensor, displacements: Tensor) -> Tensor:
    """The direction (1, ...) of a reward's rise from Q neighbours: sum_i (r_i - r) (x_i - x), over its norm + 0.001.

    Args:
        differences: r_i - r, (Q,).
        displacements: x_i - x, (Q, ...), of the results.
    """
    shape = (-1,) + (1,) * (displacements.dim() - 1)
    total = (differences.to(displacements).view(shape) * displacements).sum(0, keepdim=True)
    return total / (total.norm() + 1e-3)


def sample(chain: Chain, noise: Tensor, step_noises: dict[int, Tensor], *, gradient: bool) -> Tensor:
    """The final latents (N, ...) from initial noise and that of each step that draws any; by both, if `gradient`."""
    predict = chain.predict_with_gradient if gradient else chain.predict
    with torch.set_grad_enabled(gradient):
        latents = noise
        for i in range(chain.num_steps):
            gaussian, _ = chain.kernel(latents, i, predict(latents, i))
            latents = gaussian.sample(step_noises[i]) if i in step_noises else gaussian.mean
    return latents


# Inside --------------------------------------------------------------------------------------------------------------


def _step_noises(chain: Chain, like: Tensor, entity: int) -> dict[int, Tensor]:
    """The noise of each step that draws any."""
    noisy = [i for i, std in enumerate(chain.stds) if std > 0]
    return {i: chain.noise([entity], i, like.detach()) for i in noisy}


def _by_step(chain: Chain, noises: Sequence[Tensor]) -> dict[int, Tensor]:
    return dict(zip((i for i, std in enumerate(chain.stds) if std > 0), noises))


def _is_last(chain: Chain, iteration: int, iterations: int, cost: int) -> bool:
    """Whether no iteration follows: no gradient is needed then."""
    return iteration == iterations or chain.ledger.left < cost + chain.num_steps


def _score(chain: Chain, final: Tensor, state: NoiseOptimization, *, gradient: bool) -> Tensor:
    """Note the result; the gradient of its reward by it, if asked for, else zeros."""
    entities = [len(state.rewards)]
    if gradient:
        rewards, slope = chain.result_gradient(final.detach(), entities)
    else:
        rewards, slope = chain.result(final.detach(), entities), torch.zeros_like(final)
    state.rewards += rewards.tolist()
    return slope


def _probed(
    chain: Chain, noises: list[Tensor], final: Tensor, state: NoiseOptimization, probes: int, scale: float
) -> Tensor:
    """`probed_gradient` at a result, from the results of neighbours of its noises; those count as results too."""
    keys = [state.start * 2**16 + k for k in range(probes)]  # apart for every start
    near = []
    for j, own in enumerate(noises):
        here = own.detach().expand(probes, *own.shape[1:])
        near.append(here + scale * chain.noise(keys, state.iteration * len(noises) + j, here, Role.SEARCH))
    ends = sample(chain, near[0], _by_step(chain, near[1:]), gradient=False)
    reward = state.rewards[-1]
    rewards = chain.result(ends, range(len(state.rewards), len(state.rewards) + probes))
    state.rewards += rewards.tolist()
    return probed_gradient(rewards - reward, ends - final)


def _orders(chain: Chain, state: NoiseOptimization, size: int, count: int) -> Iterator[Tensor]:
    random = chain.random(Role.SEARCH, state.start, state.iteration)
    return (torch.randperm(size, generator=random) for _ in range(count))


def _descend(optimizer: torch.optim.Optimizer, noises: list[Tensor], loss: Tensor, clip: float) -> None:
    """One step of the optimiser by the gradient of the noises alone (weights get none), cut to a norm.

    Raises:
        ValueError: a gradient that is not finite, which would end the search without a word.
    """
    for noise, slope in zip(noises, torch.autograd.grad(loss, noises)):
        noise.grad = slope
    norm = torch.nn.utils.clip_grad_norm_(noises, clip)
    if not norm.isfinite():
        raise ValueError(f"reward: got a gradient of norm {float(norm)}, expected a finite one; try float32 weights")
    optimizer.step()


def _check(iterations: int, permutations: int = 1, **positive: float) -> None:
    for option, count in (("iterations", iterations), ("permutations", permutations)):
        if count < 1:
            raise ValueError(f"{option}: got {count}, expected >= 1")
    for option, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{option}: got {value}, expected > 0")


def _check_weight(option: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{option}: got {value}, expected >= 0")
