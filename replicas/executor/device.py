"""What a device can do."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on NVIDIA GPUs, where the package is installed."""
    return device.type == "cuda" and _is_installed("triton")


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
