"""What GET /metrics says is what the engines counted."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tokenflow.cluster.ingress_metrics import IngressMetrics
from tokenflow.cluster.kv_fetch import FetchStats
from tokenflow.cluster.metrics import render
from tokenflow.replicas.buffers import BUFFER_QUANTILES
from tokenflow.replicas.stats import TTFT_BUCKETS_S, EngineStats

TTFTS = {"one": [0.01, 0.05, 0.3, 1.2, 61.0], "two": [2.0]}
NAMES = {
    "steps": "tokenflow_steps_total",
    "step_seconds": "tokenflow_step_seconds_total",
    "schedule_seconds": "tokenflow_schedule_seconds_total",
    "prompt_tokens": "tokenflow_prompt_tokens_total",
    "recomputed_tokens": "tokenflow_recomputed_tokens_total",
    "generated_tokens": "tokenflow_generated_tokens_total",
    "effective_tokens": "tokenflow_effective_tokens_total",
    "requests": "tokenflow_requests_total",
    "resumes": "tokenflow_resumes_total",
    "offloaded_bytes": "tokenflow_offloaded_bytes_total",
    "written_through_bytes": "tokenflow_written_through_bytes_total",
    "loaded_bytes": "tokenflow_loaded_bytes_total",
    "out_of_memory": "tokenflow_out_of_memory_steps_total",
    "transfer_errors": "tokenflow_transfer_errors_total",
    "corrupt_blocks": "tokenflow_corrupt_blocks_total",
    "prefix_queried_tokens": "tokenflow_prefix_queried_tokens_total",
    "prefix_device_hit_tokens": "tokenflow_prefix_device_hit_tokens_total",
    "prefix_host_hit_tokens": "tokenflow_prefix_host_hit_tokens_total",
    "now_cached_blocks": "tokenflow_kv_cached_blocks",
    "reader_stalls": "tokenflow_reader_stalls_total",
    "reader_stall_seconds": "tokenflow_reader_stall_seconds_total",
    "now_waiting": "tokenflow_waiting_requests",
    "now_running": "tokenflow_running_requests",
    "now_preempted": "tokenflow_preempted_requests",
    "now_free_blocks": "tokenflow_kv_free_blocks",
    "now_total_blocks": "tokenflow_kv_total_blocks",
    "now_free_host_slots": "tokenflow_host_free_slots",
    "now_rate": "tokenflow_declared_rate",
    "now_capacity": "tokenflow_capacity",
    "now_parked": "tokenflow_parked_requests",
    "now_overloaded": "tokenflow_overloaded",
    "now_readers": "tokenflow_readers",
    "now_dry_readers": "tokenflow_dry_readers",
}
ELSEWHERE = {
    "finished": "tokenflow_finished_requests_total",
    "preempted_offload": "tokenflow_preemptions_total",
    "preempted_recompute": "tokenflow_preemptions_total",
    "ttft_count": "tokenflow_time_to_first_token_seconds_count",
    "ttft_seconds": "tokenflow_time_to_first_token_seconds_sum",
    "ttft_buckets": "tokenflow_time_to_first_token_seconds_bucket",
    "now_offload_queue_bytes": "tokenflow_kv_transfer_queue_bytes",
    "now_load_queue_bytes": "tokenflow_kv_transfer_queue_bytes",
    "now_buffer_quantiles_s": "tokenflow_reader_buffer_seconds",
}


OF_THE_INGRESS = {
    "tokenflow_ingress_streams",
    "tokenflow_failovers_total",
    "tokenflow_moves_total",
}


def stats(replica: str, base: int) -> EngineStats:
    """Every number of its own, so that no two can be mixed up."""
    made = EngineStats()
    for i, field in enumerate(fields(EngineStats)):
        if isinstance(getattr(made, field.name), int | float):
            setattr(made, field.name, base + i)
    made.finished = {"stop": base + 50, "length": base + 51}
    made.now_buffer_quantiles_s = (base + 60.0, base + 61.0, base + 62.0)
    made.ttft_count, made.ttft_seconds = 0, 0.0
    for seconds in TTFTS[replica]:
        made.observe_ttft(seconds)
    return made


ENGINES = {"one": stats("one", 1000), "two": stats("two", 2000)}


def scrape(**given) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Metric name -> labels -> value."""
    arguments = {"ingress": "front", "streams": 3, "failovers": 2, "moves": 5} | given
    arguments.setdefault("own", CollectorRegistry())
    replicas = arguments.pop(
        "replicas", [s.to_dict() | {"replica_id": name} for name, s in ENGINES.items()]
    )
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(render(replicas, **arguments).decode()):
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in series, f"{sample.name}{labels} twice"
            series[labels] = sample.value
    return found


