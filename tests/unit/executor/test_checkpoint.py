"""A model directory that cannot be served is refused in one sentence that says where and why."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.fake_executor import FakeHost
from tests.support.tiny_models import FAMILIES, make_checkpoint
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import CheckpointError, ConfigError
from tokenflow.replicas.executor.checkpoint import ModelSpec, check_memory, inspect_checkpoint
from tokenflow.replicas.executor.model import load_model
from tokenflow.replicas.factory import (
    build_engine,
    free_memory_bytes,
    inspect_model,
    plan_blocks,
    resolve_device,
)
from tokenflow.replicas.tokenizer import load_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ONE_TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "sound")


@pytest.fixture
def model(sound, tmp_path):
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def build(path: Path, **config: Any) -> None:
    """Everything a replica does to start, in one call."""
    settings = EngineConfig(kv_tokens=256, device="cpu", **config)
    spec = inspect_model(path, settings, "cpu")
    blocks = plan_blocks(spec, settings, available_bytes=free_memory_bytes("cpu"))
    engine = build_engine(path, settings, FakeHost(4), num_blocks=blocks)
    engine.executor.close()


def refusal(
    call: Callable[[], object], *names: object, kind: type[Exception] = CheckpointError
) -> str:
    """The message of the error, checked to be one sentence that holds each of `names`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for name in names:
        assert str(name) in message
    assert message.endswith("."), message
    assert "\n" not in message, message
    assert not re.search(r"[.!?]\s+[A-Z]", message), f"more than one sentence: {message}"
    return message


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def shard(path: Path) -> list[str]:
    """Split the weights over several files with an index; the names of the files."""
    transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").save_pretrained(
        path, max_shard_size="200KB"
    )
    (path / WEIGHTS).unlink(missing_ok=True)
    names = sorted(p.name for p in path.glob("model-*.safetensors"))
    assert len(names) > 1
    return names


def test_a_sound_checkpoint_builds_an_engine(sound):
    build(sound)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_described_as_it_is(tmp_path, family):
    path = make_checkpoint(tmp_path / family, family)
    spec = inspect_checkpoint(path)
    model = load_model(spec, torch.device("cpu"))
    config = model.config
    assert spec.name == family
    assert spec.architecture == type(model).__name__
    assert (spec.layers, spec.num_heads, spec.kv_heads, spec.head_dim) == (2, 4, 2, 16)
    assert (spec.hidden_size, spec.vocab_size) == (config.hidden_size, config.vocab_size)
    assert (spec.max_model_len, spec.dtype) == (512, "float32")
    assert spec.eos_token_ids == (0,)
    assert spec.sliding_window is None
    assert spec.weight_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_the_head_size_need_not_divide_the_hidden_size(tmp_path):
    path = make_checkpoint(tmp_path / "wide", head_dim=32)
    assert inspect_checkpoint(path).head_dim == 32
    build(path)


