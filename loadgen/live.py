"""A run as it is watched: what goes on, reader by reader, at a cost that does not disturb it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tokenflow.loadgen.metrics import LEFT, StreamRecord, percentile
from tokenflow.loadgen.runner import Run
from tokenflow.loadgen.targets.base import Clock
from tokenflow.replicas.scheduler.playback import Playback

REFRESH_S = 0.5
_LOG_LINE_S = 2.0
_CELLS_PER_LINE = 32
_MOST_CELLS = 256
_SPEED_WINDOW_S = 5.0
_BAR_WIDTH = 32

LEGEND = (
    "[dim]·[/dim] waits  [red]![/red] has run dry  [red]x[/red] failed  [yellow]-[/yellow] left  "
    "[green]▁▂▃▄▅▆▇█[/green] text ahead  [blue]■[/blue] all delivered"
)


@dataclass(slots=True)
class Reader:
    """What is shown of one request: a running tally, so that a look costs only what is new."""

    record: StreamRecord
    tokens: int = 0
    playback: Playback | None = None
    seen: int = 0

    def look(self, now: float) -> str:
        """ "waiting", "dry", "reading", "streaming" (nobody reads), "done", "left" or "failed"."""
        record = self.record
        while self.seen < len(record.arrivals):
            at, count = record.arrivals[self.seen]
            if record.reads:
                self.playback = self.playback or Playback(record.token_rate)
                self.playback.generate(record.reading_time(at), count)
            self.tokens += count
            self.seen += 1
        if record.error is not None:
            return "failed"
        if record.finish_reason == LEFT:
            return "left"
        if record.finished_s is not None:
            return "done"
        if not self.tokens:
            return "waiting"
        if self.playback is None:
            return "streaming"
        return "dry" if self.playback.slack_s(record.reading_time(now)) < 0 else "reading"

    def cell(self, now: float, full: int) -> tuple[str, str]:
        """(character, style); a buffer of `full` tokens fills the cell."""
        match self.look(now):
            case "failed":
                return "x", "bold red"
            case "left":
                return "-", "yellow"
            case "waiting":
                return "·", "dim"
            case "done":
                return "■", "blue"
            case "dry":
                return "!", "bold red"
        ahead = self.tokens
        if self.playback is not None:
            ahead = self.playback.buffer(self.record.reading_time(now))
        levels = "▁▂▃▄▅▆▇█"
        return levels[min(len(levels) - 1, ahead * len(levels) // max(1, full))], "green"


@dataclass(slots=True)
class Watcher:
    """The readers of one run."""

    title: str
    total: int
    full_tokens: int
    """What fills a reader's cell: the longest output."""
    readers: list[Reader] = field(default_factory=list)
    _speed: list[tuple[float, int]] = field(default_factory=list)

    def look(self, records: Seq[StreamRecord]) -> None:
        """Take notice of what has been sent since."""
        self.readers += [Reader(record) for record in records[len(self.readers) :]]

    def status(self, now: float, begun: float) -> str:
        """The run so far in one line."""
        states = self._states(now)
        tokens = sum(reader.tokens for reader in self.readers)
        started = sum(reader.tokens > 0 for reader in self.readers)
        ended = states["done"] + states["left"]
        return (
            f"{self.title}  {max(0.0, now - begun):5.1f} s  first token {started}/{self.total}  "
            f"done {ended}  dry now {states['dry']}  {tokens} tokens"
            + (f"  FAILED {states['failed']}" if states["failed"] else "")
        )

    def view(self, now: float, begun: float) -> RenderableType:
        """What a terminal shows."""
        states = self._states(now)
        tokens = sum(reader.tokens for reader in self.readers)
        ended = states["done"] + states["failed"] + states["left"]
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total, completed=ended, width=_BAR_WIDTH),
            f"{ended}/{self.total}",
            f"{max(0.0, now - begun):.1f} s",
        )
        counts = Text.assemble(
            f"sent {len(self.readers)}  waiting {states['waiting']}  "
            f"streaming {states['reading'] + states['streaming'] + states['dry']}  ",
            (f"dry now {states['dry']}", "bold red" if states["dry"] else ""),
            "  ",
            (f"failed {states['failed']}", "bold red" if states["failed"] else ""),
        )
        parts: list[RenderableType] = [head, counts]
        records = [reader.record for reader in self.readers]
        waits = [(r.first_token_s or now) - r.intended_s for r in records]
        lags = [r.sent_s - r.intended_s for r in records if r.sent_s is not None]
        if waits:
            late = percentile(lags, 99) * 1e3 if lags else 0.0
            parts.append(
                f"TTFT so far p50 {percentile(waits, 50):.2f} s, "
                f"p99 {percentile(waits, 99):.2f} s  "
                f"{self._tokens_per_s(now, tokens):.0f} tokens/s  generator late {late:.1f} ms"
            )
        parts.append(self._grid(now))
        parts.append(Text.from_markup(LEGEND))
        return Group(*parts)

    def _states(self, now: float) -> Counter[str]:
        return Counter(reader.look(now) for reader in self.readers)

    def _grid(self, now: float) -> Text:
        """A cell per reader; of too many, the newest."""
        grid = Text()
        for i, reader in enumerate(self.readers[-_MOST_CELLS:]):
            if i and i % _CELLS_PER_LINE == 0:
                grid.append("\n")
            grid.append(*reader.cell(now, self.full_tokens))
        return grid

    def _tokens_per_s(self, now: float, tokens: int) -> float:
        self._speed.append((now, tokens))
        while len(self._speed) > 2 and self._speed[1][0] < now - _SPEED_WINDOW_S:
            self._speed.pop(0)
        at, before = self._speed[0]
        return (tokens - before) / (now - at) if now > at else 0.0


async def watch(
    run: Run,
    running: asyncio.Task[list[StreamRecord]],
    watcher: Watcher,
    console: Console,
    clock: Clock,
) -> None:
    """Show the run until it is over: live on a terminal, a line now and then elsewhere."""

    def begun() -> float:
        return run.begun_s if run.begun_s is not None else clock()

    if not console.is_terminal:
        next_line = -math.inf
        while not running.done():
            watcher.look(run.records)
            elapsed = clock() - begun()
            if elapsed >= next_line:
                console.print(watcher.status(clock(), begun()), markup=False)
                next_line = elapsed + _LOG_LINE_S
            await asyncio.wait({running}, timeout=REFRESH_S)
        return
    with Live(console=console, auto_refresh=False) as live:
        done = False
        while not done:
            done = running.done()
            watcher.look(run.records)
            live.update(watcher.view(clock(), begun()), refresh=True)
            await asyncio.wait({running}, timeout=REFRESH_S)
