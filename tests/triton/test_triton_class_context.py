"""The Triton kernels of class_context, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.ops.class_context import _chosen
from wsss_kernels.triton import class_context as kernels
from wsss_kernels.triton import launch

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(launch, "CONTEXT", launch.Configuration(32, {"CHANNELS": 2, "PIXELS": 16}))
    monkeypatch.setattr(launch, "CONTEXT_GRADIENT", launch.Configuration(32, {"CHANNELS": 2, "PIXELS": 16}))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", [(2, 5, 4, 7, 9), (1, 1, 1, 1, 1), (2, 3, 2, 4, 4)], ids=str)
def test_both_directions(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    batch, dim, classes, height, width = shape
    feats = torch.randn(batch, dim, height, width, generator=generator).to(dtype)
    confidence = torch.rand(batch, classes, height, width, generator=generator)
    weights, chosen = _chosen(confidence, 0.4, None)
    right = feats.double().requires_grad_()
    expected = reference.class_context(right, confidence, threshold=0.4)
    out, sums = kernels.class_context(feats, weights, chosen, classes)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    (expected[0] * grad.double()).sum().backward()
    found = kernels.class_context_backward(grad, weights, chosen, sums)
    for x, y in ((out, expected[0].detach()), (sums, expected[1]), (found, right.grad)):
        assert x.shape == y.shape
        assert (x.double() - y).abs().max() <= tolerance * max(y.abs().max().item(), 1e-30)
