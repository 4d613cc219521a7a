"""Which replica a request goes to, and what it counts there."""

from __future__ import annotations

import itertools
import math

from tokenflow.cluster.replica_registry import ReplicaRegistry
from tokenflow.cluster.routing import Load, rank

NUMBERS = itertools.count()


def place(registry: ReplicaRegistry, rates: list[float]) -> dict[str, list[float]]:
    names = "ab"
    placed: dict[str, list[float]] = {name: [] for name in names}
    for rate in rates:
        placed[registry.assign(f"request {next(NUMBERS)}", rate, names)[0]].append(rate)
    return placed


def test_the_least_declared_rate_comes_first():
    loads = {"a": Load(1, 30.0), "b": Load(5, 20.0), "c": Load(4, 20.0)}
    assert rank("abc", loads, 10.0) == ["c", "b", "a"]
    assert rank("dab", loads, 10.0) == ["d", "b", "a"]


def test_without_a_reader_the_fewest_streams_come_first():
    loads = {"a": Load(1, 30.0), "b": Load(5, 5.0), "c": Load(1, 1.0)}
    assert rank("abc", loads, math.inf) == ["c", "a", "b"]


def test_the_load_stays_a_number_when_those_without_a_reader_come_and_go():
    registry = ReplicaRegistry()
    for name, rate in (("x", math.inf), ("y", 20.0), ("z", math.inf)):
        registry.assign(name, rate, "a")
    assert registry._loads["a"] == Load(3, 22.0)
    registry.finish("x")
    registry.assign("z", 5.0, "a")  # a new attempt replaces the old one
    assert registry._loads["a"] == Load(2, 25.0)
    registry.finish("z")
    assert registry._loads["a"] == Load(1, 20.0)
    registry.finish("y")
    registry.finish("y")
    assert not registry._loads


def test_bursts_of_both_kinds_spread():
    registry = ReplicaRegistry()
    readers = place(registry, [20.0] * 6)
    assert {len(rates) for rates in readers.values()} == {3}
    others = place(registry, [math.inf] * 6)
    assert {len(rates) for rates in others.values()} == {3}


def test_one_reader_does_not_drive_all_others_to_one_replica():
    assert len(place(ReplicaRegistry(), [20.0, *[math.inf] * 9])["a"]) == 5


def test_readers_spread_whatever_the_others_do():
    registry = ReplicaRegistry()
    registry.assign("agent", math.inf, "a")
    registry.assign("another", math.inf, "a")
    assert {len(rates) for rates in place(registry, [20.0] * 6).values()} == {3}
