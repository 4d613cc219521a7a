"""Least squares as a cost model needs it: no negative cost, relative errors, and no attention to
the steps that something else on the machine interrupted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_HUBER = 1.345
"""Residuals beyond that many standard deviations lose weight. [Huber 1964]"""
_ROUNDS = 30
_LONGEST = 3.0
"""A step that took more than so many times what it should was not the engine's alone."""


def fit(features: Floats, seconds: Floats) -> Floats:
    """Coefficients >= 0, shape [k], of `features` [n, k] that explain positive `seconds` [n] with
    the least relative error. Raises ValueError without observations."""
    if len(seconds) == 0:
        raise ValueError("nothing was observed")
    relative = features / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    weights = np.ones(len(seconds))
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        found = nnls(relative * root[:, None], root)
        residuals = np.abs(1.0 - relative @ found)
        deviation = 1.4826 * float(np.median(residuals))
        if deviation < 1e-9:
            break
        weights = np.minimum(1.0, _HUBER * deviation / np.maximum(residuals, 1e-12))
    return np.asarray(found / scale)


def nnls(a: Floats, b: Floats) -> Floats:
    """The x >= 0 with the least |a x - b|. [Lawson and Hanson 1974, chapter 23]"""
    columns = a.shape[1]
    x = np.zeros(columns)
    free = np.zeros(columns, dtype=bool)
    for _ in range(10 * columns):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        best = int(gradient.argmax())
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        while free.any():
            target = np.zeros(columns)
            target[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            negative = free & (target <= 0)
            if not negative.any():
                x = target
                break
            # As far towards the target as all stay positive; whoever reaches 0 stays there.
            step = np.min(x[negative] / (x[negative] - target[negative]))
            x = x + step * (target - x)
            free &= x > 1e-14
            x[~free] = 0.0
    return x


def mean_over_typical(seconds: Floats, typical: Floats) -> float:
    """What steps take together, as a multiple of what they typically take."""
    return float(np.minimum(seconds, _LONGEST * typical).sum() / typical.sum())
