"""Tiny random checkpoints of the supported families, in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

_TEXT = [
    "The quick brown fox jumps over the lazy dog while rain falls on the quiet town.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. naïve café",
    "日本語のテキスト and emoji 👩‍👩‍👧 mixed with english words again and again",
]


def make_tokenizer(vocab: int = 384) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )


def make_checkpoint(path: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a random model of a family (float32, 2 layers, GQA) and a byte-level tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
        # Random weights this large give logits far apart, so that greedy choices are firm.
        initializer_range=0.4,
    )
    settings.update(changes)
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[family]
    if family == "mistral":
        settings.setdefault("sliding_window", None)
    model = model_class(config_class(**settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def reference(path: Path, prompt: list[int], n: int) -> list[int]:
    """transformers' own greedy continuation, end of sequence ignored."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    return out[0, len(prompt) :].tolist()
