"""The engine in this process, the simulator, and gRPC against a service of a few lines."""

from __future__ import annotations

import asyncio
import math
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.servicer import add_inference_to_server
from tokenflow.loadgen.description import GrpcServer, InProcess, Simulated, load_description
from tokenflow.loadgen.metrics import LEFT, StreamRecord
from tokenflow.loadgen.readers import Disconnects
from tokenflow.loadgen.runner import Run
from tokenflow.loadgen.session import Session, make_target
from tokenflow.loadgen.targets.base import TargetError, Turn
from tokenflow.loadgen.targets.engine import EngineTarget
from tokenflow.loadgen.targets.grpc import GrpcTarget
from tokenflow.loadgen.targets.simulator import SimulatorTarget
from tokenflow.loadgen.workload import Ask, Workload, make_workload
from tokenflow.replicas.errors import ConfigError


def ask(index: int = 0, **fields) -> Ask:
    given = dict(
        at_s=0.0, prompt_tokens=12, output_tokens=8, token_rate=20.0, seed=index, session=index
    )
    return Ask(index=index, **given | fields)


# -- the engine -----------------------------------------------------------------------------------


async def test_the_engine_in_this_process():
    target = EngineTarget(InProcess(kv_tokens=1024, host_kv_tokens=2048))
    opened = await target.open()
    assert "1024 KV tokens" in opened.name and opened.model == "tokenflow-books"
    asks = [ask(i) for i in range(4)] + [ask(4, token_rate=math.inf, output_tokens=30)]
    asks.append(ask(5, output_tokens=200, behaviour=Disconnects(share=1, after_tokens=3)))
    asks.append(ask(6, prompt_tokens=3000))
    try:
        records = await Run(target, Workload(tuple(asks)), timeout_s=60.0).run()
    finally:
        await target.close()
    assert [r.tokens for r in records[:5]] == [8, 8, 8, 8, 30]
    assert all(r.ok and r.text and len(r.generated) == r.tokens for r in records[:5])
    assert records[0].generated_effective_tokens is not None
    assert abs(records[0].prompt_tokens - 12) <= 1
    assert records[5].finish_reason == LEFT
    assert not records[6].ok and "tokens" in records[6].error


async def test_an_engine_that_dies_fails_its_requests(monkeypatch):
    target = EngineTarget(InProcess(kv_tokens=1024, host_kv_tokens=1024))
    await target.open()

    def die() -> bool:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(target._loop._engine, "step", die)
    monkeypatch.setattr("tokenflow.replicas.loop.logger.exception", lambda *_: None)
    records = await Run(target, Workload((ask(0), ask(1, at_s=0.3))), timeout_s=20.0).run()
    await target.close()
    assert [r.ok for r in records] == [False, False]
    assert all("engine has failed: out of luck" in r.error.lower() for r in records)


def test_options_of_the_engine_are_checked():
    for settings in (InProcess(options={"blocksize": 3}), Simulated(options={"blocksize": 3})):
        with pytest.raises(ConfigError, match="blocksize"):
            (EngineTarget if isinstance(settings, InProcess) else SimulatorTarget)(settings)
    with pytest.raises(ConfigError, match="policy"):
        EngineTarget(InProcess(policy="best"))


# -- the simulator --------------------------------------------------------------------------------


def simulated(**fields):
    target = {"kind": "simulator", "machine": "h200:llama3-8b", **fields.pop("target", {})}
    return load_description(None, {"target": target, **fields})


def test_the_simulator_takes_a_workload_as_it_is():
    description = simulated(
        arrivals={"kind": "poisson", "per_s": 5, "duration_s": 5},
        prompt={"kind": "uniform", "low": 50, "high": 90},
        output={"kind": "uniform", "low": 5, "high": 40},
        readers=[{"token_rate": 10}, {"token_rate": "max"}],
    )
    workload = make_workload(description, 1)
    records, series = SimulatorTarget(description.target).run(workload)
    assert set(series) == {"at_s", "waiting", "running", "preempted"}
    assert series["at_s"] == sorted(series["at_s"]) and max(series["running"]) > 0
    for own, record in zip(workload.asks, records, strict=True):
        assert (record.index, record.tokens) == (own.index, own.output_tokens)
        assert (record.token_rate, record.prompt_tokens) == (own.token_rate, own.prompt_tokens)
        assert record.intended_s == own.at_s and record.ok
        assert record.generated_effective_tokens == pytest.approx(record.effective_tokens)


def test_a_session_on_the_simulator_is_the_same_every_time():
    def figures():
        session = Session(simulated(arrivals={"kind": "burst", "count": 20}, repeats=2))
        session.simulate()
        return [repeat.figures for repeat in session.repeats]

    one, two = figures()
    assert [one, two] == figures()


def test_simulated_figures_say_so():
    session = Session(simulated(arrivals={"kind": "burst", "count": 2}))
    session.simulate()
    assert any("not a measurement" in note for note in session.report().notes)


