"""What a step carries, and who makes room, while tenants share a device.

A hundred blocks of four tokens; decoding takes 0.02 s, a prompt token 1 ms.
"""

from __future__ import annotations

import numpy as np

from tests.support.views import (
    NO_READER,
    NOW,
    RUNNING,
    batch,
    names,
    sequence,
    taught,
    victims,
    view,
)
from tokenflow.replicas.request import Sequence
from tokenflow.replicas.scheduler.policy import Plan, View
from tokenflow.replicas.scheduler.sharing import within_share
from tokenflow.replicas.scheduler.slack import SlackPolicy

COST = {"fixed": 0.02, "prefill": 0.00098, "load": 1e-5, "offload": 1e-5}


def situation(*sequences: Sequence, **more) -> View:
    return view(*sequences, **{"free": 50, "cost": taught(**COST), "max_batch_tokens": 512, **more})


def plan(view: View) -> Plan:
    return SlackPolicy().plan(view, NOW)


def stream(name: str, tenant: str, slack_s: float = 1.0, **more) -> Sequence:
    """On the device: 48 tokens, all but the last of its 13 blocks on the host."""
    more = {"output": 40, "synced": 12, "max_tokens": 100, **more}
    return sequence(name, tenant=tenant, state=RUNNING, slack_s=slack_s, **more)


def prompt(name: str, tenant: str, tokens: int = 40, **more) -> Sequence:
    """On the device, with nothing computed."""
    more = {"max_tokens": 60, **more}
    return sequence(name, tenant=tenant, state=RUNNING, prompt=tokens, computed=0, **more)


FLOOD = [{"max_tokens": 300, "tenant": "flood"}] * 9
"""Far more than the device holds."""


def waiting_flood() -> list[Sequence]:
    return [sequence(f"w{i}", arrival_s=9.0 + i, **more) for i, more in enumerate(FLOOD)]


def test_a_first_token_has_its_step_to_itself_and_those_who_cannot_wait():
    device = [
        prompt("f", "flood", arrival_s=1.0),
        stream("thin", "flood", 0.01, arrival_s=0.0),
        stream("fed", "flood", 1.5, arrival_s=2.0),
        stream("agent", "flood", rate=NO_READER),
        stream("own", "quiet", 1.5),
        prompt("q", "quiet", arrival_s=5.0),
    ]
    made = plan(situation(*device, *waiting_flood(), total=200, free=0))
    assert batch(made) == {"q": 40, "thin": 1, "own": 1}


def test_between_first_tokens_steps_carry_few_prompt_tokens_of_others():
    device = [
        prompt("f", "flood", 100, arrival_s=1.0),
        stream("fed", "flood", 2.0),
        stream("own", "quiet", 2.0),
    ]
    made = plan(situation(*device, *waiting_flood(), total=200, free=0))
    # Half of the 0.02 s of its decoding.
    assert batch(made) == {"f": 10, "fed": 1, "own": 1}


def test_with_enough_for_all_prompts_end_as_with_equal_parts_of_the_device():
    device = [
        prompt("f0", "flood", 30),
        prompt("f1", "flood", 30),
        stream("fed", "flood", 2.0),
        prompt("q", "quiet", 40),
    ]
    made = plan(situation(*device, total=1000))
    # Within three times its decoding.
    assert [(seq.request_id, n) for seq, n in made.batch] == [("f0", 30), ("q", 31), ("fed", 1)]


def test_one_tenants_steps_are_as_they_were():
    device = [prompt("f0", "flood", 30), prompt("f1", "flood", 30), stream("fed", "flood", 2.0)]
    assert batch(plan(situation(*device, total=1000))) == {"f0": 30, "f1": 30, "fed": 1}


def test_prompts_that_have_not_begun_make_room_at_once():
    flood = [prompt(f"f{i}", "flood", 80, max_tokens=20, arrival_s=i) for i in range(4)]
    quiet = sequence("q", tenant="quiet", prompt=40, max_tokens=20, arrival_s=9.0)
    made = plan(situation(*flood, quiet, *waiting_flood(), free=2))
    assert victims(made) == ["f3"]
    assert names(made.admit) == ["q"]
    assert batch(made) == {"q": 40}


def test_a_first_token_does_not_wait_for_copies():
    """Two victims would do once they have been copied; with four there is room now."""
    flood = [stream(f"f{i}", "flood", arrival_s=i, synced=7) for i in range(6)]
    quiet = sequence("q", tenant="quiet", prompt=40, max_tokens=20, arrival_s=9.0)
    made = plan(situation(*flood, quiet, *waiting_flood(), free=0))
    assert names(made.admit) == ["q"]
    assert victims(made) == ["f5", "f4", "f3", "f2"]


def test_places_and_prompts_run_short_as_memory_does():
    def first(flood: list[Sequence], **more) -> list[str]:
        quiet = sequence("q", tenant="quiet", prompt=8, max_tokens=4)
        shared = situation(*flood, quiet, **{"total": 10_000, **more})
        tracker = shared.tracker
        remaining = tracker.limit - tracker.generated
        return names(tracker.take(np.flatnonzero(within_share(shared, remaining))))

    def of(count: int, prompt: int) -> list[Sequence]:
        each = {"tenant": "flood", "prompt": prompt, "max_tokens": 4}
        return [sequence(f"f{i}", **each) for i in range(count)]

    assert first(of(50, 8)) == []
    assert first(of(50, 8), max_num_seqs=20) == ["q"]
    assert first(of(50, 8), total=60) == ["q"]
    # More than a second of them.
    assert first(of(50, 60)) == ["q"]
