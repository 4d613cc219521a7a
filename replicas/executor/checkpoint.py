"""What a model directory holds, found out without loading it: no torch, no weights in memory.

Everything that can be wrong with a checkpoint is said here, in one sentence, before any replica
starts.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.executor.shapes import STORED_DTYPE, is_shape, shape_config

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
)
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_WRONG_VALUE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError)
"""What a value of the wrong kind in someone else's file ends in."""
ACTIVATION_SHARE = 0.1
"""Memory beside weights and KV, as a share of them."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint as it will be served."""

    path: str
    """Of its directory, or `random:NAME`."""
    name: str
    architecture: str
    model_type: str
    layers: int
    hidden_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: str
    """Of weights and KV: float32, bfloat16 or float16."""
    weight_bytes: int
    """Of all weights in `dtype`."""
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None

    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(self.layers, block_size, self.kv_heads, self.head_dim, self.dtype)


def inspect_checkpoint(
    path: str | Path, *, dtype: str = "auto", max_model_len: int | None = None
) -> ModelSpec:
    """Describe the checkpoint in a directory, or a shape; `dtype` "auto" keeps the stored one.

    Raises CheckpointError, one sentence, for anything that could not be served.
    """
    if is_shape(path):
        return _describe_shape(str(path), dtype, max_model_len)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such model directory.")
    config = _read_json(root, "config.json")
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named or "unknown"
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{root}/config.json: the architecture {architecture} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{root}: quantized checkpoints are not supported; serve the float32, bfloat16 or "
            "float16 weights."
        )
    _check_rope(root, config)
    if not any((root / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{root}: tokenizer.json (or tokenizer.model) is missing.")
    tensors = _weights(root)
    resolved = _resolve_dtype(root, dtype, _main_dtype(root, tensors))
    eos = _eos_ids(root, config)
    try:
        elements = sum(math.prod(shape) for _, shape in tensors.values())
        spec = _spec(root, config, resolved, max_model_len, elements, eos)
        if spec.layers > len(tensors):
            raise ValueError(f"num_hidden_layers ({spec.layers}, but {len(tensors)} tensors)")
        expected = _expected_tensors(spec, config)
    except _WRONG_VALUE as error:
        raise CheckpointError(f"{root}/config.json: missing or wrong field {error}.") from None
    if min(spec.layers, spec.num_heads, spec.kv_heads, spec.head_dim, spec.vocab_size) < 1:
        raise CheckpointError(f"{root}/config.json: a size below 1.")
    surplus = f"model.layers.{spec.layers}."
    if any(name.startswith(surplus) for name in tensors):
        raise CheckpointError(
            f"{root}: the weights have more than the {spec.layers} layers of config.json."
        )
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{root}: the weights lack the tensor {name}.")
        if tensors[name][1] != shape:
            raise CheckpointError(
                f"{root}: the tensor {name} has shape {list(tensors[name][1])}, but config.json "
                f"asks for {list(shape)}."
            )
    return spec


def _describe_shape(path: str, dtype: str, max_model_len: int | None) -> ModelSpec:
    """Raises CheckpointError."""
    config = shape_config(path)
    resolved = _resolve_dtype(Path(path), dtype, STORED_DTYPE)
    spec = _spec(Path(path), config, resolved, max_model_len, 0, ())
    elements = sum(math.prod(shape) for shape in _expected_tensors(spec, config).values())
    return replace(spec, weight_bytes=elements * DTYPES[resolved])


def _resolve_dtype(root: Path, asked: str, stored: str) -> str:
    dtype = stored if asked == "auto" else asked
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{root}: dtype {dtype!r} is not supported; use float32, bfloat16 or float16."
        )
    return dtype


def _spec(
    root: Path,
    config: dict[str, Any],
    dtype: str,
    max_model_len: int | None,
    elements: int,
    eos: tuple[int, ...],
) -> ModelSpec:
    """From the fields of config.json; `elements` are those of all weights."""
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    limit = _size(config, "max_position_embeddings")
    if max_model_len is not None and max_model_len > limit:
        raise CheckpointError(
            f"{root}: engine.max_model_len is {max_model_len}, but the model's own limit is "
            f"{limit} tokens."
        )
    named = config["architectures"]
    architecture = named[0] if isinstance(named, list) else named
    return ModelSpec(
        path=str(root),
        name=root.resolve().name,
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=_size(config, "vocab_size"),
        max_model_len=max_model_len or limit,
        dtype=dtype,
        weight_bytes=elements * DTYPES[dtype],
        eos_token_ids=eos,
        sliding_window=_window(config, architecture),
    )


def _size(config: dict[str, Any], name: str) -> int:
    """A positive number of config.json. Raises ValueError."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        raise ValueError(f"{name} ({value!r} is no size)")
    return value


def _expected_tensors(spec: ModelSpec, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model needs; a missing one would be filled with noise."""
    hidden, middle = spec.hidden_size, _size(config, "intermediate_size")
    q, kv = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    qwen2 = spec.architecture == "Qwen2ForCausalLM"
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (middle, hidden),
        "mlp.up_proj.weight": (middle, hidden),
        "mlp.down_proj.weight": (hidden, middle),
    }
    for name, shape in projections.items():
        layer[f"self_attn.{name}_proj.weight"] = shape
        if (qwen2 and name != "o") or (not qwen2 and config.get("attention_bias")):
            layer[f"self_attn.{name}_proj.bias"] = shape[:1]
    if spec.architecture == "LlamaForCausalLM" and config.get("mlp_bias"):
        for name, size in (("gate", middle), ("up", middle), ("down", hidden)):
            layer[f"mlp.{name}_proj.bias"] = (size,)
    if spec.architecture == "Qwen3ForCausalLM":
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (spec.head_dim,)
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (spec.vocab_size, hidden)
    for i in range(spec.layers):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def check_memory(spec: ModelSpec, *, available_bytes: int, kv_bytes: int) -> None:
    """Raise CheckpointError unless weights, KV and a share for activations fit."""
    needed = (spec.weight_bytes + kv_bytes) * (1 + ACTIVATION_SHARE)
    if needed > available_bytes:
        raise CheckpointError(
            f"{spec.path}: {spec.weight_bytes / 2**30:.2f} GiB of weights and "
            f"{kv_bytes / 2**30:.2f} GiB of KV do not fit in the {available_bytes / 2**30:.2f} GiB "
            "a replica may use; lower --kv-tokens, serve a smaller model, or run fewer replicas."
        )


