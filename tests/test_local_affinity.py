"""local_affinity: values by hand, against float64, gradients, borders, layouts, odd numbers, refusals."""

import itertools
import math

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference

NATIVE = _dispatch.native is not None

VARIANTS = [("l1", 1.0), ("l1", 0.2), ("l1", "auto"), ("cosine", 1.0), ("cosine", "auto")]
SHAPES = [  # B, D, H, W
    (1, 1, 1, 1), (2, 3, 1, 7), (1, 2, 9, 1), (2, 5, 3, 4), (1, 33, 17, 16), (1, 8, 18, 130), (1, 2, 6, 257),
    (3, 4, 5, 15),
]  # fmt: skip


def rand(*shape, seed=0, device="cpu"):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(device)


# Values


def test_two_pixels_by_hand(device):
    feats = torch.tensor([[[[0.0, 1.0]], [[2.0, 5.0]]]], device=device)  # differences 1 and 3, mean 2
    affinity = wk.local_affinity(feats, 2)
    assert affinity.shape == (1, 4, 1, 2)
    right = affinity[0, 0, 0].cpu()  # neighbour 0 is (0, +1)
    torch.testing.assert_close(right, torch.tensor([math.exp(-2), 0.0]))
    assert affinity[0, 1:].abs().sum() == 0  # no row below
    torch.testing.assert_close(wk.local_affinity(feats, 2, scale=4.0)[0, 0, 0, 0].item(), math.exp(-0.5))
    torch.testing.assert_close(wk.local_affinity(feats, 2, scale="auto")[0, 0, 0, 0].item(), math.exp(-1))


def test_cosine_by_hand(device):
    feats = torch.tensor([[[[3.0, 4.0, 0.0, -4.0]], [[4.0, 3.0, 0.0, -3.0]]]], device=device)
    affinity = wk.local_affinity(feats, 4, metric="cosine")[0, :3, 0].cpu()  # neighbours +1, +2, +3 columns
    torch.testing.assert_close(affinity[0], torch.tensor([24 / 25, 0.0, 0.0, 0.0]))  # then a zero vector twice
    torch.testing.assert_close(affinity[1], torch.tensor([0.0, 0.0, 0.0, 0.0]))  # -1 is cut to 0
    torch.testing.assert_close(affinity[2], torch.tensor([0.0, 0.0, 0.0, 0.0]))


def test_automatic_cosine_by_hand(device):
    feats = torch.tensor([[[[3.0, 4.0, -4.0]], [[4.0, 3.0, -3.0]]]], device=device)
    # distances 1 - 24/25, 1 + 1 to the right, 1 + 24/25 two to the right: mean (0.04 + 2 + 1.96) / 3 = 4/3
    affinity = wk.local_affinity(feats, 3, metric="cosine", scale="auto")[0, :2, 0].cpu()
    expected = [[math.exp(-0.03), math.exp(-1.5), 0.0], [math.exp(-1.47), 0.0, 0.0]]
    torch.testing.assert_close(affinity, torch.tensor(expected))


def test_vertical_and_diagonal_by_hand(device):
    feats = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]]], device=device)
    affinity = wk.local_affinity(feats, 2)[0].cpu()  # (0, 1), (1, -1), (1, 0), (1, 1)
    d = torch.tensor([[[1.0, math.inf], [4.0, math.inf]], [[math.inf, 2.0], [math.inf] * 2],
                      [[3.0, 6.0], [math.inf] * 2], [[7.0, math.inf], [math.inf] * 2]])  # fmt: skip
    torch.testing.assert_close(affinity, torch.exp(-d))


