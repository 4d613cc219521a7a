"""Whatever arrives, leaves, fails or is cancelled: every stream is right, nothing leaks, and no
plan asks for what the engine cannot do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engines import (
    check_all_free,
    check_conservation,
    fake_engine,
    make_request,
    tokens_of,
)
from tests.support.fake_executor import expected_output
from tests.support.plans import Checked, check_tracker
from tokenflow.replicas import kv_cache
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy

BLOCK = 4
NEVER = 10_000
RATES = [0.5, 2.0, 10.0, 500.0, math.inf]


@dataclass(frozen=True)
class Spec:
    """One request. It is cut to what the memory holds."""

    prompt: int
    max_tokens: int
    rate: float
    arrives: int
    """Before this step, as the others."""
    cancelled: int = NEVER
    changes: tuple[tuple[int, ReaderChange], ...] = ()
    """(before this step, what its reader does). Consumed is a share of the output, in percent."""
    family: int = 0
    """Requests of one family have prompts that begin alike; none is like those of family 0."""
    salt: str | None = None
    delivered: int = 0
    """Tokens that another replica generated before."""


@dataclass(frozen=True)
class Scenario:
    specs: list[Spec]
    blocks: int
    host_slots: int
    delay: int
    late_sums: bool
    max_num_seqs: int
    max_batch_tokens: int
    tick: float
    failures: frozenset[int]
    """Steps whose first copy fails; -1: all of them."""
    flips: frozenset[int]
    """Steps before which a bit of the host memory falls over."""
    engine: dict[str, bool]
    params: dict[str, float] = field(default_factory=dict)

    def prompt(self, i: int) -> list[int]:
        spec = self.specs[i]
        length = min(spec.prompt, self.blocks * BLOCK - 1)
        own = 0 if spec.family else 1
        first = spec.family * 29 if spec.family else i * 13
        # Relatives part after two thirds of their prompts.
        alike = length * 2 // 3
        return [(first + j + (own or j >= alike) * i) % 250 + 1 for j in range(length)]

    def delivered(self, i: int) -> list[int]:
        return self.expected(i)[: min(self.specs[i].delivered, self.max_tokens(i) - 1)]

    def expected(self, i: int) -> list[int]:
        prompt = self.prompt(i)
        return expected_output(prompt, self.max_tokens(i))

    def max_tokens(self, i: int) -> int:
        return min(self.specs[i].max_tokens, self.blocks * BLOCK - len(self.prompt(i)))


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """So that copies of these short sequences, too, go in several jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "CHUNK_BYTES", 3 * KVLayout(1, BLOCK, 1, 1, "float32").block_bytes)
        yield


steps = st.integers(0, 80)
changes = st.one_of(
    st.builds(ReaderChange, token_rate=st.sampled_from(RATES)),
    st.builds(ReaderChange, paused=st.booleans()),
    st.builds(ReaderChange, consumed=st.sampled_from([0, 30, 100])),
)
specs = st.builds(
    Spec,
    prompt=st.integers(1, 60),
    max_tokens=st.integers(1, 50),
    rate=st.sampled_from(RATES),
    arrives=st.integers(0, 40),
    cancelled=st.one_of(st.just(NEVER), st.just(NEVER), steps),
    changes=st.one_of(st.just(()), st.lists(st.tuples(steps, changes), max_size=4).map(tuple)),
    family=st.integers(0, 2),
    salt=st.sampled_from([None, None, "a", "b"]),
    delivered=st.sampled_from([0, 0, 0, 1, 9]),
)


def policy_params(policy: str) -> st.SearchStrategy[dict[str, float]]:
    """The defaults mostly; else some of them times 1/4 to 4."""
    kind = POLICIES[policy][1]
    factors = st.sampled_from([0.0, 0.25, 0.5, 2.0, 4.0])

    def scaled(chosen: dict[str, float]) -> dict[str, float]:
        values = {f.name: f.default for f in fields(kind) if f.name in chosen}
        return {
            name: round(value * chosen[name]) if isinstance(value, int) else value * chosen[name]
            for name, value in values.items()
        }

    some = st.dictionaries(st.sampled_from([f.name for f in fields(kind)]), factors)
    return st.one_of(st.just({}), some.map(scaled))


def scenarios(policy: str) -> st.SearchStrategy[Scenario]:
    switches = st.sampled_from([True, True, True, False])
    return st.builds(
        Scenario,
        specs=st.lists(specs, min_size=1, max_size=14),
        blocks=st.one_of(st.integers(3, 12), st.integers(13, 60)),
        host_slots=st.sampled_from([0, 8, 40, 200]),
        delay=st.integers(0, 4),
        late_sums=st.booleans(),
        max_num_seqs=st.integers(1, 8),
        max_batch_tokens=st.sampled_from([16, 24, 64]),
        tick=st.sampled_from([0.001, 0.05, 0.5]),
        failures=st.one_of(
            st.just(frozenset()),
            st.frozensets(st.integers(0, 80), max_size=20),
            st.just(frozenset({-1})),
        ),
        flips=st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, 80), max_size=20)),
        engine=st.fixed_dictionaries(
            {
                name: switches
                for name in ("offload", "write_through", "overlap_transfers", "prefix_cache")
            }
            | {"async_scheduling": st.booleans()}
        ),
        params=policy_params(policy),
    )


