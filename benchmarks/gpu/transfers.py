"""KV over the host link beside decode steps, against plain page-locked copies of the same run.

Write-through: decode steps with copies to the host always under way, and without, in turns. Asked:
at least 0.85 of the link, at most 3 % added to a step. Resume: a request of 2,048 tokens from the
host, on an idle device and beside decode steps. Asked: within 1.3 times its bytes over the link.
"""

from __future__ import annotations

import time
from statistics import median

from common import Run, decoding, later, link_gb_s, parser

from tokenflow.replicas.executor.base import Executor, ScheduledSequence
from tokenflow.replicas.kv_cache import CHUNK_BYTES

ASKED = {"link": 0.85, "step_added": 0.03, "resume": 1.3}
_TURNS = 6
_STEPS = 12


class _Stream:
    """Jobs to the host, one after the other, of blocks that the batch does not write."""

    def __init__(self, executor: Executor, first: int, blocks: int) -> None:
        self._executor = executor
        self._pairs = [(first + i, i) for i in range(blocks)]
        self._job: int | None = None
        self.seconds = 0.0
        self.bytes = 0

    def step(self) -> None:
        if self._job is None:
            self._job = self._executor.offload(self._pairs)
        for done in self._executor.poll_transfers():
            if done.error is not None:
                raise done.error
            if done.job_id == self._job and done.seconds:
                self.seconds += done.seconds
                self.bytes += len(self._pairs) * self._executor.layout.block_bytes
                self._job = self._executor.offload(self._pairs)

    def stop(self) -> None:
        """Wait for the last copy and its checksums."""
        self._job = None
        while self._executor.poll_transfers(0.2):
            pass


def write_through(
    run: Run, executor: Executor, batch: list[ScheduledSequence], spare: int, link: float
) -> None:
    blocks = max(1, CHUNK_BYTES // executor.layout.block_bytes)
    if run.args.tiny:
        blocks = 4
    plain: list[float] = []
    beside: list[float] = []
    copied = seconds = 0.0
    for turn in range(2 * (1 if run.args.tiny else _TURNS)):
        stream = _Stream(executor, spare, blocks) if turn % 2 else None
        taken = beside if stream else plain
        current = batch
        for i in range(_STEPS):
            begun = time.perf_counter()
            if stream is not None:
                stream.step()
            executor.execute(current)
            if i >= 2:
                taken.append(time.perf_counter() - begun)
            current = later(current)
        if stream is not None:
            stream.stop()
            copied += stream.bytes
            seconds += stream.seconds
    rate = copied / seconds / 1e9 if seconds else 0.0
    run.keep(
        "write-through",
        {
            "step_ms": median(plain) * 1e3,
            "step_with_copies_ms": median(beside) * 1e3,
            "step_added": median(beside) / median(plain) - 1,
            "gb_s": rate,
            "link_gb_s": link,
            "fraction": rate / link,
        },
    )


def resume(
    run: Run,
    executor: Executor,
    batch: list[ScheduledSequence],
    spare: int,
    tokens: int,
    link: float,
    *,
    busy: bool,
) -> None:
    layout = executor.layout
    pairs = [(i, spare + i) for i in range(tokens // layout.block_size)]
    ideal = len(pairs) * layout.block_bytes / (link * 1e9)
    taken = []
    for i in range(3 if run.args.tiny else 15):
        current = batch
        begun = time.perf_counter()
        executor.load(pairs)
        while True:
            if busy:
                executor.execute(current)
                current = later(current)
            if executor.poll_transfers(0.0 if busy else 0.01):
                break
        if i >= 2:
            taken.append(time.perf_counter() - begun)
    run.keep(
        f"resume of {tokens} tokens, {'beside decode steps' if busy else 'idle'}",
        {"ms": median(taken) * 1e3, "ideal_ms": ideal * 1e3, "times": median(taken) / ideal},
    )


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=64)
    run = Run.start(flags.parse_args(), "transfers")
    tiny = run.args.tiny
    size, context = (2, 40) if tiny else (run.args.batch, 1024)
    tokens = 64 if tiny else 2048
    config = run.config(max_num_seqs=size)
    longest = context + max(_STEPS, 64) + 8
    spare = size * -(-longest // config.block_size)
    kv_tokens = spare * config.block_size + max(tokens, 1 << 9 if tiny else 1 << 12)
    executor, spec = run.executor(config, kv_tokens=kv_tokens, host_tokens=2 * tokens)
    block = executor.layout.block_bytes
    to_host = link_gb_s(run, block, to_host=True)
    to_device = link_gb_s(run, block, to_host=False)
    run.keep("asked", ASKED)
    batch = decoding(size, context, longest, config.block_size, spec.vocab_size)
    try:
        write_through(run, executor, batch, spare, to_host)
        for busy in (False, True):
            resume(run, executor, batch, spare, tokens, to_device, busy=busy)
    finally:
        executor.close()


if __name__ == "__main__":
    main()
