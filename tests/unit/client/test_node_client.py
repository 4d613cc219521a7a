"""Another language against the same proto: the Node clients and a server that fails as told."""

from __future__ import annotations

import grpc

from tests.support import node_client
from tests.support.fake_inference import TEXT, Behave


async def test_without_any_package(fake):
    status, text, end = await node_client.run(*node_client.bare(), fake.address, "Once", "24")
    assert (status, text) == (0, TEXT), end
    assert end == {"tokens": 24, "finish_reason": "length", "status": 0}
    (sent,) = fake.named("Generate")
    assert (sent.text, sent.sampling.max_tokens, sent.sampling.ignore_eos) == ("Once", 24, True)
    assert sent.sampling.HasField("temperature") and sent.sampling.temperature == 0.0


async def test_without_any_package_a_refusal_is_seen(fake):
    fake.script.append(Behave(0, code=grpc.StatusCode.INVALID_ARGUMENT))
    status, text, end = await node_client.run(*node_client.bare(), fake.address, "Once")
    assert (status, text, end["status"]) == (1, "", 3)


async def test_with_grpc_js_over_broken_connections(fake):
    fake.script += [Behave(3), Behave(0), Behave(2, code=grpc.StatusCode.INTERNAL, tokens_each=4)]
    command = node_client.installed()
    status, text, end = await node_client.run(*command, fake.address, "Once", "--rate", "7")
    assert (status, text) == (0, TEXT), end
    assert (end["tokens"], end["finish_reason"], end["reconnects"]) == (24, "length", 2)
    assert end["usage"]["completion_tokens"] == 24
    assert [resume.offset for resume in fake.named("Resume")] == [3, 3, 11]
    (sent,) = fake.named("Generate")
    assert (sent.text, sent.token_rate, sent.resumable) == ("Once", 7, True)


async def test_with_grpc_js_a_refusal_is_told(fake):
    fake.script.append(Behave(0, code=grpc.StatusCode.INVALID_ARGUMENT, details="top_p: is wrong"))
    command = node_client.installed()
    status, text, end = await node_client.run(*command, fake.address, "Once")
    assert (status, text, end) == (1, "", "INVALID_ARGUMENT: top_p: is wrong")
