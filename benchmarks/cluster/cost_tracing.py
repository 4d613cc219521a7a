"""What tracing costs a cluster: tokens/s and CPU with no endpoint, with one to which no request is
sampled, with one of a hundred sampled (the default), and with all. The way is `cost.py`'s.

One cluster each, all at once on this machine, and one measured at a time, in a new order each
repeat; ratios are to the cluster without an endpoint in the same repeat, medians over the repeats.
The collector takes what comes and throws it away; its CPU time is nobody's.

Run: python benchmarks/cluster/cost_tracing.py [--setting flat] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from cost import STEPS, load, serving
from cost_servers import Setting

from tokenflow.cluster.local import free_port

RATIOS: dict[str, float | None] = {"off": None, "none": 0.0, "hundredth": 0.01, "all": 1.0}
"""Share of the requests that are sampled; None = there is no endpoint."""


class _Sink(BaseHTTPRequestHandler):
    """An OTLP collector that keeps nothing but the number of bytes."""

    received = 0

    def do_POST(self) -> None:
        type(self).received += len(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def collector() -> Iterator[str]:
    """Its endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()


def compare(name: str, streams: int, tokens: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """One entry per repeat: what each cluster measured. A first run of each is thrown away."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        endpoint = stack.enter_context(collector())
        runs = {}
        for kind, ratio in RATIOS.items():
            setting = Setting(streams, tokens, "max", STEPS[name], free_port(), free_port())
            if ratio is not None:
                setting = setting.traced(endpoint, ratio)
            server = stack.enter_context(serving("cluster", setting))
            runs[kind] = server, setting
        for server, setting in runs.values():
            load("http", server, setting)
        return [
            {kind: load("http", *runs[kind]) for kind in rng.sample(list(RATIOS), len(RATIOS))}
            for _ in range(repeats)
        ]


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ratios to `off` within a repeat, and their medians."""
    return {
        kind: {
            "rate_over_off": median(r["off"]["seconds"] / r[kind]["seconds"] for r in results),
            "cpu_over_off": median(r[kind]["cpu_s"] / r["off"]["cpu_s"] for r in results),
        }
        for kind in RATIOS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--setting", choices=STEPS, default="flat")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=400, help="of a stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # The servers must be taken down also when this is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = compare(args.setting, args.streams, args.tokens, args.repeats, args.seed)
    table = summary(results)
    print(f"{args.setting}: {args.streams} streams of {args.tokens} tokens, sampled:")
    for kind, row in table.items():
        print(f"  {kind:10} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"  {_Sink.received} bytes of spans came to the collector")
    if args.json:
        facts = {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "setting": args.setting,
            "streams": args.streams,
            "tokens_per_stream": args.tokens,
            "summary": table,
            "repeats": results,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
