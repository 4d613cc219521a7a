"""`tokenflow top`: a running cluster, live in a terminal. All it knows is what `/metrics` says.

Figures per second are differences of two readings; quantiles of the time to first token are those
of the requests in between or, when there were none, of all so far.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenflow.replicas.errors import TokenFlowError

_TIMEOUT_S = 5.0
_SHORT_ID = 8
_PLAIN_WIDTH = 120
_TTFT = "tokenflow_ingress_time_to_first_token_seconds_bucket"

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """One scrape."""

    at_s: float
    values: dict[str, dict[Labels, float]]
    """By name and sorted labels."""

    def of(self, name: str, **labels: str) -> float:
        """Sum of a metric over the labels that are not given."""
        wanted = set(labels.items())
        return sum(value for key, value in self.values.get(name, {}).items() if wanted <= set(key))

    def label_values(self, name: str, label: str) -> list[str]:
        """Of all series of a metric, sorted."""
        return sorted({dict(key)[label] for key in self.values.get(name, {})})


def read(text: str, at_s: float) -> Reading:
    """A page of `/metrics`. Raises TokenFlowError when it is none of this project's."""
    values: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    except ValueError as error:
        raise TokenFlowError(f"the server's /metrics is no Prometheus text: {error}.") from None
    if "tokenflow_ingress_streams" not in values:
        raise TokenFlowError("the server has no metrics of TokenFlow; is this the right --url?")
    return Reading(at_s, values)


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One replica at this moment. Tokens, seconds, bytes; `_s` at the end of a rate: per second."""

    replica: str
    running: int
    waiting: int
    preempted: int
    parked: int
    overloaded: bool
    declared_rate: float
    capacity: float
    """tokens/s; 0 while unknown."""
    readers: int
    dry_readers: int
    buffer_s: dict[str, float]
    """Seconds of unread text by quantile; empty without readers."""
    kv_used: float
    """Share of the device's blocks that requests hold."""
    tokens_per_s: float
    preemptions_per_s: float
    offload_bytes_per_s: float
    load_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node's KV store."""

    node: str
    slots: int
    in_use: float
    """Share of the slots that cannot be had: neither free nor cached."""


@dataclass(frozen=True, slots=True)
class Frame:
    """All that is shown at once."""

    streams: int
    requests_per_s: dict[str, float]
    """Ended ones, by status."""
    ttft_s: dict[str, float]
    """P50 and P99 at the ingress; empty before the first request."""
    prefix_hits: float | None
    """Share of prompt tokens found in a cache, of all requests so far; None before the first."""
    replicas: list[ReplicaRow]
    nodes: list[NodeRow]


def frame(before: Reading, now: Reading) -> Frame:
    """What happened between two readings, and how things are at the second."""
    seconds = max(now.at_s - before.at_s, 1e-9)

    def per_s(name: str, **labels: str) -> float:
        # A replica that was replaced begins at 0 again, under another name.
        return max(0.0, now.of(name, **labels) - before.of(name, **labels)) / seconds

    def replica(name: str) -> ReplicaRow:
        def value(metric: str, **labels: str) -> float:
            return now.of(metric, replica=name, **labels)

        total = value("tokenflow_kv_total_blocks")
        quantiles = now.values.get("tokenflow_reader_buffer_seconds", {})
        return ReplicaRow(
            replica=name,
            running=round(value("tokenflow_running_requests")),
            waiting=round(value("tokenflow_waiting_requests")),
            preempted=round(value("tokenflow_preempted_requests")),
            parked=round(value("tokenflow_parked_requests")),
            overloaded=value("tokenflow_overloaded") > 0,
            declared_rate=value("tokenflow_declared_rate"),
            capacity=value("tokenflow_capacity"),
            readers=round(value("tokenflow_readers")),
            dry_readers=round(value("tokenflow_dry_readers")),
            buffer_s={
                dict(labels)["quantile"]: seconds
                for labels, seconds in sorted(quantiles.items())
                if dict(labels)["replica"] == name
            },
            kv_used=1 - value("tokenflow_kv_free_blocks") / total if total else 0.0,
            tokens_per_s=per_s("tokenflow_generated_tokens_total", replica=name),
            preemptions_per_s=per_s("tokenflow_preemptions_total", replica=name),
            offload_bytes_per_s=per_s("tokenflow_offloaded_bytes_total", replica=name),
            load_bytes_per_s=per_s("tokenflow_loaded_bytes_total", replica=name),
        )

    def node(name: str) -> NodeRow:
        slots = now.of("tokenflow_store_slots", node=name)
        idle = sum(now.of("tokenflow_store_slots", node=name, state=s) for s in ("free", "cached"))
        return NodeRow(name, round(slots), 1 - idle / slots if slots else 0.0)

    queried = now.of("tokenflow_prefix_queried_tokens_total")
    found = sum(
        now.of(f"tokenflow_prefix_{place}_hit_tokens_total") for place in ("device", "host")
    )
    ended = "tokenflow_ingress_requests_total"
    return Frame(
        streams=round(now.of("tokenflow_ingress_streams")),
        requests_per_s={
            status: per_s(ended, status=status) for status in now.label_values(ended, "status")
        },
        ttft_s=_ttft(before, now),
        prefix_hits=found / queried if queried else None,
        replicas=[
            replica(name) for name in now.label_values("tokenflow_running_requests", "replica")
        ],
        nodes=[node(name) for name in now.label_values("tokenflow_store_slots", "node")],
    )


