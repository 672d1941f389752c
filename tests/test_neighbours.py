"""neighbour_offsets: the order that axis 1 of every affinity follows."""

import pytest

import wsss_kernels as wk

RADII = range(1, 17)


def test_by_hand():
    assert wk.neighbour_offsets(1) == []
    assert wk.neighbour_offsets(2) == [(0, 1), (1, -1), (1, 0), (1, 1)]
    assert wk.neighbour_offsets(3) == [
        (0, 1), (0, 2),
        (1, -2), (1, -1), (1, 0), (1, 1), (1, 2),
        (2, -2), (2, -1), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip


def test_published_counts():
    assert wk.neighbour_offsets() == wk.neighbour_offsets(5)
    assert len(wk.neighbour_offsets(5)) == 34
    assert len(wk.neighbour_offsets(10)) == 152


@pytest.mark.parametrize("radius", RADII)
def test_against_the_disc(radius, oracle):
    offsets = wk.neighbour_offsets(radius)
    assert offsets == oracle.offsets(radius)
    assert offsets == sorted(set(offsets))  # row-major, none twice
    both_halves = set(offsets) | {(-dy, -dx) for dy, dx in offsets}
    assert len(both_halves) == 2 * len(offsets) and (0, 0) not in both_halves


def test_result_is_the_callers_own():
    wk.neighbour_offsets(3).clear()
    assert len(wk.neighbour_offsets(3)) == 12


@pytest.mark.parametrize("radius", [0, -1, 17, 10**20])
def test_refuses_out_of_range(radius):
    with pytest.raises(ValueError, match=rf"radius must be .*1\.\.16.*got {radius}"):
        wk.neighbour_offsets(radius)


@pytest.mark.parametrize("radius", [5.0, "5", None, True, [5], float("nan")])
def test_refuses_no_int(radius):
    with pytest.raises(TypeError, match="radius must be an int"):
        wk.neighbour_offsets(radius)
