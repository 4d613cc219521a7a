"""What the slack policy decides in situations a reader of its docstring would think of.

Unless a test says otherwise readers take ten tokens a second and nothing is known of costs, so that
the capacity is unlimited: nobody is parked, late or run ahead.
"""

from __future__ import annotations

import pytest

from tests.support.views import (
    NO_READER,
    NOW,
    PREEMPTED,
    RUNNING,
    WAITING,
    batch,
    names,
    sequence,
    taught,
    victims,
    view,
)
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.policy import Plan, Preempt, View
from tokenflow.replicas.scheduler.slack import SlackParams, SlackPolicy

THRESHOLDS = {"resume_slack_s": 1.0, "victim_slack_s": 2.0, "margin_s": 1.0}
"""Written out here: the rules hold whatever the defaults are."""


def plan(situation: View, **params: float) -> Plan:
    return SlackPolicy(SlackParams(**{**THRESHOLDS, **params})).plan(situation, NOW)


def running(name: str, slack_s: float, **more) -> Sequence:
    """68 tokens in 18 blocks, all but the last of them on the host."""
    more = {"output": 60, "synced": 17, **more}
    return sequence(name, slack_s=slack_s, state=RUNNING, **more)


def held(name: str, slack_s: float = 6.0, **more) -> Sequence:
    """Its buffer covers a tenth of its output and more."""
    return running(name, slack_s, max_tokens=100, **more)


def off(name: str, slack_s: float, **more) -> Sequence:
    """48 tokens on the host: 13 blocks to come back."""
    return sequence(name, slack_s=slack_s, state=PREEMPTED, **{"output": 40, **more})


def late_one(**more) -> Sequence:
    """A request without a token: 3 blocks, and room for others to grow."""
    return sequence("late", **more)


# -- who makes room for a first token -----------------------------------------------------------


def test_a_full_buffer_makes_room_for_a_first_token():
    decided = plan(view(running("full", 6.0), running("thin", 0.5), late_one(), free=0))
    assert [(s.request_id, how) for s, how in decided.preempt] == [("full", Preempt.OFFLOAD)]
    assert names(decided.admit) == ["late"]
    assert batch(decided) == {"thin": 1, "late": 8}


def paused(seq: Sequence) -> Sequence:
    seq.playback.pause(NOW)
    return seq


def test_a_stream_whose_reader_pauses_is_the_first_to_leave_and_the_last_to_come():
    situation = view(paused(running("p", 0.5, resident=1)), running("thin", 0.5), late_one())
    assert victims(plan(situation)) == ["p"]
    for kind in (
        sequence("p"),
        off("p", 0.0),
        sequence("p", output=40),
        off("p", 0.0, rate=NO_READER),
    ):
        crowded = plan(view(running("thin", 0.5), paused(kind), late_one(), free=50))
        assert not crowded.resume and names(crowded.admit) == ["late"]
        idle = plan(view(paused(kind), free=50))
        assert names([*idle.resume, *idle.admit]) == ["p"]


def test_while_others_wait_a_stream_whose_reader_pauses_makes_no_tokens():
    for rate in (10.0, NO_READER):
        one = paused(running("p", 0.5, rate=rate, resident=1))
        decided = plan(view(one, running("thin", 0.5), late_one(max_tokens=8), free=1))
        assert "p" not in batch(decided)
    assert batch(plan(view(paused(running("p", 0.5)), free=4))) == {"p": 1}


def test_a_newcomer_waits_for_blocks_that_are_still_being_copied_out():
    decided = plan(view(running("full", 6.0, synced=0), late_one(), free=0))
    assert victims(decided) == ["full"] and decided.admit == []
    # And nobody else leaves for it meanwhile.
    again = plan(view(running("other", 6.0), late_one(), free=0, releasing=18))
    assert again.preempt == [] and again.admit == []


def test_nobody_leaves_while_memory_is_free():
    decided = plan(view(running("full", 6.0), late_one(), free=50))
    assert decided.preempt == []
    assert names(decided.admit) == ["late"]
    assert batch(decided) == {"full": 1, "late": 8}


def test_no_victim_without_slack_enough():
    streams = [running(f"r{i}", 1.9) for i in range(3)]
    decided = plan(view(*streams, late_one(), free=0))
    assert decided.preempt == [] and decided.admit == []
    assert victims(plan(view(*streams, late_one(), free=0), victim_slack_s=1.0)) != []


