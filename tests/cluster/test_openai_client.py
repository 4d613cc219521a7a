"""The official client against a running cluster."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60)


def test_models(server, client):
    assert [m.id for m in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_completion_is_deterministic_and_counts_tokens(server, client):
    texts = set()
    for _ in range(2):
        answer = client.completions.create(
            model=server.model, prompt="It was a dark night", max_tokens=20, temperature=0
        )
        texts.add(answer.choices[0].text)
        assert answer.usage.completion_tokens <= 20
        assert answer.usage.total_tokens == (
            answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        assert answer.choices[0].finish_reason in ("length", "stop")
    assert len(texts) == 1 and texts.pop()


def test_stream_equals_the_whole(server, client):
    ask = dict(
        model=server.model,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=40,
        seed=11,
        temperature=0.7,
    )
    whole = client.chat.completions.create(**ask)
    text, roles, finish, usage = "", [], None, None
    for chunk in client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.usage is not None:
            assert chunk.choices == []
            usage = chunk.usage
            continue
        delta = chunk.choices[0].delta
        roles += [delta.role] if delta.role else []
        text += delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    assert text == whole.choices[0].message.content
    assert roles == ["assistant"]
    assert finish == whole.choices[0].finish_reason
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_continuous_usage_counts_up(server, client):
    counts = []
    for chunk in client.completions.create(
        model=server.model,
        prompt="Once upon a time",
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True, "token_rate": 15},
    ):
        counts.append(chunk.usage.completion_tokens)
    assert counts == sorted(counts)
    assert counts[-1] == 24


def test_several_choices_and_prompts(server, client):
    answer = client.completions.create(
        model=server.model, prompt=["One", "Two"], n=2, max_tokens=8, seed=3
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text


def test_logprobs(server, client):
    chat = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    text = client.completions.create(
        model=server.model, prompt="Hello", max_tokens=4, temperature=0, logprobs=2
    )
    assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens


def test_stop_strings(server, client):
    free = client.completions.create(
        model=server.model, prompt="The morning", max_tokens=40, temperature=0
    ).choices[0]
    stop = free.text[10:14]
    cut = client.completions.create(
        model=server.model, prompt="The morning", max_tokens=40, temperature=0, stop=[stop]
    ).choices[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_errors_have_openai_types(server, client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=server.model, prompt="x", temperature=9)
    assert wrong.value.param == "temperature"


def test_health(server):
    assert httpx.get(f"{server.url}/health").status_code == 200


async def test_a_burst_larger_than_kv_memory_finishes_complete_and_in_order(server):
    """64 streams against KV memory for 8."""
    n, tokens = 64, 150
    client = openai.AsyncOpenAI(
        base_url=server.base_url, api_key="none", max_retries=0, timeout=240
    )

    async def one(i: int) -> str:
        text, count = "", 0
        stream = await client.completions.create(
            model=server.model,
            prompt=f"Chapter {i % 4}. The house stood by the river, and",
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "token_rate": 5},
        )
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].text
            if chunk.usage:
                count = chunk.usage.completion_tokens
        assert count == tokens
        return text

    alone = [await one(i) for i in range(4)]
    before = server.metric("tokenflow_preemptions_total")
    texts = await asyncio.gather(*(one(i) for i in range(n)))
    await client.close()
    # The same prompt greedily gives the same text, whoever was preempted on the way.
    assert texts == alone * (n // 4)
    assert server.metric("tokenflow_preemptions_total") > before
    assert server.metric("tokenflow_resumes_total") > 0
    server.wait_idle()
