"""From a call's prompts or messages to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tokenflow.cluster.api.protocol import Call
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.tokenizer import load_tokenizer

_LONG_PROMPT_CHARS = 4096
"""Longer prompts are tokenized on a worker thread, so that other streams keep flowing."""


class PromptEncoder:
    """The served model's tokenizer, as the ingress uses it. Raises CheckpointError."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_tokenizer(directory)
        # Truncation or padding set by an earlier call is state inside a fast tokenizer, so worker
        # threads take turns; the encoding itself runs without the interpreter lock.
        self._lock = asyncio.Lock()

    async def encode(self, call: Call, *, vocab_size: int) -> list[list[int]]:
        """Token ids of each prompt. Raises InvalidRequestError."""
        if call.is_chat:
            size = sum(len(message.content) for message in call.messages)
            return [await self._run(self._encode_chat, call, size)]
        prompts = []
        for prompt in call.prompts:
            if isinstance(prompt, str):
                prompts.append(await self._run(self._encode_text, prompt, len(prompt)))
                continue
            if any(not 0 <= token < vocab_size for token in prompt):
                raise InvalidRequestError(
                    f"prompt has token ids outside the vocabulary (0 to {vocab_size - 1}).",
                    param="prompt",
                    code="invalid_value",
                )
            prompts.append(list(prompt))
        return prompts

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return text

    def token_text(self, token_id: int) -> str:
        """What logprobs show for one token; special tokens by name."""
        return self.decode([token_id])

    async def _run(self, encode: Any, value: Any, size: int) -> list[int]:
        async with self._lock:
            if size < _LONG_PROMPT_CHARS:
                ids: list[int] = encode(value)
            else:
                ids = await asyncio.to_thread(encode, value)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def _encode_chat(self, call: Call) -> list[int]:
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        messages = [{"role": m.role, "content": m.content} for m in call.messages]
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}.", param="messages"
            ) from None
        return ids
