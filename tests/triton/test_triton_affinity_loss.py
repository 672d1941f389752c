"""The Triton kernels of affinity_loss, interpreted on the CPU, against the reference in float64."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.neighbours import neighbour_count
from wsss_kernels.triton import affinity_loss, launch

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small maps take several."""
    monkeypatch.setattr(launch, "LOSS", launch.Configuration(32, {"BLOCK": 32}))
    monkeypatch.setattr(launch, "REDUCTION", launch.Configuration(32, {"BLOCK": 2}))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_labels(*shape):
    labels = (3 * rand(*shape, seed=1)).long()
    labels[rand(*shape, seed=2) < 0.2] = 255
    return labels


def expected(affinity, labels, radius, cropped, upstream):
    leaf = affinity.double().requires_grad_()
    border = "cropped" if cropped else "full"
    loss = reference.affinity_loss(leaf, labels, radius=radius, border=border)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.tensor(upstream).double())[0]


@pytest.mark.parametrize("shape", [(2, 6, 7), (1, 1, 9), (1, 9, 1), (1, 1, 1), (2, 12, 20)], ids=str)
@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_and_gradient(assert_close, shape, cropped, dtype):
    for radius in (2, 5):
        labels = some_labels(*shape)
        affinity = rand(shape[0], neighbour_count(radius), *shape[1:]).to(dtype)
        wanted = expected(affinity, labels, radius, cropped, 2.0)
        loss, counts = affinity_loss.affinity_loss(affinity, labels, radius, cropped, 255)
        grad = affinity_loss.affinity_loss_backward(
            torch.tensor(2.0, dtype=dtype), affinity, labels, counts, radius, cropped, 255
        )
        assert loss.dtype == grad.dtype == dtype and grad.shape == affinity.shape
        assert_close(loss, wanted[0])
        assert_close(grad, wanted[1])


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_ends(assert_close, end):
    affinity = torch.full((1, 34, 6, 10), end)
    for labels in (torch.zeros(1, 6, 10).int(), torch.arange(10).expand(1, 6, 10).to(torch.uint8)):
        loss = affinity_loss.affinity_loss(affinity, labels, 5, False, -1)[0]
        assert_close(loss, reference.affinity_loss(affinity.double(), labels, border="full", ignore_index=-1))


def test_beyond_the_range_and_nan(assert_close):
    affinity, labels = 1.6 * rand(1, 34, 6, 10) - 0.3, some_labels(1, 6, 10)
    wanted = expected(affinity, labels, 5, False, 1.0)
    loss, counts = affinity_loss.affinity_loss(affinity, labels, 5, False, 255)
    assert_close(loss, wanted[0])
    grad = affinity_loss.affinity_loss_backward(torch.tensor(1.0), affinity, labels, counts, 5, False, 255)
    assert_close(grad, wanted[1])
    affinity[0, :, 2, 3] = math.nan
    labels[0, 2, 3] = 255
    assert affinity_loss.affinity_loss(affinity, labels, 5, False, 255)[0].isfinite()
    labels[0, 2, 3] = 1
    assert affinity_loss.affinity_loss(affinity, labels, 5, False, 255)[0].isnan()


def test_empty():
    for shape in ((0, 34, 3, 4), (1, 34, 0, 4), (2, 0, 3, 4)):
        labels = torch.zeros(shape[0], *shape[2:]).long()
        radius = 5 if shape[1] else 1
        loss, counts = affinity_loss.affinity_loss(torch.zeros(shape), labels, radius, True, 255)
        assert loss == 0 and counts.eq(0).all()
        grad = affinity_loss.affinity_loss_backward(loss, torch.zeros(shape), labels, counts, radius, True, 255)
        assert grad.shape == shape
