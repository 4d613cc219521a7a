"""The examples of docs/client.md run as they stand."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.support.fake_inference import TEXT, Behave, FakeInference, start

DOCS = Path(__file__).resolve().parents[3] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
async def test_an_example(code, capsys):
    inference = FakeInference()
    inference.script.append(Behave(pause_s=0.02))
    server, address = await start(inference)
    assert "127.0.0.1:9000" in code
    code = code.replace("127.0.0.1:9000", address)
    await asyncio.to_thread(exec, compile(code, str(DOCS), "exec"), {})
    await server.stop(None)
    assert len(inference.named("Generate")) == 1 and not inference.named("Cancel")
    if "print" in code:
        assert TEXT in capsys.readouterr().out
    if "set_rate" in code:
        assert [u.token_rate for u in inference.named("UpdateStream")] == [0, 0, 100]


def test_there_are_examples():
    assert len(EXAMPLES) >= 4
