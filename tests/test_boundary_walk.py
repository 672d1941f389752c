"""`refine_cams(method="boundary")` and `boundary_labels` beside IRNet's own way, re-derived with dense matrices."""

import math

import pytest
import torch
import torch.nn.functional as F

import wsss_kernels as wk
from tests.test_boundary_affinity import published_paths


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(channels, height, width, seed=1):
    coarse = rand(1, channels, height // 4 + 2, width // 4 + 2, seed=seed)
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]


def edges(height, width, seed=0):
    return F.interpolate(rand(1, 1, height // 3 + 2, width // 3 + 2, seed=seed), (height, width), mode="nearest") ** 3


def published_walk(cams, edge, radius=5, beta=10, exponent=8):
    """cams [C, h, w], edge [h, w] in float64: pad by ones, dense transition matrix, squared `exponent` times."""
    height, width = edge.shape
    padded = F.pad(edge, (radius, radius, 0, radius), value=1.0)
    tall, wide = padded.shape
    flat = padded.flatten()
    number = torch.arange(tall * wide).view(tall, wide)
    floor = radius - 1
    rows, columns = tall - floor, wide - 2 * floor
    sources = number[:rows, floor : floor + columns].flatten()
    matrix = torch.zeros(tall * wide, tall * wide, dtype=torch.float64)
    for paths in published_paths(radius).values():
        for path in paths:
            along = [number[dy : dy + rows, floor + dx : floor + dx + columns].flatten() for dy, dx in path]
            affinity = 1 - torch.stack([flat[pixels] for pixels in along]).amax(dim=0)
            matrix[sources, along[0]] = affinity
            matrix[along[0], sources] = affinity
    matrix += torch.eye(tall * wide, dtype=torch.float64)
    inside = number[: tall - radius, radius : wide - radius].flatten()
    matrix = matrix[inside][:, inside] ** beta
    matrix = matrix / matrix.sum(dim=0, keepdim=True)
    for _ in range(exponent):
        matrix = matrix @ matrix
    return ((cams * (1 - edge)).flatten(1) @ matrix).unflatten(1, (height, width))


@pytest.mark.parametrize("height, width", [(11, 14), (3, 9), (1, 2), (16, 7)])
def test_like_the_published_walk(wk, height, width, assert_close):
    cams, edge = blobs(3, height, width), edges(height, width)[0]
    expected = published_walk(cams.double(), edge[0].double())
    for options in ({"method": "boundary"}, {"preset": "irn"}):
        assert_close(wk.refine_cams(cams, edge, normalize=None, **options), expected, 1e-4)
        exact = wk.refine_cams(cams, edge, normalize=None, solver="power", **options)
        assert_close(exact, expected, 1e-5)
    assert_close(wk.refine_cams(cams, edge, preset="irn"), expected / expected.max(), 1e-4)


def test_options(wk, assert_close):
    cams, edge = blobs(2, 9, 12), edges(9, 12)[0]
    expected = published_walk(cams.double(), edge[0].double(), radius=3, beta=4, exponent=3)
    options = {"radius": 3, "beta": 4, "steps": 8, "solver": "power", "normalize": None}
    assert_close(wk.refine_cams(cams, edge, method="boundary", **options), expected)
    assert_close(wk.refine_cams(cams, edge, preset="irn", **options), expected)


def test_gradients_reach_boundary_and_cams(wk):
    cams, edge = blobs(2, 9, 12)[None].requires_grad_(), edges(9, 12).requires_grad_()
    out = wk.refine_cams(cams, edge, method="boundary", steps=16, normalize=None)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.square().sum(), (cams, edge)))


