"""Grounds, grains, outlines and patterns of the generated set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Plane = Callable[[np.ndarray, np.ndarray], np.ndarray]

_GROUNDS, _VARIANTS = 12, 4  # textures in the bank of grounds, and of each grain
GRAINS = 4


def ground_bank(rng: np.random.Generator, side: int) -> np.ndarray:
    """[n, side, side] float32 in 0..1: clouds and wide waves, nothing finer than some ten pixels."""
    bank = []
    for k in range(_GROUNDS):
        clouds = _noise(rng, side, rng.uniform(28, 60)) + 0.5 * _noise(rng, side, rng.uniform(12, 20))
        if k % 3 == 0:
            clouds = 0.5 * clouds + _waves(rng, side, rng.uniform(18, 40))
        bank.append(_unit(clouds))
    return np.stack(bank)


def grain_bank(rng: np.random.Generator, side: int) -> list[np.ndarray]:
    """Of each grain [n, side, side] float32 in 0..1: grit, fine waves, a weave, spots."""
    makers: tuple[Callable[[], np.ndarray], ...] = (
        lambda: _noise(rng, side, 2.0),
        lambda: _waves(rng, side, rng.uniform(4, 6)),
        lambda: _waves(rng, side, rng.uniform(5, 7)) * _waves(rng, side, rng.uniform(5, 7)),
        lambda: np.where(_noise(rng, side, 5.0) > 0.62, 1.0, 0.0),
    )
    return [np.stack([_unit(make()) for _ in range(_VARIANTS)]) for make in makers]


def _noise(rng: np.random.Generator, side: int, period: float) -> np.ndarray:
    """[side, side] float64 in 0..1: random values on a grid of the given period, bilinear between."""
    cells = int(side / period) + 2
    grid = rng.random((cells, cells))
    at = np.arange(side) / period
    low = at.astype(np.int64)
    part = at - low
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _waves(rng: np.random.Generator, side: int, period: float) -> np.ndarray:
    """[side, side] float64 in -1..1: parallel waves in a random direction."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    at = np.arange(side) * (2 * np.pi / period)
    return np.sin(at[:, None] * np.sin(angle) + at * np.cos(angle) + phase)


def _unit(texture: np.ndarray) -> np.ndarray:
    low, high = texture.min(), texture.max()
    return ((texture - low) / (high - low)).astype(np.float32)


def _blob(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    r2 = u * u + v * v
    return r2 * r2 * r2 < (r2 + np.float32(0.3) * u * (u * u - 3 * v * v) * np.float32(0.9)) ** 2  # r < 1 + a cos 3t


# Bodies: u, v in units of the radius, the part lies towards u = 0.5.
SHAPES: tuple[Plane, ...] = (
    lambda u, v: u * u + v * v < 1,
    lambda u, v: u * u * u * u + v * v * v * v < np.float32(0.8),
    lambda u, v: (np.abs(v) < np.float32(0.55) * (1 + u)) & (u < np.float32(0.8)),
    lambda u, v: (u * u + v * v < 1) & ((u + np.float32(0.75)) ** 2 + v * v > np.float32(0.3)),
    _blob,
)


def _of_sixths(x: np.ndarray) -> np.ndarray:
    return np.floor(3 * x).astype(np.int32) & 1


# Parts: u, v in -1..1 over the part; true where the bright colour is.
PATTERNS: tuple[Plane, ...] = (
    lambda u, v: _of_sixths(u) == 1,
    lambda u, v: _of_sixths(u) == _of_sixths(v),
    lambda u, v: (u * u + v * v < np.float32(0.12)) | (u * u + v * v > np.float32(0.5)),
    lambda u, v: (np.abs(u) < np.float32(0.28)) | (np.abs(v) < np.float32(0.28)),
    lambda u, v: u * v > 0,
)
