"""The engine over a fake model whose text shows every KV mistake."""

import pytest

from tests.support.engines import (
    check_conservation,
    fake_engine,
    make_request,
    run_to_end,
    tokens_of,
)
from tests.support.fake_executor import expected_output
from tokenflow.replicas.errors import CapacityError, InvalidRequestError
from tokenflow.replicas.request import State
from tokenflow.replicas.scheduler.fcfs import FCFSPolicy
from tokenflow.replicas.scheduler.policy import Preempt, compose_batch
from tokenflow.replicas.scheduler.slack import SlackPolicy

PROMPTS = [[(7 * i + j) % 250 + 1 for j in range(3 + 5 * i)] for i in range(6)]


@pytest.mark.parametrize("policy", ["fcfs", "slack"])
def test_outputs_are_right_with_room_to_spare(policy):
    engine, executor, host, _ = fake_engine(policy=policy)
    for i, prompt in enumerate(PROMPTS):
        engine.add(make_request(f"r{i}", prompt, 10 + i))
    events = run_to_end(engine, host)
    for i, prompt in enumerate(PROMPTS):
        assert tokens_of(events[f"r{i}"]) == expected_output(prompt, 10 + i)
        assert events[f"r{i}"][-1].finish_reason == "length"
    assert any(len(step) > 1 for step in executor.steps), "nothing was batched"
    assert any(any(n > 1 for _, n in s) and any(n == 1 for _, n in s) for s in executor.steps) == (
        policy == "slack"
    )


def test_long_prompts_are_prefilled_in_chunks():
    engine, executor, host, _ = fake_engine(max_batch_tokens=16)
    prompt = [i % 250 + 1 for i in range(70)]
    engine.add(make_request("a", prompt, 5))
    events = run_to_end(engine, host)
    assert tokens_of(events["a"]) == expected_output(prompt, 5)
    assert [n for step in executor.steps for _, n in step][:5] == [16, 16, 16, 16, 6]


@pytest.mark.parametrize("policy", ["fcfs", "slack"])
@pytest.mark.parametrize("delay", [0, 3])
def test_outputs_survive_memory_pressure(policy, delay):
    engine, _, host, _ = fake_engine(policy=policy, blocks=24, block_size=4, delay=delay)
    for i in range(12):
        engine.add(make_request(f"r{i}", PROMPTS[i % 3], 40, rate=5.0))
    events = run_to_end(engine, host)
    for i in range(12):
        assert tokens_of(events[f"r{i}"]) == expected_output(PROMPTS[i % 3], 40)
    if policy == "slack":
        assert engine.stats.preempted_offload > 0
        assert engine.stats.resumes > 0
        assert engine.stats.loaded_bytes > 0


def test_a_late_request_gets_its_first_token_before_the_early_ones_end():
    firsts = {}
    for policy in ("fcfs", "slack"):
        engine, *_ = fake_engine(policy=policy, blocks=24, block_size=4, tick=0.02)
        for i in range(8):
            engine.add(make_request(f"r{i}", PROMPTS[0], 60, rate=2.0))
        order = []
        while engine.has_work:
            engine.step()
            for event in engine.take_events():
                if event.offset == 0:
                    order.append(("first", event.request_id))
                if event.finish_reason:
                    order.append(("end", event.request_id))
        ended = order.index(next(o for o in order if o[0] == "end"))
        firsts[policy] = sum(what == "first" for what, _ in order[:ended])
    assert firsts["slack"] == 8 > firsts["fcfs"]


@pytest.mark.parametrize(
    "state", [State.WAITING, State.RUNNING, State.OFFLOADING, State.PREEMPTED, State.LOADING]
)
def test_cancel_frees_everything_in_every_state(state):
    engine, _, host, _ = fake_engine(delay=4)
    engine.add(make_request("a", PROMPTS[3], 50))
    seq = engine._sequences["a"]
    if state is not State.WAITING:
        while not seq.decoding:
            engine.step()
    if state in (State.OFFLOADING, State.PREEMPTED, State.LOADING):
        engine.kv.preempt(seq, Preempt.OFFLOAD)
        while state is not State.OFFLOADING and seq.state is State.OFFLOADING:
            engine.wait_for_transfers(0)
    if state is State.LOADING:
        engine.kv.resume(seq)
    assert seq.state is state
    assert engine.cancel("a")
    check_conservation(engine, host)
    assert not engine.cancel("a")
    events = run_to_end(engine, host)
    del events
    assert engine.stats.finished == {"cancelled": 1}


