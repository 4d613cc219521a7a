"""Bad input gets the right 4xx in OpenAI's shape, and the server serves on."""

from __future__ import annotations

import httpx
import pytest

pytestmark = pytest.mark.cluster


def body(**changes):
    return {"model": "tokenflow-books", "prompt": "Hello", "max_tokens": 4} | changes


CASES = [
    (body(model="nobody"), 404, "model", "model_not_found"),
    (body(token_rate=-1), 400, "token_rate", None),
    (body(token_rate=0), 400, "token_rate", None),
    (body(token_rate=1e9), 400, "token_rate", None),
    (body(token_rate="fast"), 400, "token_rate", None),
    (body(prompt="word " * 5000), 400, None, "context_length_exceeded"),
    (body(max_tokens=0), 400, "max_tokens", None),
    (body(max_tokens=100_000), 400, None, "context_length_exceeded"),
    (body(max_tokens="four"), 400, "max_tokens", None),
    (body(stop=["x"] * 1000), 400, "stop", None),
    (body(temperature=-1), 400, "temperature", None),
    (body(prompt=""), 400, "prompt", None),
    (body(prompt=[10**9]), 400, "prompt", None),
    (body(n=0), 400, "n", None),
    (body(cache_salt=""), 400, "cache_salt", None),
    (body(cache_salt="x" * 257), 400, "cache_salt", None),
    ({"prompt": "x"}, 400, "model", None),
]


@pytest.mark.parametrize(("request_body", "status", "param", "code"), CASES)
def test_bad_fields(server, request_body, status, param, code):
    answer = httpx.post(f"{server.base_url}/completions", json=request_body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    if param:
        assert error["param"] == param
    if code:
        assert error["code"] == code


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[1]", 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"prompt": ' + b"[" * 100_000, 400),
        (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413),
    ],
)
def test_bad_bodies(server, content, status):
    answer = httpx.post(
        f"{server.base_url}/chat/completions",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods_answer_in_openai_shape(server):
    assert "message" in httpx.get(f"{server.url}/v1/nothing").json()["error"]
    answer = httpx.get(f"{server.base_url}/completions")
    assert answer.status_code == 405
    assert "message" in answer.json()["error"]


def test_the_rate_header_is_checked_and_the_body_wins(server):
    url = f"{server.base_url}/completions"
    assert httpx.post(url, json=body(), headers={"X-Token-Rate": "-3"}).status_code == 400
    assert httpx.post(url, json=body(), headers={"X-Token-Rate": "30"}).status_code == 200
    ok = httpx.post(url, json=body(token_rate=5), headers={"X-Token-Rate": "30"})
    assert ok.status_code == 200


def test_the_server_serves_on(server):
    answer = httpx.post(f"{server.base_url}/completions", json=body())
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4