@pytest.mark.parametrize("field", NAMES)
def test_plain_figures_have_one_series_per_replica(field):
    assert scrape()[NAMES[field]] == {
        (("replica", name),): float(getattr(engine, field)) for name, engine in ENGINES.items()
    }


def test_preemptions_are_told_apart_by_kind():
    found = scrape()["tokenflow_preemptions_total"]
    assert len(found) == 4
    for name, engine in ENGINES.items():
        assert found[("how", "offload"), ("replica", name)] == engine.preempted_offload
        assert found[("how", "recompute"), ("replica", name)] == engine.preempted_recompute


def test_queues_are_told_apart_by_direction_and_buffers_by_quantile():
    found = scrape()
    queues, buffers = (
        found["tokenflow_kv_transfer_queue_bytes"],
        found["tokenflow_reader_buffer_seconds"],
    )
    assert len(queues) == 4 and len(buffers) == 2 * len(BUFFER_QUANTILES)
    for name, engine in ENGINES.items():
        assert queues[("direction", "offload"), ("replica", name)] == engine.now_offload_queue_bytes
        assert queues[("direction", "load"), ("replica", name)] == engine.now_load_queue_bytes
        for quantile, seconds in zip(BUFFER_QUANTILES, engine.now_buffer_quantiles_s, strict=True):
            assert buffers[("quantile", str(quantile)), ("replica", name)] == seconds


def test_ended_requests_are_told_apart_by_reason():
    found = scrape()["tokenflow_finished_requests_total"]
    assert found == {
        (("reason", reason), ("replica", name)): count
        for name, engine in ENGINES.items()
        for reason, count in engine.finished.items()
    }


@pytest.mark.parametrize("replica", ENGINES)
def test_the_ttft_histogram_is_cumulative_and_consistent(replica):
    found = scrape()
    name = "tokenflow_time_to_first_token_seconds"
    buckets = {
        float(dict(labels)["le"]): value
        for labels, value in found[f"{name}_bucket"].items()
        if dict(labels)["replica"] == replica
    }
    assert list(buckets) == [*TTFT_BUCKETS_S, math.inf]
    for bound, count in buckets.items():
        assert count == sum(seconds <= bound for seconds in TTFTS[replica])
    labels = (("replica", replica),)
    assert buckets[math.inf] == found[f"{name}_count"][labels] == len(TTFTS[replica])
    assert found[f"{name}_sum"][labels] == pytest.approx(sum(TTFTS[replica]))


def test_every_field_of_the_stats_is_exported():
    assert {field.name for field in fields(EngineStats)} == set(NAMES) | set(ELSEWHERE)
    assert set(NAMES.values()) | set(ELSEWHERE.values()) <= set(scrape())


