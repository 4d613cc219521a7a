"""Reports: what is kept, compared, drawn and written."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tokenflow.loadgen import compare as comparing
from tokenflow.loadgen.charts import Chart, decades, distribution, ticks
from tokenflow.loadgen.description import load_description
from tokenflow.loadgen.folder import RunFolder, SaveError
from tokenflow.loadgen.metrics import StreamRecord
from tokenflow.loadgen.page import page
from tokenflow.loadgen.pictures import dry_spans, read_line
from tokenflow.loadgen.report import (
    Curve,
    Report,
    load_report,
    make_repeat,
    make_report,
    without_folders,
)
from tokenflow.loadgen.tables import whole
from tokenflow.loadgen.targets.base import Opened
from tokenflow.loadgen.workload import make_workload
from tokenflow.replicas.errors import ConfigError

COUNT = 12


def records(ttft: float, slower: float = 0.0, fail: int = 0) -> list[StreamRecord]:
    made = []
    for i in range(COUNT):
        first = ttft + slower * i
        times = [(first + 0.04 * k, 1) for k in range(60)]
        record = StreamRecord(20.0, 0.0, 0.001, times, times[-1][0], "length", index=i)
        if i < fail:
            record.finish_reason, record.error = None, "HTTP 503: <busy> & gone"
        made.append(record)
    return made


def report(name: str, ttfts=(0.5,), *, seed: int = 1, fail: int = 0, **fields) -> Report:
    description = load_description(
        None,
        {
            "target": {"kind": "openai", "url": "http://h"},
            "name": name,
            "arrivals": {"kind": "burst", "count": COUNT},
            **fields,
        },
    )
    repeats = [
        make_repeat(
            records(ttft, 0.01, fail),
            make_workload(description, seed + i),
            seed + i,
            description.objectives,
            "2026-01-01T00:00:00+00:00",
        )
        for i, ttft in enumerate(ttfts)
    ]
    return make_report(
        description, Opened("http://h", "m"), repeats, command=["tokenflow", "bench"]
    )


def shown(thing, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


# -- what is kept ---------------------------------------------------------------------------------


def test_a_report_comes_back_from_its_file(tmp_path):
    made = report("a", (0.5, 0.6))
    (tmp_path / "report.json").write_text(made.model_dump_json())
    assert load_report(tmp_path) == load_report(tmp_path / "report.json") == made


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/usr/bin/tokenflow", "tokenflow"),
        ("trace:/data/a b/t.csv,time_scale=0.1", "trace:t.csv,time_scale=0.1"),
        ("--out=/home/me/x", "--out=x"),
        ("http://h:8000/v1/x", "http://h:8000/v1/x"),
        ("runs/a/b", "runs/a/b"),
        ("normal:512,128", "normal:512,128"),
        ("/tmp/folder/", "folder/"),
    ],
)
def test_reports_name_no_folders(word, shown):
    assert without_folders({"a": [word, 3]}) == {"a": [shown, 3]}


def test_the_summary_is_the_mean_of_the_repeats():
    found = report("a", (0.5, 0.6, 0.7)).summary["ttft_mean_s"]
    assert found.value == pytest.approx(0.6 + 0.055) and found.samples == 3
    assert found.high - found.value == pytest.approx(4.303 * 0.1 / 3**0.5)
    single = report("a").summary["ttft_mean_s"]
    assert single.low is single.high is None


def test_a_row_a_request_and_errors_by_kind():
    repeat = report("a", fail=3).repeats[0]
    assert [row.index for row in repeat.requests] == list(range(COUNT))
    assert repeat.requests[5].ttft_s == pytest.approx(0.55)
    (error,) = repeat.errors
    assert (error.message, error.count) == ("HTTP 503: <busy> & gone", 3)
    assert repeat.planned == COUNT


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fail": 2}, "2 of 12 requests failed"),
        ({}, "P99 of 12 requests"),
        ({"closed_loop": {"users": 3}}, "Closed loop of 3 users"),
        ({"arrivals": {"kind": "burst", "count": COUNT + 4}}, "4 planned requests were never sent"),
        (
            {
                "behaviours": [
                    {"kind": "change_speed", "share": 1, "after_tokens": 1, "token_rate": 9}
                ]
            },
            "modelled in the reader",
        ),
    ],
)
def test_what_must_be_known_is_said(fields, words):
    assert any(words in warning for warning in report("a", **fields).warnings)


def test_a_generator_that_is_late_is_told_of():
    late = records(0.5)
    for record in late:
        record.sent_s = 0.08
    description = load_description(None, {"target": {"kind": "grpc", "address": "h:1"}})
    repeat = make_repeat(late, make_workload(description, 1), 1, description.objectives, "")
    made = make_report(description, Opened("h", "m"), [repeat])
    assert any("generator itself was late: P99 80 ms" in w for w in made.warnings)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "JSON"), ("{}", "is no report"), ('{"version": 2}', "version"), ("[]", "is no report")],
)
def test_files_that_are_no_report(tmp_path, text, words):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_report(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_report(tmp_path / "none")


# -- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_fits_a_terminal(width):
    text = shown(whole(report("a", (0.5, 0.6), fail=1)), width)
    assert "TTFT P99" in text and "±" in text and "…" not in text
    assert "effective, at the client" in text and "effective, at the server" not in text
    assert "HTTP 503: <busy> & gone" in text and "under 32" not in text and "32-256" in text
    assert all(len(line) <= width for line in text.splitlines())


# -- what is compared -----------------------------------------------------------------------------


def verdicts(a: Report, b: Report) -> dict[str, str]:
    return {change.name: change.verdict for change in comparing.compare(a, b)}


def test_a_change_that_is_larger_than_the_repeats_differ_is_real():
    slow, fast = report("a", (1.0, 1.1, 1.05, 0.95, 1.0)), report("b", (0.5, 0.6, 0.5, 0.55, 0.5))
    assert verdicts(slow, fast)["ttft_mean_s"] == "better"
    assert verdicts(fast, slow)["ttft_mean_s"] == "worse"
    assert verdicts(fast, slow)["raw_tok_s"] == "worse"
    assert verdicts(slow, slow)["ttft_mean_s"] == "same"
    near = report("b", (1.02, 1.03, 1.07, 0.99, 0.98))
    assert verdicts(slow, near)["ttft_mean_s"] == "noise"
    assert "paired" in shown(comparing.table(slow, fast, comparing.compare(slow, fast)))


def test_other_workloads_are_not_paired():
    a, b = report("a", (1.0, 1.1)), report("b", (1.0, 1.1), seed=7)
    text = shown(comparing.table(a, b, comparing.compare(a, b)))
    assert "The workloads differ" in text and "paired" not in text


def test_single_runs_have_intervals_over_requests_only():
    a, b = report("a", (0.5,)), report("b", (0.9,))
    found = {change.name: change for change in comparing.compare(a, b)}
    assert found["ttft_mean_s"].over == "requests" and found["ttft_mean_s"].verdict == "worse"
    assert found["raw_tok_s"].verdict == "unknown" and found["raw_tok_s"].over == ""
    assert "Use --repeats 5" in shown(comparing.table(a, b, list(found.values())))


def fails(text: str, b: Report, a: Report | None = None) -> list[str]:
    changes = comparing.compare(a, b) if a is not None else ()
    return comparing.failures(comparing.parse_conditions(text), b, changes)


def test_conditions_on_a_run():
    run = report("a", (0.5, 0.6))
    assert fails("ttft_p99_s>1.3, failed > 0", run) == []
    (said,) = fails("ttft_p99>0.1,failed>0", run)
    assert said.startswith("ttft_p99>0.1: TTFT P99 is 0.6")
    assert (
        fails("failed>=0", run) and fails("requests<=12", run) and fails("effective_ratio<2", run)
    )


def test_conditions_on_a_change_forgive_noise():
    base = report("a", (1.0, 1.1, 1.05, 0.95, 1.0))
    near = report("b", (1.02, 1.03, 1.07, 0.99, 0.98))
    worse = report("b", (1.5, 1.6, 1.5, 1.55, 1.5))
    assert fails("ttft_mean>-5%", near, base) == []
    assert len(fails("ttft_mean>+10%,raw_tok_s<-5%", worse, base)) == 2
    assert fails("ttft_mean>+80%", worse, base) == []
    with pytest.raises(ConfigError, match="two reports"):
        fails("ttft_mean>+10%", worse)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft_p99", "is not FIGURE<VALUE"),
        ("ttft_p99=3", "is not FIGURE<VALUE"),
        ("speed>3", "no figure 'speed'"),
        ("ttft_p99>10%", "needs its sign"),
        ("ttft_p99>1.2.3", "not a number"),
        ("", "is not FIGURE"),
    ],
)
def test_conditions_that_are_none(text, words):
    with pytest.raises(ConfigError, match=f"--fail-if: .*{words}"):
        comparing.parse_conditions(text)


def test_a_figure_the_run_does_not_have():
    with pytest.raises(ConfigError, match="has no generated_effective_tok_s"):
        fails("generated_effective_tok_s<5", report("a"))


# -- what is drawn --------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags close each other; keeps the text and what is fetched from elsewhere."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.fetched: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_page_stands_alone(count):
    reports = [report(f"run <{i}>", (0.5 + i, 0.6 + i), fail=i) for i in range(count)]
    text = page(reports)
    parsed = Page(text)
    assert parsed.fetched == []
    for word in ("http://h/", "url(", "@import", "import ", "fetch(", "https://"):
        assert word not in text
    assert 'name="viewport"' in text and "prefers-color-scheme" in text
    for i in range(count):
        assert f"run <{i}>" in parsed.text
    assert "<busy>" not in text
    assert ("verdict" in parsed.text) == (count > 1)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) >= 4 + count * (2 + 3)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("viewBox") == "0 0 400 260" and root.get("aria-label")
        assert "nan" not in drawing and "inf" not in drawing


def test_nothing_came_at_all():
    """A run in which every request failed is shown, too."""
    failed = report("dead", fail=COUNT)
    for row in failed.repeats[0].curves:
        row.points = []
    assert "12 of 12 requests failed" in Page(page([failed])).text
    assert "12 of 12" in shown(whole(failed))


def test_no_reports_are_no_page():
    with pytest.raises(ValueError):
        page([])


def test_the_servers_gauges_are_drawn_where_there_are_some():
    made = report("a")
    assert "The server's own word" not in Page(page([made])).text
    made.repeats[0].server = {"at_s": [0, 1, 2], "waiting": [0, 9, 3], "preempted": [0, 1, 0]}
    text = page([made])
    assert "The server's own word" in Page(text).text
    hints = re.findall(r"<title>(waiting|preempted|running)</title>", text)
    assert hints == ["waiting", "preempted"]


CURVE = Curve(
    index=0, token_rate=10.0, intended_s=1.0, andes_qoe=1.0, points=[(2.0, 1), (2.1, 5), (4.0, 6)]
)


def test_the_readers_line_and_where_it_stops():
    # 5 tokens are read from 2.0 to 2.5 s; the next one comes at 4.0 s.
    (start, stop) = dry_spans(CURVE)[0]
    assert (start, stop) == (pytest.approx(2.5), 4.0) and len(dry_spans(CURVE)) == 1
    assert read_line(CURVE)[-1] == (pytest.approx(4.1), 6.0)
    agent = CURVE.model_copy(update={"token_rate": "max"})
    assert dry_spans(agent) == read_line(agent) == []


def test_scales():
    chart = Chart((0, 10), (0, 5), x_label="", y_label="", title="")
    assert chart.x(0) < chart.x(5) < chart.x(10) == chart.x(99)
    assert chart.y(0) > chart.y(5) == chart.y(7)
    assert chart.x(5) - chart.x(0) == pytest.approx(chart.x(10) - chart.x(5), abs=0.2)
    log = Chart((0.01, 100), (0, 1), x_label="", y_label="", title="", log_x=True)
    assert log.x(1) - log.x(0.1) == pytest.approx(log.x(10) - log.x(1), abs=0.2)
    flat = Chart((3, 3), (0, 0), x_label="", y_label="", title="")
    assert flat.x(3) == flat.x(2)


def test_ticks_are_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 0.37) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert ticks(3, 1000) == [200, 400, 600, 800, 1000]
    assert decades(0.09, 20) == pytest.approx([0.1, 1, 10])
    assert decades(0.4, 3) == pytest.approx([0.5, 1, 2])
    assert distribution([3, 1]) == [(1, 0.5), (3, 1.0)]


# -- what is written ------------------------------------------------------------------------------


def test_the_folder_holds_everything(tmp_path):
    made = report("a")
    folder = RunFolder(tmp_path / "new" / "run")
    folder.begin(1, make_workload(load_description(None, made.description), 1))
    for record in records(0.5):
        folder.add(record)
    folder.finish(made, page([made]))
    folder.check()
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["report.html", "report.json", "requests-1.jsonl", "workload-1.jsonl"]
    lines = [json.loads(x) for x in (folder.path / "requests-1.jsonl").read_text().splitlines()]
    assert len(lines) == COUNT and len(lines[0]["arrivals"]) == 60 and "text" not in lines[0]
    assert load_report(folder.path) == made
    written = (folder.path / "report.json").read_text().splitlines()
    assert len(written) > 100 and not any(line.strip(" ,").isdigit() for line in written)
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder(folder.path)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    """/dev/full takes nothing, as a full disk."""
    made = report("a")
    folder = RunFolder(tmp_path)
    (tmp_path / "requests-1.jsonl").symlink_to("/dev/full")
    workload = make_workload(load_description(None, made.description), 1)
    folder.begin(1, workload)
    for record in records(0.5):
        folder.add(record)
    folder.end()
    folder.finish(made, "page")
    with pytest.raises(SaveError, match=r"requests-1\.jsonl: No space left on device.*--out"):
        folder.check()
    assert load_report(tmp_path) == made
    assert (tmp_path / "workload-1.jsonl").read_text() == workload.to_jsonl()


def test_a_report_that_cannot_be_written_is_told(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "report.html").symlink_to("/dev/full")
    folder.finish(report("a"), "x")
    with pytest.raises(SaveError, match=r"report\.html: No space left"):
        folder.check()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out: cannot make"):
        RunFolder(tmp_path / "file" / "run")
