"""Triton's kernels on a CPU, by its interpreter (see conftest): slow, exact in float32 and float16
only."""

from __future__ import annotations

import os

import pytest


def interpret() -> None:
    """Mend the interpreter, or skip where there is none."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a process in which kernels run on a GPU cannot interpret them")
    patch = interpreter._patch_lang_tensor

    def patch_too(tensor, scope) -> None:
        patch(tensor, scope)
        # A scalar is an array of one element, which numpy 2.4 does not take for a number any more.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_too
