"""The self-test recovers what it scripted, and notices what is wrong."""

from __future__ import annotations

import asyncio
import time

from tokenflow.loadgen import selftest, virtual_time
from tokenflow.loadgen.selftest import CASES, Check, Load, _most_at_once, check_exactly, measure


def test_every_hand_case_is_recovered_exactly():
    checks = check_exactly()
    assert [check for check in checks if not check.ok] == []
    assert {check.case for check in checks} == {case.name for case in CASES}
    assert len(checks) == sum(len(case.expected) for case in CASES)


def test_the_four_cases_of_the_definitions():
    """Exact pacing 100 effective tokens, all at once 15.5, a stall and a late start 100 each."""
    found = {(c.case, c.figure): c.measured for c in check_exactly()}
    ratios = [value for (_, figure), value in found.items() if figure == "effective_ratio"]
    assert [round(ratio * 100, 6) for ratio in ratios[:3]] == [15.5, 100, 100]
    assert round(found["2 s stall at token 50", "andes_qoe_mean"], 3) == 0.863
    assert round(found["5 s late start", "andes_qoe_mean"], 3) == 0.505


def test_a_wrong_figure_is_wrong():
    assert not Check("", "", 1.0, 1.0001).ok
    assert not Check("", "", 1.0, None).ok
    assert Check("", "", 1.0, 1.0 + 1e-9).ok


def test_a_client_that_counts_messages_would_not_pass(monkeypatch):
    """The self-test's own test: break the count, and it must say so."""
    counted = selftest.OpenAITarget._read

    async def by_message(self, response, record, counter, behaver):
        await counted(self, response, record, counter, behaver)
        record.arrivals = [(at, 1) for at, _ in record.arrivals]

    monkeypatch.setattr(selftest.OpenAITarget, "_read", by_message)
    wrong = {check.case for check in check_exactly() if not check.ok}
    assert "4 tokens a message" in wrong and "all at once" in wrong


def test_virtual_time_costs_none():
    async def main() -> float:
        begun = asyncio.get_running_loop().time()
        await asyncio.gather(*(asyncio.sleep(3600 + i) for i in range(5)))
        return asyncio.get_running_loop().time() - begun

    begun = time.monotonic()
    assert virtual_time.run(main()) == 3604
    assert time.monotonic() - begun < 5


def test_in_real_time_nothing_is_lost():
    found = measure(Load(streams=20, ramp_s=0.2, overlap_s=0.8, token_rate=20.0))
    assert (found.failed, found.tokens_missing, found.most_at_once) == (0, 0, 20)
    assert found.late_p50_s <= found.late_p99_s <= found.late_max_s
    assert 0 < found.delivery_p50_s <= found.delivery_p99_s
    # All that is measured too much is what the stub was late, and the delivery.
    assert found.ttft_error_p99_s > 0


def test_the_most_at_once():
    assert _most_at_once([(0, 2), (1, 3), (2.5, 4), (5, 6)]) == 2
    assert _most_at_once([(0, 1), (1, 2)]) == 1
