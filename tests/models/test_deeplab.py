"""DeepLab: shapes, loss against float64 by other means, what its presets hold, and `wsss segment`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning_fabric")
from PIL import Image
from wsss_models import deeplab
from wsss_models.cli.main import main
from wsss_models.data.augment import IMAGENET
from wsss_models.data.dataset import open_dataset
from wsss_models.data.files import read_picture
from wsss_models.data.masks import read_mask
from wsss_models.data.synth import Settings, write_set
from wsss_models.infer import load_run
from wsss_models.segment import merged_scores, with_crf
from wsss_models.systems import as_dict, from_dict, preset
from wsss_models.training_data import samples_of

import wsss_kernels as wk

TINY = ["--preset", "tiny", "--set", "width=8", "--set", "batch_size=4", "--set", "crop=48", "--workers", "0"]


def tiny(version, **settings):
    torch.manual_seed(0)
    return deeplab.Model(replace(preset("deeplab", "tiny"), version=version, num_classes=3, width=8, **settings))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_set(root, Settings(12, 3, 0, 52, 60, 0.34))
    return root


@pytest.mark.parametrize("which", list(deeplab.PRESETS))
def test_presets(which):
    config = preset("deeplab", which)
    assert from_dict(deeplab.Config, as_dict(config)) == config
    model = deeplab.Model(config).eval()
    images = torch.randn(1, 3, 41, 50)
    with torch.no_grad():
        logits, scores = model.logits(images), model.scores(images)
    stride = 4 if config.version == "v3plus" else 8
    assert logits.shape == (1, 21, -(-41 // stride), -(-50 // stride))
    assert scores.shape == (1, 21, 41, 50)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(1, 41, 50))
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = model.parameter_groups()
    assert sorted(map(id, learning)) == sorted(id(p) for group in groups for p in group["params"])
    heads = {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}
    if which != "tiny":
        rates = {group["lr"] for group in groups if id(group["params"][0]) in heads}
        assert rates == {10 * config.recipe.lr, 20 * config.recipe.lr}
        assert config.recipe.epochs * 10582 // config.recipe.batch_size >= 16000


def test_published_output_strides():
    assert [deeplab.Model(preset("deeplab", which)).backbone.strides[-1] for which in ("published", "v3plus")] == [
        8,
        16,
    ]


@pytest.mark.parametrize("version", deeplab.VERSIONS)
def test_loss_and_gradient(version):
    model = tiny(version).double().eval()
    images = torch.randn(2, 3, 43, 37, dtype=torch.float64)
    mask = torch.randint(0, 4, (2, 43, 37))
    mask[0, :20], mask[1, 5] = 255, 255
    loss = model.loss({"image": images, "mask": mask})
    assert set(loss) == {"total", "segmentation"}
    logits = F.interpolate(model.logits(images), (43, 37), mode="bilinear", align_corners=version == "v3plus")
    logp = logits.detach() - logits.detach().logsumexp(dim=1, keepdim=True)
    picked = [-logp[b, mask[b, y, x], y, x] for b, y, x in (mask != 255).nonzero().tolist()]
    assert loss["total"].item() == pytest.approx(float(torch.stack(picked).mean()), rel=1e-12)
    loss["total"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.aspp.parameters())
    weight = model.aspp.branches[1].weight if version == "v2" else model.decoder[0][0].weight
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():  # the derivative along a random direction, by differences
        weight += step
        above = model.loss({"image": images, "mask": mask})["total"].item()
        weight -= 2 * step
        below = model.loss({"image": images, "mask": mask})["total"].item()
    assert (weight.grad * step).sum().item() == pytest.approx((above - below) / 2, rel=1e-4)


def test_summed_pyramid_is_the_sum_of_dilated_convolutions():
    model = tiny("v2", rates=(2, 3)).double().eval()
    x = torch.randn(1, model.backbone.channels[-1], 9, 11, dtype=torch.float64)
    expected = sum(
        F.conv2d(F.pad(x, (r, r, r, r)), b.weight, b.bias, dilation=r)
        for r, b in zip((2, 3), model.aspp.branches, strict=True)
    )
    torch.testing.assert_close(model.aspp(x), expected)


def test_masks_without_any_known_pixel_cost_nothing():
    model = tiny("v2").eval()
    loss = model.loss({"image": torch.randn(1, 3, 32, 32), "mask": torch.full((1, 32, 32), 255)})["total"]
    assert loss.item() == 0


def test_refusals(scenes, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"mask must be \[B, H, W\] = \[1, 32, 32\]"):
        tiny("v2").loss({"image": torch.zeros(1, 3, 32, 32), "mask": torch.zeros(1, 16, 16, dtype=torch.int64)})
    with pytest.raises(ValueError, match="version must be one of v2, v3plus"):
        deeplab.Config(version="v1")
    with pytest.raises(ValueError, match="rates must be"):
        deeplab.Config(rates=(0, 6))
    with pytest.raises(ValueError, match="head_width must be a multiple of 4"):
        deeplab.Config(head_width=30)
    train = ["train", "deeplab", "--data", f"{scenes}", "--out", f"{tmp_path}/run", *TINY]
    for more, message in (
        ([], "give --labels DIR, or --labels masks"),
        (["--labels", f"{tmp_path}/none"], "--labels must be a folder"),
        (["--labels", f"{tmp_path}"], "No such file"),
    ):
        assert main([*train, *more]) == 2
        assert message in capsys.readouterr().err


def test_masks_take_the_geometry_of_their_pictures(scenes):
    """The augmented mask is that of the augmented picture: a set whose pictures are drawn from its masks."""
    pictures = open_dataset(scenes, "train")
    config = replace(preset("deeplab", "tiny"), num_classes=3)
    drawn = samples_of(deeplab, config, pictures, seed=4)
    folder = samples_of(deeplab, config, pictures, seed=4, labels=scenes / "SegmentationClass")
    pictures.image = lambda i: np.repeat(pictures.mask(i)[..., None] * 60, 3, axis=2).astype(np.uint8)
    checked = 0
    for i in range(len(pictures)):
        assert torch.equal(drawn[i]["mask"], folder[i]["mask"])
        image, mask = drawn[i]["image"], drawn[i]["mask"]
        known = (mask != 255) & (mask == mask.roll(1, 0)) & (mask == mask.roll(-1, 0))
        known &= (mask == mask.roll(1, 1)) & (mask == mask.roll(-1, 1))
        inner = -F.max_pool2d(-known[None].float(), 5, 1, 2)[0] > 0  # away from edges, which are resampled
        values = torch.from_numpy(IMAGENET.undo(image)[..., 0])
        assert ((values[inner] / 60).round().long() == mask[inner]).all()
        checked += int(inner.sum())
    assert checked > 1000


def test_merged_scores_by_hand():
    def scores(images):
        return torch.stack([images[:, 0], images[:, 1] ** 2], dim=1).softmax(dim=1)

    pyramid = [torch.randn(1, 3, 10, 12), torch.randn(1, 3, 5, 6)]
    expected = torch.zeros(1, 2, 10, 12)
    for images in pyramid:
        both = (scores(images) + scores(images.flip(3)).flip(3)) / 2
        expected += F.interpolate(both, (10, 12), mode="bilinear", align_corners=False) / 2
    torch.testing.assert_close(merged_scores(scores, pyramid, (10, 12)), expected)
    alone = merged_scores(lambda x: x[:, :2] + torch.arange(x.shape[3]), pyramid[:1], (10, 12), flip=False)
    torch.testing.assert_close(alone, pyramid[0][:, :2] + torch.arange(12))


def test_train_and_segment(scenes, tmp_path, capsys):
    train = ["train", "deeplab", "--data", f"{scenes}", "--split", "train", "--device", "cpu", *TINY]
    train += ["--set", "epochs=3", "--labels"]
    assert main([*train, "masks", "--out", f"{tmp_path}/run"]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["labels"] == "masks"
    segment = ["segment", "--run", f"{tmp_path}/run", "--data", f"{scenes}", "--split", "val", "--device", "cpu"]
    segment += ["--workers", "0", "--scales", "1,0.5"]
    capsys.readouterr()
    assert main([*segment, "--out", f"{tmp_path}/mean"]) == 0
    assert "4 written, 0 failed" in capsys.readouterr().out
    assert main([*segment, "--out", f"{tmp_path}/mean"]) == 0
    assert "0 written, 4 already done" in capsys.readouterr().out
    assert main([*segment, "--out", f"{tmp_path}/mean", "--no-flip"]) == 0
    assert "4 written, 0 failed" in capsys.readouterr().out
    assert main([*segment, "--out", f"{tmp_path}/mean"]) == 0
    assert main([*segment, "--out", f"{tmp_path}/crf", "--crf"]) == 0
    pictures = open_dataset(scenes, "val")
    model, _ = load_run(tmp_path / "run")
    model.eval()
    rgb = read_picture(pictures.image_path(0))
    half = np.array(Image.fromarray(rgb).resize((30, 26), Image.Resampling.BICUBIC))
    with torch.no_grad():
        mean = merged_scores(model.scores, [IMAGENET(rgb)[None], IMAGENET(half)[None]], (52, 60))
    name = pictures.ids[0]
    assert np.array_equal(read_mask(tmp_path / "mean" / f"{name}.png"), mean[0].argmax(dim=0))
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    unary = wk.unary_from_probabilities(mean)
    marginals = wk.dense_crf(image, unary, gaussian=(3, 3), bilateral=(80, 13, 10), iterations=10)
    assert torch.equal(with_crf(image, mean), marginals)
    assert np.array_equal(read_mask(tmp_path / "crf" / f"{name}.png"), marginals[0].argmax(dim=0))
    capsys.readouterr()
    assert main(["cams", "--run", f"{tmp_path}/run", "--data", f"{scenes}", "--out", f"{tmp_path}/cams"]) == 2
    assert "it labels with wsss segment" in capsys.readouterr().err
    for more, message in ((["--scales", "0"], "scales must be"), (["--shard", "2/2"], "2/2"), (["--split", "x"], "x")):
        assert main([*segment, "--out", f"{tmp_path}/other", *more]) == 2
        assert message in capsys.readouterr().err
    pictures.image_path(1).write_bytes(b"no picture")
    assert main([*segment, "--out", f"{tmp_path}/bad"]) == 1
    assert pictures.ids[1] in capsys.readouterr().err


def test_other_labels_are_not_resumed(folder, tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.mkdir()
    for i in range(6):
        size = Image.open(folder / f"p{i}.png").size
        Image.fromarray(np.full(size[::-1], i % 3, dtype=np.uint8)).save(labels / f"p{i}.png")
    arguments = ["train", "deeplab", "--data", f"{folder}", "--out", f"{tmp_path}/run", "--device", "cpu", *TINY]
    arguments += ["--labels", f"{labels}", "--set", "epochs=1", "--resume"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    Image.fromarray(np.ones((40, 48), dtype=np.uint8)).save(labels / "p0.png")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "another labels" in capsys.readouterr().err
