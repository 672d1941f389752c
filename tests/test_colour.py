"""CIE Lab, the working grid and the checks on a picture."""

import math

import pytest
import torch

from wsss_kernels.colour import average_to, check_picture, grid_size, lab_on_grid, rgb_to_lab, walk_features


def lab_of(*rgb: float) -> list[float]:
    return rgb_to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)).flatten().tolist()


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [  # published values for sRGB under D65
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (100, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
        ((5, 5, 5), (1.37, 0, 0)),  # on the linear part of both curves
    ],
)
def test_by_hand(rgb, lab):
    assert lab_of(*rgb) == pytest.approx(lab, abs=0.02)


def test_equals_scikit_image():
    color = pytest.importorskip("skimage.color")
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(color.rgb2lab(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(rgb_to_lab(image), expected.float(), rtol=0, atol=1e-3)


def test_float_and_uint8_agree_and_dtypes():
    image = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    near = {"rtol": 0, "atol": 1e-3}  # Lab units; scalar and vector pow differ in the last bit
    lab = rgb_to_lab(image)
    assert lab.dtype == torch.float32 and lab.shape == image.shape
    torch.testing.assert_close(rgb_to_lab(image.float()), lab, **near)
    torch.testing.assert_close(rgb_to_lab(image.half()), lab, **near)  # whole numbers up to 255 are exact in float16
    assert rgb_to_lab(image.double()).dtype == torch.float64
    torch.testing.assert_close(rgb_to_lab(image[0]), lab[0], **near)
    torch.testing.assert_close(rgb_to_lab(image.to(memory_format=torch.channels_last)), lab, **near)


def test_overshoot_is_clamped_and_nan_stays_alone():
    assert lab_of(300, 260, 255) == pytest.approx(lab_of(255, 255, 255))
    image = torch.full((1, 3, 1, 2), 100.0)
    image[0, 1, 0, 0] = math.nan
    lab = rgb_to_lab(image)
    assert lab[..., 0].isnan().any() and lab[..., 1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 0, 4), (1, 3, 1, 1)])
def test_empty_and_single_pixel(shape):
    assert rgb_to_lab(torch.zeros(shape)).shape == shape


def test_gradient_is_finite_on_black():
    image = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    rgb_to_lab(image).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


@pytest.mark.parametrize(
    ("size", "grid", "expected"),
    [
        ((375, 500), 128, (96, 128)),
        ((500, 375), 128, (128, 96)),
        ((500, 333), 128, (128, 85)),
        ((100, 128), 128, (100, 128)),  # small enough: unchanged
        ((20, 30), 128, (20, 30)),
        ((3, 5000), 128, (1, 128)),  # never below one cell
        ((0, 500), 128, (0, 128)),
        ((7, 9), 1, (1, 1)),
    ],
)
def test_grid_size(size, grid, expected):
    assert grid_size(*size, grid) == expected


def test_average_by_hand():
    maps = torch.tensor([[[[0.0, 2.0, 4.0, 6.0]]]])
    assert average_to(maps, (1, 2)).flatten().tolist() == [1.0, 5.0]
    assert average_to(maps, (1, 4)) is maps


def test_grid_averages_light_by_hand():
    # Black beside white: half the light, Y = 0.5, L = 116 * 0.5^(1/3) - 16 (the average of Lab would be 50).
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    lab = lab_on_grid(image, (1, 1)).flatten().tolist()
    assert lab == pytest.approx([116 * 0.5 ** (1 / 3) - 16, 0, 0], abs=0.01)
    assert torch.equal(lab_on_grid(image, (1, 2)), rgb_to_lab(image))


def test_walk_features_by_hand():
    # Columns black and white in threes: every pair 3 columns apart differs by L = 100, so by 100/3 in the mean over
    # the channels; every pair 3 rows apart by 0. s = 100/6, unit = sqrt(6 * 100/6) = 10.
    image = torch.tensor([0, 0, 0, 255, 255, 255], dtype=torch.uint8).expand(1, 3, 4, 6)
    feats = walk_features(image, (4, 6))
    torch.testing.assert_close(feats[0, 0, 0], torch.tensor([0.0, 0.0, 0.0, 10.0, 10.0, 10.0]), rtol=0, atol=1e-3)
    assert torch.equal(walk_features(image.expand(2, 3, 4, 6), (4, 6))[1], feats[0])  # a unit for each image


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 9), (9, 1), (0, 9), (9, 9)])
def test_walk_features_of_small_and_flat_pictures(size):
    feats = walk_features(torch.full((2, 3, *size), 90, dtype=torch.uint8), size)
    assert feats.shape == (2, 3, *size) and feats.isfinite().all()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.rand(1, 3, 4, 4), ValueError, "picture must be .* multiply by 255"),
        (torch.randn(1, 3, 4, 4) * 50, ValueError, r"picture must be .* 0\.\.255"),
        (torch.zeros(1, 4, 4, 4), ValueError, "picture must be RGB"),
        (torch.zeros(3, 4), ValueError, "picture must be RGB"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), TypeError, "picture must be uint8"),
        ("cat.jpg", TypeError, "picture must be a tensor"),
    ],
)
def test_refused_pictures(image, error, message):
    with pytest.raises(error, match=message):
        check_picture("picture", image)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 3, 4, 4),  # a black picture
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.ones(1, 3, 4, 4, dtype=torch.uint8),  # dark, but uint8 says its range
        torch.full((3, 2, 2), 1.5),
        torch.zeros(0, 3, 4, 4),
    ],
)
def test_accepted_pictures(image):
    check_picture("picture", image)


def test_values_are_not_read_under_compile():
    compiled = torch.compile(rgb_to_lab, fullgraph=True, backend="aot_eager")
    image = torch.rand(1, 3, 4, 4)
    assert compiled(image).shape == image.shape
    with pytest.raises(ValueError, match="multiply by 255"):
        rgb_to_lab(image)


@pytest.mark.parametrize(("grid", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)])
def test_refused_grids(grid, error):
    with pytest.raises(error, match="grid must be"):
        grid_size(10, 10, grid)
