"""Every code block of the documentation is run, or checked, or named here with the reason why not.

Commands that ask a running server are run by tests/cluster/test_handbook_commands.py.
"""

from __future__ import annotations

import json
import re

import promql_parser
import pytest
import yaml

from tests.support.charts import one, read, render4
from tests.support.handbook import PAGES, ROOT, Block, asks_a_server, blocks, commands, words
from tokenflow.cluster.api_keys import load_keys, parse_keys
from tokenflow.cluster.cli import build_parser, main
from tokenflow.cluster.config import ClusterConfig, parse_config

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = commands()

PYTHON = {
    "README.md": "tests/cluster/test_handbook_commands.py",
    "docs/client.md": "tests/unit/client/test_docs.py",
    "docs/write-a-policy.md": "tests/deploy/test_docs.py",
}
"""Which test runs the Python of a page."""

PICTURES_AND_FORMULAS = ("", "indented")
"""Languages of blocks that are for the eye."""

NOT_RUN = {
    r"make demo": "a minute of both cores; tests/unit/test_demo.py runs its parts",
    r"make test": "it runs this",
    r"python3\.11 -m venv|pip install": "`make setup` does the same, before this runs",
    r"docker |buildah |debootstrap |c=\$\(buildah": "no daemon and no registry; the log of a build "
    "and of a run of it is deploy/images/cpu-build.txt",
    r"uv pip compile": "asks a package index; test_images.py compares what it wrote",
    r"cyclonedx-py": "of a package that nothing else here needs",
    r"kubectl ": "there is no Kubernetes",
    r"helm (repo|upgrade --install kuberay|install kuberay|--namespace llm test)": "there is no "
    "Kubernetes, and no internet",
    r"serve deploy": "takes fixed ports; tests/apart/test_serve_config.py deploys the same text "
    "with others, see test_serve_yaml_is_what_the_chart_renders",
    r"grpcurl ": "a program in Go; tests/cluster/test_probes.py asks for reflection, and "
    "tests/cluster/test_grpc.py for Generate",
}
"""Commands by pattern, and why they are not run."""

CHECKED = {
    r"tokenflow serve": "flags here; run in tests/command/test_serve.py",
    r"tokenflow bench compare": "flags here; run in tests/loadgen/test_command.py",
    r"tokenflow keys": "run here",
    r"helm (template|(install|upgrade) tokenflow|--namespace llm (history|rollback))": "run in "
    "test_docs.py and test_install.py",
}
"""Commands by pattern, and where they are looked after."""


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def ids(block: Block) -> str:
    return block.where


def test_every_block_is_of_a_known_kind():
    known = {"python", "yaml", "json", "promql", "sh", "bash", *PICTURES_AND_FORMULAS}
    assert {block.language for block in BLOCKS} <= known
    # What looks like a command to the eye does to the tests.
    for block in BLOCKS:
        if not block.is_shell and block.language in PICTURES_AND_FORMULAS:
            assert not re.search(r"^\s*(tokenflow|helm|curl|kubectl) [a-z-]", block.text, re.M)


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=lambda x: getattr(x, "where", ""))
def test_every_command_is_run_or_has_a_reason(block, command):
    text = " ".join(words(command))
    found = [p for p in {**NOT_RUN, **CHECKED} if re.match(p, text) or re.match(p, command)]
    if asks_a_server(command):
        assert not found
    else:
        assert len(found) == 1, f"{block.where}: {command!r} has {len(found)} entries"


def test_no_reason_is_left_over():
    texts = [" ".join(words(command)) for _, command in COMMANDS] + [c for _, c in COMMANDS]
    for pattern in {**NOT_RUN, **CHECKED}:
        assert any(re.match(pattern, text) for text in texts), pattern
    assert sum(asks_a_server(command) for _, command in COMMANDS) >= 8


def test_flags_are_flags():
    found = [words(c)[1:] for _, c in COMMANDS if words(c)[0] == "tokenflow"]
    assert len(found) >= 10
    for each in found:
        build_parser().parse_args(each)


def test_the_commands_for_keys_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = [words(c)[1:] for _, c in COMMANDS if words(c)[:2] == ["tokenflow", "keys"]]
    assert {each[1] for each in found} == {"create", "list", "revoke"}
    for each in found:
        assert main(each) == 0, capsys.readouterr().err
    assert [key.revoked for key in load_keys(tmp_path / "keys.yaml")] == [True]


@pytest.mark.parametrize("block", of("yaml"), ids=ids)
def test_yaml_is_a_configuration_or_keys_or_values(block):
    tree = yaml.safe_load(block.text)
    if isinstance(tree, list):
        assert parse_keys(block.text, block.where)
    elif tree.keys() <= ClusterConfig.model_fields.keys():
        parse_config(tree, block.where)
    else:
        base = read(ROOT / "deploy" / "helm" / "examples" / "one-gpu.yaml")
        assert one(render4({**base, **tree}), "RayService")


@pytest.mark.parametrize("block", of("json"), ids=ids)
def test_json_is_json(block):
    assert json.loads(block.text)


@pytest.mark.parametrize("block", of("promql"), ids=ids)
def test_promql_is_promql(block):
    promql_parser.parse(block.text.strip())


def test_all_python_is_run_by_somebody():
    pages = {str(block.page.relative_to(ROOT)) for block in of("python")}
    assert pages == PYTHON.keys()
    for page, test in PYTHON.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text()


def test_serve_yaml_is_what_the_chart_renders():
    """So the live test of the one is a test of the other: they differ in sizes alone."""
    values = read(ROOT / "deploy" / "helm" / "examples" / "kind-cpu.yaml")
    rendered = yaml.safe_load(one(render4(values), "RayService")["spec"]["serveConfigV2"])
    written = read(ROOT / "deploy" / "ray" / "serve.yaml")
    for config in (rendered, written):
        (application,) = config["applications"]
        parse_config(application.pop("args"))
        application["deployments"][0]["ray_actor_options"].pop("num_cpus")
    assert rendered == written
