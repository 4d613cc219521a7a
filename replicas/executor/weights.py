"""Weights tensor by tensor, whole or one rank's part, straight onto the device: from the files of a
checkpoint, or random for a shape. No rank ever holds a whole model that it does not run.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open

from tokenflow.replicas.executor.shapes import is_shape, shape_config


class Part(NamedTuple):
    """Indices `[start, start + length)` along a dimension."""

    dim: int
    start: int
    length: int


class Weights(Protocol):
    """The tensors of one model by their names in its checkpoint."""

    def take(
        self, name: str, shape: tuple[int, ...], part: Part | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor of its own memory; `shape` is that of the whole one."""
        ...


def open_weights(path: str, device: torch.device) -> Weights:
    """The weights of a model directory or of `random:NAME`."""
    if is_shape(path):
        return RandomWeights(shape_config(path).get("initializer_range", 0.02), device)
    return StoredWeights(Path(path), device)


class RandomWeights:
    """Normal weights and biases, and norms of 1; by name always the same on one kind of device."""

    def __init__(self, deviation: float, device: torch.device) -> None:
        self._deviation = deviation
        self._device = device

    def take(
        self, name: str, shape: tuple[int, ...], part: Part | None, dtype: torch.dtype
    ) -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype, device=self._device)
        if name.endswith("norm.weight"):
            whole.fill_(1)
        else:
            generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
            whole.normal_(0, self._deviation, generator=generator)
        return whole if part is None else whole.narrow(*part).clone()


class StoredWeights:
    """Of the safetensors files of a directory, of which only the parts asked for are read."""

    def __init__(self, root: Path, device: torch.device) -> None:
        self._device = device
        self._files: dict[str, Any] = {}
        for path in sorted(root.glob("*.safetensors")):
            file = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
            self._files.update(dict.fromkeys(file.keys(), file))

    def take(
        self, name: str, shape: tuple[int, ...], part: Part | None, dtype: torch.dtype
    ) -> torch.Tensor:
        stored = self._files[name].get_slice(name)
        where: list[slice] = [slice(None)] * len(shape)
        if part is not None:
            where[part.dim] = slice(part.start, part.start + part.length)
        tensor: torch.Tensor = stored[tuple(where)]
        return tensor.to(self._device, dtype, copy=True).contiguous()
