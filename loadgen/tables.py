"""A report in a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenflow.loadgen.catalogue import METRICS
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
PART_COLUMNS = {
    "requests": "count", "ttft_mean_s": "TTFT\nmean, s", "ttft_p99_s": "TTFT\nP99, s",
    "raw_tok_s": "raw\ntok/s", "effective_ratio": "eff.\nclient",
    "generated_effective_ratio": "eff.\nserver", "stall_mean_s": "dry, s\neach",
    "smooth_share": "never\ndry",
}  # fmt: skip
"""What is shown of the parts of a run."""


def number(name: str, value: float | None) -> str:
    """A figure as it is shown, without its unit."""
    return "n/a" if value is None else _form(name, value).format(_scaled(name, value))


def estimate(name: str, value: Estimate) -> str:
    """A mean with its interval, as 12.3 ± 0.4."""
    shown = number(name, value.value)
    if value.low is None or value.high is None or value.high == value.low:
        return shown
    form = _form(name, value.value)
    return f"{shown} ± {form.format(_scaled(name, (value.high - value.low) / 2))}"


def unit(name: str) -> str:
    """The unit a figure is shown in."""
    own = METRICS[name].unit
    return f"m{own}" if _is_small(name) else own


def _is_share(name: str) -> bool:
    return METRICS[name].unit == "" and name.endswith(("share", "ratio"))


def _is_small(name: str) -> bool:
    return name.startswith(("tpot", "lag"))


def _scaled(name: str, value: float) -> float:
    if _is_small(name):
        return value * 1000
    return value * 100 if _is_share(name) else value


def _form(name: str, value: float) -> str:
    """The format of a figure of that size; its interval has the same decimals."""
    if _is_share(name):
        return "{:.1f} %"
    size = abs(_scaled(name, value))
    if METRICS[name].unit == "" and float(value).is_integer():
        return "{:,.0f}"
    if size >= 100:
        return "{:,.0f}"
    if size >= 10:
        return "{:.1f}"
    return "{:.2f}" if size >= 1 and METRICS[name].unit else "{:.3f}"


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
                f"  {METRICS[name].title}", Text(estimate(name, found), style), unit(name)
            )
        table.add_section()
    return table


def parts_table(title: str, parts: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Figures of parts of a run, a row each."""
    table = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("")
    for heading in PART_COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for part, found in parts.items():
        table.add_row(part, *(number(name, found.get(name)) for name in PART_COLUMNS))
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
