"""Where the KV of every sequence is, and all that moves it: the hierarchical KV cache.

Two tiers: the device's blocks (block_pool.py) and the replica's share of the node's store on the
host (`HostSlots`). Both also keep what nobody holds any more, by content, until the memory is
needed: a sequence that comes onto the device takes from either what it would otherwise compute.

Decides nothing about who runs; the engine tells it what the policy wants. [TokenFlow §5]
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from tokenflow.replicas.block_pool import BlockPool
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.executor.base import CopyDone, Executor
from tokenflow.replicas.prefix import extend_keys, model_root, salted
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.policy import Preempt
from tokenflow.replicas.scheduler.restore import copy_tail, load_prefix
from tokenflow.replicas.scheduler.tracker import Tracker
from tokenflow.replicas.stats import EngineStats
from tokenflow.replicas.transfers import Copy, HostSlots, Job, Kind, Transfers

logger = logging.getLogger("tokenflow.engine")

CHUNK_BYTES = 32 << 20
"""Size of one offload or load job: blocks become free, and usable, chunk by chunk. Smaller ones
would cost bandwidth."""


@dataclass(slots=True)
class _Load:
    """A sequence on its way onto the device."""

    first: int
    upto: int
    """Blocks `[first, upto)` are loaded; those before are on the device."""
    tokens: int
    """Tokens whose KV is there when all is loaded."""
    missing: int
    """Device blocks it still lacks; they are on their way from those being offloaded."""
    next: int
    """First block whose copy has not been started."""
    valid: int
    """Leading blocks that are right, as far as is known."""
    jobs: set[int] = field(default_factory=set)


class KVCache:
    """Moves sequences on and off the device. Called by the engine's thread only."""

    def __init__(
        self,
        executor: Executor,
        host: HostSlots,
        config: EngineConfig,
        *,
        model: bytes,
        max_blocks: int,
        tracker: Tracker,
        cost: CostModel,
        stats: EngineStats,
    ) -> None:
        """`model` tells checkpoints apart (`checkpoint_fingerprint`); `max_blocks` is the length
        of a block table."""
        self.pool = BlockPool(executor.num_blocks)
        self.transfers = Transfers(executor, self.pool, host, config.verify_loads)
        self.host = host
        self.block_size = executor.layout.block_size
        self.max_blocks = max_blocks
        self._block_bytes = executor.layout.block_bytes
        self._chunk_blocks = max(1, CHUNK_BYTES // self._block_bytes)
        self._config = config
        self._root = model_root(model, executor.layout)
        self._tracker = tracker
        self._cost = cost
        self._stats = stats
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._entries = 0
        self._loads: dict[Sequence, _Load] = {}
        self._promised = 0
        """Blocks that loading sequences still lack."""
        self._hoping: dict[bytes, dict[Sequence, None]] = {}
        """Sequences without KV, by the first key they did not find on the device."""

    # -- what there is --------------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        """Device blocks that nobody has a claim to."""
        return max(0, self.pool.free_blocks - self._promised)

    @property
    def releasing_blocks(self) -> int:
        """Blocks of earlier victims that nobody else has a claim to, free when their copies end."""
        short = max(0, self._promised - self.pool.free_blocks)
        return max(0, self.transfers.releasing_blocks - short)

    @property
    def free_rows(self) -> list[int]:
        return self._free_rows

    def keys_of(self, tokens: tuple[int, ...], salt: str | None) -> list[bytes]:
        """The keys of a text's full blocks; any thread may compute them ahead."""
        keys: list[bytes] = []
        if self._config.prefix_cache:
            blocks = len(tokens) // self.block_size
            extend_keys(keys, salted(self._root, salt), tokens, self.block_size, blocks)
        return keys

    # -- waiting --------------------------------------------------------------------------------

    def add(self, seq: Sequence, keys: list[bytes] | None = None) -> None:
        """A new sequence; `keys` as by `keys_of`."""
        seq.root = salted(self._root, seq.request.cache_salt)
        if keys is not None:
            seq.keys = keys
        self._look(seq)

    def _look(self, seq: Sequence) -> None:
        """See what of a waiting sequence's text is on the device, and wait for more of it."""
        self._unhope(seq)
        wanted = self._wanted_keys(seq)
        found, seq.shared_blocks = self.pool.peek(wanted)
        seq.num_computed = found * self.block_size
        if found < len(wanted):
            self._hoping.setdefault(wanted[found], {})[seq] = None
        self._tracker.touch(seq)

    def _unhope(self, seq: Sequence) -> None:
        place = seq.num_computed // self.block_size
        if place < len(seq.keys) and (hoping := self._hoping.get(seq.keys[place])) is not None:
            hoping.pop(seq, None)
            if not hoping:
                del self._hoping[seq.keys[place]]

    def _wanted_keys(self, seq: Sequence) -> list[bytes]:
        """Of all blocks that may come from a cache: at least one token has to be run."""
        if not self._config.prefix_cache:
            return []
        blocks = (len(seq.tokens) - 1) // self.block_size
        return self.keys(seq, blocks)[:blocks]

    def keys(self, seq: Sequence, blocks: int) -> list[bytes]:
        """Its keys: at least those of its first `blocks` blocks."""
        if len(seq.keys) < blocks:
            extend_keys(seq.keys, seq.root, seq.tokens, self.block_size, blocks)
        return seq.keys

    def key(self, seq: Sequence, index: int, full: int) -> bytes | None:
        """Key of a block if it is one of the first `full` ones and may be shared."""
        if not self._config.prefix_cache or index >= full:
            return None
        return self.keys(seq, index + 1)[index]

    # -- onto the device ------------------------------------------------------------------------

    def admit(self, seq: Sequence) -> bool:
        """A waiting sequence comes onto the device, with blocks for all its tokens and the next.

        What a cache holds of its text it gets from there: device blocks are shared, blocks of the
        host are loaded. False, and no change, when there is no room.
        """
        if seq.state is not State.WAITING or not self._free_rows:
            return False
        wanted = self._wanted_keys(seq)
        cached = self.pool.match(wanted)
        blocks = self._allocate(self._blocks_to_hold(seq) - len(cached))
        if blocks is None:
            self.pool.release(cached)
            self._look(seq)
            return False
        self._unhope(seq)
        self._place(seq, cached, blocks)
        if wanted and self._config.offload:
            seq.host_slots = self.host.match(wanted)
            seq.sent_blocks = seq.synced_blocks = len(seq.host_slots)
        on_host = len(seq.host_slots) * self.block_size
        seq.num_computed = len(cached) * self.block_size
        first = not seq.preemptions and seq.first_token_s is None
        if not self._load(seq, len(cached), len(seq.host_slots), on_host):
            on_host = 0
            self._enter(seq)
        if first:
            self._count_hits(seq, seq.num_computed, on_host)
        return True

    def _count_hits(self, seq: Sequence, on_device: int, on_host: int) -> None:
        stats = self._stats
        prompt = len(seq.prompt_ids)
        stats.prefix_queried_tokens += prompt
        on_device = min(on_device, prompt)
        seq.cached_tokens = max(on_device, min(on_host, prompt))
        stats.prefix_device_hit_tokens += on_device
        stats.prefix_host_hit_tokens += seq.cached_tokens - on_device

    def resume(self, seq: Sequence) -> bool:
        """A preempted sequence comes back: blocks still on the device are taken as they are, the
        others loaded or, where that is faster, left to be computed again.

        Its blocks may still be on their way from an offload; loading then begins with those that
        are free. False, and no change, when there is no room.
        """
        if seq.state is not State.PREEMPTED or not self._free_rows:
            return False
        overlap = self._config.overlap_transfers
        if not overlap and self.transfers.pending(Kind.OFFLOAD):
            return False
        cached: list[int] = []
        if self._config.prefix_cache:
            full = seq.num_computed // self.block_size
            cached = self.pool.match(self.keys(seq, full)[:full])
        need = self._blocks_to_hold(seq) - len(cached)
        ready = min(need, self.free_blocks)
        if need - ready > (self.releasing_blocks if overlap else 0):
            self.pool.release(cached)
            return False
        blocks = self.pool.allocate(ready)
        assert blocks is not None
        self._place(seq, cached, blocks)
        self._stats.resumes += 1
        if not self._load(seq, len(cached), seq.synced_blocks, seq.num_computed, need - ready):
            full = seq.num_computed // self.block_size
            # Of a partly filled block the copy would be stale once more tokens are in it.
            self._forget_copies(seq, full, keep_slots=True)
            seq.num_computed = len(cached) * self.block_size
            self._enter(seq)
        return True

    def _allocate(self, n: int) -> list[int] | None:
        """`n` blocks out of those that nobody was promised."""
        return self.pool.allocate(n) if n <= self.free_blocks else None

    def _blocks_to_hold(self, seq: Sequence) -> int:
        return min(-(-(len(seq.tokens) + 1) // self.block_size), self.max_blocks)

    def _place(self, seq: Sequence, cached: list[int], blocks: list[int]) -> None:
        seq.add_blocks(cached)
        seq.add_blocks(blocks)
        seq.shared_blocks = sum(self.pool.holders(block) > 1 for block in cached)
        seq.slot = self._free_rows.pop()
        self._tracker.touch(seq)

    def _load(self, seq: Sequence, first: int, upto: int, tokens: int, missing: int = 0) -> bool:
        """Begin to load blocks `[first, upto)`; False when nothing is to be loaded, or computing
        is faster and all blocks are there to compute in."""
        if upto <= first and not missing:
            return False
        worth = missing > 0 or load_prefix(
            self._cost,
            upto - first,
            tokens - first * self.block_size,
            load_queue=self.transfers.queued(to_host=False),
            others=self._tracker.count(State.RUNNING),
        )
        if not worth:
            return False
        seq.move(State.LOADING)
        load = _Load(first, upto, tokens, missing, next=first, valid=upto)
        self._loads[seq] = load
        self._promised += missing
        self._advance(seq, load)
        return True

    def _advance(self, seq: Sequence, load: _Load) -> None:
        """Start copies into all the blocks that are there."""
        upto = min(load.upto, seq.num_blocks)
        while load.next < upto:
            end = min(upto, load.next + self._chunk_blocks)
            copies = [
                Copy(seq, i, int(seq.block_ids[i]), seq.host_slots[i], None)
                for i in range(load.next, end)
            ]
            load.jobs.add(self.transfers.start(Kind.LOAD, copies))
            self._stats.loaded_bytes += len(copies) * self._block_bytes
            seq.note("load", bytes=len(copies) * self._block_bytes)
            load.next = end

    def progress(self) -> None:
        """Give blocks that became free to those who were promised them."""
        for seq, load in list(self._loads.items()):
            if not load.missing:
                continue
            blocks = self.pool.allocate(min(load.missing, self.pool.free_blocks))
            assert blocks is not None
            seq.add_blocks(blocks)
            load.missing -= len(blocks)
            self._promised -= len(blocks)
            self._tracker.touch(seq)
            if load.missing > self.transfers.releasing_blocks:
                # The copies that were to free the rest have failed, or others took it.
                self._end_load(seq)
                self.leave(seq)
                seq.move(State.PREEMPTED)
                continue
            self._advance(seq, load)
            self._finish_load(seq, load)

    def _finish_load(self, seq: Sequence, load: _Load) -> None:
        if load.jobs or load.missing or load.next < load.upto:
            return
        self._end_load(seq)
        intact = load.valid >= load.upto
        seq.num_computed = load.tokens if intact else load.valid * self.block_size
        # What did not arrive intact has to be computed after all.
        seq.cached_tokens = min(seq.cached_tokens, seq.num_computed)
        full = seq.num_computed // self.block_size
        # The last block goes on filling up on the device, so its host copy is stale from now on.
        self._forget_copies(seq, full, keep_slots=intact)
        self.publish(seq, load.first, full)
        self._enter(seq)

    def _end_load(self, seq: Sequence) -> None:
        load = self._loads.pop(seq, None)
        if load is not None:
            self._promised -= load.missing

    def _forget_copies(self, seq: Sequence, blocks: int, *, keep_slots: bool = False) -> None:
        """Only the first `blocks` blocks are on the host."""
        if not keep_slots and len(seq.host_slots) > blocks:
            self.transfers.release_slots(seq.host_slots[blocks:])
            del seq.host_slots[blocks:]
        seq.sent_blocks = min(seq.sent_blocks, blocks)
        seq.in_flight = {index for index in seq.in_flight if index < blocks}
        seq.synced_blocks = min(seq.in_flight, default=seq.sent_blocks)
        self._tracker.touch(seq)

    def _enter(self, seq: Sequence) -> None:
        seq.resident_tokens = 0
        seq.move(State.RUNNING)
        self._entries += 1
        seq.entered = self._entries
        self._tracker.touch(seq)

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Blocks for its first `tokens` tokens; False when there are not enough."""
        missing = -(-tokens // self.block_size) - seq.num_blocks
        if missing > 0:
            blocks = self._allocate(missing)
            if blocks is None:
                return False
            seq.add_blocks(blocks)
            self._tracker.touch(seq)
        return True

    # -- sharing --------------------------------------------------------------------------------

    def publish(self, seq: Sequence, first: int, upto: int) -> None:
        """Blocks `[first, upto)` of a sequence on the device are full: others may use them."""
        if first >= upto or not self._config.prefix_cache:
            return
        keys = self.keys(seq, upto)
        for i in range(first, upto):
            self.pool.publish(int(seq.block_ids[i]), keys[i])
            for other in self._hoping.pop(keys[i], ()):
                self._look(other)

    def reuse(self, seq: Sequence) -> None:
        """A sequence about to prefill takes what others have computed since it was admitted."""
        while seq.num_computed % self.block_size == 0:
            i = seq.num_computed // self.block_size
            key = self.key(seq, i, (len(seq.tokens) - 1) // self.block_size)
            if key is None or not self.pool.holds(key):
                return
            own = int(seq.block_ids[i])
            (block,) = self.pool.match([key])
            self.pool.release([own])
            seq.block_ids[i] = block
            seq.shared_blocks += self.pool.holders(block) > 1
            seq.num_computed += self.block_size
            if seq.first_token_s is None and not seq.preemptions:
                seq.cached_tokens += self.block_size
                self._stats.prefix_device_hit_tokens += self.block_size
            self._tracker.touch(seq)

    def prefill_keys(self, seq: Sequence, tokens: int) -> list[bytes]:
        """Keys of the blocks that computing `tokens` more tokens fills; empty where nothing is
        shared."""
        if not self._config.prefix_cache:
            return []
        first = -(-seq.num_computed // self.block_size)
        upto = (seq.num_computed + tokens) // self.block_size
        return self.keys(seq, upto)[first:upto]

    # -- off the device -------------------------------------------------------------------------

    def leave(self, seq: Sequence) -> None:
        """Give up row and blocks; copies under way keep their own hold on the blocks."""
        if seq.slot >= 0:
            self._free_rows.append(seq.slot)
            seq.slot = -1
        self.pool.release(seq.take_blocks())
        seq.shared_blocks = 0
        self._tracker.touch(seq)

    def preempt(self, seq: Sequence, how: Preempt) -> None:
        """A running sequence leaves. To be offloaded, it keeps what is on the host or on its way;
        the rest is copied too where that is faster than computing it again."""
        if seq.state is not State.RUNNING:
            return
        seq.preemptions += 1
        on_host = min(seq.sent_blocks * self.block_size, seq.num_computed)
        seq.note("preempt", how=how.value, computed_tokens=seq.num_computed, host_tokens=on_host)
        if how is Preempt.OFFLOAD and self._config.offload and seq.num_computed > 0:
            kept = self._send_rest(seq)
            if kept > 0:
                self._stats.preempted_offload += 1
                seq.num_computed = kept
                self.leave(seq)
                seq.move(State.OFFLOADING if seq.in_flight else State.PREEMPTED)
                return
        self._stats.preempted_recompute += 1
        self.leave(seq)
        self.drop(seq)

    def _send_rest(self, seq: Sequence) -> int:
        """Start the copies that a victim still needs; how many of its tokens it keeps."""
        sent = seq.sent_blocks
        filled = -(-seq.num_computed // self.block_size)
        unsent = filled - sent
        if unsent <= 0:
            # The host may have more than the device had computed so far.
            return sent * self.block_size
        wanted = copy_tail(
            self._cost,
            unsent,
            seq.num_computed - sent * self.block_size,
            offload_queue=self.transfers.queued(to_host=True),
            load_queue=self.transfers.queued(to_host=False),
            others=self._tracker.count(State.RUNNING),
        )
        if not wanted or not self.reserve(seq, filled):
            return sent * self.block_size
        overlap = self._config.overlap_transfers
        kept = [] if overlap else seq.block_ids[:sent].tolist()
        for first in range(sent, filled, self._chunk_blocks):
            end = min(first + self._chunk_blocks, filled)
            copies = self.outgoing(seq, first, end)
            self.transfers.start(Kind.OFFLOAD, copies, kept if end == filled else [])
        self._stats.offloaded_bytes += unsent * self._block_bytes
        seq.note("offload", bytes=unsent * self._block_bytes)
        return seq.num_computed

    def outgoing(self, seq: Sequence, first: int, end: int) -> list[Copy]:
        """Copies of blocks `[first, end)` to the slots reserved for them; they count as sent."""
        full = seq.num_computed // self.block_size
        seq.sent_blocks = end
        seq.in_flight.update(range(first, end))
        return [
            Copy(seq, i, int(seq.block_ids[i]), seq.host_slots[i], self.key(seq, i, full))
            for i in range(first, end)
        ]

    def reserve(self, seq: Sequence, blocks: int) -> bool:
        """Make `seq` hold a host slot for each of its first `blocks` blocks."""
        missing = blocks - len(seq.host_slots)
        if missing > 0:
            slots = self.host.acquire(missing)
            if slots is None:
                return False
            seq.host_slots.extend(slots)
            self._tracker.touch(seq)
        return True

    def find_on_host(self, seq: Sequence, full: int) -> None:
        """Of its first `full` blocks, those that somebody on the node has written need no copy."""
        sent = seq.sent_blocks
        if not self._config.prefix_cache or sent >= full or len(seq.host_slots) > sent:
            return
        slots = self.host.match(self.keys(seq, full)[sent:full])
        if slots:
            seq.host_slots.extend(slots)
            seq.sent_blocks += len(slots)
            seq.synced_blocks = min(seq.in_flight, default=seq.sent_blocks)
            self._tracker.touch(seq)

    def drop(self, seq: Sequence) -> None:
        """Forget all KV of a sequence that holds no device blocks; it waits to be recomputed."""
        self.release_host(seq)
        seq.num_computed = 0
        seq.move(State.WAITING)
        self._look(seq)

    def release_host(self, seq: Sequence) -> None:
        """It has no copies on the host any more."""
        self.transfers.release_slots(seq.host_slots)
        seq.host_slots = []
        seq.sent_blocks = seq.synced_blocks = 0
        seq.in_flight = set()
        self._tracker.touch(seq)

    def forget(self, seq: Sequence) -> None:
        """Free everything a request holds; copies under way keep what they touch until they end."""
        if seq.state is State.WAITING:
            self._unhope(seq)
        self._end_load(seq)
        self.leave(seq)
        self.release_host(seq)

    # -- beside the steps -----------------------------------------------------------------------

    def collect(self, timeout_s: float = 0.0) -> None:
        """Take note of the copies that have ended; waits at most `timeout_s` for the first."""
        for job, done in self.transfers.collect(timeout_s):
            if done.error is not None:
                self._stats.transfer_errors += 1
                logger.error(
                    "%s of %d blocks failed: %s", job.kind.value, len(job.copies), done.error
                )
            elif job.kind is Kind.LOAD:
                self._cost.observe_load(len(job.copies), done.seconds)
            else:
                self._cost.observe_offload(len(job.copies), done.seconds)
            if job.kind is Kind.LOAD:
                self._loaded(job, done)
            else:
                self._sent(job, done)
        self.progress()

    def _sent(self, job: Job, done: CopyDone) -> None:
        for copy in job.copies:
            seq, i = copy.seq, copy.position
            # The sequence may have ended or been dropped since: then the slot is not its own.
            current = i in seq.in_flight and seq.host_slots[i] == copy.slot
            if not current:
                continue
            if done.error is not None:
                self._forget_copies(seq, i)
            else:
                seq.in_flight.discard(i)
                seq.synced_blocks = min(seq.in_flight, default=seq.sent_blocks)
                self._tracker.touch(seq)
        for seq in dict.fromkeys(copy.seq for copy in job.copies):
            if seq.state is State.OFFLOADING and not seq.in_flight:
                self._offloaded(seq)

    def _offloaded(self, seq: Sequence) -> None:
        """All copies of a victim have ended, some perhaps badly: it keeps the blocks before."""
        seq.num_computed = min(seq.num_computed, seq.synced_blocks * self.block_size)
        if seq.num_computed == 0:
            self.drop(seq)
            return
        seq.move(State.PREEMPTED)
        self._tracker.touch(seq)

    def _loaded(self, job: Job, done: CopyDone) -> None:
        seq = job.copies[0].seq
        load = self._loads.get(seq)
        if done.corrupt:
            self._stats.corrupt_blocks += len(done.corrupt)
            logger.error(
                "%d of %d KV blocks of %s are not what was written to the host; computing them "
                "again",
                len(done.corrupt),
                len(job.copies),
                seq.request_id,
            )
        if load is None or job.job_id not in load.jobs:
            return
        load.jobs.remove(job.job_id)
        if done.error is not None:
            load.valid = min(load.valid, job.copies[0].position)
        elif done.corrupt:
            load.valid = min(load.valid, *(job.copies[i].position for i in done.corrupt))
        self._finish_load(seq, load)
