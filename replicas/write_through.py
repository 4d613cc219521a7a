"""Write-through: filled blocks are copied to the host beside the steps, so that a victim's KV is
already there when it leaves. [TokenFlow §5.1]

Decides which blocks and how many; the copies themselves are the KV cache's (kv_cache.py).
"""

from __future__ import annotations

import numpy as np

from tokenflow.replicas.kv_cache import KVCache
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.tracker import IntArray, Tracker
from tokenflow.replicas.stats import EngineStats
from tokenflow.replicas.transfers import Copy, Kind

_FIRST_JOB_BLOCKS = 4
"""Blocks copied beside a step while the link's speed is unknown."""
_WORTH_A_JOB_BLOCKS = 4
_PATIENCE_STEPS = 8
"""Fewer blocks than that wait for company so long: every job costs the engine some time."""
_BUFFER_APART_S = 2.0
"""One copy gives way to another only if the readers' buffers are so far apart."""


class WriteThrough:
    """One job at a time, sized to end within the step it runs beside."""

    def __init__(
        self, kv: KVCache, tracker: Tracker, cost: CostModel, stats: EngineStats, block_bytes: int
    ) -> None:
        self._kv = kv
        self._tracker = tracker
        self._cost = cost
        self._stats = stats
        self._block_bytes = block_bytes
        self._waited = 0

    def start(self, batch: list[tuple[Sequence, int]]) -> None:
        """Begin to copy what fits beside a step of `batch`, the fullest buffers first: they are the
        likeliest victims."""
        kv = self._kv
        if kv.transfers.pending(Kind.WRITE_THROUGH):
            return
        rows, behind = self._behind()
        if not behind or (behind < _WORTH_A_JOB_BLOCKS and self._waited < _PATIENCE_STEPS):
            self._waited += behind > 0
            return
        self._waited = 0
        copies = self._choose(rows, self._budget(batch))
        if copies:
            kv.transfers.start(Kind.WRITE_THROUGH, copies)
            size = len(copies) * self._block_bytes
            self._stats.offloaded_bytes += size
            self._stats.written_through_bytes += size

    def _behind(self) -> tuple[IntArray, int]:
        """Rows on the device with filled blocks that are not on the host, and how many blocks."""
        tracker = self._tracker
        tracker.refresh()
        rows = tracker.rows(State.RUNNING)
        lag = tracker.computed[rows] // self._kv.block_size - tracker.synced[rows]
        lags = lag > 0
        return rows[lags], int(lag[lags].sum())

    def _budget(self, batch: list[tuple[Sequence, int]]) -> int:
        """Blocks that the link can move while the step runs."""
        per_block = self._cost.offload_s(1)
        if per_block <= 0:
            return _FIRST_JOB_BLOCKS
        contexts = [seq.num_computed for seq, n in batch if n == 1]
        prefill = sum(n for _, n in batch if n > 1)
        return max(1, int(self._cost.step_s(len(contexts), sum(contexts), prefill) / per_block))

    def _choose(self, rows: IntArray, budget: int) -> list[Copy]:
        kv, tracker = self._kv, self._tracker
        copies: list[Copy] = []
        going: set[bytes] = set()
        for seq in tracker.take(rows[np.argsort(-tracker.due_s[rows], kind="stable")]):
            full = seq.num_computed // kv.block_size
            kv.find_on_host(seq, full)
            # Another holder of the same blocks may be sending them: it finds them there later.
            if seq.sent_blocks == full or kv.key(seq, seq.sent_blocks, full) in going:
                continue
            room = len(seq.host_slots) + kv.host.available()
            end = min(full, room, seq.sent_blocks + budget - len(copies))
            if end <= seq.sent_blocks:
                self._make_room_for(seq)
                break
            if kv.reserve(seq, end):
                sent = kv.outgoing(seq, seq.sent_blocks, end)
                going.update(copy.key for copy in sent if copy.key is not None)
                copies += sent
            if len(copies) >= budget:
                break
        return copies

    def _make_room_for(self, fuller: Sequence) -> None:
        """The host is full: of those on the device, who is least likely to leave lets go of its
        copies, which are then the store's to evict, for the sake of a likelier victim."""
        tracker = self._tracker
        rows = tracker.rows(State.RUNNING)
        rows = rows[tracker.synced[rows] > 0]
        if not len(rows):
            return
        emptiest = rows[np.argmin(tracker.due_s[rows])]
        if tracker.due_s[emptiest] + _BUFFER_APART_S < tracker.due_s[fuller.row]:
            self._kv.release_host(tracker.sequences[emptiest])
