"""Strict validation of Kubernetes manifests: unknown keys, wrong types, missing fields.

Built-in kinds by the schemas in `kubernetes_validate`; KubeRay's and Prometheus' by their CRDs,
which lie beside the repository. Not evaluated: CEL rules, and what an operator checks on its own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.support.shared_data import shared_file

KUBE_VERSIONS = ("1.30", "1.34", "1.37")
"""The oldest that the chart supports, the one it is rendered for, the newest with schemas."""
Key = tuple[str, str]

_ROUTE = """
type: object
required: [apiVersion, kind, metadata, spec]
additionalProperties: false
properties:
  apiVersion: {const: gateway.networking.k8s.io/v1}
  kind: {type: string}
  metadata: {type: object}
  spec:
    type: object
    additionalProperties: false
    required: [parentRefs, rules]
    properties:
      parentRefs:
        type: array
        items:
          type: object
          required: [name]
          additionalProperties: false
          properties:
            name: {type: string}
            namespace: {type: string}
            sectionName: {type: string}
      hostnames: {type: array, items: {type: string}}
      rules:
        type: array
        items:
          type: object
          required: [backendRefs, matches]
          additionalProperties: false
          properties:
            matches:
              type: array
              items:
                type: object
                additionalProperties: false
                properties:
                  path:
                    type: object
                    additionalProperties: false
                    properties: {type: {enum: [PathPrefix]}, value: {type: string}}
                  method:
                    type: object
                    additionalProperties: false
                    properties: {service: {type: string}}
            backendRefs:
              type: array
              items:
                type: object
                required: [name, port]
                additionalProperties: false
                properties: {name: {type: string}, port: {type: integer}}
"""
"""The part of the Gateway API's routes that the chart uses, after its v1 CRDs."""


def problems(manifest: dict[str, Any], kube_version: str = KUBE_VERSIONS[1]) -> list[str]:
    """What is wrong with a manifest in the eyes of one Kubernetes; empty when it is valid."""
    key = manifest["apiVersion"], manifest["kind"]
    validator = _custom().get(key)
    if validator is not None:
        errors = validator.iter_errors(manifest)
        return [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in errors]
    try:
        kubernetes_validate.validate(manifest, kube_version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


@cache
def _custom() -> dict[Key, jsonschema.Draft202012Validator]:
    found: dict[Key, jsonschema.Draft202012Validator] = {}
    route = jsonschema.Draft202012Validator(yaml.safe_load(_ROUTE))
    for kind in ("HTTPRoute", "GRPCRoute"):
        found["gateway.networking.k8s.io/v1", kind] = route
    folder: Path = shared_file("data/crds")
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            spec = document["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = jsonschema.Draft202012Validator(schema)
    return found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """An openAPIV3Schema of a CRD as a JSON schema that knows no other keys than its own."""
    schema = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if "properties" in schema:
        schema["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _strict(schema[key])
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema
