"""Where KV is kept and how it comes back, over the fake model whose text shows every mistake."""

from tests.support.engines import (
    check_conservation,
    fake_engine,
    make_request,
    run_to_end,
    tokens_of,
)
from tests.support.fake_executor import expected_output
from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.policy import Plan, Preempt, compose_batch
from tokenflow.replicas.scheduler.slack import SlackPolicy
from tokenflow.replicas.transfers import Kind

PROMPT = [i % 250 + 1 for i in range(40)]


class ByHand:
    """Runs whoever is on the device; who that is, the test decides."""

    name = "by hand"

    def __init__(self, write_through=True):
        self.write_through = write_through

    def plan(self, view, now):
        return Plan(batch=compose_batch(view, view.running()))


def by_hand(write_through=True, **options):
    return fake_engine(policy=ByHand(write_through), **options)


def start(engine, name, prompt, max_tokens, tokens, **options):
    """A sequence on the device that has generated so many tokens."""
    engine.add(make_request(name, prompt, max_tokens, **options))
    seq = engine._sequences[name]
    assert engine.kv.admit(seq)
    while len(seq.output_ids) < tokens:
        engine.step()
    return seq


def preempt(engine, seq):
    """To the host, with all copies ended."""
    engine.kv.preempt(seq, Preempt.OFFLOAD)
    settle(engine)
    assert seq.state is State.PREEMPTED


def settle(engine):
    while engine.kv.transfers.active:
        engine.wait_for_transfers(0)


def finish(engine, host, name):
    """Let the default policy serve the rest; all tokens of the stream."""
    engine.policy = SlackPolicy()
    events = [e for e in engine.take_events() if e.request_id == name]
    return tokens_of(events + run_to_end(engine, host)[name])


def serve(engine, host, *requests):
    """Serve them to the end; their texts."""
    for request in requests:
        engine.add(request)
    events = run_to_end(engine, host)
    return [tokens_of(events[r.request_id]) for r in requests]


def test_a_prompt_seen_before_is_not_computed_again():
    engine, executor, host, _ = fake_engine()
    (first,) = serve(engine, host, make_request("a", PROMPT, 6))
    executor.steps.clear()
    (second,) = serve(engine, host, make_request("b", PROMPT, 6))
    assert first == second == expected_output(PROMPT, 6)
    # 40 tokens in blocks of 4; the last one has to be run for its logits.
    assert executor.steps[0] == [(36, 4)]
    assert engine.stats.prefix_queried_tokens == 80
    assert engine.stats.prefix_device_hit_tokens == 36
    assert engine.stats.prompt_tokens == 44


def test_the_next_turn_of_a_chat_computes_only_what_is_new():
    engine, executor, host, _ = fake_engine()
    (answer,) = serve(engine, host, make_request("a", PROMPT, 15))
    turn = [*PROMPT, *answer, 5, 6, 7, 8, 9]
    executor.steps.clear()
    (text,) = serve(engine, host, make_request("b", turn, 4))
    assert text == expected_output(turn, 4)
    # The last token drawn was never run: 54 tokens had KV, 13 blocks of them whole.
    assert executor.steps[0] == [(52, 8)]


def test_with_another_salt_or_no_cache_everything_is_computed():
    engine, executor, host, _ = fake_engine()
    serve(engine, host, make_request("a", PROMPT, 6, salt="x"))
    executor.steps.clear()
    (text,) = serve(engine, host, make_request("b", PROMPT, 6, salt="y"))
    assert text == expected_output(PROMPT, 6)
    assert engine.stats.prefix_device_hit_tokens == engine.stats.prefix_host_hit_tokens == 0
    assert engine.stats.prompt_tokens == 80
    engine, executor, host, _ = fake_engine(prefix_cache=False)
    serve(engine, host, make_request("a", PROMPT, 6), make_request("b", PROMPT, 6))
    assert engine.stats.prompt_tokens == 80
    assert not host.committed


