"""What the handbook tells to type works: its policy, its helm commands, its links, its flags."""

from __future__ import annotations

import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support.charts import CHART, ROOT, VALUES, helm3, read, render4
from tests.support.handbook import PAGES as ALL_PAGES
from tests.support.machines import machine
from tokenflow.cluster.cli import build_parser, config_from
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import make_policy
from tokenflow.replicas.simulator.run import simulate
from tokenflow.replicas.simulator.workload import burst, requests
from tools import generate_reference

DOCS = ROOT / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("concepts", "deploy", "operations", "write-a-policy")]
PAGES += [ROOT / "deploy" / "README.md", ROOT / "deploy" / "images" / "README.md"]
PAGES += [CHART / "README.md"]
COMMAND = re.compile(r"^    (\S.*)$", re.MULTILINE)
POLICY = "shortest_prompt:ShortestPrompt"


def commands(program: str) -> list[list[str]]:
    """Every command of a program that the pages tell to type, in words, without its name."""
    found = []
    for page in PAGES:
        for line in COMMAND.findall(page.read_text()):
            line = re.sub(r"^(\w+=\S+ )+", "", line)
            if re.match(rf"(\S*/)?{program} ", line):
                found.append(shlex.split(line)[1:])
    return found


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).resolve().exists(), target


def test_helm_commands_render():
    charts = [words for words in commands("helm") if "deploy/helm/tokenflow" in words]
    assert {words[0] for words in charts} >= {"install", "template"}
    for words in charts:
        values = words[words.index("--values") + 1]
        assert ROOT / values in VALUES
        where = [str(ROOT / word) if word.startswith("deploy/") else word for word in words]
        if words[0] == "template":
            assert list(yaml.safe_load_all(helm3(*where)))
        names = {m["metadata"]["name"] for m in render4(read(ROOT / values), release=words[1])}
        # The page goes on with this name.
        assert words[1] == "tokenflow" and "tokenflow" in names


def test_flags_of_tokenflow_are_flags():
    found = [w for w in commands("tokenflow") if w[0] in ("serve", "bench")]
    assert len(found) >= 2
    for words in found:
        build_parser().parse_args(words)


def test_every_key_that_is_named_is_a_key():
    chart = generate_reference.chart_schema()
    config = chart["properties"]["config"]
    sections = {"config": chart, **dict.fromkeys(config["properties"], config)}
    sections |= dict.fromkeys(chart["properties"], chart)  # they win: the pages are about the chart
    named = re.compile(r"`([a-zA-Z]+(?:\.[a-zA-Z_]+)+)[:`]")
    seen = 0
    for page in PAGES:
        for path in named.findall(page.read_text()):
            parts = path.split(".")
            node = sections.get(parts[0])
            seen += node is not None
            while node is not None and parts and "properties" in node:
                assert parts[0] in node["properties"], path
                node = node["properties"][parts.pop(0)]
    assert seen >= 40


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "policies"))


def test_the_example_policy_serves_everybody(example):
    arrivals = requests(burst(60), 96, 160, [(6.0, 1.0)], random.Random(1))
    outcome = simulate(machine(), make_policy(POLICY), arrivals)
    assert all(record.finish_reason == "length" for record in outcome.records)
    assert outcome.stats.now_free_blocks == machine().num_blocks
    again = simulate(machine(), make_policy(POLICY), arrivals)
    assert again.records == outcome.records


def test_the_example_policy_does_what_its_page_says(example):
    """Short prompts first; but with patience that counts, those who waited longer."""
    lengths = [400, 100, 300, 200] * 6
    together = requests(burst(24), 96, 100, [(6.0, 1.0)], random.Random(1))
    arrivals = [
        replace(one, prompt_tokens=length) for one, length in zip(together, lengths, strict=True)
    ]
    outcome = simulate(machine(), make_policy(POLICY), arrivals)
    first = {length: [] for length in set(lengths)}
    for record, length in zip(outcome.records, lengths, strict=True):
        first[length].append(record.arrivals[0][0])
    means = [sum(times) / len(times) for _, times in sorted(first.items())]
    assert means == sorted(means) and means[0] < means[-1] / 2


def test_the_page_runs_and_shows_the_example(example, capsys):
    page = (DOCS / "write-a-policy.md").read_text()
    source = (ROOT / "examples" / "policies" / "shortest_prompt.py").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    signature, heart, run = snippets
    assert signature.removesuffix(" ...\n") in source
    dedented = "\n".join(line.strip() for line in source.splitlines())
    assert all(line in dedented for line in heart.splitlines())
    exec(compile(run, "write-a-policy.md", "exec"), {})
    assert POLICY in capsys.readouterr().out


def test_a_policy_is_configured_by_its_import_path(example):
    arguments = build_parser().parse_args(["serve", "--policy", POLICY])
    assert config_from(arguments).engine.policy == POLICY
    assert make_policy(POLICY, {"patience": 3}).params.patience == 3
    with pytest.raises(ConfigError, match="has no parameter 'patients'"):
        make_policy(POLICY, {"patients": 3})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:Policy", "cannot import the policy 'nowhere:Policy'.*PYTHONPATH"),
        ("shortest_prompt:Nothing", "cannot import the policy"),
        (":Policy", "cannot import the policy"),
        ("shortest_prompt:Params", "is no policy: it has no method plan"),
    ],
)
def test_what_is_no_policy_is_refused(example, name, message):
    with pytest.raises(ConfigError, match=message):
        make_policy(name)


def test_a_policy_without_parameters(example, tmp_path: Path, monkeypatch):
    (tmp_path / "plain_policy.py").write_text("class Plain:\n    def plan(self, view, now): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(make_policy("plain_policy:Plain")).__name__ == "Plain"
    with pytest.raises(ConfigError, match="has no parameter"):
        make_policy("plain_policy:Plain", {"a": 1})
