"""Dense energy loss: against the float64 reference, its definition, and what it refuses."""

import math

import pytest
import torch

import wsss_kernels as wk
from tests.samples import smooth_picture as picture
from wsss_kernels import _dispatch, reference

IMAGE, UNARY = torch.zeros(1, 3, 6, 7, dtype=torch.uint8), torch.zeros(1, 2, 6, 7)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(name="wk")
def wk_on_device(wk, device):
    if device.type == "cuda" and not (_dispatch.native and _dispatch.native.cuda_archs):
        pytest.skip("the module was compiled without CUDA, and there are no Triton kernels")
    return wk


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (65, 1), (2, 3), (32, 64), (33, 64), (32, 65), (0, 5), (5, 0)])
def test_sizes(wk, size):
    image, probs = picture(2, *size), torch.rand(2, 3, *size)
    loss = wk.dense_energy_loss(image, probs)
    torch.testing.assert_close(loss.double(), reference.dense_energy_loss(image, probs.double()), rtol=1e-5, atol=1e-8)


def test_empty_batch_and_no_labels(wk):
    assert wk.dense_energy_loss(picture(0, 4, 5), torch.rand(0, 3, 4, 5)) == 0
    assert wk.dense_energy_loss(picture(2, 4, 5), torch.rand(2, 0, 4, 5)) == 0


@pytest.mark.parametrize("roi", [None, "float", "bool", "with a channel"])
@pytest.mark.parametrize("shape", [(2, 3, 33, 40), (1, 21, 20, 70), (3, 1, 5, 9)])
def test_value_and_gradient(wk, shape, roi, nan_filled):
    batch, _, height, width = shape
    image, probs = picture(batch, height, width), torch.softmax(torch.randn(shape), 1)
    if roi is not None:
        roi = {"float": torch.rand(batch, height, width), "bool": torch.rand(batch, height, width) > 0.3,
               "with a channel": torch.rand(batch, 1, height, width)}[roi]  # fmt: skip
    exact, leaf = probs.double().requires_grad_(), probs.clone().requires_grad_()
    expected = reference.dense_energy_loss(image, exact, roi=roi)
    loss = wk.dense_energy_loss(image, leaf, roi=roi)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (2 * expected).backward(), (2 * loss).backward()
    assert (leaf.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()
    torch.testing.assert_close(wk.dense_energy_loss(image, probs, roi=roi), loss.detach(), rtol=1e-6, atol=0)


def test_by_its_definition(wk):
    """loss = -<S, A S> / B with A's columns taken one by one from the gradient of the loss: -2 A S roi / B."""
    image, probs = picture(2, 9, 10), torch.rand(2, 3, 9, 10)
    roi = (torch.rand(2, 9, 10) > 0.4).float()
    leaf = probs.clone().requires_grad_()
    loss = wk.dense_energy_loss(image, leaf, roi=roi)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (leaf.grad * probs).sum().item(), rel=1e-5)
    assert (leaf.grad.permute(1, 0, 2, 3)[:, roi == 0] == 0).all() and (leaf.grad <= 0).all()


def test_of_labels_apart(wk):
    """Two regions, two colours: cutting along the edge costs less than cutting across."""
    image = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    image[..., 10:] = 200
    along = torch.zeros(1, 2, 20, 20)
    along[:, 0, :, :10], along[:, 1, :, 10:] = 1, 1
    assert wk.dense_energy_loss(image, along) < wk.dense_energy_loss(image, along.mT.contiguous())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype):
    """The loss of a real batch does not fit float16, and neither does the gradient before a small weight."""
    image, probs = picture(2, 64, 64).fill_(90), torch.ones(2, 3, 64, 64, dtype=dtype).requires_grad_()
    loss = wk.dense_energy_loss(image, probs)
    assert loss.dtype == torch.float32 and loss < -70000
    (1e-7 * loss * 2.0**16).backward()
    expected = probs.detach().float().requires_grad_()
    (1e-7 * wk.dense_energy_loss(image, expected) * 2.0**16).backward()
    assert probs.grad.dtype == dtype
    torch.testing.assert_close(probs.grad.float(), expected.grad, rtol=1e-2, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert wk.dense_energy_loss(image, probs).dtype == torch.float32


def test_of_float64_runs_the_reference(wk):
    image, probs = picture(1, 9, 10), torch.rand(1, 2, 9, 10, dtype=torch.float64, requires_grad=True)
    loss = wk.dense_energy_loss(image, probs)
    assert loss.dtype == torch.float64
    grad = torch.autograd.grad(loss, probs)[0]
    assert grad.dtype == torch.float64
    assert loss.item() == pytest.approx(0.5 * (grad * probs).sum().item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_are_refused(wk, dtype):
    probs = torch.rand(1, 2, 5, 6, dtype=dtype, requires_grad=True)
    loss = wk.dense_energy_loss(picture(1, 5, 6), probs)
    grad = torch.autograd.grad(loss.square(), probs, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), probs)


@pytest.mark.parametrize("image, probs, options, error, words", [
    (IMAGE.expand(2, -1, -1, -1), UNARY, {}, ValueError, "image must be"),
    (torch.rand(1, 3, 6, 7), UNARY, {}, ValueError, "multiply by 255"),
    (IMAGE, UNARY[0], {}, ValueError, "probs must be"),
    (IMAGE, UNARY, {"roi": torch.ones(6, 7)}, ValueError, "roi must be"),
    (IMAGE, UNARY, {"roi": 1}, TypeError, "roi must be"),
    (IMAGE, UNARY, {"sigma_rgb": 0}, ValueError, "sigma_rgb must be"),
    (IMAGE, UNARY, {"sigma_xy": -1.0}, ValueError, "sigma_xy must be"),
    (IMAGE, UNARY, {"sigma_xy": "1"}, TypeError, "sigma_xy must be"),
    (IMAGE, UNARY, {"sigma_rgb": 1e-9}, ValueError, "larger sigmas"),
])  # fmt: skip
def test_refusals(image, probs, options, error, words):
    with pytest.raises(error, match=words):
        wk.dense_energy_loss(image, probs, **options)


def test_nan_probability_makes_the_loss_nan(wk):
    image, probs = picture(2, 20, 30), torch.rand(2, 4, 20, 30)
    probs[0, 1, 3, 4] = math.nan
    leaf = probs.clone().requires_grad_()
    loss = wk.dense_energy_loss(image, leaf)
    loss.backward()
    assert loss.isnan() and reference.dense_energy_loss(image, probs).isnan()
    assert leaf.grad[0, 1, 3, 4].isnan() and leaf.grad[0, [0, 2, 3]].isfinite().all() and leaf.grad[1].isfinite().all()