def test_a_burst_of_one_prompt_computes_it_once():
    engine, _, host, _ = fake_engine(max_batch_tokens=256, blocks=200)
    requests = [make_request(f"{i}", [*PROMPT, i + 1], 5) for i in range(8)]
    texts = serve(engine, host, *requests)
    assert texts == [expected_output([*PROMPT, i + 1], 5) for i in range(8)]
    assert engine.stats.prompt_tokens == 41 + 7
    assert engine.stats.prefix_device_hit_tokens == 7 * 40


def test_shared_blocks_take_memory_once():
    # Alone each takes 11 of the 24 blocks.
    engine, _, host, _ = by_hand(blocks=24)
    start(engine, "0", PROMPT, 4, tokens=1)
    for i in range(1, 4):
        start(engine, f"{i}", PROMPT, 4, tokens=0)
    assert engine.kv.pool.free_blocks == 24 - 11 - 3 * 2
    engine.tracker.refresh()
    assert engine.tracker.held.tolist() == [11, 11, 11, 11]
    assert engine.tracker.blocks.tolist() == [11, 2, 2, 2]
    for i in range(4):
        engine.kv.preempt(engine._sequences[f"{i}"], Preempt.RECOMPUTE)
    settle(engine)
    assert engine.kv.pool.free_blocks == 24
    check_conservation(engine, host)


def test_a_prefix_on_the_host_is_loaded_by_a_replica_that_never_saw_it():
    one, _, host, _ = fake_engine(blocks=64)
    one.add(make_request("a", PROMPT, 20, rate=1000))
    run_to_end(one, host)
    other, executor, _, _ = fake_engine(blocks=64)
    other.kv.host = other.kv.transfers._host = host
    executor.host = one.executor.host
    other.add(make_request("b", PROMPT, 6))
    text = tokens_of(run_to_end(other, host)["b"])
    assert text == expected_output(PROMPT, 6)
    assert other.stats.prefix_host_hit_tokens == 36
    assert other.stats.prompt_tokens == 4
    assert other.stats.loaded_bytes == 9 * executor.layout.block_bytes


def test_what_is_still_on_the_device_is_not_loaded():
    engine, _, host, _ = by_hand()
    seq = start(engine, "a", PROMPT, 20, tokens=9)
    preempt(engine, seq)
    assert engine.kv.resume(seq)
    # 48 tokens had KV: whole blocks all of them.
    assert (seq.state, seq.num_computed) == (State.RUNNING, 48)
    assert engine.stats.loaded_bytes == 0
    assert finish(engine, host, "a") == expected_output(PROMPT, 20)


def test_a_tail_that_is_dearer_to_copy_is_dropped_and_computed():
    engine, executor, host, _ = by_hand(write_through=False)
    seq = start(engine, "a", PROMPT, 20, tokens=3)
    kv = engine.kv
    # Two blocks are on the host; then the link becomes dear.
    assert kv.reserve(seq, 2)
    kv.transfers.start(Kind.WRITE_THROUGH, kv.outgoing(seq, 0, 2))
    settle(engine)
    engine.cost.observe_offload(1, 1e6)
    kv.preempt(seq, Preempt.OFFLOAD)
    assert (seq.state, seq.num_computed) == (State.PREEMPTED, 8)
    assert not kv.transfers.active
    kv.pool.clear()
    executor.kv[:] = -1
    assert finish(engine, host, "a") == expected_output(PROMPT, 20)
    assert engine.stats.recomputed_tokens > 30


def test_blocks_are_written_to_the_host_once_however_many_hold_them():
    engine, executor, host, _ = fake_engine(blocks=200, host_slots=500)
    requests = [make_request(f"{i}", PROMPT, 8, rate=1000) for i in range(4)]
    serve(engine, host, *requests)
    assert len(host.committed) == len({commit.key for commit in host.committed.values()})
    # 47 tokens had KV: 11 whole blocks, written once (the texts are all the same).
    assert engine.stats.offloaded_bytes <= 11 * executor.layout.block_bytes


