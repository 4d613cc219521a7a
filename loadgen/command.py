"""`tokenflow bench`: run, compare, report, selftest, stub, schema.

Exit codes: 0 all went well; 1 requests failed, a --fail-if held, or a self-test missed; 2 bad
input, an unusable target, or a report that could not be saved; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

from tokenflow.loadgen import compare as comparing
from tokenflow.loadgen.description import Description, Simulated, load_description
from tokenflow.loadgen.folder import RunFolder
from tokenflow.loadgen.page import page
from tokenflow.loadgen.report import Report, command_line, load_report
from tokenflow.loadgen.run_flags import add_run_flags, overrides_from
from tokenflow.loadgen.session import Session
from tokenflow.loadgen.tables import whole
from tokenflow.loadgen.workload import load_workload
from tokenflow.replicas.errors import ConfigError, TokenFlowError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
SCHEMAS: dict[str, type[BaseModel]] = {"run": Description, "report": Report}
_LATE_LIMIT_S = 0.050


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `tokenflow bench`."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_selftest(commands)
    _add_stub(commands)
    schema = commands.add_parser("schema", help="print the JSON schema of a file")
    schema.add_argument("which", choices=SCHEMAS)
    schema.set_defaults(bench=_schema)


def run(args: argparse.Namespace) -> int:
    """Raises TokenFlowError for what the user must change."""
    action: Callable[[argparse.Namespace], int] = args.bench
    return action(args)


# -- run ------------------------------------------------------------------------------------------


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="send a workload to a server and see how its readers fare",
        description="Send a workload to a target. Flags override the file.",
    )
    add_run_flags(parser)
    parser.set_defaults(bench=_run)


def _run(args: argparse.Namespace, console: Console | None = None) -> int:
    console = console or Console(highlight=False)
    description = load_description(args.file, overrides_from(args))
    conditions = comparing.parse_conditions(args.fail_if) if args.fail_if else []
    workload = load_workload(args.workload) if args.workload else None
    folder = None
    if not args.no_save:
        when = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = RunFolder(args.out or Path("bench-runs") / f"{description.name}-{when}")
    session = Session(
        description,
        workload=workload,
        folder=folder,
        console=None if args.quiet else console,
    )
    interrupted = False
    try:
        if isinstance(description.target, Simulated):
            session.simulate()
        else:
            asyncio.run(_until_terminated(session))
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted = True
        if not session.repeats:
            raise KeyboardInterrupt from None
    report = session.report(complete=not interrupted, command=command_line())
    console.print(whole(report))
    met = [] if interrupted else comparing.failures(conditions, report)
    for text in met:
        console.print(f"Failed: {text}.", style="bold red", markup=False)
    if folder is not None:
        folder.finish(report, page([report]))
        folder.check()
        path = folder.path / "report.html"
        console.print(f"Saved in {folder.path}; open {path}", markup=False, soft_wrap=True)
    if interrupted:
        return EXIT_INTERRUPTED
    failed = any(row.error is not None for repeat in report.repeats for row in repeat.requests)
    return EXIT_FAILED if met or failed else 0


async def _until_terminated(session: Session) -> None:
    """Run it. SIGTERM cancels it, as asyncio's own handler of SIGINT does: an exception from a
    handler could come up anywhere, and what is not this task might keep it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(RuntimeError, ValueError):  # only a main thread may have handlers
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await session.run()
    finally:
        if loop.remove_signal_handler(signal.SIGTERM):
            signal.signal(signal.SIGTERM, before)


# -- compare and report ---------------------------------------------------------------------------


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="what changed from one run to another, and whether it is noise",
        description="Compare two saved runs, folders or report.json files.",
    )
    parser.add_argument("before", metavar="A")
    parser.add_argument("after", metavar="B")
    parser.add_argument("--html", metavar="FILE", help="also write a page with both")
    parser.add_argument(
        "--fail-if", metavar="CONDITIONS",
        help="exit with 1 when one holds for B: ttft_p99_s>+10%%,raw_tok_s<-5%%,failed>0",
    )  # fmt: skip
    parser.set_defaults(bench=_compare)


def _compare(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    conditions = comparing.parse_conditions(args.fail_if) if args.fail_if else []
    before, after = load_report(args.before), load_report(args.after)
    changes = comparing.compare(before, after)
    console.print(comparing.table(before, after, changes))
    met = comparing.failures(conditions, after, changes)
    for text in met:
        console.print(f"Failed: {text}.", style="bold red", markup=False)
    if args.html:
        _write(args.html, page([before, after]))
    return EXIT_FAILED if met else 0


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="print saved runs again, and make a page of them")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders or report.json files")
    parser.add_argument("--html", metavar="FILE", help="write a page with all of them")
    parser.set_defaults(bench=_report)


def _report(args: argparse.Namespace) -> int:
    reports = [load_report(path) for path in args.runs]
    console = Console(highlight=False)
    for report in reports:
        console.print(whole(report))
    if args.html:
        _write(args.html, page(reports))
    return 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}.") from None


# -- selftest, stub, schema -----------------------------------------------------------------------


