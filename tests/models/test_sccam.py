"""SC-CAM: its loss and sub-categories by hand, the map of each head, and rounds that go on where they stopped."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("lightning_fabric")
from PIL import Image
from wsss_models import sccam, subcategories, train
from wsss_models.backbones import load_model
from wsss_models.cli.main import main
from wsss_models.data import open_dataset
from wsss_models.data.artefacts import FileError
from wsss_models.data.augment import IMAGENET
from wsss_models.data.files import read_maps, write_arrays
from wsss_models.data.synth import Settings, write_set
from wsss_models.infer import load_run, merged_cams
from wsss_models.networks.resnet38 import ResNet38
from wsss_models.report_subcategories import NEAREST
from wsss_models.subcategories import FEATURES, SUB_CATEGORIES, read_sub_categories, write_sub_categories
from wsss_models.systems import preset, with_settings
from wsss_models.training_data import samples_of

ARRAY = {FEATURES: "features", SUB_CATEGORIES: "assigned"}
SMALL = ("num_classes=3", "clusters=2", "width=8")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def words(folder, out, *more):
    settings = [word for name in ("width=8", "batch_size=2", "crop=48", "epochs=2") for word in ("--set", name)]
    shared = ["--data", f"{folder}", "--out", f"{out}", "--preset", "tiny", "--device", "cpu", "--workers", "0"]
    return [*shared, *settings, *more]


@pytest.fixture
def plain(folder, tmp_path):
    """A classifier of the folder's pictures, hardly trained."""
    assert main(["train", "classifier", *words(folder, tmp_path / "plain", "--set", "epochs=1")]) == 0
    return tmp_path / "plain"


def test_a_round_and_its_artefacts(folder, plain, tmp_path, capsys, monkeypatch):
    out = tmp_path / "round1"
    more = ("--previous", f"{plain}", "--set", "clusters=2")
    assert main(["train", "sccam", *words(folder, out, *more)]) == 0
    assert "6 steps" in capsys.readouterr().out
    pictures = open_dataset(folder)
    found = read_sub_categories(out / SUB_CATEGORIES)
    assert found.ids == pictures.ids and found.classes == ("ant", "bee", "cat") and found.clusters == 2
    assert np.array_equal(found.assigned >= 0, pictures.labels() > 0)
    features = np.load(out / FEATURES)
    model, _ = load_run(plain)
    with torch.inference_mode():
        for i in range(len(pictures)):
            whole = model.eval().backbone.features(IMAGENET(pictures.image(i))[None])[-1].mean(dim=(2, 3))[0]
            np.testing.assert_allclose(features["features"][i], whole.numpy(), rtol=1e-4, atol=1e-5)
    assert features["ids"].tolist() == list(pictures.ids)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sub_categories"] == found.digest()
    monkeypatch.setattr(subcategories, "image_features", None)  # what is there is not made again
    monkeypatch.setattr(subcategories, "sub_categories", None)
    assert main(["train", "sccam", *words(folder, out, *more), "--resume"]) == 0
    assert "0 steps" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["train", "sccam", *words(folder, out, *more), "--set", "clusters=1", "--resume"]) == 2
    assert "another config, sub_categories" in capsys.readouterr().err
    samples = samples_of(sccam, load_run(out)[0].config, pictures, sub_labels=found.labels())
    for i in (0, 3, 5):
        row = samples[i]["sublabel"]
        assert row.dtype == torch.float32 and row.sum() == pictures.labels()[i].sum()
        assert [int(k) for k in row.nonzero()] == [2 * c + a for c, a in enumerate(found.assigned[i]) if a >= 0]


