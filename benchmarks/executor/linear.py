"""Constant products beside torch's own linear layer, on a CPU: the matrices of one model, batch by
batch, in turns. Then, each in a process of its own, what products with ever new numbers of rows
cost with padded rows and without.

Run: python benchmarks/executor/linear.py --threads 2 --json benchmarks/results/executor-linear.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import torch
import torch.nn.functional as F

from tokenflow.replicas.executor import linear
from tokenflow.replicas.executor.linear import Linear, constant_linear

SHAPES = ((4096, 768), (768, 2048), (1280, 768), (768, 768))
"""`[out, in]` of a layer: gate and up, down, q, k and v, o. 75M parameters in all."""
LAYERS = 12
BATCHES = (1, 8, 32, 128, 512)
NEW_ROWS = range(40, 520)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (1)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="(20)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for dtype in ("bfloat16", "float32") for row in measure(dtype, args.repeats)]
    for row in rows:
        print(
            f"{row['dtype']:>8}  batch {row['batch']:>3}  linear {row['linear_ms']:7.2f} ms  "
            f"constant {row['constant_ms']:7.2f} ms  ratio {row['ratio']:.2f}"
        )
    spawn = get_context("spawn")
    new = []
    for padded in (True, False):
        with spawn.Pool(1) as pool:
            new.append(pool.apply(new_rows, (padded, args.threads)))
        print("  ".join(f"{name} {value}" for name, value in new[-1].items()))
    if args.json:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": {
                "platform": platform.platform(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
            },
            "threads": args.threads,
            "rows": rows,
            "new_rows": new,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


@torch.inference_mode()
def measure(dtype_name: str, repeats: int) -> list[dict[str, object]]:
    dtype = getattr(torch, dtype_name)
    weights = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(LAYERS)]
    plain: list[list[Linear]] = [[partial(F.linear, weight=w) for w in layer] for layer in weights]
    constant = [[constant_linear(w, None) for w in layer] for layer in weights]
    rows: list[dict[str, object]] = []
    for batch in BATCHES:
        inputs = [torch.randn(batch, shape[1]).to(dtype) for shape in SHAPES]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for taken, layers in zip(times, (plain, constant), strict=True):
                taken.append(timed(partial(run, layers, inputs)))
        ours, theirs = median(times[1]) * 1e3, median(times[0]) * 1e3
        rows.append(
            {
                "dtype": dtype_name,
                "batch": batch,
                "linear_ms": round(theirs, 3),
                "constant_ms": round(ours, 3),
                "ratio": round(ours / theirs, 3),
            }
        )
    return rows


@torch.inference_mode()
def new_rows(padded: bool, threads: int) -> dict[str, object]:
    """One layer's products, float32, with every number of rows once."""
    torch.set_num_threads(threads)
    layer = [constant_linear(torch.randn(shape), None) for shape in SHAPES]
    inputs = [torch.randn(NEW_ROWS[-1], shape[1]) for shape in SHAPES]
    run([layer], inputs)
    before = peak_kib()
    times = []
    with patch.object(linear, "padded_rows", linear.padded_rows if padded else int):
        for rows in NEW_ROWS:
            some = [x[:rows] for x in inputs]
            times.append(timed(partial(run, [layer], some)))
    grown_mib = (peak_kib() - before) / 1024
    return {
        "padded": padded,
        "numbers_of_rows": len(NEW_ROWS),
        "mean_ms": round(mean(times) * 1e3, 3),
        "memory_grown_mib": round(grown_mib, 1),
    }


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(layers: list[list[Linear]], inputs: list[torch.Tensor]) -> None:
    for layer in layers:
        for product, x in zip(layer, inputs, strict=True):
            product(x)


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
