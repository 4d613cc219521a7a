"""The engine: requests in, token events out, one step at a time.

`step` is the whole life of the device: collect finished copies, ask the policy for a plan, apply
it to the block pool, start copies, run the forward pass, hand out the drawn tokens. The engine
applies decisions and never makes one; it knows nothing of threads (loop.py), Ray or HTTP.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tokenflow.replicas.block_pool import BlockPool
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import CapacityError, InvalidRequestError
from tokenflow.replicas.executor.base import Executor, ScheduledSequence, TokenLogprobs
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import FinishReason, Request, Sequence, State
from tokenflow.replicas.scheduler.capacity import Load, assess, reference_rate
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.playback import effective_tokens
from tokenflow.replicas.scheduler.policy import Plan, Policy, Preempt, View
from tokenflow.replicas.scheduler.tracker import FloatArray, IntArray, Tracker
from tokenflow.replicas.stats import EngineStats
from tokenflow.replicas.text import TextStream
from tokenflow.replicas.transfers import HostSlots, Job, Kind, Transfers

logger = logging.getLogger("tokenflow.engine")

# tokens/s; beyond them a reader's buffer is no sensible number any more.
_LOWEST_RATE = 1e-3
_HIGHEST_RATE = 1e6

_PACING_INTERVAL_S = 0.5
_FIRST_CHUNK_BLOCKS = 4
"""Blocks copied beside a step while the link's speed is unknown."""


def check_rate(token_rate: float) -> None:
    """Raise InvalidRequestError unless it is a reading speed, or infinite for no reader."""
    if token_rate != math.inf and not _LOWEST_RATE <= token_rate <= _HIGHEST_RATE:
        raise InvalidRequestError(
            f"token_rate must be between {_LOWEST_RATE:g} and {_HIGHEST_RATE:g} tokens/s, "
            f"got {token_rate:g}.",
            param="token_rate",
        )


