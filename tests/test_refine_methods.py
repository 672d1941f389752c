"""`refine_cams` by attention and by vote, and chains of methods."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tol)


@pytest.fixture
def cams() -> Tensor:
    return rand(2, 3, 6, 8)


@pytest.fixture
def attention() -> Tensor:
    return torch.softmax(3 * rand(2, 48, 48, seed=1), dim=-1)


@pytest.fixture
def picture() -> Tensor:
    return (256 * rand(2, 3, 30, 40, seed=2)).to(torch.uint8)


@pytest.fixture
def segments() -> Tensor:
    ys, xs = torch.arange(30) // 4, torch.arange(40) // 5
    return (10 * ys[:, None] + xs).expand(2, -1, -1)


def test_attention_is_the_op_on_the_tokens(wk, cams, attention):
    expected = wk.attention_walk(cams, attention)
    close(wk.refine_cams(cams, attention, method="attention", normalize=None), expected)
    options = {"sinkhorn": 1, "squarings": 2, "box_threshold": None}
    expected = wk.attention_walk(cams, attention, **options)
    close(wk.refine_cams(cams, attention, method="attention", normalize=None, **options), expected)


def test_attention_takes_cams_to_its_own_grid(wk, cams, attention):
    large = F.interpolate(cams, (24, 32), mode="bilinear")
    small = F.adaptive_avg_pool2d(large, (6, 8))
    walked = wk.attention_walk(small, attention)
    refined = wk.refine_cams(large, attention, method="attention", grid=(6, 8), normalize=None)
    close(refined, F.interpolate(walked, (24, 32), mode="bilinear", align_corners=False))
    close(wk.refine_cams(large, attention, method="attention", grid=[6, 8], size="feats", normalize=None), walked)
    square = wk.refine_cams(large, attention[:, :36, :36], method="attention", size="feats", normalize=None)
    expected = wk.attention_walk(F.adaptive_avg_pool2d(large, (6, 6)), attention[:, :36, :36])
    close(square, expected)
    # As many places as tokens: the grid is that of the maps, though 36 is a square too.
    long = rand(2, 1, 4, 9)
    expected = wk.attention_walk(long, attention[:, :36, :36])
    close(wk.refine_cams(long, attention[:, :36, :36], method="attention", normalize=None), expected)


def test_layers_and_heads_are_averaged(wk, cams):
    layers = [rand(2, heads, 48, 48, seed=heads) for heads in (4, 1, 2)]
    mean = torch.stack([layer.mean(1) for layer in layers]).mean(0)
    expected = wk.refine_cams(cams, mean, method="attention")
    close(wk.refine_cams(cams, layers, method="attention"), expected)
    close(wk.refine_cams(cams, tuple(layers), method="attention"), expected)
    close(wk.refine_cams(cams, [layer.mean(1) for layer in layers], method="attention"), expected)
    close(wk.refine_cams(cams, layers[0], method="attention"), wk.refine_cams(cams, [layers[0]], method="attention"))
    low = [layer.half() for layer in layers]  # summed in float32
    close(wk.refine_cams(cams, low, method="attention"), expected, 1e-3)
    one = wk.refine_cams(cams[0], [layer[0] for layer in layers], method="attention")
    close(one, wk.refine_cams(cams[:1], [layer[:1] for layer in layers], method="attention")[0])


def test_lists_of_images_have_lists_of_layers(wk):
    sizes = [(6, 8), (5, 5), (6, 8), (3, 7)]
    cams = [rand(2, h, w, seed=i) for i, (h, w) in enumerate(sizes)]
    layers = [[rand(3, h * w, h * w, seed=10 * i + j) for j in range(2)] for i, (h, w) in enumerate(sizes)]
    for one, cam, layer in zip(wk.refine_cams(cams, layers, method="attention"), cams, layers, strict=True):
        close(one, wk.refine_cams(cam, layer, method="attention"))


def test_attention_gets_the_present_classes_only(wk, cams, attention):
    labels = torch.tensor([[True, False, True], [False, False, True]])
    refined = wk.refine_cams(cams, attention, method="attention", labels=labels, normalize=None)
    expected = wk.attention_walk(cams, attention) * labels[:, :, None, None]
    close(refined, expected)


@pytest.mark.parametrize("variant", ["pamr", "par"])
def test_pixel_adaptive_is_the_op_at_the_picture(wk, cams, picture, variant):
    grown = F.interpolate(cams, (30, 40), mode="bilinear", align_corners=False)
    expected = wk.pixel_adaptive(picture.float(), grown, variant=variant, dilations=(1, 3), iterations=2)
    refined = wk.refine_cams(
        cams, picture, method=variant, dilations=(1, 3), iterations=2, size="feats", normalize=None
    )
    close(refined, expected)


def test_afa_preset(wk, cams, picture):
    close(wk.refine_cams(cams, picture, preset="afa"), wk.refine_cams(cams, picture, method="par"))
    fewer = wk.refine_cams(cams, picture, preset="afa", iterations=2)
    close(fewer, wk.refine_cams(cams, picture, method="par", iterations=2))


def test_clip_es_preset(wk, cams, attention):
    close(wk.refine_cams(cams, attention, preset="clip-es"), wk.refine_cams(cams, attention, method="attention"))
    changed = wk.refine_cams(cams, attention, preset="clip-es", squarings=0)
    close(changed, wk.refine_cams(cams, attention, method="attention", squarings=0))


def test_vote_is_the_op_on_the_segments(wk, cams, segments):
    grown = F.interpolate(cams, (30, 40), mode="bilinear", align_corners=False)
    expected = wk.mask_vote(grown, segments)
    refined = wk.refine_cams(cams, None, method="vote", segments=segments, size=(30, 40), normalize=None)
    close(refined, expected)
    close(
        wk.refine_cams(cams, None, method="vote", segments=segments, reduce="max", size=(30, 40), normalize=None),
        wk.mask_vote(grown, segments, reduce="max"),
    )
    single = wk.refine_cams(cams[0], None, method="vote", segments=segments[0], size=(30, 40), normalize=None)
    close(single, expected[0])


def test_vote_of_masks(wk, cams):
    masks = [rand(count, 30, 40, seed=count) > 0.7 for count in (3, 5)]
    grown = F.interpolate(cams, (30, 40), mode="bilinear", align_corners=False)
    refined = wk.refine_cams(cams, None, method="vote", segments=masks, size=(30, 40), normalize=None)
    expected = wk.mask_vote(grown, masks)
    close(refined, expected)
    listed = wk.refine_cams(list(cams), [None] * 2, method="vote", segments=masks, size=(30, 40), normalize=None)
    close(torch.stack(listed), expected)


def test_picture_then_vote(wk, cams, picture, segments):
    walked = wk.refine_cams(cams, picture, method="image", grid=32, size="feats", normalize=None)
    expected = wk.mask_vote(walked, segments)
    refined = wk.refine_cams(
        cams, picture, method=("image", "vote"), grid=32, segments=segments, size="feats", normalize=None
    )
    # The walk's own grid is 24 x 32: from there to the segments in one step.
    close(refined, expected)
    each = wk.refine_cams(
        list(cams), list(picture), method=("image", "vote"), grid=32, segments=list(segments), size="feats"
    )
    close(torch.stack(each), refined / refined.amax((1, 2, 3), keepdim=True))


def test_attention_then_vote_then_guide(wk, cams, attention, picture, segments):
    chain = {"method": ("attention", "vote"), "segments": segments, "background": 2, "normalize": None}
    voted = wk.refine_cams(cams, attention, size=(30, 40), **chain)
    expected = wk.refine_cams(voted, picture, method="image", steps=16, size="feats", normalize=None)
    refined = wk.refine_cams(cams, attention, guide=picture, size="guide", **chain)
    assert refined.shape == (2, 4, 30, 40)
    close(refined, expected, 2e-4)


@pytest.mark.parametrize("background", [None, 3.0])
def test_crf_is_the_op_on_shares(wk, cams, picture, background):
    """Each image by itself, with its own classes; absent ones stay zero, the background goes unless asked for."""
    labels = torch.tensor([[True, False, True], [False, True, False]])
    options = {"iterations": 3, "gaussian": (2.0, 2.0), "bilateral": (30.0, 20.0, 3.0)}
    refined = wk.refine_cams(
        cams, picture, method="crf", labels=labels, background=background, size="feats", normalize=None, **options
    )
    grown = F.interpolate(cams, (30, 40), mode="bilinear", align_corners=False)
    for image, classes in enumerate(labels):
        scores = grown[image, classes][None]
        if background is None:
            rest = wk.background_threshold(scores).expand(1, 1, 30, 40)
        else:
            seeds = cams[image, classes]
            strongest = (seeds / seeds.amax((1, 2), keepdim=True)).amax(0, keepdim=True)
            rest = F.interpolate((1 - strongest)[None] ** background, (30, 40), mode="bilinear", align_corners=False)
        stack = torch.cat([rest, scores], dim=1)
        unary = -(stack / stack.sum(1, keepdim=True)).clamp(1e-5, 1).log()
        marginals = wk.dense_crf(picture[image : image + 1], unary, **options)[0]
        expected = torch.zeros(4, 30, 40)
        expected[0], expected[1:][classes] = marginals[0], marginals[1:]
        # The second image runs beside one with two classes, against a map of zeros: a share of 1e-5 to start with.
        close(refined[image], expected if background else expected[1:], 1e-3)
        assert refined[image, int(background is not None) :][~classes].eq(0).all()


def test_walk_then_crf_of_one_picture(wk, cams, picture):
    walked = wk.refine_cams(cams, picture, method="image", size="feats", normalize=None)
    refined = wk.refine_cams(cams, picture, method=("image", "crf"), size="feats", normalize=None)
    close(refined, wk.refine_cams(walked, picture, method="crf", size="feats", normalize=None), 1e-3)
    assert refined.amax() <= 1 and refined.sum(1).amax() <= 1 + 1e-5
    each = wk.refine_cams(list(cams), list(picture), method="crf", normalize=None)
    close(torch.stack(each), wk.refine_cams(cams, picture, method="crf", normalize=None), 1e-5)
    nothing = wk.refine_cams(torch.zeros_like(cams), picture, method="crf", normalize=None)
    assert nothing.isfinite().all() and nothing.amax() < 1e-3  # all of it is background
    assert wk.refine_cams(cams[:, :0], picture, method="crf").shape == (2, 0, 6, 8)
    assert wk.refine_cams(cams[:0], picture[:0], method="crf").shape == (0, 3, 6, 8)
    with pytest.raises(ValueError, match="unary"):
        wk.refine_cams(cams.clone().requires_grad_(), picture, method="crf")


def test_gradient_reaches_the_cams_through_attention(wk, cams, attention):
    leaf = cams.clone().requires_grad_()
    weight = rand(2, 3, 6, 8, seed=7)
    (wk.refine_cams(leaf, attention, method="attention", normalize=None) * weight).sum().backward()
    other = cams.clone().requires_grad_()
    (wk.attention_walk(other, attention) * weight).sum().backward()
    close(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_of_the_cams_comes_back(wk, cams, attention, segments, dtype):
    for method, feats in (("attention", attention), ("vote", None)):
        options = {"segments": segments} if method == "vote" else {}
        refined = wk.refine_cams(cams.to(dtype), feats, method=method, **options)
        assert refined.dtype == dtype
        close(refined.float(), wk.refine_cams(cams, feats, method=method, **options), 5e-3)


def test_empty(wk, attention):
    assert wk.refine_cams(torch.rand(0, 3, 6, 8), attention[:0], method="attention").shape == (0, 3, 6, 8)
    assert wk.refine_cams(torch.rand(2, 0, 6, 8), attention, method="attention").shape == (2, 0, 6, 8)
    assert wk.refine_cams(torch.rand(0, 3, 6, 8), None, method="vote", segments=[]).shape == (0, 3, 6, 8)
    assert wk.refine_cams([], [], method="attention") == []


def test_compiles_as_one_graph(device, cams, attention, segments):
    torch._dynamo.reset()
    cams, attention, segments = (x.to(device) for x in (cams, attention, segments))

    def op(c, a, s):
        return wsss_kernels.refine_cams(c, a, method=("attention", "vote"), segments=s)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    close(compiled(cams, attention, segments), op(cams, attention, segments), 1e-6)


CAMS, ATTENTION, SEGMENTS = rand(1, 2, 3, 4), rand(1, 12, 12), torch.zeros(1, 3, 4, dtype=torch.int64)
MASK, PICTURE = torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(1, 3, 5, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feats": None}, TypeError, r"feats must be attention \[B, n, n\] or \[B, heads, n, n\]"),
        ({"feats": []}, ValueError, "feats must be attention .* got an empty list"),
        ({"feats": ATTENTION.long()}, TypeError, "feats must be attention .* floating point"),
        ({"feats": ATTENTION[..., 1:]}, ValueError, "feats must be attention"),
        ({"feats": ATTENTION[0]}, ValueError, "feats must be attention"),
        ({"feats": ATTENTION[:, :0, :0]}, ValueError, "feats must be attention .* n >= 1"),
        ({"feats": [ATTENTION, ATTENTION[:, 1:, 1:]]}, ValueError, "feats must be layers of one number of tokens"),
        ({"feats": ATTENTION.expand(2, -1, -1)}, ValueError, "feats must have the batch of cams"),
        ({"feats": -ATTENTION}, ValueError, "attention must be >= 0"),
        ({"feats": rand(1, 13, 13)}, ValueError, r"grid must be given, \(h, w\) with h w = 13 tokens"),
        ({"grid": (3, 5)}, ValueError, r"grid must be \(h, w\) with h w = 12 tokens"),
        ({"grid": 4}, TypeError, r"grid must be a pair \(h, w\)"),
        ({"grid": (3, 4.0)}, TypeError, "grid must be a pair of whole numbers"),
        ({"grid": (-3, -4)}, ValueError, "grid must be a pair of whole numbers"),
        ({"beta": 8}, TypeError, "beta is no option of method='attention', which has box_threshold, grid"),
        ({"segments": SEGMENTS}, TypeError, "segments is no option of method='attention'"),
        ({"method": ("attention", "vote")}, TypeError, "segments must be .* got None"),
        ({"method": ("attention", "image")}, ValueError, "feats must be RGB"),
        ({"method": "vote", "segments": SEGMENTS.float()}, TypeError, "segments must be an integer tensor"),
        ({"method": "vote", "segments": SEGMENTS[0]}, ValueError, "segments must be an integer tensor"),
        ({"method": "vote", "segments": [MASK, MASK]}, ValueError, "segments must have the batch of cams"),
        ({"method": "vote", "segments": [MASK.float()]}, TypeError, r"segments\[0\] must be a bool tensor"),
        ({"method": "vote", "segments": SEGMENTS, "reduce": "sum"}, ValueError, "reduce must be one of"),
        ({"method": "vote", "segments": SEGMENTS, "size": "feats"}, ValueError, "where no method works on feats"),
        ({"method": "crf"}, ValueError, "feats must be"),
        ({"method": "crf", "feats": PICTURE, "gaussian": (0, 3)}, ValueError, "gaussian must be"),
        (
            {"method": ("image", "crf"), "feats": PICTURE, "squarings": 1},
            TypeError,
            "squarings is no option of method=",
        ),
        ({"method": ("attention", "magic")}, ValueError, "method must be one of"),
        ({"method": ("attention", "vote"), "steps": 3}, TypeError, r"steps is no option of method=\('attention', 'vo"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"cams": CAMS, "feats": ATTENTION, "method": "attention", **change}
    with pytest.raises(error, match=message):
        wsss_kernels.refine_cams(arguments.pop("cams"), arguments.pop("feats"), **arguments)
