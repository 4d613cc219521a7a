"""Greedy text is transformers' own, token by token, whatever happens to the sequence on the way."""

from __future__ import annotations

import pytest
import torch

from tests.support.engines import answers, make_request
from tests.support.fake_executor import FakeHost
from tests.support.tiny_models import FAMILIES, make_checkpoint, make_tokenizer, reference
from tests.support.triton_interpreter import interpret
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.executor import torch_executor
from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.executor.torch_executor import TorchExecutor
from tokenflow.replicas.scheduler.registry import make_policy

LENGTHS = (3, 40, 17, 90, 1, 64, 33, 5)
TOKENS = 24


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 500, (n,), generator=generator).tolist() for n in LENGTHS]


def build(
    path,
    *,
    blocks,
    policy="slack",
    fuse=True,
    block_size=8,
    batch_tokens=48,
    ahead=False,
    **options,
):
    spec = inspect_checkpoint(path)
    host_slots = 400
    host = torch.zeros(host_slots, spec.kv_layout(block_size).block_bytes, dtype=torch.uint8)
    executor = TorchExecutor(
        spec,
        num_blocks=blocks,
        block_size=block_size,
        max_num_seqs=16,
        host_memory=host,
        num_threads=1,
        fuse=fuse,
        **options,
    )
    return Engine(
        executor,
        make_policy(policy),
        FakeHost(host_slots),
        EngineConfig(
            block_size=block_size,
            max_num_seqs=16,
            max_batch_tokens=batch_tokens,
            async_scheduling=ahead,
        ),
        tokenizer=make_tokenizer(),
        eos_ids=(),
        max_model_len=spec.max_model_len,
    )


def run(engine, requests) -> dict[str, list[int]]:
    out = answers(engine, requests)
    engine.executor.close()
    return out


@pytest.mark.parametrize("fuse", [True, False])
def test_batched_chunked_greedy_equals_generate(checkpoint, fuse):
    engine = build(checkpoint, blocks=200, fuse=fuse)
    out = run(engine, [make_request(f"{i}", p, TOKENS) for i, p in enumerate(prompts())])
    assert engine.stats.preemptions == 0
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == reference(checkpoint, prompt, TOKENS)


@pytest.mark.parametrize("policy", ["slack", "fcfs"])
def test_greedy_survives_preemption(checkpoint, policy):
    engine = build(checkpoint, blocks=30, policy=policy)
    requests = [make_request(f"{i}", p, TOKENS, rate=0.5) for i, p in enumerate(prompts())]
    out = run(engine, requests)
    if policy == "slack":
        assert engine.stats.preempted_offload > 0
        assert engine.stats.resumes > 0
    else:
        assert engine.stats.preempted_recompute > 0
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == reference(checkpoint, prompt, TOKENS)


def test_sampled_text_survives_preemption_and_company(checkpoint):
    def requests(rate):
        return [
            make_request(f"{i}", p, TOKENS, rate=rate, temperature=0.9, top_p=0.9, seed=i)
            for i, p in enumerate(prompts())
        ]

    calm = run(build(checkpoint, blocks=200), requests(1000.0))
    engine = build(checkpoint, blocks=30)
    pressed = run(engine, requests(0.5))
    assert engine.stats.preemptions > 0
    alone = run(build(checkpoint, blocks=200), requests(1000.0)[3:4])
    assert pressed == calm
    assert alone["3"] == calm["3"]


@pytest.mark.parametrize("graphs", [False, True])
def test_greedy_survives_steps_ahead_and_padded_batches(checkpoint, graphs):
    engine = build(checkpoint, blocks=30, ahead=True, decode_graphs=graphs)
    requests = [make_request(f"{i}", p, TOKENS, rate=0.5) for i, p in enumerate(prompts())]
    out = run(engine, requests)
    assert engine.stats.preemptions > 0
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == reference(checkpoint, prompt, TOKENS)


def test_the_kernels_for_gpus_give_the_same_text(tmp_path, monkeypatch):
    interpret()
    monkeypatch.setattr(torch_executor, "has_triton", lambda device: True)
    checkpoint = make_checkpoint(tmp_path / "llama", "llama")
    engine = build(
        checkpoint, blocks=16, ahead=True, attention_backend="triton", decode_graphs=True
    )
    engine.executor._warm_up(engine.max_model_len)
    asked = prompts()[0:3:2]
    out = run(engine, [make_request(f"{i}", p, 6) for i, p in enumerate(asked)])
    for i, prompt in enumerate(asked):
        assert out[f"{i}"] == reference(checkpoint, prompt, 6)


def test_penalties_and_draws_are_the_same_ahead(checkpoint):
    def requests():
        kinds = [
            {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.5, "logprobs": 2},
            {"presence_penalty": 1.5, "logit_bias": {7: 3.0}},
            {"temperature": 0.7, "seed": 2, "top_k": 9, "frequency_penalty": 1.0, "min_tokens": 9},
            {"logprobs": 0},
        ]
        return [
            make_request(f"{i}", p, TOKENS, rate=0.5, stop_token_ids=(3, 9, 40), **kinds[i % 4])
            for i, p in enumerate(prompts())
        ]

    one_by_one = run(build(checkpoint, blocks=30), requests())
    assert run(build(checkpoint, blocks=30, ahead=True), requests()) == one_by_one


def test_a_sliding_window_is_honoured(tmp_path):
    path = make_checkpoint(tmp_path / "window", "mistral", sliding_window=16)
    engine = build(path, blocks=200)
    out = run(engine, [make_request(f"{i}", p, TOKENS) for i, p in enumerate(prompts())])
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == reference(path, prompt, TOKENS)


def test_llama3_rope_scaling(tmp_path):
    path = make_checkpoint(
        tmp_path / "rope",
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    )
    engine = build(path, blocks=200)
    out = run(engine, [make_request(f"{i}", p, TOKENS) for i, p in enumerate(prompts())])
    for i, prompt in enumerate(prompts()):
        assert out[f"{i}"] == reference(path, prompt, TOKENS)
