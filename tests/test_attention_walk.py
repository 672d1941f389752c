"""attention_walk against a dense float64 computation with scipy's connected components."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

import wsss_kernels
from wsss_kernels import _dispatch, reference
from wsss_kernels.reference.attention_walk import region_boxes

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (1, 5, 12, 9), (3, 2, 1, 8), (2, 1, 8, 1), (1, 21, 6, 6), (1, 2, 20, 23)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Maps of several blobs, and attention as a softmax gives it."""
    noise = rand(batch, channels, height, width)
    maps = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) ** 4
    n = height * width
    return maps, torch.softmax(4 * rand(batch, n, n, seed=1), dim=-1)


def boxes_of(plane: np.ndarray, threshold: float) -> np.ndarray:
    regions, _ = scipy.ndimage.label(plane > threshold * plane.max(), structure=np.ones((3, 3)))
    mask = np.zeros(plane.shape, dtype=bool)
    for box in scipy.ndimage.find_objects(regions):
        mask[box] = True
    return mask


def dense(maps: Tensor, attention: Tensor, sinkhorn=3, squarings=1, box_threshold=0.4) -> Tensor:
    """As published, in NumPy, class by class."""
    out = np.zeros(maps.shape)
    for b, image in enumerate(attention.double().cpu().numpy()):
        t = image
        for _ in range(sinkhorn):
            t = t / t.sum(0, keepdims=True)
            t = t / t.sum(1, keepdims=True)
        t = (t + t.T) / 2
        for _ in range(squarings):
            t = t @ t
        for c, plane in enumerate(maps[b].cpu().numpy()):  # boxes of the float32 values the op sees
            mask = np.ones(plane.shape) if box_threshold is None else boxes_of(plane, np.float32(box_threshold))
            out[b, c] = ((t * mask.reshape(1, -1)) @ plane.astype(np.float64).reshape(-1)).reshape(plane.shape)
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"squarings": 0}, {"squarings": 3, "box_threshold": None}, {"sinkhorn": 1, "box_threshold": 0.7},
     {"sinkhorn": 0, "squarings": 2, "box_threshold": 0.0}],
)  # fmt: skip
def test_against_dense(wk, nan_filled, assert_close, shape, options):
    maps, attention = inputs(*shape)
    expected = dense(maps, attention, **options)
    out = wk.attention_walk(maps, attention, **options)
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert_close(out, expected)
    assert_close(reference.attention_walk(maps, attention, **options), expected)
    # The boxes are of the float32 values; those of the float64 copies are the same.
    assert_close(wk.attention_walk(maps.double(), attention.double(), **options), expected, 1e-7)


@pytest.mark.parametrize("squarings", range(6))
@pytest.mark.parametrize("channels", [1, 4, 70])
def test_every_mixture_of_squares_and_products(wk, assert_close, squarings, channels):
    """Many maps over few tokens square, few over many multiply: the same numbers."""
    for side in (3, 9):
        maps, attention = inputs(1, channels, side, side)
        assert_close(wk.attention_walk(maps, attention, squarings=squarings), dense(maps, attention, 3, squarings))


def test_by_hand(wk):
    # Columns sum to 4 and 4: T = A / 4, whose rows sum to 1: doubly stochastic. S = T = [[.75, .25], [.25, .75]].
    attention = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]])
    maps = torch.tensor([[[[1.0, 0.5]], [[1.0, 0.25]]]])
    once = wk.attention_walk(maps, attention, squarings=0)
    torch.testing.assert_close(once, torch.tensor([[[[0.875, 0.625]], [[0.75, 0.25]]]]))  # 0.25 is outside the box
    twice = wk.attention_walk(maps, attention, squarings=1, box_threshold=None)[0, 0, 0]
    torch.testing.assert_close(twice, torch.tensor([0.8125, 0.6875]))


def test_boxes_by_hand(wk):
    """Diagonal neighbours are one region; a box in another box adds nothing; each region its own box."""
    picture = ["x....x.",
               ".x...x.",
               ".......",
               "xxx...x",
               "x.x....",
               "xxx...x"]  # fmt: skip
    expected = ["xx...x.",
                "xx...x.",
                ".......",
                "xxx...x",
                "xxx....",
                "xxx...x"]  # fmt: skip
    plane = torch.tensor([[float(cell == "x") for cell in row] for row in picture])
    small = 0.01 + plane  # so that what a box lets through shows
    out = wk.attention_walk(small[None, None], torch.eye(42)[None], sinkhorn=0, squarings=0)[0, 0]
    assert torch.equal(out > 0, torch.tensor([[cell == "x" for cell in row] for row in expected]))


