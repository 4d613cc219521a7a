"""Steps launched ahead, and steps that do not fit the device: each stream is what it would be."""

from __future__ import annotations

import random

import pytest

from tests.support.engines import fake_engine, make_request, run_to_end, tokens_of
from tests.support.fake_executor import FakeHost, FakeTokenizer, expected_output
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.engine import Engine
from tokenflow.replicas.errors import ConfigError, InvalidRequestError, StepMemoryError
from tokenflow.replicas.executor.base import KVLayout
from tokenflow.replicas.request import Request
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy
from tokenflow.replicas.simulator.executor import SimExecutor, VirtualClock


def requests(seed: int) -> list[Request]:
    """Some end at a stop token, some at a stop string, some at their limit."""
    rng = random.Random(seed)
    made = []
    for i in range(12):
        prompt = [rng.randrange(1, 250) for _ in range(rng.randrange(1, 40))]
        output = expected_output(prompt, 30)
        at = rng.randrange(30)
        stops = [
            {},
            {"stop_token_ids": (output[at],)},
            {"stop": ("".join(chr(0x4E00 + t) for t in output[at : at + 2]),)},
            {"stop_token_ids": (output[at],), "min_tokens": 12},
        ]
        rate = rng.choice([0.5, 5.0, 50.0])
        made.append(make_request(f"{i}", prompt, 30, rate=rate, **stops[i % 4]))
    return made


def streams(policy: str, seed: int, *, ahead: bool, cancel: int | None = None):
    """(tokens, texts, reason) of each request, on a device too small for all."""
    engine, _, host, _ = fake_engine(
        policy=policy, blocks=24, max_num_seqs=6, async_scheduling=ahead, host_slots=60
    )
    for request in requests(seed):
        engine.add(request)
    if cancel is not None:
        for _ in range(cancel):
            engine.step()
        assert engine.cancel("0")
    return {
        name: (
            [e.token_id for e in events],
            [e.text for e in events],
            events[-1].finish_reason,
        )
        for name, events in run_to_end(engine, host).items()
    }, engine


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_streams_and_their_ends_are_the_same(policy):
    preempted = 0
    for seed in range(6):
        one_by_one, _ = streams(policy, seed, ahead=False)
        ahead, engine = streams(policy, seed, ahead=True)
        assert ahead == one_by_one
        assert len(ahead) == 12
        preempted += engine.stats.preemptions
    assert preempted > 0


def test_a_cancelled_stream_gets_no_token_more():
    for step in range(1, 12):
        ahead, _ = streams("fcfs", 3, ahead=True, cancel=step)
        tokens, _, reason = ahead["0"]
        assert reason == "cancelled" and tokens[-1] == -1 and -1 not in tokens[:-1]
        prompt = requests(3)[0].prompt_ids
        assert tokens[:-1] == expected_output(list(prompt), 30)[: len(tokens) - 1]


def test_the_next_step_is_launched_before_the_last_is_looked_at():
    engine, executor, host, _ = fake_engine(async_scheduling=True)
    engine.add(make_request("a", [1, 2, 3], 4))
    engine.step()
    assert len(executor.steps) == 1 and not engine.take_events()
    engine.step()
    assert len(executor.steps) == 2
    assert [e.offset for e in engine.take_events()] == [0]
    events = run_to_end(engine, host)["a"]
    assert [e.token_id for e in events] == expected_output([1, 2, 3], 4)[1:]
    # The end by length is foreseen: no step is run for nothing.
    assert len(executor.steps) == 4
    assert engine.stats.generated_tokens == 4


def test_a_stop_costs_one_step_that_nobody_sees():
    output = expected_output([5, 6], 20)
    engine, executor, host, _ = fake_engine(async_scheduling=True)
    engine.add(make_request("a", [5, 6], 20, stop_token_ids=(output[3],)))
    events = run_to_end(engine, host)["a"]
    assert tokens_of(events) == output[:4]
    assert len(executor.steps) == 5
    assert engine.stats.generated_tokens == 4


def test_the_reader_cannot_have_consumed_what_is_not_known():
    engine, _, _, _ = fake_engine(async_scheduling=True)
    engine.add(make_request("a", [1, 2, 3], 9))
    engine.step()
    engine.step()
    (seq,) = engine.tracker.sequences
    assert len(seq.output_ids) == 2 and seq.drawn == 1
    assert engine.report_consumed("a", 1)
    with pytest.raises(InvalidRequestError, match="0 and the 1 tokens"):
        engine.report_consumed("a", 2)


def test_an_executor_that_cannot_is_refused():
    layout = KVLayout(1, 4, 1, 1, "float32")
    executor = SimExecutor(VirtualClock(), None, layout, 8, link_gb_s=1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"async_scheduling.*SimExecutor"):
        Engine(
            executor,
            make_policy("fcfs"),
            FakeHost(8),
            EngineConfig(block_size=4, async_scheduling=True),
            tokenizer=FakeTokenizer(),
            eos_ids=(),
            max_model_len=32,
        )


def out_of_memory_over(executor, most):
    """The executor has memory for steps of at most so many tokens."""
    execute = executor.execute

    def limited(batch):
        tokens = sum(len(s.token_ids) for s in batch)
        if tokens > most:
            raise StepMemoryError(f"{tokens} tokens")
        return execute(batch)

    executor.execute = limited


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("most", [1, 5])
def test_a_step_that_does_not_fit_the_device_is_made_smaller(ahead, most):
    engine, executor, host, _ = fake_engine(async_scheduling=ahead)
    out_of_memory_over(executor, most)
    prompts = {f"{i}": [i + 1, 7, 9, 4, 2] for i in range(6)}
    for name, prompt in prompts.items():
        engine.add(make_request(name, prompt, 8))
    events = run_to_end(engine, host)
    for name, prompt in prompts.items():
        assert tokens_of(events[name]) == expected_output(prompt, 8)
    assert engine.stats.out_of_memory > 0
    assert all(sum(n for _, n in step) <= most for step in executor.steps)


def test_steps_grow_again_when_there_is_memory():
    engine, executor, host, _ = fake_engine(max_batch_tokens=32)
    execute = executor.execute
    out_of_memory_over(executor, 5)
    engine.add(make_request("a", list(range(1, 31)), 200))
    engine.step()
    assert executor.steps == [[(0, 3)]]
    executor.execute = execute
    while len(executor.steps) < 300 and engine.has_work:
        engine.step()
    engine.add(make_request("b", list(range(1, 31)), 2, salt="other"))
    run_to_end(engine, host)
    # From 3 tokens, doubled three times.
    assert max(n for step in executor.steps for _, n in step) == 24


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_never_fits_fails_alone(ahead):
    engine, executor, host, _ = fake_engine(async_scheduling=ahead)
    execute = executor.execute

    def picky(batch):
        if any(s.prompt_ids[0] == 99 for s in batch):
            raise StepMemoryError("not that one")
        return execute(batch)

    executor.execute = picky
    engine.add(make_request("bad", [99, 1, 2], 5))
    engine.add(make_request("good", [1, 2, 3], 5))
    events = run_to_end(engine, host)
    assert events["bad"][-1].finish_reason == "error"
    assert "not that one" in events["bad"][-1].error
    assert tokens_of(events["good"]) == expected_output([1, 2, 3], 5)
