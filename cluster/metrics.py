"""Prometheus text for `GET /metrics`: the engines' counters by replica, and the ingress's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from tokenflow.replicas.buffers import BUFFER_QUANTILES
from tokenflow.replicas.stats import TTFT_BUCKETS_S

_COUNTERS = {
    "steps": ("tokenflow_steps", "Forward passes."),
    "step_seconds": ("tokenflow_step_seconds", "Seconds in forward passes and sampling."),
    "schedule_seconds": ("tokenflow_schedule_seconds", "Seconds of scheduling between steps."),
    "prompt_tokens": ("tokenflow_prompt_tokens", "Prompt tokens prefilled for the first time."),
    "recomputed_tokens": ("tokenflow_recomputed_tokens", "Tokens prefilled again."),
    "generated_tokens": ("tokenflow_generated_tokens", "Tokens generated."),
    "effective_tokens": (
        "tokenflow_effective_tokens",
        "Tokens weighted by the reader's buffer at generation, finished requests.",
    ),
    "requests": ("tokenflow_requests", "Requests taken."),
    "resumes": ("tokenflow_resumes", "Preempted requests loaded back."),
    "offloaded_bytes": ("tokenflow_offloaded_bytes", "KV bytes copied to host memory."),
    "written_through_bytes": (
        "tokenflow_written_through_bytes",
        "KV bytes copied to host memory in the background, part of the offloaded ones.",
    ),
    "loaded_bytes": ("tokenflow_loaded_bytes", "KV bytes copied from host memory."),
    "out_of_memory": (
        "tokenflow_out_of_memory_steps",
        "Steps that did not fit the device and were run in part.",
    ),
    "transfer_errors": ("tokenflow_transfer_errors", "KV copies that failed."),
    "corrupt_blocks": (
        "tokenflow_corrupt_blocks",
        "KV blocks with a wrong checksum when loaded from the host; computed again.",
    ),
    "prefix_queried_tokens": (
        "tokenflow_prefix_queried_tokens",
        "Prompt tokens looked up in the prefix caches.",
    ),
    "prefix_device_hit_tokens": (
        "tokenflow_prefix_device_hit_tokens",
        "Of the queried tokens, those found in device blocks.",
    ),
    "prefix_host_hit_tokens": (
        "tokenflow_prefix_host_hit_tokens",
        "Of the queried tokens, those loaded from the node's KV store.",
    ),
    "reader_stalls": ("tokenflow_reader_stalls", "Times a reader ran dry, finished requests."),
    "reader_stall_seconds": ("tokenflow_reader_stall_seconds", "Seconds readers sat dry."),
}
_GAUGES = {
    "now_waiting": ("tokenflow_waiting_requests", "Requests without KV."),
    "now_running": ("tokenflow_running_requests", "Requests on the device."),
    "now_preempted": ("tokenflow_preempted_requests", "Requests off the device or on their way."),
    "now_free_blocks": ("tokenflow_kv_free_blocks", "Free device KV blocks."),
    "now_cached_blocks": (
        "tokenflow_kv_cached_blocks",
        "Free device KV blocks whose content can still be reused.",
    ),
    "now_total_blocks": ("tokenflow_kv_total_blocks", "Device KV blocks."),
    "now_free_host_slots": ("tokenflow_host_free_slots", "Host KV slots at hand."),
    "now_rate": (
        "tokenflow_declared_rate",
        "Sum of declared token rates, tokens/s; without a reader, the rate aimed at.",
    ),
    "now_capacity": (
        "tokenflow_capacity",
        "Tokens/s the device can make of the requests it has; 0 while unknown.",
    ),
    "now_parked": ("tokenflow_parked_requests", "Requests not promised their rate."),
    "now_overloaded": (
        "tokenflow_overloaded",
        "1 while readers ask for more than can be promised them.",
    ),
    "now_readers": (
        "tokenflow_readers",
        "Readers with text: past the first token, and not paused.",
    ),
    "now_dry_readers": ("tokenflow_dry_readers", "Of those, readers whose buffer is empty."),
}


_FETCH_COUNTERS = {
    "fetches": ("tokenflow_kv_fetches", "Requests whose KV was asked for on another node."),
    "fetched_blocks": ("tokenflow_kv_fetched_blocks", "KV blocks fetched from other nodes."),
    "fetch_seconds": ("tokenflow_kv_fetch_seconds", "Seconds requests waited for such blocks."),
    "fetch_failures": ("tokenflow_kv_fetch_failures", "Fetches that ended early."),
    "recomputed_instead": (
        "tokenflow_kv_fetches_declined",
        "Requests from another node whose KV is computed again because that is faster.",
    ),
}


class _Snapshot:
    """A collector over one reading of all replicas."""

    def __init__(
        self,
        replicas: Iterable[dict[str, Any]],
        ingress: str,
        streams: int,
        failovers: int,
        moves: int,
    ) -> None:
        self._replicas = list(replicas)
        self._ingress = ingress
        self._streams = streams
        self._failovers = failovers
        self._moves = moves

    def _buffers(self) -> Metric:
        buffers = GaugeMetricFamily(
            "tokenflow_reader_buffer_seconds",
            "Seconds of unread text that readers have, by quantile; none without readers.",
            labels=["replica", "quantile"],
        )
        for stats in self._replicas:
            # Without readers there is no quantile.
            for quantile, seconds in zip(
                BUFFER_QUANTILES, stats["now_buffer_quantiles_s"], strict=False
            ):
                buffers.add_metric([stats["replica_id"], str(quantile)], seconds)
        return buffers

    def _transfers(self) -> Metric:
        queues = GaugeMetricFamily(
            "tokenflow_kv_transfer_queue_bytes",
            "KV on its way to host memory (offload) or to the device (load).",
            labels=["replica", "direction"],
        )
        for stats in self._replicas:
            queues.add_metric([stats["replica_id"], "offload"], stats["now_offload_queue_bytes"])
            queues.add_metric([stats["replica_id"], "load"], stats["now_load_queue_bytes"])
        return queues

    def _stores(self) -> Iterator[Metric]:
        """The nodes' KV stores, and the replicas' ways to them."""
        slots = GaugeMetricFamily(
            "tokenflow_store_slots",
            "Slots of the node's KV store: free, leased to a replica, pinned by one, cached.",
            labels=["node", "state"],
        )
        calls = CounterMetricFamily(
            "tokenflow_store_calls", "Control calls to the node's KV store.", labels=["replica"]
        )
        lost = GaugeMetricFamily(
            "tokenflow_store_lost",
            "1 when the replica has lost its node's KV store and recomputes instead.",
            labels=["replica"],
        )
        nodes: dict[str, dict[str, int]] = {}
        for stats in self._replicas:
            if (store := stats.get("store")) is not None:
                nodes[stats["node_id"]] = store["slots"]
                calls.add_metric([stats["replica_id"]], store["calls"])
                lost.add_metric([stats["replica_id"]], store["lost"])
        for node, counts in nodes.items():
            for state, count in counts.items():
                slots.add_metric([node, state], count)
        yield slots
        yield calls
        yield lost

    def _fetches(self) -> Iterator[Metric]:
        """KV that came from other nodes."""
        for key, (name, text) in _FETCH_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["replica"])
            for stats in self._replicas:
                if (fetch := stats.get("fetch")) is not None:
                    counter.add_metric([stats["replica_id"]], fetch[key])
            yield counter

    def collect(self) -> Iterator[Metric]:
        for key, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["replica"])
            for stats in self._replicas:
                counter.add_metric([stats["replica_id"]], stats[key])
            yield counter
        preemptions = CounterMetricFamily(
            "tokenflow_preemptions", "Requests taken off the device.", labels=["replica", "how"]
        )
        finished = CounterMetricFamily(
            "tokenflow_finished_requests", "Requests ended.", labels=["replica", "reason"]
        )
        ttft = HistogramMetricFamily(
            "tokenflow_time_to_first_token_seconds",
            "From arrival at the replica to the first token.",
            labels=["replica"],
        )
        for stats in self._replicas:
            replica = stats["replica_id"]
            preemptions.add_metric([replica, "offload"], stats["preempted_offload"])
            preemptions.add_metric([replica, "recompute"], stats["preempted_recompute"])
            for reason, count in stats["finished"].items():
                finished.add_metric([replica, reason], count)
            buckets = [
                (str(bound), count)
                for bound, count in zip(TTFT_BUCKETS_S, stats["ttft_buckets"], strict=True)
            ]
            buckets.append(("+Inf", stats["ttft_count"]))
            ttft.add_metric([replica], buckets, stats["ttft_seconds"])
        yield preemptions
        yield finished
        yield ttft
        for key, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["replica"])
            for stats in self._replicas:
                gauge.add_metric([stats["replica_id"]], stats[key])
            yield gauge
        yield self._buffers()
        yield self._transfers()
        yield from self._stores()
        yield from self._fetches()
        streams = GaugeMetricFamily(
            "tokenflow_ingress_streams", "Streams this ingress serves.", labels=["ingress"]
        )
        streams.add_metric([self._ingress], self._streams)
        yield streams
        failovers = CounterMetricFamily(
            "tokenflow_failovers", "Streams moved off a lost replica.", labels=["ingress"]
        )
        failovers.add_metric([self._ingress], self._failovers)
        yield failovers
        moves = CounterMetricFamily(
            "tokenflow_moves", "Streams moved off a living replica.", labels=["ingress"]
        )
        moves.add_metric([self._ingress], self._moves)
        yield moves


def render(
    replicas: Iterable[dict[str, Any]],
    *,
    ingress: str,
    streams: int,
    failovers: int,
    moves: int,
    own: CollectorRegistry,
) -> bytes:
    """The exposition text. `replicas` are dicts as `Replica.stats` returns them, `own` is what the
    ingress counts."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(replicas, ingress, streams, failovers, moves))  # type: ignore[arg-type]
    return generate_latest(registry) + generate_latest(own)
