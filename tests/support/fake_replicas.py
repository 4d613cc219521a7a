"""Replicas in this process behind a handle like Serve's: real outboxes over an engine that draws
token 100 + n as the n-th of every output, when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

from tokenflow.cluster.outbox import Outboxes
from tokenflow.cluster.placing import place
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.wire import Submission
from tokenflow.replicas.errors import CapacityError
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange


class FakeReplica:
    def __init__(self, name: str, heartbeat_s: float = 0.05) -> None:
        self.name = name
        self.made: dict[str, int] = {}
        """Tokens of each running request, those of other replicas included."""
        self.limits: dict[str, int] = {}
        self.submissions: list[Submission] = []
        self.cancelled: list[str] = []
        self.changes: list[tuple[str, ReaderChange]] = []
        self.full = self.hung = self.dead = False
        self.first_token = 100
        self.outboxes = Outboxes(
            self,
            grace_s=5,
            heartbeat_s=heartbeat_s,
            load=LoadReport,
            healthy=lambda: not self.hung,
        )

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.made.pop(request_id, None)

    def change_reader(self, request_id: str, change: ReaderChange) -> None:
        self.changes.append((request_id, change))

    def step(self, tokens: int = 1) -> None:
        """Every request gets so many tokens."""
        events = []
        for request_id in list(self.made):
            for _ in range(tokens):
                n = self.made[request_id]
                self.made[request_id] += 1
                end = "length" if n + 1 == self.limits[request_id] else None
                token = self.first_token + n
                events.append(TokenEvent(request_id, n, token, f"t{n}", 0.0, None, end))
                if end:
                    del self.made[request_id]
                    break
        self.outboxes.dispatch(events)

    def submit(self, submission: Submission) -> str:
        if self.full:
            raise CapacityError("full")
        self.submissions.append(submission)
        self.made[submission.request_id] = len(submission.resumed_ids)
        self.limits[submission.request_id] = submission.params.max_tokens
        self.outboxes.take(submission)
        return self.name

    def check(self) -> None:
        if self.dead:
            raise ConnectionError("gone")


class _Response:
    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(coroutine)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class _Frames:
    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def __aiter__(self) -> Any:
        return self._frames

    def cancel(self) -> None:
        pass


class FakeHandle:
    """Of a deployment of these replicas. `names` are those that take requests."""

    def __init__(self, *names: str) -> None:
        self.replicas = {name: FakeReplica(name) for name in names}
        self.present(*names)
        for method in ("cancel", "change", "adopt", "control"):
            setattr(self, method, SimpleNamespace(remote=self._call(method)))
        self.submit = SimpleNamespace(remote=lambda *a, **k: _Response(self._submit(*a, **k)))

    def __getitem__(self, name: str) -> FakeReplica:
        return self.replicas[name]

    def present(self, *names: str) -> None:
        REGISTRY.update(dict.fromkeys(names, "node"))

    async def _submit(self, submission: Submission, *, target: str | None = None) -> str:
        order = place(submission, [target] if target else REGISTRY.replicas)
        return self.replicas[order[0]].submit(submission)

    def _call(self, method: str) -> Any:
        async def call(*args: Any, target: str) -> Any:
            return getattr(self.replicas[target].outboxes, method)(*args)

        return lambda *args, target: _Response(call(*args, target=target))

    def options(self, **_: Any) -> SimpleNamespace:
        def frames(ingress_id: str, *, target: str) -> _Frames:
            replica = self.replicas[target]
            return _Frames(replica.outboxes.frames(ingress_id, replica.check))

        return SimpleNamespace(remote=frames)
