"""`wsss demo`: the picture, the seeds, the comparison."""

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from wsss_models import visualise
from wsss_models.cli import demo
from wsss_models.cli.demo_scenes import CREDITS, SCENES
from wsss_models.cli.main import main

import wsss_kernels as wk

# By eye on the photographs, (x, y): on the object away from every stroke, and off it; area in pixels, roughly.
MARKS = {
    "astronaut": (
        [(180, 90), (60, 350), (200, 480), (450, 470), (330, 270)],
        [(120, 60), (20, 250), (380, 100), (460, 300), (330, 100)],
        115_000,
    ),
    "rocket": (
        [(322, 165), (322, 235), (322, 310), (322, 370)],
        [(280, 200), (200, 250), (450, 300), (322, 100), (60, 100)],
        6_000,
    ),
    "cameraman": (
        [(60, 250), (30, 350), (130, 350), (130, 450), (260, 110)],
        [(300, 60), (60, 100), (400, 300), (300, 400), (450, 180)],
        80_000,
    ),
    "cup, saucer and spoon": (
        [(100, 220), (200, 350), (450, 220), (280, 260), (240, 170)],
        [(50, 200), (550, 100), (500, 350), (100, 60), (60, 350)],
        105_000,
    ),
    "cat": (
        [(60, 150), (200, 80), (300, 60), (150, 240), (215, 100)],
        [(15, 50), (430, 60), (440, 200), (400, 150)],
        95_000,
    ),
}


def photograph_of(scene):
    return demo._rgb(getattr(pytest.importorskip("skimage.data"), scene.photograph)())


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.thing)
def test_seeds_are_weak_and_labels_follow_the_object(scene):
    photograph = photograph_of(scene)
    drawn = demo.draw_strokes(scene.strokes, photograph.shape[:2])
    seed = demo.stroke_seed(drawn)
    assert seed.max() == 1
    assert seed.min() >= 0
    assert seed.shape[1] == -(-photograph.shape[0] // 16)
    if scene.thing not in MARKS:  # the failure, and it must be said
        assert scene.note.startswith("A failure")
        return
    inside, outside, area = MARKS[scene.thing]
    assert drawn.sum() < 0.1 * area
    assert not any(drawn[y, x] for x, y in inside)
    maps = wk.refine_cams(seed, torch.from_numpy(photograph).permute(2, 0, 1), method="image", size="feats")
    label = wk.labels_from_maps(maps)
    assert [int(label[y, x]) for x, y in inside] == [1] * len(inside)
    assert [int(label[y, x]) for x, y in outside] == [0] * len(outside)
    assert 0.6 * area < (label > 0).sum() < 1.5 * area


def test_every_photograph_is_credited():
    assert {scene.photograph for scene in SCENES} == set(CREDITS)


@pytest.mark.native
def test_demo_writes_one_picture_and_ends_with_its_path(tmp_path, capsys):
    pytest.importorskip("skimage")
    out = tmp_path / "demo.png"
    assert main(["demo", "--no-dense", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out)
    assert any("public domain" in line for line in lines)
    assert all(any(line.startswith(scene.thing) and " ms" in line for line in lines) for scene in SCENES)
    with Image.open(out) as image:
        assert image.mode == "RGB"
        assert image.width > 1200
        assert image.height > 1500


def test_dense_walk_is_the_random_walk():
    affinity = wk.local_affinity(torch.rand(1, 4, 9, 11))
    maps = torch.rand(1, 2, 9, 11)
    for squarings in (0, 3, 8):
        dense = demo.dense_walk(maps, affinity, squarings=squarings)
        ours = wk.reference.random_walk(maps, affinity, steps=2**squarings)
        torch.testing.assert_close(dense, ours, atol=1e-5, rtol=0)


@pytest.mark.native
def test_comparison_is_silent_about_time_when_the_results_differ(monkeypatch):
    monkeypatch.setattr(demo, "DENSE_GRID", (12, 16))
    photograph = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert "times faster" in demo._against_dense(photograph)
    monkeypatch.setattr(demo, "dense_walk", lambda maps, affinity: maps)
    assert "no time is compared" in demo._against_dense(photograph)


def test_click(tmp_path, capsys):
    picture = np.full((60, 80, 3), (40, 90, 200), dtype=np.uint8)
    picture[20:40, 30:60] = (220, 180, 40)
    Image.fromarray(picture).save(tmp_path / "a.png")
    out = tmp_path / "out" / "click.png"
    assert (
        main(["demo", "--image", f"{tmp_path}/a.png", "--point", "40,30", "--point", "55,35", "--out", str(out)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out)
    assert "a Gaussian of 2.0 pixels" in lines[0]
    assert out.stat().st_size > 1000


def test_point_seed_by_hand():
    seed = demo.point_seed([(3, 1)], (5, 40))  # 40 / 40 = 1 pixel of standard deviation
    assert seed.shape == (1, 5, 40)
    assert seed[0, 1, 3] == 1
    assert seed[0, 1, 5].item() == pytest.approx(np.exp(-2))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--point", "1,2"], 2, "go together"),
        (["--image", "a.png"], 2, "go together"),
        (["--image", "a.png", "--point", "one"], 2, "must be X,Y"),
        (["--image", "{}/a.png", "--point", "80,2"], 2, "must lie in the picture (0..79, 0..59), got 80,2"),
        (["--image", "{}/a.png", "--point", "nan,2"], 2, "must lie in the picture"),
        (["--image", "{}/none.png", "--point", "1,2"], 1, "none.png"),
        (["--out", "{}"], 2, "must be a file"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, code, words):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    assert main(["demo", *(a.format(tmp_path) for a in arguments)]) == code
    captured = capsys.readouterr()
    assert words in captured.err + captured.out


def test_without_scikit_image(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main(["demo", "--out", f"{tmp_path}/a.png"]) == 2
    assert capsys.readouterr().err == 'wsss demo needs skimage: pip install "wsss-kernels[demo]"\n'


def test_overlays_by_hand():
    grey = np.full((2, 2, 3), 100, dtype=np.uint8)
    maps = np.array([[[0, 1], [np.nan, 2]]])
    glow = visualise.overlay_maps(grey, maps, [(200, 0, 0)])
    assert glow.tolist() == [[[100] * 3, [185, 15, 15]], [[100] * 3, [185, 15, 15]]]
    label = np.zeros((40, 40), dtype=np.int64)
    label[10:30, 10:30] = 1
    label[0, 0] = 255
    out = visualise.overlay_label(np.full((40, 40, 3), 100, dtype=np.uint8), label, [(200, 0, 0)])
    assert out[0, 0].tolist() == [55, 55, 55] == out[5, 5].tolist()
    assert out[20, 20].tolist() == [145, 55, 55]
    assert out[10, 20].tolist() == [200, 0, 0]


def test_sheet_holds_every_panel():
    panel = np.full((30, 40, 3), 7, dtype=np.uint8)
    page = np.array(
        visualise.sheet(
            "title", ["a", "b"], [visualise.Row("row", "a long note " * 20, [panel, panel])], ["end"], width=80
        )
    )
    assert (page == 7).all(axis=2).sum() == 2 * 80 * 60
