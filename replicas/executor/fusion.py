"""Fewer, larger operations in transformers' model classes, with the same result.

q, k and v become one matrix product, gate and up another, all products constant (`linear.py`),
RMSNorm one kernel, and rotary angles a table; where Triton runs, rotary embedding and the gated
activation one kernel each (`fused_kernels.py`). What does not look as expected is left as it is:
fusing is a matter of speed only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.linear import constant_linear, use_constant_linear

logger = logging.getLogger("tokenflow.engine")


def fuse_model(model: Any, spec: ModelSpec, *, kernels: bool = False) -> int:
    """Fuse in place, with Triton's kernels if `kernels`; returns the number of fused modules (0:
    the model runs as it came)."""
    body = model.model
    by_kernel = kernels and spec.head_dim & (spec.head_dim - 1) == 0
    if not all(_is_attention(layer.self_attn) for layer in body.layers):
        logger.warning("%s: attention layers of an unknown form; not fused", spec.architecture)
        return 0
    fused = 0
    for layer in body.layers:
        _fuse_attention(layer.self_attn, _rotate_by_kernel if by_kernel else _rotate)
        fused += 1
        if _is_mlp(layer.mlp):
            _fuse_mlp(layer.mlp, kernels)
            fused += 1
    for module in body.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_rms_norm, module)
            fused += 1
    use_constant_linear(model.lm_head)
    _table_rotary(body.rotary_emb, spec.max_model_len, next(body.parameters()).dtype)
    return fused + 1


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def _is_mlp(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _fuse_mlp(mlp: Any, kernels: bool) -> None:
    parts = (mlp.gate_proj, mlp.up_proj)
    mlp.gate_up = constant_linear(torch.cat([p.weight for p in parts]), _cat_bias(parts))
    del mlp.gate_proj, mlp.up_proj
    use_constant_linear(mlp.down_proj)
    if kernels and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        mlp.forward = MethodType(_silu_mlp, mlp)
        return

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return out

    mlp.forward = MethodType(run, mlp)


def _silu_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    from tokenflow.replicas.executor.fused_kernels import silu_and_multiply

    out: torch.Tensor = self.down_proj(silu_and_multiply(self.gate_up(x)))
    return out


def _cat_bias(parts: tuple[Any, ...]) -> torch.Tensor | None:
    if any(p.bias is None for p in parts):
        return None
    return torch.cat([p.bias for p in parts])


def _is_attention(module: Any) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(module, n, None), nn.Linear) for n in names):
        return False
    biases = {module.q_proj.bias is None, module.k_proj.bias is None, module.v_proj.bias is None}
    return len(biases) == 1 and hasattr(module, "head_dim") and hasattr(module, "scaling")


def _rotate(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`sin` carries the sign of the rotated half."""
    return qk * cos + qk.roll(qk.shape[-1] // 2, -1) * sin


def _rotate_by_kernel(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `_rotate`, in place."""
    from tokenflow.replicas.executor.fused_kernels import rotate

    rotate(qk, cos, sin)
    return qk


def _fuse_attention(attn: Any, rotate: Callable[..., torch.Tensor]) -> None:
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    attn.qkv = constant_linear(torch.cat([p.weight for p in parts]), _cat_bias(parts))
    attn.num_q = attn.q_proj.out_features // attn.head_dim
    attn.num_kv = attn.k_proj.out_features // attn.head_dim
    del attn.q_proj, attn.k_proj, attn.v_proj
    use_constant_linear(attn.o_proj)
    attn.rotate = rotate
    attn.forward = MethodType(_attend, attn)


def _attend(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    from tokenflow.replicas.executor.model import CURRENT

    x = hidden_states[0]
    tokens = x.shape[0]
    heads = self.qkv(x).view(tokens, -1, self.head_dim)
    qk, value = heads.split((self.num_q + self.num_kv, self.num_kv), 1)
    if hasattr(self, "q_norm"):
        query, key = qk.split((self.num_q, self.num_kv), 1)
        qk = torch.cat([self.q_norm(query), self.k_norm(key)], 1)
    qk = self.rotate(qk, *position_embeddings)
    assert CURRENT.batch is not None
    out = CURRENT.batch.attend(
        qk[:, : self.num_q], qk[:, self.num_q :], value, self.layer_idx, self.scaling
    )
    projected: torch.Tensor = self.o_proj(out.reshape(1, tokens, -1))
    return projected, None


def _table_rotary(rotary: Any, max_len: int, dtype: torch.dtype) -> None:
    """Angles for every position once, `[max_len, 1, head_dim]`, instead of at every step."""
    inv_freq = rotary.inv_freq.float()
    angles = torch.arange(max_len, device=inv_freq.device).float()[:, None] * inv_freq[None]
    scale = rotary.attention_scaling
    cos = torch.cat([angles.cos(), angles.cos()], -1) * scale
    sin = torch.cat([-angles.sin(), angles.sin()], -1) * scale
    rotary.cos_table = cos.to(dtype)[:, None]
    rotary.sin_table = sin.to(dtype)[:, None]

    def look_up(
        self: Any, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = position_ids[0]
        return self.cos_table[positions], self.sin_table[positions]

    rotary.forward = MethodType(look_up, rotary)
