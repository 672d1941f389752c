"""`refine_cams`: composition, resolutions, labels, background, lists, presets, refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk
from wsss_kernels.colour import grid_size, walk_features


def close(actual: Tensor, expected: Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tol)


@pytest.fixture
def cams() -> Tensor:
    return torch.rand(2, 3, 12, 17, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def feats() -> Tensor:
    return torch.randn(2, 16, 12, 17, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def picture() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def walked(maps: Tensor, feats: Tensor, steps: int, **affinity_options) -> Tensor:
    affinity = wk.local_affinity(feats.double(), **{"scale": "auto", **affinity_options})
    return wk.random_walk(maps.double(), affinity, steps=steps)


def test_is_the_composition_of_the_ops(wk, cams, feats):
    expected = walked(cams, feats, steps=16)  # clamp(round(256 (17/128)^2), 16, 256)
    close(wk.refine_cams(cams, feats, normalize=None), expected, 1e-4)
    close(wk.refine_cams(cams, feats, normalize=None, tol=1e-6), expected, 1e-6)
    close(wk.refine_cams(cams, feats), expected / expected.amax((1, 2, 3), keepdim=True), 2e-4)
    close(wk.refine_cams(cams, feats, normalize="class"), expected / expected.amax((2, 3), keepdim=True), 2e-4)


def test_options_reach_the_ops(wk, cams, feats):
    options = {"radius": 3, "metric": "cosine", "scale": 1.0, "border": "cropped"}
    affinity = wk.local_affinity(feats.double(), **options)
    expected = wk.random_walk(cams.double(), affinity, radius=3, beta=2.5, steps=7)
    close(wk.refine_cams(cams, feats, **options, beta=2.5, steps=7, solver="power", normalize=None), expected)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_unit_of_the_features_does_not_matter(wk, cams, feats, factor):
    close(wk.refine_cams(cams, feats * factor), wk.refine_cams(cams, feats), 1e-5)


def test_cams_are_averaged_down_and_stretched_up_to_the_features(wk, cams):
    coarse = torch.randn(2, 8, 6, 9)
    expected = walked(F.adaptive_avg_pool2d(cams.double(), (6, 9)), coarse, 16)
    expected = F.interpolate(expected, (12, 17), mode="bilinear", align_corners=False)
    close(wk.refine_cams(cams, coarse, normalize=None), expected, 1e-4)
    fine = torch.randn(2, 8, 25, 30)
    grown = F.interpolate(cams.double(), (25, 30), mode="bilinear", align_corners=False)
    close(wk.refine_cams(cams, fine, size="feats", normalize=None), walked(grown, fine, 16), 1e-4)


def test_image_method_walks_on_colours(wk, cams, picture):
    """At a grid of 32 between 8 and 25 steps, by the share of the picture that an image's maps cover."""
    grid = grid_size(40, 60, 32)
    cams = torch.stack([cams[0] ** 60, cams[1], cams[0] ** 10])  # little, much, and in between
    feats = walk_features(picture[[0, 1, 1]], grid)
    resized = F.interpolate(cams.double(), grid, mode="bilinear")
    share = (resized.amax(dim=1) / resized.amax(dim=(1, 2, 3))[:, None, None]).mean(dim=(1, 2))
    weight = (torch.log(share / 0.06) / math.log(0.3 / 0.06)).clamp(0, 1)[:, None, None, None]
    assert weight[0] < weight[2] < weight[1] == 1
    short, long = (walked(resized, feats, steps, scale=1.0) for steps in (8, 25))
    mixed = weight * short + (1 - weight) * long
    for steps, expected in (("auto", mixed), (8, short)):
        expected = F.interpolate(expected, (40, 60), mode="bilinear", align_corners=False)
        options = {"method": "image", "grid": 32, "steps": steps, "size": "feats", "normalize": None}
        close(wk.refine_cams(cams, picture[[0, 1, 1]], **options), expected, 1e-4)
    close(
        wk.refine_cams(cams[:2], picture.float(), method="image"),
        wk.refine_cams(cams[:2], picture, method="image"),
    )


