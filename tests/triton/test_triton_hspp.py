"""The Triton kernels of hspp, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.triton import hspp, launch

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small maps take several."""
    monkeypatch.setattr(launch, "PYRAMID", launch.Configuration(32, {"BLOCK": 8}))
    monkeypatch.setattr(launch, "PYRAMID_GRADIENT", launch.Configuration(32, {"BLOCK": 16}))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 7, 9), (1, 1, 5, 13), (1, 1, 1, 1)])
@pytest.mark.parametrize("levels", [[1, 2, 4], [3], [1, 2, 3, 4, 5, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_directions(assert_close, shape, levels, dtype):
    levels = [level for level in levels if level <= min(shape[2:])] or [1]
    generator = torch.Generator().manual_seed(0)
    feats = (torch.rand(shape, generator=generator) * 6).round().div(4).to(dtype)  # many ties
    grad = torch.randn(shape[:2], generator=generator).to(dtype)
    out, places = hspp.hspp(feats, levels, 2.0, True)
    leaf = feats.double().requires_grad_()
    expected = reference.hspp(leaf, levels=levels)
    assert out.dtype == dtype
    assert_close(out, expected)
    assert torch.equal(hspp.hspp(feats, levels, 2.0, False)[0], out)
    got = hspp.hspp_backward(grad, places, *shape[2:], levels, 2.0)
    assert_close(got, torch.autograd.grad(expected, leaf, grad.double())[0])


def test_nan_stays_in_its_channel():
    feats = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    feats[0, 1, 2, 2] = float("nan")
    out, places = hspp.hspp(feats, [1, 2, 4], 2.0, True)
    assert out.isnan().tolist() == [[False, True], [False, False]]
    assert places.min() >= 0 and places.max() < 30


def test_empty():
    out, places = hspp.hspp(torch.zeros(0, 3, 4, 4), [1, 2], 2.0, True)
    assert out.shape == (0, 3) and hspp.hspp_backward(out, places, 4, 4, [1, 2], 2.0).shape == (0, 3, 4, 4)
