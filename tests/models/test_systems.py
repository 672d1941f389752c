"""Losses of the systems against float64 by other means; presets; what a batch must hold."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("PIL")
from wsss_models import affinitynet, classifier, irnet
from wsss_models.recipe import Recipe, classification_loss, optimiser, parameter_groups, set_rate
from wsss_models.systems import SYSTEMS, as_dict, from_dict, preset, system, with_settings

import wsss_kernels as wk

MAKE_CAMS = [name for name in SYSTEMS if hasattr(system(name).Model, "cams")]
PRESETS = [(name, which) for name in MAKE_CAMS for which in system(name).PRESETS]


def batch_for(name, config, size=64, count=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.randn(count, 3, size, size, generator=g),
        "label": (torch.rand(count, config.num_classes, generator=g) > 0.5).float(),
        "unknown": "ignored",
    }
    if name == "deeplab":
        batch["mask"] = torch.randint(0, config.num_classes + 1, (count, size, size), generator=g)
        batch["mask"][:, :5] = 255
        del batch["label"]
    if name == "sccam":
        batch["sublabel"] = (torch.rand(count, config.num_classes * config.clusters, generator=g) > 0.9).float()
    if hasattr(system(name), "STRIDE"):
        side = size // system(name).STRIDE
        labels = torch.randint(0, 4, (count, side, side), generator=g)
        batch["affinity_label"] = torch.where(labels == 3, 255, labels)
    return batch


def test_classification_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [-1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    costs = [math.log(2), math.log(4), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))]
    loss = classification_loss(logits, label)
    assert loss.item() == pytest.approx(sum(costs) / 4, abs=1e-14)
    loss.backward()
    expected = (1 / (1 + torch.exp(-logits.detach())) - label) / 4
    torch.testing.assert_close(logits.grad, expected)
    with pytest.raises(ValueError, match=r"label must be \[B, C\] = \[2, 2\], got \[2, 3\]"):
        classification_loss(logits, torch.zeros(2, 3))


def test_classifier_loss_and_gradient():
    model = classifier.Model(replace(classifier.PRESETS["tiny"], num_classes=3)).double().eval()
    batch = batch_for("classifier", model.config, 32)
    images, label = batch["image"].double(), batch["label"].double()
    loss = model.loss({"image": images, "label": label})
    assert set(loss) == {"total", "classification"}
    feats = model.features(images).detach()
    weight = model.classifier.weight.detach()[:, :, 0, 0]
    probs = 1 / (1 + torch.exp(-feats.mean(dim=(2, 3)) @ weight.T))
    expected = -(label * probs.log() + (1 - label) * (1 - probs).log()).mean()
    torch.testing.assert_close(loss["total"].detach(), expected)
    loss["total"].backward()
    gradient = torch.einsum("bc,bd->cd", (probs - label) / label.numel(), feats.mean(dim=(2, 3)))
    torch.testing.assert_close(model.classifier.weight.grad[:, :, 0, 0], gradient)


def pair_loss(link, labels, radius):
    """The published loss, pair by pair in float64; link(b, source, destination) -> affinity."""
    height, width = labels.shape[-2:]
    sums, counts = {"bg": 0.0, "fg": 0.0, "neg": 0.0}, {"bg": 1e-5, "fg": 1e-5, "neg": 1e-5}
    reach = radius - 1
    for b in range(len(labels)):
        for y in range(height - reach):
            for x in range(reach, width - reach):
                for dy, dx in wk.neighbour_offsets(radius):
                    here, there = int(labels[b, y, x]), int(labels[b, y + dy, x + dx])
                    if 255 in (here, there):
                        continue
                    kind = "neg" if here != there else "bg" if here == 0 else "fg"
                    a = link(b, (y, x), (y + dy, x + dx))
                    sums[kind] += -math.log((1 - a if kind == "neg" else a) + 1e-5)
                    counts[kind] += 1
    return sum(share * sums[kind] / counts[kind] for kind, share in (("bg", 0.25), ("fg", 0.25), ("neg", 0.5)))


def test_affinity_stage_loss():
    config = replace(affinitynet.PRESETS["tiny"], num_classes=3, radius=3, border="cropped")
    model = affinitynet.Model(config).double().eval()
    batch = batch_for("affinitynet", config, 72)
    batch["image"] = batch["image"].double()
    feats = model.features(batch["image"]).detach()
    loss = model.loss(batch)

    def link(b, source, destination):
        i, j = feats[(b, slice(None), *source)], feats[(b, slice(None), *destination)]
        return math.exp(-float((i - j).abs().mean()))

    assert loss["total"].item() == pytest.approx(pair_loss(link, batch["affinity_label"], 3), rel=1e-9)
    loss["total"].backward()
    weight = model.f8_5.weight
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():  # the derivative along a random direction, by differences
        weight += step
        above = model.loss(batch)["total"].item()
        weight -= 2 * step
        below = model.loss(batch)["total"].item()
    assert (weight.grad * step).sum().item() == pytest.approx((above - below) / 2, rel=1e-4)


def test_boundary_stage_loss():
    config = replace(irnet.PRESETS["tiny"], num_classes=3, radius=3, frozen=True, norm="frozen")
    model = irnet.Model(config).double().eval()
    batch = batch_for("irnet", config, 40)
    batch["image"] = batch["image"].double()
    edge = model.boundary_logits(batch["image"]).sigmoid().detach()

    def link(b, source, destination):
        """1 - the highest boundary on the way: pixels of the box less than a pixel off the line."""
        dy, dx = destination[0] - source[0], destination[1] - source[1]
        worst = 0.0
        for y in range(min(0, dy), max(0, dy) + 1):
            for x in range(min(0, dx), max(0, dx) + 1):
                if abs(dy * x - dx * y) / math.hypot(dy, dx) < 1:
                    worst = max(worst, float(edge[b, 0, source[0] + y, source[1] + x]))
        return 1 - worst

    loss = model.loss(batch)
    assert loss["total"].item() == pytest.approx(pair_loss(link, batch["affinity_label"], 3), rel=1e-9)
    loss["total"].backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("fc_edge"))
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize(("name", "which"), PRESETS)
def test_every_preset_runs_forward(name, which):
    config = preset(name, which)
    if config.backbone.startswith("timm/"):
        pytest.importorskip("timm")
    model = system(name).Model(config).eval()
    with torch.no_grad():
        maps = model.cams(torch.randn(1, 3, 40, 48))
    stride = (
        16
        if config.strides == (2, 2, 2, 1)
        and config.backbone.startswith(("resnet", "timm/resnest"))
        and config.backbone != "resnet38"
        else 8
    )
    assert maps.shape == (1, config.num_classes, -(-40 // stride), -(-48 // stride))
    assert (maps >= 0).all() and torch.isfinite(maps).all()
    if name == "affinitynet":
        feats = model.features(torch.randn(1, 3, 40, 48))
        assert feats.shape == (1, 112 if "tiny" in which else 448, 5, 6)
    if name == "irnet":
        assert model.boundaries(torch.randn(1, 3, 41, 50)).shape == (1, 1, 11, 13)
    assert from_dict(type(config), as_dict(config)) == config
    groups = model.parameter_groups()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, learning)) == sorted(id(p) for group in groups for p in group["params"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_default_is_published_and_batches_are_checked(name):
    config = preset(name)
    model = system(name).Model()
    assert model.config == config
    batch = batch_for(name, config, 64, 1)
    loss = model.loss(batch, progress=0.5)
    assert torch.isfinite(loss["total"]) and loss["total"].requires_grad
    for key in set(batch) - {"unknown"}:
        with pytest.raises(KeyError, match=key):
            model.loss({k: v for k, v in batch.items() if k != key})
    if "affinity_label" in batch:
        with pytest.raises(ValueError, match="affinity_label must be"):
            model.loss({**batch, "affinity_label": batch["affinity_label"][:, :-1]})


def test_published_numbers():
    """As in the published code: learning rates, decay, and the momentum that SGD really got."""
    irn, psa, psa_cls = (
        preset("irnet").recipe,
        preset("affinitynet").recipe,
        preset("affinitynet", "published-classifier"),
    )
    assert (irn.lr, irn.weight_decay, irn.momentum, irn.batch_size, irn.epochs) == (0.1, 1e-4, 1e-4, 32, 3)
    assert (psa.lr, psa.weight_decay, psa.momentum, psa.batch_size, psa.epochs) == (0.1, 5e-4, 5e-4, 8, 8)
    assert psa.lr_multiples == (1, 2, 10, 20) and not psa.decay_biases and psa.long_side is None
    assert psa_cls.recipe.long_side == (256, 512) and psa_cls.recipe.epochs == 15
    cam = preset("classifier")
    assert (cam.recipe.batch_size, cam.recipe.epochs, cam.recipe.long_side, cam.cut) == (16, 5, (320, 640), 2)
    model = affinitynet.Model()
    assert model.f9.weight.shape == (448, 448, 1, 1)
    assert [tuple(m.weight.shape[:2]) for m in (model.f8_3, model.f8_4, model.f8_5)] == [
        (64, 512),
        (128, 1024),
        (256, 4096),
    ]


def test_parameter_groups_and_schedule():
    recipe = Recipe(lr=0.1, lr_multiples=(1, 2, 10, 20), decay_biases=False, weight_decay=5e-4, momentum=0.0)
    old, new = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)
    frozen = torch.nn.Conv2d(1, 1, 1).requires_grad_(False)
    groups = parameter_groups(recipe, [old, frozen], [new])
    assert [(g["multiple"], g["weight_decay"]) for g in groups] == [(1, 5e-4), (2, 0), (10, 5e-4), (20, 0)]
    assert [g["params"] for g in groups] == [[old.weight], [old.bias], [new.weight], [new.bias]]
    sgd = optimiser(recipe, groups)
    set_rate(sgd, recipe, 0.25)
    rates = [g["lr"] for g in sgd.param_groups]
    assert rates == pytest.approx([0.1 * m * 0.75**0.9 for m in (1, 2, 10, 20)])
    old.weight.grad = torch.ones_like(old.weight)
    before = old.weight.item()
    sgd.step()
    assert old.weight.item() == pytest.approx(before - rates[0] * (1 + 5e-4 * before), rel=1e-5)


def test_settings():
    config = with_settings(preset("classifier"), ["crop=321", "recipe.lr=1", "cut=None", "backbone=resnet34"])
    assert (config.recipe.crop, config.recipe.lr, config.cut, config.backbone) == (321, 1.0, None, "resnet34")
    for text, message in (
        ("epocs=3", "did you mean epochs"),
        ("crop=big", "crop must be int, got 'big'"),
        ("crop", "must be name=value"),
        ("flip=1", "flip must be bool"),
        ("strides=(1, 2)", "strides must be"),
        ("epochs=0", "epochs must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_settings(preset("classifier"), [text])
    with pytest.raises(ValueError, match="preset must be one of published"):
        preset("classifier", "huge")
    with pytest.raises(ValueError, match=r"system must be one of .*did you mean irnet"):
        system("irne")
    with pytest.raises(ValueError, match="did you mean num_classes"):
        from_dict(classifier.Config, {"num_clases": 3})


def test_shrunk_labels_by_hand():
    labels = torch.zeros(1, 16, 8, dtype=torch.int64)
    labels[0, :8, :4] = 3
    labels[0, :4, 4:] = 255
    labels[0, 8:, :5] = 7
    assert affinitynet.shrink_labels(labels).tolist() == [[[3], [7]]]
    with pytest.raises(ValueError, match="multiples of 8"):
        affinitynet.shrink_labels(labels[:, :9])
    rows = torch.arange(10)[:, None].expand(10, 7)
    assert irnet.shrink_labels(rows).tolist() == [[2, 2], [6, 6], [9, 9]]


def test_the_papers_affinity_loss():
    """Distances are sums over the channels, and the losses weigh 4 times as much as the code's."""
    config = replace(affinitynet.PRESETS["tiny"], num_classes=3, radius=3, border="cropped", paper_loss=True)
    model = affinitynet.Model(config).double().eval()
    with torch.no_grad():
        model.f9.weight /= 40  # distances of about 1
    batch = batch_for("affinitynet", config, 72)
    batch["image"] = batch["image"].double()
    feats = model.features(batch["image"]).detach()

    def link(b, source, destination):
        i, j = feats[(b, slice(None), *source)], feats[(b, slice(None), *destination)]
        return math.exp(-float((i - j).abs().sum()))

    assert model.loss(batch)["total"].item() == pytest.approx(4 * pair_loss(link, batch["affinity_label"], 3), rel=1e-9)
    cams = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    affinity = wk.local_affinity(feats, 3, scale=1 / feats.shape[1], border="cropped")
    walked = wk.random_walk(cams, affinity, radius=3, beta=8, steps=config.steps)
    refined = model.refine(batch["image"], cams, background=1.0, normalize=None)
    torch.testing.assert_close(refined[:, 1:], walked)


