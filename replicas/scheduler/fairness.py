"""Turns: whose request comes next when tenants share a device. Pure functions over arrays.

A request's *turn* is what its tenant asks for by the requests before it. Served by turns, every
tenant gets as much as any other that wants it, and what one does not want goes to the others; how
many requests a tenant piles up moves only its own back. With a single tenant the order is that of
arrival. [start-time fair queueing: Goyal et al., SIGCOMM 1996; among tenants of a language model:
Sheng et al., VTC, OSDI 2024. Ours counts what is there now and remembers nothing.]
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def turns(
    tenant: NDArray[np.int64], order: NDArray[np.int64], cost: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The turn of each request, all shapes [requests]; in the unit of `cost`, which is what each
    asks for. `tenant` are codes; `order` has the requests in order of arrival."""
    rows = order[np.argsort(tenant[order], kind="stable")]
    tenants = tenant[rows]
    before = np.cumsum(cost[rows]) - cost[rows]
    begins = np.flatnonzero(np.concatenate(([True], tenants[1:] != tenants[:-1])))
    lengths = np.diff(np.append(begins, len(rows)))
    turn = np.empty(len(rows), np.float64)
    turn[rows] = before - np.repeat(before[begins], lengths)
    return turn


def fair_share(demands: Iterable[float], total: float) -> float:
    """The most that any of those may have of `total` so that none gets less for another's sake:
    infinite when there is enough for all. [max-min fairness: Bertsekas and Gallager 1992, 6.5.2]"""
    wanted = sorted(demands)
    left = total
    for i, demand in enumerate(wanted):
        equal = left / (len(wanted) - i)
        if demand > equal:
            return equal
        left -= demand
    return math.inf


def entitled(
    tenant: NDArray[np.int64],
    order: NDArray[np.int64],
    wants: NDArray[np.float64],
    total: float,
) -> NDArray[np.bool_]:
    """The requests that their tenants' fair shares of `total` cover, in order of arrival; nobody
    where there is enough for all, and none of a tenant that asks for more than twice its share. All
    shapes [requests]; `order` as for `turns`."""
    sums = np.bincount(tenant, weights=wants)
    share = fair_share(sums[sums > 0].tolist(), total)
    if share == math.inf:
        return np.zeros(len(tenant), bool)
    covered: NDArray[np.bool_] = turns(tenant, order, wants) + wants <= share * (1 + 1e-9)
    return covered & (sums <= 2 * share)[tenant]
