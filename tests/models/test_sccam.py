"""SC-CAM: its loss and sub-categories by hand, the map of each head, settings."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("lightning_fabric")
from wsss_models import sccam
from wsss_models.backbones import load_model
from wsss_models.infer import merged_cams
from wsss_models.networks.resnet38 import ResNet38
from wsss_models.systems import preset, with_settings

SMALL = ("num_classes=3", "clusters=2", "width=8")

pytestmark = pytest.mark.usefixtures("one_thread")


def small(*settings):
    torch.manual_seed(0)
    return sccam.Model(with_settings(preset("sccam", "tiny"), [*SMALL, *settings]))


def cross_entropy(scores, labels):
    """Multi-label soft margin, a number at a time."""
    costs = []
    for x, y in zip(scores.flatten().tolist(), labels.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        costs.append(-(y * math.log(p) + (1 - y) * math.log(1 - p)))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("weight", [5.0, 0.0, 0.5])
def test_loss_and_its_gradient(weight):
    model = small(f"sub_weight={weight}").double().eval()
    g = torch.Generator().manual_seed(1)
    batch = {
        "image": torch.randn(2, 3, 33, 40, generator=g, dtype=torch.float64),
        "label": torch.tensor([[1.0, 0, 1], [0, 1, 0]], dtype=torch.float64),
        "sublabel": torch.tensor([[0, 1.0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.float64),
    }
    feats = model.backbone.features(batch["image"])[-1].detach().mean(dim=(2, 3))
    parent = feats @ model.fc8_20.weight.detach()[:, :, 0, 0].T
    sub = feats @ model.fc8_200.weight.detach()[:, :, 0, 0].T
    loss = model.loss(batch)
    assert set(loss) == {"total", "parent", "sub"}
    expected = cross_entropy(parent, batch["label"]), cross_entropy(sub, batch["sublabel"])
    assert loss["parent"].item() == pytest.approx(expected[0], rel=1e-12)
    assert loss["sub"].item() == pytest.approx(expected[1], rel=1e-12)
    assert loss["total"].item() == pytest.approx(expected[0] + weight * expected[1], rel=1e-12)
    loss["total"].backward()
    for head, scores, labels, share in (
        (model.fc8_20, parent, batch["label"], 1.0),
        (model.fc8_200, sub, batch["sublabel"], weight),
    ):
        gradient = share * ((1 / (1 + torch.exp(-scores)) - labels) / labels.numel()).T @ feats
        torch.testing.assert_close(head.weight.grad[:, :, 0, 0], gradient)
    with pytest.raises(ValueError, match=r"sublabel must be \[B, C \* K\] = \[2, 6\], got \[2, 4\]"):
        model.loss({**batch, "sublabel": batch["sublabel"][:, :4]})
    with pytest.raises(KeyError, match="sublabel is missing"):
        model.loss({name: batch[name] for name in ("image", "label")})


def test_dropout_is_of_whole_channels():
    model = small("dropout=0.5", "norm=frozen").train()
    batch = {"image": torch.randn(2, 3, 32, 32), "label": torch.zeros(2, 3), "sublabel": torch.zeros(2, 6)}
    losses = {model.loss(batch)["sub"].item() for _ in range(4)}
    assert len(losses) == 4
    assert len({model.eval().loss(batch)["sub"].item() for _ in range(2)}) == 1


def blobs(counts, dim=5, seed=0):
    """Rows around far-apart centers, and the number of each row's center, shuffled."""
    rng = np.random.default_rng(seed)
    centers = 50 * np.eye(len(counts), dim)
    numbers = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return torch.from_numpy(centers[numbers] + rng.normal(0, 0.1, (len(numbers), dim))).float(), numbers


def test_sub_categories_of_separable_features(monkeypatch):
    """Each class's clusters are the blobs among its own pictures; those of other classes do not count."""
    features, blob = blobs([7, 4, 9, 5])
    labels = torch.zeros(25, 3)
    labels[:, 0] = 1
    labels[blob >= 2, 2] = 1  # class 1 is in no picture
    calls = []
    kmeans = sccam.wk.kmeans
    monkeypatch.setattr(sccam.wk, "kmeans", lambda *a, **options: calls.append(options) or kmeans(*a, **options))
    found = sccam.sub_categories(features, labels, 4, starts=3, iterations=50)
    assert calls == [{"n_init": 3, "iterations": 50, "seed": 0}]  # one call for all classes
    assigned = found.assigned.numpy()
    for i, j in combinations(range(25), 2):
        assert (assigned[i, 0] == assigned[j, 0]) == (blob[i] == blob[j])
    assert set(assigned[:, 0]) == {0, 1, 2, 3}
    assert (assigned[:, 1] == -1).all()
    assert ((assigned[:, 2] == -1) == (blob < 2)).all()
    found_two = sccam.sub_categories(features, labels, 2).assigned.numpy()
    assert len(set(found_two[blob == 2, 2])) == len(set(found_two[blob == 3, 2])) == 1
    assert set(found_two[blob >= 2, 2]) == {0, 1}
    for c in (0, 2):
        for k in range(4):
            rows = features[assigned[:, c] == k].double()
            expected = (rows - rows.mean(dim=0)).square().sum(dim=1).sqrt()
            torch.testing.assert_close(found.distances[assigned[:, c] == k, c].double(), expected, rtol=1e-4, atol=1e-4)
    assert (found.distances[assigned == -1] == 0).all()


