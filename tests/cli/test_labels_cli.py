"""`wsss labels`: the engine's label rules over folders, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.cli.main import main
from wsss_models.data import files

import wsss_kernels as wk

SIZES = ((24, 33), (31, 20))
IDS = [7, 3]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Discs of one colour with a coarse map of each of two classes; the third picture has no class."""
    rng = np.random.default_rng(0)
    for name in ("images", "cams"):
        (tmp_path / name).mkdir()
    for i in range(3):
        height, width = SIZES[i % 2]
        ys, xs = np.mgrid[:height, :width]
        disc = (ys - height / 2) ** 2 + (xs - width / 2) ** 2 < (min(height, width) / 3) ** 2
        picture = np.where(disc[..., None], (220, 60, 40), (30, 90, 60)) + rng.integers(-9, 10, (height, width, 3))
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        cams = np.zeros((2, 5, 6), np.float32)
        cams[0, 1:4, 2:4], cams[1, 0, 0] = (2, 1, 0.5)[i], 0.7
        np.savez(tmp_path / "cams" / f"{i}.npz", class_ids=IDS if i < 2 else [], cams=cams if i < 2 else cams[:0])
    return tmp_path


def make(folder: Path, *more: str) -> int:
    inputs = ["--images", f"{folder}/images", "--cams", f"{folder}/cams", "--out", f"{folder}/out"]
    return main(["labels", *inputs, *more])


def expected(folder: Path, name: str, rule) -> np.ndarray:
    picture = torch.from_numpy(files.read_picture(folder / "images" / f"{name}.png")).permute(2, 0, 1)
    cams = torch.from_numpy(files.read_maps(folder / "cams" / f"{name}.npz")[1])
    maps = F.interpolate(cams[None], picture.shape[-2:], mode="bilinear", align_corners=False)[0]
    table = torch.full((256,), 255)
    table[:3] = torch.tensor([0, *IDS])
    return table[rule(picture, maps)].numpy()


def of_peaks(make_labels, **options):
    return lambda picture, maps: make_labels(picture, maps / maps.amax((1, 2), keepdim=True), **options)


RULES = {
    "maps": lambda picture, maps: wk.labels_from_maps(maps),
    "maps --background 0.4 --ignore 0.2 0.4": lambda picture, maps: wk.labels_from_maps(
        maps / maps.max(), background=0.4, ignore=(0.2, 0.4)
    ),
    "confident": of_peaks(wk.confident_labels),
    "confident --fg 0.4 --bg 0.1": of_peaks(wk.confident_labels, fg=0.4, bg=0.1),
    "affinity": of_peaks(wk.affinity_labels),
    "affinity --low 2 --high 24": of_peaks(wk.affinity_labels, low=2, high=24),
}


@pytest.mark.parametrize("words", RULES)
def test_labels_are_those_of_the_engine(folder, capsys, words):
    assert make(folder, "--rule", *words.split()) == 0
    assert "3 written, 0 failed" in capsys.readouterr().out
    for i in range(2):
        with Image.open(folder / "out" / f"{i}.png") as label:
            assert label.mode == "P"
            assert np.array_equal(np.array(label), expected(folder, str(i), RULES[words]))
    assert not np.array(Image.open(folder / "out" / "2.png")).any()


def test_done_is_kept_and_other_settings_are_made_again(folder, capsys):
    assert make(folder, "--rule", "confident") == 0
    assert make(folder, "--rule", "confident", "--fg", "0.30") == 0
    assert "0 written, 3 already done" in capsys.readouterr().out
    assert make(folder, "--rule", "confident", "--fg", "0.4") == 0
    assert "3 written, 0 failed" in capsys.readouterr().out


def test_a_damaged_picture_is_named_and_the_rest_finished(folder, capsys):
    (folder / "images" / "1.png").write_bytes(b"\x89PNG")
    assert make(folder) == 1
    captured = capsys.readouterr()
    assert "failed: 1: " in captured.out + captured.err and "2 written, 1 failed" in captured.out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--rule maps --fg 0.3", "--fg is no option of --rule maps, which has --background, --ignore"),
        ("--rule affinity --ignore 0.1 0.2", "--ignore is no option of --rule affinity"),
        ("--rule confident --fg 0.1 --bg 0.2", "bg must be <= fg"),
        ("--rule affinity --low 0", "low must be a number > 0"),
        ("--ignore 0.5 0.2", "ignore must be"),
        ("--background 2", "--background must be auto or a number in 0..1"),
        ("--rule best", "invalid choice: 'best'"),
        ("--workers 0", "--workers must be at least 1"),
    ],
)
def test_refusals(folder, capsys, words, message):
    assert make(folder, *words.split()) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()