@pytest.mark.parametrize(
    ("stored", "device", "asked", "served"),
    [
        ("float32", "cpu", "auto", "float32"),
        ("bfloat16", "cpu", "auto", "float32"),
        ("bfloat16", "cuda", "auto", "bfloat16"),
        ("float16", "cuda", "auto", "float16"),
        ("float32", "cpu", "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_is_the_stored_one_or_the_one_asked_for(model, stored, device, asked, served):
    size = inspect_checkpoint(model).weight_bytes
    kind = getattr(torch, stored)
    edit_weights(model, lambda t: t.update({n: x.to(kind) for n, x in t.items()}))
    spec = inspect_model(model, EngineConfig(dtype=asked), device)
    assert spec.dtype == served
    assert spec.weight_bytes == size * (1 if served == "float32" else 0.5)


def test_the_end_of_sequence_ids_come_from_the_generation_config_first(model):
    edit_config(model, eos_token_id=[3, 4])
    (model / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert inspect_checkpoint(model).eos_token_ids == (5, 6)
    (model / "generation_config.json").unlink()
    assert inspect_checkpoint(model).eos_token_ids == (3, 4)
    edit_config(model, eos_token_id=7)
    assert inspect_checkpoint(model).eos_token_ids == (7,)
    edit_config(model, eos_token_id=None)
    assert inspect_checkpoint(model).eos_token_ids == ()


def test_no_such_directory(tmp_path, model):
    refusal(lambda: build(tmp_path / "nowhere"), tmp_path / "nowhere")
    refusal(lambda: build(model / "config.json"), model / "config.json")


@pytest.mark.parametrize(
    "text",
    [None, "", "not json", '{"architectures": ["LlamaForCausalLM"]', "[1, 2]", "\ud800"],
    ids=["missing", "empty", "words", "cut", "a list", "not utf-8"],
)
def test_a_config_that_cannot_be_read(model, text):
    config = model / "config.json"
    config.unlink()
    if text is not None:
        config.write_bytes(text.encode("utf-8", "surrogatepass"))
    refusal(lambda: build(model), model, "config.json")


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], [], None, ..., "Words"], ids=str)
def test_an_unknown_architecture(model, architectures):
    edit_config(model, architectures=architectures)
    message = refusal(lambda: build(model), model, "LlamaForCausalLM")
    if isinstance(architectures, list) and architectures:
        assert architectures[0] in message


@pytest.mark.parametrize("value", [..., None, "many"], ids=str)
@pytest.mark.parametrize(
    "field",
    [
        "num_attention_heads",
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_a_size_that_is_missing_or_no_number(model, field, value):
    edit_config(model, **{field: value})
    refusal(lambda: build(model), model / "config.json")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_below_one(model, field, value):
    edit_config(model, **{field: value, "head_dim": ...})
    refusal(lambda: build(model), model / "config.json")


@pytest.mark.parametrize("value", [0, -1])
def test_a_context_below_one_token(model, value):
    edit_config(model, max_position_embeddings=value)
    refusal(lambda: build(model), model)


def test_no_heads_and_no_head_size(model):
    edit_config(model, num_attention_heads=0, head_dim=...)
    refusal(lambda: build(model), model)


def test_a_wrong_end_of_sequence_id_in_the_generation_config(model):
    (model / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    refusal(lambda: build(model), model / "generation_config.json")


def test_an_unknown_rope_type(model):
    edit_config(model, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4})
    refusal(lambda: build(model), model, "dynamic")


def test_rope_parameters_that_are_no_object(model):
    edit_config(model, rope_parameters="linear")
    refusal(lambda: build(model), model)


def test_a_quantized_checkpoint(model):
    edit_config(model, quantization_config={"quant_method": "gptq"})
    refusal(lambda: build(model), model, "quantized")


def test_missing_weights(model):
    (model / WEIGHTS).unlink()
    refusal(lambda: build(model), model, WEIGHTS)


def header_only(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
        lambda f: f.write_bytes(f.read_bytes()[:100]),
        lambda f: f.write_bytes(f.read_bytes()[:5]),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"\xff" * 4096),
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        lambda f: header_only(f, b"{}"),
        lambda f: header_only(f, b"[]"),
        lambda f: header_only(f, b"\xff\xfe"),
        lambda f: header_only(f, b'{"a": {"dtype": "F32"}}'),
        lambda f: header_only(f, b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}'),
    ],
    ids=[
        "one byte short",
        "half",
        "header cut",
        "five bytes",
        "empty",
        "noise",
        "git-lfs pointer",
        "no tensors",
        "a list",
        "header not utf-8",
        "no offsets",
        "no shape",
    ],
)
def test_damaged_weights(model, damage):
    damage(model / WEIGHTS)
    refusal(lambda: inspect_checkpoint(model), model)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 0]}}',
    ],
    ids=["empty offsets", "empty name", "shape of words", "dtype is a list"],
)
def test_a_nonsense_header(model, header):
    header_only(model / WEIGHTS, header)
    refusal(lambda: build(model), model)


def test_weights_that_may_not_be_read(model, monkeypatch):
    real = Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == WEIGHTS:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    refusal(lambda: inspect_checkpoint(model), model / WEIGHTS)


VARIANTS = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in FAMILIES),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_every_tensor_is_needed_in_its_shape(tmp_path, family, changes):
    path = make_checkpoint(tmp_path / family, family, **changes)
    build(path)
    whole = load_file(path / WEIGHTS)
    assert ("lm_head.weight" in whole) != changes.get("tie_word_embeddings", False)
    for name, tensor in whole.items():
        others = {n: t for n, t in whole.items() if n != name}
        for damaged in (others, others | {name: tensor[:-1].clone()}):
            save_file(damaged, path / WEIGHTS, metadata={"format": "pt"})
            refusal(lambda: build(path), path, name)


def test_sizes_that_do_not_match_the_weights(model):
    edit_config(model, intermediate_size=256)
    refusal(lambda: build(model), model)


