"""`kmeans` beside scikit-learn's and plain PyTorch, on rows like a network's pooled features."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks.cases import Aim, Case, Inputs, Result, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None
CLUSTERS = 10
# Images of each class of PASCAL VOC's training set as SC-CAM counts them: 267 with a cow to 4155 with a person.
SHARES = [267, 285, 300, 320, 345, 370, 400, 430, 465, 500, 540, 585, 635, 690, 750, 815, 890, 1200, 2516, 4155]
ONE = Size("3000x4096", 3000, 1, dim=4096)
CLASSES = Size("20 classes x4096", SHARES[-1], 1, dim=4096)


def _rows(count: int, dim: int, seed: int) -> Tensor:
    """Not negative, a few broad clusters that overlap: iterations go on for a while."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, dim, generator=generator)
    weights = torch.rand(count, 40, generator=generator) ** 8
    weights /= weights.sum(1, keepdim=True)
    return (weights @ centers + 0.3 * torch.randn(count, dim, generator=generator)).relu()


def _one(size: Size) -> Inputs:
    x = _rows(max(CLUSTERS, size.height), size.dim, 0)
    return {"x": [x], "start": [x[:CLUSTERS].clone()]}


def _classes(size: Size) -> Inputs:
    counts = [max(CLUSTERS, share * size.height // SHARES[-1]) for share in SHARES]
    x = [_rows(count, size.dim, seed) for seed, count in enumerate(counts)]
    return {"x": x, "start": [rows[:CLUSTERS].clone() for rows in x]}


def _centers(results: list[Any]) -> list[Tensor]:
    return [result.centers for result in results]


def _inertia(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _sklearn(inputs: Inputs, seeded: bool) -> Callable[[], Result]:
    from sklearn.cluster import KMeans

    x, start = ([t.numpy() for t in inputs[name]] for name in ("x", "start"))

    def call() -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits = [
                KMeans(CLUSTERS, init=first if not seeded else "k-means++", n_init=1, random_state=0).fit(rows)
                for rows, first in zip(x, start, strict=True)
            ]
        if seeded:
            return _inertia([fit.inertia_ for fit in fits])
        return [torch.from_numpy(fit.cluster_centers_) for fit in fits]

    return call


def _given(size: Size, inputs: Callable[[Size], Inputs], least: float, *, quick: bool = False) -> Case:
    """From the same first centers: the same result."""
    peers = (Way("scikit-learn", "published", lambda i: _sklearn(i, False), tolerance=1e-4),) if HAS_SKLEARN else ()
    return Case(
        name=f"k-means, given centers {size.name}",
        op="kmeans",
        groups=("kmeans",),
        size=size,
        channels=CLUSTERS,
        inputs=inputs,
        expected=lambda i: [
            wk.reference.kmeans(x.double(), CLUSTERS, init=s.double()).centers
            for x, s in zip(i["x"], i["start"], strict=True)
        ],
        ways=(
            Way(
                "ours",
                "ours",
                lambda i: lambda: _centers(wk.kmeans(i["x"], CLUSTERS, init=i["start"])),
                tolerance=1e-4,
            ),
            *peers,
            Way(
                "torch eager",
                "library",
                lambda i: lambda: _centers(wk.reference.kmeans(i["x"], CLUSTERS, init=i["start"])),  # type: ignore[arg-type]
                tolerance=1e-4,
            ),
        ),
        aims=(Aim("scikit-learn", "ratio", least=least),) if HAS_SKLEARN else (),
        quick=quick,
    )


def _worse(result: Result, expected: Result, inputs: Inputs) -> float:
    """How much more inertia all problems have together: each draws its own first centers."""
    assert isinstance(result, Tensor) and isinstance(expected, Tensor)
    return max(0.0, float(result.sum() / expected.sum()) - 1)


def _seeded(size: Size, inputs: Callable[[Size], Inputs], least: float) -> Case:
    peers = (
        (Way("scikit-learn", "published", lambda i: _sklearn(i, True), tolerance=0.03, compare=_worse),)
        if HAS_SKLEARN
        else ()
    )
    return Case(
        name=f"k-means, k-means++ {size.name}",
        op="kmeans",
        groups=("kmeans", "memory"),
        size=size,
        channels=CLUSTERS,
        inputs=inputs,
        expected=lambda i: _inertia([wk.reference.kmeans(x.double(), CLUSTERS).inertia for x in i["x"]]),
        ways=(
            Way(
                "ours",
                "ours",
                lambda i: lambda: _inertia([r.inertia for r in wk.kmeans(i["x"], CLUSTERS)]),
                tolerance=0.03,
                compare=_worse,
            ),
            *peers,
        ),
        aims=(Aim("scikit-learn", "ratio", least=least),) if HAS_SKLEARN else (),
    )


def _work(rows: int) -> Work:
    """The rows once: how many iterations there are depends on them."""
    values = rows * CLASSES.dim
    return Work(flop=0, bytes=4 * values, products=2 * CLUSTERS * values)


CASES: list[Case] = [
    _given(ONE, _one, 8, quick=True),
    _given(CLASSES, _classes, 8),
    _seeded(CLASSES, _classes, 8),
]
GPU_CASES: list[Case] = [
    on_gpu(_given(ONE, _one, 8), _work(ONE.height), without=("scikit-learn",)),
    on_gpu(_given(CLASSES, _classes, 8), _work(sum(SHARES)), without=("scikit-learn",)),
]


def test_kmeans(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
