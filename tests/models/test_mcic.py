"""MCIC: seeds, ramp, scores and every loss term against values worked out by other means, settings, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
from wsss_models import mcic
from wsss_models.backbones import build_backbone, load_model
from wsss_models.systems import preset

import wsss_kernels as wk
from tests.models.mcic_by_hand import (
    IGNORE,
    a_batch,
    expected_attention,
    expected_entropy,
    expected_seeds,
    filled,
    small,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("saliency", [False, True])
@pytest.mark.parametrize(("share", "weight"), [(0.1, 1.0), (1.0, 1.0), (1.0, 0.25)])
def test_loss_terms(saliency, share, weight):
    model = small(entropy=True, warm_up=0.5, segmentation_weight=weight).eval()
    batch = a_batch(saliency=saliency)
    config, label = model.config, batch["label"].numpy()
    entries, lengths = filled(model)
    before = model.bank.entries.clone()
    loss = model.loss(batch, progress=share)
    assert torch.equal(model.bank.entries, before)  # a loss in evaluation mode leaves the memory alone
    feats = model.features(batch["image"]).detach()
    scores, logits = (head(feats).detach().numpy() for head in (model.classification, model.segmentation))
    context, entropy = expected_attention(model, feats.numpy(), label, entries, lengths)
    improved = model.segmentation(feats + torch.from_numpy(context)).detach().numpy()
    assert np.abs(improved - logits).max() > 0.01
    maps = [None] * 3
    if saliency:
        maps = F.interpolate(batch["saliency"], (5, 5), mode="bilinear", align_corners=True)[:, 0].numpy()
    seeds = [expected_seeds(config, scores[b], improved[b], label[b], maps[b]) for b in range(3)]
    seeds = [np.stack(of_images) for of_images in zip(*seeds, strict=True)]
    assert len({seed.tobytes() for seed in seeds}) == 3
    t = share / 0.5
    ramp = 1.0 if t >= 1 else (3 * t * t - 2 * t * t * t) ** 2
    scales = (max(1 - ramp, 0.6), 1, 1)
    plain = sum(scale * expected_entropy(logits, seed) for scale, seed in zip(scales, seeds, strict=True))
    helped = sum(scale * expected_entropy(improved, seed) for scale, seed in zip(scales, seeds, strict=True))
    p = 1 / (1 + np.exp(-scores.mean(axis=(2, 3))))
    costs = -(label * np.log(p) + (1 - label) * np.log(1 - p)).mean(axis=1)
    classification = (costs / (np.maximum(label.sum(axis=1), 1) + 1e-5)).mean()
    expected = {"classification": classification, "segmentation": plain, "attention": helped, "entropy": entropy}
    expected["total"] = classification + weight * ramp * (plain + helped + entropy)
    assert set(loss) == set(expected)
    for name, value in expected.items():
        assert loss[name].item() == pytest.approx(value, rel=1e-5), name


def test_seeds_by_hand():
    maps = torch.tensor([[[[0.6, 0.05, 0.2, 0.2]], [[0.4, 0.09, 0.2, 0.1]], [[0.5, 0.01, 0.1, 0.3]]]])
    assert mcic.best_of(maps, 0.1).tolist() == [[[0, IGNORE, 0, 2]]]
    #                         agree bg/fg  fg/?   bg/?    fg/other  ?/?
    first = torch.tensor([[[0, 2, 0, 2, 0, 2, IGNORE, IGNORE]]])
    second = torch.tensor([[[0, 2, 2, IGNORE, IGNORE, 1, 1, IGNORE]]])
    assert mcic.merged_seed(first, second, 2).tolist() == [[[0, 2, 2, 2, IGNORE, IGNORE, 1, IGNORE]]]
    scores = torch.tensor([[[[-1.0, 4.0]], [[2.0, 1.0]], [[-3.0, -2.0]]]])
    assert mcic.peak_maps(scores, torch.tensor([[1.0, 0.0, 1.0]])).tolist() == [[[[0, 1]], [[0, 0]], [[0, 0]]]]
    assert mcic.with_background(torch.tensor([[0.0, 1.0]])).tolist() == [[1, 0, 1]]


def test_ramp():
    assert [mcic.ramp(p, 0.25) for p in (0.0, 0.25, 0.7, 1.0)] == [0, 1, 1, 1]
    assert mcic.ramp(0.125, 0.25) == pytest.approx(0.25)  # t = 1/2: (3/4 - 1/4)^2
    assert mcic.ramp(0.0625, 0.25) == pytest.approx((3 / 16 - 2 / 64) ** 2)
    assert mcic.ramp(0.0, 0.0) == 1


def test_losses_by_hand():
    logits = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]], dtype=torch.float64)
    seeds = [torch.tensor([[[0, 0]]]), torch.tensor([[[1, IGNORE]]]), torch.tensor([[[IGNORE, IGNORE]]])]
    value = mcic.weighted_loss(logits, seeds, (0.5, 2.0, 1.0)).item()
    assert value == pytest.approx(0.5 * (math.log(2) + math.log(4 / 3)) / 2 + 2 * math.log(2))
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    label = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = (math.log(2) / (2 + 1e-5) + (math.log(4) + math.log(2)) / 2 / (1 + 1e-5)) / 2
    assert mcic.classification_loss(scores, label).item() == pytest.approx(expected, rel=1e-12)


def test_scores_of_known_classes():
    model = small().eval()
    entries, lengths = filled(model)
    batch = a_batch()
    feats = model.features(batch["image"]).detach()
    label = batch["label"]
    context, _ = expected_attention(model, feats.numpy(), label.numpy(), entries, lengths)
    logits = F.interpolate(model.segmentation(feats + torch.from_numpy(context)).float(), (40, 40), mode="bilinear")
    present = torch.cat([torch.ones(3, 1), label], dim=1)[:, :, None, None]
    expected = logits.exp() * present / (logits.exp() * present).sum(dim=1, keepdim=True)
    found = model.labelled_scores(batch["image"], label)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.labelled_scores(batch["image"][1:2], label[1]), found[1:2])
    assert (found.argmax(dim=1)[2] == 0).all()  # no class: background
    plain = model.scores(batch["image"])
    torch.testing.assert_close(
        plain, F.interpolate(model.segmentation(feats).float(), (40, 40), mode="bilinear").softmax(1)
    )


def test_published_settings():
    for which in ("published", "vgg16_largefov", "vgg16_aspp", "resnet101", "resnet101_aspp"):
        config = preset("mcic", which)
        r = config.recipe
        numbers = (r.lr, r.momentum, r.weight_decay, r.epochs, r.batch_size, r.crop, r.scale, r.normalisation)
        assert numbers == (1e-3, 0.9, 5e-4, 20, 16, 321, (0.5, 1.5), "caffe-rgb")
        assert (config.context_threshold, config.context_mass, config.capacity) == (0.5, 1, 64)
        assert (config.cam_threshold, config.saliency_weight, config.cam_seed_floor) == (0.1, 0.5, 0.6)
        assert config.stop_gradient and not config.entropy and config.warm_up == 5 / 20
        assert config.segmentation_weight == 1
    model = mcic.Model(replace(preset("mcic"), num_classes=4))
    assert model.bank.entries.shape == (5, 64, 512) and model.features(torch.zeros(1, 3, 33, 41)).shape == (
        1,
        512,
        5,
        6,
    )
    assert [tuple(c.weight.shape) for c in model.segmentation.hidden()] == [(1024, 512, 3, 3), (1024, 1024, 1, 1)]
    assert model.segmentation.hidden()[0].dilation == (12, 12) and model.classification.hidden()[0].dilation == (1, 1)
    groups = {id(p): group["multiple"] for group in model.parameter_groups() for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    tens = {name for name, p in model.named_parameters() if groups[id(p)] == 10}
    last = {f"{head}.branches.0.6.{kind}" for head in ("classification", "segmentation") for kind in ("weight", "bias")}
    assert tens == last | {name for name, _ in model.named_parameters() if name.startswith("propagation.")}
    wide = mcic.Model(replace(preset("mcic", "resnet101_aspp"), num_classes=4, width=4))
    assert [c.dilation[0] for c in wide.segmentation.last()] == [6, 12, 18, 24] and not wide.segmentation.hidden()


def test_public_weights_of_vgg16():
    """The convolutions are loaded; the classifier's fc6 to fc8, of whatever heads, are left out."""
    torch.manual_seed(0)
    model, source = mcic.Model(replace(preset("mcic"), num_classes=2, head_width=8)), build_backbone("vgg16", width=8)
    weights = {**source.state_dict(), "fc6_1.weight": torch.zeros(1), "fc8.weight": torch.zeros(1)}
    load_model(model, weights, source="vgg16.pth")
    assert all(torch.equal(value, weights[name]) for name, value in model.backbone.state_dict().items())
    x = torch.randn(1, 3, 24, 32)
    conv5 = source.features(x)[1]
    pooled = F.avg_pool2d(F.max_pool2d(conv5, 3, 1, 1), 3, 1, 1)
    torch.testing.assert_close(model.features(x), pooled)


def test_memory_bank_is_the_engines():
    assert mcic.MemoryBank is wk.MemoryBank
    with pytest.raises(ValueError, match="memory must be one of prototypes"):
        replace(mcic.Config(), memory="words")
    for name, value in (("confidence", "cam"), ("rates", ()), ("warm_up", 2.0), ("background", 0.0), ("capacity", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            replace(mcic.Config(), **{name: value})
    model = small(num_classes=3)
    batch = a_batch(saliency=True)
    with pytest.raises(ValueError, match=r"label must be \[B, C\] = \[3, 3\], got \[3, 2\]"):
        model.loss({**batch, "label": batch["label"][:, :2]})
    with pytest.raises(ValueError, match=r"saliency must be \[B, 1, H, W\] = \[3, 1, 40, 40\], got \[3, 1, 40, 39\]"):
        model.loss({**batch, "saliency": batch["saliency"][..., :-1]})
