"""KV over the host link beside decode steps, against plain page-locked copies of the same run.

Blocks are scattered, as those of many sequences are, so each is a copy of its own.

Write-through: decode steps with as many copies to the host beside them as the link can carry in
that time, and without, in turns. Asked: at least 0.85 of the link, at most 3 % added to a step.
Resume: a request of 2,048 tokens from the host, in jobs as the engine makes them, on an idle device
and beside decode steps; its copies alone, and until the engine sees the last of them, which is
after a step. Asked: within 1.3 times its bytes over the link.
"""

from __future__ import annotations

import random
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

    def __init__(self, executor: Executor, pairs: list[tuple[int, int]]) -> None:
        self._executor = executor
        self._pairs = pairs
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


def scattered(first: int, blocks: int) -> list[tuple[int, int]]:
    """(block, slot) pairs of which hardly any are neighbours."""
    slots = list(range(blocks))
    random.Random(1).shuffle(slots)
    return [(first + i, slot) for i, slot in enumerate(slots)]


def steps_s(executor: Executor, batch: list[ScheduledSequence], stream: _Stream | None) -> list:
    """Seconds of steps, the first two left out."""
    seconds = []
    for _ in range(_STEPS):
        begun = time.perf_counter()
        if stream is not None:
            stream.step()
        executor.execute(batch)
        seconds.append(time.perf_counter() - begun)
        batch = later(batch)
    return seconds[2:]


def write_through(
    run: Run,
    executor: Executor,
    batch: list[ScheduledSequence],
    pairs: list[tuple[int, int]],
    link: float,
) -> None:
    steps_s(executor, batch, None)  # the first use of anything
    step = median(steps_s(executor, batch, None))
    blocks = min(len(pairs), max(1, int(step * link * 1e9 / executor.layout.block_bytes)))
    plain: list[float] = []
    beside: list[float] = []
    copied = seconds = 0.0
    for turn in range(2 * (1 if run.args.tiny else _TURNS)):
        stream = _Stream(executor, pairs[:blocks]) if turn % 2 else None
        (beside if stream else plain).extend(steps_s(executor, batch, stream))
        if stream is not None:
            stream.stop()
            copied += stream.bytes
            seconds += stream.seconds
    rate = copied / seconds / 1e9 if seconds else 0.0
    run.keep(
        "write-through",
        {
            "blocks_a_step": blocks,
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
    pairs: list[tuple[int, int]],
    link: float,
    *,
    busy: bool,
) -> None:
    layout = executor.layout
    loads = [(slot, block) for block, slot in pairs]
    size = max(1, CHUNK_BYTES // layout.block_bytes)
    jobs = [loads[i : i + size] for i in range(0, len(loads), size)]
    ideal = len(pairs) * layout.block_bytes / (link * 1e9)
    seen, copied = [], []
    for i in range(3 if run.args.tiny else 15):
        current = batch
        begun = time.perf_counter()
        left = {executor.load(job) for job in jobs}
        seconds = 0.0
        while left:
            if busy:
                executor.execute(current)
                current = later(current)
            for done in executor.poll_transfers(0.0 if busy else 0.01):
                left.discard(done.job_id)
                seconds += done.seconds
        if i >= 2:
            seen.append(time.perf_counter() - begun)
            copied.append(seconds)
    run.keep(
        f"resume of {len(pairs) * layout.block_size} tokens, "
        + ("beside decode steps" if busy else "idle"),
        {
            "seen_ms": median(seen) * 1e3,
            "copies_ms": median(copied) * 1e3,
            "ideal_ms": ideal * 1e3,
            "seen_times": median(seen) / ideal,
            "copies_times": median(copied) / ideal,
        },
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
    kv_tokens = spare * config.block_size + 2 * tokens
    executor, spec = run.executor(config, kv_tokens=kv_tokens, host_tokens=2 * tokens)
    block = executor.layout.block_bytes
    to_host = link_gb_s(run, block, to_host=True)
    to_device = link_gb_s(run, block, to_host=False)
    run.keep("asked", ASKED)
    batch = decoding(size, context, longest, config.block_size, spec.vocab_size)
    try:
        pairs = scattered(spare, 2 * tokens // config.block_size)
        write_through(run, executor, batch, pairs, to_host)
        pairs = scattered(spare, tokens // config.block_size)
        for busy in (False, True):
            resume(run, executor, batch, pairs, to_device, busy=busy)
    finally:
        executor.close()


if __name__ == "__main__":
    main()
