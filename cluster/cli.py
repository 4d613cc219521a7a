"""The `tokenflow` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from tokenflow.cluster.config import ClusterConfig, load_config
from tokenflow.replicas.errors import TokenFlowError

EXIT_BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenflow",
        description="LLM text streaming that feels instant under a burst.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve a model on this machine (OpenAI-compatible HTTP, and gRPC)",
        description="Serve a model on this machine. Flags override the file.",
    )
    serve.add_argument(
        "--model",
        metavar="PATH",
        help="local Hugging Face model directory, or random:NAME (llama3-8b, ...) for a model's "
        "shape with random weights",
    )
    serve.add_argument("--config", metavar="FILE", help="YAML configuration")
    serve.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, metavar="P", help="HTTP port (default 8000)")
    serve.add_argument("--grpc-port", type=int, metavar="P", help="gRPC port (default 9000)")
    serve.add_argument("--policy", metavar="NAME", help="scheduling policy (default tokenflow)")
    serve.add_argument("--replicas", type=int, metavar="N", help="replica actors (default 1)")
    serve.add_argument(
        "--kv-tokens", type=int, metavar="N", help="device KV memory of a replica, in tokens"
    )
    serve.add_argument(
        "--host-kv-gib", type=float, metavar="X", help="host memory for KV per node, GiB"
    )
    serve.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="most sequences on the device at once"
    )
    serve.add_argument("--served-model-name", metavar="NAME", help="the name clients use")
    serve.add_argument("--api-keys", metavar="FILE", help="ask for the API keys of this file")
    serve.add_argument("--tls-cert", metavar="FILE", help="serve with TLS: PEM certificate chain")
    serve.add_argument("--tls-key", metavar="FILE", help="PEM private key of the certificate")
    serve.set_defaults(run=run_serve)

    from tokenflow.cluster import demo

    demo_parser = commands.add_parser(
        "demo", help="a burst on the embedded model: fcfs and tokenflow side by side"
    )
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=run_demo)

    from tokenflow.cluster import top

    top_parser = commands.add_parser(
        "top",
        help="a live view of a running cluster",
        description="A live view of a running cluster: its readers, replicas and KV memory.",
    )
    top.add_arguments(top_parser)
    top_parser.set_defaults(run=top.run)

    from tokenflow.loadgen import command as bench

    bench_parser = commands.add_parser(
        "bench",
        help="a burst benchmark for any server: how its readers fare",
        description="How the readers of a streaming server fare under load.",
    )
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.run)

    from tokenflow.replicas.simulator import command as simulate

    simulate_parser = commands.add_parser(
        "simulate",
        help="the paper's settings on simulated GPUs, with this package's engine and policies",
    )
    simulate.add_arguments(simulate_parser)
    simulate_parser.set_defaults(run=simulate.run)

    from tokenflow.cluster.simulator import command as simulate_cluster

    cluster_parser = commands.add_parser(
        "simulate-cluster",
        help="routers before many simulated replicas",
        description="Routers before many simulated replicas: time to first token, throughput and "
        "what a choice costs.",
    )
    simulate_cluster.add_arguments(cluster_parser)
    cluster_parser.set_defaults(run=simulate_cluster.run)

    from tokenflow.cluster import keys_command

    keys_parser = commands.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="The API keys of a cluster: the file that security.api_keys_file names.",
    )
    keys_command.add_arguments(keys_parser)

    from tokenflow.replicas.simulator import calibrate_command as calibrate

    calibrate_parser = commands.add_parser(
        "calibrate",
        help="measure the engine on this machine, for simulations of it",
        description="Run the engine through a grid of situations and fit a cost model to it.",
    )
    calibrate.add_arguments(calibrate_parser)
    calibrate_parser.set_defaults(run=run_calibrate)
    return parser


FLAGS = {
    "model": "model.path",
    "served_model_name": "model.served_name",
    "host": "ingress.host",
    "port": "ingress.port",
    "grpc_port": "ingress.grpc_port",
    "policy": "engine.policy",
    "replicas": "replicas.count",
    "kv_tokens": "engine.kv_tokens",
    "host_kv_gib": "kvstore.host_kv_gib",
    "max_num_seqs": "engine.max_num_seqs",
    "api_keys": "security.api_keys_file",
    "tls_cert": "security.tls.certificate",
    "tls_key": "security.tls.key",
}
"""Command-line flags and the configuration keys they override."""


def config_from(args: argparse.Namespace) -> ClusterConfig:
    overrides: dict[str, Any] = {
        key: getattr(args, flag) for flag, key in FLAGS.items() if getattr(args, flag) is not None
    }
    return load_config(args.config, overrides)


def run_serve(args: argparse.Namespace) -> int:
    from tokenflow.cluster.local import LocalCluster, preflight

    config = config_from(args)
    found = preflight(config)
    spec = found.spec
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    say(
        f"Serving {config.model.name} ({spec.architecture}, {spec.dtype}, {found.device}) on "
        f"{config.replicas.count} replica(s), {found.num_blocks * config.engine.block_size} KV "
        f"tokens each, policy {config.engine.policy}. Starting..."
    )
    cluster = LocalCluster(config)
    try:
        cluster.start()
        if not stop.is_set():
            cluster.serve()
        if not stop.is_set():
            say(ready_message(cluster, config))
        stop.wait()
        say("Stopping...")
    finally:
        # A second Ctrl-C must not leave processes or shared memory behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        cluster.stop()
    say("Stopped.")
    return 0


def ready_message(cluster: Any, config: ClusterConfig) -> str:
    key = " -H 'Authorization: Bearer sk-tf-...'" if config.security.api_keys_file else ""
    return f"""Ready.

  HTTP (OpenAI-compatible): {cluster.url}/v1
  gRPC (tokenflow.v1):      {cluster.grpc_target}

Try it:
  curl -N {cluster.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{{
    "model": "{config.model.name}", "stream": true, "token_rate": 20, "max_tokens": 64,
    "messages": [{{"role": "user", "content": "Tell me a story."}}]}}'

Ctrl-C stops everything."""


def run_demo(args: argparse.Namespace) -> int:
    from tokenflow.cluster import demo
    from tokenflow.cluster.demo_server import demo_servers

    options = demo.options_from(args)
    with demo_servers(options) as factory:
        demo.run_demo(factory, options)
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    from tokenflow.replicas.simulator import calibrate_command

    config = load_config(args.config, {})
    if config.engine.kv_tokens is None:
        config = load_config(args.config, {"engine.kv_tokens": args.kv_tokens})
    return calibrate_command.run(args, config.engine, config.model.directory)


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends in one clear sentence on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Library chatter about missing optional parts is of no use to someone who serves a model.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except TokenFlowError as error:
        print(f"tokenflow: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
