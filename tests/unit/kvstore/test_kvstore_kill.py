"""Store and replicas as processes that are killed in the middle: no block is ever the wrong one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.kvstore_process import SocketControl
from tokenflow.replicas.errors import KVStoreError

SCRIPT = Path(__file__).parents[2] / "support" / "kvstore_process.py"
NUM_SLOTS = 64


class Node:
    """The processes of one node."""

    def __init__(self, directory, num_slots=NUM_SLOTS):
        self.directory = directory
        self.socket = str(directory / "socket")
        self.segments = directory / "segments"
        self.segments.mkdir()
        self.num_slots = num_slots
        self.processes = []
        self.store = self.start_store()

    def _spawn(self, *arguments):
        child = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(child)
        return child

    def start_store(self):
        return self._spawn("store", self.segments, self.socket, self.num_slots)

    def replica(self, seed, rounds=0):
        """One that works until `result`, and for so many rounds."""
        return self._spawn("replica", self.socket, seed, rounds)

    def call(self, method, *arguments):
        """Ask the store; waits for one that is not up yet."""
        deadline = time.monotonic() + 60
        while True:
            try:
                control = SocketControl.__new__(SocketControl)
                control._socket, control._connection = self.socket, None
                return control.call(method, *arguments)
            except KVStoreError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition(self.call("info")):
            assert time.monotonic() < deadline, self.call("info")
            time.sleep(0.01)

    def close(self):
        for child in self.processes:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


def ready(child):
    assert child.stdout.readline() == "ready\n"


def result(child):
    """Let it end, and check what it saw."""
    child.stdin.close()
    report = json.loads(child.stdout.readline())
    assert child.wait(60) == 0
    assert report["wrong"] == 0
    assert report["left"] == 0
    assert not report["lost"]
    return report


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    node.call("info")
    yield node
    node.close()


def test_readers_and_evictions_race_for_thousands_of_rounds(node):
    replicas = [node.replica(seed, rounds=2500) for seed in range(2)]
    for child in replicas:
        ready(child)
    node.until(lambda info: info.evictions > 200)
    reports = [result(child) for child in replicas]
    info = node.call("info")
    assert sum(report["rounds"] for report in reports) >= 5000
    assert sum(report["matched"] for report in reports) > 1000
    assert (info.leased, info.pinned, info.owners) == (0, 0, {})
    assert info.free + info.cached == NUM_SLOTS


def test_replicas_killed_at_any_moment_leave_whole_blocks_and_nothing_else(node):
    """While they lease, fill, commit and pin."""
    rng = random.Random(5)
    survivor = node.replica(99)
    ready(survivor)
    for seed in range(3):
        victim = node.replica(seed)
        ready(victim)
        time.sleep(rng.uniform(0.0, 0.2))
        victim.kill()
        victim.wait()
    report = result(survivor)
    assert report["matched"] > 100
    node.until(lambda info: not info.owners)
    info = node.call("info")
    assert (info.leased, info.pinned) == (0, 0)
    assert info.free + info.cached == NUM_SLOTS


def test_replicas_go_on_when_the_store_is_killed_again_and_again(node):
    replicas = [node.replica(seed) for seed in range(2)]
    for child in replicas:
        ready(child)
    path = node.call("info").path
    for _ in range(3):
        node.store.kill()
        node.store.wait()
        node.store = node.start_store()
        node.until(lambda info: info is not None and info.evictions > 50)  # life goes on
        assert node.call("info").path == path
    for child in replicas:
        assert result(child)["matched"] > 100
    info = node.call("info")
    assert (info.leased, info.pinned, info.owners) == (0, 0, {})
    assert info.free + info.cached == NUM_SLOTS
    assert os.listdir(node.segments) == [os.path.basename(path)]


def test_a_store_killed_together_with_its_replicas_leaves_nothing_for_the_next(node):
    replica = node.replica(1)
    ready(replica)
    old = node.call("info").path
    for child in (replica, node.store):
        child.kill()
        child.wait()
    assert os.path.exists(old)
    node.store = node.start_store()
    assert node.call("info") is None  # nothing to go on with
    replica = node.replica(2)
    ready(replica)
    result(replica)
    assert os.listdir(node.segments) == [os.path.basename(node.call("info").path)] != [old]


def test_a_store_that_hangs_is_killed_and_its_replicas_go_on(node):
    replica = node.replica(1)
    ready(replica)
    path = node.call("info").path
    node.store.send_signal(signal.SIGSTOP)
    assert node.store.wait(60) == -signal.SIGKILL, "the replica ends what does not answer"
    node.store = node.start_store()
    node.until(lambda info: info is not None and info.evictions > 50)
    assert node.call("info").path == path
    assert result(replica)["matched"] > 100