def _read_json(root: Path, name: str) -> dict[str, Any]:
    file = root / name
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{root}: {name} is missing.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: must hold a JSON object.")
    return data


def _check_rope(root: Path, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{root}/config.json: the rope parameters are no object.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"{root}: rope type {kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}."
        )


def _window(config: dict[str, Any], architecture: str) -> int | None:
    window = config.get("sliding_window")
    if window is None:
        return None
    if architecture.startswith("Qwen") and not config.get("use_sliding_window", False):
        return None
    return int(window)


def _eos_ids(root: Path, config: dict[str, Any]) -> tuple[int, ...]:
    name = "generation_config.json"
    eos = None
    if (root / name).is_file():
        eos = _read_json(root, name).get("eos_token_id")
    if eos is None:
        name = "config.json"
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    try:
        return tuple(int(i) for i in (eos if isinstance(eos, list) else [eos]))
    except _WRONG_VALUE:
        raise CheckpointError(f"{root}/{name}: eos_token_id is {eos!r}, not token ids.") from None


_Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (stored dtype, shape)."""


def _weights(root: Path) -> _Tensors:
    """All tensors of the checkpoint."""
    index = root / "model.safetensors.index.json"
    if index.is_file():
        mapping = _read_json(root, index.name).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{index}: has no weight_map.")
        files = [root / name for name in sorted(set(mapping.values()))]
    else:
        files = [root / "model.safetensors"]
    tensors: _Tensors = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{root}: {file.name} is missing (safetensors weights).")
        tensors |= _tensors(file)
    if not tensors:
        raise CheckpointError(f"{root}: the weight files hold no tensors.")
    return tensors


def _main_dtype(root: Path, tensors: _Tensors) -> str:
    """The dtype most elements have."""
    counts: dict[str, int] = {}
    for dtype, shape in tensors.values():
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    main = max(counts, key=lambda name: counts[name])
    if main not in _STORED:
        raise CheckpointError(
            f"{root}: weights of type {main} are not supported; use float32, bfloat16 or float16."
        )
    return _STORED[main]


def _tensors(file: Path) -> _Tensors:
    """The tensors of one file, from its header; checks that the file is whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: (str(t["dtype"]), tuple(int(n) for n in t["shape"])) for name, t in header.items()
        }
        end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
    except (struct.error, *_WRONG_VALUE) as error:
        raise CheckpointError(f"{file}: is not a safetensors file ({error}).") from None
    if 8 + length + end > size:
        raise CheckpointError(
            f"{file}: is cut off ({size} of {8 + length + end} bytes); copy it again."
        )
    return tensors
