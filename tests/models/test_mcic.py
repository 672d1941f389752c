"""MCIC: seeds, ramp, contexts, memory and every loss term against values worked out by other means."""

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

IGNORE = 255


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(**settings):
    """A model in float64, its random numbers large enough that every term counts."""
    torch.manual_seed(settings.pop("seed", 0))
    config = replace(mcic.PRESETS["tiny"], **{"num_classes": 3, "width": 4, "capacity": 5, **settings})
    model = mcic.Model(config).double()
    if config.memory != "none":
        model.bank.to(torch.float64)
        for parameter in model.propagation.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    for head in (model.classification, model.segmentation):
        for layer in head.last():
            torch.nn.init.normal_(layer.weight, std=0.1)
    return model


def a_batch(count=3, size=40, seed=1, saliency=False):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.randn(count, 3, size, size, generator=g, dtype=torch.float64),
        "label": torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.float64)[:count],
    }
    if saliency:
        batch["saliency"] = torch.rand(count, 1, size, size, generator=g, dtype=torch.float64)
    return batch


# Everything once more, pixel by pixel.


def peak(maps, label):
    out = np.zeros_like(maps)
    for c in range(len(maps)):
        top = max(maps[c].max(), 0)
        out[c] = np.maximum(maps[c], 0) / max(top, 1e-5) * label[c]
    return out


def softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def chosen(maps, threshold):
    seed = np.zeros(maps.shape[1:], dtype=np.int64)
    for y, x in np.ndindex(seed.shape):
        best = int(np.argmax(maps[:, y, x]))
        seed[y, x] = best if maps[best, y, x] >= threshold else IGNORE
    return seed


def agreement(first, second):
    seed = np.full(first.shape, IGNORE)
    for place in np.ndindex(first.shape):
        said = {int(first[place]), int(second[place])}
        on = said - {0, IGNORE}
        if said == {0}:
            seed[place] = 0
        elif len(on) == 1:
            seed[place] = on.pop()
    return seed


def expected_seeds(config, scores, improved, label, saliency=None):
    """For one image: scores [C, h, w], improved [C + 1, h, w]."""
    cams = peak(scores, label)
    hard = soft = (1 - cams.max(axis=0)) ** config.background
    if saliency is not None:
        hard, soft = (saliency < config.saliency_threshold).astype(float), 1 - saliency
    first = chosen(np.concatenate([hard[None], cams]), config.cam_threshold)
    p = softmax(improved, 0)
    background = config.saliency_weight * soft + (1 - config.saliency_weight) * p[0]
    second = chosen(np.concatenate([background[None], p[1:] * label[:, None, None]]), config.cam_threshold)
    return first, second, agreement(first, second)


def expected_entropy(logits, seed):
    """Mean cross entropy over the known pixels of the batch."""
    total, known = 0.0, 0
    for b, y, x in np.ndindex(seed.shape):
        if seed[b, y, x] != IGNORE:
            known += 1
            total -= math.log(softmax(logits[b, :, y, x], 0)[seed[b, y, x]])
    return total / max(known, 1)


def expected_attention(model, feats, label, entries, lengths):
    """(f~ - f, entropy) of feats [B, D, h, w] and queues [C + 1, capacity, D], query by query."""
    p = {name: value.detach().numpy() for name, value in model.propagation.state_dict().items()}
    context, entropies = np.zeros_like(feats), []

    def linear(x, name):
        return p[f"attention.{name}.weight"] @ x + p[f"attention.{name}.bias"]

    for b, y, x in np.ndindex(feats.shape[0], *feats.shape[2:]):
        allowed = [c for c in range(len(lengths)) if c == 0 or label[b, c - 1] > 0]
        memory = [entries[c, i] for c in allowed for i in range(lengths[c])]
        if not memory:
            entropies.append(0.0)
            continue
        q = linear(feats[b, :, y, x], "q_proj")
        raw = np.array([q @ linear(m, "k_proj") for m in memory]) / math.sqrt(len(q))
        weights = softmax(raw, 0)
        entropies.append(-(weights * np.log(weights + 1e-5)).sum())
        found = linear(sum(w * linear(m, "v_proj") for w, m in zip(weights, memory, strict=True)), "out_proj")
        normal = (found - found.mean()) / math.sqrt(found.var() + 1e-5)
        context[b, :, y, x] = np.maximum(normal * p["norm.weight"] + p["norm.bias"], 0)
    return context, float(np.mean(entropies))


