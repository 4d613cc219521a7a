"""Keys, their file, and who they say one is."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokenflow.cluster import authentication
from tokenflow.cluster.api.errors import error_body
from tokenflow.cluster.api_keys import ApiKey, key_hash, load_keys, new_key, parse_keys, save_keys
from tokenflow.cluster.authentication import Authenticator, KeyFile
from tokenflow.cluster.cli import build_parser, main
from tokenflow.cluster.quotas import KeyLimits
from tokenflow.replicas.errors import ConfigError, InvalidRequestError, QuotaError


def entry(key: str, name: str = "one", tenant: str = "acme", **fields) -> ApiKey:
    return ApiKey(id=name, tenant=tenant, hash=key_hash(key), **fields)


def test_without_keys_anybody_comes_in_as_nobody():
    who = Authenticator(None)
    assert who.identify(None).tenant == who.identify("Bearer whatever").tenant == ""


def test_a_key_tells_its_tenant():
    one, two = new_key(), new_key()
    assert one != two and one.startswith("sk-tf-") and len(one) > 40
    who = Authenticator([entry(one), entry(two, "two", "other")])
    assert who.identify(f"Bearer {one}").tenant == "acme"
    assert who.identify(f"bearer  {two}").tenant == "other"


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Basic abc", "sk-tf-x", "Bearer sk-tf-x", "Bearer \udcff"],
)
def test_nobody_else_comes_in(given):
    who = Authenticator([entry(new_key())])
    with pytest.raises(InvalidRequestError) as refused:
        who.identify(given)
    status, body, headers = error_body(refused.value)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert headers == {"WWW-Authenticate": "Bearer"}


def test_no_keys_at_all_is_not_the_same_as_not_asking():
    with pytest.raises(InvalidRequestError):
        Authenticator([]).identify("Bearer x")


def test_a_revoked_key_is_refused_like_one_that_never_was():
    key = new_key()
    messages = []
    for who in (Authenticator([entry(key, revoked=True)]), Authenticator([])):
        with pytest.raises(InvalidRequestError) as refused:
            who.identify(f"Bearer {key}")
        messages.append(str(refused.value))
    assert len(set(messages)) == 1


def test_new_limits_hold_at_once_and_what_was_used_stays_used():
    key = new_key()
    who = Authenticator([entry(key, limits=KeyLimits(requests_per_minute=2))])
    quota = who.identify(f"Bearer {key}").quota
    quota.count_request(time.monotonic())
    who.replace([entry(key, limits=KeyLimits(requests_per_minute=1))])
    with pytest.raises(QuotaError):
        who.identify(f"Bearer {key}").quota.count_request(time.monotonic())


class Running:
    """A request under way."""

    error: InvalidRequestError | None = None

    def fail(self, error: InvalidRequestError) -> None:
        self.error = error


@pytest.mark.parametrize(
    "after",
    [
        lambda key: [entry(key, revoked=True)],
        lambda key: [],
        lambda key: [entry(new_key())],  # another secret under the same name
        lambda key: [entry(key, tenant="other")],
    ],
    ids=["revoked", "gone", "another secret", "another tenant"],
)
def test_what_a_key_runs_ends_with_it(after):
    one, two = new_key(), new_key()
    who = Authenticator([entry(one), entry(two, "two")])
    mine, others, late = Running(), Running(), Running()
    principal = who.identify(f"Bearer {one}")
    principal.runs(mine)
    who.identify(f"Bearer {two}").runs(others)
    who.replace([entry(one, limits=KeyLimits(streams=1)), entry(two, "two")])
    assert mine.error is None  # other limits are no reason
    who.replace([*after(one), entry(two, "two")])
    assert mine.error is not None and mine.error.status == 401
    assert others.error is None
    # One that was being opened meanwhile.
    principal.runs(late)
    assert late.error is not None


def test_a_key_that_is_valid_again_is_valid():
    key = new_key()
    who = Authenticator([entry(key, limits=KeyLimits(requests_per_minute=1))])
    who.identify(f"Bearer {key}").quota.count_request(time.monotonic())
    for revoked in (True, False):
        who.replace([entry(key, revoked=revoked, limits=KeyLimits(requests_per_minute=1))])
    principal, running = who.identify(f"Bearer {key}"), Running()
    principal.runs(running)
    assert running.error is None
    with pytest.raises(QuotaError):  # what was used stays used
        principal.quota.count_request(time.monotonic())


async def test_the_file_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(authentication, "RELOAD_S", 0.01)
    path, one, two = tmp_path / "keys.yaml", new_key(), new_key()
    save_keys(path, [entry(one)])
    file = KeyFile(path)
    who = Authenticator(file.keys)
    told: list[bool] = []
    following = asyncio.create_task(file.follow(who, told.append))

    async def until(accepted: list[str], refused: list[str]) -> None:
        async with asyncio.timeout(10):
            while True:
                try:
                    for key in accepted:
                        who.identify(f"Bearer {key}")
                    for key in refused:
                        with pytest.raises(InvalidRequestError):
                            who.identify(f"Bearer {key}")
                    return
                except (InvalidRequestError, pytest.fail.Exception):
                    await asyncio.sleep(0.01)

    save_keys(path, [entry(one), entry(two, "two")])
    await until([one, two], [])
    save_keys(path, [entry(one, revoked=True), entry(two, "two")])
    await until([two], [one])
    assert not any(told)
    path.write_text("- nonsense")
    await asyncio.sleep(0.1)
    await until([two], [one])
    path.unlink()
    await asyncio.sleep(0.1)
    await until([two], [one])
    assert told[-2:] == [True, True]
    save_keys(path, [entry(one)])
    await until([one], [two])
    assert told[-1] is False
    following.cancel()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid YAML"),
        ("a: 1", "list"),
        ("- id: x\n  tenant: t", "hash"),
        ("- {id: x, tenant: t, hash: 'sha256:abc'}", "hash"),
        (f"- {{id: x, tenant: 'a b', hash: '{key_hash('k')}'}}", "tenant"),
        (f"- {{id: x, tenant: t, hash: '{key_hash('k')}', limit: 1}}", "limit"),
        (f"- {{id: x, tenant: t, hash: '{key_hash('k')}', limits: {{streams: 0}}}}", "streams"),
        (2 * f"- {{id: x, tenant: t, hash: '{key_hash('k')}'}}\n", "same id"),
        (
            f"- {{id: x, tenant: t, hash: '{key_hash('k')}'}}\n"
            f"- {{id: y, tenant: t, hash: '{key_hash('k')}'}}\n",
            "same hash",
        ),
    ],
)
def test_a_bad_file_says_what_is_wrong(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_keys(text, "keys.yaml")


def test_an_error_never_repeats_what_stands_where_a_hash_belongs():
    with pytest.raises(ConfigError) as error:
        parse_keys("- {id: x, tenant: t, hash: sk-tf-secret}", "keys.yaml")
    assert "secret" not in str(error.value)


def test_the_command_makes_lists_and_revokes(tmp_path, capsys):
    path = tmp_path / "keys.yaml"
    at = ["--file", str(path)]
    assert main(["keys", "create", "--tenant", "acme", "--id", "k", "--streams", "3", *at]) == 0
    shown = capsys.readouterr().out
    key = next(line.strip() for line in shown.splitlines() if "sk-tf-" in line)
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Authenticator(load_keys(path)).identify(f"Bearer {key}").tenant == "acme"
    assert main(["keys", "list", *at]) == 0
    assert capsys.readouterr().out == "k  tenant=acme  active  streams=3\n"
    assert main(["keys", "revoke", "k", *at]) == 0
    assert "k  tenant=acme  revoked" in (main(["keys", "list", *at]), capsys.readouterr().out)[1]
    with pytest.raises(InvalidRequestError):
        Authenticator(load_keys(path)).identify(f"Bearer {key}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create", "--tenant", "acme", "--id", "k"], "has a key named 'k' already; choose"),
        (["create", "--tenant", "a b"], "--tenant: 1 to 64 letters"),
        (["create", "--tenant", "a", "--id", ""], "--id: 1 to 64 letters"),
        (["create", "--tenant", "a", "--requests-per-minute", "-1"], "--requests-per-minute: "),
        (["revoke", "nobody"], "has no key named 'nobody'; it has: k."),
        (["list", "--file", "/nowhere/keys.yaml"], "cannot read the API keys in '/nowhere"),
        (["create", "--tenant", "a", "--file", "/nowhere/keys.yaml"], "cannot write '/nowhere"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, words, says):
    path = tmp_path / "keys.yaml"
    save_keys(path, [entry(new_key(), "k")])
    before = path.read_text()
    command, *rest = words
    assert main(["keys", command, "--file", str(path), *rest]) == 2
    told = capsys.readouterr()
    assert says in told.err and "sk-tf-" not in told.out + told.err
    assert path.read_text() == before


def test_the_longest_tenant_has_a_key_too(tmp_path):
    path = tmp_path / "keys.yaml"
    assert main(["keys", "create", "--tenant", "a" * 64, "--file", str(path)]) == 0
    (key,) = load_keys(path)
    assert key.tenant == "a" * 64 and len(key.id) == 64


def test_whoever_reads_the_file_can_do_so_after_a_change(tmp_path):
    """Root revokes a key in the file of the server's user: were it root's then, the server would
    keep the keys it knows."""
    path, link = tmp_path / "keys.yaml", tmp_path / "link.yaml"
    save_keys(path, [entry(new_key(), "k")])
    link.symlink_to(path)
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12346)
    before = path.stat()
    assert main(["keys", "revoke", "k", "--file", str(link)]) == 0
    after = path.stat()
    assert link.is_symlink() and load_keys(path)[0].revoked
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


def test_changes_at_the_same_time_are_all_there(tmp_path):
    path = tmp_path / "keys.yaml"
    save_keys(path, [entry(new_key(), "k")])
    create = ["keys", "create", "--tenant", "acme", "--file", str(path)]
    commands = [create] * 12 + [["keys", "revoke", "k", "--file", str(path)]]

    def run(words: list[str]) -> int:
        args = build_parser().parse_args(words)
        return args.run(args)

    with ThreadPoolExecutor(13) as pool:
        assert set(pool.map(run, commands)) == {0}
    keys = load_keys(path)
    assert len(keys) == 13 and keys[0].revoked
