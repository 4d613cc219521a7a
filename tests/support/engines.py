"""Engines over the fake executor, and helpers that run them to the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from tests.support.fake_executor import FakeExecutor, FakeHost, FakeTokenizer
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import Request, Sequence, State
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.registry import make_policy


class Clock:
    """A clock that tests move; every reading takes `tick` seconds."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 100.0
        self.tick = tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def fake_engine(
    *,
    policy: str | Any = "slack",
    blocks: int = 64,
    block_size: int = 4,
    host_slots: int = 256,
    max_num_seqs: int = 16,
    max_batch_tokens: int = 32,
    max_model_len: int = 256,
    delay: int = 1,
    late_sums: bool = False,
    tick: float = 0.01,
    eos_ids: tuple[int, ...] = (0,),
    **config: Any,
) -> tuple[Engine, FakeExecutor, FakeHost, Clock]:
    executor = FakeExecutor(blocks, block_size, host_slots, delay=delay, late_sums=late_sums)
    host = FakeHost(host_slots)
    clock = Clock(tick)
    engine = Engine(
        executor,
        make_policy(policy) if isinstance(policy, str) else policy,
        host,
        EngineConfig(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            **config,
        ),
        tokenizer=FakeTokenizer(),
        eos_ids=eos_ids,
        max_model_len=max_model_len,
        clock=clock,
    )
    return engine, executor, host, clock


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    *,
    rate: float = 10.0,
    arrival_s: float = 100.0,
    resumed: list[int] | None = None,
    salt: str | None = None,
    consumed: int | None = None,
    paused: bool = False,
    tenant: str = "",
    **params: Any,
) -> Request:
    params.setdefault("temperature", 0.0)
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        token_rate=rate,
        resumed_ids=tuple(resumed or ()),
        consumed=consumed,
        paused=paused,
        arrival_s=arrival_s,
        cache_salt=salt,
        tenant=tenant,
    )


def check_conservation(engine: Engine, host: FakeHost) -> None:
    """Every device block and host slot is free, or held as often as somebody says it is."""
    kv = engine.kv
    kv.pool.check()
    sequences = list(engine._sequences.values())
    held = Counter(int(b) for s in sequences for b in s.block_ids[: s.num_blocks])
    for job in kv.transfers._jobs.values():
        held.update(copy.block for copy in job.copies)
        held.update(job.kept)
    for block in range(kv.pool.num_blocks):
        assert kv.pool.holders(block) == held[block], f"block {block}"
    slots = Counter(s for seq in sequences for s in seq.host_slots)
    slots.update(kv.transfers._let_go)
    assert slots == host.holds
    assert not set(slots) & set(host.free)
    assert len(host.free) + len({*host.holds, *host.committed}) == host.capacity
    for seq in sequences:
        on_device = seq.state in (State.RUNNING, State.LOADING)
        assert (seq.slot >= 0) == on_device
        assert (seq.num_blocks > 0) == (on_device and not _claims_all(engine, seq))
        assert seq.synced_blocks <= seq.sent_blocks <= len(seq.host_slots)
        assert seq.synced_blocks == min(seq.in_flight, default=seq.sent_blocks)
        assert set(seq.in_flight) <= set(range(seq.sent_blocks))
        assert seq.shared_blocks >= 0
    rows = [s.slot for s in sequences if s.slot >= 0]
    assert len(rows) == len(set(rows))
    assert sorted(rows + kv.free_rows) == list(range(engine.config.max_num_seqs))
    assert kv._promised == sum(load.missing for load in kv._loads.values())
    hoping = {seq for waiting in kv._hoping.values() for seq in waiting}
    assert all(seq.state is State.WAITING for seq in hoping)


def _claims_all(engine: Engine, seq: Sequence) -> bool:
    """Whether it was promised its blocks and has none of them yet."""
    load = engine.kv._loads.get(seq)
    return load is not None and load.missing > 0 and seq.num_blocks == 0


def run_to_end(
    engine: Engine, host: FakeHost, max_steps: int = 20_000
) -> dict[str, list[TokenEvent]]:
    """Step until all is done, checking conservation after every step."""
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for _ in range(max_steps):
        if not engine.has_work:
            break
        engine.step()
        check_conservation(engine, host)
        for event in engine.take_events():
            events[event.request_id].append(event)
    assert not engine.has_work, "the engine made no end of it"
    check_conservation(engine, host)
    check_all_free(engine, host)
    return events


def answers(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Serve requests on a real executor, whose copies take their time: token ids by request id."""
    for request in requests:
        engine.add(request)
    out: dict[str, list[int]] = {}
    while engine.has_work:
        if not engine.step():
            engine.wait_for_transfers(0.01)
        for event in engine.take_events():
            out.setdefault(event.request_id, []).append(event.token_id)
    return out


def check_all_free(engine: Engine, host: FakeHost) -> None:
    """Nothing is held any more; what is cached can be had."""
    assert engine.kv.pool.free_blocks == engine.kv.pool.num_blocks
    assert not host.holds
    assert host.available() == host.capacity
    assert not engine.kv._hoping and not engine.kv._loads


def tokens_of(events: list[TokenEvent]) -> list[int]:
    """The tokens of one stream, checked to be in order, without gap or repeat."""
    tokens = [e for e in events if e.token_id >= 0]
    assert [e.offset for e in tokens] == list(
        range(tokens[0].offset, tokens[0].offset + len(tokens))
    )
    assert all(e.finish_reason is None for e in events[:-1])
    assert events[-1].finish_reason is not None
    return [e.token_id for e in tokens]
