"""Dense CRF: against the float64 reference, pydensecrf, and what the maths demands."""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import wsss_kernels as wk
from tests.samples import smooth_picture as picture
from wsss_kernels import _dispatch, reference

PSA = {"gaussian": (3, 3), "bilateral": (80, 13, 10)}
SETS = [PSA, {"gaussian": (3, 3), "bilateral": (50, 5, 10)}, {"gaussian": (1, 3), "bilateral": (64, 3, 4)},
        {"gaussian": (2, 0), "bilateral": (65, 3, 4)}, {"gaussian": (2.5, 1.5), "bilateral": (30, 10, 0)}]  # fmt: skip
native_tolerance = 5e-5  # of marginals in 0..1, after 10 iterations

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(name="wk")
def wk_on_device(wk, device):
    if device.type == "cuda" and not (_dispatch.native and _dispatch.native.cuda_archs):
        pytest.skip("the module was compiled without CUDA, and there are no Triton kernels")
    return wk


def energies(batch, labels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn(batch, labels, 4, 5, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return wk.unary_from_probabilities(logits.softmax(1))


# Against the reference


@pytest.mark.parametrize("options", SETS)
@pytest.mark.parametrize("shape", [(1, 5, 40, 70), (2, 3, 33, 65), (1, 21, 20, 31), (3, 1, 9, 4), (1, 40, 17, 9)])
def test_equals_the_reference(wk, shape, options, nan_filled):
    batch, _, height, width = shape
    image, unary = picture(batch, height, width), energies(*shape)
    expected = reference.dense_crf(image, unary.double(), **options)
    out = wk.dense_crf(image, unary, **options)
    assert out.is_contiguous() and out.dtype == torch.float32
    assert (out - expected).abs().max() < native_tolerance
    assert torch.allclose(out.sum(1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("labels", [2, 4, 7, 8, 15, 16, 17, 32, 33, 50, 64, 70])
def test_every_width_of_a_row(wk, labels):
    shape = (1, labels, 35, 37)
    image, unary = picture(1, 35, 37), energies(*shape)
    expected = reference.dense_crf(image, unary.double(), iterations=3)
    assert (wk.dense_crf(image, unary, iterations=3) - expected).abs().max() < native_tolerance


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (65, 1), (2, 3), (32, 64), (33, 64), (32, 65), (0, 5), (5, 0)])
def test_sizes(wk, size):
    image, unary = picture(2, *size), torch.rand(2, 3, *size)
    # Where nothing decides between labels, as here, mean field amplifies rounding, the float32 reference's as well: to
    # 4e-3 after 10 iterations.
    expected = reference.dense_crf(image, unary.double(), iterations=2)
    out = wk.dense_crf(image, unary, iterations=2)
    assert out.shape == unary.shape
    assert torch.allclose(out.double(), expected, atol=native_tolerance)


def test_empty_batch_and_no_labels(wk):
    assert wk.dense_crf(picture(0, 4, 5), torch.rand(0, 3, 4, 5)).shape == (0, 3, 4, 5)
    assert wk.dense_crf(picture(2, 4, 5), torch.rand(2, 0, 4, 5)).shape == (2, 0, 4, 5)


def test_one_label_is_certain(wk):
    assert torch.equal(wk.dense_crf(picture(1, 9, 8), torch.rand(1, 1, 9, 8)), torch.ones(1, 1, 9, 8))


def test_no_term_or_no_iteration_is_a_softmax(wk):
    image, unary = picture(2, 20, 30), energies(2, 5, 20, 30)
    expected = torch.softmax(-unary, 1)
    torch.testing.assert_close(wk.dense_crf(image, unary, gaussian=(3, 0), bilateral=(80, 13, 0)), expected)
    torch.testing.assert_close(wk.dense_crf(image, unary, iterations=0), expected)


def test_one_pixel_by_hand(wk):
    """The only pixel receives all of itself: n F n = 1, so one iteration adds compat * Q to the energies."""
    unary = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    q = torch.softmax(-unary, 1)
    expected = torch.softmax(-unary + (3 + 10) * q, 1)
    out = wk.dense_crf(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), unary, iterations=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_labels_may_come_in_any_order(wk):
    image, unary = picture(1, 30, 41), energies(1, 6, 30, 41)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(
        wk.dense_crf(image, unary[:, order]), wk.dense_crf(image, unary)[:, order], atol=2e-5, rtol=0
    )


def test_images_of_a_batch_do_not_meet(wk):
    image, unary = picture(3, 40, 50), energies(3, 4, 40, 50)
    together = wk.dense_crf(image, unary)
    for b in range(3):
        assert torch.equal(together[b : b + 1], wk.dense_crf(image[b : b + 1], unary[b : b + 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(wk, dtype):
    image, unary = picture(1, 24, 33), energies(1, 4, 24, 33).to(dtype)
    out = wk.dense_crf(image, unary)
    expected = reference.dense_crf(image, unary.double())
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-12)


def test_layouts(wk, layout):
    image, unary = layout(picture(3, 20, 24).float()), layout(energies(3, 3, 20, 24))
    assert torch.equal(wk.dense_crf(image, unary), wk.dense_crf(image.clone().contiguous(), unary.clone().contiguous()))
    loss = wk.dense_energy_loss(image, unary)
    assert torch.equal(loss, wk.dense_energy_loss(image.clone().contiguous(), unary.clone().contiguous()))


def test_float_pictures(wk):
    image, unary = picture(1, 24, 33), energies(1, 4, 24, 33)
    expected = wk.dense_crf(image, unary)
    assert torch.equal(wk.dense_crf(image.float(), unary), expected)
    assert torch.equal(wk.dense_crf(image.double(), unary), expected)
    odd = image.float()
    odd[0, :, 3, 4], odd[0, :, 5, 6] = math.nan, 300
    tame = image.float()
    tame[0, :, 3, 4], tame[0, :, 5, 6] = 0, 255
    assert torch.equal(wk.dense_crf(odd, unary), wk.dense_crf(tame, unary))
    assert torch.equal(reference.dense_crf(odd, unary), reference.dense_crf(tame, unary))


# NaN and infinity


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_nan_stays_in_its_image(wk, wrong):
    image, unary = picture(2, 20, 30), energies(2, 4, 20, 30)
    clean = wk.dense_crf(image, unary)
    unary[0, 1, 3, 4] = wrong
    out = wk.dense_crf(image, unary)
    assert torch.equal(out[1], clean[1])
    assert out[0, :, 3, 4].isnan().all()
    assert torch.equal(out.isnan(), reference.dense_crf(image, unary).isnan())


def test_infinite_energy_forbids_a_label(wk):
    image, unary = picture(1, 20, 30), energies(1, 4, 20, 30)
    unary[0, 2] = math.inf
    out = wk.dense_crf(image, unary)
    assert out.isfinite().all() and (out[0, 2] == 0).all()
    torch.testing.assert_close(out[:, [0, 1, 3]], wk.dense_crf(image, unary[:, [0, 1, 3]]), atol=1e-6, rtol=1e-5)


# Determinism


@pytest.mark.native
def test_threads_do_not_change_a_bit():
    image, unary = picture(2, 100, 150), energies(2, 5, 100, 150)
    probs = torch.softmax(-unary, 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf = probs.clone().requires_grad_()
            loss = wk.dense_energy_loss(image, leaf)
            loss.backward()
            results.append([wk.dense_crf(image, unary), loss.detach(), leaf.grad])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


# pydensecrf

# What pydensecrf2 1.1 gives for stored_scene(): Q[c, y, x] at these places.
STORED_SET = {"iterations": 5, "gaussian": (2, 0.5), "bilateral": (20, 30, 1.5)}
STORED_PLACES = [(2, 21, 23), (1, 23, 27), (0, 4, 6), (2, 21, 24), (2, 16, 0), (0, 17, 8), (2, 12, 30), (2, 1, 21)]
STORED = [0.454336, 0.238461, 0.210682, 0.525672, 0.749442, 0.205914, 0.453027, 0.728575]


def stored_scene():
    """Whole numbers alone, the same everywhere."""
    y, x = np.mgrid[0:24, 0:36]
    image = np.stack([(7 * x + 3 * y) % 200 // 40 * 40, (x // 9 * 60 + y) % 256, (x * y) % 97 + 80], axis=-1)
    unary = np.stack([(x + 2 * y) % 13, (3 * x + y) % 11, np.abs(x - y) % 7], axis=0) / 4.0
    return image.astype(np.uint8), unary.astype(np.float32)


def as_tensors(image, unary):
    return torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(unary)[None]


def test_stored_numbers_of_pydensecrf(wk):
    out = wk.dense_crf(*as_tensors(*stored_scene()), **STORED_SET)[0]
    assert [float(out[place]) for place in STORED_PLACES] == pytest.approx(STORED, abs=1e-4)


needs_pydensecrf = pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is missing")


def peer(image, unary, iterations, gaussian, bilateral):
    from pydensecrf import densecrf

    labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1)))
    if gaussian[-1]:
        crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    if bilateral[-1]:
        crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=image, compat=bilateral[2])
    return np.array(crf.inference(iterations)).reshape(unary.shape)


@needs_pydensecrf
def test_the_stored_numbers_are_pydensecrfs():
    out = peer(*stored_scene(), **STORED_SET)
    assert [float(out[place]) for place in STORED_PLACES] == pytest.approx(STORED, abs=1e-5)


@needs_pydensecrf
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", SETS)
def test_equals_pydensecrf(options, seed):
    image = picture(1, 90, 121, seed)
    unary = energies(1, 2 + 5 * seed, 90, 121, seed)
    array = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    one = peer(array, unary[0].numpy(), 1, **options)
    ours = wk.dense_crf(image, unary, iterations=1, **options)[0].numpy()
    assert np.abs(one - ours).max() < 1e-4
    ten = peer(array, unary[0].numpy(), 10, **options).argmax(0)
    ours = wk.dense_crf(image, unary, **options)[0].argmax(0).numpy()
    assert (ten == ours).mean() >= 0.999


def test_the_package_does_not_import_pydensecrf():
    script = """
import sys, torch, wsss_kernels as wk, wsss_kernels.compat.pydensecrf
wk.dense_crf(torch.zeros(1, 3, 4, 5, dtype=torch.uint8), torch.zeros(1, 2, 4, 5))
assert "pydensecrf" not in sys.modules and "scipy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)


# Unaries


def test_unary_from_labels():
    out = wk.unary_from_labels(torch.tensor([[[0, 2, 255]]]), 3)
    sure, other, unsure = -math.log(0.7), -math.log(0.15), math.log(3)
    expected = [[sure, other, unsure], [other, other, unsure], [other, sure, unsure]]
    torch.testing.assert_close(out, torch.tensor(expected).view(1, 3, 1, 3))
    assert wk.unary_from_labels(torch.zeros(2, 3, 4, dtype=torch.uint8), 5).shape == (2, 5, 3, 4)
    assert torch.equal(wk.unary_from_labels(torch.zeros(1, 3, 4, dtype=torch.int32), 1), torch.zeros(1, 1, 3, 4))


def test_unary_from_probabilities():
    probs = torch.tensor([0.0, 0.5, 1.0, 2.0, math.nan]).view(1, 1, 1, 5)
    out = wk.unary_from_probabilities(probs).flatten()
    torch.testing.assert_close(out[:4], torch.tensor([-math.log(1e-5), math.log(2), 0, 0]))
    assert out[4].isnan()
    half = wk.unary_from_probabilities(torch.zeros(1, 1, 1, 1, dtype=torch.float16))
    assert half.dtype == torch.float16 and half.isfinite().all()
    assert not wk.unary_from_probabilities(torch.rand(1, 2, 3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("call, error, words", [
    (lambda: wk.unary_from_labels(torch.rand(1, 2, 3), 3), TypeError, "labels must be"),
    (lambda: wk.unary_from_labels([0], 3), TypeError, "labels must be"),
    (lambda: wk.unary_from_labels(torch.zeros(2, 3).long(), 3), ValueError, "labels must be"),
    (lambda: wk.unary_from_labels(torch.zeros(1, 2, 3).long(), 0), ValueError, "num_classes must be"),
    (lambda: wk.unary_from_labels(torch.zeros(1, 2, 3).long(), 3, confidence=1), ValueError, "confidence must be"),
    (lambda: wk.unary_from_labels(torch.zeros(1, 2, 3).long(), 3, confidence=0.0), ValueError, "confidence must be"),
    (lambda: wk.unary_from_probabilities(torch.zeros(1, 2, 3)), ValueError, "probs must be"),
    (lambda: wk.unary_from_probabilities(torch.zeros(1, 2, 3, 4), clip=0), ValueError, "clip must be"),
    (lambda: wk.unary_from_probabilities(torch.zeros(1, 2, 3, 4), clip=1.5), ValueError, "clip must be"),
])  # fmt: skip
def test_refusals_of_the_unaries(call, error, words):
    with pytest.raises(error, match=words):
        call()


# Refusals

IMAGE, UNARY = torch.zeros(1, 3, 6, 7, dtype=torch.uint8), torch.zeros(1, 2, 6, 7)


@pytest.mark.parametrize("image, unary, options, error, words", [
    (IMAGE.expand(2, -1, -1, -1), UNARY, {}, ValueError, "image must be"),
    (IMAGE[:, :, :5], UNARY, {}, ValueError, "image must be"),
    (IMAGE[:, :2], UNARY, {}, ValueError, "image must be RGB"),
    (IMAGE[0], UNARY, {}, ValueError, "image must be"),
    (IMAGE.int(), UNARY, {}, TypeError, "image must be"),
    (IMAGE.numpy(), UNARY, {}, TypeError, "image must be"),
    (torch.rand(1, 3, 6, 7), UNARY, {}, ValueError, "multiply by 255"),
    (torch.randn(1, 3, 6, 7), UNARY, {}, ValueError, "0..255"),
    (IMAGE, UNARY[0], {}, ValueError, "unary must be"),
    (IMAGE, UNARY.long(), {}, TypeError, "unary must be"),
    (IMAGE, UNARY, {"iterations": -1}, ValueError, "iterations must be"),
    (IMAGE, UNARY, {"iterations": 2.0}, TypeError, "iterations must be"),
    (IMAGE, UNARY, {"gaussian": (-3, 3)}, ValueError, "gaussian must be"),
    (IMAGE, UNARY, {"gaussian": (0, 3)}, ValueError, "gaussian must be"),
    (IMAGE, UNARY, {"gaussian": 3}, TypeError, "gaussian must be"),
    (IMAGE, UNARY, {"gaussian": (3, 3, 3)}, ValueError, "gaussian must be"),
    (IMAGE, UNARY, {"gaussian": (3, math.nan)}, ValueError, "gaussian must be"),
    (IMAGE, UNARY, {"bilateral": (80, -13, 10)}, ValueError, "bilateral must be"),
    (IMAGE, UNARY, {"bilateral": (80, "13", 10)}, TypeError, "bilateral must be"),
    (IMAGE, UNARY, {"bilateral": (80, 13)}, ValueError, "bilateral must be"),
    (IMAGE, UNARY, {"bilateral": (80, 1e-6, 10)}, ValueError, "bilateral must have larger sigmas"),
    (IMAGE, UNARY, {"gaussian": (5e-324, 10)}, ValueError, "gaussian must have larger sigmas"),
])  # fmt: skip
def test_refusals(image, unary, options, error, words):
    with pytest.raises(error, match=words):
        wk.dense_crf(image, unary, **options)


@pytest.mark.parametrize("sigma", [0.004, 0.1, 0.4, 1e5, 1e30])
def test_extreme_sigmas_run_or_are_refused(wk, sigma):
    image, unary = picture(1, 20, 70), energies(1, 3, 20, 70)
    options = {"gaussian": (sigma, 1), "bilateral": (sigma, sigma, 2)}
    if sigma <= 0.1:
        with pytest.raises(ValueError, match="larger sigmas"):
            wk.dense_crf(image, unary, **options)
        return
    expected = reference.dense_crf(image, unary.double(), **options)
    assert (wk.dense_crf(image, unary, **options) - expected).abs().max() < native_tolerance


def test_maps_that_want_a_gradient_are_refused():
    unary = UNARY.clone().requires_grad_()
    with pytest.raises(ValueError, match="unary must not require grad"):
        wk.dense_crf(IMAGE, unary)
    with torch.no_grad():
        assert not wk.dense_crf(IMAGE, unary).requires_grad
    assert not wk.dense_crf(IMAGE, unary.detach()).requires_grad
