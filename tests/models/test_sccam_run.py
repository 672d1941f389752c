"""SC-CAM from the command line: a round and its artefacts, runs that go on where they stopped, the page of a run."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("lightning_fabric")
from PIL import Image
from wsss_models import sccam, subcategories, train
from wsss_models.cli.main import main
from wsss_models.data import open_dataset
from wsss_models.data.artefacts import FileError
from wsss_models.data.augment import IMAGENET
from wsss_models.data.files import read_maps, write_arrays
from wsss_models.data.synth import Settings, write_set
from wsss_models.infer import load_run
from wsss_models.report_subcategories import NEAREST
from wsss_models.subcategories import FEATURES, SUB_CATEGORIES, read_sub_categories, write_sub_categories
from wsss_models.systems import preset, with_settings
from wsss_models.training_data import samples_of

ARRAY = {FEATURES: "features", SUB_CATEGORIES: "assigned"}

pytestmark = pytest.mark.usefixtures("one_thread")


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
