"""The ingress deployment: the doors of the cluster, HTTP (OpenAI-compatible) and gRPC.

It checks, tokenizes, opens streams and frames the answers. What a request may look like is in
`api/` and `rpc/`, what a stream is in `streams.py`; here they meet.
"""

# Serve pickles the class by value while this module is being imported. So: what it uses is defined
# above it or imported, and there is no `from __future__ import annotations`, whose strings FastAPI
# could not resolve in the copy.

import asyncio
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

from tokenflow.cluster.admission import admitted, favoured
from tokenflow.cluster.api.errors import error_body, http_error
from tokenflow.cluster.api.framing import (
    HEARTBEAT,
    Answer,
    model_body,
    new_id,
    usage_body,
)
from tokenflow.cluster.api.http import given, read_body, refusal
from tokenflow.cluster.api.progress import ALL_SENT, parse_progress
from tokenflow.cluster.api.protocol import (
    Call,
    build_sampling,
    check_model,
    parse_body,
    parse_change,
    parse_chat,
    parse_completion,
    text_timeout,
)
from tokenflow.cluster.authentication import Authenticator, KeyFile, Principal
from tokenflow.cluster.config import parse_config
from tokenflow.cluster.control import StreamControl
from tokenflow.cluster.generation import Generation, choice_seed
from tokenflow.cluster.journal import Journal, Record
from tokenflow.cluster.logs import adopt_engine_logs
from tokenflow.cluster.metrics import render
from tokenflow.cluster.placing import asks_of
from tokenflow.cluster.prompts import PromptEncoder
from tokenflow.cluster.quotas import Demand
from tokenflow.cluster.reconnect import Context, Kept, Reconnections, unknown_request
from tokenflow.cluster.replica_registry import REGISTRY
from tokenflow.cluster.routing import counted_rate
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.mapping import call_from, change_from, response_from
from tokenflow.cluster.rpc.probes import Probes
from tokenflow.cluster.rpc.servicer import check_message, metadata_of, metadata_value, rpc_failure
from tokenflow.cluster.stream_mover import StreamMover
from tokenflow.cluster.streams import StreamManager
from tokenflow.cluster.tenancy import scoped_id
from tokenflow.cluster.tracing import Tracing
from tokenflow.replicas.errors import CapacityError, EngineDeadError
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import ReaderChange
from tokenflow.replicas.sampling.params import SamplingParams

app = FastAPI(title="TokenFlow", docs_url=None, redoc_url=None, openapi_url=None)

_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_TIMEOUT = "x-request-timeout-s"
_INFO_TIMEOUT_S = 5.0
_HEARTBEAT_S = 1.0
_PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _usage(generation: Generation) -> dict[str, Any]:
    used = generation.usage
    return usage_body(used.prompt_tokens, used.completion_tokens, used.cached_tokens)


def _refused(record: Record, error: Exception) -> JSONResponse:
    """The answer to a request that ends with an error before anything is sent."""
    response = refusal(error)
    record.end(response.status_code, type(error).__name__)
    return response


def _rpc_failed(record: Record, grpc_context: Any, error: Exception) -> Exception:
    """What a call that ends with an error is to raise."""
    failure = rpc_failure(grpc_context, error)
    record.end(failure.code.name, type(error).__name__)
    return failure


