"""Puzzle-CAM: tiles and back, every loss term and its gradient against loops, the ramp, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from wsss_models import puzzlecam
from wsss_models.puzzlecam import merge, reconstruction_loss, tile
from wsss_models.systems import preset, with_settings


def small(**changes):
    published = {"level": "scores", "tile_loss": True}
    config = replace(puzzlecam.PRESETS["tiny"], num_classes=3, width=4, **published | changes)
    torch.manual_seed(0)
    return puzzlecam.Model(config).double().eval()


def batch_of(size=32, count=2):
    label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])[:count].double()
    return {"image": torch.randn(count, 3, size, size, dtype=torch.float64), "label": label}


@pytest.mark.parametrize(("pieces", "n"), [(1, 1), (4, 2), (9, 3), (16, 4)])
def test_tiles_and_back(pieces, n):
    x = torch.randn(3, 2, 5 * n, 4 * n).transpose(2, 3)  # not contiguous
    height, width = x.shape[2] // n, x.shape[3] // n
    tiles = tile(x, pieces)
    assert tiles.shape == (3 * pieces, 2, height, width)
    for t in range(pieces):
        top, left = t // n * height, t % n * width
        assert torch.equal(tiles[3 * t : 3 * t + 3], x[:, :, top : top + height, left : left + width])
    assert torch.equal(merge(tiles, pieces), x)
    maps = torch.randn(2 * pieces, 3, 2, 5)
    assert torch.equal(tile(merge(maps, pieces), pieces), maps)
    assert tile(x[:0], pieces).shape == (0, 2, height, width)
    assert merge(tile(x[:0], pieces), pieces).shape == (0, *x.shape[1:])


def test_tiles_carry_gradients():
    x = torch.randn(2, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 1, 2, 3, dtype=torch.float64)
    (tile(x) * weight).sum().backward()
    assert torch.equal(x.grad, merge(weight))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 1, 6, 8)
    for pieces in (0, 2, 8, -4):
        for work in (tile, merge):
            with pytest.raises(ValueError, match=f"pieces must be a square number such as 4 or 16, got {pieces}"):
                work(x, pieces)
    with pytest.raises(ValueError, match="height and width that 4 divides, for 16 pieces, got 6 x 8"):
        tile(x, 16)
    with pytest.raises(ValueError, match="that 2 divides, for 4 pieces, got 6 x 7"):
        tile(x[..., :7])
    with pytest.raises(ValueError, match=r"tiles must be a multiple of 4 \(pieces\), got 6"):
        merge(torch.zeros(6, 1, 2, 2))
    with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\]"):
        tile(x[0])
    label = torch.zeros(2, 1)
    for arguments, options, message in (
        ((x, x[:1], label), {}, r"merged must be \[2, 1, 6, 8\] as full, got \[1, 1, 6, 8\]"),
        ((x, x, label[:1]), {}, r"labels must be \[B, C\] = \[2, 1\], got \[1, 1\]"),
        ((x, x, label), {"kind": "masking"}, "kind must be one of masked, selected, none, got 'masking'"),
        ((x, x, label), {"p": 3}, "p must be 1 or 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruction_loss(*arguments, **options)
    model = small()
    with pytest.raises(ValueError, match=r"image must have a height and width that 2 \* the output stride 8 divides"):
        model.loss(batch_of(40))
    for setting, message in (
        ("crop=72", "crop must be a multiple of 16 pixels"),
        ("reconstruction=all", "reconstruction must be one of"),
        ("level=maps", "level must be one of scores, cam, got 'maps'"),
        ("alpha=-1", "alpha must be a number >= 0, got -1"),
        ("pieces=5", "pieces must be a square number"),
    ):
        with pytest.raises(ValueError, match=message):
            puzzlecam.Model(with_settings(preset("puzzlecam", "tiny"), [setting]))


def reconstruction_by_loops(full, merged, labels, kind, p):
    """Value and gradient in full, element by element."""
    batch, classes, height, width = full.shape
    value, gradient = 0.0, np.zeros_like(full)
    for b, c, i, j in np.ndindex(*full.shape):
        if kind != "none" and labels[b][c] == 0:
            continue
        chosen = classes * batch if kind != "selected" else sum(labels[b]) * batch
        d = full[b, c, i, j] - merged[b, c, i, j]
        share = 1 / (chosen * height * width)
        value += share * abs(d) ** p
        gradient[b, c, i, j] = share * (np.sign(d) if p == 1 else 2 * d)
    return value, gradient


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", puzzlecam.KINDS)
def test_reconstruction(kind, p):
    g = torch.Generator().manual_seed(p)
    full, merged = torch.randn(2, 3, 4, 3, 5, generator=g, dtype=torch.float64).requires_grad_()
    full, merged = full.detach().requires_grad_(), merged.detach().requires_grad_()
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])  # the last picture holds nothing
    loss = reconstruction_loss(full, merged, labels, kind=kind, p=p)
    value, gradient = reconstruction_by_loops(full.detach().numpy(), merged.detach().numpy(), labels.tolist(), kind, p)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(full.grad.numpy(), gradient, atol=1e-15)
    np.testing.assert_allclose(merged.grad.numpy(), -gradient, atol=1e-15)


def test_reconstruction_by_hand():
    full = torch.tensor([[[[1.0, 3.0]], [[5.0, 5.0]]]])
    merged = torch.tensor([[[[0.0, 1.0]], [[1.0, 1.0]]]])
    labels = torch.tensor([[1.0, 0.0]])
    found = {
        (k, p): reconstruction_loss(full, merged, labels, kind=k, p=p).item() for k in puzzlecam.KINDS for p in (1, 2)
    }
    assert found == {
        ("masked", 1): 0.75,
        ("masked", 2): 1.25,
        ("selected", 1): 1.5,
        ("selected", 2): 2.5,
        ("none", 1): 2.75,
        ("none", 2): 9.25,
    }


def maps_by_hand(model, images, n):
    """Scores of the whole pictures, and of the tiles one by one, each where it belongs."""
    weight = model.classifier.weight[:, :, 0, 0]
    rows = []
    step = images.shape[-1] // n
    for i in range(n):
        row = []
        for j in range(n):
            part = images[:, :, i * step : (i + 1) * step, j * step : (j + 1) * step]
            row.append(torch.einsum("cd,bdhw->bchw", weight, model.backbone.features(part)[-1]))
        rows.append(torch.cat(row, dim=3))
    full = torch.einsum("cd,bdhw->bchw", weight, model.backbone.features(images)[-1])
    return full, torch.cat(rows, dim=2)


def cross_entropy(logits, label):
    probs = 1 / (1 + torch.exp(-logits))
    return -(label * probs.log() + (1 - label) * (1 - probs).log()).mean()


@pytest.mark.parametrize(
    ("changes", "n", "size"),
    [
        ({}, 2, 32),
        ({"pieces": 16, "reconstruction": "selected"}, 4, 64),
        ({"p": 2, "level": "cam"}, 2, 32),
        ({"tile_loss": False, "reconstruction": "none", "alpha": 1.5, "ramp": 1.0}, 2, 32),
    ],
)
def test_loss_and_gradient(changes, n, size):
    model = small(**changes)
    config, batch = model.config, batch_of(size)
    full, merged = maps_by_hand(model, batch["image"], n)
    label = batch["label"]
    terms = {"classification": cross_entropy(full.mean(dim=(2, 3)), label)}
    if config.tile_loss:
        terms["tiles"] = cross_entropy(merged.mean(dim=(2, 3)), label)
    pair = [full, merged]
    if config.level == "cam":
        pair = [((m.clamp(min=0) - 1e-5).clamp(min=0)) / (m.clamp(min=0).amax((2, 3), True) + 1e-5) for m in pair]
    d = (pair[0] - pair[1]).abs() ** config.p
    mask = label[:, :, None, None]
    if config.reconstruction == "masked":
        terms["reconstruction"] = (d * mask).mean()
    elif config.reconstruction == "selected":
        terms["reconstruction"] = sum(d[b][label[b] == 1].mean() for b in range(2)) / 2
    else:
        terms["reconstruction"] = d.mean()
    alpha = config.alpha * min(1, 0.3 / config.ramp)
    expected = sum(terms.values()) + (alpha - 1) * terms["reconstruction"]
    loss = model.loss(batch, progress=0.3)
    assert list(loss) == ["total", *terms]
    for name, value in terms.items():
        assert loss[name].item() == pytest.approx(value.item(), rel=1e-10)
    assert loss["total"].item() == pytest.approx(expected.item(), rel=1e-10)
    learning = [model.classifier.weight, model.backbone.conv1.weight, model.backbone.layer4[1].conv2.weight]
    for found, wanted in zip(
        torch.autograd.grad(loss["total"], learning), torch.autograd.grad(expected, learning), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def test_ramp():
    model = small(alpha=4.0)
    found = [model.weight(t / 20) for t in range(21)]
    assert found == pytest.approx([min(4 * t / (0.5 * 20), 4) for t in range(21)])
    assert small(alpha=4.0, ramp=0.0).weight(0.0) == 4
    batch = batch_of()
    start, end = model.loss(batch, progress=0.0), model.loss(batch)
    assert start["total"].item() == pytest.approx((start["classification"] + start["tiles"]).item())
    assert (end["total"] - start["total"]).item() == pytest.approx(4 * end["reconstruction"].item())


def test_cams_are_the_whole_pictures():
    model, images = small(), batch_of(40)["image"]
    full, _ = maps_by_hand(model, images, 1)
    torch.testing.assert_close(model.cams(images), full.clamp(min=0))


def test_published_numbers():
    config = preset("puzzlecam")
    recipe = config.recipe
    assert (config.pieces, config.alpha, config.ramp, config.reconstruction, config.p) == (4, 4.0, 0.5, "masked", 1)
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (15, 32, 0.1, 1e-4)
    assert (recipe.momentum, recipe.nesterov, recipe.crop, recipe.long_side) == (1e-4, True, 512, (320, 640))
    assert recipe.lr_multiples == (1, 2, 10, 20) and not recipe.decay_biases
    torch.manual_seed(0)
    model = puzzlecam.Model()
    deviation = model.classifier.weight.std().item()
    assert deviation == pytest.approx(math.sqrt(2 / 2048), rel=0.02)
    assert all(p.requires_grad for p in model.parameters())


def test_it_learns_and_resumes_with_the_same_bits(colours, tmp_path):
    pytest.importorskip("lightning_fabric")
    from wsss_models.train import train

    def make(seed):
        torch.manual_seed(seed)
        settings = ("num_classes=3", "width=4", "batch_size=6", "epochs=8", "lr=0.02", "crop=32")
        published = ("level=scores", "tile_loss=True")
        return puzzlecam.Model(with_settings(preset("puzzlecam", "tiny"), (*settings, *published)))

    whole, other = make(0), make(1)
    losses = train(whole, colours, tmp_path / "whole", accelerator="cpu")
    first = train(make(0), colours, tmp_path / "part", accelerator="cpu", stop_after=7)
    assert first + train(other, colours, tmp_path / "part", accelerator="cpu", resume=True) == losses
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in whole.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["classification"] < 0.7 * lines[0]["classification"]
    for t, line in enumerate(lines):
        weight = min(4 * t / (0.5 * 16), 4)
        assert line["total"] == pytest.approx(
            line["classification"] + line["tiles"] + weight * line["reconstruction"], rel=1e-4
        )
