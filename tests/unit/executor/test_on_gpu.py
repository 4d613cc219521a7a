"""What only a GPU can show: the backends' kernels, graphs, steps ahead and copy streams, for real.

Run by `sh benchmarks/gpu/run.sh tests`; skipped where there is no GPU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash

from tests.support.engines import answers, make_request
from tests.support.fake_executor import FakeHost
from tests.support.paged import RAGGED, Setup
from tests.support.tiny_models import make_checkpoint, make_tokenizer, reference
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.executor.attention.base import PackedStep
from tokenflow.replicas.executor.attention.choice import make_backend, obstacle
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.base import UNKNOWN, KVLayout, ScheduledSequence
from tokenflow.replicas.executor.block_copies import CudaCopies
from tokenflow.replicas.factory import build_executor, inspect_model, private_host_memory
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.sampling.sampler import gumbel
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


def test_blocks_lie_beyond_the_reach_of_32_bits():
    layout = KVLayout(32, 16, 8, 128, "bfloat16")
    pool = KVPool(layout, 3000, torch.device(DEVICE))
    assert pool.data.numel() > 2**31
    backend = make_backend("triton", pool, group=4, window=None)
    table = np.array([[2999, 2990]], np.int32)
    at = np.arange(20)
    step = PackedStep(
        lengths=np.array([20]),
        starts=np.array([0]),
        num_prefills=1,
        block_tables=table,
        places=table[0, at // 16].astype(np.int64) * 16 + at % 16,
    )
    query = torch.randn(20, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.randn(2, 20, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    out = backend.prepare(step).attend(query, key, value, 31, 128**-0.5)
    q, k, v = (x.float().transpose(0, 1)[None] for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = (out.float() - expected[0].transpose(0, 1)).norm() / expected.norm()
    assert error < 1e-2


def test_fused_kernels_do_what_torch_does():
    from tokenflow.replicas.executor.fused_kernels import noisy_argmax, rotate, silu_and_multiply

    heads = torch.randn(50, 43, 128, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.randn(50, 1, 64, device=DEVICE)
    cos = torch.cat([angles.cos(), angles.cos()], -1).bfloat16()
    sin = torch.cat([-angles.sin(), angles.sin()], -1).bfloat16()
    qk = heads[:, :40]
    expected = (qk.float() * cos + qk.float().roll(64, -1) * sin).bfloat16()
    rotate(qk, cos, sin)
    torch.testing.assert_close(qk, expected)
    gate_up = torch.randn(1, 50, 2 * 14336, device=DEVICE, dtype=torch.bfloat16)
    gate, up = gate_up.float().chunk(2, -1)
    torch.testing.assert_close(silu_and_multiply(gate_up), (F.silu(gate) * up).bfloat16())
    scores = torch.randn(64, 128256, device=DEVICE)
    bases = torch.randint(-(2**62), 2**62, (64,), device=DEVICE)
    drawn = noisy_argmax(scores, bases).tolist()
    assert drawn == (scores + gumbel(bases, 128256)).argmax(-1).tolist()
    # The same numbers as on a CPU, but for the last bit of a logarithm.
    there = (scores.cpu() + gumbel(bases.cpu(), 128256)).argmax(-1).tolist()
    assert sum(a != b for a, b in zip(drawn, there, strict=True)) <= 1


def test_copies_go_both_ways_at_once_and_are_checked():
    layout = KVLayout(4, 16, 8, 128, "bfloat16")
    pool = torch.randint(0, 256, (64, layout.block_bytes), dtype=torch.uint8, device=DEVICE)
    host = private_host_memory(64, layout)
    host[32:] = torch.arange(32, dtype=torch.uint8)[:, None]
    before = pool.cpu()
    copies = CudaCopies(pool, host)
    assert host.is_pinned()
    try:
        out = copies.to_host([(i, 31 - i) for i in range(32)])
        back = copies.to_device([(32 + i, 63 - i) for i in range(32)], ())
        done = {}
        while len(done) < 3:
            reports = copies.poll(5.0)
            assert reports, f"only {done} was reported"
            done |= {(d.job_id, d.seconds > 0): d for d in reports}
        assert all(d.error is None for d in done.values())
        for i in range(32):
            assert torch.equal(host[31 - i], before[i])
            assert torch.equal(pool[63 - i].cpu(), host[32 + i])
        sums = [xxhash.xxh3_64_intdigest(before[i].numpy()) for i in range(32)]
        assert done[out, False].checksums == tuple(sums)
        assert done[back, True].corrupt == ()
        copies.to_device([(31, 0), (30, 1)], [sums[0], sums[0]])
        (checked,) = copies.poll(5.0)
        assert checked.corrupt == (1,)
    finally:
        copies.close()
    assert not host.is_pinned()


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


def small_executor(checkpoint, **fields):
    config = EngineConfig(max_num_seqs=8, max_batch_tokens=64, device=DEVICE, **fields)
    spec = inspect_model(checkpoint, config, DEVICE)
    return build_executor(spec, config, device=DEVICE, num_blocks=64)


def test_kv_gets_the_memory_that_was_measured(checkpoint):
    executor = small_executor(checkpoint, memory_fraction=0.05, dtype="float32")
    try:
        assert executor.num_blocks > 64
        table = np.array([executor.num_blocks - 1], np.int32)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        step = ScheduledSequence(0, [3, 4, 5], 0, table, True, params, (), ())
        assert executor.execute([step]).token_ids == reference(checkpoint, [3, 4, 5], 1)
    finally:
        executor.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_a_launch_never_waits_for_the_device(checkpoint, graphs):
    executor = small_executor(checkpoint, kv_tokens=1024, decode_graphs=graphs)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "logprobs": 3},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": {7: 1.5}, "logprobs": 0},
    ]
    batch = [
        ScheduledSequence(
            slot,
            (3, 4, 5),
            0,
            np.arange(2 * slot, 2 * slot + 2, dtype=np.int32),
            True,
            SamplingParams(max_tokens=9, **kind),
            (3, 4, 5),
            (),
            suppress_ids=(1,),
        )
        for slot, kind in enumerate(kinds)
    ]
    try:
        for checked in (False, True):  # the first time, what is done once is done
            running = executor.launch(batch)
            decoding = [
                dataclasses.replace(s, token_ids=(UNKNOWN,), start=3, output_ids=(UNKNOWN,))
                for s in batch
            ]
            torch.cuda.set_sync_debug_mode("error" if checked else "default")
            try:
                following = executor.launch(decoding)
                again = executor.launch([*decoding[:2], *batch[2:]])  # a chunk beside decoding
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for step in (running, following, again):
                assert all(token >= 0 for token in step.result().token_ids)
    finally:
        executor.close()
