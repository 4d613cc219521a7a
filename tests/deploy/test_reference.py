"""What is generated from the configuration's schema is up to date, and says what there is."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.support.charts import CHART, ROOT, VALUES, read
from tokenflow.cluster.config import ClusterConfig
from tools import generate_reference


@pytest.mark.parametrize("path", generate_reference.files(), ids=lambda path: path.name)
def test_up_to_date(path):
    wanted = generate_reference.files()[path]
    assert path.read_text() == wanted, "run python tools/generate_reference.py"


def test_the_page_has_every_key():
    text = (ROOT / "docs" / "configuration.md").read_text()
    for section, field in ClusterConfig.model_fields.items():
        assert f"## `{section}`" in text
        for key in field.annotation.model_fields:
            assert f"| `{key}` |" in text


def test_the_chart_takes_what_the_program_takes():
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    for path in VALUES:
        assert list(validator.iter_errors(read(path))) == []
    config = ClusterConfig().model_dump(mode="json")
    assert list(validator.iter_errors({"config": config})) == []
    config["engine"]["max_num_seqs"] = 0
    (error,) = validator.iter_errors({"config": config})
    assert list(error.absolute_path) == ["config", "engine", "max_num_seqs"]


def test_no_key_of_the_chart_is_undescribed():
    def check(node, path):
        for name, inner in node.get("properties", {}).items():
            if path or name != "config":
                assert inner.get("description") or inner.get("properties"), f"{path}{name}"
                check(inner, f"{path}{name}.")

    check(generate_reference.chart_schema(), "")


def test_every_value_has_a_default_or_may_be_left_out():
    """values.yaml has no key that the schema lacks, at any depth."""
    schema = generate_reference.chart_schema()

    def check(node, values, path):
        if isinstance(values, dict) and node.get("additionalProperties") is False:
            for key, value in values.items():
                assert key in node["properties"], f"{path}{key}"
                check(node["properties"][key], value, f"{path}{key}.")

    check(schema, read(CHART / "values.yaml"), "")
