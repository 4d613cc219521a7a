"""A report in a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenflow.loadgen.figures import METRICS
from tokenflow.loadgen.report import Estimate, Report

SECTIONS: dict[str, tuple[str, ...]] = {
    "What readers saw": (
        "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "ttft_slo_share",
        "tpot_mean_s", "chunk_gap_p99_s", "e2e_mean_s", "e2e_p99_s",
        "stall_mean_s", "stall_p99_s", "stalled_readers", "stalls",
        "andes_qoe_mean", "on_time_share", "fluid_share", "fairness",
    ),
    "What the server did": (
        "raw_tok_s", "effective_tok_s", "generated_effective_tok_s", "effective_ratio",
        "generated_effective_ratio", "qos_tok_s", "goodput_req_s", "goodput_share", "duration_s",
    ),
    "What was asked of it": (
        "requests", "failed", "left", "tokens", "prompt_tokens", "offered_req_s", "lag_p99_s",
    ),
}  # fmt: skip
"""The figures that are shown, in their order; the JSON has all."""
_PART_COLUMNS = (
    "requests", "ttft_mean_s", "ttft_p99_s", "raw_tok_s", "effective_ratio",
    "generated_effective_ratio", "stall_mean_s", "smooth_share",
)  # fmt: skip


def number(name: str, value: float | None) -> str:
    """A figure as it is shown, without its unit."""
    if value is None:
        return "n/a"
    if METRICS[name].unit == "" and name.endswith(("share", "ratio")):
        return f"{value * 100:.1f} %"
    if METRICS[name].unit == "":
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.4f}"


def estimate(name: str, value: Estimate) -> str:
    """A mean with its interval, as 12.3 ± 0.4."""
    shown = number(name, value.value)
    if value.low is None or value.high is None or value.high == value.low:
        return shown
    return f"{shown} ± {number(name, (value.high - value.low) / 2)}"


def summary_table(report: Report) -> Table:
    """Every shown figure, by section."""
    several = len(report.repeats) > 1
    title = f"{report.name}: {report.model} at {report.target}"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    heading = f"mean of {len(report.repeats)}, 95 % interval" if several else ""
    table.add_column(heading, justify="right")
    table.add_column("")
    for section, names in SECTIONS.items():
        table.add_row(Text(section, style="bold"), "", "")
        for name in names:
            found = report.summary.get(name)
            if found is None:
                continue
            style = "bold red" if name == "failed" and found.value else ""
            table.add_row(
                f"  {METRICS[name].title}", Text(estimate(name, found), style), METRICS[name].unit
            )
        table.add_section()
    return table


def parts_table(title: str, parts: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Figures of parts of a run, a row each."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for name in _PART_COLUMNS:
        unit = f"\n{METRICS[name].unit}" if METRICS[name].unit else ""
        table.add_column(f"{METRICS[name].title}{unit}", justify="right")
    for part, found in parts.items():
        table.add_row(part, *(number(name, found.get(name)) for name in _PART_COLUMNS))
    return table


def whole(report: Report) -> RenderableType:
    """All that is printed of a finished run."""
    shown: list[RenderableType] = [summary_table(report)]
    first = report.repeats[0]
    of = " (first repeat)" if len(report.repeats) > 1 else ""
    shown.append(parts_table(f"By output length, tokens{of}", first.by_length))
    if len(first.by_rate) > 1:
        shown.append(parts_table(f"By reading speed{of}", first.by_rate))
    goals = report.description["objectives"]
    shown.append(
        Text(
            f"In time: TTFT up to {goals['ttft_s']:g} s. Within objectives: also at most "
            f"{goals['stall_s']:g} s dry. QoS: lambda {goals['qos_ttft_weight']:g}, "
            f"mu {goals['qos_stall_weight']:g}.",
            style="dim",
        )
    )
    shown += [Text(note, style="dim") for note in report.notes]
    shown += [Text(f"! {warning}", style="yellow") for warning in report.warnings]
    errors = [error for repeat in report.repeats for error in repeat.errors]
    shown += [
        Text(f"x {error.count} x {error.message} (first after {error.first_s:.1f} s)", style="red")
        for error in errors[:10]
    ]
    return Group(*shown)
