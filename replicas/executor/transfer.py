"""Small host arrays to the device and drawn tokens back, without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 16
"""Bytes; Triton's kernels load faster from addresses that are known to be multiples of it."""


def upload(arrays: Seq[np.ndarray[Any, Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays on a device, all by one copy, which nobody waits for; on a CPU as they are, where
    they are contiguous."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    packed = torch.from_numpy(pack(arrays)).pin_memory()
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Seq[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The bytes of all arrays, uint8, each beginning at a multiple of the alignment."""
    buffer = np.zeros(sum(map(_padded_bytes, arrays)), np.uint8)
    at = 0
    for array in arrays:
        buffer[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at += _padded_bytes(array)
    return buffer


def unpack(packed: torch.Tensor, arrays: Seq[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    """Views of what `pack` made of `arrays`, with their shapes and dtypes."""
    views = []
    at = 0
    for array in arrays:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        views.append(packed[at : at + array.nbytes].view(dtype).view(array.shape))
        at += _padded_bytes(array)
    return views


def _padded_bytes(array: np.ndarray[Any, Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Seq[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._arrived: Any = None
        device = tensors[0].device
        if device.type == "cuda":
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> list[torch.Tensor]:
        """The tensors, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
