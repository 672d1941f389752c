"""`wsss run`: every stage, one table, the same numbers after being killed, and what it refuses."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
from wsss_models.cli import run
from wsss_models.cli.main import main
from wsss_models.cli.results import Row, of_labels, table
from wsss_models.cli.run_plan import networks_of, plan_of
from wsss_models.data.dataset import open_dataset
from wsss_models.data.masks import read_mask
from wsss_models.data.synth import Settings, write_set
from wsss_models.evaluate import Confusion

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["epochs=10", "batch_size=8", "crop=48", "width=8"]  # 3 steps an epoch
NAMES = ["background", "alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_set(root, Settings(32, 3, 1, 48, 52, 0.25))
    return root


def words(system, scenes, out, *more):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    shared = ["--data", f"{scenes}", "--out", f"{out}", "--preset", "tiny", "--device", "cpu", "--workers", "0"]
    return ["run", system, *shared, "--scales", "1", *settings, *more]


def results(out):
    return json.loads((out / "results.json").read_text())


def killed(arguments, reached, seconds=60):
    """Start the command in a process of its own and kill it the moment `reached()` holds."""
    root = Path(__file__).parents[2]
    paths = [f"{root}", f"{root / 'python'}", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "wsss_models", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + seconds
        while not reached():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < end, "never came that far"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_run_ends_with_the_same_numbers(scenes, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(words("classifier", scenes, whole)) == 0
    printed = capsys.readouterr().out
    arguments = words("classifier", scenes, part)
    killed(arguments, lambda: lines(part / "classifier" / "log.jsonl") >= 8)
    assert not (part / "cams").exists()
    killed(arguments, lambda: lines(part / "deeplab" / "log.jsonl") >= 17)
    assert lines(part / "classifier" / "log.jsonl") == 30
    assert not (part / "results.json").exists()
    assert main(arguments) == 0
    assert "steps" in capsys.readouterr().out
    first, second = results(whole), results(part)
    assert first["rows"] == second["rows"]
    assert list(second["stages"]) == list(first["stages"])
    for folder in ("cams", "labels", "refined", "segmentation/mean", "segmentation/crf"):
        files = sorted(path.name for path in (whole / folder).iterdir())
        assert len(files) == (8 if folder.startswith("seg") else 24)
        if folder != "cams" and folder != "refined":
            assert all((whole / folder / n).read_bytes() == (part / folder / n).read_bytes() for n in files)
    rows = {row["stage"]: row for row in first["rows"]}
    assert list(rows) == ["CAM best", "CAM free", "refined best", "refined free", "labels", "deeplab", "deeplab+CRF"]
    assert [row["split"] for row in first["rows"]] == ["train"] * 5 + ["val"] * 2
    assert [row["pictures"] for row in first["rows"]] == [24] * 5 + [8] * 2
    assert all(f"{100 * row['miou']:.2f}" in printed for row in first["rows"])
    assert list(rows["labels"]["per_class"]) == NAMES
    for name, split, folder in (("labels", "train", "labels"), ("deeplab+CRF", "val", "segmentation/crf")):
        pictures, counts = open_dataset(scenes, split), Confusion(3)
        for i, picture in enumerate(pictures.ids):
            counts.add(pictures.mask(i), read_mask(whole / folder / f"{picture}.png"))
        assert rows[name]["miou"] == counts.mean_iou()
    assert {k: first[k] for k in ("system", "preset", "seed", "data", "refiner")} == {
        "system": "classifier",
        "preset": "tiny",
        "seed": 0,
        "data": f"{scenes}",
        "refiner": "image",
    }
    stages = ["classifier", "cams", "labels", "deeplab", "segmentation"]
    assert list(first["stages"]) == stages and min(first["stages"].values()) >= 0
    capsys.readouterr()
    assert main(arguments) == 0  # nothing left to do, the same table
    again = capsys.readouterr()
    assert "24 already done" in again.out and again.out.count("0 steps") == 2
    assert results(part) == second
    assert main([*arguments, "--refiner", "crf"]) == 2
    assert "another refiner" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["affinitynet", "irnet"])
def test_systems_with_a_network_of_affinities(scenes, tmp_path, capsys, system):
    more = [word for setting in ("classifier.epochs=3", "affinity.epochs=2") for word in ("--set", setting)]
    more += ["--set", "deeplab.epochs=2", "--set", "deeplab.version=v3plus"]
    assert main(words(system, scenes, tmp_path / "out", *more)) == 0
    assert "new tensors: none" in capsys.readouterr().out or system == "irnet"
    found = results(tmp_path / "out")
    assert [row["stage"] for row in found["rows"]] == [
        "CAM best",
        "CAM free",
        "refined",
        "labels",
        "deeplab",
        "deeplab+CRF",
    ]
    assert found["refiner"] == system
    assert found["rows"][2]["per_class"] == found["rows"][3]["per_class"]
    assert [lines(tmp_path / "out" / s / "log.jsonl") for s in ("classifier", "affinity", "deeplab")] == [9, 6, 6]
    manifest = json.loads((tmp_path / "out" / "deeplab" / "manifest.json").read_text())
    assert manifest["config"]["version"] == "v3plus"
    manifest = json.loads((tmp_path / "out" / "classifier" / "manifest.json").read_text())
    assert manifest["system"] == {"affinitynet": "affinitynet", "irnet": "classifier"}[system]


@pytest.mark.parametrize("system", ["puzzlecam", "vwe"])
def test_systems_that_are_classifiers(scenes, tmp_path, capsys, system):
    more = ["--set", "epochs=1", "--refiner", "none"]
    assert main(words(system, scenes, tmp_path / "out", *more)) == 0
    branches = ["CAM words", "CAM maximum"] if system == "vwe" else []
    found = results(tmp_path / "out")
    maps = [f"{stage} {how}" for stage in ("CAM", *branches) for how in ("best", "free")]
    assert [row["stage"] for row in found["rows"]] == [*maps, "labels", "deeplab", "deeplab+CRF"]
    if system == "vwe":
        rows = {row["stage"]: row["miou"] for row in found["rows"]}
        assert len({rows[f"{stage} best"] for stage in ("CAM", *branches)}) == 3
    manifest = json.loads((tmp_path / "out" / "classifier" / "manifest.json").read_text())
    assert manifest["system"] == system
    training = tmp_path / "out" / "classifier"
    arguments = ["cams", "--run", f"{training}", "--data", f"{scenes}", "--out", f"{tmp_path / 'out' / 'cams'}"]
    capsys.readouterr()
    assert main([*arguments, "--split", "train", "--workers", "0"]) == 0  # the same settings as those of the run
    assert "24 already done" in capsys.readouterr().out
    assert main([*arguments, "--branch", "edges"]) == 2
    message = "--branch must be one of convolution, words, maximum" if branches else "--branch must be left out"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "which", "affinity", "segmentation"),
    [
        ("puzzlecam", "published", ("irnet", "puzzlecam-published"), "v3plus"),
        ("puzzlecam", "tiny", ("irnet", "puzzlecam-tiny"), "tiny"),
        ("vwe", "vwl-m", ("irnet", "resnet101"), "published"),
        ("vwe", "tiny-m", ("irnet", "tiny"), "tiny"),
    ],
)
def test_the_stages_after_a_preset(scenes, tmp_path, system, which, affinity, segmentation):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    arguments = parser.parse_args([system, f"--data={scenes}", f"--out={tmp_path / 'out'}", f"--preset={which}"])
    train, val = open_dataset(scenes, "train"), open_dataset(scenes, "val")
    assert networks_of(plan_of(arguments, train, val)) == {
        "classifier": (system, which),
        "affinity": affinity,
        "deeplab": ("deeplab", segmentation),
    }


@pytest.mark.parametrize("refiner", ["none", "image,crf"])
def test_refiners_of_pictures(scenes, tmp_path, refiner):
    more = ["--set", "epochs=1", "--refiner", refiner]
    assert main(words("classifier", scenes, tmp_path / "out", *more)) == 0
    found = results(tmp_path / "out")
    assert ("refined best" in [row["stage"] for row in found["rows"]]) == (refiner != "none")
    if refiner == "none":
        rows = {row["stage"]: row for row in found["rows"]}
        assert rows["labels"]["miou"] == pytest.approx(rows["CAM free"]["miou"], abs=0.03)


def test_refusals(scenes, tmp_path, capsys, monkeypatch):
    for more, message in (
        (["--refiner", "irnet,crf"], "stand alone"),
        (["--set", "affinity.epochs=1"], "no stage affinity"),
        (["--set", "deeplab.epoch=1"], "did you mean epochs"),
        (["--preset", "huge"], "preset must be one of"),
        (["--refiner", "affinitynet", "--preset", "resnet101"], "no preset with the backbone resnet101"),
        (["--val-split", "nothing"], "nothing"),
    ):
        assert main([*words("classifier", scenes, tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main(words("deeplab", scenes, tmp_path / "out")) == 2
    assert "system must be one of" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words("classifier", scenes, tmp_path / "out")) == 2
    assert "wsss run is one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_splits_and_masks(folder, tmp_path, capsys):
    more = ["--set", "epochs=1", "--set", "batch_size=2", "--refiner", "image"]
    assert main(words("classifier", folder, tmp_path / "out", *more)) == 0
    text = capsys.readouterr().out
    assert "No picture has a mask" in text and "segmentation: " in text
    for part in ("labels", "segmentation/mean", "segmentation/crf"):
        assert {path.stem for path in (tmp_path / "out" / part).glob("*.png")} == {*open_dataset(folder).ids}
    assert {row["split"] for row in results(tmp_path / "out")["rows"]} == {"all"}


def test_splits_of_other_names_are_asked_for(folder, tmp_path, capsys):
    (folder / "learn.txt").write_text("p0\np1\np2\np3\n")
    assert main(words("classifier", folder, tmp_path / "out")) == 2
    assert "split must be one of learn, got 'train'" in capsys.readouterr().err
    (folder / "look.txt").write_text("p4\np5\n")
    assert main(words("classifier", folder, tmp_path / "out", "--split", "learn")) == 2
    assert "split must be one of learn, look, got 'val'" in capsys.readouterr().err


def test_a_failed_picture_stops_the_run(scenes, tmp_path, capsys):
    pictures = open_dataset(scenes, "val")
    path = pictures.image_path(2)
    kept = path.read_bytes()
    arguments = [*words("classifier", scenes, tmp_path / "out"), "--set", "epochs=1", "--refiner", "none"]
    try:
        path.write_bytes(b"no picture")
        assert main(arguments) == 1
    finally:
        path.write_bytes(kept)
    printed = capsys.readouterr()
    assert "wsss segment named pictures that failed" in printed.out and pictures.ids[2] in printed.err
    assert main(arguments) == 0
    assert len(results(tmp_path / "out")["rows"]) == 5


def test_a_split_without_masks_is_told_apart(folder, tmp_path):
    pictures = open_dataset(folder)
    row = of_labels("labels", pictures, tmp_path, "note")
    assert row == Row("labels", "all", 0, None, dict.fromkeys(["background", "ant", "bee", "cat"]), row.note)
    assert "no masks" in row.note
    text = "\n".join(table([row, Row("x", "val", 3, 0.5, {**row.per_class, "bee": 0.25}, "")]))
    assert "25.00" in text and "50.00" in text and np.char.count(text, "-") >= 5