@dataclass
class Run:
    scenario: Scenario
    policy: str
    schedule: list[Any] = field(default_factory=list)
    streams: dict[int, list[TokenEvent]] = field(default_factory=dict)

    def run(self) -> Run:
        """To the end, with every invariant checked after every step."""
        scenario = self.scenario
        engine, executor, host, clock = fake_engine(
            policy=Checked(make_policy(self.policy, scenario.params)),
            blocks=scenario.blocks,
            block_size=BLOCK,
            host_slots=scenario.host_slots,
            delay=scenario.delay,
            late_sums=scenario.late_sums,
            max_num_seqs=scenario.max_num_seqs,
            max_batch_tokens=scenario.max_batch_tokens,
            max_model_len=1 << 20,
            tick=scenario.tick,
            verify_loads="full",
            **scenario.engine,
        )

        def forced() -> Any:
            raise AssertionError("the policy left the device idle")

        engine._force_progress = forced  # type: ignore[method-assign]
        todo = self._todo()
        step = 0
        while todo or engine.has_work:
            while todo and todo[0][0] <= step:
                _, i, what = todo.pop(0)
                if what == "arrives":
                    request = make_request(
                        f"{i}",
                        scenario.prompt(i),
                        scenario.max_tokens(i),
                        rate=scenario.specs[i].rate,
                        arrival_s=clock(),
                        resumed=scenario.delivered(i),
                        salt=scenario.specs[i].salt,
                    )
                    engine.check(request)
                    engine.add(request)
                    self.streams[i] = []
                elif what == "cancel":
                    engine.cancel(f"{i}")
                else:
                    self._change(engine, f"{i}", what)
            executor.fail_next_job = bool({-1, step} & scenario.failures)
            if step in scenario.flips and scenario.host_slots:
                executor.host[step * 7 % scenario.host_slots, step % BLOCK] ^= 1
            engine.step()
            check_conservation(engine, host)
            check_tracker(engine.tracker)
            assert sorted(s.request_id for s in engine.tracker.sequences) == sorted(engine.requests)
            for event in engine.take_events():
                stream = self.streams[int(event.request_id)]
                assert not stream or stream[-1].finish_reason is None, "an event after the end"
                stream.append(event)
            step += 1
            assert step < NEVER, "no progress"
        check_all_free(engine, host)
        self.schedule = executor.steps
        return self

    @staticmethod
    def _change(engine: Engine, name: str, change: ReaderChange) -> None:
        for seq in engine.tracker.sequences:
            if seq.request_id == name:
                made = seq.drawn
                if change.consumed is not None:
                    change = replace(change, consumed=made * change.consumed // 100)
                assert engine.change_reader(name, change)
                with pytest.raises(InvalidRequestError, match="consumed"):
                    engine.report_consumed(name, made + 1)
                return
        assert not engine.change_reader(name, change), "it has ended"

    def _todo(self) -> list[tuple[int, int, Any]]:
        """(step, request, what happens to it), in order."""
        todo: list[tuple[int, int, Any]] = []
        for i, spec in enumerate(self.scenario.specs):
            todo.append((spec.arrives, i, "arrives"))
            # A reader can only leave, or change, after coming.
            todo += [(max(at, spec.arrives), i, change) for at, change in spec.changes]
            if spec.cancelled < NEVER:
                todo.append((max(spec.cancelled, spec.arrives), i, "cancel"))
        return sorted(todo, key=lambda item: item[0])

    def check_streams(self) -> None:
        for i, spec in enumerate(self.scenario.specs):
            events = self.streams[i]
            first = len(self.scenario.delivered(i))
            expected = self.scenario.expected(i)[first:]
            # One token is computed at least, and a moved request was told before.
            most = 0 if first else len(self.scenario.prompt(i)) - 1
            assert events[0].cached_tokens in range(most + 1)
            assert not any(event.cached_tokens for event in events[1:])
            if events[-1].finish_reason == "cancelled":
                assert spec.cancelled < NEVER
                offsets = list(range(first, first + len(events) - 1))
                assert [e.offset for e in events[:-1]] == offsets
                assert [e.token_id for e in events[:-1]] == expected[: len(events) - 1]
            else:
                assert events[-1].finish_reason == "length"
                assert tokens_of(events) == expected


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streams_are_right_memory_is_conserved_and_plans_can_be_done(policy, data):
    Run(data.draw(scenarios(policy)), policy).run().check_streams()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_same_scenario_gives_the_same_schedule(policy, data):
    scenario = data.draw(scenarios(policy))
    assert Run(scenario, policy).run().schedule == Run(scenario, policy).run().schedule
