"""class_context: against the float64 reference, pixel by pixel, and its contract."""

import pytest
import torch
from torch.testing import assert_close

import wsss_kernels
from wsss_kernels import reference

SHAPES = ((2, 5, 3, 9, 7), (1, 40, 21, 41, 41), (3, 1, 1, 1, 1), (2, 33, 4, 1, 20), (1, 130, 2, 17, 5))


def scene(batch, dim, classes, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(dim)
    feats = torch.randn(batch, dim, height, width, generator=generator, dtype=torch.float64)
    confidence = torch.rand(batch, classes, height, width, generator=generator)
    return feats.to(dtype), confidence


def error(found, right):
    return (found.double() - right).abs().max().item() / max(right.abs().max().item(), 1e-30)


@pytest.mark.parametrize("given", [False, True])
def test_reference_pixel_by_pixel(given):
    feats, confidence = scene(2, 3, 4, 5, 6, torch.float64)
    confidence = confidence.double()
    assign = torch.randint(-1, 5, (2, 5, 6)) if given else None
    prototypes, weights = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(6)).tolist():
        c = int(confidence[b, :, y, x].argmax()) if assign is None else int(assign[b, y, x])
        if 0 <= c < 4 and confidence[b, c, y, x] > 0.6:
            weights[b, c] += confidence[b, c, y, x]
            prototypes[b, c] += confidence[b, c, y, x] * feats[b, :, y, x]
    found = reference.class_context(feats, confidence, threshold=0.6, assign=assign)
    assert_close(found[1], weights)
    assert_close(found[0], prototypes / (weights[..., None] + 1e-5))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(wk, shape, given):
    feats, confidence = scene(*shape)
    assign = torch.randint(-2, shape[2] + 2, (shape[0], *shape[3:])) if given else None
    ours, right = feats.clone().requires_grad_(), feats.double().requires_grad_()
    found = wk.class_context(ours, confidence, threshold=0.3, assign=assign)
    expected = reference.class_context(right, confidence, threshold=0.3, assign=assign)
    grad = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(1))
    (found[0] * grad).sum().backward()
    (expected[0] * grad.double()).sum().backward()
    for a, b in zip((*found, ours.grad), (*expected, right.grad), strict=True):
        assert error(a.detach(), b.detach()) < 1e-5
    assert not found[1].requires_grad


def test_ties_go_to_the_lowest_and_the_threshold_is_strict(wk):
    feats = torch.tensor([[[[2.0, 10.0]]]])
    confidence = torch.tensor([[[[0.75, 0.5]], [[0.75, 0.25]]]])
    prototypes, weights = wk.class_context(feats, confidence, threshold=0.5)
    assert_close(prototypes, torch.tensor([[[2.0], [0.0]]]), atol=1e-4, rtol=0)
    assert_close(weights, torch.tensor([[0.75, 0.0]]))


def test_gradcheck_of_the_reference():
    feats, confidence = scene(2, 3, 4, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda f: wsss_kernels.class_context(f, confidence, threshold=0.4)[0], feats.requires_grad_()
    )


def test_nan_counts_for_nothing(wk):
    feats, confidence = scene(1, 4, 3, 6, 6)
    confidence[0, :, 2, 3] = 0.0
    right = wk.class_context(feats, confidence, threshold=0.3)
    confidence[0, 1, 2, 3], feats[0, 2, 2, 3] = float("nan"), float("nan")
    for a, b in zip(wk.class_context(feats, confidence, threshold=0.3), right, strict=True):
        assert torch.equal(a, b)
    in_double = wsss_kernels.class_context(feats.double(), confidence, threshold=0.3)
    assert all(x.isfinite().all() for x in in_double)


def test_same_bits_for_any_number_of_threads():
    feats, confidence = scene(2, 200, 5, 40, 40)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = feats.clone().requires_grad_()
            out = wsss_kernels.class_context(x, confidence, threshold=0.3)
            out[0].square().sum().backward()
            found.append((out[0].detach(), out[1], x.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision(wk, dtype, tolerance):
    feats, confidence = scene(1, 6, 3, 9, 9, dtype)
    found = wk.class_context(feats, confidence, threshold=0.3)
    expected = reference.class_context(feats.double(), confidence, threshold=0.3)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype and error(x, y) < tolerance


def test_views_and_empty(wk):
    feats, confidence = scene(2, 5, 3, 9, 7)
    right = wk.class_context(feats, confidence, threshold=0.3)
    views = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (feats, confidence)]
    assert all(torch.equal(a, b) for a, b in zip(wk.class_context(*views, threshold=0.3), right, strict=True))
    for batch, classes, height in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        feats = torch.zeros(batch, 5, height, 4, requires_grad=True)
        out, weights = wk.class_context(feats, torch.zeros(batch, classes, height, 4), threshold=0.1)
        assert out.shape == (batch, classes, 5) and weights.shape == (batch, classes)
        assert out.abs().sum() == 0 and weights.abs().sum() == 0
        out.sum().backward()
        assert feats.grad.abs().sum() == 0
        confidence = torch.zeros(batch, classes, height, 4)
        assert wk.class_context(feats.double(), confidence, threshold=0.1)[0].shape == out.shape


@pytest.mark.native
def test_opcheck_and_compile():
    feats, confidence = scene(2, 5, 3, 9, 7)
    chosen = torch.randint(-1, 3, (2, 9, 7), dtype=torch.int32)
    weights = torch.rand(2, 9, 7)
    torch.library.opcheck(torch.ops.wsss_kernels.class_context, (feats.requires_grad_(), weights, chosen, 3))
    compiled = torch.compile(lambda f, c: wsss_kernels.class_context(f, c, threshold=0.3), fullgraph=True, dynamic=True)
    for height in (9, 12, 15):
        feats, confidence = scene(2, 5, 3, height, 7)
        for a, b in zip(
            compiled(feats, confidence), wsss_kernels.class_context(feats, confidence, threshold=0.3), strict=True
        ):
            assert_close(a, b)


@pytest.mark.parametrize(
    "change, failure, words",
    [
        ({"feats": torch.zeros(5, 4, 6)}, ValueError, "feats must be a floating point tensor"),
        ({"feats": torch.zeros(1, 0, 4, 6)}, ValueError, "feats must have D >= 1"),
        ({"confidence": torch.zeros(1, 3, 4, 5)}, ValueError, "confidence must have the batch"),
        ({"confidence": torch.zeros(1, 3, 4, 6).bool()}, TypeError, "confidence must be a floating point tensor"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a finite number"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a finite number"),
        ({"assign": torch.zeros(1, 4, 6)}, TypeError, "assign must be an integer tensor"),
        ({"assign": torch.zeros(1, 1, 4, 6, dtype=torch.int64)}, ValueError, r"assign must be \[B, H, W\]"),
    ],
)
def test_bad_arguments(change, failure, words):
    arguments = {"feats": torch.zeros(1, 5, 4, 6), "confidence": torch.zeros(1, 3, 4, 6), "threshold": 0.5, **change}
    with pytest.raises(failure, match=words):
        wsss_kernels.class_context(arguments.pop("feats"), arguments.pop("confidence"), **arguments)
