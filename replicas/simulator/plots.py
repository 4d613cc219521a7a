"""Plots of simulated runs, from plain data to SVG or PNG (by the file's ending). The same data give
the same bytes. Needs the extra `plots`; nothing here is imported by the simulator itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenflow.loadgen.metrics import percentile
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.simulator.run import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008); its yellow is too pale for lines and text.
_PREFERRED = {
    "fcfs": "#7f7f7f",
    "chunked": "#56b4e9",
    "andes": "#e69f00",
    "tokenflow": "#0072b2",
    "slack": "#d55e00",
    "random": "#7f7f7f",
    "round-robin": "#56b4e9",
    "least-requests": "#e69f00",
    "power-of-two": "#0072b2",
    "burst": "#d55e00",
}
_OTHERS = ("#009e73", "#cc79a7", "#000000")
_GREY = "#555555"
_BOUND: dict[str, Any] = {"color": "black", "linewidth": 1.2, "linestyle": (0, (1, 1))}
_PALE = "#e6e6e6"
_FILLED_POINTS = 640
"""Points of all filled curves of a figure; matplotlib itself thins out lines."""
FloatArray = NDArray[np.float64]
Sample = tuple[float, int, int, int]
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.minor.pad": 5.0,
    "path.simplify_threshold": 0.3,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tokenflow",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """The tokens of one request."""

    place: float
    """In order of arrival, from 0, the first, to 1, the last."""
    arrival_s: float
    token_rate: float
    """tokens/s"""
    times_s: list[float]
    """When there were more tokens, ascending, since the run began."""
    tokens: list[int]
    """How many there were then."""


@dataclass(frozen=True, slots=True)
class PlotData:
    """What is drawn of one run; much less than its outcome."""

    ttft_s: list[float]
    """Ascending; infinite for a request without a token."""
    samples: list[Sample]
    """(time in s, waiting, running, preempted), as they are until the next."""
    timelines: list[Timeline]


@dataclass(frozen=True, slots=True)
class Bar:
    """Throughput of one policy in tokens/s: means over the seeds, and the effective one's range."""

    effective: float
    effective_min: float
    effective_max: float
    raw: float


def plot_data(outcome: Outcome, places: Seq[float] = (0, 1 / 3, 2 / 3, 1)) -> PlotData:
    """What is drawn of a run, with the timelines of the requests at `places` by arrival."""
    records = outcome.records
    ttfts = (
        math.inf if r.first_token_s is None else r.first_token_s - r.intended_s for r in records
    )
    timelines = []
    for place in places:
        record = records[round(place * (len(records) - 1))]
        times = [at for at, _ in record.arrivals]
        counts = list(accumulate(count for _, count in record.arrivals))
        timelines.append(Timeline(place, record.intended_s, record.token_rate, times, counts))
    return PlotData(sorted(ttfts), _with_idle(outcome), timelines)


def colours(policies: Seq[str]) -> dict[str, str]:
    """A colour for each policy: its own where it has one, else the next that is free."""
    free = (_OTHERS[i % len(_OTHERS)] for i in range(len(policies)))
    return {p: _PREFERRED[p] if p in _PREFERRED else next(free) for p in policies}