def test_image_method_gradient_of_the_mixture(wk, picture):
    cams = torch.rand(1, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    cams[0, 0, 2, 3] = 3  # all others cover little: the share of a walk depends on each of them

    def mixed(cams):
        return wk.refine_cams(cams, picture[:1], method="image", grid=8, normalize=None)

    assert torch.autograd.gradcheck(mixed, (cams.requires_grad_(),))


def test_image_method_counts_no_background_as_cover(wk, cams, picture):
    options = {"method": "image", "normalize": None}
    with_background = wk.refine_cams(cams**20, picture, background=1, **options)
    close(with_background[:, 1:], wk.refine_cams(cams**20, picture, **options), 1e-6)


def test_image_method_of_nothing_and_of_nan(wk, cams, picture):
    cams = torch.cat([cams[:, :2], torch.zeros_like(cams[:, :1])], dim=1)
    cams[0] = 0
    cams[1, 1, 3, 4] = float("nan")
    refined = wk.refine_cams(cams, picture, method="image", normalize=None)
    assert (refined[0] == 0).all() and (refined[1, 2] == 0).all() and refined[1, 1].isnan().any()
    assert refined[1, 0].isfinite().all()
    assert wk.refine_cams(cams[:, :0], picture, method="image").shape == (2, 0, 12, 17)


def test_guide_is_a_second_walk_at_the_picture(wk, cams, feats, picture):
    first = wk.refine_cams(cams, feats, normalize=None, tol=1e-6)
    second = wk.refine_cams(first, picture, method="image", steps=16, size="feats", normalize=None, tol=1e-6)
    close(wk.refine_cams(cams, feats, guide=picture, size="guide", normalize=None, tol=1e-6), second, 1e-5)


def test_several_methods_in_turn(wk, cams, picture):
    once = wk.refine_cams(cams, picture, method="image", size="feats", normalize=None)
    twice = wk.refine_cams(once, picture, method="image", size=(12, 17), normalize=None)
    close(wk.refine_cams(cams, picture, method=("image", "image"), normalize=None), twice)


@pytest.mark.parametrize(
    ("size", "expected"), [(None, (12, 17)), ("feats", (20, 21)), ((5, 8), (5, 8)), ([5, 8], (5, 8))]
)
def test_sizes(wk, cams, size, expected):
    assert wk.refine_cams(cams, torch.randn(2, 4, 20, 21), size=size).shape == (2, 3, *expected)


def test_labels_choose_the_classes(wk, cams, feats):
    labels = torch.tensor([[True, False, True], [False, False, False]])
    refined = wk.refine_cams(cams, feats, labels=labels, normalize=None)
    close(refined[0, [0, 2]], wk.refine_cams(cams[:1, [0, 2]], feats[:1], normalize=None)[0], 1e-6)
    assert refined[0, 1].eq(0).all() and refined[1].eq(0).all()


def test_background_is_made_of_the_present_classes_at_their_own_maximum(wk, cams, feats):
    labels = torch.tensor([[True, False, True], [False, True, False]])
    cams = cams * torch.tensor([3.0, 100.0, 0.5])[:, None, None]
    refined = wk.refine_cams(cams, feats, labels=labels, background=16, normalize=None)
    assert refined.shape == (2, 4, 12, 17)
    strongest = (cams[0] / cams[0].amax((1, 2), keepdim=True))[[0, 2]].amax(0)
    close(refined[0, 0], walked(((1 - strongest) ** 16)[None, None], feats[:1], 16)[0, 0], 1e-4)
    close(refined[0, 3], walked(cams[:1, 2:], feats[:1], 16)[0, 0], 1e-4)
    assert refined[0, 2].eq(0).all()


def test_background_per_image_and_without_any_class(wk, cams, feats):
    each = wk.refine_cams(cams, feats, background=[4.0, 32.0], normalize=None)
    for i, alpha in enumerate((4.0, 32.0)):
        close(each[i], wk.refine_cams(cams[i], feats[i], background=alpha, normalize=None), 1e-6)
    empty = wk.refine_cams(torch.zeros(1, 2, 12, 17), feats[:1], background=16)
    assert empty[:, 0].eq(1).all() and empty[:, 1:].eq(0).all()


def test_psa_preset_is_the_published_walk(wk):
    """Dense: A from the cropped pairs, T = A^8 / column sums, squared eight times, no normalisation after."""
    torch.manual_seed(0)
    height, width = 12, 14
    cams, feats = torch.rand(1, 2, height, width), torch.randn(1, 8, height, width)
    cams = cams / cams.amax((2, 3), keepdim=True)
    affinity = wk.local_affinity(feats.double(), border="cropped")[0]
    dense = torch.eye(height * width, dtype=torch.float64)
    index = torch.arange(height * width).view(height, width)
    for plane, (dy, dx) in zip(affinity, wk.neighbour_offsets(5), strict=True):
        for y in range(height - dy):
            for x in range(max(0, -dx), width - max(0, dx)):
                i, j = index[y, x], index[y + dy, x + dx]
                dense[i, j] = dense[j, i] = plane[y, x]
    transition = dense**8
    transition = transition / transition.sum(0)
    for _ in range(8):
        transition = transition @ transition
    maps = torch.cat([(1 - cams.amax(1, keepdim=True)) ** 16, cams], dim=1).double()
    expected = (maps.reshape(3, -1) @ transition).view(1, 3, height, width)
    close(wk.refine_cams(cams, feats, preset="psa", normalize=None), expected, 1e-4)
    given = wk.refine_cams(cams, feats, preset="psa", background=4, steps=3, normalize=None)
    plain = wk.refine_cams(cams, feats, background=4, scale=1.0, border="cropped", steps=3, normalize=None)
    torch.testing.assert_close(given, plain, rtol=0, atol=0)


def test_one_image_without_a_batch(wk, cams, feats, picture):
    labels = torch.tensor([True, True, False])
    single = wk.refine_cams(cams[0], feats[0], labels=labels, guide=picture[0], background=8)
    batched = wk.refine_cams(cams[:1], feats[:1], labels=labels[None], guide=picture[:1], background=8)
    torch.testing.assert_close(single, batched[0], rtol=0, atol=0)


def test_lists_of_any_sizes(wk):
    torch.manual_seed(0)
    sizes = [(12, 17), (9, 8), (12, 17), (1, 1)]
    cams = [torch.rand(c, h, w) for c, (h, w) in zip((2, 1, 2, 3), sizes, strict=True)]
    feats = [torch.randn(5, h, w) for h, w in sizes]
    guide = [torch.randint(0, 256, (3, 2 * h, 2 * w), dtype=torch.uint8) for h, w in sizes]
    labels = [torch.ones(len(c), dtype=torch.bool) for c in cams]
    refined = wk.refine_cams(cams, feats, guide=guide, labels=labels, background=[1.0, 2.0, 3.0, 4.0], size="guide")
    for i, one in enumerate(refined):
        alone = wk.refine_cams(
            cams[i], feats[i], guide=guide[i], labels=labels[i], background=float(i + 1), size="guide"
        )
        close(one, alone, 1e-6)
    assert wk.refine_cams([], []) == []


def test_gradients_reach_cams_and_features(wk, cams, feats):
    cams, feats = cams.requires_grad_(), feats.requires_grad_()
    weight = torch.randn(2, 3, 12, 17)
    grads = torch.autograd.grad((wk.refine_cams(cams, feats, normalize=None) * weight).sum(), (cams, feats))
    double = [x.detach().double().requires_grad_() for x in (cams, feats)]
    expected = torch.autograd.grad((wk.refine_cams(*double, normalize=None) * weight).sum(), double)
    for grad, wanted in zip(grads, expected, strict=True):
        close(grad / wanted.abs().max(), wanted / wanted.abs().max(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_cams_comes_back(wk, cams, feats, dtype):
    refined = wk.refine_cams(cams.to(dtype), feats)
    assert refined.dtype == dtype
    close(refined.float(), wk.refine_cams(cams, feats), 1e-2)


def test_negative_values_count_as_zero_with_one_warning(cams, feats):
    with pytest.warns(UserWarning, match="negative values in cams count as 0"):
        refined = wk.refine_cams(cams - 0.5, feats)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(refined, wk.refine_cams((cams - 0.5).clamp(min=0), feats), 0)


def test_empty_and_tiny(wk, feats):
    assert wk.refine_cams(torch.rand(0, 3, 12, 17), feats[:0]).shape == (0, 3, 12, 17)
    assert wk.refine_cams(torch.rand(2, 0, 12, 17), feats).shape == (2, 0, 12, 17)
    assert wk.refine_cams(torch.rand(1, 1, 1, 1), torch.rand(1, 1, 1, 1)).shape == (1, 1, 1, 1)
    zero = wk.refine_cams(torch.zeros(2, 3, 12, 17), feats, background=16)
    assert zero.isfinite().all() and zero[:, 1:].eq(0).all()


def test_nan_stays_in_its_class_and_image(wk, cams, feats):
    clean = wk.refine_cams(cams, feats)
    cams = cams.clone()
    cams[0, 1, 3, 3] = float("nan")
    dirty = wk.refine_cams(cams, feats)
    assert dirty[0, 1].isnan().any() and dirty[0, [0, 2]].isfinite().all()
    torch.testing.assert_close(dirty[1], clean[1], rtol=0, atol=0)


def test_constant_features_still_give_a_result(wk, cams):
    assert wk.refine_cams(cams, torch.ones(2, 4, 12, 17)).isfinite().all()


def test_random_convolution_features_at_stride_8_do_not_lower_a_seed(wk):
    """A disc on a contrasting ground, seen through an untrained convolution: the walk must not blur the seed away."""
    torch.manual_seed(0)
    ys, xs = torch.meshgrid(torch.arange(192), torch.arange(256), indexing="ij")
    inside = ((ys - 96) ** 2 + (xs - 120) ** 2 < 60**2).float()
    picture = torch.stack([0.8 * inside, 0.3 + 0.1 * inside, 0.6 - 0.5 * inside]) + 0.05 * torch.randn(3, 192, 256)
    feats = torch.nn.Conv2d(3, 64, 16, stride=8, padding=4)(picture[None]).detach()
    seed = torch.exp(-((ys - 90) ** 2 + (xs - 110) ** 2) / (2 * 30.0**2))[None, None]
    seed = F.adaptive_avg_pool2d(seed, feats.shape[-2:])
    truth = F.adaptive_avg_pool2d(inside[None, None], feats.shape[-2:])[0, 0] > 0.5

    def best_iou(maps: Tensor) -> float:
        score = maps[0, 0] / maps.max()
        return max(
            float(((score > t) & truth).sum() / ((score > t) | truth).sum()) for t in torch.linspace(0.05, 0.95, 19)
        )

    assert best_iou(wk.refine_cams(seed, feats)) >= best_iou(seed)


def test_compiles_as_one_graph(device, cams, feats):
    compiled = torch.compile(
        lambda c, f: wk.refine_cams(c, f, background=16), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    cams, feats = cams.to(device), feats.to(device)
    close(compiled(cams, feats), wk.refine_cams(cams, feats, background=16), 1e-6)


CAMS, FEATS = torch.rand(1, 2, 6, 7), torch.rand(1, 4, 6, 7)
PICTURE = torch.zeros(1, 3, 6, 7, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "method must be one of 'affinity', 'image'"),
        ({"method": ()}, ValueError, "method must be"),
        ({"cams": CAMS.int()}, TypeError, "cams must be a floating point tensor"),
        ({"cams": CAMS[0, 0]}, ValueError, "cams must be"),
        ({"cams": None}, TypeError, "cams must be"),
        ({"feats": FEATS[0]}, ValueError, "feats must be"),
        ({"feats": FEATS.expand(2, -1, -1, -1)}, ValueError, "feats must have the batch of cams"),
        ({"feats": FEATS[:, :0]}, ValueError, "feats must have at least one channel"),
        ({"feats": FEATS[..., :0]}, ValueError, "feats must have at least one pixel"),
        ({"method": "image", "feats": FEATS[:, :3]}, ValueError, "multiply by 255"),
        ({"method": "image", "feats": FEATS}, ValueError, "feats must be RGB"),
        ({"labels": torch.ones(1, 2)}, TypeError, "labels must be a bool tensor"),
        ({"labels": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "labels must be a bool tensor"),
        ({"guide": -PICTURE.float() - 1}, ValueError, "guide must be RGB in 0..255"),
        ({"background": 0}, ValueError, "background must be a number > 0"),
        ({"background": [1.0, 2.0]}, ValueError, "background must be a number > 0"),
        ({"background": "much"}, TypeError, "background must be a number > 0"),
        ({"size": "image"}, ValueError, "size must be"),
        ({"size": "guide"}, ValueError, "size must not be"),
        ({"size": (0, 4)}, ValueError, "size must be"),
        ({"size": 7}, TypeError, "size must be"),
        ({"normalize": "both"}, ValueError, "normalize must be"),
        ({"preset": "irnet"}, ValueError, "preset must be one of 'psa', 'afa', 'clip-es', 'irn'"),
        ({"grid": 64}, TypeError, "grid is no option of method='affinity', which has beta, border"),
        ({"steps": "all"}, ValueError, "steps must be one of 'auto'"),
        ({"steps": -1}, ValueError, "steps must be a whole number >= 0"),
    ],
)
def test_refusals_name_the_argument(change, error, message):
    arguments = {"cams": CAMS, "feats": FEATS, **change}
    with pytest.raises(error, match=message):
        wk.refine_cams(arguments.pop("cams"), arguments.pop("feats"), **arguments)


def test_lists_must_match():
    with pytest.raises(TypeError, match="feats must be a list of 2 tensors"):
        wk.refine_cams([CAMS[0], CAMS[0]], [FEATS[0]])
    with pytest.raises(TypeError, match="feats must be a list"):
        wk.refine_cams([CAMS[0]], FEATS)
