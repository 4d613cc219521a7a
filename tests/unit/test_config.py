"""Configuration: every error names its key."""

import pytest

from tokenflow.cluster.config import load_config
from tokenflow.replicas.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_defaults_and_overrides(tmp_path):
    path = write(tmp_path, "engine:\n  policy: fcfs\n  kv_tokens: 4096\n")
    config = load_config(path, {"engine.kv_tokens": 512, "ingress.port": 1234})
    assert (config.engine.policy, config.engine.kv_tokens, config.ingress.port) == (
        "fcfs",
        512,
        1234,
    )
    assert load_config(None).model.name == "tokenflow-books"


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == load_config(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine:\n  polcy: fcfs", "unknown key engine.polcy (did you mean policy?)"),
        ("engin: {}", "unknown key engin (did you mean engine?)"),
        ("engine:\n  policy: best", "engine.policy: "),
        ("engine:\n  kv_tokens: -1", "engine.kv_tokens: "),
        ("ingress:\n  port: eight", "ingress.port: "),
        ("limits:\n  zzz: 1", "unknown key limits.zzz (known keys: "),
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("engine: 3", "engine: "),
    ],
)
def test_errors_name_the_key(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
