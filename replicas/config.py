"""Configuration of one engine: a branch of the pydantic tree in `cluster/config.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import make_policy


class EngineConfig(BaseModel):
    """One replica's engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = Field(
        default="slack",
        description="Scheduling policy, by name; or `module:Class` for one of yours "
        "(docs/write-a-policy.md).",
    )
    policy_params: dict[str, float] = Field(
        default_factory=dict, description="Parameters of the policy that differ from its defaults."
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens per KV block.")
    kv_tokens: int | None = Field(
        default=None,
        ge=16,
        le=1 << 40,
        description="Device KV memory of a replica, in tokens; null = what fits.",
    )
    memory_fraction: float = Field(
        default=0.85,
        gt=0,
        le=1,
        description="Share of device memory used when kv_tokens is null (GPU: of the card; CPU: "
        "of half the free memory, divided by the replicas).",
    )
    max_num_seqs: int = Field(
        default=128, ge=1, le=4096, description="Most sequences on the device at once."
    )
    max_batch_tokens: int = Field(
        default=1024, ge=16, le=1 << 20, description="Token budget of one step."
    )
    max_model_len: int | None = Field(
        default=None, ge=16, description="Longest prompt + output, in tokens; null = the model's."
    )
    max_waiting: int = Field(
        default=4096, ge=1, description="Requests a replica holds; more are refused."
    )
    offload: bool = Field(
        default=True,
        description="Keep the KV of preempted requests on the host; false = recompute it.",
    )
    write_through: bool = Field(
        default=True, description="Copy filled blocks to the host in the background."
    )
    overlap_transfers: bool = Field(
        default=True,
        description="Free the copied blocks of a victim at once and load while others are written "
        "out; false = one direction at a time.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Reuse the KV of a prompt's beginning where it is still on the device or in "
        "the node's store.",
    )
    verify_loads: Literal["off", "sampled", "full"] = Field(
        default="sampled",
        description="Check the checksum of KV loaded from the host: of one block in 64, or of "
        "every one.",
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda" or "cuda:N".')
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Weights and KV; auto = the checkpoint's on a GPU, float32 on a CPU.",
    )
    cpu_threads: int | None = Field(
        default=None, ge=1, description="Torch threads of a CPU replica; null = its share."
    )
    attention_backend: Literal["auto", "flash_attn", "triton", "sdpa"] = Field(
        default="auto",
        description="auto = on a GPU flash_attn where it is installed and block_size is a multiple "
        "of 256, else triton; on a CPU sdpa.",
    )
    decode_graphs: bool | None = Field(
        default=None,
        description="Decode by CUDA graphs; null = on a GPU. On a CPU, true pads the batches alike "
        "(for tests).",
    )
    async_scheduling: bool | None = Field(
        default=None,
        description="Plan the next step while one runs, a token behind; null = on a GPU.",
    )
    fuse: bool = Field(default=True, description="Fuse projections and norms of known families.")
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="GPUs of one machine over which a replica divides the model.",
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        _make(name, {})
        return name

    @field_validator("policy_params")
    @classmethod
    def _known_params(cls, params: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if "policy" in info.data:
            _make(info.data["policy"], params)
        return params


def _make(name: str, params: dict[str, float]) -> None:
    try:
        make_policy(name, params)
    except ConfigError as error:
        raise ValueError(str(error).removesuffix(".")) from None
