"""A cluster behind API keys: who comes in, what tenants see of each other, and what clients that
mean ill get."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message import Message

from tests.support.guarded import KeyRing
from tokenflow.cluster.config import ClusterConfig
from tokenflow.cluster.local import HEADER_TIMEOUT_S
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import SERVICE, InferenceStub

pytestmark = pytest.mark.cluster

_IN_CI = os.environ.get("CI") == "true"
FUZZED = int(os.environ.get("TOKENFLOW_FUZZ_REQUESTS", "10000" if _IN_CI else "600"))
"""Of both protocols together."""
BODY_S = 2.0


@pytest.fixture(scope="module")
def keys(server, tmp_path_factory) -> Iterator[KeyRing]:
    ring = KeyRing(tmp_path_factory.mktemp("keys") / "keys.yaml")
    ring.add("acme", "acme")
    ring.add("acme-2", "acme")
    ring.add("other", "other")
    ring.add("few", "few", requests_per_minute=2)
    ring.add("small", "small", streams=1, tokens_per_minute=3000, rate=100)
    ring.add("revoked", "acme")
    ring.revoke("revoked")
    before = server.config
    tree = before.model_dump(mode="json")
    tree["security"]["api_keys_file"] = str(ring.path)
    tree["limits"]["max_body_s"] = BODY_S
    server.cluster.update(ClusterConfig.model_validate(tree))
    yield ring
    server.cluster.update(before)


def body(**changes: Any) -> dict[str, Any]:
    asked = {"model": "tokenflow-books", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    return asked | changes


def long_stream(**changes: Any) -> dict[str, Any]:
    return body(max_tokens=500, ignore_eos=True, stream=True, token_rate=5) | changes


def message(**changes: Any) -> pb.GenerateRequest:
    fields: dict[str, Any] = {"text": "Hello", "token_rate": 20} | changes
    return pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=4), **fields)


def is_not_let_in(answer: httpx.Response) -> bool:
    return answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("who", [None, "wrong", "revoked"])
async def test_without_a_valid_key_nothing_is_answered(server, keys, who):
    headers, metadata = {}, []
    if who == "wrong":
        headers, metadata = {"Authorization": "Bearer sk-tf-x"}, [("authorization", "Bearer x")]
    elif who is not None:
        headers, metadata = keys.headers(who), keys.metadata(who)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=30) as client:
        for method, path, content in (
            ("POST", "/v1/completions", body()),
            ("POST", "/v1/chat/completions", body()),
            ("GET", "/v1/models", None),
            ("GET", "/v1/models/tokenflow-books", None),
            ("GET", "/v1/streams/x", None),
            ("POST", "/v1/streams/x", {"paused": True}),
            ("DELETE", "/v1/streams/x", None),
        ):
            answer = await client.request(method, path, json=content)
            assert is_not_let_in(answer), (method, path, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = InferenceStub(channel)
        for call, request in (
            (stub.Generate, message()),
            (stub.Resume, pb.ResumeRequest(request_id="x")),
            (stub.UpdateStream, pb.UpdateStreamRequest(request_id="x", paused=True)),
            (stub.Cancel, pb.CancelRequest(request_id="x")),
            (stub.GetModelInfo, pb.GetModelInfoRequest()),
        ):
            assert (
                await status_of(call(request, metadata=metadata)) is grpc.StatusCode.UNAUTHENTICATED
            )


async def status_of(call: Any) -> grpc.StatusCode:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_key_opens_both_doors(server, keys):
    async with httpx.AsyncClient(timeout=30) as client:
        url = f"{server.base_url}/completions"
        assert (await client.post(url, json=body(), headers=keys.headers("acme"))).is_success
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        call = InferenceStub(channel).Generate(message(), metadata=keys.metadata("acme"))
        assert await status_of(call) is grpc.StatusCode.OK


async def test_keys_come_and_go_while_it_runs(server, keys):
    keys.add("passing", "acme")

    async def until(code: int) -> None:
        async with httpx.AsyncClient(timeout=30) as client, asyncio.timeout(15):
            while True:
                models = f"{server.base_url}/models"
                answer = await client.get(models, headers=keys.headers("passing"))
                if answer.status_code == code:
                    return
                await asyncio.sleep(0.1)

    await until(200)
    async with (
        httpx.AsyncClient(timeout=30) as client,
        grpc.aio.insecure_channel(server.grpc) as channel,
    ):

        async def error_of(who: str, name: str) -> str | None:
            """How a long stream of that key ends."""
            url, asked = f"{server.base_url}/completions", long_stream(request_id=name)
            async with client.stream("POST", url, json=asked, headers=keys.headers(who)) as answer:
                begun.release()
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
            return json.loads(lines[-1].removeprefix("data: ")).get("error", {}).get("code")

        async def rpc() -> grpc.StatusCode:
            asked = message(resumable=True, request_id="passing-rpc", token_rate=5)
            asked.sampling.max_tokens = 500
            asked.sampling.ignore_eos = True
            call = InferenceStub(channel).Generate(asked, metadata=keys.metadata("passing"))
            begun.release()
            return await status_of(call)

        begun = asyncio.Semaphore(0)
        ended = [asyncio.create_task(error_of("passing", "passing-http"))]
        ended.append(asyncio.create_task(rpc()))
        stays = asyncio.create_task(error_of("acme", "stays"))
        for _ in range(3):
            await begun.acquire()
        await asyncio.sleep(0.5)
        keys.revoke("passing")
        await until(401)
        # What runs in its name ends as well, and nothing else.
        async with asyncio.timeout(10):
            assert await asyncio.gather(*ended) == [
                "invalid_api_key",
                grpc.StatusCode.UNAUTHENTICATED,
            ]
        assert not stays.done()
        gone = f"{server.base_url}/streams/stays"
        assert (await client.delete(gone, headers=keys.headers("acme-2"))).status_code == 200
        assert await stays == "cancelled"
    server.wait_idle()


async def test_quotas_refuse_with_a_time(server, keys):
    url = f"{server.base_url}/completions"
    async with httpx.AsyncClient(timeout=30) as client:
        answers = [
            await client.post(url, json=body(), headers=keys.headers("few")) for _ in range(4)
        ]
        statuses = [answer.status_code for answer in answers]
        assert statuses == [200, 200, 429, 429]
        assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        small = keys.headers("small")
        never = await client.post(url, json=body(n=2), headers=small)
        assert (never.status_code, never.json()["error"]["code"]) == (429, "insufficient_quota")
        stream = client.stream("POST", url, json=long_stream(request_id="one"), headers=small)
        async with stream as first:
            assert first.status_code == 200
            second = await client.post(url, json=body(), headers=small)
            assert second.status_code == 429
            faster = await client.post(
                f"{server.base_url}/streams/one", json={"token_rate": 200}, headers=small
            )
            assert faster.status_code == 429
        async with asyncio.timeout(10):
            while not (await client.post(url, json=body(), headers=small)).is_success:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        call = InferenceStub(channel).Generate(message(), metadata=keys.metadata("few"))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in call:
                pytest.fail("it was taken")
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(failure.value.trailing_metadata())["retry-after"]) >= 1


async def test_no_tenant_sees_anothers_cached_prefixes(server, keys):
    prompt = [1 + i % 50 for i in range(96)]
    url = f"{server.base_url}/completions"

    async def cached(who: str, **changes: Any) -> int:
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(
                url, json=body(prompt=prompt, **changes), headers=keys.headers(who)
            )
        usage = answer.json()["usage"]
        return (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    assert await cached("acme") == 0
    assert await cached("acme") > 0
    assert await cached("acme-2") > 0  # the same tenant
    assert await cached("other") == 0
    assert await cached("other", cache_salt="acme") == 0
    assert await cached("other", cache_salt="acme ") == 0
    assert await cached("other") > 0


async def test_no_tenant_touches_anothers_requests(server, keys):
    asked = long_stream(request_id="mine", resumable=True)
    streams = f"{server.base_url}/streams/mine"
    acme, other = keys.headers("acme"), keys.headers("other")
    async with httpx.AsyncClient(timeout=30) as client:
        url = f"{server.base_url}/completions"
        async with client.stream("POST", url, json=asked, headers=acme) as answer:
            assert answer.status_code == 200
            lines = answer.aiter_lines()
            assert '"mine"' in await anext(line async for line in lines if "data:" in line)
            for method, content in (("GET", None), ("POST", {"paused": True}), ("DELETE", None)):
                theirs = await client.request(method, streams, json=content, headers=other)
                absent = await client.request(
                    method, streams + "-none", json=content, headers=other
                )
                assert theirs.status_code == absent.status_code == 404
                assert theirs.text == absent.text.replace("mine-none", "mine")
            async with grpc.aio.insecure_channel(server.grpc) as channel:
                stub, metadata = InferenceStub(channel), keys.metadata("other")
                call = stub.Resume(pb.ResumeRequest(request_id="mine"), metadata=metadata)
                assert await status_of(call) is grpc.StatusCode.NOT_FOUND
                change = pb.UpdateStreamRequest(request_id="mine", paused=True)
                call = stub.UpdateStream(change, metadata=metadata)
                assert await status_of(call) is grpc.StatusCode.NOT_FOUND
                cancel = stub.Cancel(pb.CancelRequest(request_id="mine"), metadata=metadata)
                assert not (await cancel).found
            # The same id is free for others.
            mine = body(request_id="mine", resumable=True, stream=True)
            assert (await client.post(url, json=mine, headers=other)).status_code == 200
            again = await client.post(streams, json={"token_rate": 7}, headers=acme)
            assert again.status_code == 200
            ended = await client.delete(streams, headers=keys.headers("acme-2"))
            assert ended.json() == {"id": "mine", "cancelled": True}
            assert "cancelled" in "".join([line async for line in lines])
    server.wait_idle()


async def raw(server, keys: KeyRing, length: int) -> tuple[bytes, float]:
    """The status line for a body that is announced and begun, and the seconds it took to come."""
    _, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    head += f"Authorization: {keys.headers('acme')['Authorization']}\r\n\r\n{{"
    begun = time.monotonic()
    writer.write(head.encode())
    line = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    return line, time.monotonic() - begun


async def test_bodies_that_are_too_long_or_too_slow(server, keys):
    async def pieces():
        for _ in range(60):
            yield b" " * 100_000

    async with httpx.AsyncClient(timeout=30) as client:
        url = f"{server.base_url}/completions"
        longest = await client.post(url, content=pieces(), headers=keys.headers("acme"))
    assert longest.status_code == 413
    assert longest.json()["error"]["code"] == "request_too_large"
    line, took_s = await raw(server, keys, length=99_999_999)
    assert b" 413 " in line and took_s < BODY_S  # without waiting for it
    line, took_s = await raw(server, keys, length=1000)
    assert b" 408 " in line and took_s >= BODY_S


async def test_slow_loris_clients_are_cut_off_and_others_served(server, keys):
    _, port = server.url.removeprefix("http://").split(":")
    begun = time.monotonic()

    async def drip() -> float:
        """A head that never ends, a byte at a time; after how long it was cut off."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
        while not reader.at_eof():
            try:
                writer.write(b"a")
                await writer.drain()
                async with asyncio.timeout(0.5):
                    await reader.read(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
        writer.close()
        return time.monotonic() - begun

    loris = [asyncio.create_task(drip()) for _ in range(200)]
    url = f"{server.base_url}/completions"
    async with httpx.AsyncClient(timeout=30) as client:
        for _ in range(5):
            assert (await client.post(url, json=body(), headers=keys.headers("acme"))).is_success
            await asyncio.sleep(0.5)
    async with asyncio.timeout(HEADER_TIMEOUT_S + 20):
        lasted = await asyncio.gather(*loris)
    assert min(lasted) > HEADER_TIMEOUT_S - 2 and max(lasted) < HEADER_TIMEOUT_S + 10


async def test_logs_have_neither_keys_nor_texts(server, keys):
    """What clients send stays out of all files that Ray, Serve, HAProxy and we write."""
    secret = "the-heron-stands-in-the-reeds"
    right = keys.headers("acme")
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        for asked, headers, status in (
            (body(prompt=secret, echo=True), right, 200),
            (body(prompt=secret, stream=True), right, 200),
            (body(prompt=secret, n=0), right, 400),
            (body(prompt=secret + " la" * 4000), right, 400),  # beyond the context
            (body(prompt={"a": secret}), right, 400),
            (body(prompt=secret, stop=[secret] * 99), right, 400),
            (body(prompt=secret), {"Authorization": f"Bearer {secret}"}, 401),
        ):
            answer = await client.post("/v1/completions", json=asked, headers=headers)
            assert answer.status_code == status, answer.text
        await client.get("/v1/models", params={"key": "asked"}, headers=right)
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        for text, metadata in ((secret, keys.metadata("acme")), (secret, None)):
            await status_of(InferenceStub(channel).Generate(message(text=text), metadata=metadata))
    await asyncio.sleep(1.0)
    folder = Path(server.cluster._log_directory()).parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    written = {path: path.read_bytes() for path in files}
    assert any(b"completions" in text for text in written.values())
    # Nor is a stranger a reason for a traceback: they would fill the disk.
    for forbidden in (secret, *keys.secrets.values(), "RpcFailed"):
        assert [path for path, text in written.items() if forbidden.encode() in text] == []


class Fuzzer:
    """Requests that are a little, or quite, wrong."""

    def __init__(self, seed: int, keys: KeyRing) -> None:
        self.rng = random.Random(seed)
        self.keys = keys

    def value(self, depth: int = 0) -> Any:
        kind = self.rng.randrange(10 if depth < 3 else 8)
        if kind == 9:
            return [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        if kind == 8:
            return {self.rng.choice("abc"): self.value(depth + 1)}
        return [
            None,
            True,
            self.rng.randrange(-5, 5),
            self.rng.choice([2**31, -(2**63), 2**80, 10**30]),
            self.rng.choice([0.0, -1.5, 1e-300, 1e300, float("inf"), float("nan")]),
            "",
            self.rng.choice(["max", "x" * 300, "\x00", "é\u202e\U0001f600", "../../etc", "' OR 1"]),
            "tokenflow-books",
        ][kind]

    def bytes(self, data: bytes) -> bytes:
        """The data with a few bytes changed, dropped or doubled."""
        mutable = bytearray(data)
        for _ in range(self.rng.randrange(1, 6)):
            at = self.rng.randrange(len(mutable) + 1)
            match self.rng.randrange(3):
                case 0:
                    mutable[at : at + 1] = bytes([self.rng.randrange(256)])
                case 1:
                    del mutable[at : at + self.rng.randrange(1, 8)]
                case _:
                    mutable[at:at] = mutable[at : at + self.rng.randrange(1, 8)]
        return bytes(mutable)

    def authorization(self) -> str:
        right = self.keys.headers("acme")["Authorization"]
        if self.rng.random() < 0.8:
            return right
        return self.rng.choice(["", "Bearer", right[:-1], "Basic Zm9v", "Bearer " + "x" * 4000])

    def http(self) -> dict[str, Any]:
        """What `httpx.AsyncClient.request` takes."""
        fields = [
            "prompt", "messages", "model", "token_rate", "stop", "n", "seed", "logit_bias",
            "stream", "temperature", "top_p", "top_k", "logprobs", "request_id", "resumable",
            "cache_salt", "timeout", "stream_options", "echo", "min_tokens", "paused", "consumed",
        ]  # fmt: skip
        asked = body(max_tokens=2, messages=[{"role": "user", "content": "Hi"}], token_rate=1000)
        for name in self.rng.sample(fields, self.rng.randrange(4)):
            asked[name] = self.value()
        content = json.dumps(asked).encode()
        if self.rng.random() < 0.4:
            content = self.bytes(content)
        headers = {"Authorization": self.authorization(), "Content-Type": "application/json"}
        for name in ("X-Token-Rate", "X-Request-Id", "X-Resumable", "X-Request-Timeout-S"):
            if self.rng.random() < 0.1:
                headers[name] = str(self.value()).encode("ascii", "ignore").decode()[:200]
                headers[name] = headers[name].replace("\x00", "").strip()
        path = self.rng.choice(
            ["/v1/completions"] * 4
            + ["/v1/chat/completions"] * 4
            + ["/v1/streams/none", "/v1/models/x", "/v1/nothing", "/v1/streams/%00%2e%2e%2fx"]
        )
        method = "POST" if self.rng.random() < 0.9 else self.rng.choice(["GET", "PUT", "DELETE"])
        return {"method": method, "url": path, "content": content, "headers": headers}

    def grpc(self) -> tuple[str, bytes, list[tuple[str, str]]]:
        """(method, message, metadata)"""
        rng = self.rng
        method = rng.choice(["Generate"] * 4 + ["Resume", "UpdateStream", "Cancel", "GetModelInfo"])
        asked: Message = {
            "Generate": message(request_id=rng.choice(["", "x" * 300, "id"])),
            "Resume": pb.ResumeRequest(request_id="none", offset=rng.randrange(2**31)),
            "UpdateStream": pb.UpdateStreamRequest(request_id="none", token_rate=rng.random()),
            "Cancel": pb.CancelRequest(request_id="none"),
            "GetModelInfo": pb.GetModelInfoRequest(),
        }[method]
        data = asked.SerializeToString()
        if rng.random() < 0.8:
            data = self.bytes(data) if rng.random() < 0.8 else rng.randbytes(rng.randrange(200))
        metadata = [("authorization", self.authorization())]
        if rng.random() < 0.1:
            metadata.append(("x-token-rate", rng.choice(["", "nan", "-1", "1e999", "x" * 100])))
        return method, data, metadata


async def test_fuzzed_requests_get_a_clear_answer_and_leave_nothing_behind(server, keys):
    fuzzer = Fuzzer(20261121, keys)
    limit = asyncio.Semaphore(16)
    found: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=16)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client,
        grpc.aio.insecure_channel(server.grpc) as channel,
    ):

        async def http(asked: dict[str, Any]) -> None:
            async with limit:
                answer = await client.request(**asked)
                found[f"HTTP {answer.status_code}"] += 1
                assert answer.status_code < 500 or answer.status_code == 504, (asked, answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], (asked, answer.text)
                assert "Traceback" not in answer.text and ".py" not in answer.text

        async def rpc(method: str, data: bytes, metadata: list[tuple[str, str]]) -> None:
            made = (
                channel.unary_stream
                if SERVICE.methods_by_name[method].server_streaming
                else (channel.unary_unary)
            )
            call = made(f"/{SERVICE.full_name}/{method}")
            async with limit:
                code = await status_of(call(data, metadata=metadata, timeout=60))
            found[f"gRPC {code.name}"] += 1
            assert code not in (
                grpc.StatusCode.UNKNOWN,
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNAVAILABLE,
            ), (method, data, code)

        for begin in range(0, FUZZED, 200):
            batch = range(begin, min(begin + 200, FUZZED))
            await asyncio.gather(
                *(http(fuzzer.http()) if i % 2 else rpc(*fuzzer.grpc()) for i in batch)
            )
        print(f"\n{FUZZED} fuzzed requests:", dict(sorted(found.items())))
        # What was resumable waits for its client; everything else is gone.
        for request_id in ("id", "x" * 300):
            url = f"/v1/streams/{request_id}"
            await client.delete(url, headers=keys.headers("acme"))
        assert server.wait_idle(60) >= 0
        answer = await client.post("/v1/completions", json=body(), headers=keys.headers("acme"))
        assert answer.json()["usage"]["completion_tokens"] == 4
    if FUZZED >= 600:
        expected = {"HTTP 200", "HTTP 400", "HTTP 401", "HTTP 404", "HTTP 405", "gRPC OK"}
        expected |= {"gRPC INVALID_ARGUMENT", "gRPC UNAUTHENTICATED", "gRPC NOT_FOUND"}
        assert expected <= found.keys()
    await asyncio.sleep(1.0)
    assert server.metric("tokenflow_ingress_streams") == 0
