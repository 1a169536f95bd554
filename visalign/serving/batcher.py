"""One reward, many requests: a queue before a thread, and requests that can be scored together scored together."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visalign.rewards import CombinedReward, Reward, RewardOutput, score


class Closing(Exception):
    """The server is shutting down; ask again, later or elsewhere."""


@dataclass
class Job:
    """A request and where its output goes."""

    images: Tensor
    prompts: list[str]
    context: dict[str, Any] | None
    done: "asyncio.Future[RewardOutput]"


class Batcher:
    """Scores requests in the order in which they come, one batch at a time, in a thread of its own.

    Requests to a pointwise reward that have no context and pictures of one shape are scored in one batch, of at most
    `max_batch` pictures; the first of them waits `linger` seconds for others. One that fails is scored again by itself,
    so that nobody gets another's error. A weighted sum fills in failed samples by the mean of the request, which hence
    keeps to itself.
    """

    def __init__(self, reward: Reward, max_batch: int = 64, linger: float = 0.005) -> None:
        self.reward, self.max_batch, self.linger = reward, max_batch, linger
        self.batches = 0  # scored so far
        self._mergeable = reward.kind == "pointwise" and not isinstance(reward, CombinedReward)
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._next: Job | None = None  # taken from the queue, but no match for the batch under way
        self._thread = ThreadPoolExecutor(1, "reward")
        self._worker: asyncio.Task | None = None

    def start(self) -> None:
        """Begin to score, on the running event loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._worker is not None and not self._worker.done()

    async def close(self) -> None:
        """Refuse what is not answered yet, and wait for the thread."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        waiting = [] if self._next is None else [self._next]
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        for job in waiting:
            _give(job, Closing())
        await asyncio.to_thread(self._thread.shutdown)

    async def score(self, images: Tensor, prompts: list[str], context: dict[str, Any] | None) -> RewardOutput:
        """The reward's output for a request.

        Raises:
            ValueError, RewardError: as `visalign.rewards.score`.
            Closing: the server shuts down.
        """
        job = Job(images, prompts, context, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(job)
        return await job.done

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            first, self._next = self._next or await self._queue.get(), None
            jobs = [first]
            try:
                await self._join(jobs)
                results = await loop.run_in_executor(self._thread, self._score_all, list(jobs))
            except asyncio.CancelledError:
                for job in jobs:
                    _give(job, Closing())
                raise
            except Exception as error:  # whatever went wrong, the next requests are not to wait for ever
                results = [error] * len(jobs)
            for job, result in zip(jobs, results):
                _give(job, result)

    async def _join(self, jobs: list[Job]) -> None:
        """Add to `jobs`, the first request of a batch, those that come while it waits and fit."""
        first, deadline = jobs[0], asyncio.get_running_loop().time() + self.linger
        count = len(first.images)
        if not self._mergeable or first.context:
            return
        while count < self.max_batch:
            try:
                async with asyncio.timeout_at(deadline):
                    job = await self._queue.get()
            except TimeoutError:
                return
            same = job.images.shape[1:] == first.images.shape[1:] and job.images.dtype == first.images.dtype
            if job.context or not same or count + len(job.images) > self.max_batch:
                self._next = job
                return
            jobs.append(job)
            count += len(job.images)

    def _score_all(self, jobs: Sequence[Job]) -> list[RewardOutput | Exception]:
        self.batches += 1
        if len(jobs) > 1 and all(len(job.prompts) == len(job.images) for job in jobs):
            prompts = [prompt for job in jobs for prompt in job.prompts]
            together = self._score([job.images for job in jobs], prompts, None)
            if isinstance(together, RewardOutput):
                return list(_split(together, [len(job.images) for job in jobs]))
        return [self._score([job.images], job.prompts, job.context) for job in jobs]

    def _score(
        self, pictures: Sequence[Tensor], prompts: list[str], context: dict[str, Any] | None
    ) -> RewardOutput | Exception:
        try:
            images = pictures[0] if len(pictures) == 1 else torch.cat(list(pictures))
            if isinstance(self.reward, CombinedReward):
                result = score(self.reward, images, prompts, context, on_fail="later")
                return RewardOutput(result.total, criteria=result.parts, valid=result.valid)
            # What stands for failed samples is the client's choice: here they only must not stop the others.
            [output] = score(self.reward, images, prompts, context, on_fail="later").outputs.values()
            return output
        except Exception as error:
            return error


def _give(job: Job, result: RewardOutput | Exception) -> None:
    if job.done.done():  # its client has gone
        return
    if isinstance(result, RewardOutput):
        job.done.set_result(result)
    else:
        job.done.set_exception(result)


def _split(output: RewardOutput, sizes: Sequence[int]) -> Sequence[RewardOutput]:
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(
            replace(
                output,
                scores=output.scores[rows],
                criteria={name: values[rows] for name, values in output.criteria.items()},
                rationale=None if output.rationale is None else list(output.rationale)[rows],
                valid=None if output.valid is None else output.valid[rows],
                uncertainty=None if output.uncertainty is None else output.uncertainty[rows],
            )
        )
        start += size
    return parts