def test_after_other_methods_and_with_their_arguments(wk):
    cams, edge = rand(2, 3, 6, 7), edges(12, 14).expand(2, 1, 12, 14)
    labels = torch.tensor([[True, False, True], [False, True, False]])
    out = wk.refine_cams(cams, edge, method="boundary", labels=labels, background=4, size="feats")
    assert out.shape == (2, 4, 12, 14) and out[0, 2].eq(0).all() and out[1, [1, 3]].eq(0).all()
    assert wk.refine_cams(cams, edge, method=("boundary", "boundary")).shape == cams.shape
    assert wk.refine_cams(list(cams), list(edge), method="boundary")[1].shape == (3, 6, 7)


@pytest.mark.parametrize(
    "edge, options, error, message",
    [
        (torch.zeros(1, 3, 4, 5), {}, ValueError, "feats must have exactly one channel"),
        (torch.zeros(1, 1, 4, 5, dtype=torch.uint8), {}, TypeError, "feats must be a floating point tensor"),
        (torch.zeros(1, 1, 4, 5) - 1, {}, ValueError, r"feats must be boundary probabilities in 0\.\.1, got -1 to -1"),
        (torch.ones(1, 1, 4, 5) * 1.01, {}, ValueError, r"feats must be boundary probabilities in 0\.\.1"),
        (torch.zeros(1, 1, 0, 5), {}, ValueError, "feats must have at least one pixel"),
        (torch.zeros(1, 1, 4, 5), {"radius": 17}, ValueError, "radius must be"),
        (torch.zeros(1, 1, 4, 5), {"scale": 1.0}, TypeError, "scale is no option of method='boundary'"),
        (torch.zeros(1, 1, 4, 5), {"steps": "auto"}, TypeError, "steps must be a whole number"),
        (torch.zeros(1, 1, 4, 5), {"beta": -1}, ValueError, "beta must be"),
    ],
)
def test_refusals(edge, options, error, message):
    with pytest.raises(error, match=message):
        wk.refine_cams(torch.zeros(1, 2, 4, 5), edge, method="boundary", **options)


def test_nan_stays_in_its_image(wk):
    cams, edge = rand(2, 2, 9, 12), edges(9, 12).repeat(2, 1, 1, 1)
    clean = wk.refine_cams(cams, edge, method="boundary")
    edge[0, 0, 4, 5] = math.nan
    assert torch.equal(wk.refine_cams(cams, edge, method="boundary")[1], clean[1])


# Labels


