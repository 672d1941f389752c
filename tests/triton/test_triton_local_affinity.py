"""The Triton kernels of local_affinity, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.triton.local_affinity import local_affinity, local_affinity_backward

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]

AUTO = 0.0


def expected(feats, radius, cosine, scale, cropped):
    return reference.local_affinity(
        feats,
        radius,
        metric="cosine" if cosine else "l1",
        scale="auto" if scale == AUTO else scale,
        border="cropped" if cropped else "full",
    )


def features(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(assert_close, feats, radius, cosine, scale, cropped):
    exact = feats.double().requires_grad_()
    result = expected(exact, radius, cosine, scale, cropped)
    affinity, scales = local_affinity(feats, radius, cosine, scale, cropped)
    assert affinity.dtype == feats.dtype and affinity.is_contiguous() and scales.shape == feats.shape[:1]
    assert_close(affinity, result)
    grad = features(*result.shape, dtype=feats.dtype)
    (exact_gradient,) = torch.autograd.grad(result, exact, grad.double())
    gradient = local_affinity_backward(grad, feats, affinity, scales, radius, cosine, scale, cropped)
    assert gradient.dtype == feats.dtype and gradient.is_contiguous()
    assert_close(gradient, exact_gradient)


@pytest.mark.parametrize(
    ("shape", "radius", "cosine", "scale", "cropped"),
    [
        ((2, 5, 5, 6), 2, False, 1.0, False),
        ((2, 5, 5, 6), 2, True, AUTO, False),
        ((1, 4, 6, 35), 3, False, AUTO, True),  # two tiles of columns, two of rows
        ((1, 3, 6, 5), 3, True, 1.0, False),
        ((1, 5, 9, 10), 5, False, 0.7, False),
        ((1, 3, 7, 9), 5, False, AUTO, False),
        ((1, 9, 5, 9), 5, True, 1.0, True),
        ((1, 2, 10, 12), 5, True, AUTO, True),
        ((1, 2, 9, 14), 7, False, 1.0, True),  # the half-disc in two bands
        ((1, 2, 7, 8), 7, True, AUTO, False),
    ],
)
def test_like_the_reference(assert_close, shape, radius, cosine, scale, cropped):
    check(assert_close, features(*shape), radius, cosine, scale, cropped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("cosine", "scale"), [(False, 1.0), (False, AUTO), (True, 1.0), (True, AUTO)])
def test_half_precision(assert_close, dtype, cosine, scale):
    check(assert_close, features(1, 5, 4, 5, dtype=dtype), 2, cosine, scale, False)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 2, 1, 4), (1, 3, 3, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("cosine", [False, True])
def test_smaller_than_the_radius(assert_close, shape, cosine):
    check(assert_close, features(*shape), 4, cosine, AUTO, False)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 0, 3), (2, 2, 3, 0)])
def test_empty(shape):
    feats = torch.empty(shape)
    affinity, scales = local_affinity(feats, 3, False, AUTO, False)
    assert affinity.shape == (shape[0], 12, *shape[2:])
    assert local_affinity_backward(affinity, feats, affinity, scales, 3, False, AUTO, False).shape == shape


def test_radius_without_neighbours():
    feats = features(2, 2, 3, 3)
    affinity, scales = local_affinity(feats, 1, False, AUTO, False)
    assert affinity.shape == (2, 0, 3, 3) and scales.tolist() == [1, 1]
    gradient = local_affinity_backward(affinity, feats, affinity, scales, 1, False, AUTO, False)
    assert torch.equal(gradient, torch.zeros_like(feats))


@pytest.mark.parametrize(("size", "dtype"), [(6e4, torch.float16), (1e-30, torch.float32), (1e30, torch.float32)])
def test_cosine_of_extreme_features(assert_close, size, dtype):
    feats = (features(1, 5, 4, 5).clamp(-1, 1) * size).to(dtype)
    for scale in (1.0, AUTO):
        affinity, _ = local_affinity(feats, 2, True, scale, False)
        assert_close(affinity, expected(feats.double(), 2, True, scale, False))


def test_zero_vectors_and_like_features():
    feats = torch.ones(2, 3, 4, 5)
    feats[:, :, 0, 0] = 0
    feats[1] = 1
    for cosine in (False, True):
        affinity, scales = local_affinity(feats, 2, cosine, AUTO, False)
        assert scales[1] == 1 and affinity[1, 0, :, :-1].min() > 1 - 1e-6
        gradient = local_affinity_backward(
            torch.ones_like(affinity), feats, affinity, scales, 2, cosine, AUTO, False
        )  # fmt: skip
        assert gradient.isfinite().all() and gradient[1].abs().max() < 1e-6


def test_smallest_scale():
    feats = features(1, 1, 3, 3)
    affinity, _ = local_affinity(feats.round(), 2, False, 5e-324, False)
    assert torch.equal(affinity, expected(feats.round(), 2, False, 5e-324, False))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("scale", [AUTO, 1.0])
def test_nan_stays_with_its_links(cosine, scale):
    feats = features(2, 3, 4, 6)
    clean, clean_scales = local_affinity(feats, 2, cosine, scale, False)
    feats[0, 1, 1, 2] = float("nan")
    affinity, scales = local_affinity(feats, 2, cosine, scale, False)
    exact = feats.double().requires_grad_()
    result = expected(exact, 2, cosine, scale, False)
    assert torch.equal(affinity.isnan(), result.isnan()) and affinity[0].isnan().any()
    assert torch.equal(affinity[1], clean[1]) and scales[1] == clean_scales[1]
    grad = torch.ones_like(affinity)
    gradient = local_affinity_backward(grad, feats, affinity, scales, 2, cosine, scale, False)
    (exact_gradient,) = torch.autograd.grad(result, exact, grad.double())
    elsewhere = torch.ones(4, 6, dtype=torch.bool)
    elsewhere[1, 2] = False  # whatever the gradient of NaN
    assert torch.equal(gradient.isnan()[..., elsewhere], exact_gradient.isnan()[..., elsewhere])
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("cosine", [False, True])
def test_what_lies_outside_the_map_has_no_gradient(cosine):
    feats = features(1, 3, 5, 6)
    affinity, scales = local_affinity(feats, 3, cosine, AUTO, False)
    grad = features(*affinity.shape)
    exists = reference.local_affinity(torch.zeros(1, 1, 5, 6), 3) > 0
    arguments = (scales, 3, cosine, AUTO, False)
    clean = local_affinity_backward(grad, feats, affinity, *arguments)
    grad, affinity = (torch.where(exists, x, float("nan")) for x in (grad, affinity))
    assert torch.equal(local_affinity_backward(grad, feats, affinity, *arguments), clean)


def test_memory_formats(layout):
    feats = layout(features(2, 4, 3, 4))
    grad = layout(features(2, 4, 3, 4))  # K of radius 2 is 4
    plain, plain_grad = feats.clone().resolve_neg().contiguous(), grad.clone().resolve_neg().contiguous()
    affinity, scales = local_affinity(feats, 2, False, AUTO, False)
    assert torch.equal(affinity, local_affinity(plain, 2, False, AUTO, False)[0])
    arguments = (scales, 2, False, AUTO, False)
    assert torch.equal(
        local_affinity_backward(grad, feats, affinity, *arguments),
        local_affinity_backward(plain_grad, plain, affinity, *arguments),
    )


def test_same_bits_every_time():
    feats = features(1, 5, 6, 7)
    affinity, scales = local_affinity(feats, 3, True, AUTO, False)
    again, scales_again = local_affinity(feats, 3, True, AUTO, False)
    assert torch.equal(affinity, again) and torch.equal(scales, scales_again)