@pytest.mark.native
@pytest.mark.parametrize("shape", [(9, 13), (1, 40), (40, 1), (31, 64), (2, 2), (1, 1)])
@pytest.mark.parametrize("density", [0.1, 0.4, 0.6, 0.95])
def test_boxes_of_random_regions(shape, density):
    """Spirals, combs and nests come up by chance: united late, from below and from the right."""
    maps = (rand(1, 40, *shape, seed=int(100 * density)) < density).float() + 0.1
    boxes = torch.empty(maps.shape, dtype=torch.bool)
    _dispatch.native.region_boxes(maps.data_ptr(), boxes.data_ptr(), *maps.shape, 0.5, 2)
    for plane, mask in zip(maps[0].numpy(), boxes[0].numpy(), strict=True):
        assert np.array_equal(mask, boxes_of(plane, 0.5) if plane.max() > 1 else np.ones_like(mask))
    assert torch.equal(boxes, region_boxes(maps, 0.5))


def test_threshold_is_strict(wk):
    maps = torch.tensor([[[[1.0, 0.5, 0.25, 0.5]]]])
    out = wk.attention_walk(maps, torch.eye(4)[None], box_threshold=0.5)
    assert out.flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("rows", [[2], [0, 5, 6], list(range(12))])
@pytest.mark.parametrize("kind", ["rows", "columns", "both"])
def test_tokens_without_attention_are_not_nan(wk, assert_close, rows, kind):
    maps, attention = inputs(1, 2, 3, 4)
    if kind != "columns":
        attention[:, rows] = 0
    if kind != "rows":
        attention[:, :, rows] = 0
    out = wk.attention_walk(maps, attention)
    assert out.isfinite().all()
    assert_close(out, reference.attention_walk(maps.double(), attention.double()))
    if kind == "both" or len(rows) == 12:
        assert out.flatten(2)[..., rows].eq(0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_attention_does_not_matter(wk, assert_close, factor):
    maps, attention = inputs(1, 2, 4, 5)
    assert_close(wk.attention_walk(maps, attention * factor), dense(maps, attention))


@pytest.mark.parametrize("options", [{}, {"squarings": 4}, {"box_threshold": None, "squarings": 2}])
def test_gradient_reaches_the_maps_alone(wk, assert_close, options):
    maps, attention = inputs(2, 3, 5, 6)
    maps, attention = maps.requires_grad_(), attention.requires_grad_()
    weight = rand(2, 3, 5, 6, seed=5)
    (wk.attention_walk(maps, attention, **options) * weight).sum().backward()
    assert attention.grad is None
    exact = maps.detach().double().requires_grad_()
    (reference.attention_walk(exact, attention.double(), **options) * weight).sum().backward()
    assert_close(maps.grad, exact.grad)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (2, 1, 1, 5), (1, 3, 4, 1), (1, 1, 1, 1), (1, 2, 5, 5)])
def test_gradcheck(shape):
    maps, attention = inputs(*shape)
    maps, attention = maps.double().requires_grad_(), attention.double()
    torch.autograd.gradcheck(lambda x: wsss_kernels.attention_walk(x, attention, squarings=2), maps)
    torch.autograd.gradgradcheck(lambda x: wsss_kernels.attention_walk(x, attention), maps)


@pytest.mark.native
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivative_of_the_kernel_is_refused():
    maps, attention = inputs(1, 1, 2, 3)
    maps.requires_grad_()
    first = torch.autograd.grad(wsss_kernels.attention_walk(maps, attention).square().sum(), maps, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_dtypes(wk, assert_close, dtype):
    maps, attention = inputs(1, 2, 6, 7)
    maps, attention = maps.to(dtype), attention.to(dtype)
    out = wk.attention_walk(maps, attention)
    assert out.dtype == dtype
    assert_close(out, reference.attention_walk(maps.double(), attention.double()))


def test_layouts(wk, layout, same):
    maps, attention = inputs(2, 3, 4, 5)
    place = layout(maps)
    assert same(wk.attention_walk(place, attention), wk.attention_walk(place.clone(), attention))
    turned = attention.mT.contiguous().mT
    assert same(wk.attention_walk(maps, turned), wk.attention_walk(maps, attention))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_map_and_image(wk, bad):
    maps, attention = inputs(2, 3, 5, 6)
    clean = wk.attention_walk(maps, attention)
    dirty = maps.clone()
    dirty[0, 1, 2, 3] = bad
    out = wk.attention_walk(dirty, attention)
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, [0, 2]], clean[0, [0, 2]])
    broken = attention.clone()
    broken[0, 3, 4] = bad
    assert torch.equal(wk.attention_walk(maps, broken)[1], clean[1])


