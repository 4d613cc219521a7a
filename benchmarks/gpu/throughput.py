"""Tokens per second of this engine and of transformers' continuous batching, side by side.

The same model shape with random weights on the same device, the same prompts, all there at once,
greedy, outputs of the same length. Each side runs twice and the second run counts, so that neither
pays for its first use; of theirs the first, where time does not allow for two.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from common import GREEDY, Run, parser

from tokenflow.replicas.executor.checkpoint import inspect_checkpoint
from tokenflow.replicas.executor.shapes import shape_config
from tokenflow.replicas.factory import resolve_device
from tokenflow.replicas.request import Request
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.live import Bench


def ours(run: Run, prompts: list[list[int]], output: int, kv_tokens: int) -> float:
    config = run.config(
        policy="fcfs", kv_tokens=kv_tokens, max_num_seqs=len(prompts), prefix_cache=False
    )
    bench = Bench(run.args.model, config, host_kv_tokens=64 * config.block_size)
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, seed=GREEDY.seed)
    took = 0.0
    try:
        for turn in range(2):
            engine = bench.engine(make_policy("fcfs"))
            begun = time.monotonic()
            for i, prompt in enumerate(prompts):
                engine.add(
                    Request(f"{turn}-{i}", tuple(prompt), params, float("inf"), arrival_s=begun)
                )
            made = 0
            while engine.has_work:
                if not engine.step():
                    engine.wait_for_transfers(0.005)
                made += sum(event.token_id >= 0 for event in engine.take_events())
            took = time.monotonic() - begun
            if made != output * len(prompts):
                raise SystemExit(f"the engine made {made} tokens of {output * len(prompts)}")
    finally:
        bench.close()
    return took


def theirs(run: Run, prompts: list[list[int]], output: int, attention: str) -> float:
    """`generate_batch` of transformers, which chooses its memory and CUDA graphs itself."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    fields = shape_config(run.args.model)
    settings: dict[str, Any] = {"attn_implementation": attention}
    dtype = torch.float32 if run.args.device == "cpu" else torch.bfloat16
    with torch.device(run.args.device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=dtype, **settings
        )
    model.eval()
    generation = GenerationConfig(
        max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64) if run.args.tiny else None
    took = 0.0
    for _ in range(2):
        if took > run.seconds_left:
            break  # the first run has to do
        begun = time.monotonic()
        outputs = model.generate_batch(
            inputs=prompts, generation_config=generation, continuous_batching_config=memory
        )
        took = time.monotonic() - begun
        made = sum(len(found.generated_tokens) for found in outputs.values())
        if made != output * len(prompts):
            raise RuntimeError(f"made {made} tokens of {output * len(prompts)}")
    return took


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--requests", type=int, default=256)
    flags.add_argument("--prompt", type=int, default=512)
    flags.add_argument("--output", type=int, default=256)
    flags.add_argument("--attention", default="paged|sdpa,paged|flash_attention_2")
    run = Run.start(flags.parse_args(), "throughput")
    args = run.args
    if not args.model.startswith("random:"):
        raise SystemExit("--model: a shape (random:NAME), so that both sides make the same")
    count, prompt, output = args.requests, args.prompt, args.output
    if args.tiny:
        count, prompt, output = 4, 24, 8
    rng = random.Random(1)
    vocab = inspect_checkpoint(args.model).vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(prompt)] for _ in range(count)]
    run.keep("load", {"requests": count, "prompt": prompt, "output": output})
    resolve_device(args.device)
    took = ours(run, prompts, output, 2 * count * (prompt + output))
    run.keep("tokenflow", {"s": took, "output_tok_s": count * output / took})
    for attention in args.attention.split(","):
        run.free_memory()
        try:
            other = theirs(run, prompts, output, attention)
        except Exception as error:  # an attention that is not installed, say
            problem = f"did not run: {type(error).__name__}: {str(error)[:200]}"
            run.keep(f"transformers, {attention}", problem)
            continue
        run.keep(
            f"transformers, {attention}",
            {"s": other, "output_tok_s": count * output / other, "tokenflow_times": other / took},
        )


if __name__ == "__main__":
    main()
