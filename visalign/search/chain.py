"""A sampling chain and a reward of its results: all that a search sees of a generator.

The chain of one prompt. State n at level i is a row of latents; step i takes it to level i + 1 by a Gaussian. Each
part of it is paid for in the ledger, and every random number has a key, so that neither the size of a batch nor what
else was drawn before changes a result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visalign.rewards import Reward, RewardError, as_reward, score
from visalign.rewards.base import as_output
from visalign.sampling.backprop import checkpointed
from visalign.sampling.seeds import derived_seed, step_noise, text_key
from visalign.transitions import Gaussian, Transition

from .ledger import Ledger
from .records import Best, Event, Model, Role, Valued


class Chain:
    """The discretised sampler of one prompt, its reward, its noise and its ledger.

    Args:
        model: a Generator.
        reward: pointwise: the score of an image depends on no other. Higher is better.
        transition: the kernel of the steps.
        seed: of the run; everything random follows from it and the prompt.
        batch_size: rows that go through the model, the decoder and the reward at once; changes no result.
        context: handed to the reward, as in `visalign.rewards.score`.
        inputs: arguments of the pipeline for every call.

    Attributes:
        words: what the generator is told; the prompt unless a method rewords it (`worded`). Noise and reward always
            go by the prompt.
        images: of the latest `value` or `result`, (N, 3, H, W), on the CPU.
        member_scores: of each reward of a combination there, shaped, (K, N) a batch.

    Raises:
        ValueError: a reward that compares images, or a transition of another kind of model.
    """

    def __init__(
        self,
        model: Model,
        prompt: str,
        reward: Callable,
        transition: Transition,
        *,
        seed: int = 0,
        ledger: Ledger | None = None,
        batch_size: int = 16,
        context: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected >= 1")
        self.model, self.prompt, self.transition, self.seed = model, prompt, transition, seed
        self.words = prompt
        self.reward: Reward = as_reward(reward)
        if self.reward.kind != "pointwise":
            raise ValueError(
                f"reward: got {self.reward.name!r}, which is {self.reward.kind}, expected a pointwise one: "
                "a search compares scores of images made at different times"
            )
        self.ledger = Ledger() if ledger is None else ledger
        self.batch_size, self.context, self.inputs = batch_size, context, inputs
        self.prompt_key = text_key(prompt)
        self.schedule = model.schedule
        self.stds = tuple(transition.std(self.schedule, i) for i in range(self.schedule.num_steps))
        self.best: Best | None = None
        self.images: Tensor | None = None
        self.member_scores: list[Tensor] = []
        self._new: list[float] = []
        self._scored: list[Tensor] = []  # of the last batches: (N,) bool, scored
        self._valid = torch.empty(0, dtype=torch.bool)  # of the last latents

    @property
    def num_steps(self) -> int:
        """T: steps from noise to a result, so guided predictions a sample."""
        return self.schedule.num_steps

    # Noise -----------------------------------------------------------------------------------------------------------

    def seeds(self, role: Role, entities: Sequence[int]) -> list[int]:
        """A seed for each entity, of the run, the prompt and the role."""
        return [derived_seed(self.seed, self.prompt_key, role, entity) for entity in entities]

    def initial(self, entities: Sequence[int]) -> Tensor:
        """The noise (N, ...) that these start from: the same for an entity in every method."""
        seeds = self.seeds(Role.INIT, entities)
        return torch.cat([self.model.noise([self.words] * len(s), s, **self.inputs) for s in self._chunks(seeds)])

    def noise(self, entities: Sequence[int], step_index: int, like: Tensor, role: Role = Role.STEP) -> Tensor:
        """Standard normal noise (N, ...), a row from each entity and the step alone."""
        return step_noise(self.seeds(role, entities), step_index, like)

    def random(self, role: Role, entity: int, step_index: int = 0) -> torch.Generator:
        """A generator of its own for choices (resampling, selection), of the same keys; on the CPU."""
        return torch.Generator().manual_seed(derived_seed(self.seeds(role, [entity])[0], step_index))

    # Steps -----------------------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, step_index: int) -> Tensor:
        """The guided prediction (N, ...) at latents and a step; N guided predictions are paid."""
        self.ledger.spend(len(latents))
        with torch.no_grad():
            parts = [self._predict(part, step_index) for part in latents.split(self.batch_size)]
        return torch.cat(parts)

    def predict_with_gradient(self, latents: Tensor, step_index: int) -> Tensor:
        """As `predict`, with its gradient by the latents, where grad is enabled; N backward passes are paid at once.

        The denoiser keeps no activations: backward runs it again, which the ledger's `forwards` see, not its `nfe`.
        """
        self.ledger.spend(len(latents))
        self.ledger.backwards += len(latents)
        denoisers = getattr(self.model, "denoisers", {})
        with checkpointed(*[(module, "forward") for module in denoisers.values()]):
            return torch.cat([self._predict(part, step_index) for part in latents.split(self.batch_size)])

    def kernel(self, latents: Tensor, step_index: int, prediction: Tensor) -> tuple[Gaussian, Tensor]:
        """The Gaussian over the next latents, and the estimate of x0 (N, ...)."""
        return self.transition(self.schedule, step_index, latents, prediction)

    def draw(self, gaussian: Gaussian, step_index: int, entities: Sequence[int]) -> Tensor:
        """The next latents (N, ...) by the step noise of these entities."""
        if gaussian.deterministic:
            return gaussian.mean
        return gaussian.sample(self.noise(entities, step_index, gaussian.mean))

    def step(self, latents: Tensor, step_index: int, entities: Sequence[int]) -> Tensor:
        """Predict, and draw the next latents."""
        gaussian, _ = self.kernel(latents, step_index, self.predict(latents, step_index))
        return self.draw(gaussian, step_index, entities)

    def finish(self, latents: Tensor, step_index: int, entities: Sequence[int]) -> Tensor:
        """From the state at `step_index` to the final latents, by the step noise of these entities."""
        for i in range(step_index, self.num_steps):
            latents = self.step(latents, i, entities)
        return latents

    # Rewards ---------------------------------------------------------------------------------------------------------

    def value(self, latents: Tensor) -> Tensor:
        """Rewards (N,), float64 on the CPU, of final latents or of estimates of x0."""
        return self._score(latents)[0]

    def result(self, latents: Tensor, entities: Sequence[int], starts: Tensor | None = None) -> Tensor:
        """As `value`, of final latents made by these entities: results, of which the best is kept, with its start."""
        rewards, images = self._score(latents)
        self._keep(rewards, latents, images, entities, starts)
        return rewards

    def result_gradient(self, latents: Tensor, entities: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `result`, with the gradient (N, ...) of the rewards by the final latents; both detached."""
        rewards, images, gradient = self._slope(latents)
        self._keep(rewards, latents, images, entities)
        return rewards, gradient

    def clean_gradient(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """As `value`, with the gradient (N, ...) by the estimates of x0, without the denoiser; both detached."""
        rewards, _, gradient = self._slope(latents)
        return rewards, gradient

    def value_gradient(self, latents: Tensor, step_index: int) -> Valued:
        """Predict with the reward of the estimate of x0 and its gradient by the latents: one backward a row.

        Raises:
            ValueError: the reward is not differentiable.
        """
        self.require_gradient()
        self.ledger.spend(len(latents))
        self.ledger.backwards += len(latents)
        parts = [self._value_gradient(part, step_index) for part in latents.split(self.batch_size)]
        return Valued(*(torch.cat(column) for column in zip(*parts)))

    def differentiable_value(self, latents: Tensor) -> Tensor:
        """Rewards (N,) of final latents or estimates of x0, with their gradient, where grad is enabled."""
        self.ledger.decodes += len(latents)
        self.ledger.reward_gradients += len(latents)
        images = self.model.decode(latents, [self.words] * len(latents), **self.inputs)
        return self._rewards(images, [self.prompt] * len(latents))

    def require_gradient(self) -> None:
        """Raise a ValueError unless the reward is differentiable."""
        if not self.reward.differentiable:
            raise ValueError(
                f"reward: got {self.reward.name!r}, which has no gradient, expected a differentiable one (clip, "
                "aesthetic, pickscore, ...); or a search that needs none: best-of-n, fk, dts, dts-star, svdd, rbf"
            )

    def require_noise(self) -> None:
        """Raise a ValueError unless a step of the kernel draws noise."""
        if not any(self.stds):
            raise ValueError(
                f"transition: got {self.transition!r}, whose steps are deterministic, expected a stochastic one such "
                "as flow_ddim, flow_sde, ddim (eta 1) or consistency; or a search that needs none: best-of-n, "
                "zero-order, paths, reno, dno"
            )

    @contextmanager
    def worded(self, words: str) -> Iterator[None]:
        """Within, the generator is told these words; noise and reward stay those of the prompt."""
        before, self.words = self.words, words
        try:
            yield
        finally:
            self.words = before

    def event(self, state: Any = None, note: str = "") -> Event:
        """How the search stands now."""
        new, self._new = tuple(self._new), []
        return Event(self.ledger.nfe, self.best, state, new, note)

    def picture(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) of final latents, on the CPU, unscored."""
        self.ledger.decodes += len(latents)
        with torch.no_grad():
            return self.model.decode(latents, [self.words] * len(latents), **self.inputs).cpu()

    # Inside ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within, the rows that go through the denoiser are counted as the ledger's `forwards`."""
        denoiser = getattr(self.model, "denoiser", None)
        if denoiser is None:
            yield
            return
        first = next(m for m in denoiser.modules() if not list(m.children()) and list(m.parameters()))
        hook = first.register_forward_pre_hook(self._count)
        try:
            yield
        finally:
            hook.remove()

    def _count(self, _module: Any, args: tuple) -> None:
        self.ledger.forwards += len(args[0])

    def _predict(self, latents: Tensor, step_index: int) -> Tensor:
        return self.model.predict(latents, step_index, [self.words] * len(latents), **self.inputs)

    def _value_gradient(self, latents: Tensor, step_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            prediction = self._predict(latents, step_index)
            denoised = self.kernel(latents, step_index, prediction)[1]
            values = self.differentiable_value(denoised)
            (gradient,) = torch.autograd.grad(values.sum(), latents)
        return prediction.detach(), denoised.detach(), values.detach().double().cpu(), gradient

    def _keep(
        self, rewards: Tensor, latents: Tensor, images: Tensor, entities: Sequence[int], starts: Tensor | None = None
    ) -> None:
        if not rewards.isfinite().all():
            row = int((~rewards.isfinite()).nonzero()[0])
            raise RewardError(self.reward.name, f"gave {float(rewards[row])}, expected a number", row, self.prompt)
        scored = rewards.masked_fill(~self._valid, -math.inf)  # what stands for a failed score may steer, never win
        self._new += rewards[self._valid].tolist()
        k = int(scored.argmax())
        if self._valid.any() and (self.best is None or float(rewards[k]) > self.best.reward):
            start = None if starts is None else starts[k : k + 1].clone()
            latents, images = latents[k : k + 1].clone(), images[k : k + 1].clone()
            self.best = Best(float(rewards[k]), latents, images, entities[k], start)

    def _slope(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, images on the CPU, and the gradient of the rewards by the latents."""
        self.ledger.decodes += len(latents)
        self.ledger.reward_gradients += len(latents)
        self._scored = []
        parts = [self._slope_of(part) for part in latents.detach().split(self.batch_size)]
        self._valid = torch.cat(self._scored)
        rewards, images, gradients = (torch.cat(column) for column in zip(*parts))
        return rewards, images, gradients

    @torch.enable_grad()
    def _slope_of(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents = latents.clone().requires_grad_()
        seen = self.model.decode(latents, [self.words] * len(latents), **self.inputs)
        rewards = self._rewards(seen, [self.prompt] * len(latents))
        (gradient,) = torch.autograd.grad(rewards.sum(), latents)
        return rewards.detach().double().cpu(), seen.detach().cpu(), gradient

    @torch.no_grad()
    def _score(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rewards, images, self.member_scores, self._scored = [], [], [], []
        for part in latents.split(self.batch_size):
            seen = self.model.decode(part, [self.words] * len(part), **self.inputs)
            images.append(seen.cpu())
            rewards.append(self._rewards(seen, [self.prompt] * len(part)).double().cpu())
        self.ledger.decodes += len(latents)
        self.ledger.rewards += len(latents)
        self._valid = torch.cat(self._scored)
        self.images = torch.cat(images)
        return torch.cat(rewards), self.images

    def _rewards(self, images: Tensor, prompts: list[str]) -> Tensor:
        if torch.is_grad_enabled():
            output = as_output(self.reward(images, prompts, self.context), self.reward.name, prompts)
            self._scored.append(output.is_valid)
            return torch.where(output.is_valid.to(output.scores.device), output.scores, 0.0)
        result = score(self.reward, images, prompts, self.context)
        self.member_scores.append(result.shaped)
        self._scored.append(result.valid)
        return result.total

    def _chunks(self, items: list[int]) -> list[list[int]]:
        return [items[k : k + self.batch_size] for k in range(0, len(items), self.batch_size)]
