"""Backbones: parameter names of the public weights, shapes, what is frozen, and what a weight file may be."""

import pickle
import re
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")
from wsss_models import affinitynet, classifier, irnet
from wsss_models.backbones import NAMES, build_backbone, load_backbone, load_model, read_weights
from wsss_models.data.artefacts import FileError
from wsss_models.networks.norm import set_norm
from wsss_models.networks.resnet import OUTPUT_STRIDES

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def resnet_names(counts, convolutions):
    """As torchvision names them: the blocks of layer1 to layer4, a shortcut where the first block changes the shape."""
    names = {"conv1.weight", *(f"bn1.{n}" for n in BATCH_NORM)}
    for layer, count in enumerate(counts, start=1):
        for block in range(count):
            for i in range(1, convolutions + 1):
                names.add(f"layer{layer}.{block}.conv{i}.weight")
                names |= {f"layer{layer}.{block}.bn{i}.{n}" for n in BATCH_NORM}
            if block == 0 and (layer > 1 or convolutions == 3):
                names |= {f"layer{layer}.0.downsample.0.weight"}
                names |= {f"layer{layer}.0.downsample.1.{n}" for n in BATCH_NORM}
    return names


def resnet38_names():
    names = {"conv1a.weight", *(f"bn7.{n}" for n in BATCH_NORM)}
    blocks = [f"b{b}" + (f"_{i}" if i else "") for b, count in ((2, 3), (3, 3), (4, 6), (5, 3)) for i in range(count)]
    for block in (*blocks, "b6", "b7"):
        parts = ("2a", "2b1", "2b2") if block in ("b6", "b7") else ("2a", "2b1")
        for part in parts:
            names |= {f"{block}.conv_branch{part}.weight", *(f"{block}.bn_branch{part}.{n}" for n in BATCH_NORM)}
        if "_" not in block:
            names.add(f"{block}.conv_branch1.weight")
    return names


def vgg_names():
    convs = [f"conv{i}_{j}" for i, count in enumerate((2, 2, 3, 3, 3), start=1) for j in range(1, count + 1)]
    return {f"{conv}.{kind}" for conv in (*convs, "fc6", "fc7") for kind in ("weight", "bias")}


EXPECTED = {
    "resnet18": (resnet_names((2, 2, 2, 2), 2), 11.176512, (64, 64, 128, 256, 512)),
    "resnet34": (resnet_names((3, 4, 6, 3), 2), 21.284672, (64, 64, 128, 256, 512)),
    "resnet50": (resnet_names((3, 4, 6, 3), 3), 23.508032, (64, 256, 512, 1024, 2048)),
    "resnet101": (resnet_names((3, 4, 23, 3), 3), 42.500160, (64, 256, 512, 1024, 2048)),
    "resnet38": (resnet38_names(), None, (512, 1024, 4096)),
    "vgg16": (vgg_names(), None, (512, 512, 1024)),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names_and_shapes(name):
    names, millions, channels = EXPECTED[name]
    backbone = build_backbone(name).eval()
    assert set(backbone.state_dict()) == names
    if millions is not None:  # torchvision's count, its classifier left out
        assert sum(p.numel() for p in backbone.parameters()) == round(millions * 1e6)
    assert backbone.channels == channels
    with torch.no_grad():
        stages = backbone.features(torch.rand(1, 3, 34, 49))
    for x, depth, stride in zip(stages, channels, backbone.strides, strict=True):
        assert x.shape == (1, depth, -(-34 // stride), -(-49 // stride))
        assert (x >= 0).all() and torch.isfinite(x).all()


@pytest.mark.parametrize("stride", OUTPUT_STRIDES)
def test_output_stride(stride):
    strides, dilations = OUTPUT_STRIDES[stride]
    backbone = build_backbone("resnet18", strides=strides, width=8) if stride == 32 else None
    backbone = backbone or build_backbone("resnet50", strides=strides, dilations=dilations, width=8)
    assert backbone.strides[-1] == stride
    with torch.no_grad():
        assert backbone.features(torch.rand(1, 3, 64, 64))[-1].shape[-1] == 64 // stride


def test_dilation_keeps_the_receptive_field():
    """A dilated layer sees, at every other pixel, what the strided one sees: the same weights, the same values."""
    plain = build_backbone("resnet18", strides=(2, 2, 2, 2), width=8).eval()
    dilated = build_backbone("resnet18", strides=(2, 2, 2, 1), dilations=(1, 1, 1, 2), width=8).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(dilated.features(x)[-1][..., ::2, ::2], plain.features(x)[-1], rtol=1e-4, atol=1e-5)


def test_resnet_block_by_hand():
    block = build_backbone("resnet50", width=4).double().eval().layer1[1]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight)
    x = torch.rand(1, 16, 5, 5, dtype=torch.float64)

    def norm(values, bn):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (values - bn.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)

    y = torch.einsum("oi,bihw->bohw", block.conv1.weight[:, :, 0, 0], x)
    y = norm(y, block.bn1).clamp_min(0)
    patches = nn.functional.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    y = norm(torch.einsum("oikl,bihwkl->bohw", block.conv2.weight, patches), block.bn2).clamp_min(0)
    y = norm(torch.einsum("oi,bihw->bohw", block.conv3.weight[:, :, 0, 0], y), block.bn3)
    torch.testing.assert_close(block(x), (x + y).clamp_min(0))


@pytest.mark.parametrize("norm", ["train", "fixed", "frozen"])
def test_norms(norm):
    backbone = build_backbone("resnet18", width=8, norm=norm).train()
    bn = backbone.layer2[0].bn1
    mean = bn.running_mean.clone()
    sum(x.sum() for x in backbone.features(torch.rand(2, 3, 32, 32))).backward()
    assert torch.equal(bn.running_mean, mean) == (norm != "train")
    assert (bn.weight.grad is None) == (norm == "frozen")
    if norm == "train":
        set_norm(backbone, "fixed")
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(backbone.features(x)[-1], backbone.eval().features(x)[-1])


def test_a_cut_stops_learning_below_it():
    model = classifier.Model(classifier.Config(backbone="resnet18", width=8, num_classes=3))
    model.loss({"image": torch.rand(2, 3, 32, 32), "label": torch.ones(2, 3)})["total"].backward()
    learning = {name.split(".")[0] for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert learning == {"layer3", "layer4"}


def test_published_resnet38_keeps_its_first_layers():
    model = affinitynet.Model()
    still = {n.split(".")[0] for n, p in model.backbone.named_parameters() if not p.requires_grad and "conv" in n}
    assert still == {"conv1a", "b2", "b2_1", "b2_2"}


def test_refused_names():
    with pytest.raises(ValueError, match=r'name must be one of resnet18, .* or "timm/NAME", got \'resnet51\''):
        build_backbone("resnet51")
    with pytest.raises(ValueError, match="norm must be one of train, fixed, frozen, got 'sync'"):
        build_backbone("resnet18", norm="sync")


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('"timm/resnest50d" needs timm: pip install timm')):
        build_backbone("timm/resnest50d")


# --- weight files -----------------------------------------------------------------------------------------------------


def saved(tmp_path, content, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}}])
def test_public_weights_load_strictly(tmp_path, wrap):
    source = build_backbone("resnet18", width=8)
    nn.init.uniform_(source.bn1.running_mean)
    head = {"fc.weight": torch.rand(1000, 64), "fc.bias": torch.rand(1000)}
    path = saved(tmp_path, wrap({**source.state_dict(), **head}))
    target = build_backbone("resnet18", width=8)
    load_backbone(target, read_weights(path), source=path)
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in target.state_dict().items())


