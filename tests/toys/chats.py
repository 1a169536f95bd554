"""Chats that answer as told: an OpenAI-compatible endpoint, and one that is a function."""

import asyncio
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from visalign.rewards.vlm.chat import Reply


def completion(text, places=None, **more):
    logprobs = None if places is None else {"content": places}
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs, "finish_reason": "stop"}], **more}


class Endpoint:
    """An OpenAI-compatible endpoint. `answer(body, n)` gives the n-th answer: JSON, or a Response."""

    def __init__(self) -> None:
        self.answer = lambda body, n: completion(f"answer to {body['messages'][-1]['content']}")
        self.delay = lambda body, n: 0.0
        self.bodies, self.headers, self.times = [], [], []
        self.busy = self.busiest = 0
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self._complete)

    async def _complete(self, request: Request):
        body, n = await request.json(), len(self.bodies)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.times.append(time.monotonic())
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            await asyncio.sleep(self.delay(body, n))
            given = self.answer(body, n)
        finally:
            self.busy -= 1
        return given if isinstance(given, Response) else JSONResponse(given)


class Scripted:
    """A chat that answers by a function of (conversation, options), and remembers what it was asked."""

    name = "scripted"

    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, conversations, **options):
        self.asked += [(conversation, options) for conversation in conversations]
        replies = [self.answer(conversation, options) for conversation in conversations]
        return [reply if isinstance(reply, Reply) else Reply(reply) for reply in replies]


def rational_reply(faith, quality, text="N/A", tail="\n# Summary: fine\n") -> str:
    return (
        "# User Request Analysis\nScore: 1\n# Detailed Judgement\n"
        f"1. Text Faithfulness:\n## Justification: good\n## Score: {faith}\n"
        f"2. Physical and Visual Quality:\n## Justification: 2. flaws\n## Score: {quality}\n"
        f"3. Text Rendering:\n## Justification: -\n## Score: {text}\n{tail}"
        "3. Text Rendering:\n## Score: 1\n"
        "# User Request Refinement:\n## Refinement Comments: add light\n## Refined Request: a bright cat"
    )
