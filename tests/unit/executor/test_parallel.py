"""A model divided over processes draws the tokens of the whole one; and what goes wrong is said."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from tests.support.chaos import Chaos
from tests.support.engines import answers, make_request
from tests.support.fake_executor import FakeHost
from tests.support.tiny_models import make_checkpoint, make_tokenizer, reference
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.errors import CheckpointError, ConfigError
from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.executor.parallel.executor import ParallelExecutor
from tokenflow.replicas.executor.parallel.process import RankLostError
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.factory import (
    build_engine,
    build_executor,
    inspect_model,
    plan_blocks,
    private_host_memory,
)
from tokenflow.replicas.scheduler.registry import make_policy

LENGTHS = (3, 40, 17, 90, 1, 64, 33, 5)
TOKENS = 24


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 500, (n,), generator=generator).tolist() for n in LENGTHS]


def engine_on(executor, spec, policy) -> Engine:
    return Engine(
        executor,
        make_policy(policy),
        FakeHost(0),
        EngineConfig(block_size=8, max_num_seqs=16, max_batch_tokens=48, offload=False),
        tokenizer=make_tokenizer(),
        eos_ids=(),
        max_model_len=spec.max_model_len,
    )


def parallel(spec, *, blocks, **options) -> ParallelExecutor:
    return ParallelExecutor(
        spec, 2, num_blocks=blocks, block_size=8, max_num_seqs=16, num_threads=1, **options
    )


@pytest.mark.parametrize(
    ("family", "changes", "fuse"),
    [
        # Biases on both sides of the sum, and a head that is the embedding.
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, True),
        # A vocabulary that two ranks cannot share.
        ("qwen2", {"vocab_size": 511}, True),
        ("qwen3", {}, False),
    ],
)
def test_two_ranks_draw_the_tokens_of_one(family, changes, fuse, tmp_path):
    path = make_checkpoint(tmp_path / family, family, **changes)
    spec = inspect_checkpoint(path)
    executor = parallel(spec, blocks=30, fuse=fuse)
    try:
        greedy = [make_request(f"{i}", p, TOKENS, rate=0.5) for i, p in enumerate(prompts())]
        engine = engine_on(executor, spec, "fcfs")
        out = answers(engine, greedy)
        assert engine.stats.preempted_recompute > 0
        for i, prompt in enumerate(prompts()):
            assert out[f"{i}"] == reference(path, prompt, TOKENS)
        drawn = [
            make_request(f"{i}", p, TOKENS, temperature=0.9, top_p=0.9, seed=i, logprobs=1)
            for i, p in enumerate(prompts())
        ]
        sampled = answers(engine_on(executor, spec, "slack"), drawn)
    finally:
        executor.close()
    whole = build_executor(
        spec, EngineConfig(block_size=8, max_num_seqs=16, cpu_threads=1, fuse=fuse), num_blocks=200
    )
    assert sampled == answers(engine_on(whole, spec, "slack"), drawn)
    whole.close()


def test_a_lost_rank_ends_the_executor_at_once():
    spec = inspect_checkpoint("random:tiny", dtype="float32")
    host = private_host_memory(8, spec.kv_layout(8), ranks=2)
    executor = parallel(spec, blocks=30, host=host)
    try:
        (pid,) = executor.processes
        os.kill(pid, signal.SIGSTOP)
        executor.offload([(0, 0)])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RankLostError, match="rank 1 of the tensor-parallel model failed"):
            for _ in range(100):
                executor.poll_transfers(0.1)
        engine = engine_on(executor, spec, "fcfs")
        with pytest.raises(RankLostError, match="rank 1 of the tensor-parallel model failed"):
            answers(engine, [make_request("a", [1, 2, 3], 8)])
    finally:
        executor.close()


def test_what_a_rank_cannot_load_is_told(tmp_path):
    path = make_checkpoint(tmp_path / "odd", intermediate_size=129)
    with pytest.raises(CheckpointError, match="cannot be divided over 2 devices"):
        parallel(inspect_checkpoint(path), blocks=30)


def test_the_ranks_hold_every_weight_once():
    shape = (6, 4)
    shards = [Shard(rank, 2) for rank in range(2)]
    parts = [s.part("model.layers.0.self_attn.q_proj", "weight", shape) for s in shards]
    assert parts == [(0, 0, 3), (0, 3, 3)]
    parts = [s.part("model.layers.0.mlp.down_proj", "weight", shape) for s in shards]
    assert parts == [(1, 0, 2), (1, 2, 2)]
    assert Shard(0, 2).part("model.layers.0.mlp.down_proj", "bias", (6,)) is None
    assert Shard(0, 2).part("lm_head", "weight", (5, 4)) is None
    assert Shard().part("lm_head", "weight", shape) is None


def test_the_configuration_says_what_it_needs():
    assert EngineConfig(tensor_parallel=2).offload
    with pytest.raises(ConfigError, match="4 devices cannot share the 4 heads and 2 KV heads"):
        inspect_model("random:tiny", EngineConfig(tensor_parallel=4), "cpu")
    with pytest.raises(ConfigError, match="2 GPUs from the first on are needed"):
        inspect_model("random:tiny", EngineConfig(tensor_parallel=2), "cuda:1")


def test_the_factory_makes_the_parallel_executor():
    config = EngineConfig(
        tensor_parallel=2, offload=False, kv_tokens=256, max_num_seqs=4, cpu_threads=1
    )
    spec = inspect_model("random:tiny", config, "cpu")
    blocks = plan_blocks(spec, config, available_bytes=1 << 30)
    engine = build_engine("random:tiny", config, FakeHost(0), num_blocks=blocks)
    try:
        assert isinstance(engine.executor, ParallelExecutor)
        assert len(answers(engine, [make_request("a", [1, 2, 3], 4)])["a"]) == 4
    finally:
        engine.executor.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_draw_the_tokens_of_one():
    config = {"kv_tokens": 384, "max_num_seqs": 8, "dtype": "float32", "verify_loads": "full"}
    outs = []
    for ranks in (1, 2):
        settings = EngineConfig(tensor_parallel=ranks, device="cuda", **config)
        layout = inspect_model("random:tiny", settings, "cuda").kv_layout(16)
        engine = build_engine(
            "random:tiny",
            settings,
            FakeHost(256),
            host_memory=private_host_memory(256, layout, ranks),
            device="cuda",
            num_blocks=384 // 16,
        )
        engine.policy = Chaos("a")
        outs.append(answers(engine, [make_request(f"{i}", p, 64) for i, p in enumerate(prompts())]))
        engine.executor.close()
        assert engine.stats.loaded_bytes > 0 and engine.stats.corrupt_blocks == 0
    assert outs[0] == outs[1]
