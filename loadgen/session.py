"""A whole benchmark: all repeats against one target, watched, saved as they go, and reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Seq

from rich.console import Console

from tokenflow.loadgen.description import (
    Description,
    GrpcServer,
    InProcess,
    OpenAIServer,
    Simulated,
)
from tokenflow.loadgen.folder import RunFolder
from tokenflow.loadgen.live import Watcher, watch
from tokenflow.loadgen.report import Repeat, Report, make_repeat, make_report, utc_now
from tokenflow.loadgen.runner import Run
from tokenflow.loadgen.server_gauges import GaugeRecorder
from tokenflow.loadgen.targets.base import Clock, Opened, Target
from tokenflow.loadgen.workload import Workload, make_workload


def make_target(description: Description, *, clock: Clock = time.monotonic) -> Target:
    """The target of a description that is not the simulator. Raises ConfigError."""
    content = description.content
    match description.target:
        case OpenAIServer() as server:
            from tokenflow.loadgen.targets.openai import OpenAITarget

            return OpenAITarget(server, content=content, clock=clock)
        case GrpcServer() as server:
            from tokenflow.loadgen.targets.grpc import GrpcTarget

            return GrpcTarget(server, content=content, clock=clock)
        case InProcess() as settings:
            from tokenflow.loadgen.targets.engine import EngineTarget

            return EngineTarget(settings, content=content, clock=clock)
    raise TypeError(f"{description.target} streams nothing")


class Session:
    """One benchmark. What has been measured is kept, however it ends: see `report`."""

    def __init__(
        self,
        description: Description,
        *,
        workload: Workload | None = None,
        folder: RunFolder | None = None,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`workload` is served by every repeat, in the place of the description's own; without a
        `console` nothing is shown. Raises ConfigError for a workload that cannot be made."""
        self.description = description
        self.repeats: list[Repeat] = []
        self.opened = Opened("", "")
        self._folder = folder
        self._console = console
        self._clock = clock
        seeds = range(description.seed, description.seed + description.repeats)
        # All of them now: a trace that cannot be read must not be found out in the middle.
        self._workloads = [(s, workload or make_workload(description, s)) for s in seeds]
        left_out = self._workloads[0][1].failed
        self._notes = [f"{left_out} failed requests of the trace are left out."] if left_out else []

    async def run(self) -> None:
        """Serve every repeat. Raises TargetError or ConfigError when the target cannot be used;
        what requests run into is in the report."""
        target = make_target(self.description, clock=self._clock)
        self._found(await target.open())
        try:
            for i, (seed, workload) in enumerate(self._workloads):
                if i:
                    await asyncio.sleep(self.description.pause_s)
                await self._repeat(target, seed, workload, i)
        finally:
            await target.close()

    def simulate(self) -> None:
        """The same on the simulator. Raises ConfigError."""
        from tokenflow.loadgen.targets.simulator import SimulatorTarget

        assert isinstance(self.description.target, Simulated)
        target = SimulatorTarget(self.description.target)
        self._found(target.opened())
        for seed, workload in self._workloads:
            if self._folder is not None:
                self._folder.begin(seed, workload)
            records, series = target.run(workload)
            for record in records:
                if self._folder is not None:
                    self._folder.add(record)
            self._keep(
                make_repeat(records, workload, seed, self.description.objectives, utc_now(), series)
            )

    def report(self, *, complete: bool = True, command: Seq[str] = ()) -> Report:
        """Of the repeats so far. Raises ValueError when there is none."""
        return make_report(
            self.description, self.opened, self.repeats, complete=complete, command=command
        )

    def _found(self, opened: Opened) -> None:
        self.opened = opened
        opened.notes += self._notes

    async def _repeat(self, target: Target, seed: int, workload: Workload, i: int) -> None:
        if self._folder is not None:
            self._folder.begin(seed, workload)
        run = Run(
            target,
            workload,
            timeout_s=self.description.timeout_s,
            closed_loop=self.description.closed_loop,
            on_finish=self._folder.add if self._folder is not None else None,
            clock=self._clock,
        )
        begun_at = utc_now()
        gauges = GaugeRecorder(target.sample, self._clock)
        sampling = asyncio.create_task(gauges.run())
        running = asyncio.create_task(run.run())
        try:
            if self._console is not None:
                await watch(run, running, self._watcher(workload, i), self._console, self._clock)
            await running
        except BaseException:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
            if run.records:
                goals = self.description.objectives
                series = gauges.series(run.begun_s or 0.0)
                self._keep(make_repeat(run.in_order(), workload, seed, goals, begun_at, series))

    def _keep(self, repeat: Repeat) -> None:
        if self._folder is not None:
            self._folder.end()
        self.repeats.append(repeat)

    def _watcher(self, workload: Workload, i: int) -> Watcher:
        title = self.description.name
        if self.description.repeats > 1:
            title += f" {i + 1}/{self.description.repeats}"
        longest = max(ask.output_tokens for ask in workload.asks)
        return Watcher(title, len(workload.asks), longest)
