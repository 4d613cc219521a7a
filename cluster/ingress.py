"""The ingress deployment: the doors of the cluster, HTTP (OpenAI-compatible) and gRPC.

It checks, tokenizes, opens streams and frames the answers. What a request may look like is in
`api/` and `rpc/`, what a stream is in `streams.py`; here they meet.
"""

# Serve pickles the class by value while this module is being imported. So: what it uses is defined
# above it or imported, and there is no `from __future__ import annotations`, whose strings FastAPI
# could not resolve in the copy.

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from starlette.exceptions import HTTPException

from tokenflow.cluster.admission import admitted
from tokenflow.cluster.api.errors import error_body, http_error
from tokenflow.cluster.api.framing import (
    DONE,
    HEARTBEAT,
    Answer,
    model_body,
    new_id,
    sse,
    usage_body,
)
from tokenflow.cluster.api.http import read_body, refusal
from tokenflow.cluster.api.protocol import (
    Call,
    build_sampling,
    check_model,
    parse_body,
    parse_chat,
    parse_completion,
    text_timeout,
)
from tokenflow.cluster.config import parse_config
from tokenflow.cluster.generation import Generation, choice_seed
from tokenflow.cluster.metrics import render
from tokenflow.cluster.placing import asks_of
from tokenflow.cluster.prompts import PromptEncoder
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.mapping import call_from, response_from
from tokenflow.cluster.rpc.servicer import check_message, metadata_value, rpc_failure
from tokenflow.cluster.streams import StreamManager
from tokenflow.replicas.errors import CapacityError, EngineDeadError
from tokenflow.replicas.output import TokenEvent

app = FastAPI(title="TokenFlow", docs_url=None, redoc_url=None, openapi_url=None)

_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_TIMEOUT = "x-request-timeout-s"
_INFO_TIMEOUT_S = 5.0
_HEARTBEAT_S = 1.0
_PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _usage(generation: Generation) -> dict[str, Any]:
    used = generation.usage
    return usage_body(used.prompt_tokens, used.completion_tokens, used.cached_tokens)


