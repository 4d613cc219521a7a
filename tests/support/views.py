"""Views of situations described in a few words, for the tests of policies."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tests.support.engines import make_request
from tokenflow.replicas.request import Sequence, State
from tokenflow.replicas.scheduler.cost import CostModel
from tokenflow.replicas.scheduler.lengths import OutputLengths
from tokenflow.replicas.scheduler.policy import Plan, View
from tokenflow.replicas.scheduler.tracker import Tracker

NOW = 1000.0
BLOCK = 4
TOTAL = 100

WAITING, RUNNING, PREEMPTED = State.WAITING, State.RUNNING, State.PREEMPTED
NO_READER = math.inf


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
    max_tokens: int = 1000,
    resident: int | None = None,
    computed: int | None = None,
    blocks: int | None = None,
    tenant: str = "",
) -> Sequence:
    """A sequence with `output` tokens whose reader can go on for `slack_s` seconds (default: they
    all came just now). Infinite `rate`: no reader.

    On the device it holds what the engine would have given it: blocks for its tokens and the next.
    """
    request = make_request(
        name, [1] * prompt, max_tokens, rate=rate, arrival_s=arrival_s, tenant=tenant
    )
    seq = Sequence(request, max_blocks=1024)
    seq.output_ids = [1] * output
    seq.tokens = [1] * (prompt + output)
    seq.resident_tokens = output if resident is None else resident
    seq.state = state
    if output:
        read_s = output / seq.playback.rate
        seq.playback.generate(NOW if slack_s is None else NOW + slack_s - read_s, output)
    if state is State.WAITING:
        return seq
    seq.num_computed = len(seq.tokens) - (1 if output else 0) if computed is None else computed
    if state in (State.RUNNING, State.LOADING):
        seq.add_blocks([0] * (-(-(len(seq.tokens) + 1) // BLOCK) if blocks is None else blocks))
    else:
        synced = -(-seq.num_computed // BLOCK)
    seq.synced_blocks = synced
    seq.host_slots = list(range(synced))
    return seq


def view(
    *sequences: Sequence,
    free: int = 0,
    releasing: int = 0,
    total: int = TOTAL,
    host: int = 1000,
    max_num_seqs: int = 64,
    max_batch_tokens: int = 64,
    offload_queue: int = 0,
    load_queue: int = 0,
    cost: CostModel | None = None,
    lengths: OutputLengths | None = None,
) -> View:
    """What a policy sees of them; they came, and came onto the device, in the order given."""
    tracker = Tracker()
    for entered, seq in enumerate(sequences, 1):
        if seq.state is State.RUNNING:
            seq.entered = entered
        tracker.add(seq)
    tracker.refresh()
    return View(
        tracker=tracker,
        free_blocks=free,
        releasing_blocks=releasing,
        total_blocks=total,
        free_host_slots=host,
        offload_queue=offload_queue,
        load_queue=load_queue,
        block_size=BLOCK,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        cost=cost or CostModel(),
        lengths=lengths or OutputLengths(),
    )


def taught(
    *,
    fixed: float = 0.0,
    per_sequence: float = 0.0,
    per_token: float = 0.0,
    prefill: float = 0.0,
    load: float = 0.0,
    offload: float = 0.0,
) -> CostModel:
    """A cost model that has seen a machine with these costs, in seconds."""
    cost = CostModel()
    if fixed or per_sequence or per_token:
        for i in range(448):
            n, context = 1 + i % 16, 100 * (1 + i % 7) * (1 + i % 16)
            seconds = fixed + per_sequence * n + per_token * context
            cost.observe_step(n, context, 0, seconds)
    if prefill:
        cost.observe_step(0, 0, 100, 100 * prefill)
    if load:
        cost.observe_load(10, 10 * load)
    if offload:
        cost.observe_offload(10, 10 * offload)
    return cost


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [seq.request_id for seq in sequences]


def victims(plan: Plan) -> list[str]:
    return names(seq for seq, _ in plan.preempt)


def batch(plan: Plan) -> dict[str, int]:
    """Tokens of each in the step."""
    return {seq.request_id: n for seq, n in plan.batch}