def test_victims_leave_in_order_of_slack_until_there_is_room():
    streams = [running("a", 3.0), running("b", 5.0), running("c", 4.0)]
    # 3 blocks for itself, 6 for three streams to grow, 15 until one can leave; each gives 18.
    assert victims(plan(view(*streams, late_one(), free=6))) == ["b"]
    assert victims(plan(view(*streams, late_one(), free=5))) == ["b", "c"]


def test_all_of_it_or_nobody():
    assert victims(plan(view(running("a", 5.0), sequence("huge", prompt=200), free=0))) == []


def test_a_victim_must_cover_its_own_switch_twice_over():
    cost = taught(load=0.1, offload=0.1)
    # 18 blocks out and in again take 3.6 s; what is on the host already goes for nothing.
    assert victims(plan(view(running("a", 6.0, synced=0), late_one(), cost=cost))) == []
    assert victims(plan(view(running("a", 7.5, synced=0), late_one(), cost=cost))) == ["a"]
    assert victims(plan(view(running("a", 6.0, synced=17), late_one(), cost=cost))) == ["a"]


def test_a_stream_stays_for_a_minimum_of_tokens():
    fresh = running("fresh", 9.0, resident=7)
    assert victims(plan(view(fresh, late_one(), free=0))) == []
    assert victims(plan(view(fresh, late_one(), free=0), min_residency_tokens=7)) == ["fresh"]


def test_a_stream_in_prefill_is_no_victim():
    recomputing = running("a", 9.0, computed=30)
    assert victims(plan(view(recomputing, late_one(), free=0))) == []


def test_without_host_memory_victims_are_recomputed():
    full = running("full", 6.0, synced=0)
    decided = plan(view(full, late_one(), free=0, host=16))
    assert decided.preempt == [(full, Preempt.RECOMPUTE)]
    # Nothing has to be copied: the memory is there at once.
    assert names(decided.admit) == ["late"]
    assert plan(view(full, late_one(), free=0, host=17)).preempt == [(full, Preempt.OFFLOAD)]


def test_host_slots_are_counted_down_from_victim_to_victim():
    streams = [running("a", 5.0, synced=0), running("b", 4.0, synced=0)]
    decided = plan(view(*streams, sequence("big", prompt=40), free=0, host=20))
    # 11 blocks, 4 for growth and 10 until one of them can leave are more than one gives up.
    assert decided.preempt == [(streams[0], Preempt.OFFLOAD), (streams[1], Preempt.RECOMPUTE)]


def test_places_are_made_as_memory_is():
    streams = [running("full", 6.0), running("thin", 0.5)]
    decided = plan(view(*streams, late_one(), free=50, max_num_seqs=2))
    assert victims(decided) == ["full"] and names(decided.admit) == ["late"]
    thin = [running("a", 1.0), running("b", 0.5)]
    decided = plan(view(*thin, late_one(), free=50, max_num_seqs=2))
    assert decided.preempt == [] and decided.admit == []


def test_one_on_its_way_onto_the_device_has_its_place():
    loading = sequence("l", output=20, slack_s=0.1, state=State.LOADING)
    decided = plan(view(loading, late_one(), free=50, max_num_seqs=1))
    assert decided.admit == []


# -- who comes back, and when -----------------------------------------------------------------


def test_a_reader_about_to_stall_comes_back_first():
    decided = plan(view(late_one(), off("calm", 5.0), off("dry", 0.4), free=13))
    assert names(decided.resume) == ["dry"]
    assert decided.admit == []


def test_of_two_the_one_with_less_slack():
    decided = plan(view(off("a", 0.9), off("b", 0.2), running("r", 0.5), free=15))
    assert names(decided.resume) == ["b"]


def test_a_stream_comes_back_as_early_as_its_load_takes_long():
    streams = [running("rich", 5.0), off("soon", 1.5)]
    assert victims(plan(view(*streams))) == []
    assert victims(plan(view(*streams), resume_slack_s=1.6)) == ["rich"]
    # 13 blocks take 1.3 s.
    assert victims(plan(view(*streams, cost=taught(load=0.1)))) == ["rich"]


def test_hysteresis_keeps_equals_where_they_are():
    streams = [running("a", 2.5), off("b", 0.9)]
    assert victims(plan(view(*streams), margin_s=1.0)) == ["a"]
    assert victims(plan(view(*streams), margin_s=2.0)) == []


def test_a_reader_that_stalls_already_has_no_more_claim_than_one_at_zero():
    assert victims(plan(view(running("a", 2.5), off("b", -30.0)), margin_s=2.0)) == ["a"]
    assert victims(plan(view(running("a", 2.5), off("b", -30.0)), margin_s=3.0)) == []


