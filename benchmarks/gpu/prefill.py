"""Prefill against the rate of a large matrix product of the same run. Asked: at least 0.6.

Whole steps, prompts of random tokens: one long prompt, several packed into a step, and a chunk
after context.
"""

from __future__ import annotations

import random
import time
from statistics import median

from common import Run, block_ids, matmul_tflops, parser, sequence, weights_read

from tokenflow.replicas.executor.checkpoint import ModelSpec

ASKED = 0.6


def flops(spec: ModelSpec, chunks: list[tuple[int, int]]) -> float:
    """Of a step of `(tokens, tokens before)`: products with the weights, and scores and their sums
    over the pairs a causal mask leaves. The head, which sees one row a prompt, is left out."""
    itemsize = spec.kv_layout(1).itemsize
    parameters = weights_read(spec) / itemsize - spec.vocab_size * spec.hidden_size
    pairs = sum(n * (before + (n + 1) / 2) for n, before in chunks)
    attention = 4 * spec.layers * spec.num_heads * spec.head_dim * pairs
    return 2 * parameters * sum(n for n, _ in chunks) + attention


def main() -> None:
    run = Run.start(parser(__doc__).parse_args(), "prefill")
    tiny = run.args.tiny
    shapes = {
        "1 x 512": [(512, 0)],
        "1 x 2048": [(2048, 0)],
        "1 x 8000": [(8000, 0)],
        "4 x 2048": [(2048, 0)] * 4,
        "16 x 512": [(512, 0)] * 16,
        "512 after 4096": [(512, 4096)],
    }
    if tiny:
        shapes = {"1 x 32": [(32, 0)], "2 x 16": [(16, 0)] * 2, "8 after 24": [(8, 24)]}
    rate = matmul_tflops(run)
    run.keep("matmul_tflops", rate)
    run.keep("asked", ASKED)
    config = run.config(max_batch_tokens=16384, max_num_seqs=16)
    executor, spec = run.executor(config, kv_tokens=512 if tiny else 16384)
    rng = random.Random(1)
    try:
        for name, chunks in shapes.items():
            longest = max(n + before for n, before in chunks)
            tables = list(block_ids(len(chunks), longest, config.block_size))
            batch = [
                sequence(i, [rng.randrange(spec.vocab_size) for _ in range(n)], before, table)
                for i, ((n, before), table) in enumerate(zip(chunks, tables, strict=True))
            ]
            seconds = []
            for i in range(3 if tiny else 12):
                begun = time.perf_counter()
                executor.execute(batch)
                if i >= 2:
                    seconds.append(time.perf_counter() - begun)
            step = median(seconds)
            reached = flops(spec, chunks) / step / 1e12
            run.keep(
                name,
                {
                    "ms": step * 1e3,
                    "tok_s": sum(n for n, _ in chunks) / step,
                    "tflops": reached,
                    "fraction": reached / rate,
                },
            )
    finally:
        executor.close()


if __name__ == "__main__":
    main()