def _ttft(before: Reading, now: Reading) -> dict[str, float]:
    def buckets(*minus: Reading) -> list[tuple[float, float]]:
        return sorted(
            (float(bound), now.of(_TTFT, le=bound) - sum(m.of(_TTFT, le=bound) for m in minus))
            for bound in now.label_values(_TTFT, "le")
        )

    found = buckets(before)
    if not found or found[-1][1] <= 0:
        found = buckets()
    if not found or found[-1][1] <= 0:
        return {}
    return {name: quantile(q, found) for name, q in (("p50", 0.5), ("p99", 0.99))}


def quantile(q: float, buckets: list[tuple[float, float]]) -> float:
    """Of cumulative (upper bound, count), ascending, the last bound infinite; linear within a
    bucket, as Prometheus does it. Beyond the last finite bound: that bound."""
    wanted = q * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


# -- the terminal -------------------------------------------------------------------------------


def show(frame: Frame) -> Group:
    """A frame for the terminal."""
    line = Text.assemble(("TokenFlow  ", "bold"), f"streams {frame.streams}")
    if frame.ttft_s:
        line.append(f"   TTFT P50 {frame.ttft_s['p50']:.2f} s, P99 {frame.ttft_s['p99']:.2f} s")
    if frame.prefix_hits is not None:
        line.append(f"   prefix hits {frame.prefix_hits:.0%}")
    ended = [f"{status} {rate:.1f}/s" for status, rate in frame.requests_per_s.items() if rate]
    line.append(f"   ended {', '.join(ended) if ended else 'none'}")
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("replica")
    for title in (
        "run", "wait", "off", "parked", "rate/cap", "readers", "dry", "buffer s", "KV", "tok/s",
        "preempt/s", "out MB/s", "in MB/s",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in frame.replicas:
        capacity = f"{row.capacity:.0f}" if row.capacity else "?"
        table.add_row(
            row.replica[:_SHORT_ID],
            *map(str, (row.running, row.waiting, row.preempted, row.parked)),
            Text(f"{row.declared_rate:.0f}/{capacity}", "red" if row.overloaded else ""),
            str(row.readers),
            Text(str(row.dry_readers), "red" if row.dry_readers else ""),
            "/".join(f"{seconds:.1f}" for seconds in row.buffer_s.values()) or "-",
            f"{row.kv_used:.0%}",
            f"{row.tokens_per_s:.0f}",
            f"{row.preemptions_per_s:.1f}",
            f"{row.offload_bytes_per_s / 1e6:.1f}",
            f"{row.load_bytes_per_s / 1e6:.1f}",
        )
    if not frame.replicas:
        table.add_row("none answers")
    stores = [f"{row.node[:_SHORT_ID]} {row.in_use:.0%} of {row.slots}" for row in frame.nodes]
    foot = Text(f"host KV in use: {', '.join(stores)} slots" if stores else "no host KV")
    return Group(line, table, foot)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenflow top`."""
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="of the cluster (default http://127.0.0.1:8000)",
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between frames (1)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument(
        "--json", action="store_true", help="one frame per line as JSON instead of a table"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("TOKENFLOW_API_KEY"),
        metavar="KEY",
        help="for a cluster whose /metrics asks for one (default: the variable TOKENFLOW_API_KEY)",
    )


class Source:
    """Reads `/metrics` of one cluster."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/") + "/metrics"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_S, trust_env=False)

    def read(self) -> Reading:
        """Raises TokenFlowError when the cluster does not answer."""
        try:
            answer = self._client.get(self._url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise TokenFlowError(f"cannot read {self._url}: {reason}. Does it serve?") from None
        if answer.status_code != 200:
            raise TokenFlowError(f"{self._url} answers with status {answer.status_code}.")
        return read(answer.text, time.monotonic())


def run(args: argparse.Namespace) -> int:
    """`tokenflow top`. Raises TokenFlowError."""
    if not args.interval >= 0.1:
        raise TokenFlowError(f"--interval must be at least 0.1 s, got {args.interval:g}.")
    source = Source(args.url, args.api_key)
    before = source.read()

    def frames() -> Iterable[Frame]:
        nonlocal before
        while True:
            time.sleep(args.interval)
            now = source.read()
            yield frame(before, now)
            before = now
            if args.once:
                return

    if args.json:
        for each in frames():
            print(json.dumps(asdict(each)), flush=True)
        return 0
    console = Console(highlight=False)
    if args.once:
        # Into a file or a pipe nothing is to be cut off.
        console = console if console.is_terminal else Console(width=_PLAIN_WIDTH, highlight=False)
        for each in frames():
            console.print(show(each))
        return 0
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        for each in frames():
            live.update(show(each), refresh=True)
    return 0
