"""Writes what is generated from the configuration's schema: docs/configuration.md, the Helm chart's
values.schema.json, and the table of values in the chart's README.

    python tools/generate_reference.py

A test says when the files are out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tokenflow.cluster.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[1]
HELM = ROOT / "deploy" / "helm"
CHART = HELM / "tokenflow"
CONFIG_PAGE = ROOT / "docs" / "configuration.md"
Schema = dict[str, Any]


def config_schema() -> Schema:
    """The JSON schema of the configuration file, without references; the chart's dialect, draft 7,
    has the same words for all that is in it."""
    schema = ClusterConfig.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = definitions[node["$ref"].rsplit("/", 1)[1]]
            # What stands beside a reference is about this use of it.
            node = target | {key: value for key, value in node.items() if key != "$ref"}
        return {key: inline(value) for key, value in node.items() if key != "title"}

    result: Schema = inline(schema)
    return result


def chart_schema() -> Schema:
    """The chart's values.schema.json."""
    source = yaml.safe_load((HELM / "values.schema.yaml").read_text())

    def expand(node: Schema) -> Schema:
        node = dict(node)
        properties = node.pop("properties", None)
        if properties is not None:
            node["properties"] = {key: expand(value) for key, value in properties.items()}
            node["additionalProperties"] = False
        if node.pop("open", False) or properties is not None:
            node.setdefault("type", "object")
        if "items" in node:
            node["items"] = expand(node["items"])
        return node

    schema = expand({"properties": source["properties"]})
    about = "The configuration file of `tokenflow serve`; see docs/configuration.md."
    schema["properties"]["config"] = config_schema() | {"description": about}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def chart_readme() -> str:
    """The chart's README.md."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rows = "\n".join(
        f"| `{key}` | {_code(default)} | {_cell(text)} |"
        for key, default, text in _values_rows(chart_schema(), values)
    )
    return (HELM / "README.in.md").read_text().replace("<!-- values -->", rows)


def _values_rows(schema: Schema, values: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, node in schema["properties"].items():
        key = f"{path}{name}"
        default = values.get(name) if isinstance(values, dict) else None
        if key == "global":
            continue
        if "properties" in node and key != "config":
            if "description" in node:
                yield key, None, node["description"]
            yield from _values_rows(node, default, f"{key}.")
        else:
            yield key, default, node.get("description", "")


def configuration_page() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "One YAML file configures a cluster: `tokenflow serve --config FILE`, `args` of",
        "`tokenflow.cluster.app:app` in a Serve config file, `config` in the Helm chart. Every key",
        "may be left out; an unknown key is refused, with the nearest one that exists. Flags of",
        "`tokenflow serve` go before the file (`tokenflow serve --help`).",
        "",
        "Made by `tools/generate_reference.py` from the schema in `cluster/config.py`.",
    ]
    for section, node in config_schema()["properties"].items():
        lines += ["", f"## `{section}`", "", _cell(node.get("description", "")), ""]
        lines += ["| key | type | default | |", "| --- | --- | --- | --- |"]
        for key, field in _config_rows(node):
            nothing = "`{}`" if field.get("type") == "object" else "`null`"
            default = "required" if field["required"] else _code(field.get("default"), nothing)
            about = _cell(field.get("description", ""))
            lines.append(f"| `{key}` | {_cell(_type(field))} | {default} | {about} |")
    return "\n".join(lines) + "\n"


def _config_rows(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    required = node.get("required", ())
    for name, field in node["properties"].items():
        inner = next((one for one in _choices(field) if "properties" in one), None)
        yield f"{path}{name}", field | {"required": name in required}
        if inner is not None:
            yield from _config_rows(inner, f"{path}{name}.")


def _choices(field: Schema) -> list[Schema]:
    choices: list[Schema] = field.get("anyOf", [field])
    return choices


def _type(field: Schema) -> str:
    words = []
    for choice in _choices(field):
        if "enum" in choice:
            words.append(", ".join(map(json.dumps, choice["enum"])))
            continue
        word = {"null": "null", "object": "section" if "properties" in choice else "mapping"}.get(
            kind := choice.get("type", "any"), kind
        )
        low = choice.get("minimum", choice.get("exclusiveMinimum"))
        high = choice.get("maximum", choice.get("exclusiveMaximum"))
        if low is not None:
            word += f" {'>' if 'exclusiveMinimum' in choice else '>='} {low}"
        if high is not None:
            word += f"{' and' if low is not None else ''} <= {high}"
        words.append(word)
    return " or ".join(words)


def _code(value: Any, nothing: str = "") -> str:
    if value is None:
        return nothing
    text = json.dumps(value)
    return f"`{_cell(text)}`" if len(text) <= 100 else "see values.yaml"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def files() -> dict[Path, str]:
    """Every generated file with its content."""
    return {
        CONFIG_PAGE: configuration_page(),
        CHART / "values.schema.json": json.dumps(chart_schema(), indent=1) + "\n",
        CHART / "README.md": chart_readme(),
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
