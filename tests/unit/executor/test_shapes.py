"""Models by shape: no files, random weights, everything else as for a checkpoint."""

from __future__ import annotations

import random

import pytest
import torch

from tests.support.tiny_models import FAMILIES, make_checkpoint
from tokenflow.cluster.config import load_config
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.executor.model import load_model
from tokenflow.replicas.executor.parallel.sharding import Shard
from tokenflow.replicas.executor.shapes import SHAPES
from tokenflow.replicas.factory import inspect_model
from tokenflow.replicas.prefix import checkpoint_fingerprint
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.hardware import MODELS
from tokenflow.replicas.simulator.live import Bench, run_live
from tokenflow.replicas.simulator.workload import burst, requests
from tokenflow.replicas.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_is_the_model_that_the_simulator_knows(name):
    spec, model = inspect_checkpoint(f"random:{name}"), MODELS[name]
    assert (spec.layers, spec.num_heads, spec.kv_heads, spec.head_dim) == (
        model.layers,
        model.heads,
        model.kv_heads,
        model.head_dim,
    )
    assert spec.dtype == "bfloat16"
    assert spec.weight_bytes == pytest.approx(model.weight_bytes, rel=0.005)


def test_an_unknown_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"random:llama9-8b: no such shape.*llama3-8b"):
        inspect_checkpoint("random:llama9-8b")
    with pytest.raises(CheckpointError, match="limit is 8192"):
        inspect_checkpoint("random:tiny", max_model_len=10_000)
    with pytest.raises(CheckpointError, match="'int8' is not supported"):
        inspect_checkpoint("random:tiny", dtype="int8")


def test_the_configuration_takes_a_shape_for_a_path():
    config = load_config(None, {"model.path": "random:tiny"})
    assert config.model.name == "random:tiny"
    spec = inspect_model(config.model.directory, EngineConfig(), "cpu")
    assert (spec.path, spec.dtype) == ("random:tiny", "float32")


def test_shapes_are_told_apart_and_always_the_same():
    prints = {checkpoint_fingerprint(f"random:{name}") for name in SHAPES}
    assert len(prints) == len(SHAPES)
    spec = inspect_checkpoint("random:tiny", dtype="float32")
    one, two = (load_model(spec, CPU).state_dict() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    projections = [value for name, value in one.items() if name.endswith("q_proj.weight")]
    assert not torch.equal(*projections)
    assert torch.cat([p.flatten() for p in projections]).std().item() == pytest.approx(0.4, rel=0.1)


def test_ids_that_the_tokenizer_lacks_show_as_nothing():
    tokenizer = load_tokenizer("random:llama3-8b")
    assert tokenizer.decode([128_000, 100_000]) == ""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_filled_tensor_by_tensor_is_the_one_transformers_loads(family, tied, tmp_path):
    path = make_checkpoint(tmp_path / family, family, tie_word_embeddings=tied)
    spec = inspect_checkpoint(path)
    loaded, filled = load_model(spec, CPU), load_model(spec, CPU, Shard())
    expected, found = loaded.state_dict(), filled.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(loaded.model.rotary_emb.inv_freq, filled.model.rotary_emb.inv_freq)
    assert (filled.lm_head.weight is filled.model.embed_tokens.weight) == tied


def test_a_shape_is_served_by_an_engine():
    bench = Bench("random:tiny", EngineConfig(kv_tokens=512, cpu_threads=1), host_kv_tokens=2048)
    try:
        engine = bench.engine(make_policy("slack"))
        arrivals = requests(burst(8), 48, 64, [(20.0, 1.0)], random.Random(1))
        records = run_live(bench, engine, arrivals)
    finally:
        bench.close()
    assert [r.tokens for r in records] == [a.output_tokens for a in arrivals]
    assert engine.stats.preemptions > 0
