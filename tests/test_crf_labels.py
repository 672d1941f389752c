"""confident_labels and affinity_labels beside the published steps, an image at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_kernels import affinity_labels, confident_labels, dense_crf, unary_from_labels


@pytest.fixture
def crf(monkeypatch):
    """What the CRF is asked."""
    asked = []

    def noted(image, unary, **options):
        asked.append((tuple(image.shape), tuple(unary.shape), options))
        return dense_crf(image, unary, **options)

    monkeypatch.setattr("wsss_kernels.crf_labels.dense_crf", noted)
    return asked


def scene(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three pictures with soft blobs: of classes 1 and 3, of none, of class 0."""
    generator = torch.Generator().manual_seed(seed)
    picture = 40 * torch.rand(3, 3, 14, 17, generator=generator)
    cams = torch.zeros(3, 4, 14, 17)
    y, x = torch.meshgrid(torch.arange(14.0), torch.arange(17.0), indexing="ij")
    for image, c, cy, cx in ((0, 1, 4, 4), (0, 3, 9, 12), (2, 0, 7, 8)):
        distance = ((y - cy) ** 2 + (x - cx) ** 2).sqrt()
        cams[image, c] = torch.exp(-((distance / 4) ** 2))
        picture[image, c % 3] += 180 * (distance < 3.5)
    return picture.to(torch.uint8), cams / cams.amax((2, 3), keepdim=True).clamp_min(1e-6)


def published_confident(image: Tensor, cams: Tensor, fg: float, bg: float) -> Tensor:
    """One image, step by step, with its keys."""
    keys = [0] + [c + 1 for c in range(len(cams)) if cams[c].max() > 0]
    if len(keys) == 1:
        return torch.zeros(cams.shape[1:], dtype=torch.int64)
    found = []
    for threshold in (fg, bg):
        stack = torch.cat([torch.full_like(cams[:1], threshold), cams[[k - 1 for k in keys[1:]]]])
        unary = unary_from_labels(stack.argmax(0)[None], len(keys))
        q = dense_crf(image[None], unary, iterations=10, gaussian=(3, 3), bilateral=(50, 5, 10))
        found.append(torch.tensor(keys)[q[0].argmax(0)])
    out = found[0].clone()
    out[found[0] == 0] = 255
    out[(found[0] == 0) & (found[1] == 0)] = 0
    return out


def published_affinity(image: Tensor, cams: Tensor, low: float, high: float) -> Tensor:
    keys = [0] + [c + 1 for c in range(len(cams)) if cams[c].max() > 0]
    if len(keys) == 1:
        return torch.zeros(cams.shape[1:], dtype=torch.int64)
    found = []
    for alpha in (low, high):
        chosen = cams[[k - 1 for k in keys[1:]]]
        stack = torch.cat([(1 - chosen.amax(0, keepdim=True)) ** alpha, chosen])
        unary = -torch.log(stack.clamp(1e-5, 1))[None]
        q = dense_crf(image[None], unary, iterations=10, gaussian=(3, 3), bilateral=(80, 13, 10))
        found.append(torch.tensor(keys)[q[0].argmax(0)])
    out = found[0].clone()
    out[found[0] == 0] = 255
    out[found[1] == 0] = 0
    return out


@pytest.mark.parametrize(("fg", "bg"), [(0.30, 0.05), (0.6, 0.2)])
def test_confident_labels(fg, bg):
    image, cams = scene()
    labels = confident_labels(image, cams, fg=fg, bg=bg)
    assert labels.dtype == torch.int64 and labels.shape == (3, 14, 17)
    for i in range(3):
        assert torch.equal(labels[i], published_confident(image[i], cams[i], fg, bg))
    assert {0, 2, 4, 255} <= set(labels[0].unique().tolist())
    assert torch.equal(labels[0], confident_labels(image[0], cams[0], fg=fg, bg=bg))


@pytest.mark.parametrize(("low", "high"), [(4.0, 32.0), (2.0, 24.0)])
def test_affinity_labels(low, high):
    image, cams = scene(1)
    labels = affinity_labels(image, cams, low=low, high=high)
    assert labels.dtype == torch.int64 and labels.shape == (3, 14, 17)
    for i in range(3):
        assert torch.equal(labels[i], published_affinity(image[i], cams[i], low, high))
    assert {2, 4} <= set(labels[0].unique().tolist())
    assert torch.equal(labels[2], affinity_labels(image[2], cams[2], low=low, high=high))


