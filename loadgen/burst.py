"""A burst: many readers who all ask at the same moment."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import httpx

from tokenflow.loadgen.client import stream_chat
from tokenflow.loadgen.metrics import StreamRecord

_SUBJECTS = (
    "a letter", "the sea", "a ship", "a quiet evening", "an old house", "a journey to London",
    "a wedding", "two sisters", "a storm", "a stranger", "the river", "a dinner", "the captain",
    "a walk in the woods", "a secret", "the winter", "a doctor", "a ball", "the king", "a whale",
)  # fmt: skip
_REQUESTS = (
    "Tell me a story about {}.",
    "Write a long story about {}.",
    "Write a scene with {}.",
    "Describe {} in detail.",
    "What happened with {}?",
)


@dataclass(frozen=True, slots=True)
class BurstRequest:
    """One reader's request."""

    message: str
    max_tokens: int
    token_rate: float
    """tokens/s; infinite = no reader."""
    seed: int


def make_burst(count: int, *, max_tokens: int, token_rate: float, seed: int) -> list[BurstRequest]:
    """`count` chat requests, the same ones for the same arguments."""
    rng = random.Random(seed)
    return [
        BurstRequest(
            rng.choice(_REQUESTS).format(rng.choice(_SUBJECTS)),
            max_tokens,
            token_rate,
            rng.getrandbits(31),
        )
        for _ in range(count)
    ]


class Burst:
    """A burst under way; `records` may be watched while it runs."""

    def __init__(self, url: str, model: str, requests: Seq[BurstRequest]) -> None:
        self.records: list[StreamRecord] = []
        self._url = url
        self._model = model
        self._requests = requests

    async def run(self, timeout_s: float) -> list[StreamRecord]:
        """Send every request now; returns when all have ended, one way or the other.

        Requests that are still running after `timeout_s` are given up and count as failed.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            limits=limits, timeout=httpx.Timeout(timeout_s), trust_env=False
        ) as client:
            now = time.monotonic()
            self.records = [StreamRecord(request.token_rate, now) for request in self._requests]
            tasks = [
                asyncio.create_task(stream_chat(client, self._url, self._body(request), record))
                for request, record in zip(self._requests, self.records, strict=True)
            ]
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task, record in zip(tasks, self.records, strict=True):
                if task in late:
                    task.cancel()
                    record.error = f"not finished after {timeout_s:g} s"
                    record.finished_s = time.monotonic()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled():
                    task.result()
        return self.records

    def _body(self, request: BurstRequest) -> dict[str, object]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": request.message}],
            "max_tokens": request.max_tokens,
            # Every reader gets its full length, so that all runs serve the same work.
            "min_tokens": request.max_tokens,
            "seed": request.seed,
            "temperature": 0.8,
            "top_p": 0.95,
        }
