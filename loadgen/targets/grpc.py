"""tokenflow.v1.Inference over one gRPC channel."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

import grpc

from tokenflow.client.requests import generate_request
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub
from tokenflow.loadgen.description import GrpcServer
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.prompts import id_prompt, text_prompt
from tokenflow.loadgen.targets.base import Behaver, Clock, Opened, TargetError, Turn
from tokenflow.loadgen.workload import Ask

_CONNECT_TIMEOUT_S = 10.0


# Channels to one address share a connection otherwise, and HTTP/2 servers take a hundred streams on
# each: what waits for one never gets to the server.
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class GrpcTarget:
    """A cluster's gRPC endpoint."""

    def __init__(
        self,
        server: GrpcServer,
        *,
        content: str = "words",
        clock: Clock = time.monotonic,
    ) -> None:
        self._address = server.address
        self._content = content
        self._clock = clock
        self._vocab_size = 0
        self._channel: grpc.aio.Channel | None = None
        self._stub: InferenceStub | None = None

    async def open(self) -> Opened:
        """Raises TargetError when it does not answer."""
        self._channel = grpc.aio.insecure_channel(self._address, options=_OWN_CONNECTION)
        self._stub = InferenceStub(self._channel)
        try:
            info = await self._stub.GetModelInfo(
                pb.GetModelInfoRequest(), timeout=_CONNECT_TIMEOUT_S, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            await self.close()
            raise TargetError(
                f"cannot reach tokenflow.v1.Inference at {self._address}: {_status(error)}. Is "
                "`tokenflow serve` running there?"
            ) from None
        self._vocab_size = info.vocab_size
        return Opened(f"grpc://{self._address}", info.model)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def sample(self) -> dict[str, float] | None:
        return None

    def build(self, ask: Ask) -> Any:
        if self._content == "ids":
            return id_prompt(ask, self._vocab_size)
        return text_prompt(ask, self._content)

    def asked(self, built: Any) -> str:
        return str(built)

    async def stream(self, ask: Ask, built: Any, history: Seq[Turn], record: StreamRecord) -> None:
        assert self._stub is not None
        call = self._stub.Generate(_request(ask, built, history))
        record.sent_s = self._clock()
        behaver = Behaver(ask.behaviour, self._clock)
        try:
            async for message in call:
                if message.token_ids:
                    record.arrivals.append((self._clock(), len(message.token_ids)))
                    record.generated += message.generated_at_unix_s
                record.text += message.text
                if message.finish_reason:
                    record.finish_reason = message.finish_reason
                    record.prompt_tokens = message.usage.prompt_tokens
                if await behaver.leaves(record):
                    break
        except grpc.aio.AioRpcError as error:
            record.error = _status(error)
        finally:
            call.cancel()
            record.finished_s = self._clock()
        if record.error is None and record.finish_reason is None:
            record.error = "the stream ended without a finish reason"


def _request(ask: Ask, built: Any, history: Seq[Turn]) -> pb.GenerateRequest:
    prompt = built
    if isinstance(built, str):
        prompt = []
        for turn in history:
            prompt.append({"role": "user", "content": turn.asked})
            prompt.append({"role": "assistant", "content": turn.answered})
        prompt.append({"role": "user", "content": built})
    return generate_request(
        prompt,
        token_rate=ask.token_rate,
        resumable=False,
        max_tokens=ask.output_tokens,
        min_tokens=ask.output_tokens,
        ignore_eos=True,
        seed=ask.seed,
    )


def _status(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"[:300]
