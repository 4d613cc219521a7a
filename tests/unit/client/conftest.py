"""What the tests of all clients share."""

from __future__ import annotations

import pytest

from tests.support.fake_inference import FakeInference, start


@pytest.fixture
async def fake():
    inference = FakeInference()
    server, inference.address = await start(inference)
    yield inference
    await server.stop(None)
