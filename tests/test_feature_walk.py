"""`refine_cams` on lists: small images go to a kernel together, and come back as if each had been alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import wsss_kernels as wk
from wsss_kernels import _dispatch
from wsss_kernels.ops.feature_walk import _LINKS, feature_walks

OPTIONS = {"radius": 5, "metric": "l1", "scale": "auto", "border": "full", "beta": 8.0, "solver": "auto", "tol": 1e-4}
SIZES = [(12, 17), (9, 8), (1, 1), (40, 3), (12, 17), (2, 70)]

needs_native = pytest.mark.skipif(_dispatch.native is None, reason="the compiled module is absent")


def images(sizes: list[tuple[int, int]], dim: int = 6, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(sum(h * w for h, w in sizes))
    return [
        (
            torch.rand(1 + i % 2, 1 + i % 7, h, w, generator=generator).to(dtype),
            torch.randn(1 + i % 2, dim, h, w, generator=generator).to(dtype),
            3 + 5 * i,
        )
        for i, (h, w) in enumerate(sizes)
    ]


def alone(maps: Tensor, feats: Tensor, steps: int, radius: int, beta: float, solver: str, tol: float, **affinity):
    links = wk.local_affinity(feats, radius, **affinity)
    return wk.random_walk(maps, links, radius=radius, beta=beta, steps=steps, solver=solver, tol=tol)


@pytest.fixture
def native_calls(monkeypatch):
    """How many images went to the kernel together, a number a call."""
    calls = []
    if _dispatch.native is not None:
        kernel = _dispatch.native.feature_walks

        def counted(walks, *rest):
            calls.append(len(walks))
            return kernel(walks, *rest)

        monkeypatch.setattr(_dispatch.native, "feature_walks", counted)
    return calls


@needs_native
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"radius": 3, "metric": "cosine", "scale": 1.0},
        {"scale": 0.7, "border": "cropped", "beta": 2.5, "solver": "power"},
        {"tol": 1e-6},
    ],
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_image_is_what_it_is_alone(native_calls, changed, threads):
    options = {**OPTIONS, **changed}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = feature_walks(images(SIZES), **options)
    finally:
        torch.set_num_threads(before)
    assert native_calls == [len(SIZES)]
    for one, (maps, feats, steps) in zip(together, images(SIZES), strict=True):
        torch.testing.assert_close(one, alone(maps, feats, steps, **options), rtol=0, atol=0)
        expected = alone(maps.double(), feats.double(), steps, **options)
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=2e-4)


@needs_native
def test_strided_inputs(native_calls):
    given = [(m.mT.contiguous().mT, f.flip(1).mT.contiguous().mT, s) for m, f, s in images(SIZES)]
    for one, (maps, feats, steps) in zip(feature_walks(given, **OPTIONS), given, strict=True):
        expected = alone(maps.contiguous(), feats.contiguous(), steps, **OPTIONS)
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
    assert native_calls == [len(SIZES)]


def test_large_images_and_watched_ones_go_alone(native_calls):
    side = int((_LINKS / 34) ** 0.5) + 1
    given = images([*SIZES, (side, side), (6, 6), (7, 7)])
    given[-2][1].requires_grad_()
    given[-1] = (given[-1][0].double(), given[-1][1].double(), 4)
    results = feature_walks(given, **OPTIONS)
    assert native_calls in ([], [len(SIZES)])
    assert results[-2].requires_grad and results[-1].dtype == torch.float64
    for one, (maps, feats, steps) in zip(results, given, strict=True):
        torch.testing.assert_close(one, alone(maps, feats, steps, **OPTIONS), rtol=0, atol=0)


@needs_native
def test_lists_of_many_shapes(native_calls):
    generator = torch.Generator().manual_seed(5)
    sizes = [(5 + i, 9 + i % 4) for i in range(19)]
    cams = [torch.rand(2, h // 2 + 1, w, generator=generator) for h, w in sizes]
    feats = [torch.randn(4, h, w, generator=generator) for h, w in sizes]
    guide = [torch.randint(0, 256, (3, h + 3, w + 2), generator=generator, dtype=torch.uint8) for h, w in sizes]
    refined = wk.refine_cams(cams, feats, guide=guide, background=8)
    assert sum(native_calls) >= 2 * 16  # the walk and the guide's, the last few perhaps by themselves
    for one, c, f, g in zip(refined, cams, feats, guide, strict=True):
        torch.testing.assert_close(one, wk.refine_cams(c, f, guide=g, background=8), rtol=0, atol=0)


@needs_native
def test_nothing_to_walk():
    given = [(torch.rand(1, 0, 4, 5), torch.rand(1, 2, 4, 5), 3), (torch.zeros(2, 3, 4, 5), torch.rand(2, 2, 4, 5), 3)]
    empty, zero = feature_walks(given, **OPTIONS)
    assert empty.shape == (1, 0, 4, 5) and zero.eq(0).all() and zero.shape == (2, 3, 4, 5)
    unchanged = images(SIZES)
    for one, (maps, *_) in zip(feature_walks([(m, f, 0) for m, f, _ in unchanged], **OPTIONS), unchanged, strict=True):
        assert one.equal(maps)
    assert feature_walks([], **OPTIONS) == []


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"radius": 17}, ValueError, "radius must be an int in 1..16"),
        ({"metric": "l2"}, ValueError, "metric must be one of"),
        ({"scale": 0.0}, ValueError, "scale must be a number > 0"),
        ({"border": "none"}, ValueError, "border must be one of"),
        ({"beta": -1.0}, ValueError, "beta must be a number >= 0"),
        ({"solver": "lanczos"}, ValueError, "solver must be one of"),
        ({"tol": 0.0}, ValueError, "tol must be a number > 0"),
    ],
)
def test_bad_options_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        feature_walks(images(SIZES), **{**OPTIONS, **changed})
    with pytest.raises(ValueError, match="steps must be a whole number >= 0"):
        feature_walks([(m, f, -1) for m, f, _ in images(SIZES)], **OPTIONS)


def test_errors_name_the_image():
    cams, feats = [torch.rand(2, 4, 4 + i) for i in range(3)], [torch.rand(2, 4, 4 + i) for i in range(3)]
    with pytest.raises(ValueError, match=r"cams\[2\] must be a floating point tensor"):
        wk.refine_cams([*cams[:2], cams[2][None]], feats)
    with pytest.raises(ValueError, match=r"feats\[1\] must be \[D, h, w\]"):
        wk.refine_cams(cams, [feats[0], feats[1][0], feats[2]])
