"""The text of prompts: words up to a number of tokens, token ids, or short requests for stories."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tokenflow.loadgen.workload import Ask
from tokenflow.replicas.errors import ConfigError

_SUBJECTS = (
    "a letter", "the sea", "a ship", "a quiet evening", "an old house", "a journey to London",
    "a wedding", "two sisters", "a storm", "a stranger", "the river", "a dinner", "the captain",
    "a walk in the woods", "a secret", "the winter", "a doctor", "a ball", "the king", "a whale",
)  # fmt: skip
_REQUESTS = (
    "Tell me a story about {}.",
    "Write a long story about {}.",
    "Write a scene with {}.",
    "Describe {} in detail.",
    "What happened with {}?",
)
# Common and short: one token each in the vocabularies of large models.
_COMMON = (
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know get through back much "
    "before go good new write our used me man too any day same right look think also around "
    "another came come work three must because does part even place well such here take why help "
    "put different away again off went old number great tell men say small every found still "
)
_WORDS = tuple(_COMMON.split())
_FIX_UPS = 32


def load_tokenizer(path: str) -> Any:
    """A `tokenizers.Tokenizer` from a model folder or a tokenizer.json. Raises ConfigError."""
    from tokenizers import Tokenizer

    file = Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise ConfigError(f"--tokenizer: {file} is not a tokenizer ({first}).") from None


def story_prompt(seed: int) -> str:
    """A short request for a story."""
    rng = random.Random(seed)
    return rng.choice(_REQUESTS).format(rng.choice(_SUBJECTS))


def word_prompt(ask: Ask, tokenizer: Any | None) -> str:
    """Words of `ask.prompt_tokens` tokens: by the tokenizer, exact but for a token at the end that
    no word fills; without one, a word a token."""
    rng = random.Random(ask.seed)
    words = rng.choices(_WORDS, k=ask.prompt_tokens)
    if tokenizer is None:
        return " ".join(words)

    def count() -> int:
        return len(tokenizer.encode(" ".join(words), add_special_tokens=False))

    have = count()
    if have > ask.prompt_tokens:
        words = words[: max(1, len(words) * ask.prompt_tokens // have)]
        have = count()
    for _ in range(_FIX_UPS):
        if have == ask.prompt_tokens:
            break
        if have < ask.prompt_tokens:
            words.append(rng.choice(_WORDS))
        elif len(words) > 1:
            words.pop()
        have = count()
    return " ".join(words)


def id_prompt(ask: Ask, vocab_size: int) -> list[int]:
    """Exactly `ask.prompt_tokens` random token ids."""
    rng = random.Random(ask.seed)
    return [rng.randrange(vocab_size) for _ in range(ask.prompt_tokens)]


def text_prompt(ask: Ask, content: str, tokenizer: Any | None = None) -> str:
    """The text that `content` (of the description) asks for."""
    return story_prompt(ask.seed) if content == "stories" else word_prompt(ask, tokenizer)
