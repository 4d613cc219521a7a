"""What the pieces of the GPU benchmarks share: flags, clocks, ceilings, and how a result is kept.

Every piece runs with `--device cpu --tiny` too, which shows that it works and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.executor.base import Executor, KVLayout, ScheduledSequence
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.shapes import shape_config
from tokenflow.replicas.factory import build_executor, inspect_model, private_host_memory
from tokenflow.replicas.sampling.params import SamplingParams

PACKAGES = ("torch", "transformers", "triton", "flash-attn", "numpy")
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every piece has."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--device", default="cuda", help='"cuda" or "cpu" (cuda)')
    flags.add_argument("--tiny", action="store_true", help="smallest sizes, to try the script")
    flags.add_argument("--model", help="a shape or a model directory (random:llama3-8b)")
    flags.add_argument("--out", default="benchmarks/results", help="folder of the JSON files")
    flags.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the engine's configuration, such as attention_backend=triton",
    )
    flags.add_argument("--seconds", type=float, default=480.0, help="stop starting things (480)")
    return flags


@dataclass
class Run:
    """One call of one piece."""

    args: argparse.Namespace
    name: str
    """Of the result: `gpu-NAME.json`."""
    results: dict[str, Any]

    @classmethod
    def start(cls, args: argparse.Namespace, name: str) -> Run:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device here; --device cpu --tiny tries the script")
        args.model = args.model or ("random:tiny" if args.tiny else "random:llama3-8b")
        args.began = time.monotonic()
        return cls(args, name, {})

    @property
    def device(self) -> torch.device:
        return torch.device(self.args.device)

    @property
    def seconds_left(self) -> float:
        return float(self.args.seconds - (time.monotonic() - self.args.began))

    @property
    def path(self) -> Path:
        return Path(self.args.out) / f"gpu-{self.name}.json"

    def keep(self, key: str, value: Any) -> None:
        """Note a result and write all of them, so that a run that is cut off has kept some."""
        self.results[key] = value
        print(f"{self.name} {key}: {_short(value)}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "command": " ".join(sys.argv),
            "measured": self.args.device == "cuda" and not self.args.tiny,
            "machine": machine(),
            "versions": versions(),
            "model": self.args.model,
            "settings": self.args.set,
            "results": self.results,
        }
        self.path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def config(self, **fixed: Any) -> EngineConfig:
        """The engine's configuration with `--set`. Raises ConfigError naming a wrong key."""
        tree: dict[str, Any] = {"device": self.args.device, **fixed}
        for item in self.args.set:
            key, _, value = item.partition("=")
            tree[key] = _value(value)
        try:
            return EngineConfig.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{key}: {first['msg']}") from None

    def executor(
        self, config: EngineConfig, *, kv_tokens: int, host_tokens: int = 0
    ) -> tuple[Executor, ModelSpec]:
        """With KV for exactly so many tokens, in whole blocks."""
        blocks = -(-kv_tokens // config.block_size)
        # Said, and not measured, so that every variant has the same.
        config = config.model_copy(update={"kv_tokens": blocks * config.block_size})
        spec = inspect_model(self.args.model, config, self.args.device)
        layout = spec.kv_layout(config.block_size)
        memory = None
        if host_tokens:
            memory = private_host_memory(
                host_tokens // config.block_size, layout, config.tensor_parallel
            )
        executor = build_executor(
            spec,
            config,
            host_memory=memory,
            device=self.args.device,
            num_blocks=blocks,
        )
        return executor, spec

    def free_memory(self) -> None:
        """Give back what a closed executor has left."""
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()

    def timed(self, call: Callable[[], Any], *, repeats: int = 20, warm_up: int = 3) -> float:
        """Median seconds of a call, by the device's events, else by the clock."""
        for _ in range(warm_up):
            call()
        seconds = []
        for _ in range(repeats):
            if self.args.device == "cuda":
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record()
                call()
                ended.record()
                ended.synchronize()
                seconds.append(begun.elapsed_time(ended) / 1e3)
            else:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        return median(seconds)


def memory_gb_s(run: Run) -> float:
    """Bytes read and written per second by a copy on the device, in 1e9."""
    size = 1 << (24 if run.args.tiny else 32)
    source = torch.empty(size, dtype=torch.uint8, device=run.device).random_(256)
    target = torch.empty_like(source)
    return 2 * size / run.timed(lambda: target.copy_(source)) / 1e9


def matmul_tflops(run: Run) -> float:
    """A large bfloat16 product of random numbers, which are slower than zeros."""
    n = 256 if run.args.tiny else 8192
    a, b = (torch.randn(n, n, device=run.device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / run.timed(lambda: a @ b) / 1e12


def link_gb_s(run: Run, block: int, *, to_host: bool) -> float:
    """Copies of blocks of `block` bytes one after the other in one direction, page-locked."""
    count = max(1, (8 << 20 if run.args.tiny else 1 << 30) // block)
    host = torch.empty(count, block, dtype=torch.uint8, pin_memory=run.args.device == "cuda")
    device = torch.zeros(count, block, dtype=torch.uint8, device=run.device)
    source, target = (device, host) if to_host else (host.fill_(85), device)

    def copies() -> None:
        for i in range(count):
            target[i].copy_(source[i], non_blocking=True)

    return count * block / run.timed(copies, repeats=7) / 1e9


def block_ids(sequences: int, tokens: int, block_size: int) -> Iterator[np.ndarray]:
    """Block tables of sequences of that length, which share no block; scattered as later on."""
    blocks = -(-tokens // block_size)
    order = np.random.default_rng(1).permutation(sequences * blocks).astype(np.int32)
    for i in range(sequences):
        yield order[i * blocks : (i + 1) * blocks]


def decoding(
    batch: int, context: int, longest: int, block_size: int, vocab: int
) -> list[ScheduledSequence]:
    """One decode step of sequences that have `context` tokens and may reach `longest`."""
    tables = block_ids(batch, longest, block_size)
    return [
        sequence(slot, [(slot * 37 + context) % vocab], context, table)
        for slot, table in enumerate(tables)
    ]


def sequence(
    slot: int, tokens: list[int], start: int, table: np.ndarray, *, sample: bool = True
) -> ScheduledSequence:
    return ScheduledSequence(slot, tokens, start, table, sample, GREEDY, (), ())


def later(batch: list[ScheduledSequence], token: int | None = None) -> list[ScheduledSequence]:
    """The decode step after `batch`, with the same tokens again or all with `token`."""
    return [
        sequence(s.slot, [s.token_ids[0] if token is None else token], s.start + 1, s.block_ids)
        for s in batch
    ]


def weights_read(spec: ModelSpec) -> float:
    """Bytes of weights that every step reads: all but the embedding, of which it reads rows."""
    if not spec.path.startswith("random:") or shape_config(spec.path)["tie_word_embeddings"]:
        return float(spec.weight_bytes)
    embedding = spec.vocab_size * spec.hidden_size * KVLayout(1, 1, 1, 1, spec.dtype).itemsize
    return float(spec.weight_bytes - embedding)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """What a result was measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = gpu.name
        found["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        found["gpus"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items() if not isinstance(v, list))
    return str(value)
