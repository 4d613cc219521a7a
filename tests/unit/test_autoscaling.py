"""How many replicas are wanted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow.cluster.autoscaling import TTFT, UTILISATION, UtilisationPolicy, measures, wanted
from tokenflow.cluster.config import load_config
from tokenflow.replicas.errors import ConfigError
from tokenflow.replicas.load import LoadReport

REPORT = LoadReport(capacity=1000.0, prefill_s=1e-3, memory_tokens=10_000, expected_output=50)


def count(utilisations, ttfts=(), current=None, target=0.5, max_ttft_s=2.0) -> int:
    return wanted(
        utilisations,
        ttfts,
        len(utilisations) if current is None else current,
        target_utilisation=target,
        max_ttft_s=max_ttft_s,
    )


def test_the_utilisation_is_brought_to_the_target():
    assert count([1.0, 1.0]) == 4
    assert count([0.1, 0.1, 0.1, 0.1]) == 1
    assert count([0.5, 0.5]) == 2
    assert count([0.0]) == 1


def test_replicas_that_say_nothing_are_like_the_others():
    assert count([0.8], current=4) == 7
    assert count([], current=3) == 3


def test_while_all_keep_requests_waiting_one_more_is_added():
    assert count([0.1, 0.1], [5.0, 3.0]) == 3
    assert count([0.1, 0.1], [5.0, 1.0]) == 1


@given(st.lists(st.floats(0, 20), min_size=1, max_size=20), st.floats(0.1, 1.0))
def test_what_is_wanted_brings_the_mean_to_the_target_or_below_and_no_further_than_needed(
    u, target
):
    n = count(u, target=target)
    assert sum(u) / n <= target * (1 + 1e-6)
    assert n == 1 or sum(u) / (n - 1) > target * (1 - 1e-6)


def test_a_replica_tells_its_promises_and_its_waiting():
    assert measures(LoadReport()) == {UTILISATION: 0.0, TTFT: 0.0}
    assert measures(replace(REPORT, rate=460.0))[UTILISATION] == pytest.approx(0.5)
    full = measures(replace(REPORT, rate=1840.0, remaining_tokens=8000, queued_tokens=100))
    assert full == {UTILISATION: pytest.approx(2.0), TTFT: pytest.approx(4.0)}


def test_serve_is_told_what_is_wanted_whatever_it_knows():
    policy = UtilisationPolicy(target_utilisation=0.5, max_ttft_s=2.0)

    def context(metrics):
        return SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=2)

    assert policy(context({})) == (2, {})
    assert policy(context(None)) == (2, {})
    assert policy(context({UTILISATION: {"a": 1.0, "b": 1.0}, TTFT: {"a": 0.0}})) == (4, {})


def test_bounds_that_contradict_each_other_are_refused():
    config = load_config(None, {"replicas.autoscaling": {"max": 4}}).replicas
    assert config.autoscaling is not None and (config.autoscaling.min, config.most) == (1, 4)
    assert load_config(None, {"replicas.count": 3}).replicas.most == 3
    with pytest.raises(ConfigError, match="min must not be above max"):
        load_config(None, {"replicas.autoscaling": {"min": 5, "max": 4}})
