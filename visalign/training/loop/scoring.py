"""Scoring while sampling goes on: rewards are asked in threads, and a batch's scores fetched when they are needed."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from visalign.rewards import CombinedReward, Reward, RewardError, Scores, score
from visalign.rewards.aggregate import weighted_sum

T = TypeVar("T")


class AsyncScorer(Generic[T]):
    """Calls a scoring function in threads. What it gives is what it gives when called directly, batch by batch.

    With one thread, which is the default and right for a model that runs here, batches are scored in the order in which
    they were submitted, so even a reward that counts its calls gives the same. More threads are for rewards behind a
    server, which answer each batch by itself. A reward that draws from torch's global generator is the exception: it
    would share it with the sampling.

        with AsyncScorer(scores, "pickscore") as scorer:
            futures = [scorer.submit(images, prompts) for images, prompts in sampled()]
            rewards = torch.cat([future.result() for future in futures])

    Pictures must not be changed after they are submitted. A failure stands in its batch's future, and is raised at the
    next `submit` too, so that nobody goes on sampling for nothing; it is a RewardError that names the reward.

    Args:
        function: (images, prompts, context) to the scores, or whatever is wanted of them.
        name: of the reward, for messages.
        threads: batches scored at a time.
        pending: batches that may wait or be scored before `submit` waits in turn: they hold pictures in memory.
        stop: called by `close`, to end calls that wait for something, e.g. `RemoteReward.close`.
    """

    def __init__(
        self,
        function: Callable[[Any, Sequence[str], Any], T],
        name: str,
        threads: int = 1,
        pending: int = 4,
        stop: Callable[[], None] | None = None,
    ) -> None:
        for argument, value, low in (("threads", threads, 1), ("pending", pending, threads)):
            if value < low:
                raise ValueError(f"{argument}: got {value}, expected >= {low}")
        self.name = name
        self._function, self._stop = function, stop
        self._room = threading.Semaphore(pending)
        self._failure: RewardError | None = None
        self._closed = False
        # Sums on the CPU depend on the number of threads, which a new thread does not inherit.
        count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, f"score {name}", lambda: torch.set_num_threads(count))

    def submit(self, images: Any, prompts: Sequence[str], context: Any = None) -> "Future[T]":
        """Begin to score a batch; the result is in the future, computed without gradient.

        Raises:
            RewardError: an earlier batch failed.
            ValueError: the scorer is closed.
        """
        self._room.acquire()
        try:
            if self._closed:
                raise ValueError(f"scorer of {self.name!r}: got a batch after it was closed")
            if self._failure is not None:
                raise self._failure
            future = self._pool.submit(self._score, images, list(prompts), context)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())  # also when it is cancelled
        return future

    def close(self) -> None:
        """Drop the batches that wait, and wait for those being scored. Doing it twice is no error."""
        self._closed = True
        if self._stop is not None:
            self._stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "AsyncScorer[T]":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _score(self, images: Any, prompts: list[str], context: Any) -> T:
        if self._failure is not None:  # submitted before it was known
            raise self._failure
        try:
            with torch.no_grad():
                return self._function(images, prompts, context)
        except RewardError as error:
            self._failure = error
            raise
        except Exception as error:
            self._failure = RewardError(self.name, f"raised {type(error).__name__}: {error}")
            raise self._failure from error


class Scorer:
    """A training's reward: asked batch by batch, or in threads while the next batch is sampled; combined at the end.

    Args:
        threads: batches scored at a time while others are sampled; 0 scores between them. None: 4 behind a server, 1 on
            a GPU, else 0, for a CPU has nothing to spare.
        context: what the prompt set knows of its prompts, handed to the reward with each batch.

    Attributes:
        labels, used: of all its members, and of those whose scores are combined, in order.
        needs_groups: it compares the samples of a group, and must be given each group whole.
    """

    def __init__(
        self,
        reward: Reward,
        device: torch.device,
        threads: int | None = None,
        context: Callable[[Sequence[str]], dict[str, Any]] = lambda prompts: {},
    ) -> None:
        if hasattr(reward, "to"):
            reward.to(device)
        self.reward, self.context = reward, context
        members = reward.members if isinstance(reward, CombinedReward) else ()
        self.labels = tuple(m.label for m in members) or (reward.name,)
        self.used = tuple(m.label for m in reward.used) if isinstance(reward, CombinedReward) else self.labels
        self.needs_groups = any(r.kind != "pointwise" for r in ([m.reward for m in members] or [reward]))
        self.is_setwise = any(r.kind == "setwise" for r in ([m.reward for m in members] or [reward]))
        self.output_kind = getattr(reward, "output_kind", "scores")
        if threads is None:
            far = any(getattr(r, "remote", False) for r in ([m.reward for m in members] or [reward]))
            threads = 4 if far else int(device.type == "cuda")
        close = getattr(reward, "close", None)
        self._threads = AsyncScorer(self._score, reward.name, threads, threads + 3, close) if threads else None

    def submit(self, images: Sequence[Tensor], prompts: Sequence[str], group_ids: Tensor) -> "Future[list[Scores]]":
        """Score some batches together; the result holds one entry for each. Errors are the future's, or raised at once.

        Raises:
            RewardError: this, or an earlier batch could not be scored.
        """
        if self._threads is not None:
            return self._threads.submit(images, prompts, group_ids)
        future: Future[list[Scores]] = Future()
        future.set_result(self._score(images, prompts, group_ids))
        return future

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str], group_ids: Tensor) -> list[Scores]:
        context = self.context(prompts) | ({"group_ids": group_ids} if self.needs_groups else {})
        scores = score(self.reward, torch.cat(list(images)), prompts, context, on_fail="later")
        return scores.split([len(batch) for batch in images])

    def combine(self, shaped: Tensor, group_ids: Tensor, scored: Mapping[str, Tensor] | None = None) -> Tensor:
        """(K, N) of all samples of an iteration to (N,): rewards or, where `output_kind` says so, advantages.

        Args:
            scored: as `Scores` has it; what failed is in no statistic. None: nothing failed.
        """
        if not isinstance(self.reward, CombinedReward):
            return shaped[0]
        valid = None if scored is None else torch.stack([scored[label] for label in self.used])
        return self.reward.combine(shaped, group_ids, valid)

    def plain(self, shaped: Tensor) -> Tensor:
        """(K, N) to (N,): the reward as a number that means something for one sample by itself.

        Where `output_kind` is "scores" that is what `combine` gives, whatever the groups; else the plain weighted sum.
        """
        if self.output_kind == "scores" or not isinstance(self.reward, CombinedReward):
            return self.combine(shaped, torch.arange(shaped.shape[1]))
        return weighted_sum(shaped, torch.tensor([m.weight for m in self.reward.used], dtype=shaped.dtype))

    def evaluate(self, images: Tensor, prompts: Sequence[str], context: dict[str, Any] | None = None) -> Tensor:
        """(N,) of pictures of different prompts, NaN where one failed; `context` goes before the prompt set's own."""
        with torch.no_grad():
            own = {"group_ids": torch.arange(len(prompts))} if self.needs_groups else {}
            context = self.context(prompts) | (context or {}) | own
            scores = score(self.reward, images, prompts, context, on_fail="later")
            return self.plain(scores.shaped).masked_fill(~scores.valid, math.nan)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()
