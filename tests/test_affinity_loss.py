"""affinity_loss: the published gather form, values by hand, gradients, borders, layouts, odd numbers, refusals."""

import math

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference

SHAPES = [(1, 1, 1), (2, 1, 7), (1, 9, 1), (2, 3, 4), (1, 17, 16), (3, 18, 33), (1, 12, 130), (2, 11, 9)]  # B, H, W
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
OPS = torch.ops.wsss_kernels


def rand(*shape, seed=0, device="cpu"):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def some_labels(batch, height, width, classes=3, seed=1, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch, height, width), generator=generator)
    labels[:, : height // 2, : width // 2] = 0  # so that pairs of background are not rare
    labels[torch.rand(batch, height, width, generator=generator) < ignored] = 255
    return labels


def published(affinity, labels, oracle, radius=5, border="cropped"):
    """The gather form: label pairs [B, K, S], masks, means with 1e-5; float64."""
    height, width = labels.shape[1:]
    k, source, target = oracle.links(height, width, radius, border)
    a = affinity.double().cpu().flatten(2)[:, k, source]
    here, there = labels.long().cpu().flatten(1)[:, source], labels.long().cpu().flatten(1)[:, target]
    valid = (here < 255) & (there < 255)
    background = (here == there) & (here == 0)
    foreground = (here == there) & (here != 0) & valid
    unlike = (here != there) & valid
    near, far = -torch.log(a + 1e-5), -torch.log(1 + 1e-5 - a)
    means = [(pairs * cost).sum() / (pairs.sum().double() + 1e-5)
             for pairs, cost in ((background, near), (foreground, near), (unlike, far))]  # fmt: skip
    return means[0] / 4 + means[1] / 4 + means[2] / 2


def loss_and_gradient(op, x, *args, upstream=1.0, **kwargs):
    leaf = x.clone().requires_grad_()
    loss = op(leaf, *args, **kwargs)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), leaf.grad


# Values


def test_by_hand(wk):
    """Two rows of background, then classes 1 and 2: radius 2 links right, down-left, down, down-right."""
    labels = torch.tensor([[[0, 0], [1, 2]]])
    affinity = torch.full((1, 4, 2, 2), 0.5)
    affinity[0, 0, 0, 0] = 0.25  # (0, 0) - (0, 1): background
    affinity[0, 2, 0, 1] = 0.9  # (0, 1) - (1, 1): unlike
    background = -math.log(0.25 + 1e-5) / (1 + 1e-5)
    unlike = (-math.log(0.1 + 1e-5) - 4 * math.log(0.5 + 1e-5)) / (5 + 1e-5)
    loss = wk.affinity_loss(affinity, labels, radius=2, border="full")
    torch.testing.assert_close(loss.item(), background / 4 + unlike / 2, rtol=1e-6, atol=0)
    labels[0, 1] = 7  # one foreground pair, four unlike ones
    unlike = (-math.log(0.1 + 1e-5) - 3 * math.log(0.5 + 1e-5)) / (4 + 1e-5)
    expected = background / 4 - math.log(0.5 + 1e-5) / (1 + 1e-5) / 4 + unlike / 2
    torch.testing.assert_close(wk.affinity_loss(affinity, labels, radius=2, border="full").item(), expected, rtol=1e-6,
                               atol=0)  # fmt: skip
    assert wk.affinity_loss(affinity, labels, radius=2) == 0  # cropped: 2 columns leave no source


