"""The catalogue of figures: what each is called, its unit, which way is better and what it means.

How they are computed is in `figures.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

FLUID = 0.9
"""Fluidity index from which a stream counts as fluid. [Etalon]"""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a figure is shown and judged."""

    title: str
    unit: str
    better: str
    """"high", "low", or "" where neither is."""
    meaning: str


METRICS = {
    "requests": Metric("requests", "", "", "Requests sent; failed and unfinished ones too."),
    "failed": Metric("failed", "", "low", "Requests that ended in an error or not at all."),
    "left": Metric("left on purpose", "", "", "Requests that the client itself broke off."),
    "duration_s": Metric("duration", "s", "low", "First intended send to last token."),
    "offered_req_s": Metric("offered", "req/s", "", "Requests over the time they were due in."),
    "tokens": Metric("tokens", "", "", "Output tokens received."),
    "prompt_tokens": Metric("prompt tokens", "", "", "As the server counted them."),
    "raw_tok_s": Metric("raw throughput", "tok/s", "high", "Output tokens over the duration."),
    "effective_tok_s": Metric(
        "effective, at the client", "tok/s", "high",
        "Each token weighs 1 while its reader's buffer holds at most 10 % of the output when it "
        "arrives, falling to 0 at 20 %; over the duration. [TokenFlow §7.1.3]",
    ),
    "generated_effective_tok_s": Metric(
        "effective, at the server", "tok/s", "high",
        "The same at the moment the server drew each token. A server that holds tokens back to "
        "send them in time gains at the client, not here.",
    ),
    "effective_ratio": Metric(
        "effective share, client", "", "high", "Effective over received tokens, at the client."
    ),
    "generated_effective_ratio": Metric(
        "effective share, server", "", "high", "Effective over received tokens, at the server."
    ),
    "ttft_mean_s": Metric(
        "TTFT mean", "s", "low",
        "First token after the intended send. Without a token: until the end of the run.",
    ),
    "ttft_p50_s": Metric("TTFT P50", "s", "low", "Median of the same."),
    "ttft_p90_s": Metric("TTFT P90", "s", "low", "90th percentile of the same."),
    "ttft_p95_s": Metric("TTFT P95", "s", "low", "95th percentile of the same."),
    "ttft_p99_s": Metric("TTFT P99", "s", "low", "99th percentile of the same."),
    "ttft_max_s": Metric("TTFT max", "s", "low", "Longest of the same."),
    "ttft_sent_mean_s": Metric(
        "TTFT mean from sending", "s", "low", "From the actual send, of those that got a token."
    ),
    "ttft_slo_share": Metric("TTFT in time", "", "high", "Share of requests within the limit."),
    "tpot_mean_s": Metric(
        "TPOT mean", "s/token", "low", "(last - first token) / (tokens - 1), mean over requests."
    ),
    "tpot_p50_s": Metric("TPOT P50", "s/token", "low", "Median of the same."),
    "tpot_p99_s": Metric("TPOT P99", "s/token", "low", "99th percentile of the same."),
    "chunk_gap_p50_s": Metric("chunk gap P50", "s", "low", "Between messages of one stream."),
    "chunk_gap_p99_s": Metric("chunk gap P99", "s", "low", "99th percentile of the same."),
    "chunk_gap_max_s": Metric("chunk gap max", "s", "low", "Longest of the same."),
    "e2e_mean_s": Metric(
        "end to end mean", "s", "low", "Intended send to last token; the unfinished until the end."
    ),
    "e2e_p50_s": Metric("end to end P50", "s", "low", "Median of the same."),
    "e2e_p99_s": Metric("end to end P99", "s", "low", "99th percentile of the same."),
    "stall_s": Metric("seconds dry, all readers", "s", "low", "Readers at an empty buffer."),
    "stall_mean_s": Metric("seconds dry per reader", "s", "low", "The same, mean over readers."),
    "stall_p99_s": Metric("seconds dry P99", "s", "low", "The same, 99th percentile of readers."),
    "stalls": Metric("stalls", "", "low", "Times a reader ran dry for more than a millisecond."),
    "stalled_readers": Metric("readers that ran dry", "", "low", "At least once."),
    "smooth_share": Metric("never dry", "", "high", "Share of readers served without a stall."),
    "qos_tok_s": Metric(
        "QoS", "tok/s", "high",
        "(effective tokens - lambda * sum of TTFT - mu * seconds dry) / duration. [TokenFlow §3.2]",
    ),
    "andes_qoe_mean": Metric("Andes QoE mean", "", "high", "1 = read as from an ideal server."),
    "andes_qoe_p5": Metric("Andes QoE P5", "", "high", "The 5 % worst served are below."),
    "on_time_share": Metric("tokens on time", "", "high", "Tokens there before they were wanted."),
    "fluid_share": Metric(
        "fluid streams", "", "high", f"Share of readers with a fluidity index of {FLUID}. [Etalon]"
    ),
    "goodput_req_s": Metric("goodput", "req/s", "high", "Requests within all objectives."),
    "goodput_tok_s": Metric("goodput, tokens", "tok/s", "high", "Tokens of those requests."),
    "goodput_share": Metric("within objectives", "", "high", "Share of all requests."),
    "fairness": Metric(
        "fairness", "", "high",
        "Jain's index of each reader's achieved over wanted speed, waiting included; 1 = alike.",
    ),
    "lag_p50_s": Metric("generator late P50", "s", "low", "Actual less intended send."),
    "lag_p99_s": Metric("generator late P99", "s", "low", "99th percentile of the same."),
    "lag_max_s": Metric("generator late max", "s", "low", "Largest of the same."),
}  # fmt: skip
"""Every figure, in the order of the tables."""
