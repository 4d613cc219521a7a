"""Matrix products with a constant weight: on a CPU by oneDNN over a weight laid out for it once.

torch's own linear layer hands oneDNN (bfloat16) or MKL (float32) the weight as it lies, and it is
laid out anew in every call. benchmarks/executor/linear.py measures both side by side.

oneDNN makes code for each number of rows that it has not seen, which takes time and memory that it
keeps (measured there as well); so rows are padded to few different numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Linear = Callable[[torch.Tensor], torch.Tensor]
"""`[..., in]` to `[..., out]`, in the weight's dtype."""

_PACKED_DTYPES = (torch.bfloat16, torch.float32)


def constant_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The product with `weight` `[out, in]`, plus `bias` `[out]`, both never changed again.

    On a CPU the weight is copied: the caller should let its own go.
    """
    if _packs(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return partial(_packed, packed, bias)
    return partial(F.linear, weight=weight, bias=bias)


def use_constant_linear(module: Any) -> None:
    """Give an `nn.Linear` a constant product in place of its forward, and let its weight go when
    nobody else holds it. Where there is nothing to gain it stays as it is."""
    if _packs(module.weight):
        module.forward = constant_linear(module.weight, module.bias)
        del module.weight


def padded_rows(rows: int) -> int:
    """The next of the numbers that products are made for: eight to an octave, all up to 16."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _packed(weight: Any, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    rows = x.shape[-2]
    missing = padded_rows(rows) - rows
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out[..., :rows, :] if missing else out


def _packs(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _PACKED_DTYPES and _has_packed_linear()


def _has_packed_linear() -> bool:
    """Whether this torch has the operators: they carry its compiler's CPU code, not a public API,
    and are absent from builds without oneDNN."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
