"""affinity_loss_from_features: the published form of the features' affinity, half types, empty maps, refusals."""

import pytest
import torch

import wsss_kernels as wk
from tests.test_affinity_loss import GOOD, loss_and_gradient, published, rand, some_labels
from wsss_kernels import reference


@pytest.mark.parametrize("metric, scale", [("l1", 1.0), ("l1", 0.2), ("l1", "auto"), ("cosine", 1.0)])
@pytest.mark.parametrize("border", ["full", "cropped"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 7), (1, 8, 18, 130), (3, 5, 17, 16), (2, 33, 12, 20)], ids=str)
def test_from_features(wk, shape, border, metric, scale, oracle, assert_close, nan_filled):
    feats, labels = rand(*shape) * 2 - 1, some_labels(shape[0], *shape[2:])
    options = {"metric": metric, "scale": scale, "border": border}

    def expected_loss(x):
        return published(oracle.affinity(x, 5, metric, scale, border), labels, oracle, border=border)

    expected = loss_and_gradient(expected_loss, feats.double(), upstream=2.0)
    for op, x in ((wk.affinity_loss_from_features, feats), (wk.affinity_loss_from_features, feats.double()),
                  (reference.affinity_loss_from_features, feats.double())):  # fmt: skip
        loss, grad = loss_and_gradient(op, x, labels, upstream=2.0, **options)
        # The slope 1 / (a + 1e-5) of a cosine near 0 multiplies its rounding by up to 1e5.
        tol = 1e-9 if x.dtype == torch.float64 else 2e-3 if metric == "cosine" else None
        assert_close(loss, expected[0], 1e-9 if x.dtype == torch.float64 else None)
        assert_close(grad, expected[1], tol)


@pytest.mark.native
def test_from_features_is_the_two_ops(device):
    feats, labels = rand(2, 7, 19, 23, device=device), some_labels(2, 19, 23).to(device)

    def composed(x):
        return wk.affinity_loss(wk.local_affinity(x, border="cropped"), labels)

    expected, found = (
        loss_and_gradient(composed, feats),
        loss_and_gradient(wk.affinity_loss_from_features, feats, labels),
    )
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_half_features(wk, dtype, assert_close):
    feats, labels = (2 * rand(2, 20, 17, 18)).to(dtype), some_labels(2, 17, 18)
    loss, grad = loss_and_gradient(wk.affinity_loss_from_features, feats, labels)
    assert loss.dtype == grad.dtype == dtype
    expected = loss_and_gradient(reference.affinity_loss_from_features, feats.double(), labels)
    assert_close(loss, expected[0])
    assert_close(grad, expected[1])


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (2, 3, 0, 5), (1, 1, 4, 0)], ids=str)
def test_nothing_from_features(wk, shape):
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    loss, grad = loss_and_gradient(wk.affinity_loss_from_features, torch.zeros(shape), labels)
    assert loss == 0 and grad.shape == shape


def test_descent_pulls_alike_pixels_together():
    labels = some_labels(1, 16, 16, ignored=0)
    feats = rand(1, 6, 16, 16).requires_grad_()
    losses = []
    for _ in range(15):
        loss = wk.affinity_loss_from_features(feats, labels)
        losses.append(loss.item())
        feats.data -= 20 * torch.autograd.grad(loss, feats)[0]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "bad, error",
    [
        ({"feats": torch.zeros(1, 0, 4, 5)}, ValueError),
        ({"scale": 0}, ValueError),
        ({"metric": "l2"}, ValueError),
        ({"border": 1}, TypeError),
        ({"radius": 17}, ValueError),
    ],
)
def test_refusals_from_features(bad, error):
    with pytest.raises(error, match=f"{next(iter(bad))} must"):
        wk.affinity_loss_from_features(**{"feats": torch.zeros(1, 3, 4, 5), "labels": GOOD["labels"]} | bad)
