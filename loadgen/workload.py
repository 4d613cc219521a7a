"""A workload: every request of a run, drawn from one seed, saved and loaded as Mooncake's JSONL.

Each aspect (arrivals, lengths, readers, ...) has a random stream of its own, so that changing one
leaves the others as they were.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tokenflow.loadgen.arrivals import Replay
from tokenflow.loadgen.description import Description
from tokenflow.loadgen.lengths import FromTrace
from tokenflow.loadgen.readers import Behaviour, Behaviours, choose
from tokenflow.loadgen.traces import load_trace, mooncake_row, read_lines
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator.workload import Arrival

_HASH_BLOCK_TOKENS = 512
"""Tokens of one entry of Mooncake's hash_ids."""
_OWN = "tokenflow"
_BEHAVIOUR: TypeAdapter[Behaviour] = TypeAdapter(Behaviours)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to come. Lengths in tokens, times in seconds."""

    index: int
    at_s: float
    """When its conversation begins, after the begin of the run."""
    prompt_tokens: int
    """Of this turn alone."""
    output_tokens: int
    token_rate: float
    """tokens/s; infinite = no reader."""
    seed: int
    """Of its text and of the sampling."""
    session: int
    turn: int = 0
    think_s: float = 0.0
    """Between the end of reading the turn before and this one."""
    behaviour: Behaviour | None = None

    @property
    def arrival(self) -> Arrival:
        """As the simulator takes it."""
        return Arrival(self.at_s, self.prompt_tokens, self.output_tokens, self.token_rate)


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run, by time; turns of one conversation follow each other."""

    asks: tuple[Ask, ...]
    failed: int = 0
    """Failed requests of the trace that were left out."""

    @property
    def sessions(self) -> list[list[Ask]]:
        """Conversations in order of arrival."""
        found: dict[int, list[Ask]] = {}
        for ask in self.asks:
            found.setdefault(ask.session, []).append(ask)
        return list(found.values())

    def to_jsonl(self) -> str:
        """Mooncake's format, a line per request; what it has no place for is under `tokenflow`.
        Byte for byte the same for the same workload."""
        lines = []
        blocks = 0
        for turns in self.sessions:
            context = 0
            ids: list[int] = []
            for ask in turns:
                context += ask.prompt_tokens
                # Full blocks of what was said before come again, the rest is new.
                needed = math.ceil(context / _HASH_BLOCK_TOKENS)
                fresh = range(blocks, blocks + needed - len(ids))
                blocks += len(fresh)
                ids = [*ids, *fresh]
                lines.append(json.dumps(_line(ask, context, ids), separators=(",", ":")))
                context += ask.output_tokens
                ids = ids[: context // _HASH_BLOCK_TOKENS]
        return "".join(line + "\n" for line in lines)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_jsonl().encode()).hexdigest()


def _line(ask: Ask, context: int, hash_ids: list[int]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "timestamp": round(ask.at_s * 1000, 3),
        "input_length": context,
        "output_length": ask.output_tokens,
        "hash_ids": hash_ids,
    }
    own: dict[str, Any] = {
        "prompt_tokens": ask.prompt_tokens,
        "token_rate": "max" if ask.token_rate == math.inf else ask.token_rate,
        "seed": ask.seed,
        "session": ask.session,
        "turn": ask.turn,
        "think_s": ask.think_s,
    }
    if ask.behaviour is not None:
        own["behaviour"] = ask.behaviour.model_dump()
    return {**line, _OWN: own}


def make_workload(description: Description, seed: int) -> Workload:
    """The requests of one repeat. Raises ConfigError for a trace that cannot be read, and where
    nobody arrives."""

    def stream(aspect: str) -> random.Random:
        return random.Random(f"{seed}/{aspect}")

    arrivals = description.arrivals
    lengths: list[tuple[int, int]] = []
    failed = 0
    if isinstance(arrivals, Replay):
        trace = load_trace(
            arrivals.path,
            start_s=arrivals.start_s,
            duration_s=math.inf if arrivals.duration_s is None else arrivals.duration_s,
            max_rows=arrivals.max_requests,
        )
        failed = trace.failed
        rng = stream("arrivals")
        rows = sorted(
            (
                ((row.arrival_s + rng.random() * arrivals.spread_s) * arrivals.time_scale, row)
                for row in trace.rows
            ),
            key=lambda pair: pair[0],
        )
        times = [at - rows[0][0] for at, _ in rows]
        most = (arrivals.max_input_tokens or 1 << 40, arrivals.max_output_tokens or 1 << 40)
        lengths = [
            (min(row.input_tokens, most[0]), min(row.output_tokens, most[1])) for _, row in rows
        ]
    else:
        times = arrivals.times(stream("arrivals"))
    if not times:
        raise ConfigError(
            "nobody arrives: the arrivals of this seed are empty; raise their rate or duration."
        )
    prompt_rng, output_rng = stream("prompt"), stream("output")
    reader_rng, text_rng = stream("readers"), stream("text")
    turn_rng, behaviour_rng = stream("turns"), stream("behaviours")
    readers = description.readers
    rates, shares = [r.rate for r in readers], [r.share for r in readers]
    prompt, output, turns = (
        description.prompt,
        description.output,
        description.conversation.turns,
    )
    think_s = description.conversation.think_s
    asks: list[Ask] = []
    for session, at in enumerate(times):
        (rate,) = reader_rng.choices(rates, shares)
        assert not isinstance(turns, FromTrace)
        for turn in range(turns.draw(turn_rng)):
            drawn = behaviour_rng.random()
            asks.append(
                Ask(
                    index=len(asks),
                    at_s=round(at, 6),
                    prompt_tokens=lengths[session][0]
                    if isinstance(prompt, FromTrace)
                    else prompt.draw(prompt_rng),
                    output_tokens=lengths[session][1]
                    if isinstance(output, FromTrace)
                    else output.draw(output_rng),
                    token_rate=rate,
                    seed=text_rng.getrandbits(31),
                    session=session,
                    turn=turn,
                    think_s=round(turn_rng.expovariate(1 / think_s), 6)
                    if turn and think_s
                    else 0.0,
                    behaviour=choose(
                        description.behaviours, [b.share for b in description.behaviours], drawn
                    ),
                )
            )
    return Workload(tuple(asks), failed)


def load_workload(path: str | Path) -> Workload:
    """A workload that `to_jsonl` made. Raises ConfigError for a file that cannot be read or holds
    something else."""
    asks: list[Ask] = []
    for line, data in read_lines(Path(path)):
        where = f"{path}:{line}"
        row = mooncake_row(where, data, line)
        own = data.get(_OWN)
        if not isinstance(own, dict):
            raise ConfigError(
                f"{where}: this is a trace and not a saved workload (no {_OWN!r} in the line); "
                "replay it with --arrivals trace:FILE --input trace --output trace."
            )
        try:
            behaviour = own.get("behaviour")
            asks.append(
                Ask(
                    index=len(asks),
                    at_s=round(row.arrival_s, 6),
                    prompt_tokens=int(own["prompt_tokens"]),
                    output_tokens=row.output_tokens,
                    token_rate=math.inf if own["token_rate"] == "max" else float(own["token_rate"]),
                    seed=int(own["seed"]),
                    session=int(own["session"]),
                    turn=int(own["turn"]),
                    think_s=float(own["think_s"]),
                    behaviour=None if behaviour is None else _BEHAVIOUR.validate_python(behaviour),
                )
            )
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise ConfigError(f"{where}: the {_OWN!r} part is damaged ({error}).") from None
    if not asks:
        raise ConfigError(f"{path}: the file has no requests.")
    return Workload(tuple(asks))
