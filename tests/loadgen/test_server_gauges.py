"""A server's own gauges: read from its page, once a second, and drawn."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tokenflow.loadgen import virtual_time
from tokenflow.loadgen.description import OpenAIServer
from tokenflow.loadgen.server_gauges import GaugeRecorder, read_gauges
from tokenflow.loadgen.targets.openai import OpenAITarget

OURS = """# HELP tokenflow_waiting_requests Requests without KV.
# TYPE tokenflow_waiting_requests gauge
tokenflow_waiting_requests{replica="a"} 3.0
tokenflow_waiting_requests{replica="b"} 4.0
tokenflow_running_requests{replica="a"} 2.0
tokenflow_preempted_requests{replica="a"} 1.0
tokenflow_steps_total{replica="a"} 99.0
"""
VLLM = """vllm:num_requests_running{engine="0",model_name="m"} 8.0
vllm:num_requests_waiting{engine="0",model_name="m"} 32.0
vllm:num_requests_waiting_by_reason{reason="x"} 7.0
vllm:num_requests_running oops
"""


def test_gauges_are_summed_over_their_labels_and_others_are_left():
    assert read_gauges(OURS) == {"waiting": 7.0, "running": 2.0, "preempted": 1.0}
    assert read_gauges(VLLM) == {"waiting": 32.0, "running": 8.0}
    assert read_gauges("<html>not found</html>\n\n{} 3\n") == {}


def test_a_sample_a_second():
    async def main():
        clock = asyncio.get_running_loop().time
        taken = iter(range(100))

        async def sample():
            return {"waiting": float(next(taken)), "running": 5.0}

        recorder = GaugeRecorder(sample, clock)
        task = asyncio.create_task(recorder.run())
        await asyncio.sleep(4.5)
        task.cancel()
        return recorder.series(1.0), recorder.series(99.0)

    series, late = virtual_time.run(main())
    assert series == {"at_s": [0, 1, 2, 3], "waiting": [1, 2, 3, 4], "running": [5] * 4}
    assert late == {}


async def test_a_target_without_gauges_is_asked_once():
    asked = 0

    async def sample():
        nonlocal asked
        asked += 1

    recorder = GaugeRecorder(sample, asyncio.get_running_loop().time)
    await asyncio.wait_for(recorder.run(), 5)
    assert asked == 1 and recorder.series(0.0) == {}


async def test_the_page_lies_beside_the_api():
    app = web.Application()

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=OURS)

    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    target = OpenAITarget(OpenAIServer(url=url), probe=False)
    await target.open()
    try:
        assert await target.sample() == {"waiting": 7.0, "running": 2.0, "preempted": 1.0}
        await runner.cleanup()
        assert await target.sample() is None
    finally:
        await target.close()