def test_a_failed_copy_means_recompute_never_wrong_text():
    engine, executor, host, _ = fake_engine()
    engine.add(make_request("a", PROMPTS[2], 40))
    seq = engine._sequences["a"]
    while len(seq.output_ids) < 10:
        engine.step()
    executor.fail_next_job = True
    engine.kv.preempt(seq, Preempt.OFFLOAD)
    while len(seq.output_ids) < 20:
        engine.step()
    while engine.kv.transfers.active:
        engine.wait_for_transfers(0)
    engine.kv.preempt(seq, Preempt.OFFLOAD)
    while seq.state is not State.PREEMPTED:
        engine.wait_for_transfers(0)
    executor.fail_next_job = True
    engine.kv.resume(seq)
    events = [e for e in engine.take_events()]
    rest = run_to_end(engine, host)["a"]
    assert tokens_of(events + rest) == expected_output(PROMPTS[2], 40)
    assert engine.stats.transfer_errors == 2


def test_without_host_memory_preemption_recomputes():
    engine, _, host, _ = fake_engine(blocks=20, host_slots=0)
    for i in range(6):
        engine.add(make_request(f"r{i}", PROMPTS[1], 50, rate=2.0))
    events = run_to_end(engine, host)
    for i in range(6):
        assert tokens_of(events[f"r{i}"]) == expected_output(PROMPTS[1], 50)
    assert engine.stats.preempted_recompute > 0
    assert engine.stats.preempted_offload == 0


def test_without_offload_nothing_is_copied_out():
    engine, _, host, _ = fake_engine(blocks=20, offload=False)
    for i in range(6):
        engine.add(make_request(f"r{i}", PROMPTS[1], 50, rate=2.0))
    events = run_to_end(engine, host)
    for i in range(6):
        assert tokens_of(events[f"r{i}"]) == expected_output(PROMPTS[1], 50)
    assert engine.stats.preempted_recompute > 0
    assert engine.stats.preempted_offload == engine.stats.offloaded_bytes == 0


def test_without_write_through_only_victims_are_copied_out():
    for on in (True, False):
        engine, _, host, _ = fake_engine(blocks=20, write_through=on)
        for i in range(6):
            engine.add(make_request(f"r{i}", PROMPTS[1], 50, rate=2.0))
        run_to_end(engine, host)
        assert (engine.stats.written_through_bytes > 0) == on
        assert engine.stats.offloaded_bytes > 0


def test_a_moved_request_goes_on_at_the_exact_token():
    whole = expected_output(PROMPTS[1], 30)
    engine, _, host, _ = fake_engine()
    engine.add(make_request("a", PROMPTS[1], 30, resumed=whole[:13]))
    events = run_to_end(engine, host)["a"]
    assert tokens_of(events) == whole[13:]
    assert events[0].offset == 13


def test_stop_ids_eos_and_min_tokens():
    whole = expected_output(PROMPTS[0], 20)
    engine, _, host, _ = fake_engine(eos_ids=(whole[4],))
    engine.add(make_request("eos", PROMPTS[0], 20))
    engine.add(make_request("ignore", PROMPTS[0], 20, ignore_eos=True))
    engine.add(make_request("id", PROMPTS[0], 20, stop_token_ids=(whole[2],)))
    events = run_to_end(engine, host)
    assert tokens_of(events["eos"]) == whole[:5]
    assert events["eos"][-1].finish_reason == "stop"
    assert tokens_of(events["ignore"]) == whole
    assert tokens_of(events["id"]) == whole[:3]


def test_stop_strings_cut_the_text():
    whole = expected_output(PROMPTS[0], 20)
    text = "".join(chr(0x4E00 + t) for t in whole)
    engine, _, host, _ = fake_engine()
    engine.add(make_request("a", PROMPTS[0], 20, stop=(text[6:9],)))
    events = run_to_end(engine, host)["a"]
    assert "".join(e.text for e in events) == text[:6]
    assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"),
    [([], 5, "prompt"), ([1, 999], 5, "prompt"), ([1] * 250, 100, "max_tokens")],
)
def test_impossible_requests_are_refused(prompt, max_tokens, param):
    engine, _, _, _ = fake_engine()
    with pytest.raises(InvalidRequestError) as caught:
        engine.check(make_request("a", prompt, max_tokens))
    assert caught.value.param == param