class Engine:
    """Serves requests on one executor. Not thread-safe: one thread calls everything.

    `tokenizer` is a Hugging Face tokenizer; `eos_ids` the model's end-of-sequence ids; `clock` a
    monotonic clock in seconds (a virtual one in simulations).
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        host: HostSlots,
        config: EngineConfig,
        *,
        tokenizer: Any,
        eos_ids: Iterable[int],
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.policy = policy
        self.config = config
        self.max_model_len = min(max_model_len, executor.num_blocks * executor.layout.block_size)
        self.cost = CostModel()
        self.lengths = OutputLengths()
        self.stats = EngineStats()
        self.pool = BlockPool(executor.num_blocks)
        self.tracker = Tracker()
        self._host = host
        self._transfers = Transfers(executor, self.pool, host)
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._clock = clock
        self._block_size = executor.layout.block_size
        self._max_blocks = -(-self.max_model_len // self._block_size)
        self._sequences: dict[str, Sequence] = {}
        self._text: dict[str, TextStream] = {}
        self._entries = 0
        self._elastic: dict[str, Sequence] = {}
        self._next_pacing_s = -math.inf
        self._next_assessment_s = -math.inf
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._events: list[TokenEvent] = []
        self.refresh_stats()

    # -- requests -------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise InvalidRequestError for a request that can never be served, CapacityError when the
        queue is full. Reads only; safe from any thread."""
        vocab = self.executor.vocab_size
        if not request.prompt_ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        if any(not 0 <= t < vocab for t in request.prompt_ids):
            raise InvalidRequestError(
                f"The prompt has token ids outside the vocabulary (0 to {vocab - 1}).",
                param="prompt",
            )
        for name in ("logit_bias", "stop_token_ids"):
            if any(not 0 <= t < vocab for t in getattr(request.params, name)):
                raise InvalidRequestError(
                    f"{name} has token ids outside the vocabulary (0 to {vocab - 1}).", param=name
                )
        total = len(request.prompt_ids) + request.params.max_tokens
        if total > self.max_model_len:
            raise InvalidRequestError(
                f"This model's maximum context length is {self.max_model_len} tokens, but "
                f"{len(request.prompt_ids)} prompt tokens and max_tokens "
                f"{request.params.max_tokens} were requested.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        check_rate(request.token_rate)
        if len(self._sequences) >= self.config.max_waiting:
            raise CapacityError(
                f"This replica already holds {len(self._sequences)} requests; try again later."
            )

    def add(self, request: Request) -> None:
        """Queue a checked request. Raises InvalidRequestError when its id is already in use."""
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"A request with id {request.request_id!r} is already running.", param="request_id"
            )
        check_rate(request.token_rate)
        seq = Sequence(request, self._max_blocks)
        text = TextStream(self._tokenizer, request.params, self._eos_ids)
        text.prime(request.resumed_ids)
        self._sequences[seq.request_id] = seq
        self._text[seq.request_id] = text
        self.tracker.add(seq)
        self._watch_elastic(seq)
        self.stats.requests += 1

    def cancel(self, request_id: str) -> bool:
        """End a request early; False when it is not (or no longer) here.

        Its memory is free at once, or, when a copy is under way, as soon as that ends.
        """
        seq = self._sequences.get(request_id)
        if seq is None or seq.cancelled:
            return False
        seq.cancelled = True
        self._end_early(seq, FinishReason.CANCELLED)
        return True

    def set_rate(self, request_id: str, token_rate: float) -> bool:
        """Change how fast a request is consumed, from now on; infinite = as fast as it can.

        False when it is not (or no longer) here. Raises InvalidRequestError.
        """
        check_rate(token_rate)
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        seq.set_rate(token_rate, self._clock())
        self._watch_elastic(seq)
        return True

    def fail(self, request_id: str, message: str) -> None:
        """End a request with an error event."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._end_early(seq, FinishReason.ERROR, message)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences) or self._transfers.active > 0

    @property
    def requests(self) -> list[str]:
        return list(self._sequences)

    def take_events(self) -> list[TokenEvent]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    # -- one step -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step. Returns False when there was nothing to run (copies may be under way)."""
        self._collect()
        begun = self._clock()
        self._pace_elastic(begun)
        plan = self.policy.plan(self._view(), begun)
        self._apply(plan)
        batch = self._schedule(plan)
        planned = self._clock()
        self.stats.schedule_seconds += planned - begun
        self._note_load(plan.load, begun)
        if not batch and not self._transfers.active and self._sequences:
            batch = self._force_progress()
        config = self.config
        if self.policy.write_through and config.write_through and config.offload:
            self._write_through(batch, planned)
        if not batch:
            return self.refresh_stats()
        self._run(batch)
        self.refresh_stats()
        return True

    def wait_for_transfers(self, timeout_s: float) -> None:
        """Sleep until a copy ends, at most `timeout_s`."""
        self._collect(timeout_s)
        self.refresh_stats()

    def refresh_stats(self) -> bool:
        """Bring the gauges up to date; returns False: nothing was run."""
        stats = self.stats
        tracker = self.tracker
        tracker.refresh()
        stats.now_waiting = tracker.count(State.WAITING)
        stats.now_running = tracker.count(State.RUNNING)
        stats.now_preempted = len(tracker) - stats.now_waiting - stats.now_running
        stats.now_free_blocks = self.pool.free_blocks
        stats.now_total_blocks = self.pool.num_blocks
        stats.now_free_host_slots = self._host.available()
        stats.now_rate = float(tracker.rate.sum())
        if not len(tracker):
            stats.now_parked, stats.now_overloaded = 0, False
        return False

    def _expected_lengths(self) -> IntArray | FloatArray:
        return self.lengths.expected(self.tracker.limit, self.tracker.generated)

    def _note_load(self, load: Load | None, now: float) -> None:
        """The gauges of the load, as the policy saw it or, now and then, as it would be seen."""
        if load is None:
            if now < self._next_assessment_s:
                return
            self._next_assessment_s = now + _PACING_INTERVAL_S
            kv_tokens = self.pool.num_blocks * self._block_size
            load = assess(
                self.tracker,
                self.cost,
                kv_tokens,
                self.config.max_num_seqs,
                self._expected_lengths(),
            )
        stats = self.stats
        stats.now_capacity = load.capacity if load.capacity < math.inf else 0.0
        stats.now_parked = load.parked
        stats.now_overloaded = load.overloaded

    def _view(self) -> View:
        self.tracker.refresh()
        transfers = self._transfers
        return View(
            tracker=self.tracker,
            free_blocks=self.pool.free_blocks,
            releasing_blocks=transfers.releasing_blocks,
            total_blocks=self.pool.num_blocks,
            free_host_slots=self._host.available() if self.config.offload else 0,
            offload_queue=transfers.queued(to_host=True),
            load_queue=transfers.queued(to_host=False),
            block_size=self._block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_batch_tokens=self.config.max_batch_tokens,
            cost=self.cost,
            lengths=self.lengths,
            overlap=self.config.overlap_transfers,
        )

    def _watch_elastic(self, seq: Sequence) -> None:
        if seq.elastic:
            self._elastic[seq.request_id] = seq
        else:
            self._elastic.pop(seq.request_id, None)
        self.tracker.touch(seq)

    def _pace_elastic(self, now: float) -> None:
        """Move the reference rate of consumers that are no readers."""
        if not self._elastic or now < self._next_pacing_s:
            return
        self._next_pacing_s = now + _PACING_INTERVAL_S
        self.tracker.refresh()
        kv_tokens = self.pool.num_blocks * self._block_size
        rate = reference_rate(
            self.tracker, self.cost, kv_tokens, self.config.max_num_seqs, self._expected_lengths()
        )
        if rate is None:
            return
        for seq in self._elastic.values():
            seq.playback.set_rate(rate, now)
            self.tracker.touch(seq)

    # -- applying a plan ------------------------------------------------------------------------

    def _apply(self, plan: Plan) -> None:
        for seq, how in plan.preempt:
            self._preempt(seq, how)
        for seq in plan.drop:
            if seq.state is State.PREEMPTED:
                self._drop_kv(seq)
        for seq in plan.resume:
            self._resume(seq)
        for seq in plan.admit:
            self._admit(seq)

    def _admit(self, seq: Sequence) -> bool:
        if seq.state is not State.WAITING or not self._free_rows:
            return False
        if not self._take_blocks(seq):
            return False
        self._enter_device(seq)
        return True

    def _take_blocks(self, seq: Sequence) -> bool:
        """Blocks for all its tokens and the next one: all of them or none."""
        need = min(-(-(len(seq.tokens) + 1) // self._block_size), self._max_blocks)
        blocks = self.pool.allocate(need)
        if blocks is None:
            return False
        seq.add_blocks(blocks)
        return True

    def _enter_device(self, seq: Sequence) -> None:
        if seq.slot < 0:
            seq.slot = self._free_rows.pop()
        seq.resident_tokens = 0
        seq.move(State.RUNNING)
        self._entries += 1
        seq.entered = self._entries
        self.tracker.touch(seq)

    def _leave_device(self, seq: Sequence) -> None:
        """Give up row and blocks; copies under way keep their own hold on the blocks."""
        if seq.slot >= 0:
            self._free_rows.append(seq.slot)
            seq.slot = -1
        self.pool.release(seq.take_blocks())
        self.tracker.touch(seq)

    def _preempt(self, seq: Sequence, how: Preempt) -> None:
        if seq.state is not State.RUNNING:
            return
        seq.preemptions += 1
        filled = -(-seq.num_computed // self._block_size)
        offload = how is Preempt.OFFLOAD and self.config.offload
        if offload and filled > 0 and self._reserve_slots(seq, filled):
            self.stats.preempted_offload += 1
            first = seq.synced_blocks
            items = [
                (seq, i, int(seq.block_ids[i]), seq.host_slots[i]) for i in range(first, filled)
            ]
            if items:
                kept = [] if self.config.overlap_transfers else seq.block_ids[:first].tolist()
                self._transfers.start(Kind.OFFLOAD, items, kept)
                self.stats.offloaded_bytes += len(items) * self.executor.layout.block_bytes
            self._leave_device(seq)
            seq.move(State.OFFLOADING if items else State.PREEMPTED)
            return
        self.stats.preempted_recompute += 1
        self._leave_device(seq)
        self._drop_kv(seq)

    def _drop_kv(self, seq: Sequence) -> None:
        """Forget all KV of a sequence that holds no device blocks; it waits to be recomputed."""
        self._release_host(seq)
        seq.num_computed = 0
        seq.move(State.WAITING)
        self.tracker.touch(seq)

    def _reserve_slots(self, seq: Sequence, blocks: int) -> bool:
        """Make `seq` hold a host slot for each of its first `blocks` blocks."""
        missing = blocks - len(seq.host_slots)
        if missing > 0:
            slots = self._host.acquire(missing)
            if slots is None:
                return False
            seq.host_slots.extend(slots)
            self.tracker.touch(seq)
        return True

    def _release_host(self, seq: Sequence) -> None:
        self._transfers.release_slots(seq.host_slots)
        seq.host_slots = []
        seq.synced_blocks = 0
        self.tracker.touch(seq)

    def _resume(self, seq: Sequence) -> None:
        if seq.state is not State.PREEMPTED or not self._free_rows:
            return
        if not self.config.overlap_transfers and self._transfers.pending(Kind.OFFLOAD):
            return
        if not self._take_blocks(seq):
            return
        seq.slot = self._free_rows.pop()
        seq.move(State.LOADING)
        self.tracker.touch(seq)
        items = [
            (seq, i, int(seq.block_ids[i]), seq.host_slots[i]) for i in range(seq.synced_blocks)
        ]
        self._transfers.start(Kind.LOAD, items)
        self.stats.resumes += 1
        self.stats.loaded_bytes += len(items) * self.executor.layout.block_bytes

    def _schedule(self, plan: Plan) -> list[tuple[Sequence, int]]:
        """The part of the planned batch that has blocks; the rest waits for the next plan."""
        batch = []
        for seq, n in plan.batch:
            if seq.state is State.RUNNING and self._grow(seq, seq.num_computed + n):
                batch.append((seq, n))
        return batch

    def _grow(self, seq: Sequence, tokens: int) -> bool:
        missing = -(-tokens // self._block_size) - seq.num_blocks
        if missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is None:
                return False
            seq.add_blocks(blocks)
            self.tracker.touch(seq)
        return True

    def _force_progress(self) -> list[tuple[Sequence, int]]:
        """Nothing runs and nothing moves: a policy that holds back with an idle device is wrong,
        but no stream may die of it. Keep the oldest request and take the memory of the others."""
        logger.warning("policy %s left the device idle; serving the oldest", self.policy.name)
        oldest = min(self._sequences.values(), key=lambda s: s.arrival_s)
        for seq in self._sequences.values():
            if seq is not oldest and seq.state is State.RUNNING:
                self._preempt(seq, Preempt.RECOMPUTE)
        if oldest.state is State.WAITING:
            self._admit(oldest)
        elif oldest.state is State.PREEMPTED:
            self._resume(oldest)
        if oldest.state is not State.RUNNING:
            return []
        n = min(oldest.pending_tokens, self.config.max_batch_tokens)
        return self._schedule(Plan(batch=[(oldest, n)]))

    # -- copies ---------------------------------------------------------------------------------

    def _write_through(self, batch: list[tuple[Sequence, int]], now: float) -> None:
        """Copy filled blocks to the host beside the coming step, as many as it can hide.

        Fullest buffers first: they are the likeliest victims. [TokenFlow §5.1]
        """
        if self._transfers.pending(Kind.WRITE_THROUGH):
            return
        decodes = [seq for seq, n in batch if n == 1]
        prefill = sum(n for _, n in batch if n > 1)
        per_block = self.cost.offload_s(1)
        budget = _FIRST_CHUNK_BLOCKS
        if per_block > 0:
            context = sum(seq.num_computed for seq in decodes)
            budget = max(1, int(self.cost.step_s(len(decodes), context, prefill) / per_block))
        self.tracker.refresh()
        items: list[tuple[Sequence, int, int, int]] = []
        for seq in self._behind(now):
            full = seq.num_computed // self._block_size
            upto = min(full, seq.synced_blocks + budget - len(items))
            if not self._reserve_slots(seq, upto):
                break
            items += [
                (seq, i, int(seq.block_ids[i]), seq.host_slots[i])
                for i in range(seq.synced_blocks, upto)
            ]
            if len(items) >= budget:
                break
        if items:
            self._transfers.start(Kind.WRITE_THROUGH, items)
            copied = len(items) * self.executor.layout.block_bytes
            self.stats.offloaded_bytes += copied
            self.stats.written_through_bytes += copied

    def _behind(self, now: float) -> list[Sequence]:
        """Running sequences with filled blocks that are not on the host, fullest buffer first."""
        tracker = self.tracker
        rows = tracker.rows(State.RUNNING)
        rows = rows[tracker.synced[rows] < tracker.computed[rows] // self._block_size]
        return tracker.take(rows[np.argsort(-tracker.due_s[rows], kind="stable")])

    def _collect(self, timeout_s: float = 0.0) -> None:
        for job, done in self._transfers.collect(timeout_s):
            error = done.error
            if error is not None:
                self.stats.transfer_errors += 1
                logger.error("%s of %d blocks failed: %s", job.kind.value, len(job.blocks), error)
            elif job.kind is Kind.LOAD:
                self.cost.observe_load(len(job.blocks), done.seconds)
            else:
                self.cost.observe_offload(len(job.blocks), done.seconds)
            self._finish_job(job, error)

    def _finish_job(self, job: Job, error: Exception | None) -> None:
        if job.kind is Kind.WRITE_THROUGH:
            if error is None:
                for (seq, index), slot in zip(job.parts, job.slots, strict=True):
                    # The sequence may have ended, left or been dropped since: then the slot is
                    # not its own any more, or its blocks are being copied again.
                    current = index < len(seq.host_slots) and seq.host_slots[index] == slot
                    if current and seq.state is State.RUNNING and seq.synced_blocks == index:
                        seq.synced_blocks = index + 1
                        self.tracker.touch(seq)
            return
        for seq in dict.fromkeys(seq for seq, _ in job.parts):
            if job.kind is Kind.OFFLOAD:
                self._offloaded(seq, error)
            else:
                self._loaded(seq, error)

    def _offloaded(self, seq: Sequence, error: Exception | None) -> None:
        if seq.state is not State.OFFLOADING:
            return
        if error is not None:
            self._drop_kv(seq)
            return
        seq.synced_blocks = -(-seq.num_computed // self._block_size)
        seq.move(State.PREEMPTED)
        self.tracker.touch(seq)

    def _loaded(self, seq: Sequence, error: Exception | None) -> None:
        if seq.state is not State.LOADING:
            return
        if error is not None:
            self._leave_device(seq)
            self._drop_kv(seq)
            return
        # The last block goes on filling up on the device, so its host copy is stale from now on.
        seq.synced_blocks = seq.num_computed // self._block_size
        self._enter_device(seq)

    # -- running and handing out ----------------------------------------------------------------

    def _run(self, batch: list[tuple[Sequence, int]]) -> None:
        scheduled = []
        for seq, n in batch:
            start = seq.num_computed
            sample = start + n == len(seq.tokens)
            scheduled.append(
                ScheduledSequence(
                    slot=seq.slot,
                    token_ids=seq.tokens[start : start + n],
                    start=start,
                    block_ids=seq.block_ids,
                    sample=sample,
                    params=seq.params,
                    prompt_ids=seq.prompt_ids,
                    output_ids=seq.output_ids,
                    suppress_ids=self._text[seq.request_id].suppressed_ids if sample else (),
                )
            )
        begun = self._clock()
        result = self.executor.execute(scheduled)
        now = self._clock()
        stats = self.stats
        stats.steps += 1
        stats.step_seconds += now - begun
        decodes = prefill = context = 0
        unix_now = time.time()
        for (seq, n), token_id, logprobs in zip(
            batch, result.token_ids, result.logprobs, strict=True
        ):
            self.tracker.touch(seq)
            if seq.decoding:
                decodes += 1
                context += seq.num_computed
            else:
                prefill += n
                fresh = max(0, min(seq.num_computed + n, len(seq.prompt_ids)) - seq.num_computed)
                if seq.preemptions or seq.request.resumed_ids:
                    fresh = 0
                stats.prompt_tokens += fresh
                stats.recomputed_tokens += n - fresh
            seq.num_computed += n
            if token_id >= 0:
                self._take_token(seq, token_id, logprobs, now, unix_now)
        self.cost.observe_step(decodes, context, prefill, now - begun)

    def _take_token(
        self,
        seq: Sequence,
        token_id: int,
        logprobs: TokenLogprobs | None,
        now: float,
        unix_now: float,
    ) -> None:
        if seq.first_token_s is None:
            self.stats.observe_ttft(now - seq.arrival_s)
        seq.append(token_id, now)
        self.stats.generated_tokens += 1
        text, reason = self._text[seq.request_id].push(token_id)
        self._events.append(
            TokenEvent(
                seq.request_id,
                len(seq.output_ids) - 1,
                token_id,
                text,
                unix_now,
                logprobs,
                reason.value if reason else None,
            )
        )
        if reason is not None:
            self._forget(seq, reason)

    def _end_early(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._events.append(
            TokenEvent(
                seq.request_id,
                len(seq.output_ids),
                -1,
                "",
                time.time(),
                None,
                reason.value,
                error,
            )
        )
        self._forget(seq, reason)

    def _forget(self, seq: Sequence, reason: FinishReason) -> None:
        """Free everything a request holds; copies under way keep what they touch until they end."""
        self._leave_device(seq)
        self._release_host(seq)
        seq.move(State.FINISHED)
        self.tracker.remove(seq)
        self._elastic.pop(seq.request_id, None)
        del self._sequences[seq.request_id]
        del self._text[seq.request_id]
        stats = self.stats
        stats.finished[reason.value] = stats.finished.get(reason.value, 0) + 1
        self.lengths.observe(len(seq.output_ids), ended=reason is FinishReason.STOP)
        if seq.elastic:
            # Nobody reads along: every token counts, and no pause is seen.
            stats.effective_tokens += len(seq.buffers)
        else:
            stats.effective_tokens += effective_tokens(seq.buffers)
            stats.reader_stalls += seq.playback.stalls
            stats.reader_stall_seconds += seq.playback.stall_s
