"""Curves as inline SVG: no script, no fonts, the colours those of the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from wsss_models.data.artefacts import shown

NUM_COLOURS = 6  # classes c0 .. c5 of the style sheet
_WIDTH, _HEIGHT = 340, 190  # of the drawing; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 10, 24  # margins round the curves
_POINTS = 240  # of a curve: about one a pixel

Curve = Sequence[tuple[float, float]]  # (step, value), ascending steps


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over the `window` values round each, fewer at the ends.

    Args:
        values: [n].
        window: >= 1; an even one counts as the next odd one.

    Returns:
        np.ndarray: [n] float64.

    Example:
        >>> smoothed(np.array([0.0, 3.0, 6.0]), 3).tolist()
        [1.5, 3.0, 4.5]
    """
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in low..high, about `count` of them.

    Example:
        >>> ticks(0, 1.7)
        [0.0, 0.5, 1.0, 1.5]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    return [float(f"{k * step:.10g}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, curves: Mapping[str, Curve]) -> str:
    """A small chart: each curve faintly as it is, and smoothed over a twentieth of its length.

    Args:
        title: over it; any text.
        curves: name -> points; names of any text, curves without a point are left out.

    Returns:
        str: a <figure> with the drawing and, under it, the last smoothed value of each curve.
    """
    drawn = {name: np.asarray(points, dtype=np.float64) for name, points in curves.items() if len(points)}
    if not drawn:
        return f'<figure class="chart"><h4>{_text(title)}</h4><p class="soft">no finished step</p></figure>'
    smooth = {name: smoothed(points[:, 1], max(1, len(points) // 20)) for name, points in drawn.items()}
    steps = (min(p[0, 0] for p in drawn.values()), max(p[-1, 0] for p in drawn.values()))
    tops = [max(s.max(), np.quantile(p[:, 1], 0.98)) for s, p in zip(smooth.values(), drawn.values(), strict=True)]
    low, high = min(0.0, *(s.min() for s in smooth.values())), max(tops)
    high = high if high > low else low + 1.0
    plot = _Plot(steps[0], max(steps[1], steps[0] + 1), low, high)
    parts = [*plot.axes()]
    for i, (name, points) in enumerate(drawn.items()):
        colour = f"c{i % NUM_COLOURS}"
        parts.append(plot.line(points[:, 0], points[:, 1], f"raw {colour}"))
        parts.append(plot.line(points[:, 0], smooth[name], colour))
    legend = "".join(
        f'<li><span class="key c{i % NUM_COLOURS}"></span>{_text(name)} <b>{smooth[name][-1]:.4g}</b></li>'
        for i, name in enumerate(drawn)
    )
    label = f"{title}: {', '.join(drawn)} by step"
    return (
        f'<figure class="chart"><h4>{_text(title)}</h4>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


class _Plot:
    """Numbers to places on the drawing."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self._left, self._right, self._low, self._high = left, right, low, high

    def _x(self, step: float | np.ndarray) -> float | np.ndarray:
        return _LEFT + (step - self._left) / (self._right - self._left) * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float | np.ndarray) -> float | np.ndarray:
        share = (np.clip(value, self._low, self._high) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> list[str]:
        parts = []
        for value in ticks(self._low, self._high):
            y = self._y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
        for step in ticks(self._left, self._right):
            if step == round(step):
                x, y = self._x(step), _HEIGHT - _BOTTOM + 16
                parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{step:g}</text>')
        return parts

    def line(self, steps: np.ndarray, values: np.ndarray, name: str) -> str:
        """Neighbouring points are averaged where there are more than the drawing can show."""
        bins = np.arange(len(steps)) * min(_POINTS, len(steps)) // len(steps)
        size = np.bincount(bins)
        x = self._x(np.bincount(bins, steps) / size)
        y = self._y(np.bincount(bins, values) / size)
        if len(size) == 1:
            return f'<circle class="{name}" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="2.5"/>'
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        return f'<polyline class="{name}" points="{points}"/>'


def _text(text: str) -> str:
    return html.escape(shown(text))
