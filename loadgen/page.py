"""One page for one report or for several side by side: everything in the file, no network."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from html import escape

from tokenflow.loadgen import pictures
from tokenflow.loadgen.catalogue import METRICS
from tokenflow.loadgen.compare import COMPARED, Change, bounds, compare, percent, titled
from tokenflow.loadgen.report import Curve, Report
from tokenflow.loadgen.tables import PART_COLUMNS, SECTIONS, estimate, number, unit

_CARDS = (
    "ttft_p99_s", "ttft_slo_share", "stall_mean_s", "effective_tok_s",
    "generated_effective_tok_s", "raw_tok_s", "goodput_share", "failed",
)  # fmt: skip

_STYLE = """
:root{--bg:#fbfbf9;--card:#fff;--ink:#1c2024;--dim:#687076;--rule:#e4e5e2;--grid:#eceeeb;
--s0:#2867c6;--s1:#d9662b;--s2:#2f8f5b;--s3:#8a4fc0;--s4:#b3282d;--s5:#7a6a1f;
--dry:#d64545;--waits:#c9ccd1;--reads:#7db896;--wasted:#d5d8dc}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e8eaec;--dim:#9aa3ab;
--rule:#30363c;--grid:#2a3036;--s0:#6ea8ff;--s1:#ff9b63;--s2:#5fc890;--s3:#bd8cf0;--s4:#ff7c7c;
--s5:#d6c25a;--dry:#ff6b6b;--waits:#4a5158;--reads:#3f7d5b;--wasted:#3b4249}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 14px 60px}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.12rem;margin:2em 0 .5em}
p{margin:.4em 0}.dim{color:var(--dim);font-size:.9rem}code{font-size:.85em;word-break:break-all}
.cards{display:grid;grid-template-columns:repeat(4,1fr);gap:10px;margin:16px 0}
@media(max-width:720px){.cards{grid-template-columns:repeat(2,1fr)}}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.card{padding:10px 12px}.card b{display:block;font-size:1.45rem;font-weight:650;line-height:1.2}
.card small{font-size:.62em;font-weight:400;color:var(--dim);white-space:nowrap}
.card span{color:var(--dim);font-size:.82rem}.card.bad b{color:var(--dry)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:12px;
margin:0 0 12px}.charts.two{grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr))}
.picker .charts{max-width:560px}
figure{margin:0;padding:10px 10px 6px}figcaption{font-weight:600;font-size:.95rem}
figcaption small{display:block;font-weight:400;color:var(--dim);font-size:.82rem}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font:11.5px system-ui,sans-serif}
svg text.value{fill:var(--ink);font-weight:600}svg text.marked{fill:var(--ink)}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}.mark{stroke:var(--dim);stroke-dasharray:4 3}
.line{fill:none;stroke-width:1.8}.whisker{fill:none;stroke:var(--ink);stroke-width:1.3}
.line.s0{stroke:var(--s0)}.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}
.line.s3{stroke:var(--s3)}.line.s4{stroke:var(--s4)}.line.s5{stroke:var(--s5)}
.fill.s0{fill:var(--s0)}.fill.s1{fill:var(--s1)}.fill.s2{fill:var(--s2)}
.fill.s3{fill:var(--s3)}.fill.s4{fill:var(--s4)}.fill.s5{fill:var(--s5)}
.line.received{stroke:var(--s0)}.line.read{stroke:var(--s2)}
.line.wanted{stroke:var(--dim);stroke-dasharray:5 4}.line.dry{stroke:var(--dry)}
.area.waits,.box.waits{fill:var(--waits)}.area.reads,.box.reads{fill:var(--reads)}
.box.dry{fill:var(--dry)}.timeline .box.dry{opacity:.25}.box.wasted{fill:var(--wasted)}
.key{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.82rem;color:var(--dim);margin:.3em 0}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:5px;
vertical-align:-1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:5px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal}th{color:var(--dim);font-weight:600}
td.section{font-weight:650;padding-top:14px}.better{color:var(--s2)}.worse{color:var(--dry)}
.noise,.same,.unknown{color:var(--dim)}.warn{border-left:3px solid var(--s1);padding-left:10px}
input[type=range]{width:100%;accent-color:var(--s0)}.hidden{display:none}
"""

_SCRIPT = """
for (const box of document.querySelectorAll('.picker')) {
  const all = box.querySelectorAll('figure'), range = box.querySelector('input');
  const show = () => all.forEach((f, i) => f.classList.toggle('hidden', i != range.value));
  range.addEventListener('input', show); box.classList.remove('hidden'); show();
}
"""


def page(reports: Seq[Report]) -> str:
    """The page; of several reports the first is what the others are compared to. Raises ValueError
    without reports."""
    if not reports:
        raise ValueError("no reports")
    first = reports[0]
    title = " / ".join(report.name for report in reports)
    body = [_head(reports)]
    if len(reports) == 1:
        body.append(_cards(first))
    body += [_warnings(report, several=len(reports) > 1) for report in reports]
    body.append(_overview(reports))
    if len(reports) > 1:
        body += [_comparison(first, report) for report in reports[1:]]
    body += [_readers(i, report, several=len(reports) > 1) for i, report in enumerate(reports)]
    body += [_figures(report) for report in reports]
    body.append(_glossary())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"{''.join(body)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _head(reports: Seq[Report]) -> str:
    lines = []
    for i, report in enumerate(reports):
        repeats = len(report.repeats)
        count = sum(len(repeat.requests) for repeat in report.repeats)
        dot = f'<i style="background:var(--{pictures.style(i)})"></i>' if len(reports) > 1 else ""
        broken = "" if report.complete else " <b>Broken off.</b>"
        lines.append(
            f'<p class="key"><span>{dot}{escape(report.name)}: {escape(report.model)} at '
            f"{escape(report.target)}, {count} requests in {repeats} "
            f"{'repeat' if repeats == 1 else 'repeats'}, {escape(report.created_at)}.{broken}"
            "</span></p>"
        )
    title = " and ".join(escape(report.name) for report in reports)
    return f"<h1>{title}</h1>{''.join(lines)}"


def _cards(report: Report) -> str:
    cards = []
    for name in _CARDS:
        found = report.summary.get(name)
        if found is None:
            continue
        bad = ' class="card bad"' if name == "failed" and found.value else ' class="card"'
        value, _, half = estimate(name, found).partition(" ± ")
        small = f" <small>{unit(name)}{f' ± {half}' if half else ''}</small>"
        cards.append(
            f'<div{bad} title="{escape(METRICS[name].meaning)}">'
            f"<b>{value}{small}</b><span>{METRICS[name].title}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _warnings(report: Report, *, several: bool) -> str:
    said = [*report.notes, *report.warnings]
    said += [
        f"{error.count} × {error.message} (first after {error.first_s:.1f} s)"
        for repeat in report.repeats
        for error in repeat.errors
    ]
    own = f"{report.name}: " if several else ""
    return "".join(f'<p class="warn">{escape(own + text)}</p>' for text in said)


def _figure(title: str, note: str, svg: str, classes: str = "") -> str:
    named = f' class="{classes}"' if classes else ""
    return (
        f"<figure{named}><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
        f"{svg}</figure>"
    )


def _overview(reports: Seq[Report]) -> str:
    goal = float(reports[0].description["objectives"]["ttft_s"])
    firsts = [(report.name, report.repeats[0]) for report in reports]
    server = all("generated_effective_tok_s" in report.summary for report in reports)
    where = "where the server generated them" if server else "as they reached the client"
    charts = [
        _figure("Time to first token", "Share of requests that had one by then.",
                pictures.ttft_distribution(reports, goal)),
        _figure("Useful throughput", f"Coloured: tokens their readers needed soon, {where}. "
                "Grey: far ahead of their eyes.", pictures.throughput_bars(reports)),
        _figure("Seconds dry", "Share of readers that sat at an empty buffer no longer than that.",
                pictures.stall_distribution(reports)),
        _figure("Tokens received", "Per second, first repeat.", pictures.speed(firsts)),
    ]  # fmt: skip
    return f'<h2>At a glance</h2><div class="charts two">{"".join(charts)}</div>'


def _readers(i: int, report: Report, *, several: bool) -> str:
    repeat = report.repeats[0]
    goal = float(report.description["objectives"]["ttft_s"])
    order = sorted(
        repeat.curves, key=lambda c: -1.0 if c.andes_qoe is None else c.andes_qoe
    )  # fmt: skip
    own = f": {report.name}" if several else ""
    charts = [
        _figure("Every reader a row", "Grey waits, green reads, red is dry, while the run lasted.",
                pictures.readers_rows(repeat)),
        _figure("In the system", "Grey waits for a first token, green streams; red line: dry.",
                pictures.queue(repeat)),
    ]  # fmt: skip
    own_words = pictures.gauges(repeat)
    if own_words:
        note = "Its gauges: green runs, orange waits, purple is preempted."
        charts.append(_figure("The server's own word", note, own_words))
    picks = {}
    if order:
        picks = {"Worst": order[0], "Median": order[len(order) // 2], "Best": order[-1]}
    timelines = [_timeline(f"{name} served reader", c, goal) for name, c in picks.items()]
    picker = ""
    if len(order) > 3:
        figures = "".join(_timeline("Reader", curve, goal) for curve in order)
        picker = (
            f'<div class="picker hidden"><p class="dim">Any reader, worst to best:</p>'
            f'<input type="range" min="0" max="{len(order) - 1}" value="0" '
            f'aria-label="Which reader"><div class="charts">{figures}</div></div>'
        )
    key = (
        '<p class="key"><span><i style="background:var(--s0)"></i>received</span>'
        '<span><i style="background:var(--s2)"></i>read</span>'
        '<span><i style="background:var(--dim)"></i>wanted: at reading speed from the TTFT limit '
        'on</span><span><i style="background:var(--dry)"></i>dry</span></p>'
    )
    note = " (first repeat)" if len(report.repeats) > 1 else ""
    return (
        f"<h2>Readers{escape(own)}{note}</h2>{key}"
        f'<div class="charts two">{"".join(charts)}</div>'
        f'<div class="charts">{"".join(timelines)}</div>{picker}'
    )


def _timeline(title: str, curve: Curve, goal: float) -> str:
    quality = "" if curve.andes_qoe is None else f", Andes QoE {curve.andes_qoe:.2f}"
    speed = "no reader" if curve.token_rate == "max" else f"{curve.token_rate:g} tokens/s"
    note = f"Request {curve.index}, {speed}{quality}."
    return _figure(title, note, pictures.tokens_timeline(curve, goal), "timeline")


def _comparison(before: Report, after: Report) -> str:
    changes = {change.name: change for change in compare(before, after)}
    rows = [_row(changes[name]) for name in COMPARED if name in changes]
    return (
        f"<h2>{escape(before.name)} → {escape(after.name)}</h2>"
        '<div class="scroll"><table><tr><th></th>'
        f"<th>{escape(before.name)}</th><th>{escape(after.name)}</th><th>change</th>"
        f"<th>95 % interval</th><th>verdict</th></tr>{''.join(rows)}</table></div>"
    )


def _row(change: Change) -> str:
    metric = METRICS[change.name]
    return (
        f'<tr title="{escape(metric.meaning)}"><td>{titled(change.name)}</td>'
        f"<td>{number(change.name, change.before)}</td><td>{number(change.name, change.after)}</td>"
        f"<td>{percent(change)}</td><td>{bounds(change)}</td>"
        f'<td class="{change.verdict}">{change.verdict}</td></tr>'
    )


def _figures(report: Report) -> str:
    rows = []
    for section, names in SECTIONS.items():
        rows.append(f'<tr><td class="section" colspan="3">{section}</td></tr>')
        for name in names:
            if name in report.summary:
                metric = METRICS[name]
                rows.append(
                    f'<tr title="{escape(metric.meaning)}"><td>{metric.title}</td>'
                    f"<td>{estimate(name, report.summary[name])}</td>"
                    f'<td class="dim">{unit(name)}</td></tr>'
                )
    parts = "".join(
        _parts(title, found)
        for title, found in (
            ("By output length, tokens", report.repeats[0].by_length),
            ("By reading speed", report.repeats[0].by_rate),
        )
    )
    shas = ", ".join(repeat.workload_sha256[:12] for repeat in report.repeats)
    return (
        f"<h2>All figures: {escape(report.name)}</h2>"
        f'<div class="scroll"><table>{"".join(rows)}</table></div>{parts}'
        f'<p class="dim">Workloads (sha256): <code>{shas}</code>. Command: '
        f"<code>{escape(' '.join(report.command))}</code>. Machine: "
        f"{escape(str(report.machine['platform']))}, {report.machine['cpus']} CPUs.</p>"
    )


def _parts(title: str, parts: dict[str, dict[str, float | None]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in PART_COLUMNS.values())
    rows = "".join(
        f"<tr><td>{escape(part)}</td>"
        + "".join(f"<td>{number(n, found.get(n))}</td>" for n in PART_COLUMNS)
        + "</tr>"
        for part, found in parts.items()
    )
    return (
        f'<h2>{title}</h2><div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'
    )


def _glossary() -> str:
    rows = "".join(
        f"<tr><td>{metric.title}</td>"
        f'<td style="text-align:left;white-space:normal">{escape(metric.meaning)}</td></tr>'
        for metric in METRICS.values()
    )
    return f"<details><summary>What the figures mean</summary><table>{rows}</table></details>"
