"""Policies by name."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.scheduler.registry import POLICIES, make_policy


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_is_made_with_its_defaults_and_takes_each_parameter(name):
    kind, params = POLICIES[name]
    policy = make_policy(name)
    assert isinstance(policy, kind) and policy.name == name
    assert policy.params == params()
    for field in fields(params):
        changed = make_policy(name, {field.name: field.default * 2})
        assert getattr(changed.params, field.name) == field.default * 2
        assert type(getattr(changed.params, field.name)) is type(field.default)


def test_every_policy_is_a_new_one():
    assert make_policy("fcfs") is not make_policy("fcfs")


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown policy 'sjf'.*andes.*fcfs.*slack.*tokenflow"):
        make_policy("sjf")


def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"slack has no parameter 'speed'.*margin_s"):
        make_policy("slack", {"speed": 1.0})
    # Each policy has its own.
    with pytest.raises(ConfigError, match="tokenflow has no parameter 'margin_s'"):
        make_policy("tokenflow", {"margin_s": 1.0})


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, "fast", None, True, [1.0]])
def test_a_value_that_is_no_number_from_0_up_is_refused(value):
    with pytest.raises(ConfigError, match="margin_s of policy slack must be a finite number"):
        make_policy("slack", {"margin_s": value})


def test_a_count_must_be_whole():
    with pytest.raises(ConfigError, match=r"growth_steps of policy slack must be whole, got 2\.5"):
        make_policy("slack", {"growth_steps": 2.5})
    assert make_policy("slack", {"growth_steps": 2.0}).params.growth_steps == 2
    assert make_policy("slack", {"margin_s": 0}).params.margin_s == 0