def test_whoever_is_first_in_line_keeps_its_place():
    # The second one would fit.
    first, second = off("first", 0.1, output=200), off("second", 0.5, output=4)
    decided = plan(view(running("r", 0.3), first, second, free=30))
    assert decided.resume == []


def test_a_stream_that_lost_its_kv_goes_before_one_that_never_began():
    again = sequence("again", output=4, slack_s=0.5, state=WAITING, arrival_s=9.0)
    first = sequence("first", arrival_s=1.0)
    assert names(plan(view(first, again, free=4)).admit) == ["again"]


def test_newcomers_come_in_order_of_arrival():
    waiting = [sequence(f"w{i}", arrival_s=9.0 - i) for i in range(3)]
    assert names(plan(view(*waiting, free=100)).admit) == ["w2", "w1", "w0"]


def test_a_start_leaves_room_to_grow_until_somebody_can_leave():
    reader = running("r", 0.5)
    # 3 blocks; two for the stream there to grow, five for the 20 tokens it reads in two seconds.
    assert names(plan(view(reader, late_one(), free=10)).admit) == ["late"]
    assert names(plan(view(reader, late_one(), free=9)).admit) == []
    assert names(plan(view(reader, late_one(), free=9), growth_steps=4).admit) == ["late"]
    assert names(plan(view(reader, late_one(), free=9), victim_slack_s=1.0).admit) == ["late"]
    # Faster readers need more; and who has begun, and lost it, only the growth.
    fast = running("r", 0.5, rate=20.0)
    assert names(plan(view(fast, late_one(), free=14)).admit) == []
    assert names(plan(view(fast, late_one(), free=15)).admit) == ["late"]
    again = sequence("again", output=1, state=WAITING)
    assert names(plan(view(reader, again, free=5)).admit) == ["again"]


def test_a_stream_that_is_about_to_end_needs_no_more_room_than_its_end():
    # Four tokens are left, one block; the rate alone would ask for 50 blocks.
    ending = running("e", 0.5, rate=100.0, max_tokens=64)
    assert names(plan(view(ending, late_one(), free=6)).admit) == ["late"]
    assert names(plan(view(ending, late_one(), free=5)).admit) == []


def test_each_start_counts_for_the_next_one():
    waiting = [sequence(f"w{i}") for i in range(4)]
    # 3, then 3 + 7, then 3 + 14 blocks.
    assert len(plan(view(*waiting, free=3)).admit) == 1
    assert len(plan(view(*waiting, free=12)).admit) == 1
    assert len(plan(view(*waiting, free=13)).admit) == 2
    assert len(plan(view(*waiting, free=23)).admit) == 3


def test_an_empty_device_needs_no_headroom():
    assert names(plan(view(late_one(), free=3)).admit) == ["late"]


def test_an_idle_device_brings_streams_back_whatever_their_slack():
    # Both have all that counts for them: no rule but this one wants them back.
    calm = [off("a", 9.0, max_tokens=100), off("b", 8.0, max_tokens=100)]
    assert names(plan(view(*calm, free=50)).resume) == ["b", "a"]
    assert names(plan(view(running("r", 0.5), *calm, free=50)).resume) == []


# -- held streams -----------------------------------------------------------------------------


def test_while_anybody_is_off_the_device_a_covered_stream_is_held():
    streams = [held("full"), running("thin", 0.5)]
    assert batch(plan(view(*streams, off("o", 3.0)))) == {"thin": 1}
    assert batch(plan(view(*streams, sequence("w", prompt=300)))) == {"thin": 1}
    assert batch(plan(view(*streams))) == {"full": 1, "thin": 1}


def test_covered_means_a_tenth_of_the_output():
    # 6 s at ten tokens a second are 60 tokens.
    for limit, runs in ((590, False), (610, True)):
        stream = running("s", 6.0, max_tokens=limit)
        decided = plan(view(stream, running("thin", 0.5), off("o", 3.0)))
        assert ("s" in batch(decided)) == runs


def test_with_everybody_covered_the_device_is_not_idle():
    assert batch(plan(view(held("a"), held("b"), off("o", 3.0, max_tokens=100)))) == {
        "a": 1,
        "b": 1,
    }


