"""The one configuration tree: YAML in, checked values out, every error naming its key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tokenflow.cluster.limits import Limits
from tokenflow.cluster.logs import LogConfig
from tokenflow.cluster.routing import ROUTERS
from tokenflow.kvstore.segment import SHM_DIRECTORY
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.executor.shapes import embedded_model


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """What is served."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="A local Hugging Face model directory, or random:NAME for the shape of a known "
        "model with random weights; null = the embedded model.",
    )
    served_name: str | None = Field(
        default=None, min_length=1, description="The name clients use; null = the folder's name."
    )

    @property
    def directory(self) -> Path:
        return Path(os.path.expanduser(self.path)) if self.path else embedded_model()

    @property
    def name(self) -> str:
        return self.served_name or self.directory.resolve().name


class KVStoreConfig(_Section):
    """The node's KV store."""

    host_kv_gib: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Host memory for KV per node, GiB; 0 = none, null = a safe share of what is "
        "free.",
    )
    directory: str = Field(
        default=SHM_DIRECTORY,
        min_length=1,
        description="Where it lies: a folder of a file system in memory (tmpfs) that all replicas "
        "of a node see.",
    )


class AutoscalingConfig(_Section):
    """How many replicas there are, when their number follows the load."""

    min: int = Field(default=1, ge=1, le=1024)
    max: int = Field(ge=1, le=1024)
    target_utilisation: float = Field(
        default=0.7, gt=0, le=1, description="Of the rates that a replica may promise."
    )
    max_ttft_s: float = Field(
        default=2.0,
        gt=0,
        description="While every replica predicts a longer time to the first token, one is added.",
    )
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)

    @model_validator(mode="after")
    def _min_is_below_max(self) -> AutoscalingConfig:
        if self.min > self.max:
            raise ValueError("min must not be above max")
        return self


class ReplicasConfig(_Section):
    """The replica actors."""

    count: int = Field(default=1, ge=1, le=1024)
    autoscaling: AutoscalingConfig | None = Field(
        default=None, description="Bounds and targets; null = always `count` replicas."
    )
    gpus_each: float | None = Field(
        default=None,
        ge=0,
        description="null = engine.tensor_parallel where the cluster has GPUs, else 0.",
    )
    cpus_each: float = Field(default=0, ge=0, description="CPUs Ray reserves for a replica.")
    router: str = Field(
        default="burst",
        description="How a request's replica is chosen: burst, or for comparison power-of-two "
        "(Ray Serve's default), least-requests, round-robin, random.",
    )
    routing_stats_period_s: float = Field(
        default=0.25,
        gt=0,
        description="How often Serve asks replicas for their load, for routers without a "
        "subscription to them.",
    )

    @property
    def most(self) -> int:
        """Replicas there may be at once."""
        return self.autoscaling.max if self.autoscaling is not None else self.count

    @field_validator("router")
    @classmethod
    def _known_router(cls, name: str) -> str:
        if name not in ROUTERS:
            raise ValueError(f"unknown router; known are {', '.join(ROUTERS)}")
        return name


class IngressConfig(_Section):
    """The HTTP and gRPC front."""

    count: int = Field(default=1, ge=1, le=256, description="Ingress processes.")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int = Field(default=9000, ge=1, le=65535)
    coalesce_delay_s: float = Field(
        default=0.25,
        ge=0,
        le=5,
        description="Longest time a token waits to share a message with the next ones: for readers "
        "whose buffer is comfortable, and 0.1 at most for those without a reader.",
    )
    rebalance_interval_s: float = Field(
        default=1.0,
        ge=0,
        description="How often streams are looked for that should move from a replica that is out "
        "of capacity to one that is not; 0 = never.",
    )
    failover_timeout_s: float = Field(
        default=60, gt=0, description="How long a stream waits for a replica after losing its own."
    )
    replica_silence_s: float = Field(
        default=3,
        ge=0.1,
        description="A replica that says nothing for so long is taken for lost, and its streams "
        "are moved.",
    )
    reconnect_grace_s: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="How long a resumable request is kept for a client that lost its connection.",
    )


class TLSConfig(_Section):
    """A certificate for the HTTP and gRPC ports of `tokenflow serve`; renewed files are taken up
    without a restart."""

    certificate: str = Field(min_length=1, description="PEM file: the certificate and its chain.")
    key: str = Field(min_length=1, description="PEM file: its private key.")


class SecurityConfig(_Section):
    """Who may come in, and how."""

    api_keys_file: str | None = Field(
        default=None,
        min_length=1,
        description="YAML file of API keys, see `tokenflow keys`; null = nobody is asked for one.",
    )
    tls: TLSConfig | None = Field(default=None, description="null = plain text.")

    @property
    def keys_path(self) -> Path | None:
        return Path(os.path.expanduser(self.api_keys_file)) if self.api_keys_file else None


class TracingConfig(_Section):
    """OpenTelemetry traces of requests."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Where an OpenTelemetry collector takes OTLP over HTTP, such as "
        "http://collector:4318/v1/traces; null = no traces.",
    )
    sample_ratio: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the requests to be traced whose clients do not decide that "
        "themselves, by the header traceparent.",
    )
    service_name: str = Field(default="tokenflow", min_length=1)


class ClusterConfig(_Section):
    """Everything `tokenflow serve --config FILE` reads."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    kvstore: KVStoreConfig = KVStoreConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    ingress: IngressConfig = IngressConfig()
    limits: Limits = Limits()
    security: SecurityConfig = SecurityConfig()
    logging: LogConfig = LogConfig()
    tracing: TracingConfig = TracingConfig()


def load_config(
    path: str | Path | None, overrides: Mapping[str, Any] | None = None
) -> ClusterConfig:
    """Read a YAML file (None = defaults) and apply overrides keyed by dotted names.

    Raises ConfigError naming the file and the key that is wrong.
    """
    tree: dict[str, Any] = {}
    where = "the configuration"
    if path is not None:
        where = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot read the configuration file {str(path)!r}: {reason}."
            ) from None
        try:
            loaded = yaml.safe_load(text)
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply.") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where_in = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ConfigError(f"{path} is not valid YAML: {problem}{where_in}.") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} must hold a mapping of sections, not {type(loaded).__name__}."
            )
        tree = loaded or {}
    for dotted, value in (overrides or {}).items():
        node = tree
        *parents, leaf = dotted.split(".")
        for key in parents:
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{where}: {key} must be a mapping.")
            node = child
        node[leaf] = value
    return parse_config(tree, where)


def parse_config(tree: Mapping[str, Any], where: str = "the configuration") -> ClusterConfig:
    """Check a configuration tree. Raises ConfigError naming every wrong key."""
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(item) for item in error.errors())
        raise ConfigError(f"{where}: {problems}") from None


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key} ({hint})"
    return f"{key}: {item['msg']}, got {item['input']!r}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = ClusterConfig
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
