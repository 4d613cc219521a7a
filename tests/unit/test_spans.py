"""From notes to the phases of a trace."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests.support.engines import fake_engine, make_request, run_to_end
from tokenflow.cluster.attempts import Attempt, Attempts
from tokenflow.cluster.spans import Span, attempt_span, phases
from tokenflow.replicas.life import MOST_NOTES, Life, Note
from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.policy import Preempt

PROMPT = list(range(1, 41))


def notes(*items: tuple) -> list[Note]:
    """(what, second, values)"""
    return [Note(what, at, dict(*rest)) for what, at, *rest in items]


def shown(spans: list[Span]) -> list[tuple[str, float, float]]:
    return [(span.name, span.begun_s, span.ended_s) for span in spans]


WHOLE_LIFE = notes(
    ("waiting", 0.0),
    ("running", 1.0, {"output_tokens": 0}),
    ("prefill", 1.5, {"tokens": 32, "seconds": 0.5}),
    ("prefill", 2.0, {"tokens": 8, "seconds": 0.5}),
    ("first_token", 2.0),
    ("stalled", 2.5, {"seconds": 0.3}),
    ("preempt", 3.0, {"how": "offload", "computed_tokens": 50, "host_tokens": 32}),
    ("offload", 3.0, {"bytes": 1000}),
    ("offloading", 3.0, {"output_tokens": 10}),
    ("preempted", 3.5, {"output_tokens": 10}),
    ("loading", 5.0, {"output_tokens": 10}),
    ("load", 5.0, {"bytes": 700}),
    ("load", 5.1, {"bytes": 300}),
    ("running", 5.5, {"output_tokens": 10}),
    ("preempt", 6.0, {"how": "recompute", "computed_tokens": 60, "host_tokens": 0}),
    ("waiting", 6.0, {"output_tokens": 20}),
    ("running", 7.0, {"output_tokens": 20}),
    ("prefill", 7.5, {"tokens": 60, "seconds": 0.4}),
    ("finished", 8.0, {"output_tokens": 30}),
)


def test_a_whole_life_is_one_phase_after_the_other():
    spans = phases(WHOLE_LIFE, 99.0)
    assert shown(spans) == [
        ("queue", 0.0, 1.0),
        ("prefill", 1.0, 2.0),
        ("decode", 2.0, 3.0),
        ("preempted", 3.0, 5.0),
        ("load", 5.0, 5.5),
        ("decode", 5.5, 6.0),
        ("preempted", 6.0, 7.0),
        ("prefill", 7.0, 7.5),
        ("decode", 7.5, 8.0),
    ]
    _, prefill, decode, offloaded, load, again, dropped, recomputed, _ = spans
    assert prefill.attributes == {"tokens": 40, "again": False}
    assert [(event.name, event.at_s) for event in prefill.events] == [
        ("forward pass", 1.5),
        ("forward pass", 2.0),
    ]
    assert [event.name for event in decode.events] == ["first_token", "stalled"]
    assert decode.attributes == {"tokens": 10} == again.attributes
    assert offloaded.attributes == {
        "how": "offload",
        "computed_tokens": 50,
        "host_tokens": 32,
        "offloaded_bytes": 1000,
    }
    assert [(event.name, event.at_s) for event in offloaded.events] == [("offloaded", 3.5)]
    assert load.attributes == {"loaded_bytes": 1000}
    assert dropped.attributes["how"] == "recompute"
    assert recomputed.attributes == {"tokens": 60, "again": True}


@pytest.mark.parametrize("many", range(len(WHOLE_LIFE)))
def test_a_life_cut_short_has_no_gap(many):
    spans = phases(WHOLE_LIFE[:many], 50.0)
    for earlier, later in itertools.pairwise(spans):
        assert earlier.ended_s == later.begun_s
    if spans:
        assert (spans[0].begun_s, spans[-1].ended_s) == (0.0, 50.0)


def test_who_is_preempted_within_the_prefill_has_not_decoded():
    spans = phases(
        notes(
            ("waiting", 0.0),
            ("running", 1.0, {"output_tokens": 0}),
            ("prefill", 1.5, {"tokens": 32, "seconds": 0.5}),
            ("preempt", 2.0, {"how": "recompute"}),
            ("waiting", 2.0, {"output_tokens": 0}),
        ),
        3.0,
    )
    assert shown(spans) == [("queue", 0.0, 1.0), ("prefill", 1.0, 2.0), ("preempted", 2.0, 3.0)]


def test_an_attempt_is_routed_until_its_engine_has_it():
    attempt = Attempt(2, 10.0, "replica-a", placed_s=11.5, notes=notes(("waiting", 11.0)))
    span = attempt_span(attempt, 20.0)
    assert span.attributes == {"number": 2, "replica": "replica-a"}
    assert shown([span, *span.children]) == [
        ("attempt", 10.0, 20.0),
        ("route", 10.0, 11.0),
        ("queue", 11.0, 20.0),
    ]
    silent = attempt_span(Attempt(1, 10.0, "a", placed_s=11.0, ended_s=12.0, end="lost"), 20.0)
    assert silent.attributes["end"] == "lost"
    assert shown([silent, *silent.children]) == [("attempt", 10.0, 12.0), ("route", 10.0, 11.0)]
    nowhere = attempt_span(Attempt(1, 10.0, ended_s=12.0, end="refused"), 20.0)
    assert shown(nowhere.children) == [("route", 10.0, 12.0)]


def test_attempts_end_once_and_one_that_nobody_took_was_refused():
    attempts = Attempts()
    attempts.begin("a")
    attempts.begin("b")
    attempts.placed("b", "replica-b")
    attempts.note("b", [Note("waiting", 1.0, {})])
    attempts.note("unknown", [Note("waiting", 1.0, {})])
    attempts.end("b", "lost")
    attempts.end("b", "moved")
    attempts.end("unknown", "lost")
    attempts.begin("c")
    a, b, c = attempts
    assert (a.number, a.end, b.end, c.end) == (1, "refused", "lost", "")
    assert b.replica_id == "replica-b" and len(b.notes) == 1 and c.ended_s is None


def test_a_life_is_bounded():
    life = Life()
    for number in range(MOST_NOTES + 3):
        life.note("prefill", tokens=number)
        if number == 10:
            assert len(life.take()) == 11
    assert len(life.take()) == MOST_NOTES - 11
    assert life.left_out == 3 and life.take() == ()


@pytest.mark.parametrize("how", list(Preempt))
def test_the_engine_notes_the_life_of_a_preempted_request(how):
    engine, _, host, _ = fake_engine(max_batch_tokens=16, write_through=False)
    engine.add(replace(make_request("a", PROMPT, 40), traced=True))
    engine.add(make_request("b", PROMPT[::-1], 40))
    seq = engine._sequences["a"]
    while len(seq.output_ids) < 10:
        engine.step()
    engine.kv.preempt(seq, how)
    state = State.PREEMPTED if how is Preempt.OFFLOAD else State.WAITING
    while seq.state is not state:
        engine.wait_for_transfers(0)
    events = engine.take_events()
    rest = run_to_end(engine, host)
    all_events = [e for e in events if e.request_id == "a"] + rest["a"]
    assert all(not event.notes for event in [*rest["b"], *events] if event.request_id == "b")
    spans = phases([note for event in all_events for note in event.notes], 0.0)
    names = [span.name for span in spans]
    assert names[:4] == ["queue", "prefill", "decode", "preempted"]
    assert names[-1] == "decode"
    preempted = spans[3]
    assert preempted.attributes["how"] == how.value
    assert ("offloaded_bytes" in preempted.attributes) == (how is Preempt.OFFLOAD)
    passes = [event for event in spans[1].events if event.name == "forward pass"]
    assert len(passes) >= 3 and spans[1].attributes["tokens"] == len(PROMPT)
    assert sum(int(event.attributes["tokens"]) for event in passes) == len(PROMPT)
    if how is Preempt.RECOMPUTE:
        (again,) = [span for span in spans[4:] if span.name == "prefill"]
        assert again.attributes["again"] is True
    assert sum("first_token" in [e.name for e in span.events] for span in spans) == 1
    for earlier, later in itertools.pairwise(spans):
        assert earlier.ended_s == later.begun_s
