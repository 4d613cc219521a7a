"""Whatever arrives, leaves, fails or is cancelled: every stream is right and nothing leaks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engines import check_conservation, fake_engine, make_request, tokens_of
from tests.support.fake_executor import expected_output
from tokenflow.replicas.scheduler.registry import POLICIES

requests = st.lists(
    st.tuples(
        st.integers(1, 60),  # prompt length
        st.integers(1, 50),  # max_tokens
        st.sampled_from([0.5, 2.0, 10.0, 500.0]),  # rate
        st.integers(0, 40),  # arrives before this step
        st.one_of(st.none(), st.integers(1, 80)),  # cancelled before this step
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(
    requests,
    st.sampled_from(sorted(POLICIES)),
    st.integers(29, 60),
    st.sampled_from([0, 8, 40, 200]),
    st.integers(0, 4),
    st.integers(2, 8),
    st.sampled_from([0.001, 0.05]),
    st.sets(st.integers(1, 60), max_size=4),
)
def test_streams_are_right_and_memory_is_conserved(
    specs, policy, blocks, host_slots, delay, max_num_seqs, tick, failures
):
    engine, executor, host, clock = fake_engine(
        policy=policy,
        blocks=blocks,
        block_size=4,
        host_slots=host_slots,
        delay=delay,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=24,
        max_model_len=110,
        tick=tick,
    )
    streams: dict[str, list] = {}
    step = 0
    pending = sorted(enumerate(specs), key=lambda item: item[1][3])
    cancels = {i: spec[4] for i, spec in enumerate(specs) if spec[4] is not None}
    while pending or engine.has_work:
        while pending and pending[0][1][3] <= step:
            i, (length, max_tokens, rate, _, _) = pending.pop(0)
            prompt = [(i * 13 + j) % 250 + 1 for j in range(length)]
            request = make_request(f"{i}", prompt, max_tokens, rate=rate, arrival_s=clock())
            engine.check(request)
            engine.add(request)
            streams[f"{i}"] = []
        for i, at in list(cancels.items()):
            if at <= step:
                engine.cancel(f"{i}")
                del cancels[i]
        executor.fail_next_job = step in failures
        engine.step()
        check_conservation(engine, host)
        for event in engine.take_events():
            streams[event.request_id].append(event)
        step += 1
        assert step < 20_000, "no progress"
    assert engine.pool.free_blocks == blocks
    assert len(host.free) == host_slots
    for i, (length, max_tokens, *_rest) in enumerate(specs):
        events = streams[f"{i}"]
        prompt = [(i * 13 + j) % 250 + 1 for j in range(length)]
        expected = expected_output(prompt, max_tokens)
        if events[-1].finish_reason == "cancelled":
            got = [e.token_id for e in events if e.token_id >= 0]
            assert got == expected[: len(got)]
        else:
            assert tokens_of(events) == expected
