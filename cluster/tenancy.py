"""Whose a request is, as a part of the names it goes by, so that no tenant finds another's requests
or cached prefixes: looking for them is looking for a name that does not exist.

A tenant's name has no space and neither has a request's id, so every combination is one of a kind.
The empty tenant is everybody, where no API keys are asked for: its names are as they were given.
"""

from __future__ import annotations

import re

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def scoped_id(tenant: str, request_id: str) -> str:
    """What a client's request is called inside the cluster."""
    return f"{tenant} {request_id}" if tenant else request_id


def public_id(scoped: str) -> str:
    """What its client calls it."""
    return scoped.rpartition(" ")[2]


def tenant_of(scoped: str) -> str:
    """Whose request it is."""
    return scoped.rpartition(" ")[0]


def scoped_salt(tenant: str, salt: str | None) -> str | None:
    """The salt of a tenant's cached prefixes; None = shared by all."""
    return f"{tenant} {salt or ''}" if tenant else salt