@pytest.mark.parametrize("height, width", [(37, 54), (40, 56), (38, 53)])
def test_labels_like_the_published_last_step(wk, height, width):
    strided = ((height - 1) // 4 + 1, (width - 1) // 4 + 1)
    cams, edge = blobs(3, *strided) ** 3, edges(*strided)[0]
    walked = published_walk(cams.double(), edge[0].double())
    grown = F.interpolate(walked[None], scale_factor=4, mode="bilinear", align_corners=False)[0, :, :height, :width]
    scores = F.pad(grown / grown.max(), (0, 0, 0, 0, 1, 0), value=0.25)
    keys = torch.tensor([0, 3, 8, 20])
    labels = wk.boundary_labels(cams, edge, size=(height, width), class_ids=[3, 8, 20])
    assert labels.shape == (height, width) and labels.dtype == torch.int64
    expected = keys[scores.argmax(dim=0)]
    first, second = scores.topk(2, dim=0).values
    assert torch.equal(labels[first - second > 1e-3], expected[first - second > 1e-3])
    assert len(expected.unique()) >= 3 and (first - second > 1e-3).double().mean() > 0.99


def test_labels_at_other_sizes(wk):
    cams, edge = blobs(2, 9, 12)[None], edges(9, 12)
    walked = wk.refine_cams(cams, edge, preset="irn")
    assert torch.equal(wk.boundary_labels(cams, edge), wk.labels_from_maps(walked, background=0.25))
    larger = wk.refine_cams(cams, edge, preset="irn", size=(20, 31))
    assert torch.equal(wk.boundary_labels(cams, edge, size=(20, 31)), wk.labels_from_maps(larger, background=0.25))
    coarse = F.avg_pool2d(cams, 3)
    assert wk.boundary_labels(coarse, edge).shape == (1, 3, 4)
    assert wk.boundary_labels(coarse, edge, size=(36, 48)).shape == (1, 36, 48)


def test_background_of_labels(wk):
    cams, edge = blobs(2, 9, 12)[None].repeat(2, 1, 1, 1), edges(9, 12).repeat(2, 1, 1, 1)
    none, all_of_it = wk.boundary_labels(cams, edge, background=torch.tensor([0.0, 1.0]), size=(36, 48))
    assert none.gt(0).all() and all_of_it.eq(0).all()
    assert torch.equal(wk.boundary_labels(cams, edge, background=1.0, size=(36, 48))[0], all_of_it)
    assert wk.boundary_labels(torch.zeros(1, 2, 9, 12), edge[:1], background=0).eq(0).all()


@pytest.mark.parametrize("shape", [(1, 0, 9, 12), (0, 2, 9, 12), (1, 2, 0, 12)])
def test_labels_of_nothing(wk, shape):
    edge = edges(9, 12).expand(shape[0], 1, 9, 12)
    assert wk.boundary_labels(torch.zeros(shape), edge).shape == (shape[0], *shape[2:])
    assert wk.boundary_labels(torch.zeros(shape), edge, size=(30, 40)).shape == (shape[0], 30, 40)


def test_labels_with_another_walk_and_threshold(wk):
    cams, edge = blobs(3, 9, 12)[None].expand(2, 3, 9, 12) ** 2, edges(9, 12).expand(2, 1, 9, 12)
    walk = {"radius": 3, "beta": 4, "steps": 8}
    walked = published_walk(cams[0].double(), edge[0, 0].double(), radius=3, beta=4, exponent=3)
    maps = (walked / walked.amax()).float().expand(2, 3, 9, 12)
    for background in (0.4, "auto"):
        labels = wk.boundary_labels(cams, edge, background=background, **walk)
        expected = wk.labels_from_maps(maps, background=background)
        assert (labels == expected).float().mean() > 0.99  # sums in another order
        assert not torch.equal(labels, wk.boundary_labels(cams, edge, background=background))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cams": torch.zeros(1, 2, 4, 5, dtype=torch.int64)}, TypeError, "cams must be"),
        ({"cams": torch.zeros(4, 5)}, ValueError, "cams must be"),
        ({"boundary": None}, TypeError, "boundary must be"),
        ({"boundary": torch.zeros(1, 2, 4, 5)}, ValueError, "boundary must have exactly one channel"),
        ({"boundary": torch.full((1, 1, 4, 5), 2.0)}, ValueError, r"boundary must be .*in 0\.\.1"),
        ({"boundary": torch.zeros(2, 1, 4, 5)}, ValueError, "boundary must have the batch of cams"),
        ({"boundary": torch.zeros(1, 1, 0, 5)}, ValueError, "boundary must .* at least one pixel"),
        ({"background": None}, TypeError, "background must be a number"),
        ({"background": "otsu"}, ValueError, "background must be a number, a tensor .* or \"auto\", got 'otsu'"),
        ({"radius": 17}, ValueError, "radius must be"),
        ({"steps": "auto"}, TypeError, "steps must be a whole number"),
        ({"beta": -1}, ValueError, "beta must be"),
        ({"background": math.nan}, ValueError, "background must be a number"),
        ({"background": torch.zeros(3)}, ValueError, "background must be"),
        ({"size": 4}, TypeError, "size must be"),
        ({"size": (4, 0)}, ValueError, "size must be"),
        ({"size": (4, 5.0)}, ValueError, "size must be"),
        ({"class_ids": [1, 2, 3]}, ValueError, "class_ids must be"),
    ],
)
def test_label_refusals(change, error, message):
    arguments = {"cams": torch.zeros(1, 2, 4, 5), "boundary": torch.zeros(1, 1, 4, 5)} | change
    with pytest.raises(error, match=message):
        wk.boundary_labels(arguments.pop("cams"), arguments.pop("boundary"), **arguments)
