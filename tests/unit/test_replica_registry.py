"""What a process knows of the replicas: whose news counts, and its own requests exactly."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.cluster.locality import CHUNK_TOKENS, PrefixMap, prefix_keys
from tokenflow.cluster.replica_registry import ReplicaRegistry
from tokenflow.cluster.routing import Ask, Work
from tokenflow.replicas.load import LoadReport

ASK = Ask(prompt_tokens=100, output_tokens=50, rate=20.0)
REPORT = LoadReport(
    number=1, capacity=1000.0, prefill_s=1e-3, memory_tokens=10_000, expected_output=50
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def registry(names: str = "ab", *, report: LoadReport | None = REPORT) -> ReplicaRegistry:
    made = ReplicaRegistry(Clock(), random.Random(1))
    made.update({name: f"node {name}" for name in names})
    if report is not None:
        for name in names:
            made.report(name, report)
    return made


def own(made: ReplicaRegistry) -> dict[str, int]:
    return {name: view.own.streams for name, view in made.snapshot().items()}


def test_a_burst_spreads_over_replicas_of_which_nothing_new_is_heard():
    made = registry("abcd")
    for i in range(200):
        made.assign(f"{i}", ASK, "abcd")
    assert own(made) == dict.fromkeys("abcd", 50)


def test_a_report_takes_over_the_requests_that_it_knows_of():
    made = registry("a")
    for request in "xyz":
        made.assign(request, ASK, "a")
    made.report("a", replace(REPORT, number=2, active=2, queued_tokens=200), ["x", "y"])
    view = made.snapshot()["a"]
    assert (view.own.streams, view.unreported.streams, view.report.active) == (3, 1, 2)
    assert view.unreported == Work(1, 20.0, 100, 50)
    for request in "xyz":
        made.finish(request)
        made.finish(request)
    view = made.snapshot()["a"]
    assert view.own == view.unreported == Work()


def test_of_two_ways_the_newer_report_counts_and_old_news_of_requests_still_does():
    made = registry("a")
    made.assign("x", ASK, "a")
    made.report_from_serve("a", {"load": replace(REPORT, number=5, active=7).to_wire()})
    made.report("a", replace(REPORT, number=4, active=3), ["x"])
    view = made.snapshot()["a"]
    assert (view.report.number, view.report.active, view.unreported.streams) == (5, 7, 0)


def test_statistics_that_come_again_unchanged_do_not_make_a_replica_look_alive():
    clock = Clock()
    made = ReplicaRegistry(clock, random.Random(1))
    made.update({"a": "n"})
    stats = {"load": REPORT.to_wire(), "beat": 1}
    made.report_from_serve("a", stats)
    clock.now = 60.0
    made.report_from_serve("a", dict(stats))
    assert not made.snapshot()["a"].fresh(clock.now)
    made.report_from_serve("a", {**stats, "beat": 2})
    assert made.snapshot()["a"].fresh(clock.now)
    with pytest.raises(TypeError, match="16 values"):
        made.report_from_serve("a", {"load": (1, 2)})


def test_a_heartbeat_without_news_keeps_what_was_reported_last():
    clock = Clock()
    made = ReplicaRegistry(clock, random.Random(1))
    made.update({"idle": "n", "busy": "m"})
    made.report("idle", REPORT)
    clock.now = 60.0
    made.report("busy", replace(REPORT, number=9, active=90, queued_tokens=9000))
    made.confirm("idle")
    made.confirm("unheard of")
    assert made.assign("x", ASK, ["busy", "idle"])[0] == "idle"
    assert made.snapshot()["idle"].report == REPORT


def test_an_avoided_replica_is_taken_only_where_there_is_no_other():
    made = registry("ab", report=None)
    made.report("a", REPORT)
    made.avoid("a")
    assert made.assign("x", ASK, "ab") == ["b"], "of which nothing is known yet"
    assert made.assign("y", ASK, "a") == ["a"]
    made.trust("a")
    assert made.assign("z", ASK, "ab")[0] == "a"


def test_a_replica_that_is_gone_is_forgotten_with_its_last_request_but_not_its_node():
    made = registry("ab")
    made.assign("x", ASK, "a")
    made.update({"b": "node b"})
    assert made.replicas == ("b",) and list(made.snapshot()) == ["b"]
    assert "a" in made._views
    made.finish("x")
    assert "a" not in made._views
    assert made.node_of("a") == "node a" and made.node_of("never") == ""


def test_a_request_that_ended_before_it_was_placed_is_never_counted():
    made = registry()
    made.finish("x")
    assert made.assign("x", ASK, "ab")
    assert own(made) == {"a": 0, "b": 0}


def test_a_request_is_counted_where_serve_has_sent_it():
    made = registry()
    first = made.assign("x", ASK, "ab")[0]
    other = "ab".replace(first, "")
    made.move("x", other)
    assert own(made) == {first: 0, other: 1}
    made.move("unknown", first)
    made.finish("x")
    assert own(made) == {"a": 0, "b": 0}


def test_text_goes_where_its_beginning_was_computed():
    made = registry("abcdefgh")
    keys = prefix_keys(range(1000, 1000 + 10 * CHUNK_TOKENS))
    ask = replace(ASK, prompt_tokens=10 * CHUNK_TOKENS)
    home = made.assign("x", ask, "abcdefgh", keys)[0]
    made.finish("x")
    for turn in range(5):
        longer = prefix_keys(range(1000, 1000 + (11 + turn) * CHUNK_TOKENS))
        assert made.assign(f"{turn}", ask, "abcdefgh", longer)[0] == home
        made.finish(f"{turn}")


def test_of_many_at_one_moment_the_last_is_judged_by_those_before_it():
    made = registry("ab")
    alone = made.foresee(ASK)
    with made.reserve([ASK] * 100):
        crowded = made.foresee(ASK)
    after = made.foresee(ASK)
    assert alone is not None and crowded is not None and after is not None
    assert crowded.ttft_s > 40 * alone.ttft_s
    assert after == alone
    assert registry("ab", report=None).foresee(ASK) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["assign", "finish", "move", "report", "update"]),
            st.integers(0, 5),
            st.integers(0, 2),
        ),
        max_size=60,
    )
)
def test_own_requests_are_counted_exactly_whatever_happens(events):
    names = "abc"
    made = registry(names)
    placed: dict[str, str] = {}
    over: set[str] = set()
    for number, (what, request, replica) in enumerate(events):
        name, place = f"{request}", names[replica]
        if what == "assign":
            first = made.assign(name, replace(ASK, rate=0.1 * request), names)[0]
            placed.pop(name, None)
            if name not in over:
                placed[name] = first
        elif what == "finish":
            made.finish(name)
            over.add(name)
            placed.pop(name, None)
        elif what == "move":
            made.move(name, place)
            if name in placed:
                placed[name] = place
        elif what == "report":
            made.report(place, replace(REPORT, number=number + 2), [name])
        else:
            made.update({n: f"node {n}" for n in names[replica:]})
    made.update({n: f"node {n}" for n in names})
    for name, view in made.snapshot().items():
        assert view.own.streams == sum(place == name for place in placed.values())
        assert 0 <= view.unreported.streams <= view.own.streams
        assert view.own.rate >= view.unreported.rate - 1e-9 >= -1e-8


# -- prefixes -------------------------------------------------------------------------------------


def test_the_longest_known_prefix_is_found_and_salts_keep_apart():
    places = PrefixMap()
    text = list(range(5 * CHUNK_TOKENS))
    places.remember(prefix_keys(text[: 2 * CHUNK_TOKENS]), "a")
    places.remember(prefix_keys(text[: 4 * CHUNK_TOKENS])[2:], "b")
    assert places.find(prefix_keys(text)) == ("b", 4 * CHUNK_TOKENS)
    assert places.find(prefix_keys(text[: 3 * CHUNK_TOKENS - 1])) == ("a", 2 * CHUNK_TOKENS)
    assert places.find(prefix_keys(text, salt="mine")) == ("", 0)
    assert places.find(prefix_keys(text[1:])) == ("", 0)
    assert places.find([]) == ("", 0)


def test_the_memory_of_prefixes_is_bounded_and_keeps_what_was_used_last():
    places = PrefixMap(capacity=3)
    for i in range(3):
        places.remember([bytes([i])], f"{i}")
    places.remember([b"\0"], "again")
    places.remember([b"new"], "new")
    assert len(places) == 3
    assert places.find([b"\0"]) == ("again", CHUNK_TOKENS)
    assert places.find([b"\1"]) == ("", 0)
