"""An executor without a model whose next token depends on every token in its KV.

KV "content" is the token id at each position, so a block that is freed too early, copied too late
or loaded into the wrong place changes the text. Copies end only after `delay` polls. Blocks have
checksums, as in the torch executor.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from tokenflow.replicas.executor.base import (
    UNKNOWN,
    CopyDone,
    KVLayout,
    ScheduledSequence,
    StepResult,
)
from tokenflow.replicas.transfers import Commit

VOCAB = 251


def next_token(tokens: list[int]) -> int:
    """The fake model: a hash of the whole context. Never 0, which the tests use as EOS."""
    h = 0
    for t in tokens:
        h = (h * 31 + t + 7) % 1_000_003
    return 1 + h % (VOCAB - 1)


def expected_output(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeStep(NamedTuple):
    """A step whose result is looked at later; it ran when it was launched."""

    done: StepResult

    def result(self) -> StepResult:
        return self.done


class FakeExecutor:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        host_slots: int,
        *,
        delay: int = 1,
        late_sums: bool = False,
    ) -> None:
        self.layout = KVLayout(1, block_size, 1, 1, "float32")
        self.num_blocks = num_blocks
        self.vocab_size = VOCAB
        self.delay = delay
        self.late_sums = late_sums
        self.fail_next_job = False
        self.kv = np.full((num_blocks, block_size), -1)
        self.host = np.full((host_slots, block_size), -1)
        self.steps: list[list[tuple[int, int]]] = []
        self.closed = False
        self.overlaps = False
        self.last: dict[int, int] = {}
        """The token last drawn for each slot."""
        self._jobs: list[list] = []
        self._filling: dict[int, set[int]] = {}
        """Slots of the copies to the host that are not reported, by job: nobody may load them, and
        nobody fill them, since the directions are not ordered on a device."""
        self._loading: dict[int, set[int]] = {}
        self._sums: list[list] = []
        self._next_job = 0

    def launch(self, batch: list[ScheduledSequence]) -> FakeStep:
        return FakeStep(self.execute(batch))

    def execute(self, batch: list[ScheduledSequence]) -> StepResult:
        assert batch, "an empty step"
        assert len({s.slot for s in batch}) == len(batch)
        out = []
        bs = self.layout.block_size
        for s in batch:
            for i, token in enumerate(s.token_ids):
                if token == UNKNOWN:
                    assert i == len(s.token_ids) - 1 and s.output_ids[-1] == UNKNOWN
                    token = self.last[s.slot]
                position = s.start + i
                self.kv[s.block_ids[position // bs], position % bs] = token
            end = s.start + len(s.token_ids)
            context = [int(self.kv[s.block_ids[p // bs], p % bs]) for p in range(end)]
            out.append(next_token(context) if s.sample else -1)
            if s.sample:
                self.last[s.slot] = out[-1]
        self.steps.append([(s.start, len(s.token_ids)) for s in batch])
        return StepResult(out, [None] * len(out))

    def _job(self, copy) -> int:
        self._next_job += 1
        self._jobs.append([self._next_job, self.delay, copy, self.fail_next_job])
        self.fail_next_job = False
        return self._next_job

    def checksum(self, slot: int) -> int:
        return hash(self.host[slot].tobytes()) % (1 << 64)

    def offload(self, pairs) -> int:
        pairs = list(pairs)

        def copy() -> dict:
            for block, slot in pairs:
                self.host[slot] = self.kv[block]
            return {"checksums": tuple(self.checksum(slot) for _, slot in pairs)}

        slots = {slot for _, slot in pairs}
        assert not slots & set().union(*self._filling.values(), *self._loading.values())
        job_id = self._job(copy)
        self._filling[job_id] = slots
        return job_id

    def load(self, pairs, expected=()) -> int:
        pairs = list(pairs)

        def copy() -> dict:
            for slot, block in pairs:
                self.kv[block] = self.host[slot]
            return {
                "corrupt": tuple(
                    i
                    for i, checksum in enumerate(expected)
                    if checksum is not None and self.checksum(pairs[i][0]) != checksum
                )
            }

        slots = {slot for slot, _ in pairs}
        assert not slots & set().union(*self._filling.values())
        job_id = self._job(copy)
        self._loading[job_id] = slots
        return job_id

    def poll_transfers(self, timeout_s: float = 0.0):
        done = []
        for job in list(self._jobs):
            job[1] -= 1
            if job[1] < 0:
                # The copy happens as late as it can: whoever reuses a block early is caught.
                error = RuntimeError("copy failed") if job[3] else None
                found = {} if error else job[2]()
                self._jobs.remove(job)
                self._filling.pop(job[0], None)
                self._loading.pop(job[0], None)
                if self.late_sums and "checksums" in found:
                    done.append(CopyDone(job[0], error, 0.01, None))
                    self._sums.append([job[0], self.delay, found["checksums"]])
                else:
                    done.append(CopyDone(job[0], error, 0.01, **found))
            else:
                break
        for late in self._sums:
            late[1] -= 1
        done += [CopyDone(job_id, None, 0.0, sums) for job_id, left, sums in self._sums if left < 0]
        self._sums = [late for late in self._sums if late[1] >= 0]
        return done

    def close(self) -> None:
        self.closed = True


class FakeHost:
    """The node's store in process, with the interface of its client, strict about its use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = list(range(capacity))
        self.holds: Counter[int] = Counter()
        self.committed: dict[int, Commit] = {}
        self.slot_of: dict[bytes, int] = {}
        self.corrupt: set[int] = set()

    @property
    def cached(self) -> list[int]:
        """Committed slots that nobody holds, oldest first."""
        return [slot for slot in self.committed if not self.holds[slot]]

    def available(self) -> int:
        return len(self.free) + len(self.cached)

    def acquire(self, n: int) -> list[int] | None:
        if n > self.available():
            return None
        for slot in self.cached[: max(0, n - len(self.free))]:
            self.forget(slot)
        taken, self.free = self.free[:n], self.free[n:]
        self.holds.update(taken)
        return taken

    def forget(self, slot: int) -> None:
        """Evict a cached slot."""
        assert not self.holds[slot]
        commit = self.committed.pop(slot)
        if self.slot_of.get(commit.key) == slot:
            del self.slot_of[commit.key]
        self.corrupt.discard(slot)
        self.free.append(slot)

    def match(self, keys) -> list[int]:
        slots = []
        for key in keys:
            slot = self.slot_of.get(key)
            if slot is None or slot in self.corrupt:
                break
            slots.append(slot)
        self.holds.update(slots)
        return slots

    def commit(self, blocks) -> None:
        for block in blocks:
            assert self.holds[block.slot] == 1 and block.slot not in self.committed
            self.committed[block.slot] = block
            self.slot_of.setdefault(block.key, block.slot)

    def checksums(self, slots) -> list[int]:
        return [self.committed[slot].checksum for slot in slots]

    def report_corrupt(self, slots) -> None:
        assert set(slots) <= set(self.committed)
        self.corrupt.update(slots)

    def release(self, slots) -> None:
        for slot in slots:
            assert self.holds[slot] > 0, f"slot {slot} is released but not held"
            self.holds[slot] -= 1
            if not self.holds[slot]:
                del self.holds[slot]
                if slot not in self.committed:
                    self.free.append(slot)
                elif slot in self.corrupt or self.slot_of.get(self.committed[slot].key) != slot:
                    self.forget(slot)


class FakeTokenizer:
    """Just enough of a tokenizer for the engine: token i reads as its own letter."""

    def decode(self, ids, skip_special_tokens: bool = False, **_: object) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)
