"""What the way to the client costs: 200 streams from the engine in process (the limit), through a
plain FastAPI server over the same engine, and through the cluster by HTTP and by gRPC.

Three settings. `flat`: the model is replaced by one that draws tokens at once, so that everything
else is the bottleneck. `steps`: each of its steps takes 20 ms, as on a GPU that gives every stream
50 tokens/s; here the rates are equal and the CPU time differs. `model`: the embedded model.

Each repeat runs all four, one after the other, in a new order; ratios are medians over the repeats.
CPU seconds are those of all processes of a server, Ray's included, without the clients'.

Run: python benchmarks/cluster/cost.py [--settings flat,steps,model] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from cost_servers import Setting

from tokenflow.cluster.local import free_port

HERE = Path(__file__).parent
STEPS: dict[str, float | None] = {"flat": 0.0, "steps": 0.02, "model": None}
WAYS = ("engine", "plain", "http", "grpc")
_MARK = "TOKENFLOW_COST_SERVER"
_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A process of cost_servers.py and all that it starts, found by a mark in their environment."""

    def __init__(self, kind: str, setting: Setting) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "cost_servers.py"), kind, json.dumps(asdict(setting))],
            env={**os.environ, name: value, "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def ask(self) -> dict[str, Any]:
        """One run of the engine in process."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError("a server ended before it was ready; see above")

    def cpu_s(self) -> float:
        """CPU seconds so far of the processes that are alive."""
        total = 0.0
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                if self._mark.encode() in (process / "environ").read_bytes():
                    fields = (process / "stat").read_text().rpartition(")")[2].split()
                    total += (int(fields[11]) + int(fields[12])) / _TICKS
            except OSError:
                continue  # it has just ended, or belongs to somebody else
        return total

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def serving(kind: str, setting: Setting) -> Iterator[Server]:
    server = Server(kind, setting)
    try:
        yield server
    finally:
        server.stop()


def load(protocol: str, server: Server, setting: Setting) -> dict[str, Any]:
    before = server.cpu_s()
    command = [sys.executable, str(HERE / "cost_load.py"), protocol, json.dumps(asdict(setting))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return {**json.loads(done.stdout), "cpu_s": server.cpu_s() - before}


def compare(setting: Setting, repeats: int, seed: int) -> list[dict[str, dict[str, Any]]]:
    """One entry per repeat: what each way measured. A first run of each is thrown away."""
    rng = random.Random(seed)
    plain = replace(setting, http_port=free_port())
    with ExitStack() as stack:
        engine = stack.enter_context(serving("engine", setting))
        plain_server = stack.enter_context(serving("plain", plain))
        cluster = stack.enter_context(serving("cluster", setting))
        runs = {
            "engine": engine.ask,
            "plain": lambda: load("http", plain_server, plain),
            "http": lambda: load("http", cluster, setting),
            "grpc": lambda: load("grpc", cluster, setting),
        }
        for run in runs.values():
            run()
        results = []
        for _ in range(repeats):
            order = rng.sample(WAYS, len(WAYS))
            results.append({way: runs[way]() for way in order})
    return results


def summary(results: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians over the repeats; the ratios are those within a repeat."""

    def rate(run: dict[str, Any]) -> float:
        return float(run["tokens"] / run["seconds"])

    table: dict[str, dict[str, float]] = {}
    for way in WAYS:
        runs = [result[way] for result in results]
        table[way] = {
            "tokens_per_s": median(rate(run) for run in runs),
            "cpu_s_per_1k_tokens": median(1000 * run["cpu_s"] / run["tokens"] for run in runs),
            "rate_over_engine": median(rate(r[way]) / rate(r["engine"]) for r in results),
            "rate_over_plain": median(rate(r[way]) / rate(r["plain"]) for r in results),
            "cpu_over_plain": median(r[way]["cpu_s"] / r["plain"]["cpu_s"] for r in results),
        }
        if way != "engine":
            table[way]["tokens_per_read"] = median(run["tokens"] / run["reads"] for run in runs)
            table[way]["first_token_s"] = median(run["first_token_s"] for run in runs)
            table[way]["client_cpu_s_per_1k_tokens"] = median(
                1000 * run["client_cpu_s"] / run["tokens"] for run in runs
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--settings", default=",".join(STEPS))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=400, help="of a stream; a fifth for `model`")
    parser.add_argument("--rates", default="20,max", help="the readers', tokens/s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # The servers must be taken down also when this is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "streams": args.streams,
        "results": [],
    }
    for name in args.settings.split(","):
        tokens = args.tokens // 5 if name == "model" else args.tokens
        for rate in args.rates.split(","):
            speed = rate if rate == "max" else float(rate)
            setting = Setting(args.streams, tokens, speed, STEPS[name], free_port(), free_port())
            results = compare(setting, args.repeats, args.seed)
            table = summary(results)
            facts = {"setting": name, "token_rate": rate, "tokens_per_stream": tokens}
            report["results"].append({**facts, "summary": table, "repeats": results})
            print(f"{name}, readers at {rate} tokens/s, {args.streams} streams of {tokens} tokens")
            for way, row in table.items():
                shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
                print(f"  {way:7} {shown}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
