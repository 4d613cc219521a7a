"""Public data that lies beside the repository, not in it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.missing import missing

_BESIDE = Path(__file__).resolve().parents[2].parent / "shared"


def shared_file(relative: str) -> Path:
    """`relative` in the folder of shared data: TOKENFLOW_SHARED, else `shared` beside the
    repository. Where it is missing the test is skipped, but fails in CI, which must have it."""
    path = Path(os.environ.get("TOKENFLOW_SHARED", _BESIDE)) / relative
    if not path.exists():
        missing(f"{path} is missing; set TOKENFLOW_SHARED to the folder of shared data")
    return path
