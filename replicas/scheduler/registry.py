"""Policies by name, with their parameters; and anybody's, by where they are imported from."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.andes import AndesParams, AndesPolicy
from tokenflow.replicas.scheduler.fcfs import ChunkedPolicy, FCFSParams, FCFSPolicy
from tokenflow.replicas.scheduler.policy import Policy
from tokenflow.replicas.scheduler.slack import SlackParams, SlackPolicy
from tokenflow.replicas.scheduler.tokenflow import TokenFlowParams, TokenFlowPolicy

POLICIES: dict[str, tuple[Any, Any]] = {
    FCFSPolicy.name: (FCFSPolicy, FCFSParams),
    ChunkedPolicy.name: (ChunkedPolicy, FCFSParams),
    AndesPolicy.name: (AndesPolicy, AndesParams),
    TokenFlowPolicy.name: (TokenFlowPolicy, TokenFlowParams),
    SlackPolicy.name: (SlackPolicy, SlackParams),
}
"""(policy, its parameters)."""


@dataclass(frozen=True, slots=True)
class NoParams:
    """Of an imported policy that has none."""


def make_policy(name: str, params: Mapping[str, float] | None = None) -> Policy:
    """A new policy: of a known name, or the class that `module:Class` names. Such a class is made
    with its parameters, a dataclass that its attribute `Params` names, if it has any.

    Raises ConfigError for an unknown name, what cannot be imported, an unknown parameter, or a
    value that is no finite number from 0 up.
    """
    if ":" in name:
        kind, params_kind = _imported(name)
    elif name in POLICIES:
        kind, params_kind = POLICIES[name]
    else:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(
            f"unknown policy {name!r}; choose one of: {known}; or module:Class for one of yours."
        )
    defaults = {field.name: field.default for field in fields(params_kind)}
    values: dict[str, float] = {}
    for key, value in (params or {}).items():
        if key not in defaults:
            known = ", ".join(defaults)
            raise ConfigError(f"policy {name} has no parameter {key!r}; it has: {known}.")
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if not number or not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"parameter {key} of policy {name} must be a finite number from 0 up, "
                f"got {value!r}."
            )
        if isinstance(defaults[key], int):
            if value != int(value):
                raise ConfigError(f"parameter {key} of policy {name} must be whole, got {value}.")
            value = int(value)
        values[key] = value
    policy: Policy = kind(params_kind(**values))
    return policy


def _imported(name: str) -> tuple[Any, Any]:
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import the policy {name!r}: {error}; its module must be on the PYTHONPATH of "
            "every process of the cluster."
        ) from None
    if not callable(getattr(kind, "plan", None)):
        raise ConfigError(f"{name} is no policy: it has no method plan(view, now).")
    if hasattr(kind, "Params"):
        return kind, kind.Params
    return lambda _: kind(), NoParams
