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
from tokenflow.replicas.scheduler.slack import SlackParams, SlackPolicy

COST = {"fixed": 0.02, "prefill": 0.00098, "load": 1e-5, "offload": 1e-5}


def situation(*sequences: Sequence, **more) -> View:
    return view(*sequences, **{"free": 50, "cost": taught(**COST), "max_batch_tokens": 512, **more})


def plan(view: View) -> Plan:
    params = SlackParams(resume_slack_s=1.0, victim_slack_s=2.0, margin_s=1.0)
    return SlackPolicy(params).plan(view, NOW)


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
        stream("dry", "flood", -0.5, arrival_s=0.0),
        stream("fed", "flood", 1.5, arrival_s=2.0),
        stream("agent", "flood", rate=NO_READER),
        stream("own", "quiet", 1.5),
        stream("own thin", "quiet", 0.01),
        prompt("q", "quiet", arrival_s=5.0),
    ]
    made = plan(situation(*device, *waiting_flood(), total=200, free=0))
    # Readers of a tenant that has its share do without a token for half a second, and its prompts
    # get on by a block.
    assert batch(made) == {"q": 40, "f": 4, "dry": 1, "own thin": 1}


def test_a_long_first_prompt_is_cut_and_still_shares_its_steps_with_nobody():
    device = [
        prompt("f", "flood", arrival_s=1.0),
        stream("thin", "flood", 0.01, arrival_s=0.0),
        prompt("q", "quiet", 120, arrival_s=5.0, max_tokens=20),
    ]
    made = plan(situation(*device, *waiting_flood(), total=200, free=0))
    # As long as a reader takes for a token, 0.1 s, of which decoding needs 0.02 s; and a block.
    assert batch(made) == {"q": 85}


def test_between_first_tokens_steps_carry_few_prompt_tokens_of_others():
    device = [
        prompt("f", "flood", 100, arrival_s=1.0),
        stream("fed", "flood", 2.0),
        stream("own", "quiet", 2.0),
    ]
    made = plan(situation(*device, *waiting_flood(), total=200, free=0))
    # Half of the 0.02 s of its decoding.
    assert batch(made) == {"f": 10, "fed": 1, "own": 1}


BY_STREAM = taught(fixed=0.005, per_sequence=0.002, prefill=0.001)
"""What a device takes whose steps cost by the stream."""


def dry(name: str, tenant: str, dry_s: float, **more) -> Sequence:
    """Its reader has been waiting for so long."""
    return stream(name, tenant, -dry_s, prompt=4, output=4, synced=1, **more)


def test_others_take_turns_in_steps_that_stay_short():
    flood = [dry(f"f{i}", "flood", 0.1 * i) for i in range(24)]
    own = dry("own", "quiet", 0.0)
    made = plan(situation(*flood, own, *waiting_flood(), total=200, free=0, cost=BY_STREAM))
    # Four times 0.005 s are ten streams: those who have waited longest, and whoever is favoured.
    assert set(batch(made)) == {"own", *(f"f{i}" for i in range(14, 24))}


def test_prompts_of_others_take_half_of_what_they_may_add():
    flood = [dry(f"f{i}", "flood", 0.1 * i) for i in range(24)]
    device = [*flood, dry("own", "quiet", 0.0), prompt("f", "flood", 100)]
    made = plan(situation(*device, *waiting_flood(), total=300, free=0, cost=BY_STREAM))
    # Half of 0.017 s of decoding.
    assert batch(made) == {"f": 8, "own": 1, **{f"f{i}": 1 for i in range(19, 24)}}


def test_all_take_part_where_a_step_costs_the_same_whoever_is_in_it():
    flood = [dry(f"f{i}", "flood", 0.1 * i) for i in range(24)]
    made = plan(situation(*flood, dry("own", "quiet", 0.0), *waiting_flood(), total=200, free=0))
    assert len(batch(made)) == 25


def test_whoever_is_promised_nothing_waits_longer():
    """Of the flood the first three can be promised their rates, 100 tokens/s."""
    dry_s = [0.1] * 3 + [0.5] * 21
    flood = [dry(f"f{i}", "flood", s, arrival_s=i, rate=100.0) for i, s in enumerate(dry_s)]
    own = dry("own", "quiet", 0.0)
    made = plan(situation(*flood, own, *waiting_flood(), total=200, free=0, cost=BY_STREAM))
    assert set(batch(made)) == {"own", *(f"f{i}" for i in range(10))}


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
    assert batch(made) == {"q": 40, "f0": 4}


def test_a_first_token_does_not_wait_for_copies():
    """Two victims would do once they have been copied; with four there is room now."""
    flood = [stream(f"f{i}", "flood", arrival_s=i, synced=7) for i in range(6)]
    quiet = sequence("q", tenant="quiet", prompt=40, max_tokens=20, arrival_s=9.0)
    made = plan(situation(*flood, quiet, *waiting_flood(), free=0))
    assert names(made.admit) == ["q"]
    assert victims(made) == ["f5", "f4", "f3", "f2"]


def test_who_has_just_come_leaves_for_first_tokens_last():
    long_here = stream("f0", "flood", 0.0, arrival_s=1.0)
    new = stream("f1", "flood", 0.0, arrival_s=2.0, resident=1)
    newest = stream("f2", "flood", 0.0, arrival_s=3.0, resident=0)

    def leaving(tokens: int) -> list[str]:
        quiet = sequence("q", tenant="quiet", prompt=tokens, max_tokens=20, arrival_s=9.0)
        device = [long_here, new, newest]
        return victims(plan(situation(*device, quiet, *waiting_flood(), total=200, free=0)))

    assert leaving(20) == ["f0"]
    assert leaving(60) == ["f0", "f1"]
    # Whoever has had no token yet stays.
    assert leaving(120) == []


def test_first_tokens_are_covered_before_streams_that_have_begun():
    begun = [stream(f"b{i}", "quiet", 0.0, arrival_s=i) for i in range(5)]
    new = sequence("new", tenant="quiet", prompt=40, max_tokens=20, arrival_s=9.0)
    shared = situation(*begun, new, *waiting_flood(), total=200, free=0)
    tracker = shared.tracker
    covered = within_share(shared, tracker.limit - tracker.generated)
    # A share is 400 tokens, of which the new one takes 60 and each of the others 108.
    assert names(tracker.take(np.flatnonzero(covered))) == ["b0", "b1", "b2", "new"]


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
