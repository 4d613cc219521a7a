"""A Llama of about 76 million random weights, with the embedded model's tokenizer, for comparisons
between servers: what it says is noise, what it costs is real.

It has no end-of-sequence token, so that every server generates exactly what it is asked for.

Run: python benchmarks/peers/make_checkpoint.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import transformers

from tokenflow.cluster.config import embedded_model

CONTEXT_TOKENS = 2048


def make(folder: Path) -> int:
    """Write the checkpoint; returns the number of its parameters."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model())
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder / name)
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("say where: python benchmarks/peers/make_checkpoint.py FOLDER")
    count = make(Path(sys.argv[1]))
    print(f"{count / 1e6:.1f} million parameters in {sys.argv[1]}")
