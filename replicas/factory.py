"""Putting an engine together from a checkpoint and a configuration; and sizing its memory."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.kvstore.segment import Segment
from tokenflow.kvstore.sizing import available_memory_bytes
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.errors import CheckpointError, ConfigError
from tokenflow.replicas.executor.base import Executor, KVLayout
from tokenflow.replicas.executor.checkpoint import (
    ACTIVATION_SHARE,
    ModelSpec,
    check_memory,
    inspect_checkpoint,
)
from tokenflow.replicas.prefix import checkpoint_fingerprint
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.tokenizer import load_tokenizer
from tokenflow.replicas.transfers import HostSlots

if TYPE_CHECKING:
    from tokenflow.replicas.executor.memory import MemoryBudget

logger = logging.getLogger("tokenflow.engine")


def resolve_device(device: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu". Raises ConfigError for a device that
    this machine does not have."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f'engine.device: {device!r} is not "auto", "cpu" or "cuda:N".') from None
    if wanted.type != "cuda" or (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine.device: {device!r} does not exist on this machine.")
    return device


def inspect_model(directory: str | Path, config: EngineConfig, device: str) -> ModelSpec:
    """The model's description in the dtype it will run in. Raises CheckpointError, and ConfigError
    when it cannot be divided as configured."""
    dtype = config.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    spec = inspect_checkpoint(directory, dtype=dtype, max_model_len=config.max_model_len)
    _check_ranks(spec, config.tensor_parallel, device)
    return spec


def _check_ranks(spec: ModelSpec, ranks: int, device: str) -> None:
    if spec.num_heads % ranks or spec.kv_heads % ranks:
        raise ConfigError(
            f"engine.tensor_parallel: {ranks} devices cannot share the {spec.num_heads} heads and "
            f"{spec.kv_heads} KV heads of {spec.name} evenly; choose a divisor of both."
        )
    if ranks == 1 or device == "cpu":
        return
    import torch

    if device not in ("cuda", "cuda:0") or torch.cuda.device_count() < ranks:
        raise ConfigError(
            f"engine.tensor_parallel: {ranks} GPUs from the first on are needed, but engine.device "
            f"is {device!r} and this process sees {torch.cuda.device_count()}."
        )


def free_memory_bytes(device: str, ranks: int = 1) -> int:
    """Memory that weights and KV may share on a device, or on the first `ranks` GPUs."""
    if device == "cpu":
        return available_memory_bytes()
    import torch

    first = torch.device(device).index or 0
    free = [torch.cuda.mem_get_info(first + rank)[0] for rank in range(ranks)]
    return ranks * min(free)


def plan_blocks(
    spec: ModelSpec, config: EngineConfig, *, available_bytes: int, sharers: int = 1
) -> int:
    """KV blocks of one replica, when `sharers` replicas share `available_bytes`.

    Raises CheckpointError when weights and that KV do not fit, or not one request fits the KV.
    """
    layout = spec.kv_layout(config.block_size)
    share = available_bytes // sharers
    if config.kv_tokens is not None:
        blocks = config.kv_tokens // config.block_size
        if blocks < 1:
            raise ConfigError(
                f"engine.kv_tokens: {config.kv_tokens} is less than one block of "
                f"{config.block_size} tokens."
            )
    else:
        fraction = min(config.memory_fraction, 1 / (1 + ACTIVATION_SHARE))
        room = int(share * fraction) - spec.weight_bytes
        blocks = min(max(room // layout.block_bytes, 0), _most_blocks(spec, config))
        if blocks < _least_blocks(spec, config):
            raise CheckpointError(
                f"{spec.path}: the weights take {spec.weight_bytes / 2**30:.2f} GiB and leave no "
                f"room for KV in the {share / 2**30:.2f} GiB a replica may use; free memory, serve "
                "a smaller model, or run fewer replicas."
            )
    check_memory(spec, available_bytes=share, kv_bytes=blocks * layout.block_bytes)
    return int(blocks)


def _most_blocks(spec: ModelSpec, config: EngineConfig) -> int:
    """More than every sequence at full length is never used."""
    return -(-config.max_num_seqs * spec.max_model_len // config.block_size)


def _least_blocks(spec: ModelSpec, config: EngineConfig) -> int:
    return -(-min(256, spec.max_model_len) // config.block_size)


def _memory_budget(
    spec: ModelSpec, config: EngineConfig, device: str, sharers: int
) -> MemoryBudget | None:
    """What a replica may take of a GPU, if it is not told how much KV to hold."""
    if device == "cpu" or config.kv_tokens is not None:
        return None
    import torch

    from tokenflow.replicas.executor.memory import CudaMemory, MemoryBudget

    return MemoryBudget(
        total_bytes=int(free_memory_bytes(device) * config.memory_fraction) // sharers,
        most_blocks=_most_blocks(spec, config),
        least_blocks=_least_blocks(spec, config),
        max_batch_tokens=config.max_batch_tokens,
        memory=CudaMemory(torch.device(device)),
    )


def cpu_threads(config: EngineConfig, sharers: int) -> int:
    """Torch threads of one CPU replica: its share of the cores this process may use, less one
    core for everything that is not the model (threads that wait for a late one gain nothing)."""
    return config.cpu_threads or max(1, (len(os.sched_getaffinity(0)) - 1) // sharers)


def private_host_memory(slots: int, layout: KVLayout, ranks: int = 1) -> Any:
    """Host memory for KV without a node store: a uint8 tensor `[slots, block_bytes]`; for several
    ranks, which are processes, a Segment whose file goes when the object does (None for no slots).

    Written to at once, because the first touch of a page is dearer than a copy; of large pages,
    where the kernel has them, which take less time to touch and to lock. The executor locks them:
    torch's own allocator of page-locked memory would round up to a power of two. Raises
    KVStoreError when a segment does not fit.
    """
    import torch

    if ranks > 1:
        return _private_segment(slots, layout) if slots else None
    size = slots * layout.block_bytes
    if size == 0:
        return torch.empty((0, layout.block_bytes), dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(memoryview(pages), dtype=torch.uint8).zero_()
    return memory.view(slots, layout.block_bytes)


def _private_segment(slots: int, layout: KVLayout) -> Segment:
    name = f"private-{uuid.uuid4().hex}"
    segment = Segment.create(name, slot_bytes=layout.block_bytes, num_slots=slots, epoch=0)
    weakref.finalize(segment, Path(segment.path).unlink, missing_ok=True)
    return segment


def build_executor(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    host_memory: Any = None,
    device: str = "cpu",
    num_blocks: int,
    sharers: int = 1,
) -> Executor:
    """Load the model. `host_memory` is the node's Segment, None, or for one rank any uint8 tensor
    `[slots, block_bytes]`. Unless `engine.kv_tokens` says how much KV a GPU holds it is measured,
    and `num_blocks` not used; but not where several share a model. Raises CheckpointError,
    ConfigError or KVStoreError."""
    from tokenflow.replicas.executor.parallel.executor import ParallelExecutor
    from tokenflow.replicas.executor.torch_executor import TorchExecutor

    ranks = config.tensor_parallel
    options: dict[str, Any] = {
        "num_blocks": num_blocks,
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "device": device,
        "num_threads": cpu_threads(config, sharers * ranks) if device == "cpu" else None,
        "fuse": config.fuse,
        "attention_backend": config.attention_backend,
        "decode_graphs": config.decode_graphs,
    }
    if ranks > 1:
        return ParallelExecutor(spec, ranks, host=host_memory, **options)
    if isinstance(host_memory, Segment):
        host_memory = host_memory.tensor()
    budget = _memory_budget(spec, config, device, sharers)
    return TorchExecutor(spec, host_memory=host_memory, memory=budget, **options)


def processes_of(executor: Executor) -> list[int]:
    """Pids of the processes besides this one that copy into host memory for it."""
    from tokenflow.replicas.executor.parallel.executor import ParallelExecutor

    return executor.processes if isinstance(executor, ParallelExecutor) else []


def build_engine(
    directory: str | Path,
    config: EngineConfig,
    host: HostSlots,
    *,
    host_memory: Any = None,
    device: str = "cpu",
    num_blocks: int,
    sharers: int = 1,
) -> Engine:
    """Load the model and return an engine ready to step; `host_memory` as in `build_executor`."""
    spec = inspect_model(directory, config, device)
    tokenizer = load_tokenizer(directory)
    executor = build_executor(
        spec,
        config,
        host_memory=host_memory,
        device=device,
        num_blocks=num_blocks,
        sharers=sharers,
    )
    return Engine(
        executor,
        make_policy(config.policy, config.policy_params),
        host,
        config,
        tokenizer=tokenizer,
        eos_ids=spec.eos_token_ids,
        max_model_len=spec.max_model_len,
        model=checkpoint_fingerprint(spec.path),
    )