def test_prefills_and_consumers_that_are_no_readers_are_never_held():
    recomputing = held("p", computed=60)
    agent = held("agent", rate=NO_READER)
    assert agent.playback.buffer(NOW) > 0.5 * 100, "it has more than any reader could use"
    decided = plan(view(held("full"), recomputing, agent, off("o", 3.0, max_tokens=100)))
    assert batch(decided) == {"p": 8, "agent": 1}


def test_a_held_stream_makes_room_for_one_that_lacks_a_refill():
    # Useful is a tenth of 200 tokens; 1.4 s are 14 of them.
    lacks = off("calm", 1.4, max_tokens=200)
    assert victims(plan(view(held("rich"), lacks), refill=0.25)) == ["rich"]
    assert victims(plan(view(held("rich"), lacks), refill=0.5)) == []


def test_a_stream_that_still_gains_is_not_displaced_by_a_refill():
    lacks = off("calm", 1.4, max_tokens=200)
    assert victims(plan(view(running("rich", 6.0), lacks))) == []


def test_a_tenth_is_of_the_output_that_is_expected_not_of_the_limit():
    # 60 tokens ahead of 10,000 are little; of the 100 that outputs have here they are much.
    ended = OutputLengths()
    for _ in range(100):
        ended.observe(100, ended=True)
    streams = [running("ahead", 6.0, max_tokens=10_000), running("thin", 0.5), off("away", 5.0)]
    assert set(batch(plan(view(*streams)))) == {"ahead", "thin"}
    assert batch(plan(view(*streams, lengths=ended))) == {"thin": 1}


# -- what the readers leave -------------------------------------------------------------------


def test_with_capacity_to_spare_the_longest_run_ahead():
    cost = taught(fixed=0.01)
    # Nobody can leave for this one.
    huge = sequence("huge", prompt=300, max_tokens=90)
    streams = [held("full"), running("thin", 0.5, max_tokens=80), huge]
    assert batch(plan(view(*streams))) == {"thin": 1}
    # 100 steps a second for three readers of 10 tokens/s.
    assert batch(plan(view(*streams, cost=cost))) == {"full": 1, "thin": 1}
    # When the readers take nearly all, what is left does not carry anybody ahead.
    slow = taught(per_sequence=0.03)
    assert batch(plan(view(*streams, cost=slow))) == {"thin": 1}


def test_a_stream_that_would_end_alone_comes_back_first():
    cost = taught(fixed=0.01)
    # 900 steps to go, while the two of them have work for 6.25 s.
    long = off("long", 5.0, output=100, max_tokens=1000)
    short = running("short", 3.0, output=50, max_tokens=400)
    # It has more slack than the other one: without knowing the pace, no reason to change places.
    args = {"free": 20, "total": 1000}
    assert victims(plan(view(short, long, **args))) == []
    assert victims(plan(view(short, long, cost=cost, **args))) == ["short"]


def test_also_when_it_has_all_its_reader_needs_and_nothing_is_to_spare():
    # Three readers of ten take nearly all there is; the other two are done in a moment.
    cost = taught(per_sequence=0.03)
    long = off("long", 9.0, output=100, max_tokens=1000)
    short = [running(f"s{i}", 3.0, max_tokens=70) for i in range(2)]
    args = {"free": 20, "total": 1000}
    assert victims(plan(view(*short, long, **args))) == []
    assert victims(plan(view(*short, long, cost=cost, **args))) == ["s0"]


def test_a_late_stream_does_not_leave():
    cost = taught(fixed=0.01)
    long = running("long", 6.0, output=100, max_tokens=1000)
    dry = off("dry", 0.2, output=50, max_tokens=60)
    assert victims(plan(view(long, dry, free=0))) == ["long"]
    assert victims(plan(view(long, dry, free=0, cost=cost))) == []


# -- overload ---------------------------------------------------------------------------------

TEN_A_SECOND = {"per_sequence": 0.1}
"""However many run."""


def test_beyond_the_capacity_requests_are_parked_in_order_of_arrival():
    cost = taught(**TEN_A_SECOND)
    early = running("early", 6.0, rate=8.0, arrival_s=1.0)
    newcomer = late_one(rate=8.0, arrival_s=2.0)
    assert victims(plan(view(early, newcomer, free=0))) == ["early"]
    # A parked one displaces nobody who still gains.
    assert victims(plan(view(early, newcomer, free=0, cost=cost))) == []
    # Within the capacity nobody is parked, and the earlier one has the claim.
    light = late_one(rate=1.0, arrival_s=2.0)
    assert victims(plan(view(early, light, free=0, cost=cost))) == ["early"]
    earlier = late_one(rate=8.0, arrival_s=0.0)
    assert victims(plan(view(early, earlier, free=0, cost=cost))) == ["early"]


