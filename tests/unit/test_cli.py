"""The command line: flags win, and bad input is one sentence before anything has started."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tokenflow.cluster import demo, demo_server, local
from tokenflow.cluster.cli import FLAGS, build_parser, config_from, main, ready_message
from tokenflow.cluster.config import embedded_model, load_config
from tokenflow.cluster.local import free_port
from tokenflow.replicas.errors import TokenFlowError


class NeverStarted:
    def __init__(self, *_, **__) -> None:
        pytest.fail("a cluster was made")


@pytest.fixture(autouse=True)
def contained(monkeypatch):
    """No cluster, and nothing of what `main` does to the process stays."""
    monkeypatch.setattr(local, "LocalCluster", NeverStarted)
    monkeypatch.setattr(demo_server, "LocalCluster", NeverStarted)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write(tmp_path: Path, tree: object, name: str = "c.yaml") -> str:
    path = tmp_path / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return str(path)


def complaint(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    assert main([*argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("tokenflow: ") and err.endswith("\n") and len(err) > 20
    assert err.count("\n") == 1, f"more than one line: {err}"
    return err


# -- flags ----------------------------------------------------------------------------------------

VALUES = {
    "model": ("/m", "model.path", "/m"),
    "served-model-name": ("n", "model.served_name", "n"),
    "host": ("0.0.0.0", "ingress.host", "0.0.0.0"),
    "port": ("1234", "ingress.port", 1234),
    "grpc-port": ("1235", "ingress.grpc_port", 1235),
    "policy": ("fcfs", "engine.policy", "fcfs"),
    "replicas": ("3", "replicas.count", 3),
    "kv-tokens": ("512", "engine.kv_tokens", 512),
    "host-kv-gib": ("0", "kvstore.host_kv_gib", 0.0),
    "max-num-seqs": ("9", "engine.max_num_seqs", 9),
    "api-keys": ("/k", "security.api_keys_file", "/k"),
    "tls-cert": ("/c", "security.tls.certificate", "/c"),
    "tls-key": ("/t", "security.tls.key", "/t"),
}
FILE = {
    "model": {"path": "/file", "served_name": "file"},
    "engine": {"policy": "tokenflow", "kv_tokens": 4096, "max_num_seqs": 7, "block_size": 8},
    "kvstore": {"host_kv_gib": 2},
    "replicas": {"count": 2},
    "ingress": {"host": "127.0.0.1", "port": 7000, "grpc_port": 7001},
    "security": {"api_keys_file": "/a", "tls": {"certificate": "/b", "key": "/d"}},
}


def lookup(config, dotted: str):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def parsed(*argv: str):
    return config_from(build_parser().parse_args(["serve", *argv]))


def test_the_values_above_are_all_flags():
    assert {dotted for _, dotted, _ in VALUES.values()} == set(FLAGS.values())


@pytest.mark.parametrize("flag", VALUES)
def test_a_flag_overrides_the_file_and_nothing_else(tmp_path, flag):
    text, dotted, value = VALUES[flag]
    path = write(tmp_path, FILE)
    assert lookup(load_config(path), dotted) != value
    assert parsed("--config", path, f"--{flag}", text) == load_config(path, {dotted: value})


def test_all_flags_together_without_a_file():
    argv = [part for flag, (text, _, _) in VALUES.items() for part in (f"--{flag}", text)]
    config = parsed(*argv)
    for _, dotted, value in VALUES.values():
        assert lookup(config, dotted) == value
    assert parsed() == load_config(None)


# -- bad input ------------------------------------------------------------------------------------


def test_a_missing_model_directory(tmp_path, capsys):
    missing = str(tmp_path / "nowhere")
    assert missing in complaint(capsys, "serve", "--model", missing)


def test_a_model_directory_without_config_json(tmp_path, capsys):
    err = complaint(capsys, "serve", "--model", str(tmp_path))
    assert str(tmp_path) in err and "config.json" in err


def test_an_empty_model_path(capsys):
    complaint(capsys, "serve", "--model", "", *ports())


def model_with(tmp_path: Path, **changes: object) -> str:
    """The embedded model with another config.json."""
    source = embedded_model()
    for file in source.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_model_of_another_architecture(tmp_path, capsys):
    model = model_with(tmp_path, architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel is not supported" in complaint(capsys, "serve", "--model", model)


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": 5}, {"architectures": 5}, {"num_attention_heads": 0, "head_dim": None}],
)
def test_a_config_json_with_values_of_the_wrong_kind(tmp_path, capsys, changes):
    model = model_with(tmp_path, **changes)
    assert "config.json" in complaint(capsys, "serve", "--model", model)


def test_an_unknown_key_is_named_with_a_suggestion(tmp_path, capsys):
    err = complaint(capsys, "serve", "--config", write(tmp_path, {"engine": {"polcy": "fcfs"}}))
    assert "unknown key engine.polcy (did you mean policy?)" in err
    assert "c.yaml" in err


@pytest.mark.parametrize("text", ["engine: [", "a: b: c", "engine:\n\tpolicy: fcfs", "\x00"])
def test_a_file_that_is_not_yaml(tmp_path, capsys, text):
    assert "not valid YAML" in complaint(capsys, "serve", "--config", write(tmp_path, text))


@pytest.mark.parametrize("text", ["engine: [", "a: b: c", "engine:\n\tpolicy: fcfs", "\x00"])
def test_a_file_that_is_not_yaml_has_no_traceback(tmp_path, capsys, text):
    path = write(tmp_path, text)
    assert main(["serve", "--config", path]) == 2
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    assert err.startswith(f"tokenflow: {path} is not valid YAML")


def test_a_missing_file(tmp_path, capsys):
    path = str(tmp_path / "nothing.yaml")
    assert path in complaint(capsys, "serve", "--config", path)


def test_a_folder_instead_of_a_file(tmp_path, capsys):
    assert str(tmp_path) in complaint(capsys, "serve", "--config", str(tmp_path))


def test_a_section_that_is_no_mapping(tmp_path, capsys):
    path = write(tmp_path, {"engine": 3})
    assert "engine" in complaint(capsys, "serve", "--config", path)
    assert "engine" in complaint(capsys, "serve", "--config", path, "--kv-tokens", "512")


def test_an_unknown_policy_names_the_known_ones(capsys):
    err = complaint(capsys, "serve", "--policy", "best")
    assert "'best'" in err and "fcfs" in err and "tokenflow" in err


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_port_in_use(capsys, flag):
    other = "--grpc-port" if flag == "--port" else "--port"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        err = complaint(capsys, "serve", flag, port, other, str(free_port()))
    assert port in err and "in use" in err
    assert flag.strip("-").replace("-", "_") in err


def test_one_port_for_both(capsys):
    port = str(free_port())
    err = complaint(capsys, "serve", "--port", port, "--grpc-port", port)
    assert "ingress.port and ingress.grpc_port must differ" in err


def ports() -> list[str]:
    return ["--port", str(free_port()), "--grpc-port", str(free_port())]


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("--kv-tokens", "-5", "engine.kv_tokens"),
        ("--kv-tokens", "0", "engine.kv_tokens"),
        ("--port", "0", "ingress.port"),
        ("--port", "70000", "ingress.port"),
        ("--grpc-port", "-1", "ingress.grpc_port"),
        ("--replicas", "0", "replicas.count"),
        ("--max-num-seqs", "0", "engine.max_num_seqs"),
        ("--host-kv-gib", "-1", "kvstore.host_kv_gib"),
        ("--host-kv-gib", "nan", "kvstore.host_kv_gib"),
        ("--served-model-name", "", "model.served_name"),
        ("--host", "", "ingress.port"),
    ],
)
def test_values_out_of_range_name_the_key(capsys, flag, value, key):
    assert f"{key}: " in complaint(capsys, "serve", flag, value)


def test_kv_memory_that_does_not_fit(capsys):
    err = complaint(capsys, "serve", "--kv-tokens", str(10**11), *ports())
    assert "do not fit" in err and "--kv-tokens" in err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--host-kv-gib", "inf"), ("--kv-tokens", str(10**400)), ("--config", "a\0b")],
)
def test_absurd_values(capsys, flag, value):
    complaint(capsys, "serve", flag, value, *ports())


@pytest.mark.parametrize(
    "argv",
    [[], ["bake"], ["serve", "--port", "eight"], ["serve", "--bogus"], ["demo", "--rate", "x"]],
)
def test_a_wrong_command_line_is_2_as_well(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: tokenflow" in capsys.readouterr().err


# -- serving --------------------------------------------------------------------------------------


class FakeCluster:
    """Stands in for LocalCluster; Ctrl-C comes while it serves."""

    url = "http://127.0.0.1:1"
    grpc_target = "127.0.0.1:2"
    error: Exception | None = None
    interrupt = signal.SIGINT

    def __init__(self, config) -> None:
        self.config = config
        self.calls: list[str] = []
        FakeCluster.last = self

    def start(self) -> None:
        self.calls.append("start")
        if self.error is not None:
            raise self.error

    def serve(self) -> None:
        self.calls.append("serve")
        signal.raise_signal(self.interrupt)

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_what_it_started(monkeypatch, capsys, number):
    monkeypatch.setattr(local, "LocalCluster", FakeCluster)
    monkeypatch.setattr(FakeCluster, "interrupt", number)
    assert main(["serve", "--kv-tokens", "512", "--served-model-name", "mine", *ports()]) == 0
    assert FakeCluster.last.calls == ["start", "serve", "stop"]
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Serving mine (LlamaForCausalLM, ")
    assert "512 KV tokens each, policy slack" in out
    assert out.endswith("Stopping...\nStopped.\n")


def test_a_cluster_that_does_not_start_is_stopped(monkeypatch, capsys):
    monkeypatch.setattr(local, "LocalCluster", FakeCluster)
    monkeypatch.setattr(FakeCluster, "error", TokenFlowError("no room."))
    assert main(["serve", *ports()]) == 2
    assert FakeCluster.last.calls == ["start", "stop"]
    assert capsys.readouterr().err == "tokenflow: no room.\n"


def test_the_ready_message_shows_where_and_what():
    config = load_config(None, {"model.served_name": "mine"})
    text = ready_message(SimpleNamespace(url="http://h:1", grpc_target="h:2"), config)
    assert "http://h:1/v1\n" in text and "h:2" in text
    command = text[text.index("curl") : text.index("\n\nCtrl-C")]
    assert command.startswith("curl -N http://h:1/v1/chat/completions ")
    body = json.loads(command[command.index("'{") + 1 : command.rindex("'")])
    assert body["model"] == "mine" and body["stream"] is True


# -- the demo -------------------------------------------------------------------------------------


def test_the_demo_takes_its_options_from_the_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--requests 3 --max-tokens 9 --rate 2.5 --kv-tokens 128 --seed 4 --json out.json"
    args = build_parser().parse_args(["demo", *flags.split()])
    assert demo.options_from(args) == demo.DemoOptions(
        requests=3,
        max_tokens=9,
        rate=2.5,
        kv_tokens=128,
        seed=4,
        json_path="out.json",
        timeout_s=600.0,
    )
    defaults = demo.options_from(build_parser().parse_args(["demo"]))
    assert (defaults.requests, defaults.max_tokens, defaults.rate) == (64, 256, 10.0)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--requests", "0"),
        ("--requests", "-1"),
        ("--max-tokens", "0"),
        ("--rate", "0"),
        ("--rate", "-1"),
        ("--rate", "0.05"),
        ("--rate", "-inf"),
        ("--kv-tokens", "63"),
    ],
)
def test_a_demo_that_makes_no_sense_is_refused(capsys, flag, value):
    err = complaint(capsys, "demo", f"{flag}={value}")
    assert f"{flag} must be at least" in err


@pytest.mark.parametrize("rate", ["nan", "inf", "1e9"])
def test_a_rate_no_server_takes_is_refused(capsys, rate):
    assert "--rate" in complaint(capsys, "demo", "--rate", rate)
