"""A client that goes away frees its memory at once."""

from __future__ import annotations

import httpx
import pytest

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_blocks_within_a_second(server, stream):
    total = server.metric("tokenflow_kv_total_blocks")
    server.wait_for_metric("tokenflow_kv_free_blocks", total, 10)
    body = {
        "model": server.model,
        "prompt": "A long story",
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": stream,
    }
    timeout = httpx.Timeout(10, read=10 if stream else 0.3)
    with httpx.Client(timeout=timeout) as client:
        if stream:
            with client.stream("POST", f"{server.base_url}/completions", json=body) as answer:
                assert answer.status_code == 200
                assert next(answer.iter_lines()).startswith("data: ")
                assert server.metric("tokenflow_kv_free_blocks") < total
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.base_url}/completions", json=body)
    took = server.wait_for_metric("tokenflow_kv_free_blocks", total, 5)
    assert took < 1.0
