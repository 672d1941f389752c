"""COCO folders: instances as labels and masks, outlines in every form, and whatever a json may hold."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.data import open_dataset
from wsss_models.data.artefacts import FileError
from wsss_models.data.coco_masks import outline_mask, polygon_mask, unpacked

RNG = np.random.default_rng(0)


def coco(root: Path, **changes) -> Path:
    """Categories 3 and 90; a large dog under a small cat, a crowd, and a picture of nothing."""
    box = [0.0, 0.0, 6.0, 0.0, 6.0, 4.0, 0.0, 4.0]  # 6 wide, 4 high
    small = [1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0]
    crowd = {"size": [8, 10], "counts": [0, 16, 64]}  # the first two columns
    content = {
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 7, "file_name": "n7.jpg", "height": 8, "width": 10},
            {"id": 5, "file_name": "n5.jpg", "height": 8, "width": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "area": 4, "segmentation": [small]},
            {"id": 2, "image_id": 7, "category_id": 90, "area": 24, "segmentation": [box]},
            {"id": 3, "image_id": 7, "category_id": 3, "area": 16, "iscrowd": 1, "segmentation": crowd},
        ],
        **changes,
    }
    for folder in ("val2014", "annotations"):
        (root / folder).mkdir()
    for name in ("n5", "n7"):
        Image.fromarray(RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(root / "val2014" / f"{name}.jpg")
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    return root


def test_coco(tmp_path):
    pictures = open_dataset(coco(tmp_path))
    assert pictures.kind == "coco"
    assert pictures.split == "val2014"
    assert pictures.classes == ("cat", "dog")  # in the order of the categories' ids
    assert pictures.ids == ("n5", "n7")
    assert pictures.labels().tolist() == [[0, 0], [1, 1]]
    assert pictures.image(1).shape == (8, 10, 3)
    assert pictures.mask(0).max() == 0
    expected = np.zeros((8, 10), dtype=np.uint8)
    expected[:, :2] = 1  # the crowd, below all
    expected[:4, :6] = 2
    expected[1:3, 1:3] = 1  # the small one above the large one
    assert np.array_equal(pictures.mask(1), expected)
    part = pictures.subset([1])
    assert np.array_equal(part.mask(0), expected)
    assert part.class_ids(0) == [1, 2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": [{"id": 7, "file_name": "../x.jpg", "height": 8, "width": 10}]}, "image .* must have"),
        ({"images": [{"id": 7}]}, "must have id, file_name, height and width"),
        ({"annotations": [{"id": 4, "image_id": 9, "category_id": 3}]}, "annotation 4: image_id must be that of"),
        ({"annotations": [{"id": 4, "image_id": 7, "category_id": 4}]}, "annotation 4: unknown category_id 4"),
        ({"categories": None}, "got no categories"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, changes, message):
    with pytest.raises(FileError, match=r"instances_val2014\.json: .*" + message):
        open_dataset(coco(tmp_path, **changes))


def test_coco_outlines_and_splits_that_are_refused(tmp_path):
    bad = [{"id": 4, "image_id": 7, "category_id": 3, "segmentation": {"size": [8, 10], "counts": [5, 5]}}]
    pictures = open_dataset(coco(tmp_path, annotations=bad))
    with pytest.raises(FileError, match=r"annotation 4: segmentation cannot be used .*sum to 80"):
        pictures.mask(1)
    with pytest.raises(FileError, match="split must be one of val2014, got 'train2014'"):
        open_dataset(tmp_path, "train2014")
    with pytest.raises(ValueError, match="classes and labels must be None"):
        open_dataset(tmp_path, classes=["cat"])
    (tmp_path / "annotations" / "instances_val2014.json").write_text("{\n\n]")
    with pytest.raises(FileError, match="line 3: no valid JSON"):
        open_dataset(tmp_path)


def test_coco_packed_runs_by_hand():
    """COCO's own example [0 0 1 1 1 0 1] is the runs 2 3 1 1; the last is kept as 1 - 3 = -2, which packs to 'N'."""
    assert unpacked("231N") == [2, 3, 1, 1]
    assert unpacked(b"231N") == [2, 3, 1, 1]
    packed = outline_mask({"size": [7, 1], "counts": "231N"}, 7, 1)
    assert packed[:, 0].tolist() == [False, False, True, True, True, False, True]
    assert unpacked("P2") == [64]  # 64 = 0 + 2 * 32: low bits 0 with "more" is 80 = P, then 2


def test_coco_packed_runs_against_a_packer():
    runs = RNG.integers(0, 5000, 60).tolist()
    text = ""
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        while True:
            bits, x = x & 31, x >> 5
            more = x != -1 if bits & 16 else x != 0
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    assert unpacked(text) == runs


def test_polygons_against_the_rule_point_by_point():
    def inside(polygon: np.ndarray, y: float, x: float) -> bool:
        odd = False
        points = polygon.reshape(-1, 2)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                odd = not odd
        return odd

    for corners in (3, 4, 7, 12):
        polygon = RNG.uniform(-4, 24, 2 * corners)
        found = polygon_mask(polygon, 17, 21)
        expected = [[inside(polygon, y + 0.5, x + 0.5) for x in range(21)] for y in range(17)]
        assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="three or more finite points"):
        polygon_mask(np.zeros(4), 5, 5)


def read_all(root: Path) -> None:
    try:
        pictures = open_dataset(root)
    except FileError:
        return
    for i in range(len(pictures)):
        for read in (pictures.image, pictures.label, pictures.mask):
            with contextlib.suppress(FileError):
                read(i)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_is_more_than_a_message(tmp_path):
    """400 times three bytes changed, or the end cut off."""
    path = coco(tmp_path) / "annotations" / "instances_val2014.json"
    content = path.read_bytes()
    for _ in range(400):
        changed = bytearray(content)
        for place in RNG.integers(0, len(content), 3):
            changed[place] = RNG.integers(256)
        path.write_bytes(changed if RNG.random() < 0.7 else changed[: RNG.integers(len(content))])
        read_all(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_no_json_is_more_than_a_message(tmp_path):
    """Any value anywhere in COCO's json."""
    path = coco(tmp_path) / "annotations" / "instances_val2014.json"
    content = path.read_text()
    odd = (None, True, -1, 10**30, 1.5, float("nan"), "x", "../x", [], {}, [[1]], {"size": [8, 10], "counts": "\xff"})
    for item in ("categories", "images", "annotations"):
        for value in odd:
            changed = json.loads(content)
            keys = [(i, key) for i, entry in enumerate(changed[item]) for key in entry]
            for i, key in keys:
                changed = json.loads(content)
                changed[item][i][key] = value
                path.write_text(json.dumps(changed))
                read_all(tmp_path)
            changed[item][0] = value
            path.write_text(json.dumps(changed))
            read_all(tmp_path)
            changed[item] = value
            path.write_text(json.dumps(changed))
            read_all(tmp_path)
