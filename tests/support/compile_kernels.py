"""Compiles the attention kernels for an H200 (sm_90) without one; prints what came of each as JSON.

A program of its own: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenflow.replicas.executor import fused_kernels as fused
from tokenflow.replicas.executor.attention import triton_kernels as kernels
from tokenflow.replicas.executor.attention.triton_backend import launch_options

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = (
    *("key", "value", "query", "pool_keys", "pool_values", "out", "partial_out"),
    *("heads", "cos", "sin", "gate_up"),
)
INT32 = ["tables", "query_starts", "seen", "program_sequences", "program_offsets"]
INT64 = ["places", "bases", "ids"]
FLOAT32 = ["partial_max", "partial_sum", "scores", "best"]
NUMBERS = {kernels.attend: ["heads"], kernels.merge_splits: ["heads"]}
"""Whole numbers that elsewhere are the name of a pointer."""


def compile_kernel(kernel, constants: dict, dtype: str, **options: int) -> dict:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in NUMBERS.get(kernel, ()):
            types[name] = "i32"
        elif name in INT32:
            types[name] = "*i32"
        elif name in INT64:
            types[name] = "*i64"
        elif name in FLOAT32 or (name == "partial_out" and constants.get("SPLIT", True)):
            types[name] = "*fp32"
        elif name in POINTERS:
            types[name] = f"*{dtype}"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or (name.endswith("_stride") and name != "table_stride")
    }
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall("wgmma.mma_async", ptx)),
        "mma": len(re.findall("mma.sync", ptx)),
    }


def attend(
    group: int, head_dim: int, block_size: int, queries: int, split: bool, dtype: str = "bf16"
) -> dict:
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "QUERIES": queries,
        "ROWS": max(16, triton.next_power_of_2(queries * group)),
        "KEYS": 64,
        "SPLIT": split,
        "WINDOW": 0,
    }
    options = launch_options(queries, head_dim, 4 if dtype == "fp32" else 2)
    return compile_kernel(kernels.attend, constants, dtype, **options)


if __name__ == "__main__":
    store = {"HEADS": 8, "HEAD_ROWS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 16}
    merge = {"HEAD_DIM": 128, "MOST_SPLITS": 32}
    rotate = {"HEADS": 40, "HEAD_ROWS": 64, "HALF": 64}
    print(
        json.dumps(
            {
                "decode, llama3-8b": attend(4, 128, 16, 1, False),
                "decode in splits, qwen2-7b": attend(7, 128, 16, 1, True),
                "prefill, llama3-8b": attend(4, 128, 16, 32, False),
                "prefill, head_dim 256": attend(8, 256, 16, 16, False),
                "prefill, float32": attend(4, 128, 16, 8, False, "fp32"),
                "decode, float32, head_dim 256": attend(4, 256, 16, 1, True, "fp32"),
                "store": compile_kernel(kernels.store_kv, store, "bf16"),
                "merge": compile_kernel(kernels.merge_splits, merge, "bf16"),
                "rotate": compile_kernel(fused._rotate, rotate, "bf16"),
                "activation": compile_kernel(fused._silu_and_multiply, {"COLUMNS": 1024}, "bf16"),
                "draw": compile_kernel(fused._noisy_argmax, {"TOKENS": 4096}, "bf16"),
            }
        )
    )
