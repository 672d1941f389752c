"""MCIC's memory: what enters it, what its attention adds, and where the gradient stops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
from wsss_models import mcic

from tests.models.mcic_by_hand import IGNORE, a_batch, expected_entropy, expected_seeds, filled, peak, small

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_what_is_dropped_does_not_follow_the_layout():
    propagation = mcic.Propagation(6, 0.5, False).train()
    found = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = found.contiguous(memory_format=layout)
        propagation.attention.forward = lambda *_, laid=laid, **__: (laid, torch.zeros(()))
        torch.manual_seed(1)
        results.append(propagation(found, torch.zeros(3, 6), torch.ones(2, 3, dtype=torch.bool))[0])
    assert torch.equal(*results) and not torch.equal(results[0], propagation.eval()(found, None, torch.ones(2, 3))[0])
