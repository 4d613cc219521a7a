"""The engine on a simulated GPU and a virtual clock: a whole workload at once, in no time."""

from __future__ import annotations

from pathlib import Path

from tokenflow.loadgen.description import Simulated
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.targets.base import Opened
from tokenflow.loadgen.targets.engine import engine_config
from tokenflow.loadgen.traces import TraceRow
from tokenflow.loadgen.workload import Workload
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.calibration import Calibration
from tokenflow.replicas.simulator.replay import Replay, parse_machine, replay_machine
from tokenflow.replicas.simulator.run import simulate


class SimulatorTarget:
    """A simulated machine with one of our policies."""

    def __init__(self, settings: Simulated) -> None:
        """Raises ConfigError for an unknown machine, policy or option."""
        self._settings = settings
        self._config = engine_config(settings.policy, settings.options)
        if Path(settings.machine).suffix == ".json":
            self._machine = Calibration.load(settings.machine).machine(self._config.policy)
            self._opened = Opened(Path(settings.machine).name, "as calibrated")
        else:
            gpu, model = parse_machine(settings.machine)
            self._machine = replay_machine(gpu, model, settings.memory_fraction)
            self._opened = Opened(gpu.name, model.name)
        self._opened.name = f"simulated {self._opened.name}, policy {self._config.policy}"
        self._opened.notes = ["Simulated: a cost model on a virtual clock, not a measurement."]

    def opened(self) -> Opened:
        return self._opened

    def run(self, workload: Workload) -> tuple[list[StreamRecord], dict[str, list[float]]]:
        """Serve it to the end: records in the order of the workload, and the engine's gauges once a
        second. Raises ConfigError when a request does not fit into the machine's memory."""
        asks = sorted(workload.asks, key=lambda ask: ask.at_s)
        rows = tuple(
            TraceRow(ask.at_s, ask.prompt_tokens, ask.output_tokens, ask.index + 1) for ask in asks
        )
        Replay("workload", rows).check(self._machine.kv_tokens, self._settings.machine)
        policy = make_policy(self._config.policy, self._config.policy_params)
        options = {
            name: getattr(self._config, name)
            for name in self._settings.options
            if name != "policy_params"
        }
        outcome = simulate(self._machine, policy, [ask.arrival for ask in asks], engine=options)
        for ask, record in zip(asks, outcome.records, strict=True):
            record.index = ask.index
            record.sent_s = record.intended_s
            record.prompt_tokens = ask.prompt_tokens
            record.generated = record.token_times()
        columns = zip(*outcome.samples, strict=True)
        names = ("at_s", "waiting", "running", "preempted")
        series = {name: list(map(float, own)) for name, own in zip(names, columns, strict=False)}
        return sorted(outcome.records, key=lambda record: record.index), series
