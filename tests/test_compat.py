"""Bridges: NumPy heat maps, transformer tokens."""

import numpy as np
import pytest
import torch

import wsss_kernels as wk
from wsss_kernels.compat import refine_numpy, tokens_to_map

RNG = np.random.default_rng(0)
CAM = RNG.random((3, 12, 16)).astype(np.float32)
RGB = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_one_map_is_that_of_refine_cams():
    expected = wk.refine_cams(torch.from_numpy(CAM[:1]), torch.from_numpy(RGB).permute(2, 0, 1), method="image")
    refined = refine_numpy(CAM[0], RGB)
    assert refined.shape == (12, 16)
    assert refined.dtype == np.float32
    np.testing.assert_allclose(refined, expected[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("picture", [RGB, RGB / 255, (RGB / 255).astype(np.float32), RGB.astype(np.float64)])
def test_every_form_of_picture(picture):
    np.testing.assert_allclose(refine_numpy(CAM, picture), refine_numpy(CAM, RGB), atol=1e-4)


def test_each_map_is_refined_on_its_own():
    refined = refine_numpy(CAM, RGB)
    assert refined.shape == CAM.shape
    assert (refined.max(axis=(1, 2)) == 1).all()
    assert refined.min() >= 0
    pictures = np.stack([RGB, RGB[::-1], RGB[:, ::-1]])
    several = refine_numpy(CAM, pictures)
    for i in range(3):
        np.testing.assert_allclose(refined[i], refine_numpy(100 * CAM[i], RGB), atol=1e-5)
        np.testing.assert_allclose(several[i], refine_numpy(CAM[i], pictures[i]), atol=1e-5)


def test_sharper_than_the_seed():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[16:48, 16:48] = (200, 60, 30)
    ys, xs = np.mgrid[:64, :64]
    cam = np.exp(-((ys - 24) ** 2 + (xs - 24) ** 2) / 200).astype(np.float32)
    refined = refine_numpy(cam, picture)
    box = np.zeros((64, 64), dtype=bool)
    box[17:47, 17:47] = True
    assert cam[box].min() < 0.02
    assert refined[box].min() > 0.5
    assert refined[~box & (picture[..., 0] == 0)].max() < 0.4


def test_options_empty_and_degenerate():
    assert refine_numpy(CAM, RGB, size="feats").shape == (3, 48, 64)
    assert refine_numpy(CAM[0], RGB, size=(5, 7), steps=8, grid=32).shape == (5, 7)
    assert refine_numpy(CAM[:0], RGB).shape == (0, 12, 16)
    assert (refine_numpy(np.zeros((4, 5)), RGB) == 0).all()
    assert (refine_numpy(-CAM, RGB) == 0).all()
    assert refine_numpy(np.array([[3]]), RGB).tolist() == [[1.0]]
    assert refine_numpy(CAM[:, ::-1, ::-1], RGB[::-1]).shape == CAM.shape  # negative strides


@pytest.mark.parametrize(
    ("cam", "rgb", "error", "words"),
    [
        (torch.rand(3, 4), RGB, TypeError, "grayscale_cam must be a NumPy array"),
        (CAM[None], RGB, ValueError, "grayscale_cam must be"),
        (np.full((4, 4), np.nan), RGB, ValueError, "grayscale_cam must be finite, got 16"),
        (CAM, RGB[..., :2], ValueError, "rgb must be"),
        (CAM, RGB.transpose(2, 0, 1), ValueError, "rgb must be"),
        (CAM, np.stack([RGB, RGB]), ValueError, "rgb must be one picture or 3"),
        (CAM, RGB / 127.5 - 1, ValueError, "before its normalisation"),
        (CAM, RGB * 2.0, ValueError, "0..255"),
        (CAM, np.full((4, 4, 3), np.nan), ValueError, "0..255"),
        (CAM, RGB.astype(np.int64), TypeError, "uint8 or floating point"),
    ],
)
def test_refusals(cam, rgb, error, words):
    with pytest.raises(error, match=words):
        refine_numpy(cam, rgb)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("given", [True, False])
def test_tokens(prefix, given):
    maps = torch.rand(2, 7, 3, 4)
    tokens = torch.cat([torch.full((2, prefix, 7), 9.0), maps.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(tokens_to_map(tokens, (3, 4), prefix=prefix if given else None), maps)


def test_tokens_keep_gradient_and_dtype_and_feed_refine_cams():
    tokens = torch.rand(1, 1 + 20, 6, dtype=torch.bfloat16, requires_grad=True)
    feats = tokens_to_map(tokens, (4, 5))
    assert feats.dtype == torch.bfloat16
    feats.float().sum().backward()
    assert tokens.grad[0, 0].abs().max() == 0
    assert (tokens.grad[0, 1:] == 1).all()
    assert wk.refine_cams(torch.rand(1, 2, 4, 5), feats.detach()).shape == (1, 2, 4, 5)


@pytest.mark.parametrize(
    ("tokens", "grid", "prefix", "error", "words"),
    [
        (CAM, (3, 4), None, TypeError, "tokens must be a tensor"),
        (torch.rand(2, 12), (3, 4), None, ValueError, r"\[B, n, D\]"),
        (torch.rand(1, 11, 2), (3, 4), None, ValueError, "3 x 4 = 12 patches .* got 11"),
        (torch.rand(1, 29, 2), (3, 4), None, ValueError, "at most 16 prefix tokens, got 29"),
        (torch.rand(1, 13, 2), (3, 4), 2, ValueError, r"2 \+ 3 x 4 = 14, got 13"),
        (torch.rand(1, 11, 2), (3, 4), -1, ValueError, "got 11"),
        (torch.rand(1, 12, 2), (3.0, 4), None, TypeError, "grid"),
        (torch.rand(1, 12, 2), 12, None, TypeError, "grid"),
        (torch.rand(1, 12, 2), (12,), None, ValueError, "grid"),
        (torch.rand(1, 0, 2), (0, 4), None, ValueError, "grid"),
        (torch.rand(1, 13, 2), (3, 4), True, TypeError, "prefix"),
    ],
)
def test_token_refusals(tokens, grid, prefix, error, words):
    with pytest.raises(error, match=words):
        tokens_to_map(tokens, grid, prefix=prefix)
