"""The Serve application: ingress, replicas, router, from one configuration."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from tokenflow.cluster.autoscaling import UtilisationPolicy
from tokenflow.cluster.config import ClusterConfig, parse_config
from tokenflow.cluster.ingress import Ingress
from tokenflow.cluster.replica import Replica
from tokenflow.cluster.router import BurstRouter

APP_NAME = "tokenflow"
GRPC_SERVICERS = [
    "tokenflow.cluster.rpc.servicer.add_inference_to_server",
    "tokenflow.cluster.rpc.probes.add_reflection_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]

# Admission is the engine's and the ingress's business; Serve's own limit must never bite first.
_UNLIMITED = 1_000_000
_SCALING_PERIOD_S = 1.0
"""How often replicas tell what scaling goes by."""

# Longest time that ingresses have to move their streams off a replica that is to stop.
_DRAIN_S = 30


def build_app(config: ClusterConfig, *, gpus_each: float = 0) -> Application:
    """The application for a checked configuration."""
    tree = config.model_dump(mode="json")
    count = config.replicas.count
    scaling: dict[str, Any] = {"num_replicas": count}
    if (bounds := config.replicas.autoscaling) is not None:
        policy = AutoscalingPolicy(
            policy_function=UtilisationPolicy,
            policy_kwargs={
                "target_utilisation": bounds.target_utilisation,
                "max_ttft_s": bounds.max_ttft_s,
            },
        )
        scaling = {
            "autoscaling_config": {
                "min_replicas": bounds.min,
                "max_replicas": bounds.max,
                "upscale_delay_s": bounds.upscale_delay_s,
                "downscale_delay_s": bounds.downscale_delay_s,
                "metrics_interval_s": _SCALING_PERIOD_S,
                "look_back_period_s": 2 * _SCALING_PERIOD_S,
                "policy": policy,
            }
        }
    routing: dict[str, Any] = {
        "request_router_class": BurstRouter,
        "request_router_kwargs": {"router": config.replicas.router},
        "request_routing_stats_period_s": config.replicas.routing_stats_period_s,
    }
    # One line for each client request is the ingress's own; Serve's would be one for each call.
    logs = LoggingConfig(
        encoding=config.logging.format.upper(),
        log_level=config.logging.level,
        enable_access_log=False,
    )
    replica: Any = serve.deployment(
        name="replica",
        logging_config=logs,
        **scaling,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": config.replicas.cpus_each, "num_gpus": gpus_each},
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
    )(Replica)
    ingress: Any = serve.deployment(
        name="ingress",
        logging_config=logs,
        num_replicas=config.ingress.count,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
    )(Ingress)
    # Without GPUs all replicas of a machine share its cores and memory.
    sharers = config.replicas.most if gpus_each == 0 else 1
    # Serve would restart everything on each deployment; with versions of our own only what has
    # changed is, and a change of the number of replicas restarts none.
    served = _version(tree, "model", "engine", "kvstore", "logging")
    fronts = _version(tree, "model", "limits", "ingress", "logging", "tracing")
    replica = replica.options(version=served, _internal=True)
    ingress = ingress.options(version=fronts, _internal=True)
    bound: Application = ingress.bind(replica.bind(tree, sharers), tree)
    return bound


def _version(tree: dict[str, Any], *sections: str) -> str:
    """A name for what runs under these sections of the configuration, the code included."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps({name: tree[name] for name in sections}, sort_keys=True).encode())
    for package in ("cluster", "replicas", "kvstore"):
        for source in sorted((Path(__file__).parent.parent / package).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def app(args: dict[str, Any]) -> Application:
    """Entry point for `serve run tokenflow.cluster.app:app` and Serve config files; `args` is the
    configuration tree."""
    config = parse_config(args)
    return build_app(config, gpus_each=config.replicas.gpus_each or 0)