def test_defaults_are_as_published():
    image, cams = scene()
    assert torch.equal(confident_labels(image, cams), confident_labels(image, cams, fg=0.30, bg=0.05))
    assert torch.equal(affinity_labels(image, cams), affinity_labels(image, cams, low=4, high=32))


@pytest.mark.parametrize("make", [confident_labels, affinity_labels])
def test_only_the_present_classes_are_computed(crf, make):
    image, cams = scene()
    both = torch.cat([cams, cams.roll(1, dims=1)])  # two images of each number of classes go together
    labels = make(torch.cat([image, image]), both)
    assert [(picture[0], unary[:2]) for picture, unary, _ in crf] == [(2, (2, 2))] * 2 + [(2, (2, 3))] * 2
    assert labels[1].eq(0).all() and labels[4].eq(0).all()
    named = torch.tensor([0, 2, 3, 4, 1])  # what rolling does to the names of classes
    expected = torch.where(labels[0] == 255, 255, named[labels[0].clamp(max=4)])
    assert torch.equal(labels[3], expected)


@pytest.mark.parametrize("make", [confident_labels, affinity_labels])
def test_small_cams_grow_to_the_picture(make):
    image, cams = scene()
    small = F.interpolate(cams, (7, 8), mode="bilinear")
    grown = F.interpolate(small, (14, 17), mode="bilinear", align_corners=False)
    assert torch.equal(make(image, small), make(image, grown))


@pytest.mark.parametrize("make", [confident_labels, affinity_labels])
def test_dtypes_bad_values_gradients_and_nothing(make):
    image, cams = scene()
    expected = make(image, cams)
    assert torch.equal(make(image.float(), cams.double()), expected)
    assert (make(image, cams.half()) == expected).float().mean() > 0.98
    dirty = cams.clone().requires_grad_()
    with torch.no_grad():
        dirty[0, 0], dirty[1, 2, 3, 4] = -1.0, math.nan
    labels = make(image, dirty)
    assert torch.equal(labels, expected) and not labels.requires_grad
    assert make(image, torch.zeros(3, 4, 5, 5)).eq(0).all()
    assert make(image, cams[:, :0]).shape == (3, 14, 17)
    assert make(image[:0], cams[:0]).shape == (0, 14, 17)


IMAGE, CAMS = scene()


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (confident_labels, {"image": IMAGE.float() / 255}, ValueError, "multiply by 255"),
        (confident_labels, {"image": IMAGE[:, :2]}, ValueError, "image must be RGB"),
        (confident_labels, {"image": IMAGE[:2]}, ValueError, "cams must be of 2 images, as image is, got 3"),
        (affinity_labels, {"image": IMAGE[0]}, ValueError, "cams must have a batch where image has one"),
        (affinity_labels, {"image": IMAGE[..., :0]}, ValueError, "image and cams must have at least one pixel"),
        (confident_labels, {"cams": CAMS.int()}, TypeError, "cams must be a floating point tensor"),
        (confident_labels, {"cams": CAMS[0, 0]}, ValueError, "cams must be"),
        (confident_labels, {"cams": torch.zeros(3, 255, 2, 2)}, ValueError, "cams must have at most 254 classes"),
        (confident_labels, {"fg": -0.1}, ValueError, "fg must be a number >= 0"),
        (confident_labels, {"bg": "low"}, TypeError, "bg must be a number >= 0"),
        (confident_labels, {"bg": 0.5}, ValueError, r"bg must be <= fg \(0.3\), got 0.5"),
        (affinity_labels, {"low": 0}, ValueError, "low must be a number > 0"),
        (affinity_labels, {"high": None}, TypeError, "high must be a number > 0"),
        (affinity_labels, {"low": 40}, ValueError, r"low must be <= high \(32.0\), got 40"),
    ],
)
def test_refusals(make, change, error, message):
    arguments = {"image": IMAGE, "cams": CAMS, **change}
    with pytest.raises(error, match=message):
        make(arguments.pop("image"), arguments.pop("cams"), **arguments)
