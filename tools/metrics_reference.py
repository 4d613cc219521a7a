"""Writes docs/metrics.md from saved pages of a running cluster's `/metrics`:
`python tools/metrics_reference.py FILE...`.

Labels are those that series have. Some series are there only while somebody reads and others only
once a request has ended, so it takes one page of a cluster under load and one of later.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

TARGET = Path(__file__).parents[1] / "docs" / "metrics.md"

_HEAD = """# Metrics

All of `GET /metrics`, at every ingress, in Prometheus' text format. How to read them is in
[observability.md](observability.md). This page is made by `tools/metrics_reference.py`, and a test
compares it with a running cluster.

`replica` is Ray Serve's id of a replica, `node` Ray's id of a node, `ingress` the id of an ingress
process; none of them is a request's. Every ingress answers for all replicas, and for itself.

| name | type | labels | what |
|---|---|---|---|
"""


def table_of(*pages: str) -> dict[str, tuple[str, str, str]]:
    """Name -> (type, labels, description), of all pages together."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    rows = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels[name].update(label for sample in family.samples for label in sample.labels)
            shown = ", ".join(sorted(labels[name] - {"le"}))
            rows[name] = (family.type, shown, family.documentation)
    return rows


def reference(*pages: str) -> str:
    """The whole of docs/metrics.md."""
    rows = sorted(table_of(*pages).items())
    return _HEAD + "".join(
        f"| `{name}` | {kind} | {labels} | {what} |\n" for name, (kind, labels, what) in rows
    )


def documented(text: str) -> dict[str, tuple[str, str, str]]:
    """The table of a page, as `table_of` gives it."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {
        name.strip().strip("`"): (kind.strip(), labels.strip(), what.strip())
        for name, kind, labels, what in rows
    }


if __name__ == "__main__":
    TARGET.write_text(reference(*(Path(p).read_text() for p in sys.argv[1:])), encoding="utf-8")
