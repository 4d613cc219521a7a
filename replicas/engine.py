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
from collections.abc import Sequence as Seq
from typing import Any

from tokenflow.replicas.buffers import take_buffers
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import CapacityError, InvalidRequestError, StepMemoryError
from tokenflow.replicas.executor.base import (
    Executor,
    ScheduledSequence,
    StepResult,
    TokenLogprobs,
)
from tokenflow.replicas.kv_cache import KVCache
from tokenflow.replicas.load import LoadMeter, LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.overload import OverloadReport, take_report
from tokenflow.replicas.request import FinishReason, ReaderChange, Request, Sequence, State
from tokenflow.replicas.scheduler.capacity import Load, assess, reference_rates
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.playback import effective_tokens
from tokenflow.replicas.scheduler.policy import Plan, Policy, Preempt, View
from tokenflow.replicas.scheduler.tracker import FloatArray, IntArray, Tracker
from tokenflow.replicas.stats import EngineStats
from tokenflow.replicas.steps import Step, StepRunner
from tokenflow.replicas.text import TextStream
from tokenflow.replicas.transfers import HostSlots
from tokenflow.replicas.write_through import WriteThrough

logger = logging.getLogger("tokenflow.engine")

# tokens/s; beyond them a reader's buffer is no sensible number any more.
_LOWEST_RATE = 1e-3
_HIGHEST_RATE = 1e6

_PACING_INTERVAL_S = 0.5

