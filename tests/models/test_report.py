"""`wsss report`: the page of a small run folder, its numbers, what it must not hold, and what a browser draws."""

import json
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("lightning_fabric")
from PIL import Image
from wsss_models import report
from wsss_models.cli.main import COMMANDS, main
from wsss_models.data import open_dataset
from wsss_models.data.files import write_label, write_maps
from wsss_models.data.synth import Settings, write_set
from wsss_models.evaluate import evaluate_labels, evaluate_maps

from tests.models.pages import open_page

EVIL = "<b>bold</b>\"'&lt<script>alert(1)</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("report") / "set"
    write_set(root, Settings(20, 3, height=64, width=80, val=0.5))
    return root


@pytest.fixture
def make_run(data, tmp_path):
    """A run folder: the named outputs of the split val, shifted more from picture to picture."""

    def make(name="run", *, outputs=("cams", "refined", "labels", "segmentation"), system="affinitynet", shift=1):
        out, pictures = tmp_path / name, open_dataset(data, "val")
        rng = np.random.default_rng(shift)
        for i, key in enumerate(pictures.ids):
            label = np.roll(pictures.mask(i), shift * i, axis=1)
            ids = np.array(pictures.class_ids(i))
            maps = (label[None] == ids[:, None, None]) * 0.8 + 0.1 * rng.random((len(ids), *label.shape))
            for folder in outputs:
                if folder in ("cams", "refined"):
                    write_maps(out / folder / f"{key}.npz", ids, maps[:, ::4, ::4] if folder == "cams" else maps)
                else:
                    write_label(out / folder / f"{key}.png", label)
        rows = [row(pictures, out / folder, folder) for folder in outputs]
        results = {"system": system, "preset": "tiny", "seed": 3, "data": str(data), "rows": rows}
        out.mkdir(exist_ok=True)
        (out / "results.json").write_text(json.dumps({**results, "stages": {"classifier": 12.5, "deeplab": 7200}}))
        for training in ("classifier", "deeplab"):
            (out / training).mkdir()
            manifest = {"system": training, "seed": 3, "precision": "32-true", "versions": {"torch": "9.8.7"}}
            (out / training / "manifest.json").write_text(json.dumps(manifest))
            lines = [{"step": s, "rate": 0.1, "seg": 2 / s, "aux": 1 / s, "total": 3 / s} for s in range(1, 500)]
            (out / training / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 5')
        return out

    return make


def row(pictures, folder, stage):
    evaluate = evaluate_maps if stage in ("cams", "refined") else evaluate_labels
    result = evaluate(pictures, folder)
    names = ("background", *pictures.classes)
    per_class = dict(zip(names, (None if np.isnan(x) else x for x in result.confusion.iou().tolist()), strict=True))
    means = {"pictures": result.pictures, "miou": result.confusion.mean_iou(), "per_class": per_class}
    return {"stage": stage, "split": "val", **means, "note": ""}


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_of_a_run(make_run, data, tmp_path, capsys):
    out = make_run()
    assert main(["report", str(out), "--out", str(tmp_path / "page.html"), "--pictures", "6"]) == 0
    assert "written" in capsys.readouterr().out
    found, pictures = open_page(tmp_path / "page.html"), open_dataset(data, "val")
    for name in ("background", *pictures.classes, "affinitynet", "torch 9.8.7"):
        assert any(name in text for text in found.texts), name
    for entry in json.loads((out / "results.json").read_text())["rows"]:
        for value in (entry["miou"], *entry["per_class"].values()):
            assert value is None or f"{100 * value:.2f}" in found.texts
    assert found.tags.count("article") == 6
    assert found.tags.count("svg") == 2
    titles = {alt.partition(" of ")[0] for alt, _ in found.images()}
    assert titles == {"photograph", "CAM", "refined", "pseudo-label", "segmentation", "ground truth"}
    assert all(picture.size == (80, 64) for _, picture in found.images())
    assert not any("not in this run" in text and "segmentation" in text for text in found.texts)
    assert any(text == "not in this run: affinity" for text in found.texts)


def test_scores_are_those_of_evaluate(make_run, data):
    runs = report.read_runs([make_run()])
    pictures = open_dataset(data, "val")
    gallery = report.make_gallery(runs, pictures, 7)
    alone = {
        pictures.ids[i]: evaluate_labels(pictures, runs[0].path / "segmentation", numbers=[i]).confusion.mean_iou()
        for i in range(len(pictures))
    }
    order = sorted(alone, key=alone.get)
    assert [case.name for case in gallery.sections["Lowest scores"]] == order[:4]
    assert [case.name for case in gallery.sections["Highest scores"]] == order[:-4:-1]
    for cases in gallery.sections.values():
        for case in cases:
            assert case.scores == [alone[case.name]]
    whole = evaluate_labels(pictures, runs[0].path / "segmentation").confusion.mean_iou()
    assert gallery.scored == [f"segmentation, mean IoU {100 * whole:.2f} %"]


def test_several_runs(make_run, tmp_path):
    first = make_run("one", outputs=("cams", "labels"))
    second = make_run("two", outputs=("cams", "refined", "segmentation"), system="irnet", shift=2)
    page = tmp_path / "page.html"
    assert main(["report", str(first), str(second), "--out", str(page), "--pictures", "3"]) == 0
    found = open_page(page)
    for name in ("affinitynet", "irnet", "affinitynet (labels, val)", "irnet (segmentation, val)"):
        assert name in found.texts
    alts = [alt.partition(" of ")[0] for alt, _ in found.images()]
    assert {title: alts.count(title) for title in set(alts)} == {
        "photograph": 3,
        "ground truth": 3,
        "CAM": 6,
        "refined": 3,
        "pseudo-label": 3,
        "segmentation": 3,
    }
    assert found.texts.count("none of this picture") == 9
    for path in (first, second):
        for entry in json.loads((path / "results.json").read_text())["rows"]:
            assert f"{100 * entry['miou']:.2f}" in found.texts


@pytest.mark.parametrize(
    ("refiner", "missing"),
    [
        ("irnet", ["affinity"]),
        ("image,crf", ["refined"]),
        ("none", []),
        ("mcic", []),
        (None, ["affinity", "refined"]),
    ],
)
def test_what_a_refiner_does_without_is_not_missing(make_run, refiner, missing):
    out = make_run(outputs=("cams",))
    results = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(results if refiner is None else {**results, "refiner": refiner}))
    (run,) = report.read_runs([out])
    assert run.missing == [*missing, "labels", "segmentation"]