def _add_selftest(commands: Any) -> None:
    parser = commands.add_parser(
        "selftest",
        help="measure a server with known timings, and see whether they come back",
        description="Hand cases on a virtual clock, which must come back exactly; then streams in "
        "real time, whose delays are this machine's.",
    )
    parser.add_argument("--streams", type=int, default=200, metavar="N", help="at once (200)")
    parser.add_argument("--ramp", type=float, default=2.0, metavar="S", help="they begin in (2)")
    parser.add_argument("--overlap", type=float, default=5.0, metavar="S", help="all run for (5)")
    parser.add_argument("--exact-only", action="store_true", help="only the virtual clock")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.set_defaults(bench=_selftest)


def _selftest(args: argparse.Namespace) -> int:
    from tokenflow.loadgen.selftest import EXACT, Load, check_exactly, measure

    if args.streams < 1 or args.ramp < 0 or not 0.5 <= args.overlap <= 3600:
        raise ConfigError("--streams must be at least 1, --ramp 0 s, --overlap 0.5 s.")
    console = Console(highlight=False)
    checks = check_exactly()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("on a virtual clock", "figure", "by hand", "measured", ""):
        table.add_column(heading, justify="right" if heading in ("by hand", "measured") else "left")
    before = ""
    for check in checks:
        shown = "none" if check.measured is None else f"{check.measured:.6f}"
        verdict = "[green]exact[/green]" if check.ok else "[bold red]WRONG[/bold red]"
        name = check.case if check.case != before else ""
        table.add_row(name, check.figure, f"{check.expected:.6f}", shown, verdict)
        before = check.case
    console.print(table)
    wrong = sum(not check.ok for check in checks)
    console.print(
        f"{len(checks) - wrong} of {len(checks)} figures exact (within {EXACT:g})."
        if not wrong
        else f"{wrong} of {len(checks)} figures are WRONG."
    )
    result: dict[str, Any] = {
        "command": command_line(),
        "machine": {"platform": platform.platform(), "cpus": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "exact": {"figures": len(checks), "wrong": wrong},
    }
    good = not wrong
    if not args.exact_only:
        load = Load(streams=args.streams, ramp_s=args.ramp, overlap_s=args.overlap)
        real = measure(load)
        result["real_time"] = real.to_dict()
        late = real.late_p99_s > _LATE_LIMIT_S
        good = good and not late and not real.failed and not real.tokens_missing
        console.print(
            f"\nIn real time, {real.most_at_once} streams at once, {real.messages_per_s:.0f} "
            f"messages/s, {real.cpu_share:.0%} of a core: sent late by P50 "
            f"{real.late_p50_s * 1e3:.1f} ms, P99 {real.late_p99_s * 1e3:.1f} ms; a message's time "
            f"stamp is P50 {real.delivery_p50_s * 1e3:.1f} ms, P99 {real.delivery_p99_s * 1e3:.1f} "
            f"ms after it was written; {real.failed} failed, {real.tokens_missing} tokens missing."
        )
        if late:
            console.print(
                f"The generator was more than {_LATE_LIMIT_S * 1e3:.0f} ms late at P99: this "
                "machine is too busy or too small for so many streams.", style="bold red",
            )  # fmt: skip
    if args.json:
        _write(args.json, json.dumps(result, indent=1) + "\n")
    return 0 if good else EXIT_FAILED


def _add_stub(commands: Any) -> None:
    parser = commands.add_parser(
        "stub",
        help="serve known timings, to try load generators on",
        description="An OpenAI-compatible server that generates nothing, at a known pace.",
    )
    parser.add_argument("--port", type=int, default=8100, metavar="P")
    parser.add_argument("--ttft", type=float, default=0.05, metavar="S", help="(0.05)")
    parser.add_argument("--per-token", type=float, default=0.01, metavar="S", help="(0.01)")
    parser.add_argument("--each", type=int, default=1, metavar="N", help="tokens a message (1)")
    parser.add_argument("--slots", type=int, metavar="N", help="answers at a time (any number)")
    parser.set_defaults(bench=_stub)


def _stub(args: argparse.Namespace) -> int:
    from tokenflow.loadgen.stub import MODEL, StubServer, paced

    if args.ttft < 0 or args.per_token < 0 or args.each < 1 or (args.slots or 1) < 1:
        raise ConfigError("times must be 0 s or more, --each and --slots 1 or more.")

    async def serve() -> None:
        server = StubServer(
            lambda body: paced(args.ttft, args.per_token, _tokens(body), each=args.each),
            slots=args.slots,
            keep=False,
        )
        try:
            async with server.running(args.port) as url:
                print(f"Serving model {MODEL!r} at {url}; Ctrl-C stops it.", flush=True)
                await asyncio.Event().wait()
        except OSError as error:
            raise TokenFlowError(f"cannot listen on port {args.port}: {error.strerror}.") from None

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    return 0


def _tokens(body: dict[str, Any]) -> int:
    for key in ("max_completion_tokens", "max_tokens"):
        if isinstance(body.get(key), int) and body[key] > 0:
            return int(body[key])
    return 16


def _schema(args: argparse.Namespace) -> int:
    print(schema_text(args.which), end="")
    return 0


def schema_text(which: str) -> str:
    """The published schema, as it is also kept in `schemas/`."""
    schema = SCHEMAS[which].model_json_schema()
    return (
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1)
        + "\n"
    )
