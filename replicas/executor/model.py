"""Loading a Hugging Face checkpoint, or making a model by shape, and running its forward pass over
the paged pool.

The model classes are transformers' own; our attention is registered with them under one name. The
step's metadata travels in `CURRENT`, not in keyword arguments, which some model families drop.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.attention.base import AttentionBatch
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.parallel.sharding import Shard, fill
from tokenflow.replicas.executor.shapes import is_shape, shape_config
from tokenflow.replicas.executor.weights import open_weights

logger = logging.getLogger("tokenflow.engine")

# No "flash", "sdpa" or "flex" in the name: transformers treats those by substring.
ATTENTION = "tokenflow_paged"


class _Current:
    """The batch of the step that is running; one engine thread per process."""

    batch: AttentionBatch | None = None


CURRENT = _Current()


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[1, heads, tokens, head_dim]` in, tokens first out."""
    assert CURRENT.batch is not None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = CURRENT.batch.attend(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), layer, scale
    )
    return out[None], None


def load_model(spec: ModelSpec, device: torch.device, shard: Shard | None = None) -> Any:
    """The model in evaluation mode on `device`, or one rank's part of it.

    Raises CheckpointError when loading fails.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attention)
    if shard is not None or is_shape(spec.path):
        return _make_model(spec, device, shard or Shard())
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=ATTENTION,
            local_files_only=True,
        )
    except Exception as error:
        raise _unloadable(spec, error) from error
    return model.to(device).eval().requires_grad_(False)


def _make_model(spec: ModelSpec, device: torch.device, shard: Shard) -> Any:
    """Build the model without memory, then fill it tensor by tensor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if is_shape(spec.path):
            fields = shape_config(spec.path)
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(spec.path, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, spec.dtype), attn_implementation=ATTENTION
            )
        fill(model, open_weights(spec.path, device), shard, tied=config.tie_word_embeddings)
        # The frequencies are no weights, but computed by the module itself.
        with torch.device(device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.path}: {error}") from None
    except Exception as error:
        raise _unloadable(spec, error) from error
    return model.eval().requires_grad_(False)


def _unloadable(spec: ModelSpec, error: Exception) -> CheckpointError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return CheckpointError(
        f"{spec.path}: the weights cannot be loaded ({type(error).__name__}: {first}); the "
        "checkpoint is damaged or does not match its config.json."
    )


def hidden_states(
    model: Any, token_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch
) -> torch.Tensor:
    """`[tokens, hidden]` of the packed batch; token_ids and positions int64 `[tokens]`."""
    CURRENT.batch = batch
    try:
        hidden: torch.Tensor = model.model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False
        ).last_hidden_state[0]
        return hidden
    finally:
        CURRENT.batch = None


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """float32 `[rows, vocab]` of hidden states `[rows, hidden]`."""
    logits: torch.Tensor = model.lm_head(hidden)
    return logits.float()
