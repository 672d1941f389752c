"""`wsss data` and `wsss evaluate`: what they print, write and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.cli.main import main
from wsss_models.data import open_dataset
from wsss_models.data.files import write_label, write_maps
from wsss_models.evaluate import Confusion


@pytest.fixture
def made(tmp_path, capsys) -> Path:
    arguments = ["--images", "12", "--classes", "3", "--seed", "4", "--size", "48", "64", "--val", "0.25"]
    assert main(["data", "synth", str(tmp_path / "set"), *arguments]) == 0
    assert "9 pictures in train, 3 in val, 3 classes, 48 x 64 pixels" in capsys.readouterr().out
    return tmp_path / "set"


def test_a_broken_pipe_of_a_worker_is_a_fault():
    code = """
from wsss_models.cli import data
from wsss_models.cli.main import main
def run(arguments):
    raise BrokenPipeError("worker")
data.run = run
main(["data", "check", "."])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: worker\n")


def check(root: Path, capsys, *more: str) -> tuple[int, str]:
    code = main(["data", "check", str(root), *more])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


# --- synth ------------------------------------------------------------------------------------------------------------


def test_synth_again_has_nothing_to_do(made, capsys):
    arguments = ["--images", "12", "--classes", "3", "--seed", "4", "--size", "48", "64", "--val", "0.25"]
    assert main(["data", "synth", str(made), *arguments]) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "2"], "classes must be in 3..20, got 2"),
        (["--images", "1"], "images must be at least 2"),
        (["--size", "10", "10"], "size must be 48..2048 pixels a side, got 10 x 10"),
        ([], "must be a new or empty folder"),
    ],
)
def test_synth_refuses(made, capsys, arguments, message):
    assert main(["data", "synth", str(made), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_without_an_action_is_refused(capsys):
    assert main(["data"]) == 2
    assert "action" in capsys.readouterr().err


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_of_a_sound_set(made, capsys):
    code, out = check(made, capsys)
    assert code == 0
    assert "PASCAL VOC, 3 classes" in out
    assert "train 9, trainval 12, val 3" in out
    assert "12 of 12 can be read, 48 x 64" in out
    assert "masks      12" in out
    assert "problems   none" in out
    labels = open_dataset(made).labels().sum(axis=0)
    for name, count in zip(("alpha", "beta", "gamma"), labels, strict=True):
        line = next(line for line in out.splitlines() if name in line)
        assert line.split()[2:4] == [f"{count:.0f}", f"{count:.0f}"]
    code, out = check(made, capsys, "--split", "val")
    assert code == 0
    assert "3 of 3 can be read" in out


def test_check_names_what_is_wrong(made, capsys):
    ids = open_dataset(made).ids
    (made / "JPEGImages" / f"{ids[0]}.png").write_bytes(b"no picture")
    (made / "JPEGImages" / f"{ids[1]}.png").unlink()
    (made / "Annotations" / f"{ids[2]}.xml").unlink()
    xml = made / "Annotations" / f"{ids[3]}.xml"
    xml.write_text(xml.read_text().replace("<name>", "<name>x"))
    write_label(made / "SegmentationClass" / f"{ids[4]}.png", np.full((48, 64), 7))
    write_label(made / "SegmentationClass" / f"{ids[5]}.png", np.ones((40, 64), dtype=int))
    (made / "SegmentationClass" / f"{ids[6]}.png").unlink()
    with (made / "ImageSets" / "Segmentation" / "train.txt").open("a") as file:
        file.write(f"{ids[11]}\nunknown\n")
    (made / "ImageSets" / "Segmentation" / "test.txt").write_text("a\na\n")
    code, out = check(made, capsys)
    assert code == 1
    assert "10 of 11 can be read" in out
    for expected in (
        f"{ids[0]}.png: no picture of a known format",
        f"split train: no picture or label of '{ids[1]}'",
        "split train: no picture or label of 'unknown'",
        f"{ids[2]}.xml: no such annotation",
        f"{ids[3]}.xml: line 5: class must be one of alpha, beta, gamma, got 'x",
        f"{ids[4]}.png: mask must hold 0..3 and 255, got 7",
        f"{ids[5]}.png: the mask must have the picture's size, got 40 x 64 for a picture of 48 x 64",
        "test.txt: line 2: each id must appear once, got 'a' again (line 1)",
        "1 pictures are in both train and val",
    ):
        assert expected in out
    assert "masks      9" in out  # of 11: one cannot be used, one is missing


def test_check_prints_the_first_problems_or_all(made, capsys):
    for name in open_dataset(made).ids:
        (made / "Annotations" / f"{name}.xml").write_text("")
        (made / "SegmentationClass" / f"{name}.png").write_bytes(b"")
    code, out = check(made, capsys)
    assert code == 1
    assert "problems   24" in out
    assert "and 4 more (--all prints them)" in out
    assert check(made, capsys, "--all")[1].count("\n  ") > out.count("\n  ")


def test_check_of_ones_own_folder(made, capsys, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (made / "JPEGImages").rename(own / "images")
    pictures = sorted(path.name for path in (own / "images").iterdir())
    rows = [f"{name},{'train' if i else 'val'},{'cat' if i % 2 else ''}" for i, name in enumerate(pictures)]
    (own / "labels.csv").write_text("file,split,classes\n" + "\n".join(rows) + "\n")
    code, out = check(own, capsys)
    assert code == 0
    assert "pictures and a table of labels, 1 classes" in out
    assert "val 1, train 11" in out
    assert "0.50 classes a picture, 6 without any class" in out
    assert "masks      none" in out
    assert "no line in the table" not in out
    (own / "images" / pictures[0]).rename(own / "images" / "new.png")
    code, out = check(own, capsys)
    assert code == 1
    assert f"{pictures[0]}: No such file" in out
    assert "1 pictures have no line in the table, such as 'new'" in out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--split", "vall"], "split must be one of train, trainval, val, got 'vall'"),
        (["--masks", "nowhere"], "no such folder of masks"),
        (["--labels", "nowhere.csv"], "no such file"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_check_refuses(made, capsys, more, message):
    code, out = check(made, capsys, *more)
    assert code == 2
    assert message in out
    assert "Traceback" not in out


def test_check_of_no_set(tmp_path, capsys):
    code, out = check(tmp_path, capsys)
    assert code == 2
    assert "must hold JPEGImages (PASCAL VOC)" in out


# --- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate(root: Path, capsys, *more: str) -> tuple[int, str, str]:
    code = main(["evaluate", "--data", str(root), *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_evaluate_labels(made, capsys, tmp_path):
    pictures = open_dataset(made, "val")
    expected = Confusion(3)
    for i, name in enumerate(pictures.ids):
        truth = pictures.mask(i)
        found = truth.copy()
        found[:20] = 0
        expected.add(truth, found)
        found[:5] = 255  # counts as background
        write_label(tmp_path / "labels" / f"{name}.png", found)
    file = tmp_path / "out" / "r.json"
    code, out, _ = evaluate(made, capsys, "--split", "val", "--labels", f"{tmp_path}/labels", "--json", str(file))
    assert code == 0
    assert "val: 3 of 3 pictures" in out
    assert f"{100 * expected.mean_iou():.2f}" in next(line for line in out.splitlines() if "mean IoU" in line)
    assert "960 pixels predicted 255 are counted as background" in out
    report = json.loads(file.read_text())
    assert report["labels"]["confusion"] == expected.counts.tolist()
    assert report["labels"]["mean_iou"] == expected.mean_iou()
    assert report["classes"] == ["background", "alpha", "beta", "gamma"]
    assert (report["split"], report["pictures"], report["failed"]) == ("val", 3, [])


def test_evaluate_maps(made, capsys, tmp_path):
    pictures = open_dataset(made)
    for i, name in enumerate(pictures.ids):
        ids = pictures.class_ids(i)
        maps = np.stack([pictures.mask(i) == c for c in ids]).astype(np.float32)
        write_maps(tmp_path / "cams" / f"{name}.npz", np.array(ids), maps * 0.5)
    file = tmp_path / "r.json"
    code, out, _ = evaluate(made, capsys, "--cams", f"{tmp_path}/cams", "--thresholds", "10", "--json", str(file))
    assert code == 0
    assert "all pictures: 12 of 12 pictures" in out
    assert "label-free: each picture's threshold from its maps alone" in out
    assert "oracle: the one threshold (0) that is best with the masks known" in out
    report = json.loads(file.read_text())
    assert report["oracle"]["mean_iou"] == 1
    assert report["label_free"]["mean_iou"] == 1
    assert [entry["threshold"] for entry in report["sweep"]] == [i / 10 for i in range(10)]
    code, out, err = evaluate(made, capsys, "--cams", f"{tmp_path}/cams", "--shard", "1/5")
    assert code == 0
    assert "3 of 3 pictures (shard 1/5)" in out
    (tmp_path / "cams" / f"{pictures.ids[3]}.npz").write_bytes(b"PK")
    code, out, err = evaluate(made, capsys, "--cams", f"{tmp_path}/cams")
    assert code == 1
    assert "11 of 12 pictures, 1 failed" in out
    assert f"failed: {pictures.ids[3]}" in err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--labels", "nowhere"], "--labels must be a folder, got nowhere"),
        (["--cams", "nowhere"], "--cams must be a folder"),
        (["--labels", ".", "--cams", "."], "not allowed with"),
        ([], "one of the arguments --labels --cams is required"),
        (["--labels", ".", "--split", "vall"], "split must be one of"),
        (["--labels", ".", "--shard", "3/3"], "shard must be i/n"),
        (["--labels", ".", "--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_evaluate_refuses(made, capsys, more, message):
    code, _, err = evaluate(made, capsys, *more)
    assert code == 2
    assert message in err


def test_evaluate_without_masks_says_so(made, capsys):
    for path in (made / "SegmentationClass").iterdir():
        path.unlink()
    code, _, err = evaluate(made, capsys, "--labels", str(made))
    assert code == 2
    assert "none of the 12 pictures" in err


def test_check_of_coco_reads_every_split(tmp_path, capsys):
    for split in ("train2014", "val2014"):
        (tmp_path / split).mkdir()
        Image.fromarray(np.zeros((8, 10, 3), dtype=np.uint8)).save(tmp_path / split / "a.png")
        box = {"id": 1, "image_id": 1, "category_id": 2, "area": 16, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
        content = {
            "categories": [{"id": 2, "name": "<cat>"}],
            "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 10}],
            "annotations": [box],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    code, out = check(tmp_path, capsys)
    assert code == 0
    assert "COCO, 1 classes" in out
    assert "train2014:" in out
    assert "val2014:" in out
    assert out.count("   1 <cat>               1        1     20.00") == 2  # 16 of 80 pixels
    (tmp_path / "train2014" / "a.png").unlink()
    code, out = check(tmp_path, capsys)
    assert code == 1
    assert "a.png: No such file" in out