def test_affinity_refinement_is_the_published_walk():
    config = replace(affinitynet.PRESETS["tiny"], num_classes=3, border="cropped", steps=256)
    model = affinitynet.Model(config).eval()
    images, cams = torch.randn(1, 3, 64, 64), torch.rand(1, 3, 8, 8)
    cams = cams / cams.amax(dim=(2, 3), keepdim=True)
    refined = model.refine(images, cams, labels=torch.tensor([[True, False, True]]), normalize=None)
    present = cams * torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    maps = torch.cat([(1 - present.amax(dim=1, keepdim=True)) ** 16, present], dim=1)
    affinity = wk.local_affinity(model.features(images), 5, border="cropped")
    expected = wk.random_walk(maps, affinity, radius=5, beta=8, steps=256)
    torch.testing.assert_close(refined, expected.detach(), rtol=1e-3, atol=1e-3)


def test_settings_reach_the_walk_of_each_system():
    images, cams = torch.randn(1, 3, 48, 64), torch.rand(1, 2, 12, 16) ** 3
    config = replace(irnet.PRESETS["tiny"], walk_radius=3, beta=4, steps=8, background=0.4)
    model = irnet.Model(config).eval()
    walk = {"radius": 3, "beta": 4, "steps": 8, "size": (48, 64)}
    edge = model.boundaries(images)
    assert torch.equal(model.labels(images, cams), wk.boundary_labels(cams, edge, background=0.4, **walk))
    assert torch.equal(
        model.labels(images, cams, background=0.1), wk.boundary_labels(cams, edge, background=0.1, **walk)
    )
    model.config = replace(config, background=None)
    assert torch.equal(model.labels(images, cams), wk.boundary_labels(cams, edge, background="auto", **walk))
    psa = affinitynet.Model(replace(affinitynet.PRESETS["tiny"], radius=3, beta=4, steps=8, background=2)).eval()
    cams = cams / cams.amax(dim=(2, 3), keepdim=True)
    options = {"background": 2, "radius": 3, "beta": 4, "steps": 8, "border": "full", "size": (48, 64)}
    maps = wk.refine_cams(cams, psa.features(images).detach(), preset="psa", normalize=None, **options)
    assert torch.equal(psa.labels(images, cams), wk.labels_from_maps(maps, background=None))