@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize("border", ["full", "cropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(wk, shape, border, metric, scale, oracle, assert_close, nan_filled):
    for radius in (2, 5):
        feats = rand(*shape)
        expected = oracle.affinity(feats, radius, metric, scale, border)
        options = {"metric": metric, "scale": scale, "border": border}
        assert_close(wk.local_affinity(feats, radius, **options), expected)
        assert_close(wk.local_affinity(feats.double(), radius, **options), expected)
        assert_close(reference.local_affinity(feats, radius, **options), expected)


@pytest.mark.parametrize("radius", range(1, 17))
def test_every_radius(wk, radius, oracle, assert_close, nan_filled):
    feats = rand(1, 3, 19, 37)
    for metric, scale in VARIANTS:
        out = wk.local_affinity(feats, radius, metric=metric, scale=scale, border="cropped")
        assert_close(out, oracle.affinity(feats, radius, metric, scale, "cropped"))


@pytest.mark.parametrize("metric, scale", VARIANTS)
def test_dtypes(dtype, device, metric, scale, oracle, assert_close):
    feats = rand(2, 20, 11, 18).to(dtype).to(device)
    out = wk.local_affinity(feats, metric=metric, scale=scale)
    assert out.dtype == dtype and out.device.type == device.type and out.is_contiguous()
    assert_close(out, oracle.affinity(feats.cpu(), 5, metric, scale))


def test_many_channels(wk, oracle, assert_close):
    feats = rand(1, 448, 20, 21)
    for metric, scale in VARIANTS:
        assert_close(wk.local_affinity(feats, metric=metric, scale=scale), oracle.affinity(feats, 5, metric, scale))


def test_published_pairs_on_56x56(wk):
    """AffinityNet never builds pairs from the last 4 rows and the 4 columns on either side."""
    affinity = wk.local_affinity(torch.zeros(1, 1, 56, 56), border="cropped")[0]
    assert affinity.sum() == 34 * 52 * 48
    degree = affinity.sum(0)
    for k, (dy, dx) in enumerate(wk.neighbour_offsets()):
        degree += torch.roll(affinity[k], (dy, dx), (0, 1))  # no pair leads outside, so nothing wraps
    assert degree[20:30, 20:30].eq(68).all()
    isolated = (degree == 0).nonzero().tolist()
    assert len(isolated) == 10
    assert isolated[:4] == [[0, x] for x in range(4)]
    assert [y for y, _ in isolated[4:]] == [54, 54, 55, 55, 55, 55]
    assert degree[28, 0] == 2 and degree[55, 28] == 5


# Odd numbers


@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 1, 0, 0)],
    ids=str,
)  # fmt: skip
def test_nothing_in_nothing_out(wk, shape, metric, scale):
    feats = torch.zeros(shape, requires_grad=True)
    out = wk.local_affinity(feats, metric=metric, scale=scale)
    assert out.shape == (shape[0], 34, *shape[2:])
    out.sum().backward()
    assert feats.grad.shape == shape


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64],
)  # fmt: skip
def test_radius_one_can_be_differentiated(wk, dtype):
    feats = rand(2, 3, 4, 5).to(dtype).requires_grad_()
    assert torch.autograd.grad(wk.local_affinity(feats, 1).sum(), feats)[0].eq(0).all()


def test_radius_one_has_no_neighbours(wk):
    feats = rand(2, 3, 4, 5).requires_grad_()
    for metric, scale in VARIANTS:
        out = wk.local_affinity(feats, 1, metric=metric, scale=scale)
        assert out.shape == (2, 0, 4, 5)
    (out.sum() + feats.sum()).backward()
    assert feats.grad.eq(1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2), (4, 15)])
def test_radius_larger_than_the_map(wk, size, oracle, assert_close, nan_filled):
    feats = rand(2, 3, *size)
    for metric, scale in VARIANTS:
        for border in ("full", "cropped"):
            out = wk.local_affinity(feats, 16, metric=metric, scale=scale, border=border)
            assert_close(out, oracle.affinity(feats, 16, metric, scale, border))


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_image_without_differences_has_scale_one(wk, metric, dtype, oracle):
    feats = torch.full((2, 3, 6, 7), 0.7, dtype=dtype)
    feats[1] = 0
    affinity = wk.local_affinity(feats, metric=metric, scale="auto")
    expected = oracle.affinity(feats, metric=metric, scale="auto")
    assert (affinity.double() - expected).abs().max() < 1e-2 if metric == "l1" else affinity.isfinite().all()
    if metric == "l1":
        assert torch.equal(affinity > 0, expected > 0)


