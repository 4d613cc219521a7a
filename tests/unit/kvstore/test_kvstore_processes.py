"""Segments between real processes: shared bytes, SIGKILL at every party, races with the reaper."""

import os
import select
import signal
import subprocess
import sys

import pytest

from tokenflow.kvstore import process
from tokenflow.kvstore.segment import Segment, reap_orphans

CHILD = """
import sys
import numpy as np
from tokenflow.kvstore.segment import Segment

directory = sys.argv[1]
segment = None

def slot(i):
    offset = segment.header.data_offset + i * segment.header.slot_bytes
    return np.frombuffer(segment._open_mapping(), np.uint8, segment.header.slot_bytes, offset)

for line in sys.stdin:
    command, *args = line.split()
    if command == "create":
        segment = Segment.create(args[0], slot_bytes=64, num_slots=8, epoch=1, directory=directory)
        answer = segment.path
    elif command == "attach":
        segment = Segment.attach(args[0])
        answer = "ok"
    elif command == "write":
        slot(int(args[0]))[:] = int(args[1])
        answer = "ok"
    elif command == "read":
        answer = str(np.unique(slot(int(args[0]))).tolist())
    elif command == "churn":
        for i in range(int(args[0])):
            made = Segment.create("churn", slot_bytes=8, num_slots=1, epoch=i, directory=directory)
            Segment.attach(made.path).close()
            made.unlink()
            made.close()
        answer = "ok"
    print(answer, flush=True)
"""


class Child:
    """A process that does to a segment what it is told, one line at a time."""

    def __init__(self, directory):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self):
        answer = self.process.stdout.readline().strip()
        assert answer, "the child process ended"
        return answer

    def do(self, *words):
        self.tell(*words)
        return self.hear()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path)


@pytest.fixture
def spawn(directory):
    children = []

    def spawn():
        children.append(Child(directory))
        return children[-1]

    yield spawn
    for child in children:
        child.kill()
        child.process.stdin.close()
        child.process.stdout.close()


def test_bytes_written_by_one_process_are_read_by_the_other(spawn):
    store, replica = spawn(), spawn()
    path = store.do("create", "a")
    replica.do("attach", path)
    replica.do("write", 5, 17)
    assert store.do("read", 5) == "[17]"
    store.do("write", 5, 18)
    assert replica.do("read", 5) == "[18]"
    assert replica.do("read", 4) == "[0]"


def test_a_killed_owner_leaves_an_orphan_which_is_reaped(spawn, directory):
    store = spawn()
    path = store.do("create", "a")
    assert reap_orphans(directory) == []
    store.kill()
    assert os.path.exists(path)
    assert reap_orphans(directory) == [path]
    assert os.listdir(directory) == []


def test_a_segment_stays_while_a_replica_of_the_killed_owner_maps_it(spawn, directory):
    store, replica = spawn(), spawn()
    path = store.do("create", "a")
    replica.do("attach", path)
    replica.do("write", 1, 3)
    store.kill()
    assert reap_orphans(directory) == []
    late = Segment.attach(path)
    assert late.tensor()[1].eq(3).all()
    late.close()
    replica.kill()
    assert reap_orphans(directory) == [path]


def test_a_killed_replica_takes_nothing_with_it(spawn, directory):
    store, replica, other = spawn(), spawn(), spawn()
    path = store.do("create", "a")
    replica.do("attach", path)
    replica.do("write", 2, 99)
    replica.kill()
    assert reap_orphans(directory) == []
    assert store.do("read", 2) == "[99]"
    other.do("attach", path)
    assert other.do("read", 2) == "[99]"


def test_reapers_never_take_a_segment_that_is_being_made(spawn, directory):
    """The gap between making the file and locking it: creation must win or start over."""
    creator = spawn()
    creator.do("churn", 1)  # started up
    creator.tell("churn", 1500)
    output = creator.process.stdout
    while not select.select([output], [], [], 0)[0]:
        reap_orphans(directory)
    assert creator.hear() == "ok"  # its process would have ended at the first lost segment


def test_a_zombie_and_a_reused_pid_count_as_dead():
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = process.start_ticks(sleeper.pid)
        assert started is not None
        assert process.is_alive(sleeper.pid, started)
        assert not process.is_alive(sleeper.pid, started + 1)
        sleeper.send_signal(signal.SIGSTOP)
        assert process.is_alive(sleeper.pid, started)
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
        assert os.path.exists(f"/proc/{sleeper.pid}")
        assert not process.is_alive(sleeper.pid, started)
    finally:
        sleeper.kill()
        sleeper.communicate()
    assert process.start_ticks(sleeper.pid) is None


def test_a_process_whose_first_thread_has_ended_is_alive():
    """Its memory is still mapped, so its slots must not be given away."""
    code = """
import ctypes, sys, threading
def stay():
    while open("/proc/self/stat").read().rsplit(")", 1)[1].split()[0] != "Z":
        pass
    print("zombie leader", flush=True)
    sys.stdin.buffer.raw.read()
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)  # exit(2) of this thread only
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the exit system call is written for x86_64")
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline().strip() == "zombie leader"
        assert process.start_ticks(child.pid) is not None
    finally:
        child.kill()
        child.communicate()
    assert process.start_ticks(child.pid) is None
