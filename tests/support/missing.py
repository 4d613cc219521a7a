"""What a test needs and this machine does not have."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str, *, in_ci: bool = True) -> NoReturn:
    """Skips the test; with `in_ci`, CI must have it, and the test fails there."""
    if in_ci and os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