def test_names_of_runs_differ(make_run):
    paths = [make_run("one", outputs=("labels",)), make_run("two", outputs=("labels",))]
    assert [run.name for run in report.read_runs(paths)] == ["affinitynet one", "affinitynet two"]


@pytest.mark.parametrize("outputs", [(), ("cams",), ("refined", "labels")])
def test_any_subset_of_stages(make_run, tmp_path, outputs):
    out = make_run(outputs=outputs)
    shutil.rmtree(out / "classifier")
    (out / "deeplab" / "manifest.json").unlink()
    assert main(["report", str(out), "--out", str(tmp_path / "page.html"), "--pictures", "2"]) == 0
    found = open_page(tmp_path / "page.html")
    absent = [name for name in ("cams", "refined", "labels", "segmentation") if name not in outputs]
    assert f"not in this run: {', '.join(['classifier', 'affinity', *absent])}" in found.texts
    assert found.tags.count("article") == 2
    assert len(found.images()) == 2 * (2 + len(outputs))
    assert found.tags.count("svg") == 1


def test_nothing_but_results(tmp_path):
    (tmp_path / "results.json").write_text('{"rows": []}')
    assert main(["report", str(tmp_path)]) == 0
    texts = open_page(tmp_path / "report.html").texts
    assert "results.json has no row." in texts
    assert "No training log in this run." in texts
    assert any(text.startswith("no pictures: ") for text in texts)


