"""The demo against servers that only play a model: what it shows, counts and writes down."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from tokenflow.cluster import demo
from tokenflow.cluster.demo import DemoOptions, Result, comparison, read_metrics, run_demo
from tokenflow.cluster.demo_server import DemoServer
from tokenflow.cluster.metrics import render
from tokenflow.loadgen.metrics import StreamRecord, Summary, summarize
from tokenflow.replicas.errors import TokenFlowError
from tokenflow.replicas.stats import EngineStats

OPTIONS = DemoOptions(
    requests=3, max_tokens=4, rate=10.0, kv_tokens=4096, seed=1, json_path=None, timeout_s=20.0
)


class Handler(BaseHTTPRequestHandler):
    """A chat stream of `max_tokens` tokens in two messages, and the metrics of two replicas."""

    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refusal = self.server.refuse(body)
        self.send_response(429 if refusal else 200)
        self.end_headers()
        if refusal:
            self.wfile.write(refusal.encode())
            return
        self.server.count({**body, "rate": self.headers["X-Token-Rate"]})
        count = body["max_tokens"]
        for text, tokens, reason in (("[b]Once[/b]", 1, None), (" upon", count, "length")):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
            usage = {"prompt_tokens": 1, "completion_tokens": tokens}
            data = json.dumps({"choices": [choice], "usage": usage})
            self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self) -> None:
        assert self.path == "/metrics"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.metrics())

    def log_message(self, *_: object) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, policy: str, refuse: Callable[[dict], str | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse = refuse
        self.bodies: list[dict] = []
        self._policy = policy
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, body: dict) -> None:
        with self._lock:
            self.bodies.append(body)

    def metrics(self) -> bytes:
        """Per request: 5 effective tokens and, under tokenflow, 2 preemptions and 1 resume; half of
        it counted by each of two replicas."""
        served = len(self.bodies)
        moved = served if self._policy == "slack" else 0
        stats = EngineStats(
            effective_tokens=2.5 * served,
            preempted_offload=moved,
            resumes=moved // 2,
            recomputed_tokens=7 * moved,
        )
        odd = replace(stats, resumes=moved - moved // 2)
        pair = [stats.to_dict() | {"replica_id": "a"}, odd.to_dict() | {"replica_id": "b"}]
        return render(pair, ingress="i", streams=0, failovers=0, moves=0, own=CollectorRegistry())


class Servers:
    """The factory that `run_demo` gets; `made` are the servers in order of use."""

    def __init__(self, refuse: Callable[[dict], str | None] = lambda body: None) -> None:
        self.made: list[tuple[str, FakeServer]] = []
        self.closed = 0
        self._refuse = refuse

    @contextmanager
    def __call__(self, policy: str) -> Iterator[DemoServer]:
        server = FakeServer(policy, self._refuse)
        self.made.append((policy, server))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield DemoServer(server.url, "m")
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            self.closed += 1


def shown(*things: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of a table, by the row's name."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    split = [[part.strip() for part in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {name: cells for name, *cells in split}


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A demo that went well: (what it printed, its report, its servers)."""
    path = tmp_path_factory.mktemp("demo") / "out.json"
    servers = Servers()
    console = Console(file=io.StringIO(), width=100)
    run_demo(servers, replace(OPTIONS, json_path=str(path)), console)
    return console.file.getvalue(), json.loads(path.read_text()), servers


def test_both_policies_get_the_same_burst_after_a_warm_up(run):
    _, _, servers = run
    assert [policy for policy, _ in servers.made] == ["fcfs", "slack"]
    assert servers.closed == 2
    bursts = []
    for _, server in servers.made:
        warm_up = [body for body in server.bodies if body["max_tokens"] == 16]
        burst = [body for body in server.bodies if body["max_tokens"] == 4]
        assert (len(warm_up), len(burst)) == (8, 3)
        assert {body["rate"] for body in burst} == {"10"}
        bursts.append(sorted(burst, key=lambda body: body["seed"]))
    assert bursts[0] == bursts[1]


def test_the_table_shows_both_policies_side_by_side(run):
    text, report, _ = run
    table = rows(text)
    assert table[""] == ["fcfs", "slack", "ratio"]
    assert table["preemptions"] == ["0", "6", ""]
    assert table["resumed from host memory"] == ["0", "3", ""]
    assert table["tokens computed again"] == ["0", "42", ""]
    results = report["results"]
    for name, value in (
        ("raw throughput, tok/s", lambda r: r["summary"]["raw_tok_s"]),
        ("effective throughput, tok/s", lambda r: r["generated_effective_tok_s"]),
    ):
        first, second = value(results["fcfs"]), value(results["slack"])
        assert table[name] == [f"{first:.0f}", f"{second:.0f}", f"{second / first:.2f}"]
    assert "The same burst, side by side" in text
    assert "A burst of 3 readers at 10 tokens/s, 4 tokens each" in text