def test_a_loading_sequence_begins_in_the_blocks_that_are_free():
    engine, _, host, _ = by_hand(
        blocks=24, delay=5, write_through=False, prefix_cache=False, max_num_seqs=4
    )
    kv = engine.kv
    a = start(engine, "a", PROMPT, 20, tokens=3, rate=1000)
    preempt(engine, a)
    b = start(engine, "b", PROMPT[::-1], 20, tokens=3, rate=1000)
    c = start(engine, "c", PROMPT[:20], 20, tokens=1, rate=1000)
    assert kv.pool.free_blocks < 11
    kv.preempt(b, Preempt.OFFLOAD)
    ready = kv.pool.free_blocks
    assert kv.resume(a)
    assert (a.state, a.num_blocks) == (State.LOADING, ready)
    # What is promised to it is nobody else's, and its first copies are on their way.
    assert (kv.free_blocks, kv._loads[a].missing) == (0, 11 - ready)
    assert kv.transfers.queued(to_host=False) == ready
    assert not kv.grow(c, 1000)
    check_conservation(engine, host)
    engine.step()
    settle(engine)
    assert (a.state, a.num_blocks) == (State.RUNNING, 11)
    assert finish(engine, host, "a") == expected_output(PROMPT, 20)


def test_a_flipped_bit_in_host_memory_is_noticed_and_computed_again(caplog):
    engine, executor, host, _ = by_hand(verify_loads="full")
    seq = start(engine, "a", PROMPT, 30, tokens=9)
    preempt(engine, seq)
    engine.kv.pool.clear()
    bad = seq.host_slots[5]
    executor.host[bad, 2] ^= 1
    assert finish(engine, host, "a") == expected_output(PROMPT, 30)
    assert engine.stats.corrupt_blocks == 1
    assert engine.stats.recomputed_tokens >= 48 - 20
    assert "not what was written" in caplog.text
    assert bad not in host.committed, "a corrupt block stayed in the cache"


def test_sampled_verification_checks_one_block_in_sixty_four():
    engine, executor, host, _ = by_hand(
        blocks=300, host_slots=300, max_model_len=1200, max_batch_tokens=2000
    )
    seen = []
    load = executor.load
    executor.load = lambda pairs, expected: seen.extend(expected) or load(pairs, expected)
    seq = start(engine, "a", [i % 250 + 1 for i in range(1000)], 5, tokens=2)
    preempt(engine, seq)
    engine.kv.pool.clear()
    assert engine.kv.resume(seq)
    settle(engine)
    assert len(seen) == 251
    assert sum(checksum is not None for checksum in seen) == 3
    engine.cancel("a")
    check_conservation(engine, host)


def test_a_full_host_keeps_what_it_has_and_drops_the_rest():
    engine, _, host, _ = by_hand(host_slots=5)
    seq = start(engine, "a", PROMPT, 30, tokens=9)
    preempt(engine, seq)
    assert seq.num_computed == 20
    engine.kv.pool.clear()
    assert finish(engine, host, "a") == expected_output(PROMPT, 30)


def test_on_a_full_host_the_fullest_buffers_have_the_copies():
    engine, _, host, _ = by_hand(blocks=120, host_slots=12)
    hungry = start(engine, "hungry", PROMPT, 100, tokens=20, rate=1000)
    assert len(hungry.host_slots) == 12
    full = start(engine, "full", PROMPT[::-1], 100, tokens=20, rate=0.5)
    settle(engine)
    assert hungry.synced_blocks == 0
    assert full.synced_blocks >= 10
    # Among equals nobody gives way, or copies would chase each other round the host.
    before = engine.stats.offloaded_bytes
    other = start(engine, "other", PROMPT[5:] + PROMPT[:5], 100, tokens=20, rate=0.5)
    for _ in range(20):
        engine.step()
    assert other.synced_blocks == 0
    assert engine.stats.offloaded_bytes - before <= 3 * engine.executor.layout.block_bytes
    check_conservation(engine, host)


def test_a_finished_request_leaves_its_text_on_the_host():
    engine, _, host, _ = fake_engine()
    serve(engine, host, make_request("a", PROMPT, 10))
    assert sorted(commit.position for commit in host.committed.values()) == list(
        range(len(host.committed))
    )
    assert len(host.committed) >= 10
    assert {commit.request_id for commit in host.committed.values()} == {"a"}
