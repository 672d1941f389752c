"""The generated set: the same files from the same seed, masks and labels that agree, parts that tell the classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from wsss_models.data import open_dataset, synth
from wsss_models.data.artefacts import FileError
from wsss_models.data.synth import MAX_CLASSES, MIN_CLASSES, Scenes, Settings, write_set

SMALL = {"height": 56, "width": 72}


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_a_set_on_disk_is_a_voc_folder(tmp_path):
    write_set(tmp_path / "s", Settings(20, classes=5, seed=2, val=0.3, **SMALL))
    train, val = open_dataset(tmp_path / "s", "train"), open_dataset(tmp_path / "s", "val")
    assert (len(train), len(val)) == (14, 6)
    assert not set(train.ids) & set(val.ids)
    assert train.kind == "voc"
    assert train.classes == ("alpha", "beta", "gamma", "delta", "epsilon")
    assert (train.labels().sum(axis=0) > 0).all()
    for pictures in (train, val):
        for i in range(len(pictures)):
            image, mask = pictures.image(i), pictures.mask(i)
            assert image.shape == (56, 72, 3)
            assert mask.shape == (56, 72)
            assert (np.flatnonzero(pictures.label(i)) + 1).tolist() == sorted(set(np.unique(mask)) - {0})


def test_what_is_on_disk_is_what_scenes_gives(tmp_path):
    settings = Settings(4, classes=3, seed=5, **SMALL)
    write_set(tmp_path / "s", settings)
    pictures, scenes = open_dataset(tmp_path / "s"), Scenes(settings)
    for i in range(4):
        image, mask, things = scenes[i]
        assert np.array_equal(pictures.image(i), image)
        assert np.array_equal(pictures.mask(i), mask)
        assert {thing.class_id for thing in things} == set(pictures.class_ids(i))


def test_the_same_settings_give_the_same_bytes(tmp_path):
    for name, settings in (
        ("a", Settings(6, classes=4, seed=7, **SMALL)),
        ("b", Settings(6, classes=4, seed=7, **SMALL)),
        ("c", Settings(6, classes=4, seed=8, **SMALL)),
    ):
        write_set(tmp_path / name, settings)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_a_picture_depends_on_seed_and_number_alone():
    few, many = Scenes(Settings(3, seed=1, **SMALL)), Scenes(Settings(300, seed=1, **SMALL))
    assert np.array_equal(many[2][0], few[2][0])
    few[0], few[1]
    assert np.array_equal(many[2][0], few[2][0])
    with pytest.raises(IndexError):
        few[3]


@pytest.mark.parametrize("classes", [MIN_CLASSES, 8, MAX_CLASSES])
def test_what_the_scenes_hold(classes):
    scenes = Scenes(Settings(120, classes=classes, seed=3, height=64, width=64))
    counts, occluded, truncated, shares, seen = [], 0, 0, [], set()
    for i in range(len(scenes)):
        image, mask, things = scenes[i]
        assert image.std() > 5
        assert things[0].class_id == i % classes + 1  # every class equally often
        counts.append(len(things))
        occluded += any(thing.occluded for thing in things)
        truncated += any(thing.truncated for thing in things)
        shares.append((mask > 0).mean())
        seen |= {thing.class_id for thing in things}
        for thing in things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 <= x1 < 64
            assert 0 <= y0 <= y1 < 64
            own = np.zeros_like(mask)
            own[y0 : y1 + 1, x0 : x1 + 1] = mask[y0 : y1 + 1, x0 : x1 + 1] == thing.class_id
            assert own[y0].any() and own[y1].any() and own[:, x0].any() and own[:, x1].any()
            assert own.sum() >= 20  # visible
    assert seen == set(range(1, classes + 1))
    assert {1, 2, 3} == set(counts)
    assert 1.3 < np.mean(counts) < 2
    assert occluded > 10
    assert truncated > 10
    assert 0.12 < np.mean(shares) < 0.45


def test_parts_have_a_colour_of_their_own():
    """1/K of the circle of hues apart."""
    colours = np.stack(Scenes(Settings(2, classes=20, seed=0))._colours)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1e3 * np.eye(20)
    assert distance.min() > 40


def test_an_interrupted_set_is_continued_and_a_complete_one_kept(tmp_path, monkeypatch):
    settings = Settings(5, classes=3, **SMALL)
    write_set(tmp_path / "whole", settings)
    root = tmp_path / "cut"

    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        if (root / "JPEGImages" / "synth_000002.png").exists():
            raise Stop

    with pytest.raises(Stop):
        write_set(root, settings, advance=stop)
    assert not (root / "ImageSets").exists()
    with pytest.raises(FileError, match="must be a new or empty folder"):
        write_set(root, Settings(6, classes=3, **SMALL))
    assert write_set(root, settings)
    assert digest(root) == digest(tmp_path / "whole")
    monkeypatch.setattr(synth, "Scenes", None)  # nothing is drawn any more
    assert not write_set(root, settings)


def test_folders_with_other_things_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileError, match="must be a new or empty folder"):
        write_set(tmp_path, Settings(4, classes=3))
    with pytest.raises(FileError, match="must be a new or empty folder"):
        write_set(tmp_path / "thesis.txt", Settings(4, classes=3))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": 1}, "images must be at least 2"),
        ({"classes": 2}, r"classes must be in 3\.\.20, got 2"),
        ({"classes": 21}, r"classes must be in 3\.\.20, got 21"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"height": 40}, r"size must be 48\.\.2048 pixels a side, got 40 x 112"),
        ({"val": 1.0}, "val must be a share"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"images": 10, **change})
