"""Descriptions of runs: what a file may say, what flags change, and what is refused how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tokenflow.loadgen.command import SCHEMAS, schema_text
from tokenflow.loadgen.description import load_description
from tokenflow.replicas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
URL = {"kind": "openai", "url": "http://127.0.0.1:8000"}


def test_defaults_and_the_base_url():
    found = load_description(None, {"target": URL})
    assert found.target.url == "http://127.0.0.1:8000/v1"
    assert (found.seed, found.repeats, found.arrivals.count) == (1, 1, 40)
    for given in ("https://h/api/v1/", "http://h:1/v1", "http://h:1/other"):
        kept = load_description(None, {"target": URL | {"url": given}})
        assert kept.target.url == given.rstrip("/")


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"target": URL, "seed": 4, "name": "file"}))
    found = load_description(path, {"seed": 9})
    assert (found.seed, found.name) == (9, "file")


def test_a_trace_lies_beside_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"target": URL, "arrivals": {"kind": "trace", "path": "t.csv"}}))
    assert load_description(path, {}).arrivals.path == str(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target": None}, "target"),
        ({"target": {"kind": "openai"}}, "target.url is missing"),
        ({"target": URL | {"url": "localhost:8000"}}, "no http:// or https:// address"),
        ({"target": URL | {"ur": 1}}, "unknown key target.ur"),
        ({"target": {"kind": "grpc", "address": "host"}}, "target.address"),
        ({"sead": 3}, "unknown key sead"),
        ({"seed": "x"}, "seed: .* got 'x'"),
        ({"repeats": 0}, "repeats"),
        ({"arrivals": {"kind": "poisson", "per_s": 0}}, "arrivals.per_s"),
        ({"prompt": {"kind": "trace"}}, "prompt is to come from a trace"),
        ({"conversation": {"turns": {"kind": "trace"}}}, "turns cannot come from a trace"),
        ({"readers": []}, "readers"),
        ({"readers": [{"token_rate": "slow"}]}, "readers.0.token_rate: 'slow' is neither"),
        ({"behaviours": [{"kind": "disconnect", "share": 0.7, "after_tokens": 1}] * 2}, "add up"),
        ({"content": "ids"}, "needs endpoint: completions"),
        ({"content": "ids", "target": URL | {"endpoint": "completions"}}, "needs a tokenizer"),
        ({"target": {"kind": "simulator"}, "closed_loop": {"users": 2}}, "simulator takes no"),
    ],
)
def test_what_is_wrong_is_named(fields, words):
    with pytest.raises(ConfigError, match=f"the run: .*{words}"):
        load_description(None, {"target": URL, **fields})


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError, match=r"unknown key a; unknown key b"):
        load_description(None, {"target": URL, "a": 1, "b": 2})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", r"not valid YAML.*line"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("seed: 3", "has no target: give --url"),
        ("\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_description(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_description(path, {})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        load_description(tmp_path / "none.yaml", {})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_description(tmp_path / "bytes", {})


@pytest.mark.parametrize("which", SCHEMAS)
def test_the_published_schemas_are_those_of_the_models(which):
    """Written by `tokenflow bench schema WHICH > loadgen/schemas/WHICH.schema.json`."""
    text = (ROOT / "loadgen" / "schemas" / f"{which}.schema.json").read_text()
    assert text == schema_text(which)
    assert json.loads(text)["$schema"].startswith("https://json-schema.org/")


def test_the_examples_are_descriptions():
    files = sorted((ROOT / "examples" / "bench").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        load_description(file, {})
