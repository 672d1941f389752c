"""The Triton kernels of boundary_affinity, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.triton.boundary_affinity import boundary_affinity, boundary_affinity_backward

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def check(assert_close, boundary, radius):
    exact = boundary.double().requires_grad_()
    expected = reference.boundary_affinity(exact, radius)
    affinity = boundary_affinity(boundary, radius)
    assert affinity.dtype == boundary.dtype and affinity.is_contiguous()
    assert_close(affinity, expected)
    grad = rand(*expected.shape, seed=1, dtype=boundary.dtype) - 0.5
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    gradient = boundary_affinity_backward(grad, boundary, radius)
    assert gradient.dtype == boundary.dtype and gradient.is_contiguous()
    assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("shape", "radius"),
    [((2, 1, 5, 6), 2), ((1, 1, 9, 35), 3), ((1, 1, 17, 19), 5), ((1, 1, 3, 2), 4)],
)
@pytest.mark.parametrize("levels", [0, 1, 3], ids=["distinct", "constant", "three values"])
def test_like_the_reference(assert_close, shape, radius, levels):
    boundary = rand(*shape)
    check(assert_close, (boundary * levels).floor() / levels if levels else boundary, radius)


def test_large_radius(assert_close):
    check(assert_close, rand(1, 1, 10, 11), 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(assert_close, dtype):
    check(assert_close, rand(1, 1, 7, 9, dtype=dtype), 3)


@pytest.mark.parametrize("shape", [(0, 1, 3, 3), (1, 1, 0, 3), (2, 1, 3, 0)])
def test_empty(shape):
    affinity = boundary_affinity(torch.empty(shape), 3)
    assert affinity.shape == (shape[0], 12, *shape[2:])
    assert boundary_affinity_backward(affinity, torch.empty(shape), 3).shape == shape


def test_radius_without_neighbours():
    boundary = rand(2, 1, 3, 3)
    affinity = boundary_affinity(boundary, 1)
    assert affinity.shape == (2, 0, 3, 3)
    assert boundary_affinity_backward(affinity, boundary, 1).eq(0).all()


def test_odd_values(assert_close):
    boundary = 4 * rand(2, 1, 6, 7) - 2
    boundary[0, 0, 1, 1], boundary[0, 0, 3, 4], boundary[0, 0, 5, 5] = float("nan"), float("inf"), -float("inf")
    boundary[1, 0, 2] = torch.tensor([0.0, -0.0, 0.0, -0.0, 1e-42, 2e-42, -1e-42])
    expected = reference.boundary_affinity(boundary, 3)
    affinity = boundary_affinity(boundary, 3)
    assert torch.equal(affinity.nan_to_num(7), expected.nan_to_num(7))
    check(assert_close, boundary[1:], 3)
    grad = rand(*expected.shape, seed=1)
    leaf = boundary.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.boundary_affinity(leaf, 3), leaf, grad.double())
    assert_close(boundary_affinity_backward(grad, boundary, 3), wanted)


def test_what_lies_outside_the_map_has_no_gradient():
    boundary = rand(1, 1, 5, 6)
    grad = rand(1, 12, 5, 6)
    exists = reference.boundary_affinity(torch.zeros(1, 1, 5, 6), 3) > 0
    clean = boundary_affinity_backward(grad, boundary, 3)
    assert torch.equal(boundary_affinity_backward(grad.where(exists, float("nan")), boundary, 3), clean)


def test_memory_formats(layout):
    boundary, grad = layout(rand(2, 1, 3, 4)), layout(rand(2, 4, 3, 4))
    plain, plain_grad = (x.clone().resolve_neg().contiguous() for x in (boundary, grad))
    assert torch.equal(boundary_affinity(boundary, 2), boundary_affinity(plain, 2))
    assert torch.equal(boundary_affinity_backward(grad, boundary, 2), boundary_affinity_backward(plain_grad, plain, 2))
