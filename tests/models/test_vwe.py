"""Visual words: every loss term and its gradient against loops and plain formulas, the memory, the kinds of CAMs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from wsss_models import vwe
from wsss_models.systems import preset, with_settings


def small(**changes):
    config = replace(vwe.PRESETS["tiny"], **{"num_classes": 3, "width": 2, "words": 5, "pooling": "hspp", **changes})
    torch.manual_seed(0)
    model = vwe.Model(config).double().eval()
    if config.codebook == "memory":
        model.memory.copy_(model.features(batch_of()["image"])[0].flatten(1).T[:5].detach())
        model.memory[4] *= -1  # the word of no pixel: features are not negative
    return model


def batch_of(size=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    return {"image": torch.randn(2, 3, size, size, generator=g, dtype=torch.float64), "label": label}


def cross_entropy(logits, label):
    probs = 1 / (1 + torch.exp(-logits))
    return -(label * probs.log() + (1 - label) * (1 - probs).log()).mean()


def matrix(layer):
    return layer.weight[:, :, 0, 0]


def shares(feats, codebook, temperature):
    """[B, D, h, w], [M, D] -> [B, M, h w], pixel by pixel, the softmax over the words."""
    batch, dim = feats.shape[:2]
    found = []
    for b in range(batch):
        for f in feats[b].reshape(dim, -1).T:
            cosine = torch.stack([f @ c / (f.square().sum() * c.square().sum()).sqrt() for c in codebook])
            found.append((temperature * cosine).exp() / (temperature * cosine).exp().sum())
    return torch.stack(found).reshape(batch, -1, len(codebook)).transpose(1, 2)


def pooled(feats, config):
    """By windows, for maps of 5 x 5 and the levels 1, 2, 4: windows of 5, 2 and 1 pixels."""
    if config.pooling == "gmp":
        return feats.amax(dim=(2, 3))
    mean = feats.mean(dim=(2, 3))
    if config.pooling == "gap":
        return mean
    total = config.gamma * mean
    for level in config.levels:
        side = 5 // level
        maxima = [
            feats[:, :, i : i + side, j : j + side].amax(dim=(2, 3))
            for i in range(0, 5 - side + 1, side)
            for j in range(0, 5 - side + 1, side)
        ]
        total = total + torch.stack(maxima).mean(dim=0)
    return total / (config.gamma + len(config.levels))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 4.0, "decorrelation": 0.7, "pooling": "gap"},
        {"codebook": "memory", "pooling": "gmp"},
        {"codebook": "none", "levels": (1, 2), "gamma": 0.5},
    ],
)
def test_loss_and_gradient(changes):
    model = small(**changes)
    config, batch = model.config, batch_of()
    feats, label = model.features(batch["image"]), batch["label"]
    assert feats.shape[2:] == (5, 5)
    terms = {"classification": cross_entropy(pooled(feats, config) @ matrix(model.classifier).T, label)}
    weights = [1.0]
    if config.codebook != "none":
        codebook = model.memory if config.codebook == "memory" else model.encoder.codebook
        share = shares(feats.detach(), codebook, config.temperature)
        if config.codebook == "gradient":
            terms["frequencies"] = cross_entropy(share.sum(dim=2) @ matrix(model.fc_a).T, label)
        present = torch.zeros(2, 5, dtype=torch.float64)
        for b, j in np.ndindex(2, 5):
            present[b, j] = float((share[b].argmax(dim=0) == j).any())
        assert 0 < present.sum() < 10
        terms["words"] = cross_entropy(feats.mean(dim=(2, 3)) @ matrix(model.fc_b).T, present)
        weights = [1.0] * len(terms)
    if config.decorrelation:
        c = codebook - codebook.mean(dim=1, keepdim=True)
        gram = c @ c.T
        terms["decorrelation"] = 0.5 * (gram.square().sum().sqrt() - gram.diagonal().square().sum().sqrt())
        weights.append(0.7)
    expected = sum(w * term for w, term in zip(weights, terms.values(), strict=True))
    loss = model.loss(batch)
    assert list(loss) == ["total", *terms]
    for name, value in {**terms, "total": expected}.items():
        assert loss[name].item() == pytest.approx(value.item(), rel=1e-10)
    heads = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    learning = [*heads.values(), model.backbone.conv1.weight, model.backbone.layer4[1].conv2.weight]
    for found, wanted in zip(
        torch.autograd.grad(loss["total"], learning), torch.autograd.grad(expected, learning), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-11)
    assert (
        set(heads)
        == {
            "gradient": {"classifier.weight", "encoder.codebook", "fc_a.weight", "fc_b.weight"},
            "memory": {"classifier.weight", "fc_b.weight"},
            "none": {"classifier.weight"},
        }[config.codebook]
    )


def test_what_each_loss_trains():
    model = small()
    loss = model.loss(batch_of())
    reached = {}
    for name in ("classification", "frequencies", "words"):
        model.zero_grad()
        loss[name].backward(retain_graph=True)
        reached[name] = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {
        "classification": {"backbone", "classifier"},
        "frequencies": {"encoder", "fc_a"},
        "words": {"backbone", "fc_b"},
    }


def test_decorrelation_by_hand():
    # Centred: (-1, 0, 1), (-1, 0, 1), (1, -2, 1); G = [[2, 2, 0], [2, 2, 0], [0, 0, 6]].
    codebook = torch.tensor([[0.0, 1.0, 2.0], [4.0, 5.0, 6.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    expected = (math.sqrt(4 * 4 + 36) - math.sqrt(2 * 4 + 36)) / 2
    assert vwe.decorrelation_loss(codebook).item() == pytest.approx(expected)
    assert vwe.decorrelation_loss(codebook[1:]).item() == pytest.approx(0, abs=1e-12)
    g = torch.Generator().manual_seed(0)
    random = torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(vwe.decorrelation_loss, random)
    same = torch.ones(3, 4, requires_grad=True)  # no covariance at all
    vwe.decorrelation_loss(same).backward()
    assert torch.equal(same.grad, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"codebook must be \[M, D\], got \[4\]"):
        vwe.decorrelation_loss(torch.zeros(4))


def moved(memory, feats, rate):
    """One step of the memory, pixel by pixel."""
    pixels = feats.detach().permute(0, 2, 3, 1).reshape(-1, feats.shape[1]).numpy()
    sums, counts = np.zeros_like(memory), np.zeros(len(memory))
    for f in pixels:
        cosine = [f @ c / max(np.linalg.norm(f) * np.linalg.norm(c), 1e-300) for c in memory]
        sums[int(np.argmax(cosine))] += f
        counts[int(np.argmax(cosine))] += 1
    return rate * sums / (counts[:, None] + 1e-4) + (1 - rate) * memory, counts


def test_memory_moves_on():
    model = small(codebook="memory", memory_rate=0.2).train()
    feats = model.features(batch_of()["image"]).detach()
    expected, counts = moved(model.memory.numpy().copy(), feats, 0.2)
    assert counts[4] == 0 and counts.sum() == 50
    model.loss(batch_of())
    np.testing.assert_allclose(model.memory.numpy(), expected, rtol=1e-10)
    before = model.memory.clone()
    model.eval().loss(batch_of())
    assert torch.equal(model.memory, before)


def test_two_processes_keep_one_memory(monkeypatch):
    """The sums of the second half of a batch reach the first, as all_reduce brings them."""
    feats = small(codebook="memory").features(batch_of()["image"]).detach()
    whole, first, second = (small(codebook="memory", memory_rate=0.2).train() for _ in range(3))
    whole._remembered(feats)
    sent = []
    monkeypatch.setattr(vwe.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(vwe.distributed, "all_reduce", lambda x: sent.append(x.clone()))
    second._remembered(feats[1:])
    monkeypatch.setattr(vwe.distributed, "all_reduce", lambda x: x.add_(sent.pop(0)))
    first._remembered(feats[:1])
    torch.testing.assert_close(first.memory, whole.memory, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(second.memory, whole.memory)
    given = torch.rand(5, 16, dtype=torch.float64)  # an empty memory gets what the first process drew
    first.memory.zero_()
    sent[:] = [torch.zeros(5, 16), torch.zeros(5)]
    monkeypatch.setattr(vwe.distributed, "broadcast", lambda x, source: x.copy_(given))
    first.config = replace(first.config, memory_rate=0.0)
    first._remembered(feats[:1])
    assert torch.equal(first.memory, given)


@pytest.mark.parametrize("words", [5, 70])  # and more words than pixels
def test_memory_begins_with_pixels(words):
    model = small(codebook="memory", memory_rate=0.0).train()
    model.memory = torch.zeros(words, 16, dtype=torch.float64)
    model.fc_b = torch.nn.Conv2d(16, words, 1, bias=False).double()
    feats = model.features(batch_of()["image"]).detach()
    torch.manual_seed(3)
    first = model.loss(batch_of())
    pixels = feats.permute(0, 2, 3, 1).reshape(-1, 16)
    which = [int((pixels - row).abs().sum(dim=1).argmin()) for row in model.memory]
    torch.testing.assert_close(model.memory, pixels[which], rtol=1e-12, atol=1e-14)
    assert len(set(which)) == min(words, 50)
    if words == 5:  # the words of the first batch are those that it has just given
        winners = shares(feats, model.memory, 1.0).argmax(dim=1)
        present = torch.tensor([[float(j in row) for j in range(5)] for row in winners.tolist()], dtype=torch.float64)
        logits = feats.mean(dim=(2, 3)) @ matrix(model.fc_b).T
        assert first["words"].item() == pytest.approx(cross_entropy(logits, present).item(), rel=1e-10)
    kept = model.memory.clone()
    model.loss(batch_of(seed=2))
    assert torch.equal(model.memory, kept)  # a rate of 0, and it is filled but once


def test_cams_of_every_branch():
    model = small(temperature=3.0)
    images = batch_of()["image"]
    feats = model.features(images)
    convolution = torch.einsum("cd,bdhw->bchw", matrix(model.classifier), feats).clamp(min=0)
    share = shares(feats, model.encoder.codebook, 3.0)
    words = torch.einsum("cm,bmn->bcn", matrix(model.fc_a), share).clamp(min=0).unflatten(2, (5, 5))
    assert words.amax() > 0 and convolution.amax() > 0
    expected = {
        "convolution": convolution,
        "words": words,
        "maximum": torch.maximum(*(m / (m.amax(dim=(2, 3), keepdim=True) + 1e-5) for m in (convolution, words))),
    }
    assert tuple(expected) == vwe.branches(model.config)
    assert model.config.cam == "convolution"
    for name, maps in expected.items():
        model.config = replace(model.config, cam=name)
        torch.testing.assert_close(model.cams(images), maps, rtol=1e-9, atol=1e-12)


def test_settings_that_do_not_fit():
    for settings, message in (
        (["codebook=kmeans"], "codebook must be one of gradient, memory, none, got 'kmeans'"),
        (["pooling=max"], "pooling must be one of hspp, gap, gmp"),
        (["cam=both"], "cam must be one of convolution, words, maximum"),
        (["codebook=memory", "cam=words"], "cam must be \"convolution\" where codebook is 'memory', got 'words'"),
        (["codebook=none", "decorrelation=1"], "decorrelation must be 0 where codebook is 'none'"),
        (["decorrelation=-1"], "decorrelation must be a number >= 0"),
        (["memory_rate=2"], "memory_rate must be in 0..1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            with_settings(preset("vwe", "tiny"), settings)
    with pytest.raises(ValueError, match="feats must have at least 4 rows and columns"):
        small().loss(batch_of(24))


def test_published_numbers():
    config, learnt, memory = preset("vwe"), preset("vwe", "vwl-l"), preset("vwe", "vwl-m")
    assert (config.backbone, learnt.backbone, memory.backbone) == ("resnet50", "resnet101", "resnet101")
    assert (config.words, config.temperature, config.levels, config.gamma) == (256, 1.0, (1, 2, 4), 2.0)
    assert (config.decorrelation, learnt.decorrelation, memory.codebook) == (0.0, 1.0, "memory")
    assert (memory.memory_rate, memory.cut, config.cut, config.cam) == (1e-3, 0, 2, "convolution")
    recipe = config.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.lr_multiples) == (6, 16, 0.01, (1, 1, 10, 10))
    assert (recipe.weight_decay, recipe.momentum, recipe.crop, recipe.long_side) == (1e-4, 1e-4, 512, (320, 640))
    torch.manual_seed(0)
    model = vwe.Model()
    assert model.encoder.codebook.shape == (256, 2048)
    assert model.encoder.codebook.std().item() == pytest.approx(0.01276, rel=0.01)
    rates = {id(p): group["lr"] for group in model.parameter_groups() for p in group["params"]}
    assert rates[id(model.encoder.codebook)] == rates[id(model.fc_a.weight)] == pytest.approx(0.1)
    assert rates[id(model.backbone.layer4[0].conv1.weight)] == pytest.approx(0.01)
    assert id(model.backbone.layer2[0].conv1.weight) not in rates


@pytest.mark.parametrize("which", ["tiny-l", "tiny-m"])
def test_it_learns_and_resumes_with_the_same_bits(colours, tmp_path, which):
    pytest.importorskip("lightning_fabric")
    from wsss_models.train import read_checkpoint, train

    def make(seed):
        torch.manual_seed(seed)
        settings = (
            "num_classes=3",
            "width=4",
            "words=6",
            "pooling=hspp",
            "batch_size=6",
            "epochs=6",
            "lr=0.02",
            "crop=32",
        )
        return vwe.Model(with_settings(preset("vwe", which), settings))

    whole, other = make(0), make(1)
    losses = train(whole, colours, tmp_path / "whole", accelerator="cpu")
    first = train(make(0), colours, tmp_path / "part", accelerator="cpu", stop_after=5)
    assert first + train(other, colours, tmp_path / "part", accelerator="cpu", resume=True) == losses
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in whole.state_dict().items())
    name = "memory" if which == "tiny-m" else "encoder.codebook"
    assert torch.equal(read_checkpoint(tmp_path / "part")["model"][name], whole.state_dict()[name])
    assert whole.state_dict()[name].any()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["classification"] < 0.7 * lines[0]["classification"]