def check() -> None:
    """Raises ConfigError when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            'plots need matplotlib; install it with: pip install "tokenflow-serve[plots]".'
        ) from None


def ttft(path: Path, title: str, runs: Mapping[str, PlotData], bound_p99_s: float) -> None:
    """The distribution of the TTFT of each policy, and the least P99 possible."""
    ttfts = {policy: data.ttft_s for policy, data in runs.items()}
    distribution(path, title, ttfts, "policy", bound_p99_s)


def distribution(
    path: Path,
    title: str,
    ttfts: Mapping[str, Seq[float]],
    what: str,
    bound_p99_s: float | None = None,
) -> None:
    """The distribution of the TTFT, ascending seconds, of each of several `what`."""
    with _figure(path, 7.2, 3.4) as figure:
        axes = figure.subplots()
        for i, (policy, colour) in enumerate(colours(list(ttfts)).items()):
            times = ttfts[policy]
            axes.step(
                [times[0], *times],
                [n / len(times) for n in range(len(times) + 1)],
                where="post",
                color=colour,
                # Thinner and thinner, so that equal curves can all be seen.
                linewidth=1.6 + 3 * (1 - (i + 1) / len(ttfts)),
                label=f"{policy}, {percentile(times, 99):.3g} s",
            )
        if bound_p99_s is not None:
            axes.axvline(bound_p99_s, **_BOUND, label=f"bound, {bound_p99_s:.3g} s")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        digits = "25" if high / low < 1000 else ""
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in digits else "")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("time to first token, s")
        axes.set_ylabel("share of requests")
        axes.set_title(title, loc="left")
        _legend(axes, title=f"{what}, P99")


def queue(path: Path, title: str, runs: Mapping[str, PlotData]) -> None:
    """Requests in the system over time, by state, a panel for each policy."""
    with _figure(path, 7.2, 0.6 + 1.25 * len(runs)) as figure:
        panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (policy, colour) in zip(panels, colours(list(runs)).items(), strict=True):
            times, means = _means(runs[policy].samples, _FILLED_POINTS // len(runs))
            waiting, running, preempted = means
            axes.stackplot(
                times,
                running,
                preempted,
                waiting,
                colors=[colour, _tint(colour), _PALE],
                labels=["running", "preempted", "waiting"],
                linewidth=0,
            )
            axes.set_title(policy, loc="left", color=colour, fontweight="bold", pad=2)
            axes.margins(x=0)
            _legend(axes, reverse=True)
        panels[0].set_ylim(bottom=0)
        panels[-1].set_xlabel("time, s")
        figure.supylabel("requests", fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def timelines(path: Path, title: str, runs: Mapping[str, PlotData]) -> None:
    """Tokens generated for a few requests (columns) under each policy (rows), and what their
    readers need from the first token on. [TokenFlow figures 14-19]"""
    columns = len(next(iter(runs.values())).timelines)
    with _figure(path, 1.2 + 2 * columns, 0.8 + 1.2 * len(runs)) as figure:
        grid = figure.subplots(len(runs), columns, sharex="col", sharey="col", squeeze=False)
        for row, (policy, colour) in zip(grid, colours(list(runs)).items(), strict=True):
            for axes, line in zip(row, runs[policy].timelines, strict=True):
                axes.plot(line.times_s, line.tokens, color=colour, linewidth=1.8, zorder=3)
                if line.tokens:
                    first, total = line.times_s[0], line.tokens[-1]
                    until = first + total / line.token_rate
                    axes.plot([first, until], [0, total], color="black", linestyle=":")
                axes.plot(line.arrival_s, 0, "^", color="black", markersize=5, clip_on=False)
            row[0].set_ylabel(policy, color=colour, fontweight="bold")
        for axes in grid[0]:
            axes.set_ylim(bottom=0)
        for axes, line in zip(grid[0], next(iter(runs.values())).timelines, strict=True):
            place = {0.0: "first request", 1.0: "last request"}
            named = place.get(line.place, f"request at {line.place:.0%}")
            axes.set_title(f"{named}, {line.token_rate:g} tok/s", fontsize=9)
        figure.supxlabel("time, s", fontsize=9)
        figure.supylabel(
            "tokens generated (triangle: arrival; dotted: what the reader needs)", fontsize=9
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def effective(
    path: Path, groups: Mapping[str, Mapping[str, Bar]], limits: Mapping[str, float]
) -> None:
    """Effective throughput of each policy, over its raw throughput and under the bound of the
    effective one in `limits`; a panel for each setting."""
    columns = min(len(groups), 4)
    rows = math.ceil(len(groups) / columns)
    policies = list(dict.fromkeys(p for group in groups.values() for p in group))
    palette = colours(policies)
    height = 0.7 + rows * (0.6 + 0.28 * len(policies))
    with _figure(path, 1.4 + 2.4 * columns, height) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes in grid[len(groups) :]:
            axes.set_visible(False)
        for axes, (name, group) in zip(grid, groups.items(), strict=False):
            for at, policy in enumerate(policies):
                if policy in group:
                    _bar(axes, at, group[policy], limits[name], palette[policy])
            axes.axvline(limits[name], **_BOUND)
            axes.set_title(f"{name}, bound {limits[name]:.0f} tok/s", loc="left", fontsize=9)
            axes.set_yticks(range(len(policies)), policies)
            axes.set_xlim(0, 1.05 * max([limits[name], *(bar.raw for bar in group.values())]))
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="y", length=0)
        grid[0].invert_yaxis()
        figure.supxlabel(
            "tokens/s: effective (solid), raw (pale), bound of the effective (dotted)",
            fontsize=9,
        )


def _bar(axes: Axes, at: int, bar: Bar, limit: float, colour: str) -> None:
    axes.barh(at, bar.raw, height=0.8, color=_tint(colour))
    axes.barh(at, bar.effective, height=0.5, color=colour)
    if bar.effective_max > bar.effective_min:
        axes.plot([bar.effective_min, bar.effective_max], [at, at], color="black", linewidth=1)
    axes.text(
        1.02,
        at,
        f"{bar.effective:.0f} ({bar.effective / limit:.2f})",
        transform=axes.get_yaxis_transform(),
        va="center",
        color=_GREY,
    )


@contextmanager
def _figure(path: Path, width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure that is written when the block ends. Raises ConfigError when it cannot be."""
    check()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metadata: dict[str, Any] = {"Software": None}
    if path.suffix == ".svg":
        metadata = {"Date": None, "Creator": None}
    with matplotlib.rc_context():
        # The user's own style must not change the bytes.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure((width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}.") from None


def _legend(axes: Axes, **options: Any) -> None:
    """Beside the axes, where it hides nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, **options)


def _tint(colour: str) -> tuple[float, ...]:
    """Halfway to white; opaque, so that what lies behind does not show."""
    return tuple(0.5 + int(colour[i : i + 2], 16) / 510 for i in (1, 3, 5))


def _with_idle(outcome: Outcome) -> list[Sample]:
    """The samples, and zeros where the system is empty: the simulator takes none then."""
    idle: list[Sample] = []
    busy_until = 0.0
    for record in sorted(outcome.records, key=lambda r: r.intended_s):
        if record.intended_s > busy_until:
            idle.append((busy_until, 0, 0, 0))
        busy_until = max(busy_until, record.finished_s or 0.0)
    return sorted([*outcome.samples, *idle, (busy_until, 0, 0, 0)], key=itemgetter(0))


def _means(samples: Seq[Sample], spans: int) -> tuple[FloatArray, FloatArray]:
    """The middles of that many equal spans of time, shape [spans], in s, and the mean numbers of
    requests in each, shape [3, spans]: a short peak is lower then, but none is missed."""
    times = np.array([sample[0] for sample in samples])
    counts = np.array([sample[1:] for sample in samples], dtype=float)
    integral = np.zeros_like(counts)
    integral[1:] = np.cumsum(counts[:-1] * np.diff(times)[:, None], axis=0)
    edges = np.linspace(times[0], times[-1], spans + 1)
    totals = np.array([np.interp(edges, times, column) for column in integral.T])
    return (edges[:-1] + edges[1:]) / 2, np.diff(totals) / np.diff(edges)
