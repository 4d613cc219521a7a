"""What a model directory holds, found out without loading it: no torch, no weights in memory.

Everything that can be wrong with a checkpoint is said here, in one sentence, before any replica
starts.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.base import KVLayout

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
)
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint as it will be served."""

    path: str
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
    """Describe the checkpoint in a directory; `dtype` "auto" keeps the stored one.

    Raises CheckpointError, one sentence, for anything that could not be served.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such model directory.")
    config = _read_json(root, "config.json")
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{root}: the architecture {architecture} is not supported; supported are "
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
    elements, stored = _weights(root)
    resolved = stored if dtype == "auto" else dtype
    if resolved not in DTYPES:
        raise CheckpointError(
            f"{root}: dtype {resolved!r} is not supported; use float32, bfloat16 or float16."
        )
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        limit = int(config["max_position_embeddings"])
        if max_model_len is not None and max_model_len > limit:
            raise CheckpointError(
                f"{root}: engine.max_model_len is {max_model_len}, but the model's own limit is "
                f"{limit} tokens."
            )
        spec = ModelSpec(
            path=str(root),
            name=root.resolve().name,
            architecture=architecture,
            model_type=str(config.get("model_type", "")),
            layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            num_heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_model_len=max_model_len or limit,
            dtype=resolved,
            weight_bytes=elements * DTYPES[resolved],
            eos_token_ids=_eos_ids(root, config),
            sliding_window=_window(config, architecture),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{root}/config.json: missing or wrong field {error}.") from None
    if min(spec.layers, spec.kv_heads, spec.head_dim, spec.vocab_size) < 1:
        raise CheckpointError(f"{root}/config.json: a size below 1.")
    return spec


def check_memory(
    spec: ModelSpec, *, available_bytes: int, kv_bytes: int, overhead: float = 0.1
) -> None:
    """Raise CheckpointError unless weights, KV and a share for activations fit."""
    needed = (spec.weight_bytes + kv_bytes) * (1 + overhead)
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
    eos = None
    if (root / "generation_config.json").is_file():
        eos = _read_json(root, "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(i) for i in (eos if isinstance(eos, list) else [eos]))


def _weights(root: Path) -> tuple[int, str]:
    """(elements of all tensors, the dtype most of them have)."""
    index = root / "model.safetensors.index.json"
    if index.is_file():
        mapping = _read_json(root, index.name).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{index}: has no weight_map.")
        files = [root / name for name in sorted(set(mapping.values()))]
    else:
        files = [root / "model.safetensors"]
    counts: dict[str, int] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{root}: {file.name} is missing (safetensors weights).")
        for dtype, elements in _tensors(file):
            counts[dtype] = counts.get(dtype, 0) + elements
    if not counts:
        raise CheckpointError(f"{root}: the weight files hold no tensors.")
    main = max(counts, key=lambda name: counts[name])
    if main not in _STORED:
        raise CheckpointError(
            f"{root}: weights of type {main} are not supported; use float32, bfloat16 or float16."
        )
    return sum(counts.values()), _STORED[main]


def _tensors(file: Path) -> list[tuple[str, int]]:
    """(dtype, elements) of each tensor, from the header; checks that the file is whole."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(stream.read(length))
        tensors = [(t["dtype"], math.prod(t["shape"])) for n, t in header.items() if n[0] != "_"]
        end = max((t["data_offsets"][1] for n, t in header.items() if n[0] != "_"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: is not a safetensors file ({error}).") from None
    if 8 + length + end > size:
        raise CheckpointError(
            f"{file}: is cut off ({size} of {8 + length + end} bytes); copy it again."
        )
    return tensors
