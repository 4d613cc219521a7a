"""The engine inside this process: what is measured is the engine, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenflow.cluster.config import embedded_model
from tokenflow.loadgen.arrivals import first_problem
from tokenflow.loadgen.description import InProcess
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.prompts import id_prompt, text_prompt
from tokenflow.loadgen.targets.base import Behaver, Clock, Opened, Turn
from tokenflow.loadgen.workload import Ask
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import ConfigError, TokenFlowError
from tokenflow.replicas.factory import (
    build_engine,
    free_memory_bytes,
    inspect_model,
    plan_blocks,
    private_host_memory,
    resolve_device,
)
from tokenflow.replicas.loop import EngineLoop
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.simulator.executor import SimHost
from tokenflow.replicas.tokenizer import load_tokenizer


def engine_config(policy: str, options: dict[str, Any], **fixed: Any) -> EngineConfig:
    """Raises ConfigError that names the option."""
    try:
        return EngineConfig.model_validate({"policy": policy, **options, **fixed})
    except ValidationError as error:
        raise ConfigError(f"target: {first_problem(error)}.") from None


class EngineTarget:
    """An engine on its own thread. Times are the event loop's when the events reach it."""

    def __init__(
        self,
        settings: InProcess,
        *,
        content: str = "words",
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises ConfigError for unknown options."""
        self._directory = Path(settings.model) if settings.model else embedded_model()
        self._config = engine_config(
            settings.policy, settings.options, kv_tokens=settings.kv_tokens
        )
        self._host_slots = settings.host_kv_tokens // self._config.block_size
        self._content = content
        self._clock = clock
        self._loop: EngineLoop | None = None
        self._events: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, asyncio.Queue[tuple[float, TokenEvent]]] = {}
        self._made = 0

    async def open(self) -> Opened:
        """Load the model. Raises CheckpointError or ConfigError when it cannot be run here."""
        device = resolve_device(self._config.device)
        spec = inspect_model(self._directory, self._config, device)
        memory_bytes = free_memory_bytes(device, self._config.tensor_parallel)
        blocks = plan_blocks(spec, self._config, available_bytes=memory_bytes)
        layout = spec.kv_layout(self._config.block_size)
        self._tokenizer = load_tokenizer(self._directory)
        self._vocab_size = spec.vocab_size
        self._events = asyncio.get_running_loop()
        engine = build_engine(
            self._directory,
            self._config,
            SimHost(self._host_slots),
            host_memory=private_host_memory(self._host_slots, layout, self._config.tensor_parallel),
            device=device,
            num_blocks=blocks,
        )
        self._loop = EngineLoop(engine, self._emit, self._died)
        self._loop.start()
        name = f"engine in process ({device}, {blocks * self._config.block_size} KV tokens)"
        return Opened(f"{name}, policy {self._config.policy}", self._directory.resolve().name)

    async def close(self) -> None:
        if self._loop is not None:
            await asyncio.to_thread(self._loop.stop)

    async def sample(self) -> dict[str, float] | None:
        assert self._loop is not None
        stats = self._loop.stats
        return {
            "waiting": stats.now_waiting,
            "running": stats.now_running,
            "preempted": stats.now_preempted,
        }

    def build(self, ask: Ask) -> Any:
        if self._content == "ids":
            return id_prompt(ask, self._vocab_size)
        return text_prompt(ask, self._content, self._tokenizer.backend_tokenizer)

    def asked(self, built: Any) -> str:
        return str(built)

    async def stream(self, ask: Ask, built: Any, history: Seq[Turn], record: StreamRecord) -> None:
        assert self._loop is not None
        self._made += 1
        request_id = f"{self._made}"
        events = self._waiting[request_id] = asyncio.Queue()
        behaver = Behaver(ask.behaviour, self._clock)
        record.sent_s = self._clock()
        try:
            prompt = built if not isinstance(built, str) else self._encode(built, history)
            record.prompt_tokens = len(prompt)
            self._loop.submit(
                Request(
                    request_id=request_id,
                    prompt_ids=tuple(prompt),
                    params=SamplingParams(
                        max_tokens=ask.output_tokens, ignore_eos=True, seed=ask.seed
                    ),
                    token_rate=ask.token_rate,
                )
            )
            while record.finish_reason is None and record.error is None:
                self._take(*await events.get(), record)
                if await behaver.leaves(record):
                    break
        except TokenFlowError as error:
            record.error = str(error)
        finally:
            record.finished_s = self._clock()
            self._loop.cancel(request_id)
            del self._waiting[request_id]

    def _encode(self, built: str, history: Seq[Turn]) -> list[int]:
        said = "".join(f"{turn.asked}{turn.answered}\n" for turn in history)
        ids: list[int] = self._tokenizer.encode(said + built)
        return ids

    def _take(self, at: float, event: TokenEvent, record: StreamRecord) -> None:
        if event.token_id >= 0:
            record.arrivals.append((at, 1))
            record.generated.append(event.generated_at)
        record.text += event.text
        if event.finish_reason == "error":
            record.error = event.error
        else:
            record.finish_reason = event.finish_reason

    def _emit(self, events: list[TokenEvent]) -> None:
        """Engine thread: one hand-over per step."""
        assert self._events is not None
        self._events.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        now = self._clock()
        for event in events:
            queue = self._waiting.get(event.request_id)
            if queue is not None:
                queue.put_nowait((now, event))

    def _died(self, error: BaseException) -> None:
        assert self._events is not None
        self._events.call_soon_threadsafe(self._fail_all, f"the engine has failed: {error}")

    def _fail_all(self, reason: str) -> None:
        for request_id, queue in self._waiting.items():
            event = TokenEvent(request_id, 0, -1, "", 0.0, None, "error", reason)
            queue.put_nowait((self._clock(), event))