def filled(model, seed=5):
    """A memory with another number of entries for each class."""
    g = torch.Generator().manual_seed(seed)
    dim = model.bank.dim
    ids = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    model.bank.push(torch.randn(len(ids), dim, generator=g, dtype=torch.float64), ids)
    return model.bank.entries.numpy(), model.bank.lengths.tolist()


@pytest.mark.parametrize("saliency", [False, True])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_loss_terms(saliency, share):
    model = small(entropy=True, warm_up=0.5).eval()
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
    expected["total"] = classification + ramp * (plain + helped + entropy)
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


def contexts(model, batch):
    """What must enter an empty memory, class by class: the published rule in loops."""
    config = model.config
    feats = model.features(batch["image"]).detach()
    scores, logits = model.classification(feats).detach().numpy(), model.segmentation(feats).detach().numpy()
    feats, queues = feats.numpy(), [[] for _ in range(config.num_classes + 1)]
    for b, label in enumerate(batch["label"].numpy()):
        maps = peak(logits[b], np.concatenate([[1.0], label]))
        if config.confidence == "classification":
            cams = peak(scores[b], label)
            maps = np.concatenate([((1 - cams.max(axis=0)) ** config.background)[None], cams])
        sums, mass = np.zeros((len(maps), feats.shape[1])), np.zeros(len(maps))
        for y, x in np.ndindex(maps.shape[1:]):
            c = int(np.argmax(maps[:, y, x]))
            weight = maps[c, y, x]
            if weight > config.context_threshold:
                sums[c] += weight * feats[b, :, y, x]
                mass[c] += weight
                if config.memory == "pixels":
                    queues[c].append(feats[b, :, y, x])
        if config.memory == "prototypes":
            for c in np.flatnonzero(mass > config.context_mass):
                queues[c].append(sums[c] / (mass[c] + 1e-5))
    return queues


@pytest.mark.parametrize("confidence", mcic.CONFIDENCES)
@pytest.mark.parametrize("memory", ["prototypes", "pixels"])
def test_what_is_remembered(memory, confidence):
    model = small(memory=memory, confidence=confidence, capacity=150, norm="fixed", context_threshold=0.3)
    batch = a_batch(4, 48)
    model.train()
    queues = contexts(model, batch)
    model.loss(batch)
    assert model.bank.lengths.tolist() == [len(queue) for queue in queues]
    assert sum(map(len, queues)) > (60 if memory == "pixels" else 4)
    for entries, queue in zip(model.bank.entries, queues, strict=True):
        if queue:
            np.testing.assert_allclose(entries[: len(queue)].numpy(), np.stack(queue), rtol=1e-5, atol=1e-7)
    lengths = model.bank.lengths.clone()
    model.loss(batch)
    assert torch.equal(model.bank.lengths, (2 * lengths).clamp(max=150))


def learning(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("stop", [True, False])
def test_the_loss_of_the_attention_stops(stop):
    model = small(entropy=True, stop_gradient=stop)
    loss = model.loss(a_batch(), progress=0.6)
    (loss["attention"] + loss["entropy"]).backward()
    own = {name for name, _ in model.named_parameters() if name.startswith("propagation.")}
    # a bias of the keys is the same for all entries: softmax takes it out
    own -= {"propagation.attention.k_proj.bias"}
    reached = learning(model) - {"propagation.attention.k_proj.bias"}
    if stop:
        assert reached == own
        assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("propagation."))
        return
    others = {name for name, _ in model.named_parameters() if name.startswith(("backbone.", "segmentation."))}
    assert reached == own | others
    assert not any(name.startswith("classification.") for name in reached)


