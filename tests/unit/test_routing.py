"""Which replica a request goes to: predictions, and how choices fall."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from tokenflow.cluster.routing import (
    ROUTERS,
    SAMPLE,
    STALE_S,
    Ask,
    ReplicaView,
    Speeds,
    Work,
    counted_rate,
    foresee,
    outlook,
)
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.scheduler.capacity import LOAD_FACTOR

MEASURED = LoadReport(
    number=1,
    requests=10**9,
    capacity=1000.0,
    prefill_s=1e-3,
    load_s=1e-4,
    memory_tokens=100_000,
    expected_output=50,
)
ASK = Ask(prompt_tokens=100, output_tokens=200, rate=20.0)
SPEEDS = Speeds(1000.0, 1e-3, 1e-3, 1e-4, LOAD_FACTOR * 1000.0)


def view(
    name: str = "a", *, received_s: float = 0.0, node: str = "", **report: float
) -> ReplicaView:
    return ReplicaView(name, node, replace(MEASURED, **report), received_s)  # type: ignore[arg-type]


def fleet(*views: ReplicaView) -> dict[str, ReplicaView]:
    return {v.name: v for v in views}


def rank(router: str, known: dict[str, ReplicaView], ask: Ask = ASK, *, seed: int = 0, now=0.0):
    return ROUTERS[router](random.Random(seed)).rank(ask, list(known), known, now)


# -- predictions ----------------------------------------------------------------------------------


def test_an_idle_replica_only_has_the_prompt_before_the_first_token():
    assert outlook(view(), ASK).ttft_s == pytest.approx(0.1)


def test_queued_prompts_come_first_reported_or_not():
    busy = view(queued_tokens=300)
    busy.unreported.add(ASK)
    assert outlook(busy, ASK).ttft_s == pytest.approx(0.5)


def test_beyond_the_rates_that_can_be_promised_a_part_of_all_work_drains_first():
    # Twice what can be promised, and no room: half of it has to end.
    asked = {"rate": 2 * 920.0 - 20.0, "remaining_tokens": 8000, "kv_tokens": 50_000}
    full = view(**asked, device_tokens=20_000)
    seen = outlook(full, ASK)
    assert seen.utilisation == pytest.approx(2.0)
    assert seen.ttft_s == seen.promised_s == pytest.approx(0.5 * 8.0 + 0.5 * 0.1)


def test_where_the_device_has_room_a_reader_begins_before_his_rate_can_be_promised():
    asked = {"rate": 2 * 920.0 - 20.0, "remaining_tokens": 8000, "kv_tokens": 10_000}
    seen = outlook(view(**asked, device_tokens=20_000), ASK)
    assert seen.ttft_s == pytest.approx(0.1)
    assert seen.promised_s == pytest.approx(4.0)


def test_readers_may_go_short_before_all_that_can_be_promised_is_asked_for():
    def short(rate: float) -> float:
        return outlook(view(rate=rate - ASK.rate, remaining_tokens=3000), ASK).short_s

    calm = 0.8 * 0.92 * 1000.0
    assert short(0.99 * calm) == 0.0
    # Twice as much: half of the three seconds of work.
    assert short(2.0 * calm) == pytest.approx(1.5)


def test_memory_that_is_spoken_for_drains_as_well():
    full = view(kv_tokens=200_000, remaining_tokens=10_000)
    assert outlook(full, ASK).ttft_s == pytest.approx(0.5 * 10.0, rel=0.02)


def test_an_output_counts_as_long_as_outputs_are_and_not_as_long_as_it_may_be():
    def behind(limit: int, expected: int) -> float:
        full = view(rate=2000.0, remaining_tokens=1000, expected_output=expected)
        full.unreported.add(replace(ASK, output_tokens=limit))
        return outlook(full, ASK).promised_s

    assert behind(50, 50) == pytest.approx(behind(100_000, 50))
    assert behind(100_000, 0) > 10 * behind(100_000, 50)


def test_whoever_is_alone_waits_for_nobody_however_fast_he_reads():
    assert outlook(view(), replace(ASK, rate=1e6)).ttft_s <= 0.1


def test_what_a_new_replica_has_not_measured_is_what_others_have():
    new = view(capacity=0.0, prefill_s=0.0, load_s=0.0)
    assert not outlook(new, ASK).measured and outlook(view(), ASK).measured
    assert outlook(new, replace(ASK, prompt_tokens=1)).score < outlook(new, ASK).score
    assert outlook(new, ASK, SPEEDS) == outlook(view(), ASK)


def test_among_overloaded_replicas_prompts_are_spread_before_rates():
    many_rates = view(rate=20_000.0, remaining_tokens=0)
    few_rates = view(rate=10_000.0, remaining_tokens=0, queued_tokens=300)
    assert outlook(many_rates, ASK).score < outlook(few_rates, ASK).score
    # Where there is room for both, rates are spread.
    assert outlook(view(rate=800.0), ASK).score > outlook(view(queued_tokens=100), ASK).score


def test_readers_are_promised_what_can_be_kept_not_what_a_full_device_makes():
    asked = view(rate=600.0, remaining_tokens=1000)
    fast = view(rate=600.0, remaining_tokens=1000, kept_rates=500.0)
    assert outlook(asked, ASK).utilisation < 1 < outlook(fast, ASK).utilisation
    assert outlook(asked, ASK).short_s == 0 < outlook(fast, ASK).short_s


def test_small_differences_of_measured_speeds_draw_nobody():
    speeds = SPEEDS
    assert outlook(view(prefill_s=0.6e-3, capacity=1900.0), ASK, speeds) == outlook(view(), ASK)
    assert outlook(view(prefill_s=0.4e-3), ASK, speeds).ttft_s == pytest.approx(0.04)
    assert outlook(view(prefill_s=3e-3), ASK, speeds).ttft_s == pytest.approx(0.3)


def test_a_replica_that_was_busy_with_other_things_is_not_taken_for_a_slow_one():
    speeds = Speeds(1000.0, 2e-3, 1e-3, 1e-4, LOAD_FACTOR * 1000.0)
    busy = view(prefill_s=9e-3, step_prefill_s=1.1e-3)
    assert outlook(busy, ASK, speeds).ttft_s == pytest.approx(0.2)
    slow = view(prefill_s=2e-3, step_prefill_s=4e-3)
    assert outlook(slow, ASK, speeds).ttft_s == pytest.approx(0.8)


def test_a_replica_that_began_badly_is_given_another_chance():
    known = fleet(view("a"), view("new", prefill_s=9e-3, kept_rates=100.0, requests=4))
    router = ROUTERS["burst"](random.Random(1))
    placed: Counter[str] = Counter()
    for _ in range(8):
        best = router.rank(ASK, list(known), known, 0.0)[0]
        known[best].unreported.add(ASK)
        placed[best] += 1
    assert placed == {"a": 4, "new": 4}
    # With every request it is believed a little more.
    seen = [outlook(view(prefill_s=9e-3, requests=n), ASK, SPEEDS).ttft_s for n in (4, 32, 10**9)]
    assert seen == pytest.approx([0.1, 0.3, 0.9], rel=1e-3)


def test_kv_saves_its_prefill_on_its_replica_and_less_the_load_on_its_node():
    ask = replace(ASK, cached_on="a", cached_tokens=64, kv_node="n", kv_tokens=64)
    assert outlook(view("a", node="n"), ask).ttft_s == pytest.approx(0.036)
    assert outlook(view("b", node="n"), ask).ttft_s == pytest.approx(0.1 - 64 * 0.9e-3)
    assert outlook(view("c", node="m"), ask).ttft_s == pytest.approx(0.1)


def test_requests_on_their_way_count_in_equal_parts():
    ahead = Work()
    for _ in range(4):
        ahead.add(ASK)
    assert ahead.share(2) == Work(2, 40.0, 200, 400)
    assert outlook(view(), ASK, ahead=ahead.share(2)).ttft_s == pytest.approx(0.3)


def test_what_has_been_counted_can_be_discounted_without_a_trace():
    work = Work()
    for rate in (0.1, 0.2, 0.3):
        work.add(replace(ASK, rate=rate))
    for rate in (0.1, 0.2, 0.3):
        work.add(replace(ASK, rate=rate), -1)
    assert work == Work()


def test_without_a_reader_a_request_counts_with_a_finite_rate():
    assert counted_rate(float("inf")) == 1.0
    assert counted_rate(12.5) == 12.5


# -- choices --------------------------------------------------------------------------------------


def test_the_nearest_first_token_wins():
    known = fleet(view("a", queued_tokens=1000), view("b"), view("c", queued_tokens=500))
    assert rank("burst", known) == ["b", "c", "a"]


def test_where_the_first_token_is_as_near_headroom_decides():
    known = fleet(view("a", rate=800.0), view("b", rate=100.0))
    assert rank("burst", known)[0] == "b"


def test_long_prompts_count_for_what_they_are():
    known = fleet(view("a"), view("b"))
    known["a"].unreported.add(replace(ASK, prompt_tokens=4000))
    for _ in range(3):
        best = rank("burst", known)[0]
        assert best == "b"
        known[best].unreported.add(ASK)


def test_a_burst_spreads_evenly_before_any_new_report():
    known = fleet(*(view(name) for name in "abcd"))
    router = ROUTERS["burst"](random.Random(1))
    placed: Counter[str] = Counter()
    for _ in range(200):
        best = router.rank(ASK, list(known), known, 0.0)[0]
        known[best].own.add(ASK)
        known[best].unreported.add(ASK)
        placed[best] += 1
    assert set(placed.values()) == {50}


def test_routers_that_know_the_same_do_not_all_choose_the_same():
    known = fleet(*(view(name) for name in "abcd"))
    first = Counter(rank("burst", known, seed=seed)[0] for seed in range(400))
    assert min(first.values()) > 60


def test_kv_that_lies_there_is_worth_a_short_queue_and_not_a_long_one():
    ask = replace(ASK, prompt_tokens=1000, cached_on="a", cached_tokens=960)
    assert rank("burst", fleet(view("a", queued_tokens=500), view("b")), ask)[0] == "a"
    assert rank("burst", fleet(view("a", queued_tokens=1500), view("b")), ask)[0] == "b"


def test_a_stale_replica_is_avoided_while_any_other_is_heard_of():
    now = 100.0
    known = fleet(view("a"), view("b", received_s=now - 1, queued_tokens=10_000))
    assert rank("burst", known, now=now) == ["b"]


def test_with_nothing_but_stale_reports_it_is_the_power_of_two_choices():
    names = "abcdef"
    known = fleet(*(view(name, received_s=-STALE_S - 1) for name in names))
    for name in names[1:]:
        known[name].own.streams = 5
    firsts = Counter(rank("burst", known, seed=seed)[0] for seed in range(600))
    # The idle one wins whenever it is drawn: in two of six cases; the others share the rest.
    assert 150 < firsts["a"] < 250
    assert set(firsts) == set(names)


def test_of_many_a_sample_and_whoever_has_the_kv():
    known = fleet(*(view(f"{i}", queued_tokens=i) for i in range(200)))
    ask = replace(ASK, cached_on="199", cached_tokens=64)
    seen = foresee(ask, list(known), known, 0.0, random.Random(1))
    assert SAMPLE <= len(seen) <= SAMPLE + 1
    assert "199" in [name for _, name in seen]
    scores = [o.score for o, _ in seen]
    assert scores[0] <= min(scores) + 0.01


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_answers_whatever_is_known(router):
    known = fleet(view("a"), view("b"))
    for views in ({}, fleet(view("a")), known):
        order = ROUTERS[router](random.Random(1)).rank(ASK, ["a", "b"], views, 0.0)
        assert order and set(order) <= {"a", "b"} and len(set(order)) == len(order)
    assert ROUTERS[router](random.Random(1)).rank(ASK, [], known, 0.0) == []


def test_the_others_do_as_they_are_called():
    known = fleet(view("a", active=3), view("b", active=1), view("c", active=2))
    assert rank("least-requests", known) == ["b"]
    turns = ROUTERS["round-robin"](random.Random(1))
    order = [turns.rank(ASK, list(known), known, 0.0)[0] for _ in range(6)]
    assert order[:3] == order[3:] and set(order) == set("abc")
    pairs = [rank("power-of-two", known, seed=seed) for seed in range(50)]
    assert all(known[x].report.active <= known[y].report.active for x, y in pairs)
    assert {first for first, _ in pairs} == {"b", "c"}
    assert len({rank("random", known, seed=seed)[0] for seed in range(50)}) == 3
