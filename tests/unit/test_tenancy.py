"""Names that keep tenants apart."""

from __future__ import annotations

from tokenflow.cluster.tenancy import TENANT, public_id, scoped_id, scoped_salt, tenant_of


def test_without_a_tenant_names_are_as_they_were_given():
    assert scoped_id("", "cmpl-1") == "cmpl-1"
    assert scoped_salt("", None) is None
    assert scoped_salt("", "mine") == "mine"
    assert (public_id("cmpl-1"), tenant_of("cmpl-1")) == ("cmpl-1", "")


def test_a_tenants_names_are_its_own_and_lead_back():
    scoped = scoped_id("acme", "cmpl-1")
    assert (public_id(scoped), tenant_of(scoped)) == ("cmpl-1", "acme")
    names = {
        scoped_id(t, i) for t in ("", "a", "ab", "a.b") for i in ("x", "b.x", "a", "ab", "a-x")
    }
    assert len(names) == 20


def test_salts_of_two_tenants_never_meet():
    salts = [scoped_salt(t, s) for t in ("a", "b", "ab") for s in (None, "a", "b", "a b", " ")]
    assert len(set(salts)) == len(salts)
    assert all(not TENANT.fullmatch(bad) for bad in ("", "a b", " a", "a\n", "-a", "x" * 65))
