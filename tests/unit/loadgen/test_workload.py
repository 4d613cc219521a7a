"""Arrivals, lengths, readers, and the workloads they make: the achieved against the asked."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from tests.support.shared_data import shared_file
from tokenflow.cluster.config import embedded_model
from tokenflow.loadgen.arrivals import Gamma, Poisson, Ramp, parse_arrivals
from tokenflow.loadgen.description import load_description
from tokenflow.loadgen.lengths import parse_lengths
from tokenflow.loadgen.prompts import id_prompt, load_tokenizer, story_prompt, word_prompt
from tokenflow.loadgen.readers import parse_readers
from tokenflow.loadgen.workload import Ask, load_workload, make_workload
from tokenflow.replicas.errors import ConfigError


def describe(**fields):
    return load_description(None, {"target": {"kind": "grpc", "address": "h:1"}, **fields})


def workload(seed: int = 1, **fields):
    return make_workload(describe(**fields), seed)


# -- arrivals -------------------------------------------------------------------------------------


def gaps(times):
    return [b - a for a, b in pairwise(times)]


def variation(values):
    return pstdev(values) / fmean(values)


@pytest.mark.parametrize(
    ("process", "cv"),
    [
        (Poisson(per_s=50, duration_s=400), 1.0),
        (Gamma(per_s=50, cv=3, duration_s=400), 3.0),
        (Gamma(per_s=50, cv=0.3, duration_s=400), 0.3),
    ],
)
def test_arrivals_are_as_many_and_as_uneven_as_asked(process, cv):
    times = process.times(random.Random(3))
    expected = 50 * 400
    assert abs(len(times) - expected) < 4 * cv * math.sqrt(expected)
    assert variation(gaps(times)) == pytest.approx(cv, rel=0.08)
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 400


def test_poisson_gaps_are_exponential():
    """Kolmogorov-Smirnov against 1 - exp(-x), at the 1 % level."""
    found = sorted(gaps(Poisson(per_s=10, duration_s=500).times(random.Random(7))))
    n = len(found)
    distance = max(
        abs((i + 1) / n - (1 - math.exp(-10 * gap))) for i, gap in enumerate(found)
    )  # fmt: skip
    assert distance < 1.63 / math.sqrt(n)


@pytest.mark.parametrize(("low", "high"), [(1, 9), (9, 1), (0, 8), (5, 5)])
def test_a_ramp_goes_from_one_rate_to_the_other(low, high):
    times = Ramp(from_per_s=low, to_per_s=high, duration_s=1000).times(random.Random(1))
    first = sum(at < 500 for at in times)
    expected_first = (low * 3 + high) / 4 * 500
    assert first == pytest.approx(expected_first, abs=5 * math.sqrt(expected_first))
    assert len(times) == pytest.approx((low + high) / 2 * 1000, rel=0.06)
    assert times == sorted(times) and times[0] > 0 and times[-1] <= 1000


def test_the_short_forms_of_arrivals():
    assert parse_arrivals("burst:40").count == 40
    assert parse_arrivals("poisson:4").per_s == 4
    gamma = parse_arrivals("gamma:4,cv=3,duration_s=30")
    assert (gamma.per_s, gamma.cv, gamma.duration_s) == (4, 3, 30)
    ramp = parse_arrivals("ramp:1-8")
    assert (ramp.from_per_s, ramp.to_per_s) == (1, 8)
    trace = parse_arrivals("trace:/a/b.csv,time_scale=0.1,max_requests=5")
    assert (trace.path, trace.time_scale, trace.max_requests) == ("/a/b.csv", 0.1, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "none of burst"),
        ("flood:4", "none of burst"),
        ("burst:", "count"),
        ("burst:0", "count: Input should be greater"),
        ("poisson:-1", "per_s"),
        ("poisson:4,cv=2", "cv: there is no such field"),
        ("gamma:4,cv=0", "cv"),
        ("ramp:0-0", "cannot both be 0"),
        ("ramp:3", "to_per_s"),
        ("trace:", "path"),
        ("trace:x,time_scale=0", "time_scale"),
        ("poisson:nan", "per_s"),
    ],
)
def test_arrivals_that_make_no_sense(text, words):
    with pytest.raises(ConfigError, match=f"--arrivals: .*{words}"):
        parse_arrivals(text)


# -- lengths and readers --------------------------------------------------------------------------


def drawn(text: str, n: int = 4000) -> list[int]:
    lengths, rng = parse_lengths("--input", text), random.Random(2)
    return [lengths.draw(rng) for _ in range(n)]


def test_lengths_follow_their_distribution():
    assert set(drawn("128")) == {128}
    normal = drawn("normal:512,128")
    assert fmean(normal) == pytest.approx(512, rel=0.02)
    assert pstdev(normal) == pytest.approx(128, rel=0.05)
    assert min(drawn("normal:2,50")) == 1
    uniform = drawn("uniform:10,20")
    assert (min(uniform), max(uniform)) == (10, 20) and fmean(uniform) == pytest.approx(
        15, rel=0.02
    )
    log = sorted(drawn("lognormal:200,0.8"))
    assert log[2000] == pytest.approx(200, rel=0.06)
    assert math.log(log[3364] / log[636]) / 2 == pytest.approx(0.8, rel=0.08)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "1.5", "normal:5", "normal:a,b", "uniform:9,3", "lognormal:0,1", "trace:x"],
)
def test_lengths_that_make_no_sense(text):
    with pytest.raises(ConfigError, match="--output: "):
        parse_lengths("--output", text)


def test_readers_by_number_and_by_name():
    found = parse_readers("15@0.4,read@0.5,agent@0.1,max")
    assert [(r.rate, r.share) for r in found] == [
        (15, 0.4),
        (6, 0.5),
        (math.inf, 0.1),
        (math.inf, 1),
    ]
    presets = parse_readers("listen,skim,fast,fast25,fast30")
    assert [reader.rate for reader in presets] == [4, 15, 20, 25, 30]


@pytest.mark.parametrize("text", ["", "slow", "0", "2000", "nan", "10@0", "10@x", "10@-1", "10,,3"])
def test_readers_that_make_no_sense(text):
    with pytest.raises(ConfigError, match="--rate: "):
        parse_readers(text)


# -- workloads ------------------------------------------------------------------------------------

MIXED = {
    "arrivals": {"kind": "poisson", "per_s": 20, "duration_s": 50},
    "prompt": {"kind": "normal", "mean": 600, "deviation": 100},
    "output": {"kind": "uniform", "low": 10, "high": 90},
    "readers": [{"token_rate": "read", "share": 3}, {"token_rate": "max", "share": 1}],
    "behaviours": [
        {"kind": "disconnect", "share": 0.2, "after_tokens": 5},
        {"kind": "stall", "share": 0.1, "after_tokens": 3, "seconds": 2},
        {"kind": "change_speed", "share": 0.1, "after_tokens": 4, "token_rate": 30},
    ],
    "conversation": {"turns": {"kind": "uniform", "low": 1, "high": 3}, "think_s": 4.0},
}


def test_the_same_seed_is_the_same_file():
    assert workload(7, **MIXED).to_jsonl() == workload(7, **MIXED).to_jsonl()
    assert workload(7, **MIXED).sha256 != workload(8, **MIXED).sha256


def test_each_aspect_has_its_own_chance():
    """Other readers leave arrivals, lengths and texts as they were."""
    one = workload(7, **MIXED).asks
    other = workload(7, **MIXED | {"readers": [{"token_rate": 10}]}).asks
    for a, b in zip(one, other, strict=True):
        assert (a.at_s, a.prompt_tokens, a.output_tokens, a.seed, a.behaviour) == (
            b.at_s, b.prompt_tokens, b.output_tokens, b.seed, b.behaviour
        )  # fmt: skip


def test_shares_are_kept():
    asks = workload(3, **MIXED).asks
    sessions = {ask.session: ask for ask in asks}
    share = sum(ask.token_rate == math.inf for ask in sessions.values()) / len(sessions)
    assert share == pytest.approx(0.25, abs=0.05)
    kinds = Counter(ask.behaviour.kind if ask.behaviour else None for ask in asks)
    for kind, expected in (("disconnect", 0.2), ("stall", 0.1), ("change_speed", 0.1)):
        assert kinds[kind] / len(asks) == pytest.approx(expected, abs=0.03)


def test_conversations():
    sessions = workload(3, **MIXED).sessions
    assert {len(turns) for turns in sessions} == {1, 2, 3}
    for turns in sessions:
        assert [ask.turn for ask in turns] == list(range(len(turns)))
        assert len({(ask.at_s, ask.token_rate) for ask in turns}) == 1
        assert turns[0].think_s == 0
    pauses = [ask.think_s for turns in sessions for ask in turns[1:]]
    assert fmean(pauses) == pytest.approx(4.0, rel=0.12)


def test_a_saved_workload_is_the_workload(tmp_path):
    made = workload(5, **MIXED)
    path = tmp_path / "workload.jsonl"
    path.write_text(made.to_jsonl())
    assert load_workload(path) == made
    assert load_workload(path).sha256 == made.sha256


def test_the_file_is_mooncakes():
    lines = [json.loads(line) for line in workload(5, **MIXED).to_jsonl().splitlines()]
    asks = workload(5, **MIXED).asks
    seen: set[int] = set()
    for line, ask in zip(lines, asks, strict=True):
        assert line["timestamp"] == pytest.approx(ask.at_s * 1000)
        assert line["output_length"] == ask.output_tokens
        assert len(line["hash_ids"]) == math.ceil(line["input_length"] / 512)
        if ask.turn == 0:
            assert line["input_length"] == ask.prompt_tokens
            assert not seen & set(line["hash_ids"])
        seen |= set(line["hash_ids"])
    later = [(a, b) for a, b in pairwise(zip(lines, asks, strict=True)) if b[1].turn]
    assert later
    for (before, first), (line, second) in later:
        said = before["input_length"] + first.output_tokens
        assert line["input_length"] == said + second.prompt_tokens
        shared = min(before["input_length"], said) // 512
        assert line["hash_ids"][:shared] == before["hash_ids"][:shared]


def test_a_plain_trace_is_no_saved_workload(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n')
    with pytest.raises(ConfigError, match=r":1: this is a trace .* --arrivals trace:FILE"):
        load_workload(path)
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5, "tokenflow": {}}\n')
    with pytest.raises(ConfigError, match=r":1: the 'tokenflow' part is damaged"):
        load_workload(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no requests"):
        load_workload(path)


def test_nobody_arrives():
    with pytest.raises(ConfigError, match="nobody arrives"):
        workload(1, arrivals={"kind": "poisson", "per_s": 0.001, "duration_s": 0.001})


# -- traces ---------------------------------------------------------------------------------------


def test_a_trace_is_replayed_with_its_lengths(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n5,10,20\n7,3000,40\n9,50,600\n")
    asks = workload(
        1,
        arrivals={"kind": "trace", "path": str(path), "time_scale": 0.5, "max_input_tokens": 1000,
                  "max_output_tokens": 100},
        prompt={"kind": "trace"}, output={"kind": "trace"},
    ).asks  # fmt: skip
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in asks] == [
        (0, 10, 20), (1, 1000, 40), (2, 50, 100)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count", "spread_s"),
    [
        ("burstgpt2_gpt4_894s_raw.csv", 423, 1.0),
        ("azure_conv_peak_requests_20min.csv", 8267, 0.0),
        ("mooncake_peak_requests_20min.csv", 4470, 3.0),
    ],
)
def test_public_traces(name, count, spread_s):
    path = shared_file(f"data/traces/{name}")
    made = workload(
        1,
        arrivals={"kind": "trace", "path": str(path), "time_scale": 0.1, "spread_s": spread_s},
        prompt={"kind": "trace"}, output={"kind": "trace"},
    )  # fmt: skip
    times = [ask.at_s for ask in made.asks]
    assert len(times) == count and times == sorted(times) and times[0] == 0
    if spread_s:
        assert len(set(times)) > 0.95 * count
    if name.startswith("burstgpt2"):
        assert sum(ask.prompt_tokens for ask in made.asks) == 509_437
        assert sum(ask.output_tokens for ask in made.asks) == 69_962


# -- prompts --------------------------------------------------------------------------------------


def ask(tokens: int, seed: int = 1) -> Ask:
    return Ask(0, 0.0, tokens, 5, 20.0, seed, 0)


def test_prompts_have_their_tokens():
    tokenizer = load_tokenizer(str(embedded_model()))
    for tokens in (1, 8, 128, 1000):
        text = word_prompt(ask(tokens), tokenizer)
        assert abs(len(tokenizer.encode(text, add_special_tokens=False)) - tokens) <= 1
        assert len(word_prompt(ask(tokens), None).split()) == tokens
        assert len(id_prompt(ask(tokens), 50)) == tokens
    assert max(id_prompt(ask(1000), 50)) == 49
    assert word_prompt(ask(50), tokenizer) == word_prompt(ask(50), tokenizer)
    assert word_prompt(ask(50, 1), None) != word_prompt(ask(50, 2), None)
    assert "{" not in story_prompt(5) and story_prompt(5) == story_prompt(5)


def test_a_tokenizer_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="is not a tokenizer"):
            load_tokenizer(str(path))
