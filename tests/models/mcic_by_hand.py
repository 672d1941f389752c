"""A small MCIC model and a batch, and the published formulas once more, pixel by pixel."""

import math
from dataclasses import replace

import numpy as np
import torch
from wsss_models import mcic

IGNORE = 255


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
