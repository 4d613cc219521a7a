"""Second turns of chats: time to first token with and without the prefix cache, on the replica that
served the first turn and on its neighbour on the node.

Two real engines in one process over one store, as two replicas of a node. Each chat has its first
turn on replica A; its second turn (first turn's prompt and answer, and something new) goes to A
(KV still on the device), to B (KV in the store), and to a third engine without a prefix cache. One
request at a time, chats interleaved, so that nothing waits for anything but its own prefill.

Run: python benchmarks/kvstore/chat.py [--chats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median
from typing import Any

from node import Node, machine, write

from tokenflow.cluster.config import embedded_model
from tokenflow.kvstore.client import NullHostSlots
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.factory import build_engine, inspect_model
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams

FIRST_PROMPT, ANSWER, FOLLOW_UP, SECOND_ANSWER = 500, 100, 40, 8


def turn(engine: Engine, name: str, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Serve one request alone: (time to first token, its tokens)."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    begun = time.monotonic()
    engine.add(Request(name, tuple(prompt), params, 1000.0, arrival_s=begun))
    first, answer = 0.0, []
    while engine.has_work:
        if not engine.step():
            engine.wait_for_transfers(0.005)
        for event in engine.take_events():
            if event.token_id >= 0:
                first = first or time.monotonic() - begun
                answer.append(event.token_id)
    return first, answer


def measure(model: str, chats: int, seed: int) -> dict[str, Any]:
    config = EngineConfig(kv_tokens=64_000, max_num_seqs=8, max_batch_tokens=2048)
    spec = inspect_model(model, config, "cpu")
    slot_bytes = spec.kv_layout(config.block_size).block_bytes
    blocks = config.kv_tokens // config.block_size  # type: ignore[operator]
    ttft: dict[str, list[float]] = {}
    rng = random.Random(seed)
    with Node(2 * blocks, slot_bytes) as node:

        def replica(name: str) -> Engine:
            host, memory = node.attach(name)
            return build_engine(model, config, host, host_memory=memory, num_blocks=blocks)

        a, b = replica("a"), replica("b")
        cold = build_engine(
            model,
            config.model_copy(update={"prefix_cache": False}),
            NullHostSlots(),
            num_blocks=blocks,
        )
        for engine in (a, b, cold):
            turn(engine, "warm-up", [1] * FIRST_PROMPT, 4)
        for chat in range(chats):
            prompt = [rng.randrange(spec.vocab_size) for _ in range(FIRST_PROMPT)]
            first, answer = turn(a, f"{chat}-1", prompt, ANSWER)
            time.sleep(0.05)  # a reader takes longer; the store has indexed the blocks by then
            places = {"same replica": a, "neighbour": b}
            for place in rng.sample(list(places), len(places)):
                follow_up = [rng.randrange(spec.vocab_size) for _ in range(FOLLOW_UP)]
                second = [*prompt, *answer, *follow_up]
                seconds, text = turn(places[place], f"{chat}-2", second, SECOND_ANSWER)
                without, same = turn(cold, f"{chat}-2", second, SECOND_ANSWER)
                assert text == same, "the cache changed a text"
                ttft.setdefault(place, []).append(seconds)
                ttft.setdefault(f"{place}, no prefix cache", []).append(without)
            ttft.setdefault("first turn", []).append(first)
        hits = {
            "same replica, device tokens": a.stats.prefix_device_hit_tokens / chats,
            "neighbour, host tokens": b.stats.prefix_host_hit_tokens / chats,
        }
        for engine in (a, b, cold):
            engine.executor.close()
        del a, b, cold
    figures = {f"{place}, median ms": 1e3 * median(s) for place, s in ttft.items()}
    for place in ("same replica", "neighbour"):
        pairs = zip(ttft[place], ttft[f"{place}, no prefix cache"], strict=True)
        figures[f"{place} / no prefix cache"] = median(own / cold for own, cold in pairs)
    return {
        "chats": chats,
        "second prompt tokens": FIRST_PROMPT + ANSWER + FOLLOW_UP,
        "seed": seed,
        **hits,
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--chats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    report = measure(args.model, args.chats, args.seed)
    for key, value in report.items():
        print(f"{key:36} {value:10.3f}")
    write(args.json, {**machine(), **report})


if __name__ == "__main__":
    main()