@pytest.mark.parametrize("border", ["full", "cropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_published_form(wk, shape, border, oracle, assert_close, nan_filled):
    batch, height, width = shape
    for radius in (2, 3, 5):
        labels, options = some_labels(*shape), {"radius": radius, "border": border}
        affinity = rand(batch, len(oracle.offsets(radius)), height, width)
        expected = loss_and_gradient(published, affinity.double(), labels, oracle, radius, border)
        for x, op in ((affinity, wk.affinity_loss), (affinity.double(), wk.affinity_loss),
                      (affinity, reference.affinity_loss), (affinity.double(), reference.affinity_loss)):  # fmt: skip
            for result, wanted in zip(loss_and_gradient(op, x, labels, **options), expected, strict=True):
                assert_close(result, wanted, 1e-11 if x.dtype == torch.float64 else None)


@pytest.mark.parametrize("radius", range(1, 17))
def test_every_radius(wk, radius, oracle, assert_close, nan_filled):
    labels = some_labels(1, 21, 37)
    affinity = rand(1, len(oracle.offsets(radius)), 21, 37)
    for border in ("full", "cropped"):
        expected = loss_and_gradient(published, affinity.double(), labels, oracle, radius, border)
        found = loss_and_gradient(wk.affinity_loss, affinity, labels, radius=radius, border=border, upstream=-3.0)
        assert_close(found[0], expected[0])
        assert_close(found[1], -3 * expected[1])


def test_published_number_of_pairs(oracle):
    """Affinity e^-1 - 1e-5 everywhere, labels all 0: every pair costs 1, a quarter of which is the loss."""
    affinity = torch.full((1, 34, 56, 56), math.exp(-1) - 1e-5, dtype=torch.float64)
    loss = wk.affinity_loss(affinity, torch.zeros(1, 56, 56, dtype=torch.uint8))
    pairs = 34 * 52 * 48
    torch.testing.assert_close(loss.item(), pairs / (pairs + 1e-5) / 4, rtol=1e-12, atol=0)


def test_dtypes(dtype, device, oracle, assert_close):
    affinity, labels = rand(2, 34, 17, 18).to(dtype).to(device), some_labels(2, 17, 18).to(device)
    loss, grad = loss_and_gradient(wk.affinity_loss, affinity, labels)
    assert loss.dtype == grad.dtype == dtype and loss.shape == () and loss.device.type == device.type
    expected = loss_and_gradient(published, affinity.double().cpu(), labels.cpu(), oracle)
    assert_close(loss, expected[0], None if dtype != torch.float64 else 1e-11)
    assert_close(grad, expected[1], None if dtype != torch.float64 else 1e-11)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_label_dtypes(wk, dtype):
    affinity, labels = rand(2, 34, 17, 18), some_labels(2, 17, 18)
    labels[labels == 255] = 100
    expected = wk.affinity_loss(affinity, labels, ignore_index=100)
    assert torch.equal(wk.affinity_loss(affinity, labels.to(dtype), ignore_index=100), expected)
    exact = reference.affinity_loss(affinity, labels, ignore_index=100)
    assert torch.equal(reference.affinity_loss(affinity, labels.to(dtype), ignore_index=100), exact)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_affinities_of_zero_and_one_are_exact(wk, end, oracle, assert_close):
    """1 + 1e-5 in float32 would make the cost of a perfect pair 0.1 % wrong."""
    affinity = torch.full((1, 34, 12, 20), end)
    for labels in (torch.zeros(1, 12, 20).long(), torch.arange(20).expand(1, 12, 20)):
        expected = published(affinity, labels, oracle)
        assert_close(wk.affinity_loss(affinity, labels), expected)
        assert_close(wk.affinity_loss(affinity.double(), labels), expected, 1e-10)  # what 1 + 1e-5 - a rounds


def test_affinities_near_the_ends(wk, oracle, assert_close):
    labels = some_labels(1, 20, 21)
    for affinity in (1 - 1e-4 * rand(1, 34, 20, 21), 1e-4 * rand(1, 34, 20, 21)):
        expected = loss_and_gradient(published, affinity.double(), labels, oracle)
        found = loss_and_gradient(wk.affinity_loss, affinity, labels)
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])


# Labels and odd numbers


def test_ignored_labels(wk):
    affinity, labels = rand(1, 34, 20, 21), some_labels(1, 20, 21)
    expected = wk.affinity_loss(affinity, labels)
    for other in (-1, -100, -(2**40), 2**40):
        changed = torch.where(labels == 255, other, labels)
        assert torch.equal(wk.affinity_loss(affinity, changed), expected)  # negative and huge ones are ignored too
        assert torch.equal(wk.affinity_loss(affinity, changed, ignore_index=other), expected)
    used = wk.affinity_loss(affinity, labels, ignore_index=-1)
    assert used != expected  # 255 is then a class as any other
    assert torch.equal(wk.affinity_loss(affinity, torch.where(labels == 255, 77, labels)), used)
    everything = torch.full_like(labels, 255)
    assert wk.affinity_loss(affinity, everything) == 0
    assert wk.affinity_loss(affinity, torch.zeros_like(labels), ignore_index=0) == 0


def test_one_image_changes_nothing_but_counts(wk, oracle, assert_close):
    """The counts are the batch's: not the mean of each image's loss."""
    affinity, labels = rand(2, 34, 17, 18), some_labels(2, 17, 18)
    labels[1] = 0
    both = wk.affinity_loss(affinity, labels)
    assert_close(both, published(affinity, labels, oracle))
    apart = (wk.affinity_loss(affinity[:1], labels[:1]) + wk.affinity_loss(affinity[1:], labels[1:])) / 2
    assert abs(both - apart) > 1e-3


