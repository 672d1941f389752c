"""The Triton kernels of kmeans, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.reference.kmeans import random_draws
from wsss_kernels.triton import kmeans, launch

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small problems take several."""
    monkeypatch.setattr(launch, "ROW_SUMS",
                        launch.Configuration(32, {"CHUNK": 32, "ROWS": 16, "CENTERS": 16, "COLUMNS": 16}))  # fmt: skip
    monkeypatch.setattr(launch, "LABELS", launch.Configuration(32, {"ROWS": 16, "CENTERS": 4}))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 20, 7), (70, 33, 18), (1, 1, 1), (9, 5, 9)], ids=str)
def test_given_centers(assert_close, shape):
    rows, dim, k = shape
    x = rand(rows, dim) + 3
    draws = random_draws(k, 1, 0)
    for iterations, tol in ((300, 1e-4), (2, 0.0)):
        labels, centers, inertia, n_iter = kmeans.kmeans(x, k, x[:k], draws, iterations, tol)
        expected = reference.kmeans(x.double(), k, init=x[:k].double(), iterations=iterations, tol=tol)
        assert torch.equal(labels, expected.labels) and n_iter == expected.n_iter
        assert_close(centers, expected.centers)
        assert inertia == pytest.approx(expected.inertia, rel=1e-5, abs=1e-9)


def test_seeding(assert_close):
    x = rand(50, 12)
    result = kmeans.kmeans(x, 6, x.new_empty(0), random_draws(6, 3, 4), 300, 1e-4)
    expected = reference.kmeans(x.double(), 6, n_init=3, seed=4)
    assert torch.equal(result[0], expected.labels)
    assert_close(result[1], expected.centers)


def test_half_precision_rows(assert_close):
    x = rand(40, 16).half()
    labels, centers, _, _ = kmeans.kmeans(x, 5, x[:5], random_draws(5, 1, 0), 300, 1e-4)
    expected = reference.kmeans(x.double(), 5, init=x[:5].double())
    assert centers.dtype == torch.float16 and torch.equal(labels, expected.labels)
    assert_close(centers, expected.centers)


def test_empty_clusters_and_duplicates(assert_close):
    x = rand(40, 8)
    start = torch.cat([x[:4], torch.full((3, 8), 1e3)])
    labels, centers, _, _ = kmeans.kmeans(x, 7, start, random_draws(7, 1, 0), 300, 1e-4)
    expected = reference.kmeans(x.double(), 7, init=start.double())
    assert torch.equal(labels, expected.labels)
    assert_close(centers, expected.centers)
    assert kmeans.kmeans(torch.ones(6, 3), 4, x.new_empty(0), random_draws(4, 1, 0), 300, 1e-4)[2] == 0


def test_rows_that_are_not_finite_are_told():
    x = rand(20, 4)
    x[3, 2] = float("nan")
    assert kmeans.kmeans(x, 3, x.new_empty(0), random_draws(3, 1, 0), 300, 1e-4)[3] == 0
