"""The engine on a simulated GPU and a virtual clock: a whole workload at once, in no time."""

from __future__ import annotations

from tokenflow.loadgen.description import Simulated
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.targets.base import Opened
from tokenflow.loadgen.targets.engine import engine_config
from tokenflow.loadgen.traces import TraceRow
from tokenflow.loadgen.workload import Workload
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.replay import Replay, parse_machine
from tokenflow.replicas.simulator.run import simulate


class SimulatorTarget:
    """A simulated machine with one of our policies."""

    def __init__(self, settings: Simulated) -> None:
        """Raises ConfigError for an unknown machine, policy or option."""
        self._settings = settings
        self._gpu, self._model = parse_machine(settings.machine)
        self._config = engine_config(settings.policy, settings.options)

    def opened(self) -> Opened:
        settings = self._settings
        return Opened(
            f"simulated {self._gpu.name}, policy {settings.policy}",
            self._model.name,
            ["Simulated: a cost model of the GPU on a virtual clock, not a measurement."],
        )

    def run(self, workload: Workload) -> list[StreamRecord]:
        """Serve it to the end; records in the order of the workload. Raises ConfigError when the
        machine has no memory for the model, or for one of the requests."""
        asks = sorted(workload.asks, key=lambda ask: ask.at_s)
        rows = tuple(
            TraceRow(ask.at_s, ask.prompt_tokens, ask.output_tokens, ask.index + 1) for ask in asks
        )
        fraction = self._settings.memory_fraction
        machine = Replay("workload", rows, self._gpu, self._model, fraction).machine()
        policy = make_policy(self._config.policy, self._config.policy_params)
        options = {
            name: getattr(self._config, name)
            for name in self._settings.options
            if name != "policy_params"
        }
        outcome = simulate(machine, policy, [ask.arrival for ask in asks], engine=options)
        for ask, record in zip(asks, outcome.records, strict=True):
            record.index = ask.index
            record.sent_s = record.intended_s
            record.prompt_tokens = ask.prompt_tokens
            record.generated = record.token_times()
        return sorted(outcome.records, key=lambda record: record.index)