def test_a_store_is_counted_once_per_node():
    def replica(name, node, calls, free, lost=False):
        slots = {"free": free, "leased": 2, "pinned": 3, "cached": 4}
        store = {"slots": slots, "calls": calls, "lost": lost}
        return EngineStats().to_dict() | {"replica_id": name, "node_id": node, "store": store}

    without = EngineStats().to_dict() | {"replica_id": "d", "node_id": "n3", "store": None}
    found = scrape(
        replicas=[
            replica("a", "n1", 7, 10),
            replica("b", "n1", 8, 10),
            replica("c", "n2", 9, 20, lost=True),
            without,
        ]
    )
    slots = found["tokenflow_store_slots"]
    assert len(slots) == 8
    assert slots[("node", "n1"), ("state", "free")] == 10
    assert slots[("node", "n2"), ("state", "cached")] == 4
    calls, lost = found["tokenflow_store_calls_total"], found["tokenflow_store_lost"]
    assert calls == {(("replica", "a"),): 7, (("replica", "b"),): 8, (("replica", "c"),): 9}
    assert lost == {(("replica", "a"),): 0, (("replica", "b"),): 0, (("replica", "c"),): 1}


def test_what_came_from_other_nodes_is_counted_by_replica():
    one, two = FetchStats(1, 2, 3.5, 4, 5), FetchStats(fetched_blocks=20)
    found = scrape(
        replicas=[
            EngineStats().to_dict() | {"replica_id": name, "fetch": stats.to_dict()}
            for name, stats in (("a", one), ("b", two))
        ]
    )
    for field, name in {
        "fetches": "fetches_total",
        "fetched_blocks": "fetched_blocks_total",
        "fetch_seconds": "fetch_seconds_total",
        "fetch_failures": "fetch_failures_total",
        "recomputed_instead": "fetches_declined_total",
    }.items():
        assert found[f"tokenflow_kv_{name}"] == {
            (("replica", "a"),): getattr(one, field),
            (("replica", "b"),): getattr(two, field),
        }


def test_the_ingress_counts_its_own():
    found = scrape()
    assert found["tokenflow_ingress_streams"] == {(("ingress", "front"),): 3.0}
    assert found["tokenflow_failovers_total"] == {(("ingress", "front"),): 2.0}
    assert found["tokenflow_moves_total"] == {(("ingress", "front"),): 5.0}


def test_the_ingress_counts_its_requests():
    own = IngressMetrics("front")
    own.first_token("chat", 0.3)
    own.ended("chat", "200", 2.0)
    own.ended("chat", "200", 700.0)
    own.ended("grpc", "RESOURCE_EXHAUSTED", 0.01)
    found = scrape(own=own.registry)
    assert found["tokenflow_ingress_requests_total"] == {
        (("api", "chat"), ("ingress", "front"), ("status", "200")): 2.0,
        (("api", "grpc"), ("ingress", "front"), ("status", "RESOURCE_EXHAUSTED")): 1.0,
    }
    chat = (("api", "chat"), ("ingress", "front"))
    assert found["tokenflow_ingress_time_to_first_token_seconds_count"][chat] == 1
    assert found["tokenflow_ingress_time_to_first_token_seconds_sum"][chat] == 0.3
    assert found["tokenflow_ingress_request_seconds_count"][chat] == 2
    assert found["tokenflow_ingress_request_seconds_sum"][chat] == 702
    assert not [name for name in found if name.endswith("_created")]
    for stale in (True, False):
        own.keys_stale(stale)
        stale_keys = scrape(own=own.registry)["tokenflow_ingress_keys_stale"]
        assert stale_keys == {(("ingress", "front"),): float(stale)}


def test_without_replicas_the_ingress_still_answers():
    found = scrape(replicas=[], streams=0, failovers=0, moves=0)
    assert set(found) == OF_THE_INGRESS


def test_a_fresh_engine_exports_zeros():
    found = scrape(replicas=[EngineStats().to_dict() | {"replica_id": "new"}])
    assert set(NAMES.values()) <= set(found)
    assert "tokenflow_finished_requests_total" not in found
    for name, series in found.items():
        if name not in OF_THE_INGRESS:
            assert set(series.values()) == {0.0}, name


def test_odd_label_values_are_escaped():
    odd = 'a"b\\c\nd'
    found = scrape(replicas=[EngineStats().to_dict() | {"replica_id": odd}], ingress=odd)
    assert found["tokenflow_steps_total"] == {(("replica", odd),): 0.0}
    assert found["tokenflow_ingress_streams"] == {(("ingress", odd),): 3.0}