def test_a_full_queue_is_refused_with_a_retry():
    engine, _, _, _ = fake_engine()
    engine.config = engine.config.model_copy(update={"max_waiting": 1})
    engine.add(make_request("a", [1], 5))
    with pytest.raises(CapacityError) as caught:
        engine.check(make_request("b", [1], 5))
    assert caught.value.retry_after_s > 0


def test_duplicate_ids_are_refused():
    engine, _, _, _ = fake_engine()
    engine.add(make_request("a", [1], 5))
    with pytest.raises(InvalidRequestError):
        engine.add(make_request("a", [1], 5))


def test_a_policy_that_never_admits_cannot_kill_a_stream():
    class Lazy(SlackPolicy):
        def plan(self, view, now):
            plan = FCFSPolicy().plan(view, now)
            plan.admit.clear()
            plan.batch = compose_batch(view, view.running())
            return plan

    engine, _, host, _ = fake_engine(policy=Lazy())
    for i in range(3):
        engine.add(make_request(f"r{i}", PROMPTS[1], 8))
    events = run_to_end(engine, host)
    for i in range(3):
        assert tokens_of(events[f"r{i}"]) == expected_output(PROMPTS[1], 8)


@pytest.mark.parametrize("policy", ["fcfs", "slack"])
@pytest.mark.parametrize(("rate", "overloaded"), [(0.5, False), (1000.0, True)])
def test_overload_shows_in_the_gauges_while_it_lasts(policy, rate, overloaded):
    engine, *_ = fake_engine(policy=policy, blocks=64, tick=0.02)
    assert (engine.stats.now_capacity, engine.stats.now_overloaded) == (0.0, False)
    for i in range(6):
        engine.add(make_request(f"r{i}", PROMPTS[0], 60, rate=rate))
    seen = []
    while engine.has_work:
        engine.step()
        stats = engine.stats
        seen.append((stats.now_overloaded, stats.now_parked, stats.now_capacity))
    said, parked, capacity = zip(*seen, strict=True)
    assert (True in said) == overloaded
    assert (max(parked) == 5) == overloaded
    assert max(capacity) > 0
    assert (engine.stats.now_overloaded, engine.stats.now_parked) == (False, 0)


def test_a_stream_whose_reader_pauses_gives_its_memory_to_those_who_read():
    engine, _, host, _ = fake_engine(blocks=12, block_size=4, max_model_len=48)
    engine.add(make_request("paused", PROMPTS[0], 40))
    for _ in range(12):
        engine.step()
    engine.take_events()
    assert engine.pause("paused")
    engine.add(make_request("other", PROMPTS[1], 36, rate=1000.0))
    events = []
    while "other" in engine.requests:
        engine.step()
        check_conservation(engine, host)
        events += engine.take_events()
    assert tokens_of([e for e in events if e.request_id == "other"]) == expected_output(
        PROMPTS[1], 36
    )
    assert "paused" in engine.requests
    assert engine.resume("paused")
    assert engine.report_consumed("paused", 3)
    with pytest.raises(InvalidRequestError, match="between 0 and the"):
        engine.report_consumed("paused", 1000)
    run_to_end(engine, host)
    assert not engine.pause("paused") and not engine.resume("paused")
    assert not engine.report_consumed("paused", 0)


def test_a_moved_request_comes_with_its_readers_buffer():
    engine, _, _, clock = fake_engine(tick=0.0)
    tokens = expected_output(PROMPTS[0], 40)
    engine.add(make_request("ahead", PROMPTS[0], 40, resumed=tokens[:30], consumed=10))
    engine.add(make_request("even", PROMPTS[0], 40, resumed=tokens[:30]))
    engine.add(make_request("away", PROMPTS[0], 40, resumed=tokens[:30], paused=True))
    ahead, even, away = engine.tracker.sequences
    assert ahead.playback.buffer(clock()) == 20
    assert even.playback.buffer(clock()) == 0
    assert even.playback.slack_s(clock()) == pytest.approx(0.1)
    assert away.playback.paused
