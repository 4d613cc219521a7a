"""Compiles the attention kernels for an H200 (sm_90) without one; prints what came of each as JSON.

A program of its own: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenflow.replicas.executor.attention import triton_kernels as kernels

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = ("key", "value", "query", "pool_keys", "pool_values", "out", "partial_out")
INT32 = ["tables", "query_starts", "seen", "program_sequences", "program_offsets"]
FLOAT32 = ["partial_max", "partial_sum"]


def compile_kernel(kernel, constants: dict, dtype: str, warps: int) -> dict:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INT32:
            types[name] = "*i32"
        elif name == "places":
            types[name] = "*i64"
        elif name in FLOAT32 or (name == "partial_out" and constants["SPLITS"] > 1):
            types[name] = "*fp32"
        elif name in POINTERS:
            types[name] = f"*{dtype}"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in POINTERS or (name.endswith("_stride") and name != "table_stride")
    }
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    return {
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall("wgmma.mma_async", ptx)),
        "mma": len(re.findall("mma.sync", ptx)),
    }


def attend(group: int, head_dim: int, block_size: int, queries: int, splits: int) -> dict:
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "QUERIES": queries,
        "ROWS": max(16, triton.next_power_of_2(queries * group)),
        "KEYS": 64,
        "SPLITS": splits,
        "WINDOW": 0,
    }
    return compile_kernel(kernels.attend, constants, "bf16", 8 if queries > 1 else 4)


if __name__ == "__main__":
    store = {"HEADS": 8, "HEAD_ROWS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 16}
    merge = {"HEAD_DIM": 128, "SPLITS": 8}
    print(
        json.dumps(
            {
                "decode, llama3-8b": attend(4, 128, 16, 1, 1),
                "decode in splits, qwen2-7b": attend(7, 128, 16, 1, 8),
                "prefill, llama3-8b": attend(4, 128, 16, 32, 1),
                "store": compile_kernel(kernels.store_kv, store, "bf16", 4),
                "merge": compile_kernel(kernels.merge_splits, merge, "bf16", 4),
            }
        )
    )
