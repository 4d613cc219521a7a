"""Which attention backend runs: the fastest that can, or the one that was asked for."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.executor.attention.base import AttentionBackend
from tokenflow.replicas.executor.attention.pool import KVPool
from tokenflow.replicas.executor.attention.sdpa import SdpaAttention
from tokenflow.replicas.executor.base import KVLayout

BackendName = Literal["auto", "flash_attn", "triton", "sdpa"]

FLASH_PAGE_TOKENS = 256
"""flash-attn 2 takes only pages of a multiple of so many tokens."""


def choose_backend(wanted: BackendName, layout: KVLayout, device: torch.device) -> str:
    """The backend's name. "auto" prefers flash-attn to Triton to SDPA, which runs everywhere.

    Raises ConfigError when the one asked for cannot run here.
    """
    if wanted == "auto":
        if device.type != "cuda":
            return "sdpa"
        able = [name for name in ("flash_attn", "triton") if obstacle(name, layout, device) is None]
        return able[0] if able else "sdpa"
    reason = obstacle(wanted, layout, device)
    if reason is not None:
        raise ConfigError(
            f"engine.attention_backend: {wanted} cannot run here: {reason}; use auto or sdpa."
        )
    return wanted


def obstacle(name: str, layout: KVLayout, device: torch.device) -> str | None:
    """Why a backend cannot serve this layout on this device; None if it can."""
    if name == "sdpa":
        return None
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it needs an NVIDIA GPU, and the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    dim = layout.head_dim
    if name == "triton":
        return None if dim in (16, 32, 64, 128, 256) else f"a head_dim of {dim} is no power of two"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (the extra [gpu])"
    if layout.block_size % FLASH_PAGE_TOKENS:
        return f"engine.block_size must be a multiple of {FLASH_PAGE_TOKENS} for it"
    if layout.dtype == "float32":
        return "it has no float32"
    if dim not in (16, 32, 64, 128, 256):
        # Its own limit is wider, but KV is written by the Triton kernel.
        return f"a head_dim of {dim} is no power of two"
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # built for another torch, often
        return f"flash-attn is installed, but cannot be imported ({type(error).__name__}: {error})"
    return None


def make_backend(
    wanted: BackendName, pool: KVPool, *, group: int, window: int | None
) -> AttentionBackend:
    """The chosen backend over `pool`, for `group` query heads per KV head and a sliding window.

    Raises ConfigError as `choose_backend`.
    """
    name = choose_backend(wanted, pool.layout, pool.device)
    if name == "flash_attn":
        from tokenflow.replicas.executor.attention.flash import FlashAttention

        return FlashAttention(pool, window)
    if name == "triton":
        from tokenflow.replicas.executor.attention.triton_backend import TritonAttention

        # Interpreted, for tests, there are no multiprocessors to keep busy.
        processors = None if pool.device.type == "cuda" else 1
        return TritonAttention(pool, window, group, processors)
    return SdpaAttention(pool, window)
