"""The Serve application: ingress, replicas, router, from one configuration."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from tokenflow.cluster.config import ClusterConfig, parse_config
from tokenflow.cluster.ingress import Ingress
from tokenflow.cluster.replica import Replica
from tokenflow.cluster.router import BurstRouter

APP_NAME = "tokenflow"
GRPC_SERVICERS = ["tokenflow.cluster.rpc.servicer.add_inference_to_server"]

# Admission is the engine's and the ingress's business; Serve's own limit must never bite first.
_UNLIMITED = 1_000_000


def build_app(config: ClusterConfig, *, gpus_each: float = 0) -> Application:
    """The application for a checked configuration."""
    tree = config.model_dump(mode="json")
    count = config.replicas.count
    routing: dict[str, Any] = {
        "request_router_class": BurstRouter,
        "request_router_kwargs": {"router": config.replicas.router},
        "request_routing_stats_period_s": config.replicas.routing_stats_period_s,
    }
    replica = serve.deployment(
        name="replica",
        num_replicas=count,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": config.replicas.cpus_each, "num_gpus": gpus_each},
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
    )(Replica)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.count,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
    )(Ingress)
    # Without GPUs all replicas of a machine share its cores and memory.
    sharers = count if gpus_each == 0 else 1
    return ingress.bind(replica.bind(tree, sharers), tree)


def app(args: dict[str, Any]) -> Application:
    """Entry point for `serve run tokenflow.cluster.app:app` and Serve config files; `args` is the
    configuration tree."""
    config = parse_config(args)
    return build_app(config, gpus_each=config.replicas.gpus_each or 0)