def collinear(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(1, 1, 8, 8, generator=generator) + 0.5) * torch.rand(1, dim, 1, 1, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_automatic_cosine_of_collinear_features(wk, dtype, oracle):
    """One direction, other lengths: every true distance is 0, so every affinity is 1."""
    inside = oracle.affinity(torch.zeros(1, 1, 8, 8)) > 0
    for dim, seed in itertools.product((1, 2, 3, 5, 16), range(4)):
        affinity = wk.local_affinity(collinear(dim, seed).to(dtype), metric="cosine", scale="auto")
        assert (affinity[inside] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("metric, scale", VARIANTS[:4])
def test_range(wk, metric, scale, dtype, scenes):
    feats = scenes.features(2, 16, 20, 33).to(dtype)
    affinity = wk.local_affinity(feats, metric=metric, scale=scale)
    assert affinity.min() >= 0 and affinity.max() <= 1 + 2e-7


def test_cosine_is_at_most_one(wk):
    assert max(wk.local_affinity(collinear(d, 0), metric="cosine").max().item() for d in range(1, 40)) <= 1


def test_half_precision_extremes(wk):
    feats = 6e4 * rand(1, 64, 9, 17).sign().half()
    for metric, scale in VARIANTS:
        leaf = feats.clone().requires_grad_()
        affinity = wk.local_affinity(leaf, metric=metric, scale=scale)
        affinity.float().sum().backward()
        assert affinity.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_any_unit(wk, size, oracle, assert_close):
    feats = rand(1, 4, 9, 17)
    assert_close(wk.local_affinity(feats * size, scale="auto"), oracle.affinity(feats, scale="auto"))
    assert_close(wk.local_affinity(feats * size, metric="cosine"), oracle.affinity(feats, metric="cosine"))
    assert_close(wk.local_affinity(feats * size, scale=0.3 * size), oracle.affinity(feats, scale=0.3))


@pytest.mark.parametrize(
    "scale",
    [1e300, 1e30, 1e-30, 1e-42, 1e-300],
)
def test_extreme_scale(wk, scale, oracle):
    feats = rand(1, 4, 5, 6)
    feats[..., 2:4] = feats[..., :1]  # some distances are 0: exp(-0 / scale) = 1
    assert torch.equal(wk.local_affinity(feats, scale=scale), oracle.affinity(feats, scale=scale).float())


@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_image(wk, metric, scale, poison):
    feats = rand(3, 9, 20, 33)
    clean = wk.local_affinity(feats, metric=metric, scale=scale)
    feats[1, 4, 10, 16] = poison
    feats.requires_grad_()
    out = wk.local_affinity(feats, metric=metric, scale=scale)
    assert torch.equal(out[::2], clean[::2])
    if scale != "auto":
        near = torch.zeros(20, 33, dtype=torch.bool)
        near[6:15, 12:21] = True
        assert torch.equal(out[1][:, ~near], clean[1][:, ~near])
        if math.isnan(poison):
            assert out[1, :, 10, 16].isnan().all()
    grad = torch.autograd.grad(out.nan_to_num().sum(), feats)[0]
    other = feats.detach().clone()
    other[1] = 0
    other.requires_grad_()
    expected = torch.autograd.grad(wk.local_affinity(other, metric=metric, scale=scale).sum(), other)[0]
    assert torch.equal(grad[::2], expected[::2])


# Memory


@pytest.mark.parametrize("metric, scale", VARIANTS)
def test_layouts(device, layout, metric, scale):
    feats = layout(rand(2, 6, 11, 13, device=device))
    expected = wk.local_affinity(
        feats.clone(memory_format=torch.contiguous_format).resolve_neg(), metric=metric, scale=scale
    )
    out = wk.local_affinity(feats, metric=metric, scale=scale)
    assert out.is_contiguous()
    assert torch.equal(out, expected) if NATIVE else torch.allclose(out, expected, atol=1e-6)


def test_layout_of_grad(device, layout, assert_close):
    feats = rand(2, 6, 11, 13, device=device).requires_grad_()
    upstream = layout(rand(2, 34, 11, 13, device=device))
    out = wk.local_affinity(feats)
    grad = torch.autograd.grad(out, feats, upstream, retain_graph=True)[0]
    same = torch.autograd.grad(out, feats, upstream.clone(memory_format=torch.contiguous_format).resolve_neg())[0]
    assert torch.equal(grad, same) if NATIVE else torch.allclose(grad, same, atol=1e-6)


def test_inputs_are_left_alone(device):
    feats = rand(2, 6, 11, 13, device=device).requires_grad_()
    before = feats.detach().clone()
    out = wk.local_affinity(feats, scale="auto")
    kept = out.detach().clone()
    out.sum().backward()
    assert torch.equal(feats, before) and torch.equal(out, kept)


# Gradients


def gradient(op, feats, upstream, *args, **kwargs):
    leaf = feats.clone().requires_grad_()
    op(leaf, *args, **kwargs).backward(upstream.to(feats.dtype))
    return leaf.grad


@pytest.mark.parametrize("metric, scale", VARIANTS)
@pytest.mark.parametrize("border", ["full", "cropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(wk, shape, border, metric, scale, oracle, assert_close, nan_filled):
    feats, options = rand(*shape), {"metric": metric, "scale": scale, "border": border}
    upstream = rand(shape[0], 34, *shape[2:], seed=1)
    expected = gradient(oracle.affinity, feats.double(), upstream, 5, metric, scale, border)
    assert_close(gradient(wk.local_affinity, feats, upstream, **options), expected)
    assert_close(gradient(reference.local_affinity, feats.double(), upstream, **options), expected, 1e-11)


@pytest.mark.parametrize("radius", range(2, 17))
def test_gradient_of_every_radius(wk, radius, oracle, assert_close, nan_filled):
    feats = rand(1, 9, 18, 35)
    upstream = rand(1, len(wk.neighbour_offsets(radius)), 18, 35, seed=1)
    for metric, scale in VARIANTS:
        expected = gradient(oracle.affinity, feats.double(), upstream, radius, metric, scale)
        assert_close(gradient(wk.local_affinity, feats, upstream, radius, metric=metric, scale=scale), expected)


def test_gradient_dtypes(wk, dtype, assert_close, oracle):
    feats, upstream = rand(1, 20, 11, 18).to(dtype), rand(1, 34, 11, 18, seed=1).to(dtype)
    for metric, scale in VARIANTS:
        grad = gradient(wk.local_affinity, feats, upstream, metric=metric, scale=scale)
        assert grad.dtype == dtype
        expected = gradient(oracle.affinity, feats.double(), upstream, 5, metric, scale)
        assert_close(grad, expected, None if dtype != torch.float64 else 1e-11)


def test_gradient_of_ties_is_zero(wk):
    feats = torch.full((1, 3, 6, 7), 0.3, requires_grad=True)
    for scale in (1.0, "auto"):
        grad = torch.autograd.grad(wk.local_affinity(feats, scale=scale).sum(), feats)[0]
        assert grad.eq(0).all()
    half = torch.tensor([[[[0.2, 0.2]], [[0.0, 1.0]]]], requires_grad=True)  # a tie in one channel only
    grad = torch.autograd.grad(wk.local_affinity(half).sum(), half)[0]
    assert grad[0, 0].eq(0).all()
    torch.testing.assert_close(grad[0, 1, 0], torch.tensor([1.0, -1.0]) * math.exp(-0.5) / 2)


@pytest.mark.native
@pytest.mark.parametrize(
    "pixels", [((1.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (0.0, 0.0))], ids=["orthogonal", "zero vector"]
)
def test_kernel_and_reference_agree_where_the_cosine_is_zero(wk, pixels):
    feats, upstream = torch.tensor(pixels).T.reshape(1, 2, 1, 2), torch.ones(1, 34, 1, 2)
    native = gradient(wk.local_affinity, feats, upstream, metric="cosine")
    assert torch.equal(native, gradient(reference.local_affinity, feats, upstream, metric="cosine"))


def test_zero_upstream_gradient(wk):
    feats = rand(2, 3, 9, 17)
    for metric, scale in VARIANTS:
        assert gradient(wk.local_affinity, feats, torch.zeros(2, 34, 9, 17), metric=metric, scale=scale).eq(0).all()


def test_automatic_scale_is_a_constant_for_the_gradient(wk, assert_close):
    feats, upstream = rand(1, 5, 9, 17), rand(1, 34, 9, 17, seed=1)
    some = wk.local_affinity(feats.double(), scale="auto")[0, 0, 4, 8]
    scale = -(feats[0, :, 4, 8] - feats[0, :, 4, 9]).double().abs().mean().item() / some.log().item()
    grad = gradient(wk.local_affinity, feats, upstream, scale="auto")
    assert_close(grad, gradient(wk.local_affinity, feats.double(), upstream, scale=scale))


@pytest.mark.parametrize("metric, scale", [("l1", 0.7), ("cosine", 1.0)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 2, 1, 3), (1, 3, 4, 1), (1, 2, 3, 3), (2, 1, 2, 4)], ids=str)
def test_gradcheck(shape, metric, scale):
    feats = (rand(*shape) * 3).double().requires_grad_()
    if metric == "cosine" and shape[1] == 1:
        pytest.skip("the cosine of numbers is a step")

    def op(x):
        return wk.local_affinity(x, 3, metric=metric, scale=scale)

    assert torch.autograd.gradcheck(op, feats, atol=1e-7)
    assert torch.autograd.gradgradcheck(op, feats, atol=1e-7)


# Refusals

BAD = [
    ({"feats": torch.zeros(3, 4, 5)}, ValueError, r"feats must be .*\[B, D, H, W\].*got .*\[3, 4, 5\]"),
    ({"feats": torch.zeros(1, 1, 3, 4, 5)}, ValueError, r"feats must be .*got .*\[1, 1, 3, 4, 5\]"),
    ({"feats": torch.zeros(1, 3, 4, 5, dtype=torch.int64)}, TypeError, r"feats must be .*got .*int64"),
    ({"feats": torch.zeros(1, 3, 4, 5, dtype=torch.bool)}, TypeError, r"feats must be .*got .*bool"),
    ({"feats": torch.zeros(1, 3, 4, 5, dtype=torch.complex64)}, TypeError, r"feats must be .*got .*complex64"),
    ({"feats": torch.zeros(1, 0, 4, 5)}, ValueError, r"feats must have at least one channel.*got .*\[1, 0, 4, 5\]"),
    ({"feats": [[1.0]]}, TypeError, r"feats must be .*got \[\[1.0\]\]"),
    ({"feats": None}, TypeError, "feats must be .*got None"),
    ({"radius": 0}, ValueError, "radius must be .*got 0"),
    ({"radius": 17}, ValueError, "radius must be .*got 17"),
    ({"radius": 5.0}, TypeError, "radius must be .*got 5.0"),
    ({"radius": "5"}, TypeError, "radius must be .*got '5'"),
    ({"metric": "l2"}, ValueError, "metric must be one of 'l1', 'cosine', got 'l2'"),
    ({"metric": 1}, TypeError, "metric must be .*got 1"),
    ({"border": "half"}, ValueError, "border must be one of 'full', 'cropped', got 'half'"),
    ({"border": None}, TypeError, "border must be .*got None"),
    ({"scale": 0}, ValueError, "scale must be .*> 0.*got 0"),
    ({"scale": -1.0}, ValueError, "scale must be .*got -1.0"),
    ({"scale": math.nan}, ValueError, "scale must be .*got nan"),
    ({"scale": math.inf}, ValueError, "scale must be .*got inf"),
    ({"scale": 10**400}, ValueError, "scale must be .*got 1000"),
    ({"scale": "automatic"}, ValueError, "scale must be one of 'auto', got 'automatic'"),
    ({"scale": None}, TypeError, "scale must be .*got None"),
    ({"scale": True}, TypeError, "scale must be .*got True"),
    ({"scale": torch.tensor(1.0)}, TypeError, "scale must be .*got a torch.float32 tensor"),
]


@pytest.mark.parametrize("bad, error, message", BAD)
def test_refusals(bad, error, message):
    with pytest.raises(error, match=message):
        wk.local_affinity(**{"feats": torch.zeros(1, 3, 4, 5)} | bad)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        wk.local_affinity(torch.zeros(1, 3, 4, 5), 5, "l1")