def test_names_are_text(tmp_path):
    root, out = tmp_path / "set", tmp_path / "run"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    name = "<i>x & 'y'"
    Image.fromarray(np.full((30, 40, 3), 90, dtype=np.uint8)).save(root / "images" / f"{name}.png")
    write_label(root / "masks" / f"{name}.png", np.ones((30, 40), dtype=np.uint8))
    (root / "labels.csv").write_text("file,classes\n" + f'"{name}","{EVIL.replace(chr(34), 2 * chr(34))}"\n')
    (root / "classes.txt").write_text(f"{EVIL}\n")
    write_label(out / "labels" / f"{name}.png", np.ones((30, 40), dtype=np.uint8))
    entry = {"stage": EVIL, "split": EVIL, "pictures": 1, "miou": 1.0, "per_class": {EVIL: 0.25}, "note": EVIL}
    results = {"system": EVIL, "preset": EVIL, "seed": EVIL, "data": str(root), "rows": [entry], "stages": {EVIL: 1.0}}
    (out / "results.json").write_text(json.dumps(results))
    (out / EVIL.replace("/", "")).mkdir()
    (out / EVIL.replace("/", "") / "manifest.json").write_text(json.dumps({"system": EVIL, "versions": {EVIL: EVIL}}))
    (out / EVIL.replace("/", "") / "log.jsonl").write_text(json.dumps({"step": 1, EVIL: 1.0}))
    for runs in ([out], [out, out]):
        assert main(["report", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
        text = (tmp_path / "page.html").read_text()
        found = open_page(tmp_path / "page.html")
        assert "<script" not in text.lower() and "<i>" not in text
        assert "<b>bold" not in text and "<b><b" not in text
        assert sum(EVIL in text for text in found.texts) >= 8
        assert any(alt == f"photograph of {name}" for alt, _ in found.images())


def test_a_gallery_a_split(make_run, data, tmp_path):
    """As `wsss run` leaves it: maps of train, two segmentations of val."""
    out, train, val = make_run(outputs=("segmentation",)), open_dataset(data, "train"), open_dataset(data, "val")
    (out / "segmentation").rename(tmp_path / "mean")
    for name in ("mean", "crf"):
        shutil.copytree(tmp_path / "mean", out / "segmentation" / name)
    for i, key in enumerate(train.ids):
        write_label(out / "labels" / f"{key}.png", np.roll(train.mask(i), i, axis=0))
    results = json.loads((out / "results.json").read_text())
    rows = [row(train, out / "labels", "labels") | {"split": "train"}, *results["rows"]]
    (out / "results.json").write_text(json.dumps({**results, "rows": rows}))
    assert main(["report", str(out), "--pictures", "5"]) == 0
    found = open_page(out / "report.html")
    assert "Split train" in found.texts and "Split val" in found.texts
    names = {
        name: [alt for alt, _ in found.images() if alt.startswith(f"{name} of ")] for name in report.OUTPUTS.values()
    }
    assert [len(names[name]) for name in ("CAM", "pseudo-label", "segmentation", "segmentation, CRF")] == [0, 3, 2, 2]
    assert all(alt.partition(" of ")[2] in val.ids for alt in names["segmentation"])
    assert all(alt.partition(" of ")[2] in train.ids for alt in names["pseudo-label"])
    assert "none of this picture" not in found.texts


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_of_any_size_without_truth(tmp_path):
    root, out = tmp_path / "set", tmp_path / "run"
    (root / "images").mkdir(parents=True)
    sizes = {"wide": (40, 1000), "tall": (900, 30), "dot": (1, 1)}
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)).save(root / "images" / f"{name}.png")
        write_label(out / "labels" / f"{name}.png", rng.integers(0, 2, size))
        write_maps(out / "cams" / f"{name}.npz", np.array([1]), rng.random((1, 3, 5)))
    (root / "labels.csv").write_text("file,classes\nwide,cat\ntall,cat\ndot,\n")
    (root / "classes.txt").write_text("cat\n")
    (out / "results.json").write_text(json.dumps({"system": "x", "data": str(root), "rows": []}))
    assert main(["report", str(out)]) == 0
    found = open_page(out / "report.html")
    by_name = {alt: picture.size for alt, picture in found.images()}
    assert by_name["photograph of wide"] == (320, 13)
    assert by_name["photograph of tall"] == (11, 320)
    assert by_name["pseudo-label of dot"] == by_name["CAM of dot"] == (1, 1)
    assert found.texts.count("no ground truth") == 3
    assert any(text.startswith("Without a score") for text in found.texts)


def test_damaged_files_are_named(make_run, data, tmp_path, capsys):
    out, pictures = make_run(), open_dataset(data, "val")
    (out / "segmentation" / f"{pictures.ids[0]}.png").write_bytes(b"no picture")
    (out / "cams" / f"{pictures.ids[1]}.npz").write_bytes(b"no archive")
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 1
    printed = capsys.readouterr().out
    for number in (0, 1):
        assert f"failed: {pictures.ids[number]}" in printed
    found = open_page(tmp_path / "page.html")
    assert found.tags.count("article") == len(pictures)
    assert found.texts.count("cannot be read") == 2


