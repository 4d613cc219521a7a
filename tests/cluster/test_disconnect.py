"""A client that goes away mid-stream frees its memory at once."""

from __future__ import annotations

import httpx
import pytest

pytestmark = pytest.mark.cluster


def test_a_client_that_disconnects_frees_its_blocks_within_a_second(server):
    server.wait_idle()
    cancelled = server.metric("tokenflow_finished_requests_total", reason="cancelled")
    body = {
        "model": server.model,
        "prompt": "A long story",
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        httpx.Client(timeout=10) as client,
        client.stream("POST", f"{server.base_url}/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()  # kept: dropping the iterator closes the connection
        assert next(lines).startswith("id: ")
        assert "choices" in next(lines)
        assert server.metric("tokenflow_running_requests") == 1
    assert server.wait_idle() < 1.0
    # It was ended, not finished early.
    assert server.metric("tokenflow_finished_requests_total", reason="cancelled") == cancelled + 1
    assert server.metric("tokenflow_ingress_streams") == 0
