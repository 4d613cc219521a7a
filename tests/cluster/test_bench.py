"""The benchmark against the cluster: both doors count alike, and the server says when it draws."""

from __future__ import annotations

import pytest

from tests.support.cluster_fixture import Server
from tokenflow.loadgen.description import OpenAIServer, load_description
from tokenflow.loadgen.session import Session
from tokenflow.loadgen.targets.openai import OpenAITarget

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_small_burst(server: Server, door: str):
    target = (
        {"kind": "openai", "url": server.url}
        if door == "http"
        else {"kind": "grpc", "address": server.grpc}
    )
    session = Session(
        load_description(
            None,
            {
                "target": target,
                "arrivals": {"kind": "burst", "count": 6},
                "prompt": {"kind": "fixed", "tokens": 20},
                "output": {"kind": "fixed", "tokens": 40},
                "readers": [{"token_rate": 50}, {"token_rate": "max"}],
            },
        )
    )
    await session.run()
    assert session.opened.model == server.model and session.opened.notes == []
    figures = session.repeats[0].figures
    assert (figures["failed"], figures["tokens"]) == (0, 240)
    assert 0 < figures["generated_effective_tok_s"] <= figures["raw_tok_s"]
    assert figures["prompt_tokens"] >= 6 * 20


async def test_the_servers_own_gauges(server: Server):
    target = OpenAITarget(OpenAIServer(url=server.url), probe=False)
    await target.open()
    try:
        assert set(await target.sample() or {}) == {"waiting", "running", "preempted"}
    finally:
        await target.close()
