"""Counters and gauges of one engine, read by metrics and by the router."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

TTFT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 1.3, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class EngineStats:
    """Totals since start (plain names) and the present state (`now_*`)."""

    steps: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    prompt_tokens: int = 0
    """Prompt tokens prefilled for the first time."""
    recomputed_tokens: int = 0
    """Tokens prefilled again because of a preemption or a failover."""
    generated_tokens: int = 0
    out_of_memory: int = 0
    """Steps that did not fit the device and were run in part."""
    effective_tokens: float = 0.0
    """Of finished requests. [TokenFlow §7.1.3]"""
    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """By finish reason."""
    preempted_offload: int = 0
    preempted_recompute: int = 0
    resumes: int = 0
    offloaded_bytes: int = 0
    """Device to host, write-through included."""
    written_through_bytes: int = 0
    loaded_bytes: int = 0
    transfer_errors: int = 0
    corrupt_blocks: int = 0
    """Loaded blocks whose checksum was wrong; they were computed again."""
    prefix_queried_tokens: int = 0
    """Prompt tokens of admitted requests, looked up in the caches."""
    prefix_device_hit_tokens: int = 0
    """Of those, found in blocks of the device."""
    prefix_host_hit_tokens: int = 0
    """Of those, loaded from the node's store."""
    reader_stalls: int = 0
    """Of finished requests."""
    reader_stall_seconds: float = 0.0
    ttft_count: int = 0
    ttft_seconds: float = 0.0
    ttft_buckets: list[int] = field(default_factory=lambda: [0] * len(TTFT_BUCKETS_S))
    """Cumulative counts at TTFT_BUCKETS_S."""

    now_waiting: int = 0
    now_running: int = 0
    now_preempted: int = 0
    now_free_blocks: int = 0
    now_total_blocks: int = 0
    now_cached_blocks: int = 0
    """Of the free ones, those whose content can still be found."""
    now_free_host_slots: int = 0
    now_rate: float = 0.0
    """Sum of the declared rates of unfinished requests, tokens/s; finite: a request without a
    reader counts with its reference rate."""
    now_capacity: float = 0.0
    """Gamma, tokens/s that the device can make of the unfinished requests; 0 while unknown."""
    now_parked: int = 0
    """Unfinished requests that are not promised their rate."""
    now_overloaded: bool = False
    """Whether readers ask for more than can be promised them."""
    now_offload_queue_bytes: int = 0
    """KV on its way to the host, write-through included."""
    now_load_queue_bytes: int = 0
    """KV on its way to the device."""
    now_readers: int = 0
    """Requests with a reader who has had the first token and does not pause."""
    now_dry_readers: int = 0
    """Of those, the ones whose buffer is empty."""
    now_buffer_quantiles_s: tuple[float, ...] = ()
    """Their buffers in seconds of text, at BUFFER_QUANTILES; empty without readers."""

    @property
    def preemptions(self) -> int:
        return self.preempted_offload + self.preempted_recompute

    def observe_ttft(self, seconds: float) -> None:
        self.ttft_count += 1
        self.ttft_seconds += seconds
        for i, bound in enumerate(TTFT_BUCKETS_S):
            if seconds <= bound:
                self.ttft_buckets[i] += 1

    def to_dict(self) -> dict[str, object]:
        return asdict(self)
