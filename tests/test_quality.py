"""`python -m benchmarks quality`: its numbers, re-derived, on a folder made here."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from benchmarks import quality


@pytest.fixture
def folder(tmp_path):
    """Three pictures of a coloured disc and seeds at its edge, in VOC layout."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass", "cams"):
        (tmp_path / name).mkdir()
    for i in range(3):
        ys, xs = np.mgrid[:60, :80]
        disc = (ys - 30) ** 2 + (xs - 40) ** 2 < 20**2
        picture = np.where(disc[..., None], (210, 60, 40), (40, 90, 160)) + rng.integers(-6, 7, (60, 80, 3))
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "JPEGImages" / f"a{i}.jpg", quality=95)
        truth = np.where(disc, 3 + i, 0).astype(np.uint8)
        truth[:2] = quality.IGNORE
        Image.fromarray(truth).save(tmp_path / "SegmentationClass" / f"a{i}.png")
        cams = np.zeros((1, 6, 8), dtype=np.float32)
        cams[0, 2:4, 2:4] = 1
        np.savez(tmp_path / "cams" / f"a{i}.npz", class_ids=[3 + i], cams=cams)
    return tmp_path


def test_refined_labels_win(folder, capsys):
    assert quality.main(["--data", f"{folder}", "--json", "--picture", f"{folder}/all.png", "--methods", "image"]) == 0
    seeds, image = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (seeds["method"], image["method"], image["images"], image["wins"]) == ("(seeds)", "image", 3, 3)
    assert image["label_free"] > 85 > 75 > seeds["best"]
    with Image.open(folder / "all.png") as page:
        assert page.width == 14 + 4 * (240 + 14) and page.height > 3 * 180


def test_mean_iou_by_hand():
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2, 255])
    label = torch.tensor([0, 0, 1, 5, 1, 0, 2, 2])  # class 5 is not in the ground truth
    ious = (2 / 5, 1 / 3, 1 / 1)
    assert quality.mean_iou(quality.confusion(truth, label)) == pytest.approx(100 * sum(ious) / 3)


def test_all_thresholds_at_once():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 2, 9, 7, generator=generator)
    truth = torch.tensor([0, 4, 9, 255])[torch.randint(0, 4, (9, 7), generator=generator)]
    ids = torch.tensor([9, 4])
    counts = quality.sweep_confusion(truth, maps, ids)
    score, index = (maps[0] / maps.max()).max(dim=0)
    for i in (0, 20, 50, 98):
        label = torch.where(score > quality.THRESHOLDS[i], ids[index], 0)
        assert torch.equal(counts[i], quality.confusion(truth, label))
    none = quality.sweep_confusion(truth, maps[:, :0], ids[:0])
    assert torch.equal(none[3], quality.confusion(truth, torch.zeros_like(truth)))


def test_wrong_arguments(folder, capsys):
    assert quality.main(["--data", f"{folder}", "--seeds", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert quality.main(["--data", f"{folder}/cams"]) == 2
    assert "must hold JPEGImages/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main(["--data", f"{folder}", "--methods", "magic"])
