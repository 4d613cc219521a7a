"""The engine on its own thread: a thread-safe door for requests, and events in per-step batches.

Nothing blocks the loop: callers put commands into an inbox, and each step's events go to one
callback that must only hand them over (for example `loop.call_soon_threadsafe`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tokenflow.replicas.engine import Engine, check_rate
from tokenflow.replicas.errors import EngineDeadError, InvalidRequestError
from tokenflow.replicas.load import LoadReport
from tokenflow.replicas.output import TokenEvent
from tokenflow.replicas.overload import OverloadReport
from tokenflow.replicas.request import ReaderChange, Request
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.stats import EngineStats

logger = logging.getLogger("tokenflow.engine")

_TRANSFER_WAIT_S = 0.005
"""Longest nap while only copies are under way; a new request is seen at latest after it."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Change:
    request_id: str
    change: ReaderChange


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineLoop:
    """Runs an engine. `emit` is called on the engine thread with the events of each step.

    `on_death` is called once, on the engine thread, when a step raises: the engine's state is then
    unknown, every request it held must be resubmitted elsewhere.
    """

    def __init__(
        self,
        engine: Engine,
        emit: Callable[[list[TokenEvent]], None],
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._engine = engine
        self._emit = emit
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[_Add | _Cancel | _Change | _Stop] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._step_since: float | None = None
        self._thread = threading.Thread(target=self._main, name="tokenflow-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def keys(self, request: Request) -> list[bytes]:
        """Keys of all blocks that its known tokens fill (`Engine.known_keys`)."""
        return self._engine.known_keys(request)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError or CapacityError at once when it cannot be
        served, EngineDeadError when the loop has stopped."""
        self.raise_if_dead()
        self._engine.check(request)
        self._inbox.put(_Add(request, self.keys(request)))

    def cancel(self, request_id: str) -> None:
        """End a request early; unknown ids are ignored (it may have just finished)."""
        self._inbox.put(_Cancel(request_id))

    def change_reader(self, request_id: str, change: ReaderChange) -> None:
        """Change a request's rate, pause or place; unknown ids are ignored. Raises
        InvalidRequestError at once for a rate that is none."""
        if change.token_rate is not None:
            check_rate(change.token_rate)
        self._inbox.put(_Change(request_id, change))

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop after the current step and close the executor."""
        self._inbox.put(_Stop())
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def raise_if_dead(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"The engine has failed: {self._error}") from self._error
        if not self._thread.is_alive():
            raise EngineDeadError("The engine has stopped.")

    @property
    def stats(self) -> EngineStats:
        """Live counters; read without a lock, so figures of one step may be half updated."""
        return self._engine.stats

    @property
    def step_age_s(self) -> float:
        """Seconds since the present step began; 0 between steps."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def overload(self) -> OverloadReport:
        """The latest report for who moves requests between replicas."""
        return self._engine.overload

    @property
    def cost(self) -> CostModel:
        """What the engine has learned; only to be read."""
        return self._engine.cost

    @property
    def load(self) -> LoadReport:
        """The latest report for routers."""
        return self._engine.load

    def _main(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._error = error
            logger.exception("the engine loop died")
            if self._on_death is not None:
                self._on_death(error)
        finally:
            self._engine.executor.close()

    def _run(self) -> None:
        engine = self._engine
        while True:
            self._step_since = None
            if not self._drain_inbox(block=not engine.has_work):
                return
            self._step_since = time.monotonic()
            # Without work there is still news to count: what was cancelled is free now.
            ran = engine.step() if engine.has_work else engine.refresh_stats()
            events = engine.take_events()
            if events:
                self._emit(events)
            if not ran and engine.has_work:
                engine.wait_for_transfers(_TRANSFER_WAIT_S)

    def _drain_inbox(self, block: bool) -> bool:
        """Apply waiting commands; with `block`, wait for the first. False = stop."""
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            match command:
                case _Add(request, keys):
                    try:
                        self._engine.add(request, keys)
                    except InvalidRequestError as error:
                        self._emit([_refused(request, error)])
                case _Cancel(request_id):
                    self._engine.cancel(request_id)
                case _Change(request_id, change):
                    try:
                        self._engine.change_reader(request_id, change)
                    except InvalidRequestError as error:
                        logger.warning("request %s: %s", request_id, error)
                case _Stop():
                    return False


def _refused(request: Request, error: InvalidRequestError) -> TokenEvent:
    return TokenEvent(request.request_id, 0, -1, "", time.time(), None, "error", error.message)
