"""KV gets what weights, the worst step and graphs leave of the memory, as an allocator tells it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from tests.support.engines import make_request
from tests.support.fake_executor import FakeHost
from tests.support.tiny_models import make_checkpoint, make_tokenizer, reference
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.errors import CheckpointError, StepMemoryError
from tokenflow.replicas.executor import torch_executor
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.executor.memory import MemoryBudget, fit_blocks, step_blocks, worst_step
from tokenflow.replicas.executor.torch_executor import TorchExecutor
from tokenflow.replicas.factory import _memory_budget, private_host_memory
from tokenflow.replicas.scheduler.registry import make_policy

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


class FakeMemory:
    """Weights take 7 MiB on top of 1 MiB, and a step 3 MiB on top of 20."""

    def __init__(self) -> None:
        self.told = iter([1 * MIB, 8 * MIB, 20 * MIB])
        self.peak_was_reset = False

    def used(self) -> int:
        return next(self.told)

    def reset_peak(self) -> None:
        self.peak_was_reset = True

    def peak(self) -> int:
        assert self.peak_was_reset
        return 23 * MIB


def budget(total=40 * MIB, most=10_000, memory=None):
    return MemoryBudget(
        total_bytes=total,
        most_blocks=most,
        least_blocks=4,
        max_batch_tokens=48,
        memory=memory or FakeMemory(),
    )


def fitted(**changes):
    figures = {"weight_bytes": 7000, "step_bytes": 2000, "graph_bytes": 500, "block_bytes": 100}
    return lambda limits: fit_blocks(limits, name="model", **{**figures, **changes})


def test_kv_gets_what_is_left_less_the_block_for_padding():
    fit = fitted()
    assert fit(budget(10_000)) == 4
    assert fit(budget(10_100)) == 5
    assert fit(budget(10_100, most=4)) == 4
    for total in (9_999, 100):
        with pytest.raises(CheckpointError, match=r"model: .* of weights, .*memory_fraction"):
            fit(budget(total))


@pytest.mark.parametrize("tokens, sequences", [(48, 16), (16, 16), (5, 16), (100, 1)])
def test_the_worst_step_has_all_tokens_and_sequences(tokens, sequences):
    step = worst_step(tokens, sequences, 8)
    assert sum(len(s.token_ids) for s in step) == tokens
    assert len({s.slot for s in step}) == len(step) == min(sequences, tokens)
    assert all(s.sample and s.params.filters for s in step)
    held = [block for s in step for block in s.block_ids.tolist()]
    assert held == list(range(step_blocks(step)))
    assert all(len(s.block_ids) == -(-len(s.token_ids) // 8) for s in step)


def make(checkpoint, **options) -> Engine:
    spec = inspect_checkpoint(checkpoint)
    executor = TorchExecutor(
        spec, num_blocks=1, block_size=8, max_num_seqs=16, num_threads=1, **options
    )
    return Engine(
        executor,
        make_policy("fcfs"),
        FakeHost(0),
        EngineConfig(block_size=8, max_num_seqs=16, max_batch_tokens=48, offload=False),
        tokenizer=make_tokenizer(),
        eos_ids=(),
        max_model_len=spec.max_model_len,
    )


def tokens(engine: Engine, prompt: list[int]) -> list[int]:
    engine.add(make_request("a", prompt, 12))
    events = []
    while engine.has_work:
        engine.step()
        events += engine.take_events()
    engine.executor.close()
    return [event.token_id for event in events]


def test_an_executor_measures_and_serves(checkpoint, caplog):
    with caplog.at_level(logging.INFO, "tokenflow.engine"):
        engine = make(checkpoint, memory=budget())
    block = engine.executor.layout.block_bytes
    # 16 of the step's 48 tokens are what a graph of all sequences has.
    assert engine.executor.num_blocks == (40 * MIB - 7 * MIB - 3 * MIB - MIB) // block - 1
    assert "KV blocks" in caplog.text and "0.01 GiB of weights" in caplog.text
    assert tokens(engine, [5, 6, 7]) == reference(checkpoint, [5, 6, 7], 12)


def test_out_of_memory_in_the_model_is_told_as_such_and_survived(checkpoint, monkeypatch):
    engine = make(checkpoint, memory=budget())
    run: Callable[..., torch.Tensor] = torch_executor.hidden_states

    def limited(model, ids, *rest):
        if len(ids) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, ids, *rest)

    monkeypatch.setattr(torch_executor, "hidden_states", limited)
    prompt = list(range(3, 43))
    with pytest.raises(StepMemoryError, match="CUDA out of memory"):
        engine.executor.execute(worst_step(48, 16, 8))
    assert tokens(engine, prompt) == reference(checkpoint, prompt, 12)
    assert engine.stats.out_of_memory > 0


def test_what_does_not_fit_at_the_start_is_said(checkpoint, monkeypatch):
    def capture(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchExecutor, "_capture", capture)
    with pytest.raises(CheckpointError, match=r"1 KV blocks and the graphs .*engine\.kv_tokens"):
        make(checkpoint, decode_graphs=True)


def test_host_memory_of_ones_own_lives_as_long_as_its_tensor():
    layout = KVLayout(2, 8, 2, 16, "float32")
    memory = private_host_memory(3, layout)
    assert memory.shape == (3, layout.block_bytes) and memory.dtype == torch.uint8
    assert not memory.any()
    slot = memory[2]
    del memory
    slot.fill_(7)
    assert int(slot.sum()) == 7 * layout.block_bytes
    assert private_host_memory(0, layout).shape == (0, layout.block_bytes)


def test_only_a_gpu_that_is_not_told_measures(checkpoint, monkeypatch):
    spec = inspect_checkpoint(checkpoint)
    monkeypatch.setattr("tokenflow.replicas.factory.free_memory_bytes", lambda device: 1000)
    assert _memory_budget(spec, EngineConfig(), "cpu", 1) is None
    assert _memory_budget(spec, EngineConfig(kv_tokens=512), "cuda", 1) is None
    limits = _memory_budget(spec, EngineConfig(memory_fraction=0.3), "cuda", 2)
    assert limits is not None and limits.total_bytes == 150
    assert limits.max_batch_tokens == EngineConfig().max_batch_tokens
