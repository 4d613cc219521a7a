"""What the machine can do at most, whatever the program: every other piece is a fraction of this.

Memory bandwidth, the rate of a large bfloat16 product, and the host link: per direction for blocks
of Llama3-8B at 16, 64 and 256 tokens, and both directions at once.
"""

from __future__ import annotations

import torch
from common import Run, link_gb_s, matmul_tflops, memory_gb_s, parser

_BLOCKS = (2 << 20, 8 << 20, 32 << 20)


def both_ways_gb_s(run: Run, block: int) -> float:
    """Bytes of both directions together, on a stream for each; one after the other on a CPU."""
    count = max(1, (8 << 20 if run.args.tiny else 1 << 30) // block)
    pinned = run.args.device == "cuda"
    host = [torch.empty(count, block, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    device = [torch.zeros(count, block, dtype=torch.uint8, device=run.device) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)] if pinned else []

    def copies() -> None:
        for i in range(count):
            for way, (source, target) in enumerate(((host[0], device[0]), (device[1], host[1]))):
                if pinned:
                    with torch.cuda.stream(streams[way]):
                        target[i].copy_(source[i], non_blocking=True)
                else:
                    target[i].copy_(source[i])

    def once() -> None:
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        copies()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    return 2 * count * block / run.timed(once, repeats=7) / 1e9


def main() -> None:
    run = Run.start(parser(__doc__).parse_args(), "ceilings")
    run.keep("memory_gb_s", memory_gb_s(run))
    run.keep("matmul_tflops", matmul_tflops(run))
    for block in _BLOCKS:
        run.keep(
            f"link, blocks of {block >> 20} MiB, GB/s",
            {
                "to host": link_gb_s(run, block, to_host=True),
                "to device": link_gb_s(run, block, to_host=False),
                "both ways": both_ways_gb_s(run, block),
            },
        )


if __name__ == "__main__":
    main()
