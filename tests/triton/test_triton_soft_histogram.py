"""The Triton kernels of soft_histogram, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.triton import launch, soft_histogram

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small inputs take several."""
    block = launch.Configuration(32, {"WORDS": 16, "PIXELS": 16, "DEPTH": 16})
    monkeypatch.setattr(launch, "HISTOGRAM", {16: block})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(feats, codebook, grad, temperature):
    histogram, words, assignment, *kept = soft_histogram.soft_histogram(feats, codebook, temperature)
    grads = soft_histogram.soft_histogram_backward(grad, feats, codebook, *kept, temperature, True, True)
    return histogram, words, assignment, grads


def expected(feats, codebook, grad, temperature):
    leaves = [x.double().requires_grad_() for x in (feats, codebook)]
    histogram, words, assignment = reference.soft_histogram(*leaves, temperature=temperature)
    return histogram.detach(), words, assignment, torch.autograd.grad(histogram, leaves, grad.double())


@pytest.mark.parametrize(
    ("batch", "dim", "height", "width", "count", "temperature"),
    [(2, 5, 3, 7, 4, 1.0), (1, 33, 4, 4, 16, 8.0), (2, 20, 5, 7, 37, 2.0), (1, 1, 1, 1, 1, 1.0)],
)
def test_both_directions(assert_close, batch, dim, height, width, count, temperature):
    feats, codebook = randn(batch, dim, height, width), randn(count, dim, seed=1)
    feats[0, :, 0, 0] = 0
    codebook[count // 2] = codebook[0]
    grad = randn(batch, count, seed=2)
    histogram, words, assignment, grads = run(feats, codebook, grad, temperature)
    wanted = expected(feats, codebook, grad, temperature)
    assert_close(histogram, wanted[0])
    assert torch.equal(words, wanted[1]) and torch.equal(assignment, wanted[2])
    if count > 1 and dim > 1:
        for got, want in zip(grads, wanted[3], strict=True):
            assert_close(got, want)
    else:
        assert all(g.abs().max() < 1e-6 for g in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision(assert_close, dtype, mixed):
    if dtype == torch.bfloat16 and not mixed:
        pytest.skip("the interpreter multiplies the bits of bfloat16 as integers")
    feats, codebook, grad = (
        randn(1, 20, 3, 5).to(dtype),
        randn(18, 20, seed=1).to(dtype),
        randn(1, 18, seed=2).to(dtype),
    )
    codebook = codebook.float() if mixed else codebook
    histogram, words, assignment, grads = run(feats, codebook, grad, 4.0)
    wanted = expected(feats, codebook, grad, 4.0)
    assert (histogram.dtype, grads[0].dtype, grads[1].dtype) == (dtype, dtype, codebook.dtype)
    assert_close(histogram, wanted[0])
    assert torch.equal(words, wanted[1]) and torch.equal(assignment, wanted[2])
    assert_close(grads[0], wanted[3][0])
    assert_close(grads[1].to(dtype), wanted[3][1])


def test_nan_stays_in_its_image():
    feats, codebook = randn(2, 6, 3, 4), randn(20, 6, seed=1)
    feats[0, 2, 1, 1] = float("nan")
    histogram, _, assignment, *_ = soft_histogram.soft_histogram(feats, codebook, 1.0)
    wanted = reference.soft_histogram(feats, codebook)
    assert histogram[0].isnan().all() and torch.equal(assignment, wanted[2])
    torch.testing.assert_close(histogram[1], wanted[0][1])


def test_empty():
    for shape in ((0, 3, 2, 2), (2, 3, 0, 4)):
        feats, codebook = torch.ones(shape), torch.ones(5, 3)
        histogram, words, assignment, *kept = soft_histogram.soft_histogram(feats, codebook, 1.0)
        assert histogram.shape == words.shape == (shape[0], 5) and not words.any() and (histogram == 0).all()
        assert assignment.shape == (shape[0], *shape[2:])
        grads = soft_histogram.soft_histogram_backward(histogram, feats, codebook, *kept, 1.0, True, True)
        assert grads[0].shape == shape and (grads[1] == 0).all()
