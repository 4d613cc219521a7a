"""Traces: both formats, windows, and errors that name file, line, value and remedy."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tests.support.shared_data import shared_file
from tokenflow.loadgen.traces import Trace, TraceRow, load_trace
from tokenflow.replicas.errors import ConfigError

HEADER = "arrival_s,input_tokens,output_tokens\n"
RAW = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "trace.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_normalised_rows(write):
    path = write(HEADER + "3.5,10,20\n4,30,40\n")
    assert load_trace(path) == Trace((TraceRow(0.0, 10, 20), TraceRow(0.5, 30, 40)), 0)
    assert [row.line for row in load_trace(path).rows] == [2, 3]


def test_burstgpt_rows_and_failed_requests(write):
    path = write(
        RAW
        + "100,ChatGPT,5,0,5,API log\n"
        + "105,GPT-4,472,18,490,Conversation log\n"
        + "106,GPT-4,0,0,0,API log\n"
        + "107.0,GPT-4,1,2,3,API log\n"
    )
    assert load_trace(path) == Trace((TraceRow(0.0, 472, 18), TraceRow(2.0, 1, 2)), 2)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + HEADER + "0,1,1\n",
        (HEADER + "0,1,1\n").replace("\n", "\r\n"),
        HEADER + "0,1,1",
        HEADER + "\n0, 1,1 \n\n",
    ],
    ids=["byte order mark", "crlf", "no last newline", "blank lines and spaces"],
)
def test_what_other_programs_write(write, text):
    assert load_trace(write(text)).rows == (TraceRow(0.0, 1, 1),)


TEN = HEADER + "".join(f"{50 + i},{i + 1},1\n" for i in range(10))


def test_a_window_counts_from_the_first_row_and_ends_before_its_end(write):
    rows = load_trace(write(TEN), start_s=2.0, duration_s=3.0).rows
    assert [(row.arrival_s, row.input_tokens) for row in rows] == [(0, 3), (1, 4), (2, 5)]


def test_time_scale_and_max_rows(write):
    rows = load_trace(write(TEN), start_s=1.5, time_scale=0.5, max_rows=3).rows
    assert [(row.arrival_s, row.input_tokens) for row in rows] == [(0, 3), (0.5, 4), (1, 5)]


def test_the_window_bounds_what_is_counted_as_failed(write):
    path = write(RAW + "".join(f"{i},m,5,{i % 2},5,l\n" for i in range(10)))
    assert load_trace(path, start_s=4, duration_s=4).failed == 2


def test_lines_behind_the_window_are_not_read(write):
    path = write(TEN + "nonsense\n")
    assert len(load_trace(path, duration_s=5).rows) == 5
    assert len(load_trace(path, max_rows=9).rows) == 9
    with pytest.raises(ConfigError, match=r"trace\.csv:12:"):
        load_trace(path)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, ["is empty", "arrival_s,input_tokens,output_tokens", "Timestamp,Request"]),
        ("time,in,out\n0,1,1\n", 1, ["unknown header 'time,in,out'", "arrival_s"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", 1, ["unknown header"]),
        (HEADER, 1, ["no rows"]),
        (HEADER + "0,1,1\n1,2\n", 3, ["2 columns", "'1,2'", "needs 3"]),
        (HEADER + "0,1,1,9\n", 2, ["4 columns", "needs 3"]),
        (RAW + "0,m,1,1,2\n", 2, ["5 columns", "needs 6"]),
        (HEADER + "soon,1,1\n", 2, ["arrival_s is 'soon'", "seconds"]),
        (HEADER + "1_0,1,1\n", 2, ["arrival_s is '1_0'"]),
        (HEADER + "-1,1,1\n", 2, ["arrival_s is '-1'", "from 0"]),
        (HEADER + "nan,1,1\n", 2, ["arrival_s is 'nan'"]),
        (HEADER + "inf,1,1\n", 2, ["arrival_s is 'inf'"]),
        (RAW + "-inf,m,1,1,2,l\n", 2, ["Timestamp is '-inf'"]),
        (HEADER + "0,many,1\n", 2, ["input_tokens is 'many'", "whole number from 1"]),
        (HEADER + "0,1.5,1\n", 2, ["input_tokens is '1.5'"]),
        (HEADER + "0,1,-4\n", 2, ["output_tokens is '-4'"]),
        (HEADER + "0,1,٣\n", 2, ["output_tokens is '٣'"]),
        (HEADER + "0,1,\n", 2, ["output_tokens is ''"]),
        (HEADER + f"0,1,{'9' * 5000}\n", 2, ["output_tokens is '999"]),
        (HEADER + "0,0,1\n", 2, ["input_tokens is '0'", "take the row out"]),
        (HEADER + "0,1,0\n", 2, ["output_tokens is '0'", "take the row out"]),
        (RAW + "0,m,0,7,7,l\n", 2, ["Request tokens is '0'"]),
        (RAW + "0,m,1,-7,7,l\n", 2, ["Response tokens is '-7'", "from 0"]),
        (HEADER + "0,1,1\n2,1,1\n1.5,1,1\n", 4, ["1.5", "before the 2 ", "sort"]),
        (HEADER.encode() + b"0,\xff1,1\n", 2, ["input_tokens"]),
        (HEADER + '0,"' + "1" * 200_000 + '",1\n', 2, ["not a line of CSV"]),
    ],
)
def test_bad_files_name_the_line_the_value_and_what_to_do(write, text, line, words):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert [word for word in words if word not in message] == []
    assert len(message) < len(str(path)) + 350


def test_columns_are_found_by_name(write):
    path = write(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n7,a,1,m,10,20,30,l\n9,a,1,m,11,0,11,l\n"
    )
    assert load_trace(path) == Trace((TraceRow(0.0, 10, 20),), 1)


def test_azure_rows_have_dates(write):
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.1805900,396,109\n"
    )
    first, second = load_trace(path).rows
    assert (first.input_tokens, first.output_tokens) == (374, 44)
    assert second.arrival_s == pytest.approx(3.5)


def test_mooncake_lines(write):
    path = write(
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
        '\n{"timestamp": 4500.5, "input_length": 7, "output_length": 0, "hash_ids": []}\n'
        '{"timestamp": 6000, "input_length": 8, "output_length": 9}\n'
    )
    trace = load_trace(path)
    assert trace == Trace((TraceRow(0.0, 6758, 500), TraceRow(3.0, 8, 9)), 1)
    assert [row.line for row in trace.rows] == [1, 4]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{oops\n', 2, ["of JSON"]),
        ('{"timestamp": 0}\n', 1, ["input_length is None", "from 1"]),
        ('{"timestamp": "0", "input_length": 1, "output_length": 1}\n', 1, ["milliseconds"]),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}\n', 1, ["timestamp is True"]),
        ('{"timestamp": 0, "input_length": 1.5, "output_length": 1}\n', 1, ["input_length is 1.5"]),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', 1, ["timestamp is nan"]),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[]\n', 2, ["JSON object"]),
        ('{"timestamp": 2, "input_length": 1, "output_length": 1}\n'
         '{"timestamp": 1, "input_length": 1, "output_length": 1}\n', 2, ["before", "sort"]),
    ],
)  # fmt: skip
def test_bad_mooncake_lines(write, text, line, words):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert [word for word in words if word not in str(caught.value)] == []


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv: No such file"):
        load_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="directory"):
        load_trace(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_s": -1}, "start must be"),
        ({"start_s": math.nan}, "start must be"),
        ({"start_s": math.inf}, "start must be"),
        ({"duration_s": 0}, "duration must be"),
        ({"duration_s": math.nan}, "duration must be"),
        ({"time_scale": 0}, "time scale must be"),
        ({"time_scale": math.nan}, "time scale must be"),
        ({"time_scale": math.inf}, "time scale must be"),
        ({"max_rows": 0}, "at least 1 row"),
        ({"start_s": 100}, "up to 9 s"),
        ({"start_s": 2.2, "duration_s": 0.5}, "no request from 2.2 s for 0.5 s"),
    ],
)
def test_options_out_of_range(write, options, words):
    with pytest.raises(ConfigError, match=words):
        load_trace(write(TEN), **options)


@pytest.mark.parametrize(
    ("name", "rows", "failed"),
    [
        ("azure_conv_peak_output_20min.csv", 6225, 0),
        ("azure_conv_peak_requests_20min.csv", 8267, 0),
        ("burstgpt1_chat_20min.csv", 77, 0),
        ("burstgpt1_first400_raw.csv", 383, 17),
        ("burstgpt2_gpt4_894s.csv", 423, 0),
        ("burstgpt2_gpt4_894s_raw.csv", 423, 0),
        ("mooncake_peak_requests_20min.csv", 4470, 0),
    ],
)
def test_public_traces(name, rows, failed):
    trace = load_trace(shared_file(f"data/traces/{name}"))
    assert (len(trace.rows), trace.failed) == (rows, failed)
    assert trace.rows[0].arrival_s == 0
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(trace.rows))


def test_a_raw_window_is_its_normalised_file():
    raw = load_trace(
        shared_file("data/traces/burstgpt1_first400_raw.csv"), start_s=34063, duration_s=1200
    )
    assert raw.rows == load_trace(shared_file("data/traces/burstgpt1_chat_20min.csv")).rows
    assert raw.failed == 2
    assert (
        load_trace(shared_file("data/traces/burstgpt2_gpt4_894s_raw.csv")).rows
        == load_trace(shared_file("data/traces/burstgpt2_gpt4_894s.csv")).rows
    )
