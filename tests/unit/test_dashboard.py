"""Dashboard and alert rules: written by their generator, valid, and firing when they should."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from deploy.observability import dashboard
from tests.support.missing import missing
from tests.support.promql import metric_names

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "helm" / "tokenflow" / "files" / "alerts.yaml"
CASES = ROOT / "deploy" / "observability" / "alerts_test.yaml"


def rules() -> list[dict]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def test_the_dashboard_is_what_its_generator_writes():
    assert dashboard.TARGET.read_text() == dashboard.text(), "run deploy/observability/dashboard.py"


def test_panels_are_placed_apart_and_explained():
    board = json.loads(dashboard.TARGET.read_text())
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["description"].endswith(".") and panel["targets"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("query", dashboard.queries(dashboard.dashboard()))
def test_a_replica_that_is_scraped_twice_counts_once(query):
    names = metric_names(promql_parser.parse(query.replace("$__rate_interval", "5m")))
    assert names and all(name.startswith("tokenflow_") for name in names)
    assert query.count("max by (") + query.count("min by (") >= query.count('job=~"$job"')


def test_every_alert_says_what_is_wrong_and_is_in_the_handbook():
    handbook = (ROOT / "docs" / "observability.md").read_text()
    for rule in rules():
        promql_parser.parse(rule["expr"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")
        assert f"`{rule['alert']}`" in handbook


def test_every_alert_has_a_case_in_which_it_fires():
    fires = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fires == {rule["alert"] for rule in rules()}


def test_the_alerts_fire_as_their_cases_say():
    promtool = shutil.which("promtool")
    if promtool is None:
        missing("promtool is not installed; it comes with Prometheus")
    done = subprocess.run(
        [promtool, "test", "rules", str(CASES)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
