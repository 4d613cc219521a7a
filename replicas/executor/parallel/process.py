"""The process of another rank, seen from the first one: commands go there, reports come back."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

from tokenflow.replicas.errors import CheckpointError, TokenFlowError
from tokenflow.replicas.executor.base import CopyDone
from tokenflow.replicas.executor.block_copies import Reports
from tokenflow.replicas.executor.parallel import worker
from tokenflow.replicas.executor.parallel.messages import RankSettings


class RankLostError(TokenFlowError):
    """A process of a tensor-parallel model has ended; the engine cannot go on."""


class RankProcess:
    """Started at once. Its copies' reports go to `reports`, by a thread."""

    def __init__(self, rank: int, reports: Reports) -> None:
        self._rank = rank
        self._reports = reports
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, str(other.fileno())],
                pass_fds=[other.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._pipe = Connection(os.dup(self._socket.fileno()))
        self._loaded = threading.Event()
        self._lost = threading.Event()
        self._problem = "its process ended"
        self._thread = threading.Thread(target=self._receive, name=f"rank-{rank}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, settings: RankSettings) -> None:
        """The first message."""
        self._pipe.send(settings)

    def send_bytes(self, command: bytes) -> None:
        """A pickled `Command`. Raises RankLostError when nobody is there to take it."""
        try:
            self._pipe.send_bytes(command)
        except OSError:
            self.raise_if_lost()
            raise

    def wait_until_loaded(self) -> None:
        """Raises CheckpointError with what went wrong there."""
        self._loaded.wait()
        if self._lost.is_set():
            raise CheckpointError(
                f"the model cannot be loaded on rank {self._rank}: {self._problem}"
            )

    def raise_if_lost(self, wait_s: float = 1.0) -> None:
        """Raises RankLostError when the process has ended, or is about to."""
        if self._lost.wait(wait_s):
            raise RankLostError(
                f"rank {self._rank} of the tensor-parallel model failed: {self._problem}"
            )

    def _receive(self) -> None:
        try:
            while True:
                message: CopyDone | str | None = self._pipe.recv()
                if message is None:
                    self._loaded.set()
                elif isinstance(message, str):
                    self._problem = message
                    break
                else:
                    self._reports.put(message)
        except (EOFError, OSError):
            pass
        self._lost.set()
        self._loaded.set()

    def hang_up(self) -> None:
        """Nothing more will be asked of it, so that it ends."""
        with contextlib.suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self, until_s: float) -> None:
        """Wait for its end until then, by time.monotonic; one that waits for other ranks is killed.
        None of its copies is under way any more then."""
        try:
            self._process.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._pipe.close()
        self._socket.close()