def test_the_simulator_takes_a_calibration():
    file = (
        Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "calibration-2-cores.json"
    )
    target = {"machine": str(file), "policy": "fcfs"}
    fields = {"prompt": {"kind": "fixed", "tokens": 40}, "output": {"kind": "fixed", "tokens": 60}}
    session = Session(simulated(target=target, arrivals={"kind": "burst", "count": 10}, **fields))
    session.simulate()
    assert session.repeats[0].figures["tokens"] == 600
    assert session.opened.name == "simulated calibration-2-cores.json, policy fcfs"
    with pytest.raises(ConfigError, match="cannot read the calibration"):
        Session(simulated(target={"machine": "/nowhere.json"})).simulate()


def test_what_does_not_fit_the_machine():
    huge = simulated(prompt={"kind": "fixed", "tokens": 9_000_000})
    with pytest.raises(ConfigError, match="does not fit"):
        Session(huge).simulate()
    with pytest.raises(ConfigError, match="GPU:MODEL"):
        Session(simulated(target={"machine": "abacus"})).simulate()


# -- gRPC -----------------------------------------------------------------------------------------


class Service:
    """Two tokens a message; the requests that came."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    def GetModelInfo(self, request, context):
        return pb.GetModelInfoResponse(model="m", max_model_len=99, vocab_size=50)

    def Cancel(self, request, context):
        return pb.CancelResponse()

    Resume = UpdateStream = Cancel  # never called

    def Generate(self, request, context):
        self.requests.append(request)
        count = request.sampling.max_tokens
        if count == 13:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "try again later")
        for done in range(0, count, 2):
            message = pb.GenerateResponse(
                offset=done,
                token_ids=[1, 2],
                text="ab",
                generated_at_unix_s=[5.0 + done, 6.0 + done],
            )
            if done + 2 >= count and count != 14:
                message.finish_reason = "length"
                message.usage.prompt_tokens, message.usage.completion_tokens = 7, count
            yield message


@asynccontextmanager
async def grpc_target(content: str = "words"):
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_inference_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    target = GrpcTarget(GrpcServer(address=f"127.0.0.1:{port}"), content=content)
    try:
        assert (await target.open()).model == "m"
        yield target, service
    finally:
        await target.close()
        server.stop(None)


async def test_grpc_streams():
    async with grpc_target() as (target, service):
        own = ask(output_tokens=6, token_rate=12.5, seed=9)
        record = StreamRecord(12.5, 0.0)
        await target.stream(own, target.build(own), [Turn("a", "b")], record)
        agent = ask(token_rate=math.inf)
        await target.stream(agent, target.build(agent), (), StreamRecord(math.inf, 0.0))
    assert record.ok and (record.tokens, record.text) == (6, "ababab")
    assert record.generated == [5, 6, 7, 8, 9, 10] and record.prompt_tokens == 7
    first, second = service.requests
    assert (first.token_rate, first.sampling.seed, first.sampling.max_tokens) == (12.5, 9, 6)
    assert first.sampling.ignore_eos and first.sampling.min_tokens == 6
    assert [m.content for m in first.chat.messages][:2] == ["a", "b"]
    assert second.as_fast_as_possible and not second.HasField("token_rate")


async def test_grpc_takes_token_ids():
    async with grpc_target("ids") as (target, service):
        own = ask(output_tokens=2)
        await target.stream(own, target.build(own), (), StreamRecord(20.0, 0.0))
    ids = service.requests[0].token_ids.ids
    assert len(ids) == 12 and max(ids) < 50


@pytest.mark.parametrize(
    ("tokens", "error"),
    [(13, "RESOURCE_EXHAUSTED: try again later"), (14, "the stream ended without a finish reason")],
)
async def test_grpc_failures_are_in_the_record(tokens, error):
    async with grpc_target() as (target, _):
        record = StreamRecord(20.0, 0.0)
        await target.stream(ask(output_tokens=tokens), "Hi", (), record)
    assert not record.ok and record.error == error and record.finished_s is not None


async def test_a_grpc_client_may_hang_up():
    async with grpc_target() as (target, _):
        record = StreamRecord(20.0, 0.0)
        own = ask(output_tokens=40, behaviour=Disconnects(share=1, after_tokens=4))
        await target.stream(own, "Hi", (), record)
    assert (record.finish_reason, record.tokens) == (LEFT, 4)


async def test_nobody_speaks_grpc_there(monkeypatch):
    monkeypatch.setattr("tokenflow.loadgen.targets.grpc._CONNECT_TIMEOUT_S", 0.3)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    description = load_description(
        None, {"target": {"kind": "grpc", "address": f"127.0.0.1:{port}"}}
    )
    with pytest.raises(TargetError, match=r"cannot reach .*Is `tokenflow serve` running"):
        await make_target(description).open()
    server.close()
