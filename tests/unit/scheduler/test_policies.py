"""What each policy decides in situations a reader of its docstring would think of."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from tests.support.engines import make_request
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.fcfs import FCFSPolicy
from tokenflow.replicas.scheduler.policy import Preempt, View, compose_batch
from tokenflow.replicas.scheduler.tokenflow import TokenFlowParams, TokenFlowPolicy

NOW = 1000.0
BLOCK = 4


def sequence(
    name: str,
    *,
    prompt: int = 8,
    output: int = 0,
    slack_s: float | None = None,
    rate: float = 10.0,
    state: State = State.WAITING,
    synced: int = 0,
    arrival_s: float = 0.0,
    max_tokens: int = 100,
) -> Sequence:
    """A sequence with `output` tokens whose reader can go on for `slack_s` seconds."""
    request = make_request(name, [1] * prompt, max_tokens, rate=rate, arrival_s=arrival_s)
    seq = Sequence(request, max_blocks=64)
    seq.output_ids = [1] * output
    seq.tokens = [1] * (prompt + output)
    seq.resident_tokens = output
    seq.state = state
    if output:
        start = NOW if slack_s is None else NOW + slack_s - output / rate
        seq.playback.generate(start, output)
    if state is not State.WAITING:
        seq.num_computed = len(seq.tokens) - (1 if output else 0)
        blocks = -(-(len(seq.tokens) + 1) // BLOCK)
        if state is State.RUNNING:
            seq.add_blocks(list(range(blocks)))
        seq.synced_blocks = synced
        seq.host_slots = list(range(synced))
    return seq


def view(
    *,
    waiting: Seq[Sequence] = (),
    running: Seq[Sequence] = (),
    preempted: Seq[Sequence] = (),
    free: int = 0,
    host: int = 1000,
    max_num_seqs: int = 64,
    cost: CostModel | None = None,
) -> View:
    return View(
        waiting=waiting,
        running=running,
        preempted=preempted,
        offloading=(),
        loading=(),
        free_blocks=free,
        releasing_blocks=0,
        total_blocks=100,
        free_host_slots=host,
        block_size=BLOCK,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=32,
        cost=cost or CostModel(),
    )


def plan(policy_view: View, **params):
    return TokenFlowPolicy(TokenFlowParams(**params)).plan(policy_view, NOW)


def test_a_full_buffer_makes_room_for_a_first_token():
    full = sequence("full", output=60, slack_s=6.0, state=State.RUNNING, synced=16)
    thin = sequence("thin", output=60, slack_s=0.5, state=State.RUNNING, synced=16)
    late = sequence("late")
    decided = plan(view(waiting=[late], running=[full, thin], free=0))
    assert decided.preempt == [(full, Preempt.OFFLOAD)]


def test_nobody_leaves_while_memory_is_free():
    full = sequence("full", output=60, slack_s=6.0, state=State.RUNNING)
    late = sequence("late")
    decided = plan(view(waiting=[late], running=[full], free=50))
    assert decided.preempt == []
    assert decided.admit == [late]
    assert [seq for seq, _ in decided.batch] == [late, full]


def test_no_victim_without_slack_enough():
    running = [sequence(f"r{i}", output=30, slack_s=1.5, state=State.RUNNING) for i in range(3)]
    decided = plan(view(waiting=[sequence("late")], running=running, free=0))
    assert decided.preempt == []
    assert decided.admit == []


def test_a_victim_must_cover_the_switch_mu_times():
    cost = CostModel()
    cost.observe_load(1, 0.1)
    cost.observe_offload(1, 0.1)
    full = sequence("full", output=60, slack_s=6.0, state=State.RUNNING)
    args = dict(waiting=[sequence("late")], running=[full], free=0, cost=cost)
    # 17 blocks out and in again take 3.4 s.
    assert plan(view(**args), conservativeness=1.0).preempt
    assert not plan(view(**args), conservativeness=2.0).preempt


def test_a_reader_about_to_stall_comes_back_first():
    dry = sequence("dry", output=40, slack_s=0.4, state=State.PREEMPTED, synced=12)
    calm = sequence("calm", output=40, slack_s=5.0, state=State.PREEMPTED, synced=12)
    late = sequence("late")
    decided = plan(view(waiting=[late], preempted=[calm, dry], free=13))
    assert decided.resume == [dry]
    assert decided.admit == []


def test_hysteresis_keeps_equals_where_they_are():
    running = sequence("a", output=60, slack_s=2.5, state=State.RUNNING)
    dry = sequence("b", output=60, slack_s=0.9, state=State.PREEMPTED, synced=17)
    args = dict(running=[running], preempted=[dry], free=4)
    assert plan(view(**args), margin_s=1.0).preempt
    assert not plan(view(**args), margin_s=2.0).preempt


def test_a_newcomer_stays_for_a_minimum_of_tokens():
    fresh = sequence("fresh", output=60, slack_s=9.0, state=State.RUNNING)
    fresh.resident_tokens = 3
    decided = plan(view(waiting=[sequence("late")], running=[fresh], free=0))
    assert decided.preempt == []


def test_surplus_makes_room_for_a_stream_in_no_hurry():
    rich = sequence("rich", output=60, slack_s=5.0, state=State.RUNNING, max_tokens=100)
    calm = sequence("calm", output=60, slack_s=3.0, state=State.PREEMPTED, synced=17)
    args = dict(running=[rich], preempted=[calm], free=4)
    # 5 s at 10 tokens/s are 50 tokens: surplus above 15 % of 100, not above 60 %.
    assert plan(view(**args), useful_fraction=0.15).preempt
    assert not plan(view(**args), useful_fraction=0.6).preempt


def test_growth_takes_the_fullest_stream():
    streams = [
        sequence(f"s{i}", prompt=8, output=4 * 8, slack_s=s, state=State.RUNNING, synced=10)
        for i, s in enumerate((3.0, 9.0, 0.2))
    ]
    for seq in streams:
        seq.num_blocks = 10  # 40 tokens exactly: each needs a block to go on
        seq.tokens = [1] * 41
        seq.num_computed = 40
    decided = plan(view(running=streams, free=0))
    assert [seq.request_id for seq, _ in decided.preempt] == ["s1"]
    assert {seq.request_id for seq, _ in decided.batch} == {"s0", "s2"}


def test_without_host_memory_victims_are_recomputed():
    full = sequence("full", output=60, slack_s=6.0, state=State.RUNNING)
    decided = plan(view(waiting=[sequence("late")], running=[full], free=0, host=3))
    assert decided.preempt == [(full, Preempt.RECOMPUTE)]


def test_overload_serves_in_order_of_arrival():
    cost = CostModel()
    for n in (1, 4, 8, 16) * 10:
        cost.observe_step(n, 0, 0.1 * n)  # 10 tokens/s however many run
    early = sequence("early", output=60, slack_s=6.0, rate=8.0, state=State.RUNNING, arrival_s=1.0)
    late = sequence("late", rate=8.0, arrival_s=2.0)
    decided = plan(view(waiting=[late], running=[early], free=0, cost=cost))
    assert decided.preempt == [], "a parked request displaces nobody"
    parked = sequence(
        "parked", output=60, slack_s=0.1, rate=8.0, state=State.RUNNING, arrival_s=3.0, synced=17
    )
    dry = sequence(
        "dry", output=60, slack_s=0.1, rate=8.0, state=State.RUNNING, arrival_s=1.0, synced=17
    )
    for seq in (parked, dry):
        seq.num_blocks = 17
        seq.tokens = [1] * 69
        seq.num_computed = 68
    decided = plan(view(running=[dry, parked], free=1, cost=cost))
    assert [seq for seq, _ in decided.preempt] == [parked]


def test_plans_do_not_depend_on_the_order_of_the_lists():
    running = [
        sequence(f"r{i}", output=60, slack_s=2.0 + i, state=State.RUNNING, arrival_s=i)
        for i in range(5)
    ]
    preempted = [
        sequence(f"p{i}", output=20, slack_s=0.1 * i, state=State.PREEMPTED, synced=8, arrival_s=i)
        for i in range(5)
    ]
    one = plan(view(running=running, preempted=preempted, free=8))
    two = plan(view(running=running[::-1], preempted=preempted[::-1], free=8))
    assert [s.request_id for s in one.resume] == [s.request_id for s in two.resume]
    assert [s.request_id for s, _ in one.preempt] == [s.request_id for s, _ in two.preempt]


def test_fcfs_admits_in_order_and_conservatively():
    first = sequence("first", prompt=40, max_tokens=40, arrival_s=1.0)
    second = sequence("second", prompt=4, max_tokens=400, arrival_s=2.0)
    third = sequence("third", prompt=4, max_tokens=4, arrival_s=3.0)
    decided = FCFSPolicy().plan(view(waiting=[first, second, third], free=30), NOW)
    # The second would fit now, but not what it may become; the third waits its turn.
    assert decided.admit == [first]


def test_fcfs_retracts_the_newest_when_memory_overflows():
    old = sequence("old", output=30, state=State.RUNNING, arrival_s=1.0)
    new = sequence("new", output=30, state=State.RUNNING, arrival_s=2.0)
    for seq in (old, new):
        seq.num_blocks = 9
    decided = FCFSPolicy().plan(view(running=[old, new], free=0), NOW)
    assert decided.preempt == [(new, Preempt.RECOMPUTE)]
    assert [seq for seq, _ in decided.batch] == [old]


def test_batches_respect_the_token_budget():
    decodes = [sequence(f"d{i}", output=5, state=State.RUNNING) for i in range(4)]
    prefill = sequence("p", prompt=60, state=State.RUNNING)
    prefill.num_computed = 0
    mixed = compose_batch([*decodes, prefill], 20)
    assert sum(n for _, n in mixed) == 20
    assert (prefill, 16) in mixed
    assert compose_batch([*decodes, prefill], 20, prefill_first=True) == [(prefill, 20)]