@app.exception_handler(HTTPException)
async def _http_exception(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(http_error(error.status_code, str(error.detail)), error.status_code)


@app.exception_handler(Exception)
async def _any_exception(_: Request, error: Exception) -> JSONResponse:
    return refusal(error)


@serve.ingress(app)
class Ingress:
    """One ingress process; it owns the streams of its clients."""

    def __init__(self, replica: Any, config_tree: dict[str, Any]) -> None:
        config = parse_config(config_tree)
        self._limits = config.limits
        self._delay_s = config.ingress.coalesce_delay_s
        self._name = config.model.name
        self._created = int(time.time())
        self._encoder = PromptEncoder(config.model.directory)
        self._streams = StreamManager(replica, failover_timeout_s=config.ingress.failover_timeout_s)
        self._info: dict[str, Any] | None = None

    # -- HTTP -----------------------------------------------------------------------------------

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    @app.get("/v1/models")
    async def models(self) -> Response:
        try:
            info = await self._model_info()
        except Exception as error:
            return refusal(error)
        card = model_body(self._name, self._created, info["max_model_len"])
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        try:
            check_model(name, [self._name])
            info = await self._model_info()
        except Exception as error:
            return refusal(error)
        return JSONResponse(model_body(self._name, self._created, info["max_model_len"]))

    @app.get("/health")
    async def health(self) -> Response:
        """200 when a replica answers, 503 when none does."""
        try:
            await self._streams.info(_INFO_TIMEOUT_S)
        except Exception as error:
            return refusal(error)
        return Response(status_code=200)

    @app.get("/metrics")
    async def metrics(self) -> Response:
        with contextlib.suppress(EngineDeadError):
            await self._model_info()  # the first call of all makes the replicas known
        text = render(
            await self._streams.stats(),
            ingress=self._streams.ingress_id,
            streams=self._streams.active,
            failovers=self._streams.failovers,
        )
        return Response(text, media_type=_PROMETHEUS_TYPE)

    async def _answer(self, request: Request, parse: Callable[..., Call]) -> Response:
        try:
            body = parse_body(await read_body(request, self._limits), self._limits)
            call = parse(
                body,
                model_names=[self._name],
                limits=self._limits,
                header_rate=request.headers.get("x-token-rate"),
            )
            call = self._with_timeout(
                call, request.headers.get(_TIMEOUT), "The header X-Request-Timeout-S"
            )
            # Refusals come out here, before anything is sent: they get a real status.
            generation = await self._start(call)
        except Exception as error:
            return refusal(error)
        answer = Answer(call, generation.id, self._name, self._encoder.token_text)
        echo = self._echo(call, generation)
        if call.stream:
            return StreamingResponse(
                self._events(call, generation, answer, echo),
                media_type="text/event-stream",
                headers=_SSE_HEADERS,
            )
        try:
            # When the client leaves, Serve cancels this, and the finally below ends the streams.
            events = await self._collect(generation)
        except Exception as error:
            return refusal(error)
        finally:
            generation.close()
        return JSONResponse(answer.whole(events, _usage(generation), echo))

    async def _events(
        self, call: Call, generation: Generation, answer: Answer, echo: list[str]
    ) -> AsyncIterator[bytes]:
        """The body of a stream. When the client leaves, it is closed, and that cancels."""

        updates = generation.updates(self._delay_s, _HEARTBEAT_S)
        try:
            yield answer.opening(len(generation.streams), echo)
            async for update in updates:
                if update.events:
                    yield answer.chunk(update.choice, update.events, partial(_usage, generation))
                else:
                    # Only a write tells that a client has left; one that waits must not be
                    # served after it went.
                    yield HEARTBEAT
            yield answer.closing(_usage(generation))
        except Exception as error:
            # The status is long sent; OpenAI's clients read an error from the stream itself.
            yield sse(error_body(error)[1]) + DONE
        finally:
            await updates.aclose()
            generation.close()

    async def _collect(self, generation: Generation) -> list[list[TokenEvent]]:
        events: list[list[TokenEvent]] = [[] for _ in generation.streams]
        # Nobody reads along: tokens may wait for each other.
        async for update in generation.updates(max(1.0, self._delay_s)):
            events[update.choice] += update.events
        return events

    # -- gRPC -----------------------------------------------------------------------------------

    async def Generate(
        self, request: Any, grpc_context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """tokenflow.v1.Inference/Generate."""
        try:
            check_message(request, self._limits)
            call = call_from(
                request,
                model_names=[self._name],
                limits=self._limits,
                metadata_rate=metadata_value(grpc_context, "x-token-rate"),
            )
            call = self._with_timeout(
                call, metadata_value(grpc_context, _TIMEOUT), f"The metadata {_TIMEOUT}"
            )
            generation = await self._start(call)
        except CapacityError as error:
            # Of a call that fails Serve drops the trailing metadata, of one that ends it does not.
            rpc_failure(grpc_context, error)
            return
        except Exception as error:
            raise rpc_failure(grpc_context, error) from None
        updates = generation.updates(self._delay_s)
        try:
            async for update in updates:
                last = update.events[-1].finish_reason is not None
                yield response_from(
                    generation.id, update.events, generation.usage if last else None
                )
        except Exception as error:
            raise rpc_failure(grpc_context, error) from None
        finally:
            await updates.aclose()
            generation.close()

    async def GetModelInfo(self, request: Any, grpc_context: Any) -> pb.GetModelInfoResponse:
        """tokenflow.v1.Inference/GetModelInfo."""
        try:
            check_message(request, self._limits)
            info = await self._model_info()
        except Exception as error:
            raise rpc_failure(grpc_context, error) from None
        return pb.GetModelInfoResponse(
            model=self._name,
            max_model_len=info["max_model_len"],
            vocab_size=info["vocab_size"],
            default_token_rate=self._limits.default_token_rate,
        )

    async def Cancel(self, request: Any, grpc_context: Any) -> pb.CancelResponse:
        """tokenflow.v1.Inference/Cancel. The cancelled stream ends with its status CANCELLED."""
        try:
            check_message(request, self._limits)
            streams = self._streams.find(request.request_id) if request.request_id else []
            for stream in streams:
                self._streams.cancel(stream)
        except Exception as error:
            raise rpc_failure(grpc_context, error) from None
        return pb.CancelResponse(found=bool(streams))

    # -- both -----------------------------------------------------------------------------------

    async def _start(self, call: Call) -> Generation:
        """Tokenize and open the streams. Raises what the client must be told."""
        info = await self._model_info()
        prompts = await self._encoder.encode(call, vocab_size=info["vocab_size"])

        def sampling(prompt_tokens: int, choice: int) -> Any:
            return build_sampling(
                call,
                prompt_tokens=prompt_tokens,
                max_model_len=info["max_model_len"],
                vocab_size=info["vocab_size"],
                seed=choice_seed(call.sampling.seed, choice),
            )

        deadline_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        with admitted(
            asks_of(call, prompts, sampling),
            max_ttft_s=self._limits.max_predicted_ttft_s,
            time_left_s=call.timeout_s,
        ):
            return await Generation.start(
                self._streams,
                new_id(call),
                prompts,
                call.n,
                sampling,
                call.token_rate,
                call.cache_salt,
                deadline_s,
            )

    def _with_timeout(self, call: Call, text: str | None, where: str) -> Call:
        """The call with the timeout that came beside it, unless it has one in itself."""
        if text is None or call.timeout_s is not None:
            return call
        return replace(call, timeout_s=text_timeout(text, where, self._limits))

    def _echo(self, call: Call, generation: Generation) -> list[str]:
        """The prompt's text of each choice, if the call wants it back."""
        if not call.echo:
            return []
        texts = [
            prompt if isinstance(prompt, str) else self._encoder.decode(ids)
            for prompt, ids in zip(call.prompts, generation.prompts, strict=True)
        ]
        return [text for text in texts for _ in range(call.n)]

    async def _model_info(self) -> dict[str, Any]:
        if self._info is None:
            self._info = await self._streams.info(_INFO_TIMEOUT_S)
        return self._info
