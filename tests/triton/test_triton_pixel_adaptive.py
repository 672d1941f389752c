"""The Triton kernels of pixel_adaptive, interpreted on the CPU, against the reference."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.triton import launch, pixel_adaptive

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]
VARIANTS = ("pamr", "par")
SHAPES = [(2, 2, 5, 7), (1, 5, 3, 14), (1, 1, 9, 1), (1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small maps take several, and a block has pixels of several rows."""
    monkeypatch.setattr(launch, "ADAPTIVE_WEIGHTS", launch.Configuration(32, {"PIXELS": 32}))
    blocks = {maps: launch.Configuration(32, {"CHANNELS": maps, "PIXELS": 32}) for maps in launch.ADAPTIVE}
    monkeypatch.setattr(launch, "ADAPTIVE", blocks)
    monkeypatch.setattr(launch, "ADAPTIVE_GRADIENT", blocks)


def scene(batch, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return image, torch.randn(batch, channels, height, width, generator=generator)


def close(out, right):
    assert out.shape == right.shape and (out.double() - right).abs().max() <= 5e-5 * right.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dilations", [[1, 2], [3, 100]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dilations, variant):
    image, maps = scene(*shape)
    out = pixel_adaptive.pixel_adaptive(image, maps, variant == "par", dilations, 3)
    close(out, reference.pixel_adaptive(image, maps.double(), variant=variant, dilations=dilations, iterations=3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dilations", [[1, 2], [3, 100]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_against_float64(shape, dilations, variant):
    image, grad = scene(*shape)
    maps = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = reference.pixel_adaptive(image, maps, variant=variant, dilations=dilations, iterations=2)
    out.backward(grad.double())
    close(pixel_adaptive.pixel_adaptive_backward(grad, image, variant == "par", dilations, 2), maps.grad)


def test_default_dilations():
    image, maps = scene(1, 1, 5, 27)
    dilations = [1, 2, 4, 8, 12, 24]
    close(
        pixel_adaptive.pixel_adaptive(image, maps, True, dilations, 1),
        reference.pixel_adaptive(image, maps.double(), dilations=dilations, iterations=1),
    )


def test_half_precision_views_and_no_iteration():
    image, maps = scene(1, 3, 5, 6)
    out = pixel_adaptive.pixel_adaptive(image, maps.half(), False, [1], 1)
    assert out.dtype == torch.float16
    assert torch.equal(out, pixel_adaptive.pixel_adaptive(image, maps.half().float(), False, [1], 1).half())
    stored = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    swapped = image.transpose(2, 3).contiguous().transpose(2, 3)
    given = pixel_adaptive.pixel_adaptive(image, maps, True, [1, 3], 2)
    assert torch.equal(pixel_adaptive.pixel_adaptive(swapped, stored, True, [1, 3], 2), given)
    same = pixel_adaptive.pixel_adaptive(image, maps, True, [1, 3], 0)
    assert torch.equal(same, maps) and same.data_ptr() != maps.data_ptr()


def test_nan_in_the_picture():
    image, _ = scene(1, 1, 12, 13)
    image = image.float()
    image[0, 2, 5, 6] = float("nan")
    lost = pixel_adaptive.pixel_adaptive(image, torch.ones(1, 2, 12, 13), True, [2], 1).isnan()
    assert lost.sum() == 2 * 9 and lost[0, :, 3:8:2, 4:9:2].all()
