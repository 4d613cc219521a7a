"""Plots of simulated runs: what is drawn, and that the same runs give the same bytes."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET

import pytest

from tests.simulation.test_simulator import MACHINE
from tokenflow.loadgen.metrics import StreamRecord, summarize
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator import plots
from tokenflow.replicas.simulator.run import Outcome, simulate
from tokenflow.replicas.simulator.workload import Arrival
from tokenflow.replicas.stats import EngineStats

ARRIVALS = [Arrival(i * 0.2, 400 + i, 60 + i, 10.0) for i in range(30)]
BARS = {name: plots.Bar(100.0 + i, 90.0, 120.0, 150.0) for i, name in enumerate(POLICIES)}


@pytest.fixture(scope="module")
def runs() -> dict[str, plots.PlotData]:
    return {
        name: plots.plot_data(simulate(MACHINE, make_policy(name), ARRIVALS)) for name in POLICIES
    }


def draw(kind: str, path, runs) -> None:
    if kind == "ttft":
        plots.ttft(path, "a $title$", runs, 0.4)
    elif kind == "effective":
        plots.effective(path, {"one": BARS, "two": BARS}, {"one": 200.0, "two": 130.0})
    else:
        getattr(plots, kind)(path, "a $title$", runs)


def text_of(path) -> str:
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join(e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text"))


@pytest.mark.parametrize("kind", ["ttft", "queue", "timelines", "effective"])
def test_every_plot_names_its_policies_and_is_the_same_each_time(kind, runs, tmp_path):
    for name in ("a", "b"):
        draw(kind, tmp_path / f"{name}.svg", runs)
    shown = text_of(tmp_path / "a.svg")
    assert [policy for policy in POLICIES if policy not in shown] == []
    assert ("a $title$" in shown) == (kind != "effective")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").stat().st_size < 150_000
    draw(kind, tmp_path / "a.png", runs)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_users_style_changes_nothing(runs, tmp_path):
    import matplotlib

    draw("ttft", tmp_path / "a.svg", runs)
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.grid": True, "svg.fonttype": "path"}):
        draw("ttft", tmp_path / "b.svg", runs)
        assert matplotlib.rcParams["axes.grid"]
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_bound_and_p99_are_written_out(tmp_path):
    data = plots.PlotData([0.25 * i for i in range(1, 102)], [], [])
    plots.ttft(tmp_path / "a.svg", "t", {"fcfs": data}, 0.4)
    assert "fcfs, 25 s" in text_of(tmp_path / "a.svg")
    assert "bound, 0.4 s" in text_of(tmp_path / "a.svg")


def outcome(*records: StreamRecord, samples=()) -> Outcome:
    return Outcome(summarize(records), EngineStats(), list(records), 0.0, list(samples))


def test_plot_data_of_known_records():
    records = [
        StreamRecord(5.0, float(i), arrivals=[(i + 0.5, 1), (i + 2.0, 3)], finished_s=i + 2.0)
        for i in range(7)
    ]
    records[3].arrivals = []
    data = plots.plot_data(outcome(*records))
    assert data.ttft_s == [0.5] * 6 + [math.inf]
    assert [line.arrival_s for line in data.timelines] == [0, 2, 4, 6]
    assert data.timelines[1] == plots.Timeline(1 / 3, 2.0, 5.0, [2.5, 4.0], [1, 4])


def test_an_empty_system_is_drawn_empty():
    """Two requests with nothing between: the simulator takes no samples there."""
    first = StreamRecord(5.0, 0.0, arrivals=[(1.0, 1)], finished_s=1.0)
    second = StreamRecord(5.0, 9.0, arrivals=[(10.0, 1)], finished_s=10.0)
    samples = [(0.0, 0, 1, 0), (1.0, 0, 1, 0), (9.0, 2, 1, 0)]
    data = plots.plot_data(outcome(first, second, samples=samples))
    assert data.samples == [
        (0.0, 0, 1, 0), (1.0, 0, 1, 0), (1.0, 0, 0, 0), (9.0, 2, 1, 0), (10.0, 0, 0, 0)
    ]  # fmt: skip
    times, means = plots._means(data.samples, 5)
    assert times.tolist() == [1, 3, 5, 7, 9]
    assert means.tolist() == [[0, 0, 0, 0, 1], [0.5, 0, 0, 0, 0.5], [0, 0, 0, 0, 0]]


def test_a_policy_keeps_its_colour_and_no_two_share_one():
    many = plots.colours(["a", "fcfs", "chunked", "andes", "tokenflow", "slack", "b", "c"])
    assert plots.colours(["tokenflow"])["tokenflow"] == many["tokenflow"]
    assert len(set(many.values())) == len(many)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "tokenflow-serve\[plots\]"'):
        plots.effective(tmp_path / "a.svg", {"one": BARS}, {"one": 200.0})


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*a\.svg"):
        plots.effective(tmp_path / "none" / "a.svg", {"one": BARS}, {"one": 200.0})