@pytest.mark.parametrize("shape", [(0, 34, 4, 5), (2, 34, 0, 5), (2, 34, 4, 0), (0, 34, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing(wk, shape, dtype):
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    loss, grad = loss_and_gradient(wk.affinity_loss, torch.zeros(shape, dtype=dtype), labels)
    assert loss == 0 and grad.shape == shape


def test_radius_one_has_no_pairs(wk):
    for dtype in (torch.float32, torch.float64):
        loss, grad = loss_and_gradient(
            wk.affinity_loss, torch.zeros(2, 0, 3, 4, dtype=dtype), torch.ones(2, 3, 4).long(), radius=1
        )
        assert loss == 0 and grad.shape == (2, 0, 3, 4)


def test_beyond_the_range_counts_as_the_end(wk, assert_close):
    labels = some_labels(1, 20, 21)
    affinity = 1.6 * rand(1, 34, 20, 21) - 0.3
    found = loss_and_gradient(wk.affinity_loss, affinity, labels)
    expected = loss_and_gradient(reference.affinity_loss, affinity.double(), labels)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert torch.equal(found[0], wk.affinity_loss(affinity.clamp(0, 1), labels))
    outside = (affinity < 0) | (affinity > 1)
    assert found[1][outside].eq(0).all()


def test_nan(wk):
    affinity, labels = rand(2, 34, 20, 21), torch.zeros(2, 20, 21, dtype=torch.long)
    clean, slope = loss_and_gradient(wk.affinity_loss, affinity, labels)
    affinity[0, 0, 19, 5] = math.nan  # no source there
    assert torch.equal(wk.affinity_loss(affinity, labels), clean)
    affinity[0, 7, 8, 9] = math.nan
    loss, grad = loss_and_gradient(wk.affinity_loss, affinity, labels)
    assert loss.isnan() and grad[0, 7, 8, 9].isnan()
    grad[0, 7, 8, 9] = slope[0, 7, 8, 9]
    assert torch.equal(grad, slope)
    labels[0, 8, 9] = 255
    assert wk.affinity_loss(affinity, labels).isfinite()


# Memory, threads, torch's machinery


def test_layouts(wk, layout):
    affinity, labels = layout(rand(2, 34, 11, 13)), some_labels(2, 11, 13)
    plain = affinity.clone(memory_format=torch.contiguous_format).resolve_neg()
    expected = loss_and_gradient(wk.affinity_loss, plain, labels)
    assert torch.equal(wk.affinity_loss(affinity, labels), expected[0])
    wide = torch.full((2, 11, 26), 3)
    wide[..., ::2] = labels
    for view in (wide[..., ::2], labels.mT.contiguous().mT):
        found = loss_and_gradient(wk.affinity_loss, plain, view)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.native
def test_same_bits_for_any_number_of_threads():
    affinity, labels, feats = rand(3, 34, 41, 43), some_labels(3, 41, 43), rand(3, 9, 41, 43)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            found.append((*loss_and_gradient(wk.affinity_loss, affinity, labels),
                          *loss_and_gradient(wk.affinity_loss_from_features, feats, labels)))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_gradcheck():
    for shape, border in (((2, 5, 6), "full"), ((1, 1, 4), "full"), ((1, 4, 7), "cropped"), ((2, 3, 1), "full"),
                          ((1, 6, 9), "cropped")):  # fmt: skip
        affinity = (0.1 + 0.8 * rand(shape[0], 12, *shape[1:])).double().requires_grad_()
        labels = some_labels(*shape)

        def op(x):
            return wk.affinity_loss(x, labels, radius=3, border=border)  # noqa: B023

        assert len(wk.neighbour_offsets(3)) == 12
        assert torch.autograd.gradcheck(op, affinity)
        feats = rand(shape[0], 4, *shape[1:], seed=3).double().requires_grad_()

        def from_features(x):
            return wk.affinity_loss_from_features(x, labels, radius=3, border=border)  # noqa: B023

        assert torch.autograd.gradcheck(from_features, feats)


@pytest.mark.native
@pytest.mark.parametrize("shape", [(2, 7, 9), (1, 1, 1), (1, 5, 30), (3, 12, 10)], ids=str)
def test_opcheck(device, shape):
    labels = some_labels(*shape).to(device)
    affinity = rand(shape[0], 34, *shape[1:], device=device).requires_grad_()
    feats = rand(shape[0], 3, *shape[1:], device=device).requires_grad_()
    torch.library.opcheck(OPS.affinity_loss.default, (affinity, labels, 5, True, 255))
    torch.library.opcheck(OPS.affinity_loss_from_features.default, (feats, labels, 5, False, 1.0, False, 255))
    loss, counts = OPS.affinity_loss(affinity.detach(), labels, 5, True, 255)
    torch.library.opcheck(OPS.affinity_loss_backward.default, (loss, affinity.detach(), labels, counts, 5, True, 255))
    loss, *saved = OPS.affinity_loss_from_features(feats.detach(), labels, 5, False, 1.0, False, 255)
    torch.library.opcheck(OPS.affinity_loss_from_features_backward.default,
                          (loss, feats.detach(), labels, *saved, 5, False, 1.0, False, 255))  # fmt: skip


@pytest.mark.native
def test_compiled_equals_eager(device):
    """No graph break, and the second shape (dynamic) serves all that follow."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def op(feats, labels):
        affinity = wk.local_affinity(feats)
        return wk.affinity_loss(affinity, labels) + 2 * wk.affinity_loss_from_features(feats, labels, scale="auto")

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width in ((1, 9, 11), (2, 20, 13), (3, 7, 17), (2, 16, 30), (4, 12, 12), (1, 31, 18)):
        feats, labels = rand(batch, 4, height, width, device=device), some_labels(batch, height, width).to(device)
        expected, found = loss_and_gradient(op, feats, labels), loss_and_gradient(compiled, feats, labels)
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
    assert counter.frame_count <= 1 + 2
    torch._dynamo.reset()


@pytest.mark.native
def test_no_second_derivative():
    affinity = rand(1, 34, 9, 10).requires_grad_()
    grad = torch.autograd.grad(wk.affinity_loss(affinity, some_labels(1, 9, 10)), affinity, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


# Refusals

GOOD = {"affinity": torch.zeros(1, 34, 4, 5), "labels": torch.zeros(1, 4, 5, dtype=torch.long)}
BAD = [
    ({"affinity": torch.zeros(34, 4, 5)}, ValueError, r"affinity must be .*\[B, K, H, W\].*got .*\[34, 4, 5\]"),
    ({"affinity": torch.zeros(1, 34, 4, 5).long()}, TypeError, "affinity must be .*got .*int64"),
    ({"affinity": torch.zeros(1, 33, 4, 5)}, ValueError, r"affinity must have the 34 neighbours of radius 5.*33"),
    ({"radius": 4}, ValueError, "affinity must have the 22 neighbours of radius 4"),
    ({"radius": 0}, ValueError, "radius must be .*got 0"),
    ({"radius": 5.0}, TypeError, "radius must be .*got 5.0"),
    ({"border": "half"}, ValueError, "border must be one of 'full', 'cropped', got 'half'"),
    ({"labels": torch.zeros(1, 4, 5)}, TypeError, r"labels must be an integer tensor \[B, H, W\], got .*float32"),
    ({"labels": torch.zeros(1, 4, 5).bool()}, TypeError, "labels must be an integer tensor.*bool"),
    ({"labels": [[[0]]]}, TypeError, "labels must be an integer tensor"),
    ({"labels": None}, TypeError, "labels must be an integer tensor.*got None"),
    (
        {"labels": torch.zeros(1, 1, 4, 5).long()},
        ValueError,
        r"labels must be \[B, H, W\] = \[1, 4, 5\].*\[1, 1, 4, 5\]",
    ),
    ({"labels": torch.zeros(1, 5, 4).long()}, ValueError, r"labels must be \[B, H, W\] = \[1, 4, 5\].*\[1, 5, 4\]"),
    ({"labels": torch.zeros(2, 4, 5).long()}, ValueError, r"labels must be \[B, H, W\] = \[1, 4, 5\].*\[2, 4, 5\]"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int.*got 1.0"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int.*got None"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index must be an int.*got 9223372036854775808"),
]


@pytest.mark.parametrize("bad, error, message", BAD)
def test_refusals(bad, error, message):
    with pytest.raises(error, match=message):
        wk.affinity_loss(**GOOD | bad)
    if not set(bad) <= {"labels", "ignore_index"}:
        return
    with pytest.raises(error, match=message):
        wk.affinity_loss_from_features(torch.zeros(1, 3, 4, 5), **{"labels": GOOD["labels"]} | bad)


def test_kernels_are_registered():
    if _dispatch.native is not None:
        kernels = wk.info()["ops"]
        for op in ("affinity_loss", "affinity_loss_from_features"):
            assert kernels[op]["cpu"]["forward"]["kernel"] == kernels[op]["cpu"]["backward"]["kernel"] == "native"
