"""Writes the Grafana dashboard: `python deploy/observability/dashboard.py [FILE]`.

A series of a replica may be scraped at several addresses, since every ingress answers for all
replicas: each query first takes one of them (`max by (replica)`), then sums.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "helm" / "tokenflow" / "files" / "dashboard.json"

Json = dict[str, Any]

_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_ENGINE = '{job=~"$job", replica=~"$replica"}'
_NODE = '{job=~"$job"}'


def gauge(name: str, by: str = "") -> str:
    """Sum of a gauge over the replicas, or by a further label."""
    inner = f"max by (replica{', ' + by if by else ''}) ({name}{_ENGINE})"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def rate(name: str, by: str = "") -> str:
    """Growth per second of a counter, summed over the replicas, or by a further label."""
    series = f"rate({name}{_ENGINE}[$__rate_interval])"
    inner = f"max by (replica{', ' + by if by else ''}) ({series})"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def ingress_rate(name: str, by: str = "") -> str:
    """The same of a counter that ingresses keep."""
    series = f"rate({name}{_NODE}[$__rate_interval])"
    inner = f"max by (ingress{', ' + by if by else ''}) ({series})"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def quantile(q: float, name: str) -> str:
    """Of a histogram that ingresses keep."""
    series = f"rate({name}_bucket{_NODE}[$__rate_interval])"
    return f"histogram_quantile({q}, sum by (le) (max by (ingress, api, le) ({series})))"


def panel(
    title: str, unit: str, text: str, *series: tuple[str, str], stacked: bool = False
) -> Json:
    """A time series panel. `series` are (query, legend)."""
    return {
        "type": "timeseries",
        "title": title,
        "description": text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                "custom": {
                    "lineWidth": 1,
                    "fillOpacity": 10,
                    "stacking": {"mode": "normal" if stacked else "none"},
                },
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
            for i, (query, legend) in enumerate(series)
        ],
    }


_BLOCKS_USED = f"1 - {gauge('tokenflow_kv_free_blocks')} / {gauge('tokenflow_kv_total_blocks')}"
_BUFFERS = f"min by (quantile) (tokenflow_reader_buffer_seconds{_ENGINE})"

ROWS: dict[str, list[Json]] = {
    "Readers": [
        panel(
            "Time to first token",
            "s",
            "From a request's arrival at the ingress. All that a reader waits before reading.",
            *[
                (quantile(q, "tokenflow_ingress_time_to_first_token_seconds"), f"P{q * 100:g}")
                for q in (0.5, 0.9, 0.99)
            ],
        ),
        panel(
            "Readers who wait for text",
            "short",
            "Readers whose buffer is empty at this moment, beside all who read. Above none for "
            "long means more is asked for than the replicas can make.",
            (gauge("tokenflow_dry_readers"), "dry"),
            (gauge("tokenflow_readers"), "reading"),
        ),
        panel(
            "Readers' buffers",
            "s",
            "Seconds of unread text, on the replica where it is least. The lowest tenth is who "
            "runs dry next; long buffers are what preemption lives on.",
            (_BUFFERS, "quantile {{quantile}}"),
        ),
        panel(
            "Stalls of ended requests",
            "short",
            "How often readers ran dry, per second, and the seconds they waited, per second.",
            (rate("tokenflow_reader_stalls_total"), "stalls/s"),
            (rate("tokenflow_reader_stall_seconds_total"), "seconds/s"),
        ),
        panel(
            "Tokens per second",
            "short",
            "Effective: weighted by how soon their reader needs them, counted when a request ends.",
            (rate("tokenflow_generated_tokens_total"), "generated"),
            (rate("tokenflow_effective_tokens_total"), "effective"),
        ),
        panel(
            "Requests ended",
            "reqps",
            "By HTTP status or gRPC code. 429: refused for load. 499: the client left.",
            (ingress_rate("tokenflow_ingress_requests_total", "status"), "{{status}}"),
            stacked=True,
        ),
    ],
    "Load": [
        panel(
            "Rates over capacity",
            "percentunit",
            "What readers ask for over what the device can make. Above 1 somebody must wait.",
            (
                f"max by (replica) (tokenflow_declared_rate{_ENGINE}) / "
                f"(max by (replica) (tokenflow_capacity{_ENGINE}) > 0)",
                "{{replica}}",
            ),
        ),
        panel(
            "Rates and capacity",
            "short",
            "Tokens/s of all replicas.",
            (gauge("tokenflow_declared_rate"), "asked for"),
            (gauge("tokenflow_capacity"), "capacity"),
        ),
        panel(
            "Requests",
            "short",
            "Where requests are. Parked: not promised their rate.",
            (gauge("tokenflow_running_requests"), "on the device"),
            (gauge("tokenflow_preempted_requests"), "preempted"),
            (gauge("tokenflow_waiting_requests"), "waiting"),
            (gauge("tokenflow_parked_requests"), "parked"),
        ),
        panel(
            "Overloaded replicas",
            "short",
            "Replicas whose readers ask for more than can be promised.",
            (gauge("tokenflow_overloaded"), "overloaded"),
        ),
        panel(
            "Streams",
            "short",
            "By the ingress that serves them.",
            (f"max by (ingress) (tokenflow_ingress_streams{_NODE})", "{{ingress}}"),
            stacked=True,
        ),
        panel(
            "Duration of requests",
            "s",
            "From arrival to end, reading included.",
            *[
                (quantile(q, "tokenflow_ingress_request_seconds"), f"P{q * 100:g}")
                for q in (0.5, 0.99)
            ],
        ),
    ],
    "KV cache": [
        panel(
            "Device KV in use",
            "percentunit",
            "Blocks that requests hold. Near 1 preemption begins.",
            (_BLOCKS_USED, "in use"),
        ),
        panel(
            "Preemptions",
            "short",
            "Per second, by what becomes of the KV, and those that were loaded back.",
            (rate("tokenflow_preemptions_total", "how"), "{{how}}"),
            (rate("tokenflow_resumes_total"), "resumed"),
        ),
        panel(
            "KV copied",
            "Bps",
            "To the host (of that, in the background) and from it.",
            (rate("tokenflow_offloaded_bytes_total"), "offloaded"),
            (rate("tokenflow_written_through_bytes_total"), "of that, written through"),
            (rate("tokenflow_loaded_bytes_total"), "loaded"),
        ),
        panel(
            "KV on its way",
            "bytes",
            "Queues of the link between device and host. Long ones delay who comes back.",
            (gauge("tokenflow_kv_transfer_queue_bytes", "direction"), "{{direction}}"),
        ),
        panel(
            "Prefix cache",
            "percentunit",
            "Share of prompt tokens that were found, on the device and in the node's store.",
            *[
                (
                    f"{rate(f'tokenflow_prefix_{place}_hit_tokens_total')} / "
                    f"({rate('tokenflow_prefix_queried_tokens_total')} > 0)",
                    place,
                )
                for place in ("device", "host")
            ],
            stacked=True,
        ),
        panel(
            "Prefill",
            "short",
            "Tokens per second. Computed again: after preemptions without a copy, and failovers.",
            (rate("tokenflow_prompt_tokens_total"), "new"),
            (rate("tokenflow_recomputed_tokens_total"), "again"),
        ),
        panel(
            "The nodes' stores",
            "short",
            "Slots by state, of all nodes. Free and cached ones can be had.",
            (f"sum by (state) (max by (node, state) (tokenflow_store_slots{_NODE}))", "{{state}}"),
            stacked=True,
        ),
        panel(
            "KV from other nodes",
            "short",
            "Blocks per second, and requests per second whose KV was computed again instead.",
            (rate("tokenflow_kv_fetched_blocks_total"), "blocks"),
            (rate("tokenflow_kv_fetches_declined_total"), "declined"),
            (rate("tokenflow_kv_fetch_failures_total"), "failed"),
        ),
    ],
    "Engines": [
        panel(
            "Step",
            "s",
            "Mean duration of a forward pass, and of the scheduling before it.",
            (
                f"{rate('tokenflow_step_seconds_total')} / ({rate('tokenflow_steps_total')} > 0)",
                "forward pass",
            ),
            (
                f"{rate('tokenflow_schedule_seconds_total')} / "
                f"({rate('tokenflow_steps_total')} > 0)",
                "scheduling",
            ),
        ),
        panel(
            "Tokens by replica",
            "short",
            "Generated per second.",
            (
                "max by (replica) (rate(tokenflow_generated_tokens_total"
                f"{_ENGINE}[$__rate_interval]))",
                "{{replica}}",
            ),
            stacked=True,
        ),
        panel(
            "Streams that changed replica",
            "short",
            "Per second: moved for balance, or because their replica was lost.",
            (ingress_rate("tokenflow_moves_total"), "moved"),
            (ingress_rate("tokenflow_failovers_total"), "lost their replica"),
        ),
        panel(
            "What should not happen",
            "short",
            "Failed copies and wrong checksums per second; replicas without their node's store; "
            "ingresses that cannot use the file of API keys.",
            (rate("tokenflow_transfer_errors_total"), "failed copies"),
            (rate("tokenflow_corrupt_blocks_total"), "corrupt blocks"),
            (gauge("tokenflow_store_lost"), "store lost"),
            (f"sum(max by (ingress) (tokenflow_ingress_keys_stale{_NODE}))", "keys stale"),
        ),
    ],
}


def _variable(name: str, metric: str) -> Json:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": f"label_values({metric}, {name})", "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> Json:
    """The whole dashboard, as Grafana imports it."""
    panels: list[Json] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1}
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": place})
        top += 1
        for i, each in enumerate(row):
            x, y = i % _COLUMNS * _WIDTH, top + i // _COLUMNS * _HEIGHT
            panels.append({**each, "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT}})
        top += -(-len(row) // _COLUMNS) * _HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "uid": "tokenflow",
        "title": "TokenFlow",
        "tags": ["tokenflow"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("job", "tokenflow_ingress_streams"),
                _variable("replica", "tokenflow_running_requests"),
            ]
        },
        "panels": panels,
    }


def queries(board: Json) -> list[str]:
    """All of its PromQL."""
    return [target["expr"] for each in board["panels"] for target in each.get("targets", ())]


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else TARGET).write_text(text(), encoding="utf-8")
