"""What is seen of a run while it goes on."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from tokenflow.loadgen.live import Reader, Watcher
from tokenflow.loadgen.metrics import LEFT, StreamRecord

NOW = 100.0
LENGTH = 64


def record(arrivals, **fields) -> StreamRecord:
    return StreamRecord(10.0, 98.0, sent_s=98.0, arrivals=arrivals, **fields)


WAITING = record([])
DRY = record([(98.5, 3)])
BUFFERED = record([(99.0, 40)])
FULL = record([(99.9, LENGTH)])
DONE = record([(99.0, LENGTH)], finished_s=99.5, finish_reason="length")
GONE = record([(99.0, 2)], finished_s=99.5, finish_reason=LEFT)


def cell(own: StreamRecord, now: float = NOW) -> tuple[str, str]:
    return Reader(own).cell(now, LENGTH)


def watcher(records, total: int | None = None) -> Watcher:
    watching = Watcher("fcfs", len(records) if total is None else total, LENGTH)
    watching.look(records)
    return watching


def shown(thing: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_one_cell_per_state():
    assert cell(WAITING) == ("·", "dim")
    assert cell(DRY) == ("!", "bold red")
    assert cell(DONE) == ("■", "blue")
    assert cell(GONE) == ("-", "yellow")
    assert cell(FULL) == ("█", "green")
    assert cell(BUFFERED)[1] == "green"


@pytest.mark.parametrize(
    ("tokens", "level"), [(1, "▁"), (8, "▁"), (9, "▂"), (32, "▄"), (33, "▅"), (64, "█"), (99, "█")]
)
def test_the_level_is_what_lies_ahead_of_the_reader(tokens, level):
    assert cell(record([(NOW, tokens)])) == (level, "green")


def test_a_cell_goes_down_while_the_reader_reads_and_up_with_new_text():
    own = record([(100.0, 33)])
    reader = Reader(own)
    assert reader.cell(100.0, LENGTH)[0] == "▅"
    assert reader.cell(102.0, LENGTH)[0] == "▂"
    assert reader.cell(103.25, LENGTH)[0] == "▁"
    assert reader.cell(103.5, LENGTH)[0] == "!"
    own.arrivals.append((104.0, 17))
    assert reader.cell(104.0, LENGTH)[0] == "▃"
    assert reader.tokens == 50


@pytest.mark.parametrize("arrivals", [[], [(99.0, 3)]])
def test_a_failed_reader_is_not_shown_as_waiting_or_served(arrivals):
    assert cell(record(arrivals, finished_s=99.5, error="HTTP 429"))[0] == "x"


def test_who_does_not_read_never_runs_dry():
    agent = StreamRecord(math.inf, 98.0, arrivals=[(98.5, 3)])
    assert Reader(agent).look(NOW) == "streaming"
    assert cell(agent) == ("▁", "green")


def test_a_reader_who_pauses_is_not_dry():
    asleep = record([(98.5, 3)], pauses=[(98.6, 10.0)])
    assert Reader(asleep).look(NOW) == "reading"


def test_the_status_line_counts_the_readers():
    assert watcher([WAITING, DRY, BUFFERED, DONE]).status(NOW, 97.5) == (
        "fcfs    2.5 s  first token 3/4  done 1  dry now 1  107 tokens"
    )
    failed = record([], finished_s=99.0, error="HTTP 429")
    assert watcher([failed], 9).status(NOW, 97.5).endswith("first token 0/9  done 0  dry now 0  "
                                                           "0 tokens  FAILED 1")  # fmt: skip
    assert watcher([]).status(5.0, 5.0).endswith("first token 0/0  done 0  dry now 0  0 tokens")


def test_what_is_new_is_counted_once():
    own = record([(99.0, 2)])
    watching = watcher([own])
    assert " 2 tokens" in watching.status(NOW, 97.5)
    own.arrivals.append((99.5, 3))
    watching.look([own, BUFFERED])
    assert " 45 tokens" in watching.status(NOW, 97.5)
    assert " 45 tokens" in watching.status(NOW, 97.5)


def test_the_view_has_a_cell_per_reader_and_the_waits():
    text = shown(watcher([WAITING, DRY, BUFFERED, DONE, *[WAITING] * 62]).view(NOW, 97.5))
    grid = [line for line in text.splitlines() if line.count("·") > 1]
    assert [len(line.rstrip()) for line in grid] == [32, 32, 2]
    assert grid[0].startswith("·!▄■····")
    assert "sent 66  waiting 63  streaming 2  dry now 1  failed 0" in text
    assert "p50 2.00 s, p99 2.00 s" in text and "generator late 0.0 ms" in text
    assert "1/66" in text and "all delivered" in text and "has run dry" in text


def test_the_view_before_anything_was_sent():
    text = shown(watcher([], 4).view(NOW, NOW))
    assert "0/4" in text and "p50" not in text


def test_of_too_many_readers_the_newest_are_shown():
    text = shown(watcher([DONE] * 300 + [WAITING] * 100).view(NOW, 97.5))
    assert text.count("■") == 256 - 100 + 1 and text.count("·") == 101  # one each in the legend


@pytest.mark.parametrize("width", [80, 100])
def test_the_view_fits_a_terminal(width):
    text = shown(watcher([DONE] * 64).view(1100.0, 97.5), width=width)
    assert len(text.splitlines()) <= 7
