"""The engine on its own thread."""

from __future__ import annotations

import threading

import pytest

from tests.support.engines import fake_engine, make_request
from tests.support.fake_executor import expected_output
from tokenflow.replicas.errors import EngineDeadError, InvalidRequestError
from tokenflow.replicas.loop import EngineLoop
from tokenflow.replicas.request import ReaderChange


class Sink:
    """Collects events and lets a test await the end of a request."""

    def __init__(self) -> None:
        self.events = []
        self.changed = threading.Condition()

    def __call__(self, events) -> None:
        with self.changed:
            self.events += events
            self.changed.notify_all()

    def wait_for_end(self, request_id: str) -> list:
        with self.changed:
            assert self.changed.wait_for(
                lambda: any(e.request_id == request_id and e.finish_reason for e in self.events),
                timeout=20,
            )
            return [e for e in self.events if e.request_id == request_id]


@pytest.fixture
def running():
    engine, executor, _, _ = fake_engine()
    sink = Sink()
    died = []
    loop = EngineLoop(engine, sink, died.append)
    loop.start()
    yield loop, sink, executor, died
    loop.stop()


def test_requests_run_and_cancel(running):
    loop, sink, executor, _ = running
    loop.submit(make_request("a", [1, 2, 3], 20))
    assert [e.token_id for e in sink.wait_for_end("a")] == expected_output([1, 2, 3], 20)
    loop.submit(make_request("b", [1, 2, 3], 250))
    loop.cancel("b")
    assert sink.wait_for_end("b")[-1].finish_reason == "cancelled"
    loop.cancel("unknown")
    loop.stop()
    assert executor.closed
    with pytest.raises(EngineDeadError):
        loop.submit(make_request("c", [1], 5))


def test_bad_requests_are_refused_in_the_callers_thread(running):
    loop, _, _, _ = running
    with pytest.raises(InvalidRequestError):
        loop.submit(make_request("a", [], 5))


def test_an_id_that_is_taken_ends_only_the_second_request(running):
    loop, sink, executor, _ = running
    gate = threading.Event()
    execute = executor.execute

    def slow(batch):
        gate.wait(10)
        return execute(batch)

    executor.execute = slow
    loop.submit(make_request("a", [1, 2, 3], 20))
    loop.submit(make_request("a", [1, 2, 3], 20))
    gate.set()
    with sink.changed:
        assert sink.changed.wait_for(
            lambda: {e.finish_reason for e in sink.events} >= {"error", "length"}, timeout=20
        )


def test_a_failing_step_ends_the_loop_and_says_so(running):
    loop, _, executor, died = running
    failed = threading.Event()

    def broken(batch):
        failed.set()
        raise RuntimeError("device lost")

    executor.execute = broken
    loop.submit(make_request("a", [1], 5))
    assert failed.wait(10)
    loop._thread.join(10)
    assert "device lost" in str(died[0])
    assert executor.closed
    with pytest.raises(EngineDeadError, match="device lost"):
        loop.raise_if_dead()


def test_a_readers_change_reaches_the_engine(running):
    loop, sink, _, died = running
    loop.submit(make_request("a", [1, 2, 3], 200))
    loop.change_reader("a", ReaderChange(paused=True))
    loop.change_reader("a", ReaderChange(consumed=1_000_000))
    loop.change_reader("unknown", ReaderChange(token_rate=5.0))
    with pytest.raises(InvalidRequestError, match="token_rate"):
        loop.change_reader("a", ReaderChange(token_rate=-1.0))
    assert len(sink.wait_for_end("a")) == 200
    assert not died
