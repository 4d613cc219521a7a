"""The sampler draws from the exact distribution, and each row's draw depends on that row alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.executor.base import UNKNOWN, ScheduledSequence, TokenLogprobs
from tokenflow.replicas.sampling import sampler
from tokenflow.replicas.sampling.params import MAX_LOGPROBS, SamplingParams
from tokenflow.replicas.sampling.sampler import sample

LOGITS = (2.0, -1.0, 1.2, 0.1, 1.19, -3.0, 0.6, -0.2)
SEEDS, POSITIONS = 80, 80


def row(
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    suppress: tuple[int, ...] = (),
    **params: Any,
) -> ScheduledSequence:
    return ScheduledSequence(
        slot=0,
        token_ids=(0,),
        start=0,
        block_ids=np.zeros(1, np.int32),
        sample=True,
        params=SamplingParams(max_tokens=1000, **params),
        prompt_ids=prompt,
        output_ids=output,
        suppress_ids=suppress,
    )


def draw(
    logits: Any, rows: list[ScheduledSequence]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    return sample(torch.tensor(np.asarray(logits), dtype=torch.float32), rows)


def grid(**settings: Any) -> list[ScheduledSequence]:
    """One row for each seed and position."""
    return [
        replace(one, output_ids=(0,) * position)
        for one in (row(seed=seed, **settings) for seed in range(SEEDS))
        for position in range(POSITIONS)
    ]


def shares(
    logits: tuple[float, ...] = LOGITS, suppress: tuple[int, ...] = (), **params: Any
) -> np.ndarray:
    """How often each token is drawn, over all seeds and positions."""
    rows = grid(suppress=suppress, **params)
    ids, _ = draw(np.tile(logits, (len(rows), 1)), rows)
    return np.bincount(ids, minlength=len(logits)) / len(rows)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def filtered_softmax(
    logits: tuple[float, ...],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """min-p, then top-k, then top-p of what is left: the order of vLLM."""
    probs = softmax(np.array(logits, float) / temperature)
    probs = np.where(probs >= min_p * probs.max(), probs, 0)
    ranked = sorted(range(len(probs)), key=lambda t: -probs[t])
    if top_k > 0:
        probs[ranked[top_k:]] = 0
    probs /= probs.sum()
    mass = 0.0
    for token in ranked:
        if mass >= top_p:
            probs[token] = 0
        mass += probs[token]
    return probs / probs.sum()


def assert_drawn_from(observed: np.ndarray, expected: np.ndarray, n: int) -> None:
    """Within 4 standard deviations; what has no probability is never drawn."""
    sigma = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(observed - expected) <= 4 * sigma + 1e-12), (observed, expected)


def test_temperature_zero_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(50, 30))
    ids, logprobs = draw(logits, [row(temperature=0.0, seed=i) for i in range(50)])
    assert ids == logits.argmax(-1).tolist()
    assert logprobs == [None] * 50


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_k": -1},
        {"top_p": 0.05},
        {"top_p": 0.7},
        {"top_p": 0.95},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_p": 0.7},
        {"temperature": 0.5, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 5, "min_p": 0.2},
        {"top_k": 2, "top_p": 0.65},
        {"min_p": 0.4, "top_p": 0.75},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_filtered_softmax(params):
    assert_drawn_from(shares(**params), filtered_softmax(LOGITS, **params), SEEDS * POSITIONS)


@pytest.mark.parametrize("along", ["seed", "position"])
def test_neighbouring_draws_are_independent(along):
    logits = (0.5, 0.0, -0.5)
    rows = grid()
    ids = np.array(draw(np.tile(logits, (len(rows), 1)), rows)[0]).reshape(SEEDS, POSITIONS)
    if along == "seed":
        ids = ids.T
    pairs = ids[:, :-1:2] * 3 + ids[:, 1::2]
    p = softmax(np.array(logits))
    observed = np.bincount(pairs.ravel(), minlength=9) / pairs.size
    assert_drawn_from(observed, np.outer(p, p).ravel(), pairs.size)


def test_a_row_draws_the_same_token_in_any_company():
    rng = np.random.default_rng(1)
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.05, "presence_penalty": 1.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_k": 20, "top_p": 0.8},
        {"logit_bias": {3: 4.0, 7: -4.0}},
        {"logprobs": 3, "temperature": 1.5},
    ]
    rows = [
        row(
            prompt=tuple(rng.integers(0, 40, 5).tolist()),
            output=tuple(rng.integers(0, 40, int(rng.integers(0, 30))).tolist()),
            suppress=(2, 5) if i % 3 == 0 else (),
            seed=int(rng.integers(-(2**63), 2**63)),
            **choices[i % len(choices)],
        )
        for i in range(64)
    ]
    logits = rng.normal(0, 2, (64, 40))
    together, _ = draw(logits, rows)
    alone = [draw(logits[i : i + 1], [rows[i]])[0][0] for i in range(64)]
    order = rng.permutation(64)
    shuffled, _ = draw(logits[order], [rows[i] for i in order])
    assert together == alone
    assert shuffled == [together[i] for i in order]


def test_seed_and_position_both_change_the_draw():
    logits = np.zeros((100, 1000))
    by_seed, _ = draw(logits, [row(seed=i) for i in range(100)])
    by_position, _ = draw(logits, [row(output=(0,) * i) for i in range(100)])
    assert len(set(by_seed)) > 80
    assert len(set(by_position)) > 80


def test_the_extreme_seeds_work():
    seeds = (-(2**63), 2**63 - 1, -1, 0)
    ids, _ = draw(np.zeros((4, 1000)), [row(seed=s) for s in seeds])
    assert len(set(ids)) == 4


def penalized(logits: np.ndarray, r: ScheduledSequence) -> np.ndarray:
    """The formulas of vLLM and transformers, token by token."""
    out = logits.copy()
    p = r.params
    for token in range(len(out)):
        if token in r.prompt_ids or token in r.output_ids:
            score = out[token]
            factor = p.repetition_penalty
            out[token] = score / factor if score > 0 else score * factor
        count = list(r.output_ids).count(token)
        out[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    return out


def penalty_rows(
    rng: np.random.Generator, n: int, **params: float
) -> tuple[np.ndarray, list[ScheduledSequence]]:
    rows = [
        row(
            prompt=tuple(rng.integers(0, 8, 3).tolist()),
            output=tuple(rng.integers(0, 8, int(rng.integers(0, 6))).tolist()),
            temperature=0.0,
            **params,
        )
        for _ in range(n)
    ]
    return rng.normal(0, 1, (n, 8)).astype(np.float32), rows


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties_follow_their_formulas(params):
    logits, rows = penalty_rows(np.random.default_rng(2), 300, **params)
    expected = [
        int(penalized(one, r).argmax()) for one, r in zip(logits.astype(float), rows, strict=True)
    ]
    ids, _ = draw(logits, rows)
    assert ids == expected
    assert ids != logits.argmax(-1).tolist(), "the penalties changed nothing"


def test_presence_and_frequency_ignore_the_prompt():
    rows = [
        row(prompt=(0, 0, 0), temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0),
        row(prompt=(0,), temperature=0.0, repetition_penalty=10.0),
    ]
    assert draw([[1.0, 0.9], [1.0, 0.9]], rows)[0] == [0, 1]


def test_penalties_come_before_temperature_and_filters():
    params = {"repetition_penalty": 1.5, "temperature": 0.6, "top_k": 3}
    rows = [row(prompt=(0, 1), seed=seed, **params) for seed in range(4000)]
    adjusted = penalized(np.array(LOGITS), rows[0])
    ids, _ = draw(np.tile(LOGITS, (len(rows), 1)), rows)
    expected = filtered_softmax(tuple(adjusted), temperature=0.6, top_k=3)
    assert_drawn_from(np.bincount(ids, minlength=8) / len(ids), expected, len(ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_100_forces_and_of_minus_100_forbids(temperature):
    n = 500
    forced, _ = draw(
        np.tile(LOGITS, (n, 1)),
        [row(seed=i, temperature=temperature, logit_bias={5: 100.0}) for i in range(n)],
    )
    assert set(forced) == {5}
    others = {token: -100.0 for token in (0, 2, 4)}
    left, _ = draw(
        np.tile(LOGITS, (n, 1)),
        [row(seed=i, temperature=temperature, logit_bias=others) for i in range(n)],
    )
    assert not set(left) & set(others)


def test_a_small_bias_shifts_the_distribution():
    biased = tuple(x + {1: 2.5, 0: -1.0}.get(i, 0.0) for i, x in enumerate(LOGITS))
    observed = shares(logit_bias={1: 2.5, 0: -1.0})
    assert_drawn_from(observed, filtered_softmax(biased), SEEDS * POSITIONS)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 4}], ids=str)
def test_suppressed_ids_are_never_drawn(params):
    without = tuple(-math.inf if i in (0, 4) else x for i, x in enumerate(LOGITS))
    observed = shares(suppress=(0, 4), **params)
    assert_drawn_from(observed, filtered_softmax(without, **params), SEEDS * POSITIONS)


def test_suppressing_beats_a_bias():
    ids, _ = draw([LOGITS], [row(temperature=0.0, suppress=(0,), logit_bias={0: 100.0})])
    assert ids == [2]


# The hash of this seed and this id is all ones where the noise is taken from.
EXTREME_SEED, EXTREME_ID = 17773, 635


@pytest.mark.parametrize(
    "params", [{"suppress": (EXTREME_ID,)}, {"top_k": 1}, {"top_p": 0.5}, {}], ids=str
)
def test_the_largest_noise_does_not_draw_an_impossible_token(params):
    logits = np.zeros((1, 4096))
    logits[0, 7] = 60.0
    assert draw(logits, [row(seed=EXTREME_SEED, **params)])[0] == [7]


def test_logprobs_are_of_the_unmodified_distribution():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (6, 50))
    adjust: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 10,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "logit_bias": {1: 5.0},
    }
    rows = [
        row(prompt=(1, 2), output=(3,), logprobs=0, **adjust),
        row(prompt=(1, 2), output=(3,), suppress=(4,), logprobs=5, **adjust),
        row(logprobs=MAX_LOGPROBS),
        row(),
        row(temperature=0.0, logprobs=1),
        row(temperature=0.0, logprobs=2, logit_bias={9: 100.0}),
    ]
    ids, logprobs = draw(logits, rows)
    reference = np.log(softmax(logits))
    assert [len(lp.top) if lp else None for lp in logprobs] == [0, 5, MAX_LOGPROBS, None, 1, 2]
    for i, lp in enumerate(logprobs):
        if lp is None:
            continue
        assert lp.chosen == pytest.approx(reference[i, ids[i]], abs=1e-5)
        ranked = np.argsort(-reference[i])[: len(lp.top)]
        assert [token for token, _ in lp.top] == ranked.tolist()
        assert [value for _, value in lp.top] == pytest.approx(reference[i, ranked], abs=1e-5)
    assert ids[5] == 9


def test_more_logprobs_than_tokens_gives_all_of_them():
    _, (logprobs,) = draw([[0.0, 1.0, 2.0]], [row(logprobs=20)])
    assert logprobs is not None
    assert [token for token, _ in logprobs.top] == [2, 1, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("min_tokens", -1),
        ("min_tokens", 11),
        ("temperature", -0.01),
        ("temperature", 2.01),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.5),
        ("repetition_penalty", math.inf),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -math.inf),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ("",)),
        ("stop", ("a", "")),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: -100.5}),
        ("logit_bias", {1: 1.0, 2: math.nan}),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{"max_tokens": 10, field: value})
    assert caught.value.param == field
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("min_tokens", 10),
        ("temperature", 0.0),
        ("temperature", 2),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 10),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("seed", 2**63 - 1),
        ("seed", -(2**63)),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("logit_bias", {1: 100, 2: -100}),
    ],
)
def test_values_at_the_edge_are_taken_and_drawn_with(field, value):
    params = SamplingParams(**{"max_tokens": 10, field: value})
    one = row(output=(1,))
    one.params = params
    ids, _ = draw([LOGITS], [one])
    assert 0 <= ids[0] < len(LOGITS)


def test_a_top_k_beyond_64_bits_means_off():
    for seed in range(20):
        assert draw([LOGITS], [row(seed=seed, top_k=2**70)]) == draw([LOGITS], [row(seed=seed)])


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 0.7}, {"repetition_penalty": 3.0}],
)
def test_a_token_that_only_the_device_knows_is_penalized_alike(params):
    logits = torch.tensor([LOGITS, LOGITS])
    known = [row((1,), (2, last), temperature=0.0, **params) for last in (0, 2)]
    unknown = [row((1,), (2, UNKNOWN), temperature=0.0, **params)] * 2
    expected = sampler._adjust(logits.clone(), known, None)
    found = sampler._adjust(logits.clone(), unknown, torch.tensor([0, 2]))
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])
