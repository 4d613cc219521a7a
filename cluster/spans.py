"""From what happened to a stream to the spans of its trace. Pure; what a span is to a tracing
library is in `tracing.py`.

    attempt               one submission to a replica
      route               until the replica has it
      queue               no KV yet
      load                KV on its way to the device
      prefill             forward passes over the prompt, or over what was lost, one event each
      decode              forward passes of one token each
      preempted           off the device
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenflow.cluster.attempts import Attempt
from tokenflow.replicas.life import Note

Value = str | int | float | bool

_NAMES = {
    "waiting": "queue",
    "loading": "load",
    "running": "decode",
    "offloading": "preempted",
    "preempted": "preempted",
}
"""Names of the phases by the engine's states (`replicas.request.State`)."""


@dataclass(slots=True)
class Event:
    """A moment of a span."""

    name: str
    at_s: float
    attributes: dict[str, Value] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """Unix times, seconds."""

    name: str
    begun_s: float
    ended_s: float
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    children: list[Span] = field(default_factory=list)


def attempt_span(attempt: Attempt, ended_s: float) -> Span:
    """`ended_s`: the end of an attempt that went on until the request ended."""
    end = ended_s if attempt.ended_s is None else attempt.ended_s
    span = Span("attempt", attempt.begun_s, end, {"number": attempt.number})
    if attempt.replica_id is not None:
        span.attributes["replica"] = attempt.replica_id
    if attempt.end:
        span.attributes["end"] = attempt.end
    routed = attempt.notes[0].at_s if attempt.notes else attempt.placed_s
    span.children = [Span("route", attempt.begun_s, end if routed is None else routed)]
    span.children += phases(attempt.notes, end)
    return span


def phases(notes: Iterable[Note], ended_s: float) -> list[Span]:
    """Consecutive phases of a request on one engine; one that was not noted to end ends at
    `ended_s`."""
    walk = _Walk()
    for note in notes:
        walk.take(note)
    walk.close(ended_s, None)
    return walk.spans


class _Walk:
    """Goes along the notes with one open phase."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._open: Span | None = None
        self._coming: dict[str, Value] = {}
        """Attributes of the phase that begins with the next change of state."""
        self._passes: list[Event] = []
        self._tokens = 0
        """Tokens of the output at the beginning of the open phase."""
        self._preempted = False
        self._again = False
        """Whether the open phase comes after a preemption."""

    def take(self, note: Note) -> None:
        match note.what:
            case "preempt":
                self._preempted = True
                self._coming = dict(note.values)
            case "offload":
                self._coming["offloaded_bytes"] = note.values["bytes"]
            case "load":
                if self._open is not None:
                    before = self._open.attributes.get("loaded_bytes", 0)
                    self._open.attributes["loaded_bytes"] = before + note.values["bytes"]  # type: ignore[operator]
            case "prefill":
                self._passes.append(Event("forward pass", note.at_s, dict(note.values)))
            case "first_token" | "stalled":
                if self._open is not None:
                    self._open.events.append(Event(note.what, note.at_s, dict(note.values)))
            case _:
                self._change(note)

    def _change(self, note: Note) -> None:
        if note.what == "preempted" and self._open is not None and self._open.name == "preempted":
            self._open.events.append(Event("offloaded", note.at_s))
            return
        tokens = int(note.values.get("output_tokens", 0))
        self.close(note.at_s, tokens)
        name = _NAMES.get(note.what)
        if name is None:  # finished
            return
        if name == "queue" and self._preempted:
            # Its KV was dropped, to be computed again.
            name = "preempted"
        self._open = Span(name, note.at_s, note.at_s, self._coming)
        self._coming = {}
        self._tokens, self._again = tokens, self._preempted

    def close(self, at_s: float, tokens: int | None) -> None:
        """The open phase ends, with so many tokens of the output; None = unknown."""
        span, self._open = self._open, None
        passes, self._passes = self._passes, []
        if span is None:
            return
        span.ended_s = at_s
        made = None if tokens is None else tokens - self._tokens
        if passes:
            prefilled_s = at_s if made == 0 else passes[-1].at_s
            prefill = Span("prefill", span.begun_s, prefilled_s, {}, passes)
            prefill.attributes["tokens"] = sum(int(each.attributes["tokens"]) for each in passes)
            # A request that comes from another replica has an output to begin with.
            prefill.attributes["again"] = self._again or self._tokens > 0
            self.spans.append(prefill)
            if made == 0:
                prefill.events += span.events
                return
            span.begun_s = prefilled_s
        if span.name == "decode" and made is not None:
            span.attributes["tokens"] = made
        self.spans.append(span)