def test_sub_categories_do_not_depend_on_the_order_of_the_pictures():
    features, _ = blobs([6, 5, 8], seed=3)
    labels = (torch.rand(19, 2, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    first = sccam.sub_categories(features, labels, 3).assigned[order]
    second = sccam.sub_categories(features[order], labels[order], 3).assigned
    for c in range(2):
        pairs = set(zip(first[:, c].tolist(), second[:, c].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # but for their numbers


def test_fewer_pictures_than_sub_categories():
    features, _ = blobs([1, 1, 1])
    labels = torch.tensor([[1.0, 1], [1, 0], [1, 0]])
    assigned = sccam.sub_categories(features, labels, 10).assigned
    assert sorted(assigned[:, 0].tolist()) == [0, 1, 2]  # a sub-category a picture, the other seven in none
    assert assigned[:, 1].tolist() == [0, -1, -1]
    same = sccam.sub_categories(torch.ones(4, 3), torch.ones(4, 1), 3).assigned
    assert len(set(same[:, 0].tolist())) == 1  # pictures that do not differ are not told apart
    nothing = sccam.sub_categories(features, torch.zeros(3, 2), 4)
    assert (nothing.assigned == -1).all() and nothing.assigned.shape == (3, 2)
    with pytest.raises(ValueError, match=r"features and labels must be \[N, D\] and \[N, C\]"):
        sccam.sub_categories(features, labels[:2], 2)
    with pytest.raises(ValueError, match="finite"):
        sccam.sub_categories(features * math.nan, labels, 2)


def test_sub_labels_by_hand():
    assigned = torch.tensor([[2, -1], [0, 1], [-1, -1]])
    assert sccam.sub_labels(assigned, 3).tolist() == [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert sccam.sub_labels(assigned, 4).shape == (3, 8)


def test_maps_of_the_heads():
    """Of the sub-categories: the published order, joint peak first, then the highest of a class."""
    model = small().eval()
    images = torch.randn(1, 3, 40, 48)
    other = small("cam=sub").eval()
    with torch.no_grad():
        feats = model.backbone.features(images)[-1]
        plain = torch.einsum("bdhw,cd->bchw", feats, model.fc8_20.weight[:, :, 0, 0]).clamp_min(0)
        sub = torch.einsum("bdhw,cd->bchw", feats, model.fc8_200.weight[:, :, 0, 0]).clamp_min(0)
        torch.testing.assert_close(model.cams(images), plain, rtol=1e-4, atol=1e-4)
        expected = torch.stack([sub[:, 2 * c : 2 * c + 2].amax(dim=1) for c in range(3)], dim=1)
        torch.testing.assert_close(other.cams(images), expected, rtol=1e-4, atol=1e-4)
        pyramid = [images, torch.nn.functional.interpolate(images, (24, 20))]
        merged = merged_cams(other.view_maps, pyramid, (40, 48), join=other.join)
        total = 0
        for level in pyramid:
            both = other.view_maps(level) + other.view_maps(level.flip(3)).flip(3)
            total = total + torch.nn.functional.interpolate(both, (10, 12), mode="bilinear")
    for c in range(3):
        published = total[0, 2 * c : 2 * c + 2]
        published = (published / (published.max() + 1e-5)).amax(dim=0)
        torch.testing.assert_close(merged[0, c], published, rtol=1e-4, atol=1e-5)


def test_settings():
    config = preset("sccam")
    recipe = config.recipe
    assert (config.clusters, config.sub_weight, config.rounds) == (10, 5.0, 3)
    assert (config.starts, config.iterations) == (10, 300)
    assert (recipe.epochs, recipe.lr, recipe.crop, recipe.batch_size, recipe.momentum) == (61, 0.01, 224, 16, 5e-4)
    assert (recipe.lr_multiples, recipe.weight_decay, recipe.decay_biases) == ((1, 2, 10, 20), 5e-4, False)
    assert [replace(config, round=r).last_epoch for r in (1, 2, 3, 4)] == [30, 40, 50, 50]
    assert with_settings(config, ["epochs=35", "round=2"]).last_epoch == 35
    tiny, plain = preset("sccam", "tiny"), preset("classifier", "tiny")
    assert tiny.last_epoch == plain.recipe.epochs and tiny.recipe == plain.recipe
    for name in ("backbone", "width", "strides", "norm"):
        assert getattr(tiny, name) == getattr(plain, name)
    assert tiny.dropout == config.dropout == 0.5
    for text, message in (
        ("clusters=0", "clusters must be at least 1"),
        ("rounds=-1", "rounds must be at least 0"),
        ("sub_weight=-1", "sub_weight must be at least 0"),
        ("cam=both", "cam must be one of parent, sub"),
        ("round_epochs=(0,)", "round_epochs must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_settings(tiny, [text])


def test_published_weights_of_another_head_are_left_out():
    """A file of ResNet-38 as published: the backbone's names bare, heads beside them."""
    weights = dict.fromkeys(("fc8.weight", "fc8_20.weight", "fc8_200.weight"), torch.zeros(1))
    assert all(name.startswith(ResNet38.classifier_names) for name in weights)
    model = small()
    state = {f"backbone.{name}": t for name, t in model.backbone.state_dict().items()}
    head = torch.full_like(model.fc8_20.weight, 7.0)
    given = {**state, "fc8_20.weight": head, "fc8_200.weight": torch.zeros(1)}
    assert load_model(model, given, source="x") == ["fc8_200.weight"]
    assert (model.fc8_20.weight == 7).all()
