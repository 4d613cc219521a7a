"""A policy that preempts for no reason, so that every way off the device and back is taken."""

from __future__ import annotations

import random

from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View
from tokenflow.replicas.scheduler.registry import make_policy


class Chaos:
    """The default policy, but now and then somebody must leave."""

    name = "chaos"
    write_through = True

    def __init__(self, seed: int | str, often: float = 0.5) -> None:
        """In `often` of the steps one of the batch leaves, mostly to the host."""
        self._inner = make_policy("slack")
        self._rng = random.Random(seed)
        self._often = often

    def plan(self, view: View, now: float) -> Plan:
        plan = self._inner.plan(view, now)
        gone = {seq for seq, _ in plan.preempt}
        leaving = [seq for seq, _ in plan.batch if seq.state is State.RUNNING and seq not in gone]
        if leaving and self._rng.random() < self._often:
            victim = self._rng.choice(leaving)
            how = Preempt.OFFLOAD if self._rng.random() < 0.8 else Preempt.RECOMPUTE
            plan.preempt.append((victim, how))
            plan.batch = [(seq, n) for seq, n in plan.batch if seq is not victim]
        return plan