@app.exception_handler(HTTPException)
async def _http_exception(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(http_error(error.status_code, str(error.detail)), error.status_code)


@app.exception_handler(Exception)
async def _any_exception(_: Request, error: Exception) -> JSONResponse:
    return refusal(error)


@serve.ingress(app)
class Ingress(Probes):
    """One ingress process; it owns the streams of its clients."""

    def __init__(self, replica: Any, config_tree: dict[str, Any]) -> None:
        config = parse_config(config_tree)
        adopt_engine_logs()
        self._limits = config.limits
        self._ingresses = config.ingress.count
        self._delay_s = config.ingress.coalesce_delay_s
        self._name = config.model.name
        self._created = int(time.time())
        self._encoder = PromptEncoder(config.model.directory)
        self._streams = StreamManager(
            replica,
            failover_timeout_s=config.ingress.failover_timeout_s,
            replica_silence_s=config.ingress.replica_silence_s,
        )
        self._tracing = Tracing(config.tracing) if config.tracing.endpoint else None
        self._journal = Journal(self._streams.ingress_id, self._name, self._tracing)
        self._reconnections = Reconnections(self._streams, config.ingress.reconnect_grace_s)
        self._control = StreamControl(self._streams)
        self._mover = StreamMover(self._streams, config.ingress.rebalance_interval_s)
        self._info: dict[str, Any] | None = None
        self._who = Authenticator(None)
        if (path := config.security.keys_path) is not None:
            file = KeyFile(path)
            self._who = Authenticator(file.keys, share=1 / self._ingresses)
            following = file.follow(self._who, self._journal.metrics.keys_stale)
            self._following = asyncio.get_event_loop().create_task(following)

    # -- HTTP -----------------------------------------------------------------------------------

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer("completions", request, parse_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._answer("chat", request, parse_chat)

    @app.get("/v1/streams/{request_id:path}")
    async def resume(self, request: Request, request_id: str) -> Response:
        """Goes on with a resumable stream after the event that Last-Event-ID names."""
        record = self._journal.open("resume", request.headers)
        try:
            with record.leaving():
                kept = await self._find(self._principal(request), request_id)
                generation, call = kept.generation, kept.context.call
                record.started(generation, call)
                choices = len(generation.streams)
                place = request.headers.get("last-event-id")
                progress = parse_progress(place, request_id, choices)
                if progress.closing == ALL_SENT:
                    # To an EventSource this says not to come again.
                    record.end(204)
                    return Response(status_code=204)
                had = [progress.tokens(choice) for choice in range(choices)]
                self._reconnections.read(kept, had)
        except Exception as error:
            return _refused(record, error)
        answer = Answer(
            call,
            generation.public_id,
            self._name,
            self._encoder.token_text,
            created=kept.context.created,
            progress=progress,
        )
        return self._streaming(call, generation, answer, had, record)

    @app.post("/v1/streams/{request_id:path}")
    async def change(self, request: Request, request_id: str) -> Response:
        """Changes a running request: token_rate, paused, consumed."""
        try:
            principal = self._principal(request)
            body = parse_body(await read_body(request, self._limits), self._limits)
            await self._change(principal, request_id, parse_change(body, self._limits))
        except Exception as error:
            return refusal(error)
        return JSONResponse({"id": request_id})

    @app.delete("/v1/streams/{request_id:path}")
    async def cancel(self, request: Request, request_id: str) -> Response:
        """Ends a running request."""
        try:
            if not await self._cancel(self._principal(request), request_id):
                raise unknown_request(request_id)
        except Exception as error:
            return refusal(error)
        return JSONResponse({"id": request_id, "cancelled": True})

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        try:
            self._principal(request)
            info = await self._model_info()
        except Exception as error:
            return refusal(error)
        card = model_body(self._name, self._created, info["max_model_len"])
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(self, request: Request, name: str) -> Response:
        try:
            self._principal(request)
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
            moves=self._streams.moves,
            own=self._journal.metrics.registry,
        )
        return Response(text, media_type=_PROMETHEUS_TYPE)

    async def _answer(self, api: str, request: Request, parse: Callable[..., Call]) -> Response:
        record = self._journal.open(api, request.headers)
        try:
            with record.leaving():
                principal = self._principal(request)
                body = parse_body(await read_body(request, self._limits), self._limits)
                call = parse(
                    body,
                    model_names=[self._name],
                    limits=self._limits,
                    headers=given(request),
                )
                call = self._with_timeout(
                    call, request.headers.get(_TIMEOUT), "The header X-Request-Timeout-S"
                )
                # Refusals come out here, before anything is sent: they get a real status.
                generation = await self._start(call, principal, record)
        except Exception as error:
            return _refused(record, error)
        answer = Answer(call, generation.public_id, self._name, self._encoder.token_text)
        if call.stream:
            return self._streaming(call, generation, answer, [], record)
        try:
            # When the client leaves, Serve cancels this, and the finally below ends the streams.
            with record.leaving():
                events = await self._collect(generation, record)
        except Exception as error:
            return _refused(record, error)
        finally:
            generation.close()
        record.end(200)
        echo = self._echo(call, generation)
        return JSONResponse(answer.whole(events, _usage(generation), echo))

    def _streaming(
        self,
        call: Call,
        generation: Generation,
        answer: Answer,
        had: list[int],
        record: Record,
    ) -> Response:
        """The response for a reader who has `had` tokens of each choice; empty = a new one."""
        return StreamingResponse(
            self._events(call, generation, answer, had, record),
            media_type="text/event-stream",
            headers=_SSE_HEADERS,
        )

    async def _events(
        self,
        call: Call,
        generation: Generation,
        answer: Answer,
        had: list[int],
        record: Record,
    ) -> AsyncIterator[bytes]:
        """The body of a stream. When the client leaves, it is closed."""
        reader = generation.reader
        updates = generation.updates(self._delay_s, _HEARTBEAT_S)
        try:
            yield answer.opening(len(generation.streams), self._echo(call, generation))
            for choice, tokens in enumerate(had):
                answer.skip(choice, generation.streams[choice].history[:tokens])
            async for update in updates:
                if update.events:
                    record.sent(sum(event.token_id >= 0 for event in update.events))
                    yield answer.chunk(update.choice, update.events, partial(_usage, generation))
                else:
                    # Only a write tells that a client has left; one that waits must not be
                    # served after it went.
                    yield HEARTBEAT
            record.end(200)
            yield answer.closing(_usage(generation))
        except Exception as error:
            # The status is long sent; OpenAI's clients read an error from the stream itself.
            status, body, _ = error_body(error)
            record.end(status, type(error).__name__)
            yield answer.failure(body)
        finally:
            record.left()
            await updates.aclose()
            self._left(generation, reader)

    async def _collect(self, generation: Generation, record: Record) -> list[list[TokenEvent]]:
        events: list[list[TokenEvent]] = [[] for _ in generation.streams]
        # Nobody reads along: tokens may wait for each other.
        async for update in generation.updates(max(1.0, self._delay_s)):
            events[update.choice] += update.events
            record.sent(sum(event.token_id >= 0 for event in update.events))
        return events

    # -- gRPC -----------------------------------------------------------------------------------

    async def Generate(
        self, request: Any, grpc_context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """tokenflow.v1.Inference/Generate."""
        record = self._journal.open("grpc", metadata_of(grpc_context))
        try:
            with record.leaving():
                principal = self._caller(grpc_context)
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
                generation = await self._start(call, principal, record)
        except CapacityError as error:
            # Of a call that fails Serve drops the trailing metadata, of one that ends it does not.
            _rpc_failed(record, grpc_context, error)
            return
        except Exception as error:
            raise _rpc_failed(record, grpc_context, error) from None
        async for message in self._messages(generation, grpc_context, record):
            yield message

    async def _messages(
        self, generation: Generation, grpc_context: Any, record: Record
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        reader = generation.reader
        updates = generation.updates(self._delay_s)
        try:
            async for update in updates:
                last = update.events[-1].finish_reason is not None
                record.sent(sum(event.token_id >= 0 for event in update.events))
                yield response_from(
                    generation.public_id, update.events, generation.usage if last else None
                )
            record.end("OK")
        except Exception as error:
            raise _rpc_failed(record, grpc_context, error) from None
        finally:
            record.left()
            await updates.aclose()
            self._left(generation, reader)

    async def Resume(
        self, request: Any, grpc_context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """tokenflow.v1.Inference/Resume."""
        record = self._journal.open("grpc-resume", metadata_of(grpc_context))
        try:
            with record.leaving():
                principal = self._caller(grpc_context)
                check_message(request, self._limits)
                kept = await self._find(principal, request.request_id)
                record.started(kept.generation, kept.context.call)
                self._reconnections.read(kept, [request.offset] * len(kept.generation.streams))
        except Exception as error:
            raise _rpc_failed(record, grpc_context, error) from None
        async for message in self._messages(kept.generation, grpc_context, record):
            yield message

    async def UpdateStream(self, request: Any, grpc_context: Any) -> pb.UpdateStreamResponse:
        """tokenflow.v1.Inference/UpdateStream."""
        try:
            principal = self._caller(grpc_context)
            check_message(request, self._limits)
            change = change_from(request, self._limits)
            await self._change(principal, request.request_id, change)
        except Exception as error:
            raise rpc_failure(grpc_context, error) from None
        return pb.UpdateStreamResponse()

    async def GetModelInfo(self, request: Any, grpc_context: Any) -> pb.GetModelInfoResponse:
        """tokenflow.v1.Inference/GetModelInfo."""
        try:
            self._caller(grpc_context)
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

    async def healthy(self) -> bool:
        """Whether a replica answers."""
        try:
            await self._streams.info(_INFO_TIMEOUT_S)
        except EngineDeadError:
            return False
        return True

    async def Cancel(self, request: Any, grpc_context: Any) -> pb.CancelResponse:
        """tokenflow.v1.Inference/Cancel. The cancelled stream ends with its status CANCELLED."""
        try:
            principal = self._caller(grpc_context)
            check_message(request, self._limits)
            found = await self._cancel(principal, request.request_id)
        except Exception as error:
            raise rpc_failure(grpc_context, error) from None
        return pb.CancelResponse(found=found)

    # -- both -----------------------------------------------------------------------------------

    def _principal(self, request: Request) -> Principal:
        """Whose HTTP request that is. Raises InvalidRequestError (401)."""
        return self._who.identify(request.headers.get("authorization"))

    def _caller(self, grpc_context: Any) -> Principal:
        """Whose gRPC call that is. Raises InvalidRequestError (401)."""
        return self._who.identify(metadata_value(grpc_context, "authorization"))

    async def _find(self, principal: Principal, request_id: str) -> Kept:
        """A request to go on with. Raises InvalidRequestError."""
        await self._model_info()  # makes the replicas known
        kept = await self._reconnections.find(scoped_id(principal.tenant, request_id))
        principal.quota.hold(kept.generation)
        principal.runs(kept.generation)
        return kept

    async def _change(self, principal: Principal, request_id: str, change: ReaderChange) -> None:
        """Raises InvalidRequestError, QuotaError."""
        await self._model_info()
        scoped = scoped_id(principal.tenant, request_id)
        if change.token_rate is not None:
            # Of another ingress's streams the present rate is not known here; they count in full.
            streams = self._streams.find(scoped)
            before = sum(counted_rate(stream.token_rate) for stream in streams)
            after = max(1, len(streams)) * counted_rate(change.token_rate)
            principal.quota.check_rate(before, after)
        await self._control.change(scoped, change)

    async def _cancel(self, principal: Principal, request_id: str) -> bool:
        """Whether there was such a request."""
        await self._model_info()
        return await self._control.cancel(scoped_id(principal.tenant, request_id))

    async def _start(self, call: Call, principal: Principal, record: Record) -> Generation:
        """Tokenize and open the streams. Raises what the client must be told."""
        principal.quota.count_request(time.monotonic())
        call = replace(call, tenant=principal.tenant)
        self._mover.start()
        info = await self._model_info()
        prompts = await self._encoder.encode(call, vocab_size=info["vocab_size"])

        params = [
            build_sampling(
                call,
                prompt_tokens=len(prompt),
                max_model_len=info["max_model_len"],
                vocab_size=info["vocab_size"],
                seed=choice_seed(call.sampling.seed, i),
            )
            for i, prompt in enumerate(prompt for prompt in prompts for _ in range(call.n))
        ]
        demand = Demand(
            streams=len(params),
            rate=len(params) * counted_rate(call.token_rate),
            tokens=sum(map(len, prompts)) * call.n + sum(each.max_tokens for each in params),
        )
        with principal.quota.reserve(demand, time.monotonic()) as grant:
            grant.use = generation = await self._open(call, prompts, params, demand.rate, record)
        principal.runs(generation)
        return generation

    async def _open(
        self,
        call: Call,
        prompts: list[list[int]],
        params: list[SamplingParams],
        rate: float,
        record: Record,
    ) -> Generation:
        """Open the streams of a checked call. Raises what the client must be told."""
        request_id = scoped_id(call.tenant, new_id(call))
        deadline_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s

        async def start(context: bytes) -> Generation:
            with admitted(
                asks_of(call, prompts, params),
                max_ttft_s=self._limits.max_predicted_ttft_s,
                max_stall_s=self._limits.max_predicted_stall_s,
                time_left_s=call.timeout_s,
                in_any_case=bool(call.tenant) and self._favoured(call.tenant, rate),
            ):
                return await Generation.start(
                    self._streams,
                    request_id,
                    prompts,
                    call.n,
                    lambda _, choice: params[choice],
                    call.token_rate,
                    call.prefix_salt,
                    context,
                    deadline_s,
                    traced=record.traced,
                )

        if not call.resumable:
            generation = await start(b"")
        else:
            context = Context(call, int(time.time()), prompts, params)
            with self._reconnections.starting(request_id):
                generation = await start(context.to_bytes())
                self._reconnections.keep(generation, context)
        record.started(generation, call)
        return generation

    def _favoured(self, tenant: str, rate: float) -> bool:
        # Each ingress divides its part of the capacity among the streams that it has.
        capacity = REGISTRY.capacity() / self._ingresses
        return favoured(tenant, rate, self._streams.rates(), capacity)

    def _left(self, generation: Generation, reader: int) -> None:
        """A reader is gone: its request waits for it, or ends."""
        if generation.resumable:
            self._reconnections.leave(generation, reader)
        else:
            generation.close()

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

    def __del__(self) -> None:
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()
        streams = getattr(self, "_streams", None)
        if streams is not None:
            streams.hang_up()

    async def _model_info(self) -> dict[str, Any]:
        if self._info is None:
            self._info = await self._streams.info(_INFO_TIMEOUT_S)
        return self._info