def test_a_backbone_learns_with_the_boundaries_where_it_is_not_frozen():
    for frozen in (True, False):
        config = replace(irnet.PRESETS["tiny"], num_classes=3, frozen=frozen, norm="frozen" if frozen else "train")
        model = irnet.Model(config).train()
        model.loss(batch_for("irnet", config, 40))["total"].backward()
        assert all((p.grad is None) == frozen for p in model.backbone.layer1.parameters())
        assert model.classifier.weight.grad is None
        learning = {id(p) for group in model.parameter_groups() for p in group["params"]}
        assert ({id(p) for p in model.backbone.parameters()} <= learning) == (not frozen)


def test_boundaries_are_flip_equivariant():
    model = irnet.Model(irnet.PRESETS["tiny"]).eval()
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(model.boundaries(images.flip(3)), model.boundaries(images).flip(3), rtol=1e-4, atol=1e-5)
    assert model.labels(images, torch.rand(1, 2, 12, 16), class_ids=[4, 9]).shape == (1, 48, 64)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.filterwarnings("ignore:.* on meta runs the slow reference")
def test_a_step_stays_on_the_device_of_its_pictures(name, one_device):
    """Where there are no data: a tensor made elsewhere, or a number that the host would wait for, is an error."""
    config = preset(name, "tiny")
    model = system(name).Model(config).to("meta")
    batch = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch_for(name, config).items()}
    with one_device:
        model.loss(batch, progress=0.6)["total"].backward()
    learnt = [p for group in model.parameter_groups() for p in group["params"] if p.grad is not None]
    assert learnt and all(p.grad.is_meta for p in learnt)
