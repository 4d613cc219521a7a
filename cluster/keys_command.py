"""`tokenflow keys`: the file of API keys, from the command line."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from tokenflow.cluster.api_keys import (
    ApiKey,
    editing,
    key_hash,
    load_keys,
    new_key,
    save_keys,
)
from tokenflow.cluster.quotas import KeyLimits
from tokenflow.replicas.errors import ConfigError

_LIMITS: dict[str, Callable[[str], float]] = {
    "requests_per_minute": float,
    "tokens_per_minute": float,
    "streams": int,
    "rate": float,
}

_NAMES = {
    "tenant": "1 to 64 letters, digits, '.', '_' or '-', and no sign at the beginning",
    "id": "1 to 64 letters, digits, '.', '_' or '-'",
}
"""What may be given for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="keys_command", required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key and print it, this once")
    create.add_argument("--tenant", required=True, help="whose it is")
    create.add_argument("--id", help="its name (default: the tenant's and a random part)")
    for name, kind in _LIMITS.items():
        description = KeyLimits.model_fields[name].description or "Requests in a minute."
        create.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=description)
    create.set_defaults(run=run_create)
    listing = commands.add_parser("list", help="show all keys, without what is secret")
    listing.set_defaults(run=run_list)
    revoke = commands.add_parser("revoke", help="refuse a key from now on, and end what it runs")
    revoke.add_argument("id", help="its name")
    revoke.set_defaults(run=run_revoke)
    for command in (create, listing, revoke):
        command.add_argument("--file", required=True, type=Path, help="the YAML file of the keys")


def run_create(args: argparse.Namespace) -> int:
    # With the random part it is no longer than a name may be.
    name = f"{args.tenant[:55]}-{secrets.token_hex(4)}" if args.id is None else args.id
    given = {limit: getattr(args, limit) for limit in _LIMITS}
    secret = new_key()
    try:
        limits = KeyLimits(**{k: v for k, v in given.items() if v is not None})
        entry = ApiKey(id=name, tenant=args.tenant, hash=key_hash(secret), limits=limits)
    except ValidationError as error:
        # A wrong tenant makes a wrong name as well.
        first = min(error.errors(), key=lambda item: item["loc"] != ("tenant",))
        flag = "-".join(map(str, first["loc"])).replace("_", "-")
        raise ConfigError(f"--{flag}: {_NAMES.get(flag, first['msg'])}.") from None
    with editing(args.file):
        keys = load_keys(args.file) if args.file.exists() else []
        if any(key.id == name for key in keys):
            raise ConfigError(f"{args.file} has a key named {name!r} already; choose another --id.")
        save_keys(args.file, [*keys, entry])
    print(f"Key {name} of tenant {args.tenant}. It is shown this once:\n\n  {secret}\n")
    return 0


def run_list(args: argparse.Namespace) -> int:
    for key in load_keys(args.file):
        limits = key.limits.model_dump(exclude_none=True)
        shown = " ".join(f"{name}={value:g}" for name, value in limits.items())
        state = "revoked" if key.revoked else "active"
        print(f"{key.id}  tenant={key.tenant}  {state}  {shown}".rstrip())
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    with editing(args.file):
        keys = load_keys(args.file)
        if not any(key.id == args.id for key in keys):
            known = ", ".join(key.id for key in keys) or "none"
            raise ConfigError(f"{args.file} has no key named {args.id!r}; it has: {known}.")
        save_keys(
            args.file,
            [k.model_copy(update={"revoked": True}) if k.id == args.id else k for k in keys],
        )
    print(f"Key {args.id} is revoked.")
    return 0