def test_the_gradient_of_the_attention():
    """Autograd of the same formula in plain PyTorch, float64."""
    model = small().eval()
    filled(model)
    batch = a_batch()
    loss = model.loss(batch, progress=1.0)["attention"]
    parameters = dict(model.propagation.named_parameters())
    got = torch.autograd.grad(loss, list(parameters.values()))
    feats = model.features(batch["image"]).detach()
    memory, _, mask = model.bank.pull(mcic.with_background(batch["label"]))
    p = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}

    def linear(x, name):
        return x @ p[f"attention.{name}.weight"].T + p[f"attention.{name}.bias"]

    queries = feats.flatten(2).transpose(1, 2)
    raw = linear(queries, "q_proj") @ linear(memory, "k_proj").T * memory.shape[1] ** -0.5
    weights = raw.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
    found = linear(weights @ linear(memory, "v_proj"), "out_proj")
    centred = found - found.mean(dim=-1, keepdim=True)
    normal = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    context = (normal * p["norm.weight"] + p["norm.bias"]).relu().transpose(1, 2).reshape(feats.shape)
    improved = model.segmentation(feats + context)
    scores = model.classification(feats).detach().numpy()
    label = batch["label"].numpy()
    seeds = [expected_seeds(model.config, scores[b], improved[b].detach().numpy(), label[b]) for b in range(3)]
    expected = 0.0
    for scale, seed in zip((0.6, 1, 1), zip(*seeds, strict=True), strict=True):
        expected = expected + scale * F.cross_entropy(improved, torch.from_numpy(np.stack(seed)), ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    gradients = torch.autograd.grad(expected, list(p.values()))
    for name, mine, theirs in zip(p, got, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_an_empty_memory_adds_nothing():
    model = small(entropy=True).eval()
    batch = a_batch()
    loss = model.loss(batch, progress=1.0)
    assert loss["attention"].item() == loss["segmentation"].item() and loss["entropy"].item() == 0
    gradients = torch.autograd.grad(loss["total"], list(model.parameters()), allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)
    model.bank.push(torch.randn(2, model.bank.dim, dtype=torch.float64), torch.tensor([2, 2]))
    feats = model.features(batch["image"])
    context, _ = model.propagation(feats, *(model.bank.pull(mcic.with_background(batch["label"]))[i] for i in (0, 2)))
    assert context[1].abs().max() > 0  # the only image with class 2
    assert context[0].abs().max() == 0 and context[2].abs().max() == 0


def test_without_a_memory():
    model = small(memory="none").eval()
    assert not any(name.startswith(("bank", "propagation")) for name in model.state_dict())
    batch = a_batch()
    loss = model.loss(batch, progress=1.0)
    assert set(loss) == {"total", "classification", "segmentation"}
    feats = model.features(batch["image"])
    scores, logits = model.classification(feats).detach().numpy(), model.segmentation(feats).detach().numpy()
    label = batch["label"].numpy()
    seeds = zip(*(expected_seeds(model.config, scores[b], logits[b], label[b]) for b in range(3)), strict=True)
    expected = sum(s * expected_entropy(logits, np.stack(seed)) for s, seed in zip((0.6, 1, 1), seeds, strict=True))
    assert loss["segmentation"].item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(loss["total"], loss["classification"] + loss["segmentation"])


def test_normalised_attention():
    model = small(normalise=True).eval()
    filled(model)
    _, _, mask = model.bank.pull(torch.ones(2, 4))
    feats, memory = torch.randn(2, 32, 3, 4, dtype=torch.float64), model.bank.entries.flatten(0, 1)
    context, _ = model.propagation(feats, memory, mask)
    torch.testing.assert_close(model.propagation(7 * feats, 3 * memory, mask)[0], context)
    other = small().eval()
    other.load_state_dict(model.state_dict())
    unit = F.normalize(feats, dim=1), F.normalize(memory, dim=1)
    torch.testing.assert_close(other.propagation(*unit, mask)[0], context)
    assert not torch.allclose(other.propagation(feats, memory, mask)[0], context)


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
