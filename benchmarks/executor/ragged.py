"""Decode attention of batches with ragged contexts on a CPU: sequences padded to the longest of
their group beside all padded to the longest of the batch, in turns. All layers of a step, with what
is prepared once for it.

Run: python benchmarks/executor/ragged.py --json benchmarks/results/executor-ragged.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

from tokenflow.replicas.executor.attention import sdpa
from tokenflow.replicas.executor.attention.base import PackedStep
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.attention.sdpa import SdpaAttention, like_lengths
from tokenflow.replicas.executor.base import KVLayout

MODELS = {
    "7M, float32": (KVLayout(6, 16, 2, 64, "float32"), 6),
    "75M, bfloat16": (KVLayout(12, 16, 4, 64, "bfloat16"), 12),
}
"""KV layout and query heads."""
NEVER = 1 << 30


def contexts(kind: str, sequences: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens that each sequence has."""
    if kind == "equal":
        return np.full(sequences, 300)
    if kind == "growing":  # a burst of equal prompts, some of which have waited
        return rng.integers(128, 448, sequences)
    return np.clip(100 * rng.lognormal(0.0, 1.2, sequences), 8, 1000).astype(np.int64)  # skewed


def decode_s(model: str, lengths: np.ndarray, group_blocks: int) -> float:
    """Seconds of attention in one step."""
    layout, heads = MODELS[model]
    size, n = layout.block_size, len(lengths)
    blocks = lengths // size + 1
    pool = KVPool(layout, int(blocks.sum()) + 1, torch.device("cpu"))
    tables = np.zeros((n, int(blocks.max())), np.int64)
    ids = np.random.default_rng(1).permutation(int(blocks.sum()))
    for row, count in zip(tables, blocks, strict=True):
        row[:count], ids = ids[:count], ids[count:]
    places = tables[np.arange(n), lengths // size] * size + lengths % size
    step = PackedStep(np.ones(n, np.int64), lengths, 0, tables.astype(np.int32), places)
    dtype = getattr(torch, layout.dtype)
    query = torch.randn(n, heads, layout.head_dim).to(dtype)
    key, value = torch.randn(2, n, layout.kv_heads, layout.head_dim).to(dtype)
    backend = SdpaAttention(pool, None)
    with patch.object(sdpa, "_GROUP_BLOCKS", group_blocks), torch.inference_mode():
        begun = time.perf_counter()
        batch = backend.prepare(step)
        for layer in range(layout.layers):
            batch.attend(query, key, value, layer, layout.head_dim**-0.5)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="(30)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model, (layout, _) in MODELS.items():
        for kind in ("equal", "growing", "skewed"):
            for sequences in (8, 32):
                lengths = contexts(kind, sequences, np.random.default_rng(sequences))
                limit = sdpa._GROUP_BLOCKS
                taken: dict[int, list[float]] = {limit: [], NEVER: []}
                for _ in range(args.repeats):
                    for own, seconds in taken.items():
                        seconds.append(decode_s(model, lengths, own))
                grouped, whole = (1e3 * median(seconds[3:]) for seconds in taken.values())
                groups = like_lengths(lengths // layout.block_size + 1, limit // layout.kv_heads)
                rows.append(
                    {
                        "model": model,
                        "contexts": kind,
                        "sequences": sequences,
                        "groups": len(groups),
                        "grouped_ms": grouped,
                        "whole_ms": whole,
                        "ratio": grouped / whole,
                    }
                )
                print(
                    "  ".join(
                        f"{k} {v:.2f}" if isinstance(v, float) else f"{v}"
                        for k, v in rows[-1].items()
                    )
                )
    if args.json:
        about = {"python": platform.python_version(), "torch": torch.__version__}
        result = {"command": " ".join(["python", *sys.argv]), "versions": about, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
