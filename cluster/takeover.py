"""From what replicas hold of a client's request to the streams that go on with it. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable

from tokenflow.cluster.stream import Closer, Stream
from tokenflow.cluster.wire import Holding, unpack_events


def stream_from(manager: Closer, holding: Holding, replica_id: str) -> Stream:
    """The stream as its former ingress had it, or a little further; it has no reader yet."""
    submission = holding.submission
    stream = Stream(
        manager,
        submission.client_id,
        submission.prompt_ids,
        submission.params,
        submission.token_rate,
        submission.cache_salt,
        choice=submission.choice,
        context=submission.context,
        traced=submission.traced,
    )
    stream.attempt_id = submission.request_id
    if stream.attempts is not None:
        stream.attempts.begin(stream.attempt_id)
        stream.attempts.placed(stream.attempt_id, replica_id)
    stream.id, _, attempt = submission.request_id.rpartition("#")
    stream.attempt = int(attempt)
    stream.paused = submission.paused
    stream.unread = True
    stream.replica_id = replica_id
    stream.arrived_s = time.monotonic() - holding.age_s
    for event in unpack_events(holding.events):
        stream.deliver(event)
    return stream


def sort_out(
    manager: Closer, found: Iterable[tuple[Holding, str]]
) -> tuple[list[Stream], list[Stream]]:
    """The streams to go on with, one per choice in order, and those to be ended. `found` are what
    replicas hold, and their ids."""
    found = list(found)
    if not found:
        return [], []
    # Clients may use an id again: it means the request that came last.
    context = min(found, key=lambda item: item[0].age_s)[0].submission.context
    newest: dict[int, Stream] = {}
    old: list[Stream] = []
    for holding, replica_id in found:
        stream = stream_from(manager, holding, replica_id)
        rival = newest.get(stream.choice)
        if stream.context != context or (rival is not None and rival.attempt > stream.attempt):
            # A request of old, or an attempt that its ingress had given up.
            old.append(stream)
            continue
        if rival is not None:
            old.append(rival)
        newest[stream.choice] = stream
    return [newest[choice] for choice in sorted(newest)], old
