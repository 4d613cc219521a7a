"""What only a GPU can show: the backends' kernels, graphs, steps ahead and copy streams, for real.

Run by `sh benchmarks/gpu/run.sh tests`; skipped where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.engines import answers, make_request
from tests.support.fake_executor import FakeHost
from tests.support.paged import RAGGED, Setup
from tests.support.tiny_models import make_checkpoint, make_tokenizer, reference
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.executor.attention.choice import make_backend, obstacle
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.factory import build_executor, inspect_model, private_host_memory
from tokenflow.replicas.scheduler.registry import make_policy

DEVICE = "cuda"
TOKENS = 24
LENGTHS = (3, 40, 17, 90, 1, 64, 33, 5)
LONG = [(0, 300), (260, 5), (1500, 70), (2000, 1), (500, 1), (3, 1)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("name", ["flash_attn", "triton", "sdpa"])
@pytest.mark.parametrize("lengths", [RAGGED, LONG])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (7, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_a_backend_equals_plain_attention(name, lengths, heads, kv_heads, head_dim, window):
    block_size = 256 if name == "flash_attn" else 16
    layout = KVLayout(1, block_size, kv_heads, head_dim, "bfloat16")
    why_not = obstacle(name, layout, torch.device(DEVICE))
    if why_not is not None:
        pytest.skip(f"{name}: {why_not}")

    def backend(pool, window):
        return make_backend(name, pool, group=heads // kv_heads, window=window)

    made = Setup(
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        dtype="bfloat16",
        backend=backend,
        device=torch.device(DEVICE),
    )
    error = (made.run().float() - made.expected()).norm() / made.expected().norm()
    assert error < 1e-2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_greedy_text_is_that_of_transformers_through_preemption(checkpoint, backend, graphs, ahead):
    config = EngineConfig(
        block_size=16,
        kv_tokens=16 * 16,
        max_num_seqs=16,
        max_batch_tokens=48,
        dtype="float32",
        device=DEVICE,
        attention_backend=backend,
        decode_graphs=graphs,
        async_scheduling=ahead,
    )
    spec = inspect_model(checkpoint, config, DEVICE)
    slots = 200
    executor = build_executor(
        spec,
        config,
        host_memory=private_host_memory(slots, spec.kv_layout(16)),
        device=DEVICE,
        num_blocks=16,
    )
    engine = Engine(
        executor,
        make_policy("slack"),
        FakeHost(slots),
        config,
        tokenizer=make_tokenizer(),
        eos_ids=(),
        max_model_len=spec.max_model_len,
    )
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 500, (n,), generator=generator).tolist() for n in LENGTHS]
    requests = [make_request(f"{i}", p, TOKENS, rate=0.5) for i, p in enumerate(prompts)]
    try:
        out = answers(engine, requests)
    finally:
        executor.close()
    assert engine.stats.preempted_offload > 0
    for i, prompt in enumerate(prompts):
        assert out[f"{i}"] == reference(checkpoint, prompt, TOKENS)
