"""The runner on a virtual clock: when requests go out, and what clients do, to the microsecond."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tokenflow.loadgen import virtual_time
from tokenflow.loadgen.description import ClosedLoop, OpenAIServer
from tokenflow.loadgen.metrics import LEFT, StreamRecord
from tokenflow.loadgen.readers import ChangesSpeed, Disconnects, Pauses
from tokenflow.loadgen.runner import INTERRUPTED, Run
from tokenflow.loadgen.stub import MODEL, Script, StubServer, paced
from tokenflow.loadgen.targets.openai import OpenAITarget
from tokenflow.loadgen.workload import Ask, Workload

PACE = 0.05


def ask(index: int, at_s: float = 0.0, **fields) -> Ask:
    given: dict[str, Any] = dict(
        prompt_tokens=3, output_tokens=20, token_rate=20.0, seed=index, session=index
    )
    return Ask(index=index, at_s=at_s, **given | fields)


def serve(
    asks: list[Ask],
    script: Callable[[dict[str, Any]], Script] = lambda body: paced(0.5, PACE, body["max_tokens"]),
    *,
    slots: int | None = None,
    timeout_s: float = 100.0,
    closed_loop: ClosedLoop | None = None,
) -> tuple[list[StreamRecord], StubServer]:
    """Records with times after the first was due, and the server that answered."""

    async def main() -> tuple[list[StreamRecord], StubServer]:
        clock = asyncio.get_running_loop().time
        stub = StubServer(script, slots=slots, clock=clock)
        async with stub.running() as url:
            target = OpenAITarget(OpenAIServer(url=url, model=MODEL), probe=False, clock=clock)
            await target.open()
            run = Run(
                target,
                Workload(tuple(asks)),
                timeout_s=timeout_s,
                closed_loop=closed_loop,
                clock=clock,
            )
            try:
                records = await run.run()
            finally:
                await target.close()
            assert run.begun_s is not None
            for served in stub.served:
                served.received_s -= run.begun_s
            return [shifted(record, run.begun_s) for record in records], stub

    return virtual_time.run(main())


def shifted(record: StreamRecord, by: float) -> StreamRecord:
    return replace(
        record,
        intended_s=record.intended_s - by,
        sent_s=None if record.sent_s is None else record.sent_s - by,
        finished_s=None if record.finished_s is None else record.finished_s - by,
        arrivals=[(at - by, count) for at, count in record.arrivals],
        pauses=[(at - by, seconds) for at, seconds in record.pauses],
        rate_changes=[(at - by, rate) for at, rate in record.rate_changes],
    )


def exactly(value):
    return pytest.approx(value, abs=1e-6)


# -- open loop ------------------------------------------------------------------------------------


def test_requests_go_out_when_they_are_due_whatever_became_of_the_others():
    """One slot of 1.45 s an answer and arrivals every second: the queue grows, arrivals do not
    wait, and who waits longer is asked for longer."""
    records, stub = serve([ask(i, float(i)) for i in range(5)], slots=1)
    assert [r.sent_s for r in records] == exactly([0, 1, 2, 3, 4])
    assert [s.received_s for s in stub.served] == exactly([0, 1, 2, 3, 4])
    assert [r.first_token_s - r.intended_s for r in records] == exactly(
        [0.5 + 0.45 * i for i in range(5)]
    )
    assert all(r.ok and r.tokens == 20 for r in records)


def test_the_closed_loop_hides_the_waiting():
    records, _ = serve(
        [ask(i, float(i)) for i in range(5)], slots=1, closed_loop=ClosedLoop(users=1)
    )
    assert [r.first_token_s - r.intended_s for r in records] == exactly([0.5] * 5)
    assert [r.sent_s for r in records] == exactly([1.45 * i for i in range(5)])


def test_users_of_a_closed_loop_think():
    asks = [ask(i) for i in range(6)]
    records, stub = serve(asks, closed_loop=ClosedLoop(users=2, think_s=0.55))
    assert [r.sent_s for r in records] == exactly([0, 0, 2, 2, 4, 4])
    assert len(stub.served) == 6


def test_a_burst_is_sent_at_once_and_recorded_in_order():
    records, stub = serve([ask(i) for i in range(50)])
    assert [r.index for r in records] == list(range(50))
    assert {round(r.sent_s, 6) for r in records} == {0.0}
    assert sorted(s.body["seed"] for s in stub.served) == list(range(50))
    assert {s.rate for s in stub.served} == {"20"}


def test_what_is_not_finished_in_time_has_failed():
    records, _ = serve([ask(0), ask(1, output_tokens=200)], timeout_s=3.0)
    assert [r.ok for r in records] == [True, False]
    assert records[1].error == "not finished after 3 s"
    assert records[1].finished_s == exactly(3.0)
    assert records[1].tokens == 51 or records[1].tokens == 50


def test_a_server_that_falls_silent_is_given_up():
    quiet = Script(((0.5, 1),), fault="silence")
    records, _ = serve([ask(0)], lambda _: quiet, timeout_s=30.0)
    assert (records[0].error, records[0].tokens) == ("not finished after 30 s", 1)


# -- conversations --------------------------------------------------------------------------------


def test_the_next_turn_comes_when_the_answer_is_read_and_thought_about():
    # 20 tokens at 5 a second are read from 0.5 to 4.5 s; then 2 s of thinking.
    first = ask(0, token_rate=5.0)
    turns = [first, replace(first, index=1, turn=1, think_s=2.0),
             replace(first, index=2, turn=2, think_s=1.0, token_rate=math.inf)]  # fmt: skip
    records, stub = serve(turns)
    assert [r.intended_s for r in records] == exactly([0, 6.5, 6.5 + 4.5 + 1.0])
    assert [len(s.body["messages"]) for s in stub.served] == [1, 3, 5]
    said = stub.served[2].body["messages"]
    assert said[1]["content"] == said[3]["content"] == "word " * 20
    assert said[0] == stub.served[0].body["messages"][0]


def test_who_does_not_read_asks_on_at_once():
    first = ask(0, token_rate=math.inf)
    records, _ = serve([first, replace(first, index=1, turn=1)])
    assert records[1].intended_s == exactly(0.5 + 19 * PACE)


def test_a_conversation_ends_with_a_failure():
    broken = Script(((0.5, 1),), fault="error event")
    first = ask(0)
    records, stub = serve([first, replace(first, index=1, turn=1), ask(2)], lambda _: broken)
    assert [r.index for r in records] == [0, 2] and len(stub.served) == 2


# -- clients that misbehave -----------------------------------------------------------------------


def test_a_client_that_hangs_up():
    records, _ = serve([ask(0, behaviour=Disconnects(share=1, after_tokens=5)), ask(1)])
    assert (records[0].finish_reason, records[0].tokens, records[0].ok) == (LEFT, 5, True)
    assert records[0].finished_s == exactly(0.5 + 4 * PACE)
    assert records[1].tokens == 20


def test_a_client_that_pauses():
    records, _ = serve([ask(0, behaviour=Pauses(share=1, after_tokens=5, seconds=3.0))])
    (record,) = records
    assert record.pauses == [(exactly(0.7), exactly(3.0))]
    assert record.arrivals[4] == (exactly(0.7), 1)
    # What came meanwhile is read from the connection at once.
    assert [at for at, _ in record.arrivals[5:]] == exactly([3.7] * 15)
    assert record.ok and record.playback().stall_s == exactly(0.0)


def test_a_client_that_changes_its_speed():
    records, stub = serve(
        [ask(0, behaviour=ChangesSpeed(share=1, after_tokens=10, token_rate=40.0))]
    )
    (record,) = records
    assert record.rate_changes == [(exactly(0.95), 40.0)]
    assert record.playback().stall_s == exactly(10 * 0.025)
    assert stub.served[0].rate == "20", "no server can be told"


def test_an_agent_has_no_speed_to_change():
    change = ChangesSpeed(share=1, after_tokens=10, token_rate=40.0)
    records, _ = serve([ask(0, token_rate=math.inf, behaviour=change)])
    assert records[0].rate_changes == [] and records[0].ok


# -- broken off -----------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_what_it_has():
    async def main() -> list[StreamRecord]:
        clock = asyncio.get_running_loop().time
        stub = StubServer(lambda body: paced(0.5, PACE, body["max_tokens"]), clock=clock)
        async with stub.running() as url:
            target = OpenAITarget(OpenAIServer(url=url, model=MODEL), probe=False, clock=clock)
            await target.open()
            asks = (ask(0), ask(1, 1.0, output_tokens=500), ask(2, 50.0))
            ended: list[int] = []
            run = Run(
                target,
                Workload(asks),
                timeout_s=99,
                clock=clock,
                on_finish=lambda record: ended.append(record.index),
            )
            running = asyncio.create_task(run.run())
            await asyncio.sleep(5.0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await target.close()
            assert ended == [0]
            return run.in_order()

    done, cut = virtual_time.run(main())
    assert done.ok and not cut.ok
    assert cut.error == INTERRUPTED and cut.finished_s is not None
    assert cut.tokens > 50
