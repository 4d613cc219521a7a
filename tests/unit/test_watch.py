"""Who has to be left, and when."""

from tokenflow.cluster.watch import Losses, ReplicaWatch

NOTHING = Losses()


def watching(*names: str, silence_s: float = 3.0) -> ReplicaWatch:
    watch = ReplicaWatch(silence_s)
    for name in names:
        assert not watch.heard(name, 0.0)
    assert watch.look(names, 0.0) == NOTHING
    return watch


def test_a_silent_replica_is_told_once_until_it_has_spoken_again():
    watch = watching("a", "b")
    for now in (1.0, 2.0, 3.0):
        watch.heard("b", now)
        assert watch.look("ab", now) == NOTHING
    assert watch.look("ab", 3.1) == Losses(silent=("a",))
    assert watch.look("ab", 4.0) == NOTHING
    assert watch.heard("a", 4.1)
    assert not watch.heard("a", 4.2)
    assert watch.look("ab", 5.0) == NOTHING


def test_who_was_held_up_itself_blames_nobody():
    watch = watching("a")
    assert watch.look("a", 100.0) == NOTHING
    assert watch.look("a", 101.0) == NOTHING
    assert watch.look("a", 102.0) == NOTHING
    assert watch.look("a", 103.1) == Losses(silent=("a",))


def test_a_replica_that_leaves_is_told_once_unless_it_was_back():
    watch = watching("a", "b")
    assert watch.look("b", 0.1) == Losses(leaving=("a",))
    assert watch.look("b", 0.2) == NOTHING
    assert watch.look("ab", 0.3) == NOTHING
    assert watch.look("b", 0.4) == Losses(leaving=("a",))
    watch.forget("a")
    assert watch.look("b", 0.5) == NOTHING


def test_while_there_is_nobody_else_nobody_is_left():
    watch = watching("a")
    assert watch.look("", 0.1) == NOTHING
    assert watch.look("b", 0.2) == Losses(leaving=("a",))