def test_artefacts_of_other_settings_or_damaged_are_made_again(folder, plain, tmp_path, monkeypatch):
    pictures, config = open_dataset(folder), with_settings(preset("sccam", "tiny"), ["clusters=2"])
    made = []

    def count(*arguments, before=subcategories.image_features, **options):
        made.append(1)
        return before(*arguments, **options)

    monkeypatch.setattr(subcategories, "image_features", count)
    first = write_sub_categories(plain, pictures, tmp_path / "a", config, workers=0)
    again = write_sub_categories(plain, pictures, tmp_path / "a", replace(config, clusters=1), workers=0)
    assert len(made) == 1  # the features stay
    assert set(again.assigned.flatten().tolist()) == {-1, 0}
    data = (tmp_path / "a" / FEATURES).read_bytes()
    (tmp_path / "a" / FEATURES).write_bytes(data[: len(data) // 2])
    second = write_sub_categories(plain, pictures, tmp_path / "a", config, workers=0)
    assert len(made) == 2 and first.digest() == second.digest()
    part = pictures.subset([4, 2, 0])
    few = write_sub_categories(plain, part, tmp_path / "a", config, workers=0)
    assert len(made) == 3 and few.ids == tuple(pictures.ids[i] for i in (4, 2, 0))
    assert not list((tmp_path / "a").glob(".wsss-*"))
    with pytest.raises(FileError, match="no training"):
        write_sub_categories(tmp_path / "none", pictures, tmp_path / "a", config)
    model, manifest = load_run(plain)
    for found, message in (
        ((torch.nn.Identity(), {"system": "deeplab"}), "must be a training of a classifier, got one of deeplab"),
        ((model, {**manifest, "classes": ["ant", "cat"]}), r"must have the classes of --data.* got \['ant', 'cat'\]"),
    ):
        monkeypatch.setattr(subcategories, "load_run", lambda run, found=found: found)
        with pytest.raises(ValueError, match=message):
            write_sub_categories(plain, pictures, tmp_path / "b", config)
    assert not (tmp_path / "b").exists()
    path = tmp_path / "a" / SUB_CATEGORIES
    arrays = dict(np.load(path))
    for change, message in (
        ({"assigned": arrays["assigned"] + 5}, r"assigned must be in -1..1"),
        ({"assigned": arrays["assigned"][:1]}, r"must be numbers \[N, C\] = \[3, 3\]"),
    ):
        write_arrays(path, {**arrays, **change})
        with pytest.raises(FileError, match=message):
            read_sub_categories(path)
    write_arrays(path, {"ids": arrays["ids"]})
    with pytest.raises(FileError, match="assigned, distances is missing"):
        read_sub_categories(path)


def test_refusals_and_heads(folder, plain, tmp_path, capsys):
    out = tmp_path / "round1"
    assert main(["train", "sccam", *words(folder, out)]) == 2
    assert "give --previous DIR" in capsys.readouterr().err
    assert main(["train", "sccam", *words(folder, out, "--previous", f"{tmp_path}/none")]) == 2
    assert "no training" in capsys.readouterr().err
    assert not out.exists()
    epochs = ("--set", "epochs=4", "--set", "round_epochs=(1,2)", "--set", "round=2")
    assert main(["train", "sccam", *words(folder, out, "--previous", f"{plain}", *epochs)]) == 0
    printed = capsys.readouterr()
    assert "2 of 4 epochs" in printed.out and "6 steps" in printed.out
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    recipe = preset("sccam", "tiny").recipe
    assert lines[-1]["lr"] == pytest.approx(recipe.lr * (1 - 5 / 12) ** recipe.power)  # the schedule is of all epochs
    maps = {}
    for head in ("parent", "sub"):
        cams = ["cams", "--run", f"{out}", "--data", f"{folder}", "--out", f"{tmp_path}/cams", "--branch", head]
        assert main([*cams, "--scales", "1", "--device", "cpu", "--workers", "0"]) == 0
        assert "6 written, 0 failed" in capsys.readouterr().out
        maps[head] = read_maps(tmp_path / "cams" / "p0.npz")[1]
        values = np.unique(maps[head])
        assert len(values) > 10 and values.max() == pytest.approx(1, abs=2e-3)  # soft, not binarised
    assert not np.array_equal(maps["parent"], maps["sub"])
    assert main(["cams", "--run", f"{plain}", "--data", f"{folder}", "--out", f"{tmp_path}/c", "--branch", "sub"]) == 2
    assert "--branch must be left out for classifier" in capsys.readouterr().err
    cams = ["cams", "--run", f"{out}", "--data", f"{folder}", "--out", f"{tmp_path}/c", "--branch", "both"]
    assert main(cams) == 2
    assert "--branch must be one of parent, sub" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_set(root, Settings(16, 3, 1, 48, 52, 0.25))
    return root


def whole(scenes, out, *more, refiner="affinitynet"):
    small = ("width=8", "batch_size=4", "crop=48", "epochs=2", "sccam.clusters=2", "deeplab.epochs=1", *more)
    settings = [word for setting in small for word in ("--set", setting)]
    shared = ["--data", f"{scenes}", "--out", f"{out}", "--preset", "tiny", "--device", "cpu", "--workers", "0"]
    return main(["run", "sccam", *shared, "--scales", "1", "--refiner", refiner, *settings])


class KilledError(BaseException):
    """Where a process would end."""


def killed(monkeypatch, module, name, reached):
    """The function ends the process when `reached` holds of its arguments."""
    before = getattr(module, name)

    def call(*arguments, **options):
        if reached(*arguments):
            raise KilledError
        return before(*arguments, **options)

    monkeypatch.setattr(module, name, call)


def test_a_run_goes_on_wherever_it_stopped(scenes, tmp_path, monkeypatch, capsys):
    """Ended at every artefact of a round, and inside its training: the same numbers as in one go."""
    rounds = ("sccam.rounds=2", "affinity.epochs=1")
    once, part = tmp_path / "once", tmp_path / "part"
    assert whole(scenes, once, *rounds) == 0
    results = json.loads((once / "results.json").read_text())
    stages = ["classifier", "round1", "round2", "cams", "affinity", "labels", "deeplab", "segmentation"]
    assert list(results["stages"]) == stages
    rows = ["CAM best", "CAM free", "CAM sub best", "CAM sub free", "refined", "labels"]
    assert [row["stage"] for row in results["rows"]][:6] == rows
    assert (results["system"], results["refiner"]) == ("sccam", "affinitynet")
    manifests = [json.loads((once / f"round{r}" / "manifest.json").read_text()) for r in (1, 2)]
    assert [m["config"]["round"] for m in manifests] == [1, 2]
    assert manifests[0]["sub_categories"] != manifests[1]["sub_categories"]
    written = []
    for module, name, reached in (
        (subcategories, "write_arrays", lambda path, *_: path == part / "round1" / FEATURES),
        (subcategories, "write_arrays", lambda path, *_: path == part / "round1" / SUB_CATEGORIES),
        (train, "set_rate", lambda sgd, recipe, progress: (part / "round1" / "log.jsonl").exists() and progress == 0.5),
        (subcategories, "write_arrays", lambda path, *_: path == part / "round2" / FEATURES),
        (train, "set_rate", lambda sgd, recipe, progress: (part / "round2" / "log.jsonl").exists() and progress == 0.5),
    ):
        with monkeypatch.context() as patch:
            killed(patch, module, name, reached)
            with pytest.raises(KilledError):
                whole(scenes, part, *rounds)
        written.append(sorted(f"{p.relative_to(part)}" for p in part.glob("round*/*.*") if p.suffix != ".jsonl"))
        assert not (part / "cams").exists()
    assert written[0] == [] and written[1] == ["round1/features.npz"]
    assert written[2] == [f"round1/{name}" for name in ("checkpoint.pt", FEATURES, "manifest.json", SUB_CATEGORIES)]
    capsys.readouterr()
    assert whole(scenes, part, *rounds) == 0
    assert json.loads((part / "results.json").read_text())["rows"] == results["rows"]
    for r in (1, 2):
        for name in (FEATURES, SUB_CATEGORIES):
            assert np.array_equal(*(np.load(out / f"round{r}" / name)[ARRAY[name]] for out in (once, part)))
        states = [torch.load(out / f"round{r}" / "checkpoint.pt")["model"] for out in (once, part)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    weights = [torch.load(once / f / "checkpoint.pt")["model"] for f in ("classifier", "round1", "round2")]
    assert not torch.equal(weights[1]["fc8_20.weight"], weights[2]["fc8_20.weight"])
    first = [json.loads((once / f / "log.jsonl").read_text().splitlines()[0]) for f in ("round1", "round2")]
    assert first[0]["parent"] == first[1]["parent"] and first[0]["sub"] != first[1]["sub"]  # both from one beginning
    check_page(scenes, once, capsys)


def check_page(scenes, out, capsys):
    assert main(["report", f"{out}"]) == 0
    text = (out / "report.html").read_text()
    assert '<h2 id="subcategories">' in text and 'href="#subcategories"' in text
    section = text[text.index('<h2 id="subcategories">') : text.index('<h2 id="settings">')]
    assert "as round2 was trained on" in section
    found = read_sub_categories(out / "round2" / SUB_CATEGORIES)
    pictures = open_dataset(scenes, "train")
    at = section.index("<details")
    for c, name in enumerate(pictures.classes):
        end = section.index("</details>", at)
        part = section[at:end]
        assert f"<b>{name}</b>" in part
        assert f"{int(pictures.labels()[:, c].sum())} pictures" in part
        assert part.count("<h5>") == len(set(found.assigned[:, c]) - {-1})
        for heading in part.split("<h5>")[1:]:
            k = int(heading.split()[0])
            members = np.flatnonzero(found.assigned[:, c] == k)
            order = sorted(members, key=lambda i: (found.distances[i, c], i))[:NEAREST]
            shown = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"[^>]* alt="([^"]+)"', heading)
            assert [alt for _, alt in shown] == [found.ids[i] for i in order]
            thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[0][0]))), dtype=float)
            original = pictures.image(pictures.index(shown[0][1])).astype(float)
            assert np.abs(thumbnail.mean(axis=(0, 1)) - original.mean(axis=(0, 1))).max() < 4
        at = section.find("<details", end)
    assert at == -1
    assert main(["report", f"{out}", "--pictures", "0"]) == 0
    assert "subcategories" not in (out / "report.html").read_text()
    (out / "round2" / SUB_CATEGORIES).write_bytes(b"PK\x03\x04 cut")
    capsys.readouterr()
    assert main(["report", f"{out}"]) == 1
    assert "damaged npz" in capsys.readouterr().out
    assert "<h1>" in (out / "report.html").read_text()


@pytest.mark.parametrize("more", [("sccam.rounds=0",), ("sccam.rounds=1", "sccam.sub_weight=0", "sccam.cam=sub")])
def test_rounds_and_weight_are_settings(scenes, tmp_path, more, capsys):
    assert whole(scenes, tmp_path, *more, "epochs=1", refiner="none") == 0
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [s for s in stages if s.startswith("round")] == ["round1"][: int(more[0][-1])]
    if len(more) > 1:
        manifest = json.loads((tmp_path / "round1" / "manifest.json").read_text())
        assert (manifest["config"]["sub_weight"], manifest["config"]["cam"]) == (0.0, "sub")
    assert "deeplab begins anew" not in capsys.readouterr().out


def test_refusals_of_a_run(scenes, tmp_path, capsys):
    arguments = ["--data", f"{scenes}", "--out", f"{tmp_path}", "--preset", "tiny"]
    assert main(["run", "classifier", *arguments, "--set", "sccam.rounds=1"]) == 2
    assert "no stage sccam" in capsys.readouterr().err
    assert main(["run", "sccam", *arguments, "--set", "sccam.rounds=-1"]) == 2
    assert "rounds must be at least 0" in capsys.readouterr().err