def test_a_parked_request_may_take_the_place_of_a_held_one():
    cost = taught(**TEN_A_SECOND)
    rich = held("rich", rate=8.0, arrival_s=1.0)
    # Room for all of its 4 tokens, since nobody promised it more later.
    parked = late_one(rate=8.0, arrival_s=2.0, max_tokens=4)
    assert victims(plan(view(rich, parked, free=0, cost=cost))) == ["rich"]


def test_a_parked_request_begins_when_it_can_also_end():
    cost = taught(**TEN_A_SECOND)
    early = running("early", 0.5, rate=8.0, arrival_s=1.0)
    parked = late_one(rate=8.0, arrival_s=2.0, max_tokens=40)
    # 3 blocks, 2 for growth, 10 for its output.
    assert names(plan(view(early, parked, free=15, cost=cost)).admit) == ["late"]
    assert names(plan(view(early, parked, free=14, cost=cost)).admit) == []


def test_the_first_one_is_served_whatever_it_asks_for():
    cost = taught(**TEN_A_SECOND)
    greedy = off("greedy", 0.5, rate=1000.0, output=4)
    other = running("other", 6.0, rate=1.0, arrival_s=5.0)
    # Not parked: it may displace somebody who still gains.
    assert victims(plan(view(greedy, other, free=0, cost=cost))) == ["other"]


def test_consumers_that_are_no_readers_do_not_use_up_the_capacity():
    cost = taught(**TEN_A_SECOND)
    # Their references, 20 tokens/s each, are six times the capacity.
    agents = [running(f"a{i}", 3.0, rate=NO_READER, max_tokens=700) for i in range(3)]
    newcomer = late_one(rate=8.0, arrival_s=2.0, max_tokens=2000)
    assert victims(plan(view(*agents, newcomer, free=25, cost=cost))) == ["a0"]
    readers = [running(f"a{i}", 3.0, rate=20.0, max_tokens=700) for i in range(3)]
    assert victims(plan(view(*readers, newcomer, free=25, cost=cost))) == []


def test_growth_takes_the_parked_ones_first():
    cost = taught(**TEN_A_SECOND)
    # Both have filled their blocks and the reader has as good as nothing.
    dry = running("dry", 0.1, rate=8.0, arrival_s=1.0, blocks=17, output=61)
    parked = running("parked", 0.1, rate=8.0, arrival_s=3.0, blocks=17, output=61)
    richer = running("richer", 5.0, rate=0.5, arrival_s=2.0, blocks=17, output=61)
    decided = plan(view(richer, dry, parked, free=0, cost=cost))
    assert victims(decided) == ["parked"]
    assert batch(decided) == {"richer": 1, "dry": 1}


# -- growth -----------------------------------------------------------------------------------


def growing(name: str, slack_s: float, **more) -> Sequence:
    """Its ten blocks are full."""
    more = {"output": 33, "synced": 10, "blocks": 10, **more}
    return sequence(name, slack_s=slack_s, state=RUNNING, **more)


def test_growth_takes_the_fullest_stream():
    streams = [growing("a", 3.0), growing("b", 9.0), growing("c", 0.2)]
    decided = plan(view(*streams, free=0))
    assert victims(decided) == ["b"]
    assert batch(decided) == {"a": 1, "c": 1}


def test_of_those_who_have_nothing_the_last_one_to_come_waits():
    streams = [growing("a", -1.0, arrival_s=1.0), growing("b", -9.0, arrival_s=2.0)]
    assert victims(plan(view(*streams, free=0))) == ["b"]
    assert victims(plan(view(*streams[::-1], free=0))) == ["b"]


def test_one_victim_is_enough_though_it_has_to_be_copied_out_first():
    streams = [growing("a", 3.0, synced=0), growing("b", 9.0, synced=0), growing("c", 0.2)]
    decided = plan(view(*streams, free=0))
    assert victims(decided) == ["b"]
    assert batch(decided) == {}, "until then nobody has a block"
    # With one to spare, whoever is nearest to running dry has it.
    assert batch(plan(view(*streams, free=1))) == {"c": 1}
    # The next pass knows that blocks are on their way.
    assert victims(plan(view(streams[0], streams[2], free=0, releasing=10))) == []


