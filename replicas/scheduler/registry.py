"""Policies by name, with their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
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


def make_policy(name: str, params: Mapping[str, float] | None = None) -> Policy:
    """A new policy. Raises ConfigError for an unknown name, an unknown parameter, or a value that
    is no finite number from 0 up."""
    if name not in POLICIES:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f"unknown policy {name!r}; choose one of: {known}.")
    kind, params_kind = POLICIES[name]
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