def test_more_layers_than_the_weights_have(model):
    edit_config(model, num_hidden_layers=3)
    refusal(lambda: build(model), model)


@pytest.mark.parametrize(
    ("kind", "name"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8")]
)
def test_weights_of_an_unsupported_type(model, kind, name):
    edit_weights(model, lambda t: t.update({n: x.to(kind) for n, x in t.items()}))
    refusal(lambda: build(model), model, name)


def test_a_dtype_that_cannot_be_asked_for(model):
    refusal(lambda: inspect_checkpoint(model, dtype="int8"), model, "int8")


def test_a_missing_tokenizer(model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    refusal(lambda: build(model), model, "tokenizer.json")


def test_a_damaged_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")
    refusal(lambda: load_tokenizer(model), model)
    refusal(lambda: build(model), model)


def test_an_index_that_names_a_missing_shard(model):
    names = shard(model)
    (model / names[-1]).unlink()
    refusal(lambda: build(model), model, names[-1])


def test_a_damaged_shard(model):
    names = shard(model)
    (model / names[0]).write_bytes((model / names[0]).read_bytes()[:-7])
    refusal(lambda: build(model), model / names[0])


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "nothing"])
def test_an_index_that_says_nothing(model, text):
    shard(model)
    (model / INDEX).write_text(text)
    refusal(lambda: build(model), model / INDEX)


def test_sharded_weights_are_the_same_model(sound, model):
    shard(model)
    one, many = inspect_checkpoint(sound), inspect_checkpoint(model)
    assert replace(many, path=one.path, name=one.name) == one
    whole = load_model(one, torch.device("cpu")).state_dict()
    pieces = load_model(many, torch.device("cpu")).state_dict()
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_longer_context_than_the_models(model):
    refusal(lambda: build(model, max_model_len=513), model, "513", "512")
    assert inspect_checkpoint(model, max_model_len=512).max_model_len == 512
    assert inspect_checkpoint(model, max_model_len=16).max_model_len == 16


@pytest.fixture(scope="module")
def spec(sound) -> ModelSpec:
    return inspect_checkpoint(sound)


def test_too_little_memory_for_the_weights(spec):
    for memory in (0, spec.weight_bytes // 2, spec.weight_bytes):
        refusal(lambda m=memory: plan_blocks(spec, EngineConfig(), available_bytes=m), spec.path)


def test_too_little_memory_for_the_kv_asked_for(spec):
    config = EngineConfig(kv_tokens=4096)
    kv = 4096 * spec.kv_layout(16).token_bytes
    enough = int((spec.weight_bytes + kv) * 1.1) + 1
    assert plan_blocks(spec, config, available_bytes=enough) == 256
    assert plan_blocks(spec, config, available_bytes=2 * enough, sharers=2) == 256
    for memory, sharers in ((enough - 2, 1), (2 * enough - 4, 2), (spec.weight_bytes, 1)):
        refusal(
            lambda m=memory, s=sharers: plan_blocks(spec, config, available_bytes=m, sharers=s),
            spec.path,
        )


def test_kv_for_less_than_one_block_is_a_configuration_error(spec):
    config = EngineConfig(kv_tokens=16, block_size=32)
    refusal(lambda: plan_blocks(spec, config, available_bytes=2**40), "kv_tokens", kind=ConfigError)


def test_no_more_kv_is_planned_than_can_be_used(spec):
    config = EngineConfig(max_num_seqs=3)
    assert plan_blocks(spec, config, available_bytes=2**40) == 3 * 512 // 16


@pytest.mark.parametrize("fraction", [0.5, 0.85, 0.9, 0.95, 1.0])
def test_kv_fills_the_share_of_memory_that_is_given(spec, fraction):
    config = EngineConfig(memory_fraction=fraction)
    memory = 16 * 2**20
    blocks = plan_blocks(spec, config, available_bytes=memory)
    used = spec.weight_bytes + blocks * spec.kv_layout(16).block_bytes
    assert 0.8 * fraction * memory < used <= fraction * memory


def test_memory_is_checked_with_room_for_activations(spec):
    check_memory(spec, available_bytes=2 * spec.weight_bytes, kv_bytes=0)
    refusal(
        lambda: check_memory(spec, available_bytes=spec.weight_bytes + 1000, kv_bytes=0), spec.path
    )


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:x", "mps", ""])
def test_a_device_that_is_not_there(device):
    refusal(lambda: resolve_device(device), "engine.device", kind=ConfigError)