def test_data_that_moved(make_run, data, tmp_path, capsys):
    out = make_run()
    results = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps({**results, "data": str(tmp_path / "gone")}))
    assert main(["report", str(out)]) == 0
    assert "--data says where" in capsys.readouterr().out
    assert "article" not in open_page(out / "report.html").tags
    assert main(["report", str(out), "--data", str(data), "--split", "val", "--pictures", "1"]) == 0
    assert open_page(out / "report.html").tags.count("article") == 1
    assert main(["report", str(out), "--data", str(data), "--pictures", "0"]) == 0
    assert "article" not in open_page(out / "report.html").tags


def test_size_of_a_page(tmp_path):
    """24 noisy pictures of six panels, as large as a thumbnail gets."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (120, 160, 3)).astype(np.uint8)).resize((640, 480))
    panel = report.jpeg(report.reduced(np.asarray(noise)))
    assert 24 * 6 * len(panel) < 10e6


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("{", "must be JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "rows must be a list of objects"),
        ('{"rows": [1]}', "rows must be a list of objects"),
        ('{"rows": [{"per_class": 3}]}', "per_class must be an object, got 3"),
        ('{"rows": [{"miou": "high"}]}', "miou must be a number or null, got 'high'"),
        ('{"rows": [], "stages": 3}', "stages must be an object, got 3"),
    ],
)
def test_results_that_cannot_be_used(tmp_path, capsys, content, reason):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/results.json: " in error and reason in error
    assert not (tmp_path / "report.html").exists()


def test_refusals(make_run, data, tmp_path, capsys):
    out = make_run()
    for arguments, reason in (
        ([tmp_path / "nowhere"], f"{tmp_path}/nowhere: no such folder"),
        ([out / "results.json"], "results.json: not a folder"),
        ([out, "--pictures", "-1"], "--pictures must be at least 0, got -1"),
        ([out, "--split", "nights"], "nights"),
        ([out, "--data", tmp_path], "must hold JPEGImages"),
        ([out, "--out", data], "--out must be a file that can be written"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert reason in capsys.readouterr().err
    other = make_run("other")
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "data": "elsewhere"}))
    assert main(["report", str(out), str(other)]) == 2
    assert "the runs must be of one set of pictures" in capsys.readouterr().err


def test_the_command_is_listed():
    assert "report" in COMMANDS


# --- logs -------------------------------------------------------------------------------------------------------------


def test_log_is_read_as_written(make_run):
    curves = report.read_log(make_run() / "deeplab" / "log.jsonl")
    assert list(curves) == ["seg", "aux", "total"]
    assert curves["seg"][:2] == [(1.0, 2.0), (2.0, 1.0)] and len(curves["seg"]) == 499


def test_total_of_one_term_is_that_term(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "cls": 0.5, "total": 0.5}\n{"step": 2, "cls": NaN}\nnonsense\n')
    assert report.read_log(tmp_path / "log.jsonl") == {"cls": [(1.0, 0.5)]}


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_in_a_browser(make_run, tmp_path):
    """A headless browser draws the page: the policy lets style and pictures through."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH ({', '.join(BROWSERS)})")
    out, shot = make_run(), tmp_path / "page.png"
    assert main(["report", str(out), "--pictures", "2"]) == 0
    options = ["--headless", "--window-size=900,2400", f"--screenshot={shot}"]
    if "firefox" in browser:
        options = ["--headless", "--window-size", "900,2400", "--screenshot", str(shot), "--profile", str(tmp_path)]
    else:
        options += ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    address = (out / "report.html").as_uri()
    done = subprocess.run([browser, *options, address], capture_output=True, timeout=120, check=False)
    assert shot.is_file(), done.stderr.decode(errors="replace")[-2000:]
    drawn = np.asarray(Image.open(shot).convert("RGB"))
    assert drawn.shape[1] == 900
    for colour in ("#f6f7f9", "#d7e6fb"):  # a card, a bar: the style sheet was used
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(drawn.astype(int) - wanted).max(axis=2) <= 2).sum() > 100, colour
    photographs = drawn.reshape(-1, 3)
    assert len(np.unique(photographs, axis=0)) > 5000  # pictures were drawn; a page of text has a few hundred colours