def test_what_growth_takes_is_not_given_to_a_newcomer():
    streams = [growing("a", 0.3), growing("b", 0.2)]
    # 12 blocks for a start beside two streams, and the two that they take now.
    needed = 3 + 4 + 10
    assert names(plan(view(*streams, late_one(), free=needed + 2)).admit) == ["late"]
    assert names(plan(view(*streams, late_one(), free=needed + 1)).admit) == []


def test_what_a_victim_of_growth_leaves_beyond_it_is_free():
    streams = [growing("a", 0.3), growing("b", 9.0), growing("c", 0.2)]

    def admitted(prompt: int) -> list[str]:
        again = sequence("again", prompt=prompt, output=4, state=WAITING)
        return names(plan(view(*streams, again, free=0)).admit)

    # 10 blocks less the two that the others take; 4 for them to grow later.
    assert admitted(8) == ["again"]
    assert admitted(12) == []


def test_a_single_stream_is_never_its_own_victim():
    assert victims(plan(view(growing("a", 9.0), free=0))) == []


# -- chunks -----------------------------------------------------------------------------------

CHUNKS = {"fixed": 0.01, "prefill": 0.01}
"""A step of 0.01 s, and as much for every prompt token."""


def chunk(reader: Sequence | None, **more) -> int:
    """Prompt tokens beside `reader` in a step that could carry 64."""
    prefilling = sequence("p", prompt=200, state=RUNNING, computed=0)
    streams = [prefilling] if reader is None else [reader, prefilling]
    decided = plan(view(*streams, free=0, total=1000, **{"cost": taught(**CHUNKS), **more}))
    assert reader is None or batch(decided)[reader.request_id] == 1
    return batch(decided)["p"]


def test_a_step_carries_no_more_prompt_than_its_readers_slack_allows():
    assert chunk(running("r", 0.505)) == 49
    assert chunk(running("r", 9.0)) == 63


def test_the_tightest_reader_decides():
    prefilling = sequence("p", prompt=200, state=RUNNING, computed=0)
    readers = [running("a", 0.5), running("b", 0.305), running("c", 0.4)]
    decided = plan(view(*readers, prefilling, total=1000, cost=taught(**CHUNKS)))
    assert batch(decided)["p"] == 29


def test_a_reader_that_stalls_is_worth_one_token_time():
    assert chunk(running("r", -3.0, rate=9.5)) == 9
    assert chunk(running("r", -3.0, rate=15.0)) == 5


def test_prefills_take_a_share_of_the_device_whatever_readers_need():
    # Four times its decoding at most: 0.04 s, of which 0.03 for 30 tokens.
    cost = taught(fixed=0.01, prefill=0.00098)
    assert chunk(running("r", -3.0, rate=1000.0), cost=cost) == 30
    # And a block at least.
    assert chunk(running("r", -3.0, rate=1000.0), cost=taught(fixed=0.01, prefill=1.0)) == 4


def test_consumers_without_patience_or_promise_do_not_shorten_steps():
    assert chunk(None) == 64
    assert chunk(running("agent", -3.0, rate=NO_READER)) == 63
    assert chunk(running("r", -3.0), cost=taught(fixed=0.01)) == 63, "prefill cost unknown"


@pytest.mark.parametrize("reverse", [False, True])
def test_parked_readers_do_not_shorten_steps(reverse):
    cost = taught(per_sequence=0.1, prefill=0.0098)
    prompt = sequence("p", prompt=200, state=RUNNING, computed=0, rate=8.0, arrival_s=2.0)
    reader = running("r", -3.0, rate=8.0, arrival_s=1.0 if reverse else 3.0)
    decided = plan(view(prompt, reader, free=0, total=1000, cost=cost))
    # The promised one allows four times its decoding.
    assert batch(decided)["p"] == (30 if reverse else 63)


# -- the same situation -----------------------------------------------------------------------


def test_plans_do_not_depend_on_the_order_of_the_rows():
    def decided(order: int):
        on = [running(f"r{i}", 2.0 + i, arrival_s=i) for i in range(5)]
        away = [off(f"p{i}", 0.1 * i, arrival_s=i) for i in range(5)]
        plan_made = plan(view(*[*on, *away][::order], free=8))
        return names(plan_made.resume), victims(plan_made)

    assert decided(1) == decided(-1)
    assert decided(1) != ([], [])


def test_a_policy_remembers_nothing():
    policy = SlackPolicy(SlackParams(**THRESHOLDS))
    situation = view(running("full", 6.0), running("thin", 0.5), late_one(), free=0)
    assert policy.plan(situation, NOW) == policy.plan(situation, NOW)
