"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.andes import AndesPolicy
from tokenflow.replicas.scheduler.fcfs import ChunkedPolicy, FCFSPolicy
from tokenflow.replicas.scheduler.policy import Policy
from tokenflow.replicas.scheduler.slack import SlackPolicy
from tokenflow.replicas.scheduler.tokenflow import TokenFlowPolicy

POLICIES: dict[str, Callable[[], Policy]] = {
    FCFSPolicy.name: FCFSPolicy,
    ChunkedPolicy.name: ChunkedPolicy,
    AndesPolicy.name: AndesPolicy,
    TokenFlowPolicy.name: TokenFlowPolicy,
    SlackPolicy.name: SlackPolicy,
}


def make_policy(name: str) -> Policy:
    """A new policy. Raises ConfigError for an unknown name."""
    try:
        return POLICIES[name]()
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise ConfigError(f"unknown policy {name!r}; choose one of: {known}.") from None
