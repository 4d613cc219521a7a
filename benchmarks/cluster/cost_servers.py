"""The ways to a stream that `cost.py` compares: the engine in process, a plain FastAPI server over
the same engine, and the cluster. One process each; a line of JSON says that it is ready.

Run by cost.py: python benchmarks/cluster/cost_servers.py {engine,plain,cluster} SETTING-JSON
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import stand_in
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from tokenflow.cluster.config import ClusterConfig, embedded_model, parse_config
from tokenflow.kvstore.client import NullHostSlots
from tokenflow.replicas import factory
from tokenflow.replicas.factory import inspect_model, plan_blocks
from tokenflow.replicas.loop import EngineLoop
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams

PROMPT = tuple(range(300, 316))


@dataclass(frozen=True, slots=True)
class Setting:
    """What is served and asked; `step_s` None = the embedded model, else the time of a step."""

    streams: int
    tokens: int
    token_rate: float | str
    step_s: float | None
    http_port: int
    grpc_port: int
    traces_to: str | None = None
    sample_ratio: float = 0.0

    def traced(self, endpoint: str, sample_ratio: float) -> Setting:
        """The same, with traces of so many requests sent there."""
        return replace(self, traces_to=endpoint, sample_ratio=sample_ratio)

    @property
    def rate(self) -> float:
        return float("inf") if self.token_rate == "max" else float(self.token_rate)

    def config(self) -> ClusterConfig:
        room = self.streams * (len(PROMPT) + self.tokens + 32)
        return parse_config(
            {
                "engine": {
                    "kv_tokens": room,
                    "max_num_seqs": max(16, self.streams),
                    "device": "cpu",
                    "cpu_threads": 1,
                },
                "kvstore": {"host_kv_gib": 0},
                "ingress": {"port": self.http_port, "grpc_port": self.grpc_port},
                "tracing": {"endpoint": self.traces_to, "sample_ratio": self.sample_ratio},
            }
        )


def engine_loop(setting: Setting, emit: Callable[[list[TokenEvent]], None]) -> EngineLoop:
    """The engine that a replica of the cluster builds, on its thread."""
    if setting.step_s is not None:
        stand_in.install(setting.step_s)
    config = setting.config().engine
    spec = inspect_model(embedded_model(), config, "cpu")
    blocks = plan_blocks(spec, config, available_bytes=8 << 30)
    engine = factory.build_engine(embedded_model(), config, NullHostSlots(), num_blocks=blocks)
    loop = EngineLoop(engine, emit)
    loop.start()
    return loop


def request(setting: Setting, request_id: str, prompt: Any, tokens: int, seed: int) -> Request:
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        params=SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed),
        token_rate=setting.rate,
    )


def ready(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def run_engine(setting: Setting) -> None:
    """All streams once per line on stdin; how long they took, and this process's CPU time."""
    left = 0
    made = 0
    done = threading.Event()

    def emit(events: list[TokenEvent]) -> None:
        nonlocal left, made
        made += sum(event.token_id >= 0 for event in events)
        left -= sum(event.finish_reason is not None for event in events)
        if not left:
            done.set()

    loop = engine_loop(setting, emit)
    ready()
    for run, _ in enumerate(sys.stdin):
        left, made = setting.streams, 0
        done.clear()
        begun, cpu = time.monotonic(), time.process_time()
        for i in range(setting.streams):
            loop.submit(request(setting, f"{run}-{i}", PROMPT, setting.tokens, i))
        done.wait()
        ready(tokens=made, seconds=time.monotonic() - begun, cpu_s=time.process_time() - cpu)


def run_plain(setting: Setting) -> None:
    """What one writes first: a queue per request, an event of the stream per token."""
    app = FastAPI()
    queues: dict[str, asyncio.Queue[TokenEvent]] = {}
    events_loop: asyncio.AbstractEventLoop | None = None
    made = 0

    def dispatch(events: list[TokenEvent]) -> None:
        for event in events:
            if (queue := queues.get(event.request_id)) is not None:
                queue.put_nowait(event)

    def emit(events: list[TokenEvent]) -> None:
        assert events_loop is not None
        events_loop.call_soon_threadsafe(dispatch, events)

    loop = engine_loop(setting, emit)

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> StreamingResponse:
        nonlocal events_loop, made
        events_loop = asyncio.get_running_loop()
        body = await http.json()
        made += 1
        request_id = f"cmpl-{made}"
        queues[request_id] = asyncio.Queue()
        loop.submit(request(setting, request_id, body["prompt"], body["max_tokens"], body["seed"]))
        frames = stream(request_id, int(time.time()))
        return StreamingResponse(frames, media_type="text/event-stream")

    async def stream(request_id: str, created: int) -> AsyncIterator[str]:
        queue = queues[request_id]
        count = 0
        try:
            while True:
                event = await queue.get()
                count += 1
                choice = {
                    "index": 0,
                    "text": event.text,
                    "logprobs": None,
                    "finish_reason": event.finish_reason,
                }
                body: dict[str, Any] = {
                    "id": request_id,
                    "object": "text_completion",
                    "created": created,
                    "model": "tokenflow-books",
                    "choices": [choice],
                }
                yield f"data: {json.dumps(body)}\n\n"
                if event.finish_reason is not None:
                    break
            usage = {"prompt_tokens": len(PROMPT), "completion_tokens": count}
            yield f"data: {json.dumps({**body, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            del queues[request_id]
            loop.cancel(request_id)

    config = uvicorn.Config(app, port=setting.http_port, log_level="error", access_log=False)
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    ready()
    sys.stdin.read()


def run_cluster(setting: Setting) -> None:
    """The cluster as `tokenflow serve` starts it, one replica and one ingress."""
    import ray.cloudpickle

    from tokenflow.cluster import app as application
    from tokenflow.cluster.local import LocalCluster
    from tokenflow.cluster.replica import Replica

    step_s = setting.step_s
    ray.cloudpickle.register_pickle_by_value(stand_in)

    class StandInReplica(Replica):
        def __init__(self, *args: Any) -> None:
            stand_in.install(step_s or 0.0)
            super().__init__(*args)

    replica = Replica if step_s is None else StandInReplica
    with LocalCluster(setting.config()) as cluster, patch.object(application, "Replica", replica):
        cluster.serve()
        ready()
        sys.stdin.read()


if __name__ == "__main__":
    {"engine": run_engine, "plain": run_plain, "cluster": run_cluster}[sys.argv[1]](
        Setting(**json.loads(sys.argv[2]))
    )
