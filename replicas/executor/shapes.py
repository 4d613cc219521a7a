"""Models by shape: `random:NAME` in place of a model directory, with random weights made on the
device. A step takes the same time whatever the weights say, so speed needs no download.

Only descriptions are here; the weights are made in `weights.py`. Text comes from the embedded
model's tokenizer, which knows few of the ids such a model draws, so most of them show as nothing.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenflow.replicas.errors import CheckpointError

_PREFIX = "random:"

# Fields of the published config.json files.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "qwen2-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "qwen2.5-32b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    # For trying things out on a CPU; weights so large that greedy choices are firm.
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.4,
    },
}

STORED_DTYPE = "bfloat16"
"""What `dtype: auto` means for a shape on a GPU."""


def is_shape(path: str | Path) -> bool:
    """Whether a model path names a shape, not a directory."""
    return str(path).startswith(_PREFIX)


def shape_config(path: str | Path) -> dict[str, Any]:
    """The config.json of `random:NAME`. Raises CheckpointError for an unknown name."""
    name = str(path).removeprefix(_PREFIX)
    if name not in SHAPES:
        raise CheckpointError(
            f"{path}: no such shape; known are {', '.join(_PREFIX + known for known in SHAPES)}."
        )
    return copy.deepcopy(SHAPES[name])


def embedded_model() -> Path:
    """The directory of the model that ships in the package."""
    import tokenflow.replicas

    return Path(tokenflow.replicas.__path__[0]) / "models" / "tokenflow-books"
