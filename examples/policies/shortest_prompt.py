"""A scheduling policy of one's own; docs/write-a-policy.md goes through it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenflow.replicas.scheduler.policy import Plan, Preempt, View, compose_batch


@dataclass(frozen=True, slots=True)
class Params:
    """`engine.policy_params` sets these by name."""

    patience: float = 100.0
    """Prompt tokens that a second of waiting makes up for: nobody waits for ever."""


class ShortestPrompt:
    """Whoever has the shortest prompt is admitted first; nobody who decodes is disturbed, but when
    memory is short."""

    name = "shortest-prompt"
    write_through = False
    Params = Params

    def __init__(self, params: Params) -> None:
        self.params = params

    def plan(self, view: View, now: float) -> Plan:
        plan = Plan()
        tracker, running = view.tracker, view.running()
        # Everybody on the device needs room for the next token; the newest make it for the others.
        free, stay = view.free_blocks, len(running)
        while stay > 1 and view.growth(running[:stay]).sum() > free:
            stay -= 1
            free += int(tracker.blocks[running[stay]])
            plan.preempt.append((tracker.sequences[running[stay]], Preempt.RECOMPUTE))
        running = running[:stay]
        if not plan.preempt:
            free -= int(view.growth(running).sum())
            waiting = view.waiting()
            waited_s = now - tracker.arrival_s[waiting]
            order = np.argsort(tracker.context[waiting] - self.params.patience * waited_s)
            admitted: list[int] = []
            for row in waiting[order][: view.max_num_seqs - view.on_device()].tolist():
                need = int(view.blocks_needed(np.array([row]))[0])
                # A block more for each that is there: they will all grow.
                if need + len(running) + len(admitted) > free and len(running) + len(admitted):
                    break
                free -= need
                admitted.append(row)
            plan.admit = tracker.take(admitted)
            running = np.concatenate([running, np.array(admitted, np.int64)])
        plan.batch = compose_batch(view, running)
        return plan