def test_irn_names_load(tmp_path):
    source = build_backbone("resnet18", width=8).state_dict()
    path = saved(tmp_path, {**{f"resnet50.{n}": t for n, t in source.items()}, "stage1.0.weight": torch.rand(1)})
    target = build_backbone("resnet18", width=8)
    load_backbone(target, read_weights(path), source=path)
    assert torch.equal(target.conv1.weight, source["conv1.weight"])


def test_mismatch_is_told_and_nothing_is_loaded(tmp_path):
    weights = build_backbone("resnet18", width=8).state_dict()
    weights["layer9.0.conv1.weight"] = torch.rand(1)
    del weights["layer1.0.conv1.weight"]
    weights["conv1.weight"] = torch.rand(9, 3, 7, 7)
    target = build_backbone("resnet18", width=8)
    before = target.layer4[0].conv1.weight.clone()
    with pytest.raises(FileError) as caught:
        load_backbone(target, weights, source="some.pth")
    text = str(caught.value)
    assert "some.pth: weights do not fit" in text
    assert "1 missing (layer1.0.conv1.weight)" in text
    assert "1 not of this network (layer9.0.conv1.weight)" in text
    assert "conv1.weight (9, 3, 7, 7) instead of (8, 3, 7, 7)" in text
    assert torch.equal(target.layer4[0].conv1.weight, before)


class Payload:
    def __reduce__(self):
        return print, ("ran",)


def test_weight_files_run_nothing(tmp_path, capsys):
    path = saved(tmp_path, {"conv1.weight": torch.rand(1), "payload": Payload()})
    with pytest.raises(FileError, match="must hold weights and nothing else"):
        read_weights(path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(FileError):
        read_weights(tmp_path / "plain.pth")
    assert "ran" not in capsys.readouterr().out
    for content in (b"", b"no weights at all"):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(FileError, match=r"broken\.pth"):
            read_weights(tmp_path / "broken.pth")
    with pytest.raises(FileError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(FileError, match="must hold a dictionary of weights, got list"):
        read_weights(saved(tmp_path, [1, 2]))


@pytest.mark.parametrize("module", [classifier, affinitynet, irnet])
def test_a_training_starts_another(module, tmp_path):
    config = module.PRESETS["tiny"]
    source = module.Model(config)
    path = saved(tmp_path, {"model": source.state_dict(), "step": 3})
    target = module.Model(config)
    assert load_model(target, read_weights(path), source=path) == []
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in target.state_dict().items())


def test_heads_of_other_classes_stay_new(tmp_path):
    config = classifier.PRESETS["tiny"]
    path = saved(tmp_path, classifier.Model(config).state_dict())
    target = classifier.Model(classifier.Config(**{**vars(config), "num_classes": 3}))
    assert load_model(target, read_weights(path), source=path) == ["classifier.weight"]
