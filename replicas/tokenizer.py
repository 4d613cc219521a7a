"""Loading a checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.shapes import embedded_model, is_shape


def check_tokenizer(path: str | Path) -> None:
    """Find a damaged tokenizer.json without loading transformers. Raises CheckpointError."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise CheckpointError(f"{file}: is not a tokenizer ({first}).") from None


def load_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer of a local model directory, or the one that text of a shape is
    shown with. Raises CheckpointError."""
    from transformers import AutoTokenizer

    if is_shape(path):
        path = embedded_model()
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {first})."
        ) from error
