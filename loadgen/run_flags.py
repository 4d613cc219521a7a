"""The flags of `tokenflow bench run`, and what they change of a description."""

from __future__ import annotations

import argparse
from typing import Any

from tokenflow.loadgen.arrivals import parse_arrivals
from tokenflow.loadgen.lengths import parse_lengths
from tokenflow.loadgen.readers import PRESETS, parse_readers
from tokenflow.replicas.errors import ConfigError


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Targets, workload, objectives and output."""
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="YAML description of the run")
    target = parser.add_argument_group("target (one of)")
    target.add_argument("--url", metavar="URL", help="any OpenAI-compatible server")
    target.add_argument("--grpc", metavar="HOST:PORT", help="gRPC endpoint of tokenflow serve")
    target.add_argument(
        "--engine",
        nargs="?",
        const="",
        metavar="MODEL",
        help="the engine in this process, with a model folder (the embedded one)",
    )
    target.add_argument(
        "--simulator",
        nargs="?",
        const="h200:llama3-8b",
        metavar="GPU:MODEL",
        help="the engine on a simulated GPU, or on a calibration.json (h200:llama3-8b)",
    )
    target.add_argument("--model", metavar="NAME", help="model of --url (the first one it lists)")
    target.add_argument("--endpoint", choices=("chat", "completions"), help="of --url (chat)")
    target.add_argument("--tokenizer", metavar="PATH", help="model folder or tokenizer.json")
    target.add_argument(
        "--api-key-env", metavar="VAR", help="variable with the API key (OPENAI_API_KEY)"
    )
    target.add_argument(
        "--any-length", action="store_true", help="let answers of --url end when the model ends"
    )
    target.add_argument("--policy", metavar="NAME", help="of --engine and --simulator (slack)")
    target.add_argument("--kv-tokens", type=int, metavar="N", help="of --engine (4096)")
    load = parser.add_argument_group("workload")
    load.add_argument(
        "--arrivals", metavar="A",
        help="burst:40, poisson:4, gamma:4,cv=2, ramp:1-8 (each with ,duration_s=60), or "
        "trace:FILE with ,time_scale=0.1 and the like (burst:40)",
    )  # fmt: skip
    load.add_argument(
        "--input", metavar="L",
        help="prompt tokens: 128, normal:512,128, uniform:64,256, lognormal:200,0.8, trace (128)",
    )  # fmt: skip
    load.add_argument("--output", metavar="L", help="output tokens, likewise (128)")
    load.add_argument(
        "--rate", metavar="R[@SHARE],...",
        help=f"reading speeds, tokens/s or {', '.join(PRESETS)}, as 15@0.4,20@0.6 (20)",
    )  # fmt: skip
    load.add_argument("--turns", metavar="L", help="questions of a conversation, as lengths (1)")
    load.add_argument("--think", type=float, metavar="S", help="mean pause before the next one (0)")
    load.add_argument("--content", choices=("words", "stories", "ids"), help="of prompts (words)")
    load.add_argument("--workload", metavar="FILE", help="replay a saved workload-SEED.jsonl")
    load.add_argument(
        "--users", type=int, metavar="N",
        help="closed loop: N users who ask again when answered (open loop)",
    )  # fmt: skip
    load.add_argument("--seed", type=int, metavar="N", help="of everything random (1)")
    load.add_argument("--repeats", type=int, metavar="N", help="for confidence intervals (1)")
    load.add_argument("--timeout", type=float, metavar="S", help="of one request (600)")
    goals = parser.add_argument_group("objectives and output")
    goals.add_argument("--ttft-slo", type=float, metavar="S", help="limit of the TTFT (1.3)")
    goals.add_argument("--stall-slo", type=float, metavar="S", help="seconds dry allowed (0.5)")
    goals.add_argument(
        "--fail-if", metavar="CONDITIONS",
        help="exit with 1 when one holds: ttft_p99_s>1.3,effective_ratio<0.9",
    )  # fmt: skip
    goals.add_argument("--name", metavar="NAME", help="of the run in reports (run)")
    goals.add_argument("--out", metavar="DIR", help="where to save (bench-runs/NAME-TIME)")
    goals.add_argument("--no-save", action="store_true", help="only print")
    goals.add_argument("--quiet", action="store_true", help="no live view")


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of a description that flags set. Raises ConfigError."""
    found: dict[str, Any] = {}
    target = _target(args)
    if target is not None:
        found["target"] = target
    if args.arrivals is not None:
        found["arrivals"] = parse_arrivals(args.arrivals).model_dump()
    for flag, key, text in (
        ("--input", "prompt", args.input),
        ("--output", "output", args.output),
    ):
        if text is not None:
            found[key] = parse_lengths(flag, text).model_dump()
    if args.rate is not None:
        found["readers"] = [reader.model_dump() for reader in parse_readers(args.rate)]
    if args.users is not None:
        found["closed_loop"] = {"users": args.users, "think_s": args.think or 0.0}
    if args.turns is not None:
        turns = parse_lengths("--turns", args.turns).model_dump()
        found["conversation"] = {"turns": turns, "think_s": args.think or 0.0}
    elif args.think is not None and args.users is None:
        raise ConfigError("--think needs --turns or --users.")
    goals = {"ttft_s": args.ttft_slo, "stall_s": args.stall_slo}
    if any(value is not None for value in goals.values()):
        found["objectives"] = {key: value for key, value in goals.items() if value is not None}
    for key, value in (
        ("content", args.content), ("seed", args.seed), ("repeats", args.repeats),
        ("timeout_s", args.timeout), ("name", args.name),
    ):  # fmt: skip
        if value is not None:
            found[key] = value
    return found


def _target(args: argparse.Namespace) -> dict[str, Any] | None:
    given = [
        name for name in ("url", "grpc", "engine", "simulator") if getattr(args, name) is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} exclude each other; leave one out.")
    belongs = {
        "model": "url", "endpoint": "url", "tokenizer": "url", "api_key_env": "url",
        "any_length": "url", "policy": "engine, simulator", "kv_tokens": "engine",
    }  # fmt: skip
    for name, owners in belongs.items():
        if getattr(args, name) and not set(owners.split(", ")) & set(given):
            flag, owner = name.replace("_", "-"), owners.split(", ")[0]
            raise ConfigError(f"--{flag} goes with --{owner}; in a file, write it under target.")
    if not given:
        return None
    target: dict[str, Any]
    match given[0]:
        case "url":
            target = {"kind": "openai", "url": args.url, "exact_output": not args.any_length}
            for name in ("model", "endpoint", "tokenizer", "api_key_env"):
                if getattr(args, name) is not None:
                    target[name] = getattr(args, name)
            return target
        case "grpc":
            return {"kind": "grpc", "address": args.grpc}
        case "engine":
            target = {"kind": "engine", "model": args.engine or None}
            if args.kv_tokens is not None:
                target["kv_tokens"] = args.kv_tokens
        case _:
            target = {"kind": "simulator", "machine": args.simulator}
    if args.policy is not None:
        target["policy"] = args.policy
    return target
