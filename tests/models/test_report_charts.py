"""The curves of a report: smoothing, ticks, and lines that stay in their frame."""

import re
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("PIL")
from wsss_models.report_charts import chart, smoothed, ticks

from tests.models.pages import Page


def test_smoothed_against_a_loop():
    values = np.random.default_rng(0).random(31)
    for window in (1, 3, 8, 99):
        half = window // 2
        expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
        assert smoothed(values, window).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 250), (0, 1e-16), (1, 30000), (0.1, 0.1001)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in found)
    assert all(b - a == pytest.approx(found[1] - found[0]) for a, b in pairwise(found))


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"a": []},
        {"a": [(1, 2.0)]},
        {"a": [(1, 2.0), (2, 2.0)]},
        {"a": [(s, -s) for s in range(999)], "b": [(5, 1)]},
    ],
)
def test_chart_stays_in_its_frame(curves):
    text = chart("loss", curves)
    Page(text)
    assert text.count("<polyline") == 2 * sum(len(points) > 1 for points in curves.values())
    numbers = [tuple(map(float, p.split(","))) for ps in re.findall(r'points="([^"]+)"', text) for p in ps.split()]
    assert all(0 <= x <= 340 and 0 <= y <= 190 for x, y in numbers)
    assert len(numbers) <= 2 * 240 * len(curves)