def test_one_readers_text_is_printed_as_it_is(run):
    text, _, servers = run
    assert "[b]Once[/b] upon" in text
    messages = {body["messages"][0]["content"] for body in servers.made[0][1].bodies}
    assert any(f"One reader's text ({message}):" in text for message in messages)


def test_the_report_has_options_machine_and_figures(run):
    _, report, _ = run
    assert set(report) == {"options", "machine", "versions", "results"}
    assert report["options"]["requests"] == 3 and report["options"]["seed"] == 1
    assert set(report["machine"]) == {"platform", "cpus"}
    assert {"python", "ray", "torch", "transformers"} < set(report["versions"])
    assert list(report["results"]) == ["fcfs", "slack"]
    for policy, result in report["results"].items():
        summary = result["summary"]
        assert result["policy"] == policy
        assert (summary["requests"], summary["failed"], summary["tokens"]) == (3, 0, 12)
        assert set(summary) == set(Summary.__slots__)
        assert result["generated_effective_tok_s"] == pytest.approx(15 / summary["duration_s"])
        assert result["sample"] == "[b]Once[/b] upon"
    assert report["results"]["slack"]["preemptions"] == 6


def test_progress_is_logged_where_there_is_no_terminal(run):
    text, _, _ = run
    for policy in ("fcfs", "slack"):
        assert f"{policy}: starting the server..." in text
        assert f"{policy}    0.0 s  first token " in text
    assert "\x1b" not in text


def test_a_terminal_sees_every_reader(monkeypatch):
    monkeypatch.setattr(demo, "POLICIES", ("slack",))
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    run_demo(Servers(), OPTIONS, console)
    text = console.file.getvalue()
    assert "3/3" in text and "sent 3  waiting 0" in text
    assert "■■■" in text
    assert rows(text)[""] == ["slack"]


def test_a_failed_request_ends_the_demo():
    def refuse(body: dict) -> str | None:
        return "the queue is full" if body["max_tokens"] == 4 else None

    servers = Servers(refuse)
    with pytest.raises(TokenFlowError) as caught:
        run_demo(servers, OPTIONS, Console(file=io.StringIO()))
    assert str(caught.value) == "3 of 3 requests failed: HTTP 429: the queue is full"
    assert (len(servers.made), servers.closed) == (1, 1)


def test_a_report_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "POLICIES", ("slack",))
    options = replace(OPTIONS, json_path=str(tmp_path / "nowhere" / "out.json"))
    with pytest.raises(TokenFlowError):
        run_demo(Servers(), options, Console(file=io.StringIO()))


async def test_metrics_are_summed_over_their_labels():
    with Servers()("slack") as server:
        found = await read_metrics(server.url)
    assert found["tokenflow_preemptions_total"] == 0
    assert found["tokenflow_time_to_first_token_seconds_count"] == 0
    servers = Servers()
    with servers("slack") as server:
        servers.made[0][1].bodies += [{}] * 5
        found = await read_metrics(server.url)
    assert found["tokenflow_effective_tokens_total"] == 25
    assert found["tokenflow_preemptions_total"] == 10
    assert found["tokenflow_resumes_total"] == 5


# -- the table ------------------------------------------------------------------------------------


def result(policy: str, ttft_s: float, effective: float) -> Result:
    record = StreamRecord(10.0, 0.0, 0.0, [(ttft_s, 50), (ttft_s + 10, 50)], ttft_s + 10, "length")
    return Result(policy, summarize([record]), effective, 3, 2, 1, "text")


def test_ratios_are_the_second_over_the_first():
    table = rows(shown(comparison([result("fcfs", 8, 50), result("slack", 2, 75)])))
    assert table["TTFT mean, s"] == ["8.00", "2.00", "0.25"]
    assert table["TTFT P99, s"] == ["8.00", "2.00", "0.25"]
    assert table["effective throughput, tok/s"] == ["50", "75", "1.50"]
    assert table["readers that ran dry"] == ["1", "1", ""]
    assert table["seconds dry, all readers"] == ["5.0", "5.0", ""]
    assert table["duration, s"] == ["18.0", "12.0", ""]
    assert (table["preemptions"], table["tokens computed again"]) == (
        ["3", "3", ""],
        ["1", "1", ""],
    )


def test_a_ratio_to_nothing_is_left_out():
    table = rows(shown(comparison([result("fcfs", 0, 0), result("slack", 2, 75)])))
    assert table["TTFT mean, s"] == ["0.00", "2.00", ""]
    assert table["effective throughput, tok/s"] == ["0", "75", ""]
    assert not math.isnan(float(table["duration, s"][0]))
