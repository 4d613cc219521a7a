"""Both clients against a server that fails as it is told to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import grpc
import pytest

from tests.support.fake_inference import TEXT, WORDS, Behave, FakeInference, start
from tokenflow.client import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    Retries,
    Unavailable,
)
from tokenflow.cluster.local import free_port

Code = grpc.StatusCode
QUICK = Retries(backoff_s=0.01, max_backoff_s=0.05, reconnect_s=5)


class Sync:
    """The client without asyncio, with the face of the other one."""

    def __init__(self, *args, **settings):
        self.inner = Client(*args, **settings)

    def generate(self, *args, **options):
        return SyncStream(self.inner.generate(*args, **options))

    def resume(self, *args, **options):
        return SyncStream(self.inner.resume(*args, **options))

    def __getattr__(self, name):
        return lambda *args, **named: asyncio.to_thread(getattr(self.inner, name), *args, **named)


class SyncStream:
    def __init__(self, inner):
        self.inner = inner

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        await asyncio.to_thread(self.inner.__exit__, *error)

    def __aiter__(self):
        return threaded(iter(self.inner))

    def paced(self, *args, **named):
        return threaded(self.inner.paced(*args, **named))

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if not callable(value):
            return value
        return lambda *args, **named: asyncio.to_thread(value, *args, **named)


async def threaded(iterator):
    try:
        while (item := await asyncio.to_thread(next, iterator, None)) is not None:
            yield item
    finally:
        if hasattr(iterator, "close"):
            await asyncio.to_thread(iterator.close)


@pytest.fixture(params=[AsyncClient, Sync], ids=["async", "sync"])
async def client(fake, request):
    client = request.param(fake.address, retries=QUICK)
    yield client
    await client.close()


async def test_a_stream_from_end_to_end(fake, client):
    stream = client.generate("Once", token_rate=7, max_tokens=24)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert [i for chunk in chunks for i in chunk.token_ids] == list(range(24))
    assert (stream.finish_reason, stream.usage.completion_tokens) == ("length", 24)
    assert (stream.received, stream.reconnects) == (24, 0)
    (sent,) = fake.named("Generate")
    assert (sent.text, sent.token_rate, sent.resumable) == ("Once", 7, True)
    assert sent.request_id == stream.request_id
    assert not fake.named("Cancel")


async def test_a_connection_that_breaks_again_and_again_costs_no_token(fake, client):
    fake.script += [
        Behave(3),
        Behave(0),
        Behave(2, code=Code.INTERNAL, tokens_each=4),
        Behave(1, code=None),
        Behave(1, code=Code.UNKNOWN),
    ]
    stream = client.generate("x")
    assert await stream.text() == TEXT
    assert stream.reconnects == 4
    assert [r.offset for r in fake.named("Resume")] == [3, 3, 11, 12, 13]
    assert len(fake.named("Generate")) == 1


async def test_it_goes_on_at_another_address(client):
    """The server dies, the next one has the request."""
    first, second = FakeInference(), FakeInference()
    first_server, first_address = await start(first)
    second_server, second_address = await start(second)
    first.script.append(Behave(pause_s=0.02))
    other = type(client)([first_address, second_address], retries=QUICK)
    stream = other.generate("x", request_id="moved")
    second.known.add("moved")
    text = ""
    async for chunk in stream:
        text += chunk.text
        if stream.received == 4:
            await first_server.stop(None)
    assert text == TEXT
    assert second.named("Resume")[0].offset >= 4
    assert (await other.model_info()).model == "fake"
    assert not first.named("GetModelInfo")  # the address that answered last is asked first
    await other.close()
    await second_server.stop(None)


async def test_an_address_where_nobody_listens_is_passed_over(fake, client):
    other = type(client)([f"127.0.0.1:{free_port()}", fake.address], retries=QUICK)
    assert await other.generate("x").text() == TEXT
    assert (await other.model_info()).default_token_rate == 200
    await other.close()


async def test_nobody_anywhere(client):
    other = type(client)(f"127.0.0.1:{free_port()}", retries=QUICK)
    with pytest.raises(Unavailable):
        await other.generate("x").text()
    with pytest.raises(Unavailable):
        await other.model_info()
    await other.close()


async def test_a_full_server_is_asked_again_after_the_time_it_says(fake, client):
    fake.script.append(
        Behave(0, code=Code.RESOURCE_EXHAUSTED, metadata=(("retry-after", "0.2"),), lose=True)
    )
    begun = time.monotonic()
    assert await client.generate("x").text() == TEXT
    assert time.monotonic() - begun >= 0.2
    assert len(fake.named("Generate")) == 2


async def test_without_more_tries_the_refusal_is_the_callers(fake, client):
    busy = "full (retry after 0.01 s)"
    fake.script += [Behave(0, code=Code.RESOURCE_EXHAUSTED, details=busy, lose=True)] * 4
    with pytest.raises(Overloaded) as caught:
        await client.generate("x").text()
    assert caught.value.retry_after_s == 0.01
    assert len(fake.named("Generate")) == 4


@pytest.mark.parametrize(
    ("code", "kind"),
    [(Code.INVALID_ARGUMENT, InvalidRequest), (Code.NOT_FOUND, NotFound)],
)
async def test_refusals_are_typed(fake, client, code, kind):
    fake.script.append(Behave(0, code=code, details="top_p: is wrong", lose=True))
    with pytest.raises(kind, match="top_p: is wrong"):
        async with client.generate("x") as stream:
            await stream.text()
    assert len(fake.named("Generate")) == 1 and not fake.named("Cancel")


async def test_what_the_server_has_not_kept_is_lost(fake, client):
    fake.script.append(Behave(2, lose=True))
    with pytest.raises(Unavailable, match="after 2 tokens"):
        await client.generate("x").text()


async def test_a_stream_that_is_not_resumable_is_lost_with_its_connection(fake, client):
    fake.script.append(Behave(2))
    with pytest.raises(Unavailable, match="not resumable"):
        await client.generate("x", resumable=False).text()
    assert not fake.named("Resume")


async def test_repeated_tokens_are_an_error(fake, client):
    fake.script += [Behave(2, tokens_each=2), Behave(tokens_each=4, shift=-2)]
    with pytest.raises(ProtocolError):
        await client.generate("x").text()


async def test_the_time_the_caller_gave(fake, client):
    fake.script.append(Behave(pause_s=0.1))
    with pytest.raises(DeadlineExceeded):
        await client.generate("x", timeout_s=0.3).text()
    fake.script += [Behave(1)] + [Behave(0)] * 1000
    with pytest.raises(DeadlineExceeded, match="after 1 tokens"):
        await client.generate("x", timeout_s=0.3).text()


async def test_leaving_early_ends_the_request(fake, client):
    fake.script.append(Behave(pause_s=0.02))
    async with client.generate("x") as stream:
        async for _ in stream:
            if stream.received == 2:
                break
    assert [r.request_id for r in fake.named("Cancel")] == [stream.request_id]
    async with asyncio.timeout(5):
        await fake.cancelled.wait()


async def test_without_resumption_the_connection_is_enough(fake, client):
    fake.script.append(Behave(pause_s=0.02))
    async with client.generate("x", resumable=False) as stream:
        async for _ in stream:
            break
    async with asyncio.timeout(5):
        await fake.cancelled.wait()
    assert not fake.named("Cancel")


async def test_a_stream_that_was_never_read_was_never_sent(fake, client):
    async with client.generate("x"):
        pass
    assert not fake.calls


async def test_cancelling_from_elsewhere_ends_the_reading(fake, client):
    fake.script.append(Behave(pause_s=0.05))
    stream = client.generate("x")
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            begun.set()

    reading = asyncio.create_task(read())
    await begun.wait()
    await stream.cancel()
    with pytest.raises(Cancelled):
        async with asyncio.timeout(5):
            await reading


async def test_going_on_with_a_request_of_another_process(fake, client):
    fake.known.add("theirs")
    stream = client.resume("theirs", received=20)
    assert await stream.text() == "".join(WORDS[20:])
    with pytest.raises(NotFound):
        await client.resume("nobody's").text()


async def test_paced_reading(fake, client):
    fake.script.append(Behave(tokens_each=8))
    stream = client.generate("x", token_rate=100)
    times, text = [], ""
    async for token in stream.paced():
        times.append(time.monotonic())
        text += token.text
    assert text == TEXT and len(times) == 24
    assert times[-1] - times[0] >= 23 / 100 - 0.01
    assert stream.pacer.taken == 24


async def test_the_servers_rate_paces_who_declared_none(fake, client):
    begun = time.monotonic()
    tokens = [token async for token in client.generate("x").paced()]
    assert time.monotonic() - begun >= 23 / 200 - 0.01
    assert [token.offset for token in tokens] == list(range(24))
    assert len(fake.named("GetModelInfo")) == 1


async def test_a_reader_who_does_not_read_gets_all_at_once(fake, client):
    tokens = [token async for token in client.generate("x", token_rate="max").paced()]
    assert "".join(token.text for token in tokens) == TEXT


async def test_paced_reading_goes_on_over_a_lost_connection(fake, client):
    fake.script += [Behave(2, tokens_each=4), Behave(1, tokens_each=4)]
    stream = client.generate("x")
    text = "".join([token.text async for token in stream.paced(400)])
    assert text == TEXT and stream.reconnects == 2


async def test_what_ends_a_paced_stream_comes_after_what_was_to_be_read(fake, client):
    fake.script.append(Behave(2, tokens_each=4, lose=True))
    text = ""
    with pytest.raises(Unavailable):
        async for token in client.generate("x").paced(400):
            text += token.text
    assert text == "".join(WORDS[:8])


async def test_leaving_paced_reading_ends_the_request(fake, client):
    fake.script.append(Behave(pause_s=0.02))
    stream = client.generate("x")
    reading = stream.paced(1000)
    await anext(reading)
    await reading.aclose()
    assert [r.request_id for r in fake.named("Cancel")] == [stream.request_id]


async def test_changes_reach_the_reader_and_the_server(fake, client):
    fake.script.append(Behave(tokens_each=20, pause_s=0.5))
    stream = client.generate("x", token_rate=50)
    reading = stream.paced()
    await anext(reading)
    await stream.pause()
    begun = time.monotonic()
    waiting = asyncio.ensure_future(anext(reading))
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    await stream.resume()
    await waiting
    await stream.set_rate("max")
    await stream.report_consumed(2)
    rest = [token async for token in reading]
    assert len(rest) == 22 and time.monotonic() - begun > 0.2
    sent = fake.named("UpdateStream")
    assert [u.request_id for u in sent] == [stream.request_id] * 4
    assert (sent[0].paused, sent[1].paused, sent[1].HasField("paused")) == (True, False, True)
    assert sent[2].as_fast_as_possible and sent[3].consumed == 2


async def test_reports_follow_the_reader(fake, client):
    stream = client.generate("x", token_rate=60)
    fake.script.append(Behave(pause_s=0.02))
    async for _ in stream.paced(report_every_s=0.05):
        pass
    told = [update.consumed for update in fake.named("UpdateStream")]
    assert told and told == sorted(set(told)) and told[-1] <= 24


async def test_a_change_that_comes_too_late_is_no_error(fake, client):
    fake.update_code = Code.NOT_FOUND
    stream = client.generate("x")
    await stream.set_rate(5)
    with pytest.raises(NotFound):
        await client.update(stream.request_id, token_rate=5)
    fake.update_code = Code.INVALID_ARGUMENT
    with pytest.raises(InvalidRequest):
        await stream.set_rate(6)
    with pytest.raises(InvalidRequest):
        await stream.set_rate(-1)


async def test_metadata_and_keys_go_with_every_call(fake, client):
    other = type(client)(fake.address, api_key="k", metadata=[("x-a", "b")])
    await other.generate("x").text()
    assert fake.metadata[0]["authorization"] == "Bearer k" and fake.metadata[0]["x-a"] == "b"
    await other.close()


async def test_cancel_by_id(fake, client):
    fake.known.add("r")
    assert await client.cancel("r")
    assert not await client.cancel("r")


async def test_the_rate_of_the_client_is_that_of_its_streams(fake, client):
    other = type(client)(fake.address, token_rate="max")
    await other.generate("x").text()
    await other.generate("x", token_rate=3).text()
    first, second = fake.named("Generate")
    assert first.as_fast_as_possible and second.token_rate == 3
    await other.close()


def test_it_needs_neither_ray_nor_torch_nor_numpy():
    script = (
        "import sys, tokenflow.client; "
        "bad = {'ray', 'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules); "
        "sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