_TENANT_PER_FREE_PLACE = 8
"""Requests a tenant may have here per place that is free: however many come, another one finds
some. [dynamic thresholds: Choudhury and Hahne 1998]"""


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

    `tokenizer` is a Hugging Face tokenizer; `eos_ids` the model's end-of-sequence ids; `model`
    tells its KV from that of other checkpoints (`checkpoint_fingerprint`); `clock` a monotonic
    clock in seconds (a virtual one in simulations).
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
        model: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.policy = policy
        self.config = config
        self.max_model_len = min(max_model_len, executor.num_blocks * executor.layout.block_size)
        self.cost = CostModel()
        self.lengths = OutputLengths()
        self.stats = EngineStats()
        self.tracker = Tracker()
        self.overload = OverloadReport()
        """Taken now and then; another thread may read it."""
        self._meter = LoadMeter()
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._clock = clock
        self._block_size = executor.layout.block_size
        self._max_blocks = -(-self.max_model_len // self._block_size)
        self.kv = KVCache(
            executor,
            host,
            config,
            model=model,
            max_blocks=self._max_blocks,
            tracker=self.tracker,
            cost=self.cost,
            stats=self.stats,
        )
        self._write_through = WriteThrough(
            self.kv, self.tracker, self.cost, self.stats, executor.layout.block_bytes
        )
        self._sequences: dict[str, Sequence] = {}
        self._text: dict[str, TextStream] = {}
        self._elastic: dict[str, Sequence] = {}
        self._next_pacing_s = -math.inf
        self._next_assessment_s = -math.inf
        self._next_report_s = -math.inf
        self._events: list[TokenEvent] = []
        self._steps = StepRunner(executor, config, self.stats, clock)
        self._launched: Step | None = None
        """A step whose tokens are not known; each sequence in it that runs still has its slot."""
        self._finished_s = -math.inf
        self._busy = False
        """Whether steps have followed one another without a pause since then."""
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
        held = len(self._sequences)
        free = self.config.max_waiting - held
        full = free <= 0
        if request.tenant:
            full |= self.tracker.requests_of(request.tenant) >= _TENANT_PER_FREE_PLACE * free
        if full:
            raise CapacityError(f"This replica already holds {held} requests; try again later.")

    def known_keys(self, request: Request) -> list[bytes]:
        """Keys of all blocks that its prompt and resumed tokens fill, which `add` is then spared
        computing; safe from any thread."""
        tokens = (*request.prompt_ids, *request.resumed_ids)
        return self.kv.keys_of(tokens, request.cache_salt)

    def add(self, request: Request, keys: list[bytes] | None = None) -> None:
        """Queue a checked request; `keys` as by `known_keys`. Raises InvalidRequestError when its
        id is already in use."""
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"A request with id {request.request_id!r} is already running.", param="request_id"
            )
        check_rate(request.token_rate)
        seq = Sequence(request, self._max_blocks)
        seq.read_before(self._clock())
        text = TextStream(self._tokenizer, request.params, self._eos_ids)
        text.prime(request.resumed_ids)
        self._sequences[seq.request_id] = seq
        self._text[seq.request_id] = text
        self.tracker.add(seq)
        self.kv.add(seq, keys)
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

    def pause(self, request_id: str) -> bool:
        """Its reader consumes nothing from now on: it needs no token, and makes room for whoever
        does. False when it is not (or no longer) here."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        seq.playback.pause(self._clock())
        self.tracker.touch(seq)
        return True

    def resume(self, request_id: str) -> bool:
        """Its reader goes on where it paused. False when it is not (or no longer) here."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        seq.playback.resume(self._clock())
        self.tracker.touch(seq)
        return True

    def report_consumed(self, request_id: str, tokens: int) -> bool:
        """Its reader says how much of the output it has consumed; it goes on from there.

        False when it is not (or no longer) here. Raises InvalidRequestError for more tokens than
        the output has.
        """
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        if not 0 <= tokens <= seq.drawn:
            raise InvalidRequestError(
                f"consumed must be between 0 and the {seq.drawn} tokens of the output so "
                f"far, got {tokens}.",
                param="consumed",
            )
        seq.playback.report(tokens, self._clock())
        self.tracker.touch(seq)
        return True

    def change_reader(self, request_id: str, change: ReaderChange) -> bool:
        """Apply what a change has. False when the request is not (or no longer) here. Raises
        InvalidRequestError, with nothing changed after the value it names."""
        if request_id not in self._sequences:
            return False
        if change.token_rate is not None:
            self.set_rate(request_id, change.token_rate)
        if change.consumed is not None:
            self.report_consumed(request_id, change.consumed)
        if change.paused is not None:
            (self.pause if change.paused else self.resume)(request_id)
        return True

    def fail(self, request_id: str, message: str) -> None:
        """End a request with an error event."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._end_early(seq, FinishReason.ERROR, message)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._launched or self.kv.transfers.active)

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
        kv = self.kv
        kv.collect()
        begun = self._clock()
        self._pace_elastic(begun)
        plan = self.policy.plan(self._view(), begun)
        complete = self._apply(plan)
        batch = self._schedule([*plan.batch, *self._back_at_once(plan)])
        self.stats.schedule_seconds += self._clock() - begun
        self._note_load(plan.load, begun)
        moves = plan.preempt or kv.transfers.active or self._launched
        if not (batch or moves) and self._sequences:
            batch = self._force_progress() if complete else self._whoever_can()
        config = self.config
        if self.policy.write_through and config.write_through and config.offload:
            self._write_through.start(batch)
        if not (batch or self._launched):
            self._busy = False
            return self.refresh_stats()
        self._run(batch)
        self.refresh_stats()
        return True

    def wait_for_transfers(self, timeout_s: float) -> None:
        """Sleep until a copy ends, at most `timeout_s`."""
        self._busy = False
        self.kv.collect(timeout_s)
        self.refresh_stats()

    def refresh_stats(self) -> bool:
        """Bring the gauges up to date; returns False: nothing was run."""
        stats = self.stats
        tracker = self.tracker
        tracker.refresh()
        stats.now_waiting = tracker.count(State.WAITING)
        stats.now_running = tracker.count(State.RUNNING)
        stats.now_preempted = len(tracker) - stats.now_waiting - stats.now_running
        pool = self.kv.pool
        stats.now_free_blocks = pool.free_blocks
        stats.now_cached_blocks = pool.cached_blocks
        stats.now_total_blocks = pool.num_blocks
        stats.now_free_host_slots = self.kv.host.available()
        transfers, block_bytes = self.kv.transfers, self.executor.layout.block_bytes
        stats.now_offload_queue_bytes = transfers.queued(to_host=True) * block_bytes
        stats.now_load_queue_bytes = transfers.queued(to_host=False) * block_bytes
        stats.now_rate = float(tracker.rate[~tracker.paused].sum())
        if not len(tracker):
            stats.now_parked, stats.now_overloaded = 0, False
        now = self._clock()
        if now >= self._next_report_s or (not len(tracker) and self.overload.rate > 0):
            self._next_report_s = now + _PACING_INTERVAL_S
            self.overload = take_report(
                tracker,
                self.cost,
                kv_tokens=pool.num_blocks * self._block_size,
                max_num_seqs=self.config.max_num_seqs,
                expected=self._expected_lengths(),
                last=self.overload,
                now=now,
            )
            buffers = take_buffers(tracker, now)
            stats.now_readers, stats.now_dry_readers = buffers.readers, buffers.dry
            stats.now_buffer_quantiles_s = buffers.quantiles_s
        if self._meter.due(tracker, stats.requests, now):
            self._measure_load(now)
        return False

    @property
    def load(self) -> LoadReport:
        """The latest report for routers; safe from any thread."""
        return self._meter.report

    def _measure_load(self, now: float) -> None:
        pool, host, block = self.kv.pool, self.kv.host, self._block_size
        self._meter.take(
            self.tracker,
            self.cost,
            self.lengths,
            requests=self.stats.requests,
            prefilled=self.stats.prompt_tokens + self.stats.recomputed_tokens,
            device_tokens=pool.num_blocks * block,
            free_tokens=pool.free_blocks * block,
            host_tokens=host.capacity * block if self.config.offload else 0,
            block_size=block,
            max_num_seqs=self.config.max_num_seqs,
            longest=self.max_model_len,
            now=now,
        )

    def _expected_lengths(self) -> IntArray | FloatArray:
        return self.lengths.expected(self.tracker.limit, self.tracker.generated)

    def _note_load(self, load: Load | None, now: float) -> None:
        """The gauges of the load, as the policy saw it or, now and then, as it would be seen."""
        if load is None:
            if now < self._next_assessment_s:
                return
            self._next_assessment_s = now + _PACING_INTERVAL_S
            kv_tokens = self.kv.pool.num_blocks * self._block_size
            load = assess(
                self.tracker,
                self.cost,
                kv_tokens,
                self.config.max_num_seqs,
                self._expected_lengths(),
                self.lengths.prompts_per_output,
            )
        stats = self.stats
        stats.now_capacity = load.capacity if load.capacity < math.inf else 0.0
        stats.now_parked = load.parked
        stats.now_overloaded = load.overloaded

    def _view(self) -> View:
        self.tracker.refresh()
        kv = self.kv
        transfers = kv.transfers
        return View(
            tracker=self.tracker,
            free_blocks=kv.free_blocks,
            releasing_blocks=kv.releasing_blocks,
            total_blocks=kv.pool.num_blocks,
            free_host_slots=kv.host.available() if self.config.offload else 0,
            offload_queue=transfers.queued(to_host=True),
            load_queue=transfers.queued(to_host=False),
            block_size=self._block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_batch_tokens=self._steps.max_tokens,
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
        kv_tokens = self.kv.pool.num_blocks * self._block_size
        rates = reference_rates(
            self.tracker, self.cost, kv_tokens, self.config.max_num_seqs, self._expected_lengths()
        )
        if rates is None:
            return
        for seq in self._elastic.values():
            seq.playback.set_rate(float(rates[seq.row]), now)
            self.tracker.touch(seq)

    # -- applying a plan ------------------------------------------------------------------------

    def _apply(self, plan: Plan) -> bool:
        """Returns whether everybody came onto the device that was to: where blocks are shared, a
        victim may free less than the policy could know."""
        kv = self.kv
        for seq, how in plan.preempt:
            kv.preempt(seq, how)
        for seq in plan.drop:
            if seq.state is State.PREEMPTED:
                kv.drop(seq)
        resumed = [kv.resume(seq) for seq in plan.resume]
        admitted = [kv.admit(seq) for seq in plan.admit]
        return all(resumed) and all(admitted)

    def _back_at_once(self, plan: Plan) -> list[tuple[Sequence, int]]:
        """Shares of the step for those who were to be loaded, but had nothing to load."""
        left = self._steps.max_tokens - sum(n for _, n in plan.batch)
        batch = []
        for seq in plan.resume:
            n = min(left, seq.pending_tokens)
            if seq.state is State.RUNNING and n > 0:
                batch.append((seq, n))
                left -= n
        return batch

    def _schedule(self, wanted: Seq[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """The part of a planned batch that has blocks; the rest waits for the next plan.

        Of several who would compute the same block one does, and the others find it next time.
        """
        kv = self.kv
        batch = []
        computing: set[bytes] = set()
        for seq, n in wanted:
            # The last token of an output may be on its way.
            if seq.state is not State.RUNNING or seq.remaining_tokens <= 0:
                continue
            if seq.pending_tokens > 1:
                kv.reuse(seq)
                n = min(n, seq.pending_tokens)
                keys = kv.prefill_keys(seq, n)
                if keys and keys[0] in computing:
                    continue
                computing.update(keys)
            if kv.grow(seq, seq.num_computed + n):
                batch.append((seq, n))
        return batch

    def _whoever_can(self) -> list[tuple[Sequence, int]]:
        """The plan could not be carried out: one step of whatever is on the device."""
        running = self.tracker.take(self._view().running())
        return self._schedule([(seq, 1) for seq in running]) or self._force_progress()

    def _force_progress(self) -> list[tuple[Sequence, int]]:
        """Nothing runs and nothing moves: a policy that holds back with an idle device is wrong,
        but no stream may die of it. Keep the oldest request and take the memory of the others."""
        logger.warning("policy %s left the device idle; serving the oldest", self.policy.name)
        oldest = min(self._sequences.values(), key=lambda s: s.arrival_s)
        for seq in self._sequences.values():
            if seq is not oldest and seq.state is State.RUNNING:
                self.kv.preempt(seq, Preempt.RECOMPUTE)
        if oldest.state is State.WAITING:
            self.kv.admit(oldest)
        elif oldest.state is State.PREEMPTED:
            self.kv.resume(oldest)
        if oldest.state is not State.RUNNING:
            return []
        return self._schedule([(oldest, min(oldest.pending_tokens, self._steps.max_tokens))])

    # -- running and handing out ----------------------------------------------------------------

    def _run(self, batch: list[tuple[Sequence, int]]) -> None:
        """Run a step to its end; or, ahead, launch it and then take the tokens of the one before,
        which the device did not wait for."""
        step = self._start(batch) if batch else None
        if not self._steps.ahead:
            if step is not None:
                now = self._clock()
                self._advance(step)
                self._finish(step, step.result(), now)
            return
        launched, self._launched = self._launched, None
        if launched is not None:
            result = launched.result()
            self._finish(launched, result, self._clock())
        if step is not None:
            # Only now are all tokens known whose KV the step computes.
            self._advance(step)
            self._launched = step

    def _start(self, batch: list[tuple[Sequence, int]]) -> Step | None:
        try:
            return self._steps.start(batch, self._share)
        except StepMemoryError as error:
            self._end_early(batch[0][0], FinishReason.ERROR, f"Out of device memory: {error}")
            return None

    def _share(self, seq: Sequence, n: int) -> ScheduledSequence:
        start = seq.num_computed
        sample = start + n == len(seq.tokens)
        text = self._text[seq.request_id]
        return ScheduledSequence(
            slot=seq.slot,
            token_ids=seq.tokens[start : start + n],
            start=start,
            block_ids=seq.block_ids,
            sample=sample,
            params=seq.params,
            prompt_ids=seq.prompt_ids,
            output_ids=seq.output_ids,
            suppress_ids=text.suppressed_ids(seq.awaited) if sample else (),
        )

    def _advance(self, step: Step) -> None:
        """The step was started: from here on its KV counts as computed, and its tokens as drawn.
        Blocks that it fills are made known; whoever uses them runs after it."""
        stats = self.stats
        for seq, n, filled, sample in step.shares:
            if seq.state is State.FINISHED:
                continue  # by the token that was awaited when the step was launched
            self.tracker.touch(seq)
            if seq.decoding:
                step.decodes += 1
                step.context += seq.num_computed
            else:
                step.prefills.append((seq, n))
                fresh = max(0, min(seq.num_computed + n, len(seq.prompt_ids)) - seq.num_computed)
                if seq.preemptions or seq.request.resumed_ids:
                    fresh = 0
                stats.prompt_tokens += fresh
                stats.recomputed_tokens += n - fresh
            seq.num_computed += n
            self.kv.publish(seq, filled, seq.num_computed // self._block_size)
            if sample and self._steps.ahead:
                seq.await_token()

    def _finish(self, step: Step, result: StepResult, now: float) -> None:
        """Hand out what a step has drawn. A sequence may have ended since it was launched."""
        # Launched ahead, it began when the one before ended.
        begun = max(step.begun, self._finished_s)
        seconds = now - begun
        # What lies between two steps is part of what a token costs.
        spent_s = now - (self._finished_s if self._busy else begun)
        self._finished_s, self._busy = now, True
        self.stats.steps += 1
        self.stats.step_seconds += seconds
        unix_now = time.time()
        for seq, n in step.prefills:
            seq.note("prefill", tokens=n, seconds=seconds)
        for (seq, *_), token_id, logprobs in zip(
            step.shares, result.token_ids, result.logprobs, strict=True
        ):
            if token_id >= 0 and seq.state is not State.FINISHED:
                self.tracker.touch(seq)
                self._take_token(seq, token_id, logprobs, now, unix_now)
        prefill = sum(n for _, n in step.prefills)
        self.cost.observe_step(step.decodes, step.context, prefill, spent_s)

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
        if not seq.drawn:
            seq.note("first_token")
        # A moved request's figure was told by the replica that drew its first token.
        cached_tokens = 0 if seq.drawn else seq.cached_tokens
        seq.append(token_id, now)
        self.stats.generated_tokens += 1
        text, reason = self._text[seq.request_id].push(token_id)
        if reason is not None:
            self._forget(seq, reason)
        self._events.append(
            TokenEvent(
                seq.request_id,
                len(seq.output_ids) - 1,
                token_id,
                text,
                unix_now,
                logprobs,
                reason.value if reason else None,
                cached_tokens=cached_tokens,
                notes=seq.take_notes(),
            )
        )

    def _end_early(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._forget(seq, reason)
        self._events.append(
            TokenEvent(
                seq.request_id,
                seq.drawn,
                -1,
                "",
                time.time(),
                None,
                reason.value,
                error,
                notes=seq.take_notes(),
            )
        )

    def _forget(self, seq: Sequence, reason: FinishReason) -> None:
        self.kv.forget(seq)
        seq.move(State.FINISHED)
        self.tracker.remove(seq)
        self._elastic.pop(seq.request_id, None)
        del self._sequences[seq.request_id]
        del self._text[seq.request_id]
        self._busy &= bool(self._sequences)
        stats = self.stats
        stats.finished[reason.value] = stats.finished.get(reason.value, 0) + 1
        self.lengths.observe(
            seq.drawn,
            ended=reason is FinishReason.STOP,
            prompt_tokens=len(seq.prompt_ids) - seq.cached_tokens,
        )
        if seq.elastic:
            # Nobody reads along: every token counts, and no pause is seen.
            stats.effective_tokens += len(seq.buffers)
        else:
            stats.effective_tokens += effective_tokens(seq.buffers)
            stats.reader_stalls += seq.playback.stalls
            stats.reader_stall_seconds += seq.playback.stall_s
