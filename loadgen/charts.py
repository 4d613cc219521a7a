"""Charts as SVG text: axes, lines, steps, areas, bars. Nothing here knows what is drawn.

All have the same small canvas, whose letters stay readable on a phone and on a wide screen, and
take their colours from the page's style sheet (classes `s0`, `s1`, ...), so that they follow its
theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from html import escape

WIDTH, HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 38
_LOG_LEAST = 1e-3

Points = Seq[tuple[float, float]]


class Chart:
    """A canvas with axes. Values are placed by `x` and `y`; what lies outside is cut off."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        x_label: str,
        y_label: str,
        title: str,
        log_x: bool = False,
        y_ticks: bool = True,
    ) -> None:
        self._log = log_x
        low, high = x
        if log_x:
            low, high = max(low, _LOG_LEAST), max(high, _LOG_LEAST)
        self._x = (low, high if high > low else low + 1)
        self._y = (y[0], y[1] if y[1] > y[0] else y[0] + 1)
        self._labels = (x_label, y_label)
        self._title = title
        self._y_ticks = y_ticks
        self._parts: list[str] = []
        self._over: list[str] = []

    def x(self, value: float) -> float:
        low, high = self._x
        if self._log:
            value, low, high = (math.log10(max(v, _LOG_LEAST)) for v in (value, low, high))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    def line(self, points: Points, style: str, *, hint: str = "", step: bool = False) -> None:
        """Straight from point to point, or holding each value until the next."""
        if not points:
            return
        path = f"M{self.x(points[0][0])},{self.y(points[0][1])}"
        for at, value in points[1:]:
            path += f"H{self.x(at)}V{self.y(value)}" if step else f"L{self.x(at)},{self.y(value)}"
        self._parts.append(f'<path class="line {style}" d="{path}">{_hint(hint)}</path>')

    def area(self, points: Points, base: Points, style: str, *, hint: str = "") -> None:
        """Between two lines over the same times."""
        there = [f"{self.x(at)},{self.y(value)}" for at, value in points]
        back = [f"{self.x(at)},{self.y(value)}" for at, value in reversed(base)]
        shape = f'<polygon class="area {style}" points="{" ".join(there + back)}">'
        self._parts.append(f"{shape}{_hint(hint)}</polygon>")

    def box(
        self, x0: float, x1: float, y0: float, y1: float, style: str, *, hint: str = ""
    ) -> None:
        left, right = self.x(x0), self.x(x1)
        low, high = self.y(y0), self.y(y1)
        shape = f'<rect class="box {style}" x="{left}" y="{high}" '
        size = f'width="{max(0.6, right - left):.1f}" height="{max(0.6, low - high):.1f}"'
        self._parts.append(f"{shape}{size}>{_hint(hint)}</rect>")

    def upright(self, at: float, text: str) -> None:
        """A marked value of the x axis."""
        left = self.x(at)
        anchor, beside = ("end", left - 4) if left > WIDTH * 0.7 else ("start", left + 4)
        self._over.append(
            f'<line class="mark" x1="{left}" x2="{left}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
            f'<text class="marked" text-anchor="{anchor}" x="{beside}" '
            f'y="{_TOP + 11}">{escape(text)}</text>'
        )

    def whisker(self, at: float, low: float, high: float) -> None:
        left = self.x(at)
        self._over.append(
            f'<path class="whisker" d="M{left - 4},{self.y(low)}h8m-4,0V{self.y(high)}m-4,0h8"/>'
        )

    def text(self, at: float, value: float, text: str, *, above: bool = True) -> None:
        self._over.append(
            f'<text class="value" text-anchor="middle" x="{self.x(at)}" '
            f'y="{self.y(value) - 5 if above else HEIGHT - _BOTTOM + 14}">{escape(text)}</text>'
        )

    def svg(self, *, x_ticks: bool = True) -> str:
        """The chart, to stand in a page as it is."""
        grid = []
        if self._y_ticks:
            for value in ticks(*self._y):
                top = self.y(value)
                grid.append(
                    f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{top}" y2="{top}"/>'
                )
                grid.append(
                    f'<text text-anchor="end" x="{_LEFT - 5}" y="{top + 4}">{short(value)}</text>'
                )
        if x_ticks:
            chosen = decades(*self._x) if self._log else ticks(*self._x)
            for value in chosen:
                grid.append(
                    f'<text text-anchor="middle" x="{self.x(value)}" '
                    f'y="{HEIGHT - _BOTTOM + 14}">{short(value)}</text>'
                )
        x_label, y_label = map(escape, self._labels)
        bottom = HEIGHT - _BOTTOM
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self._title)}">'
            f"{''.join(grid)}{''.join(self._parts)}"
            f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f"{''.join(self._over)}"
            f'<text class="label" text-anchor="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}">'
            f"{x_label}</text>"
            f'<text class="label" x="2" y="{HEIGHT - 6}">{y_label}</text>'
            "</svg>"
        )  # fmt: skip


def ticks(low: float, high: float) -> list[float]:
    """About five round values between the two."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between the two, and 2 and 5 of them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def short(value: float) -> str:
    """A tick's label."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"


def distribution(values: Iterable[float]) -> list[tuple[float, float]]:
    """The points of a cumulative distribution: (value, share up to it)."""
    ordered = sorted(values)
    n = len(ordered)
    return [(value, (i + 1) / n) for i, value in enumerate(ordered)]


def _hint(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