def test_map_without_a_positive_value_becomes_zero(wk):
    maps, attention = inputs(1, 3, 3, 3)
    maps[0, 0], maps[0, 1] = 0, -1
    assert wk.attention_walk(maps, attention)[0, :2].eq(0).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 3, 0)])
def test_empty(wk, shape):
    batch, _, height, width = shape
    attention = torch.rand(batch, height * width, height * width)
    assert wk.attention_walk(torch.rand(shape), attention).shape == shape


@pytest.mark.native
def test_threads_and_batch_do_not_change_the_boxes():
    maps = rand(64, 5, 30, 31)
    results = []
    for threads in (1, 2, 3, 7):
        boxes = torch.empty(maps.shape, dtype=torch.bool)
        _dispatch.native.region_boxes(maps.data_ptr(), boxes.data_ptr(), *maps.shape, 0.9, threads)
        results.append(boxes)
    assert all(torch.equal(boxes, results[0]) for boxes in results)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(device, precision):
    maps, attention = (x.to(device) for x in inputs(1, 2, 5, 6))
    expected = wsss_kernels.attention_walk(maps, attention)
    leaf = maps.clone().requires_grad_()
    with torch.autocast(device.type, precision):
        assert torch.equal(wsss_kernels.attention_walk(maps, attention), expected)
        out = wsss_kernels.attention_walk(leaf, attention)
    out.sum().backward()
    assert torch.equal(out.detach(), expected) and leaf.grad.dtype == torch.float32


@pytest.mark.native
@pytest.mark.parametrize("options", [(3, 1, 0.4), (0, 0, None), (1, 3, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(device, options, dtype):
    maps, attention = (x.to(device, dtype) for x in inputs(2, 2, 3, 4))
    ops = torch.ops.wsss_kernels
    torch.library.opcheck(ops.attention_walk.default, (maps.requires_grad_(), attention, *options))
    out, scales, boxes = ops.attention_walk(maps.detach(), attention, *options)
    torch.library.opcheck(
        ops.attention_walk_backward.default, (torch.ones_like(out), attention, scales, boxes, options[1])
    )


@pytest.mark.native
def test_compiles_as_one_graph(device):
    torch._dynamo.reset()

    def op(maps, attention):
        return wsss_kernels.attention_walk(maps * 2, attention) + 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((1, 2, 5, 7), (2, 3, 4, 6), (1, 2, 8, 8)):
        maps, attention = (x.to(device) for x in inputs(*shape))
        leaves = [maps.clone().requires_grad_() for _ in range(2)]
        out, expected = compiled(leaves[0], attention), op(leaves[1], attention)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


MAPS, ATTENTION = inputs(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": MAPS[0]}, ValueError, r"maps must be a floating point tensor \[B, C, h, w\]"),
        ({"maps": MAPS.int()}, TypeError, "maps must be"),
        ({"maps": [1.0]}, TypeError, "maps must be"),
        ({"attention": ATTENTION[0]}, ValueError, r"attention must be a floating point tensor \[B, n, n\]"),
        ({"attention": ATTENTION.long()}, TypeError, "attention must be"),
        ({"attention": ATTENTION[:, 1:, 1:]}, ValueError, r"attention must be \[B, n, n\] = \[1, 12, 12\]"),
        ({"attention": ATTENTION.expand(2, -1, -1)}, ValueError, "attention must be"),
        ({"attention": -ATTENTION}, ValueError, "attention must be >= 0"),
        ({"sinkhorn": -1}, ValueError, "sinkhorn must be a whole number >= 0, got -1"),
        ({"sinkhorn": 1.0}, TypeError, "sinkhorn must be"),
        ({"squarings": -1}, ValueError, "squarings must be"),
        ({"squarings": 17}, ValueError, "squarings must be a whole number in 0..16, got 17"),
        ({"box_threshold": 1.0}, ValueError, "box_threshold must be a number in 0 <= t < 1"),
        ({"box_threshold": -0.1}, ValueError, "box_threshold must be"),
        ({"box_threshold": float("nan")}, ValueError, "box_threshold must be"),
        ({"box_threshold": "0.4"}, TypeError, "box_threshold must be"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"maps": MAPS, "attention": ATTENTION, **change}
    with pytest.raises(error, match=message):
        wsss_kernels.attention_walk(arguments.pop("maps"), arguments.pop("attention"), **arguments)
