"""Files that are written: complete or not at all, the same bytes for the same input, nothing stale."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.data import artefacts, files
from wsss_models.data.palette import voc_palette


def test_palette_is_that_of_voc():
    palette = voc_palette()
    assert palette[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len({tuple(c) for c in palette.tolist()}) == 256


def test_label_png(tmp_path):
    label = np.array([[0, 15, 255], [1, 254, 20]])
    files.write_label(tmp_path / "sub" / "a.png", label, settings='{"a": 1}')
    with Image.open(tmp_path / "sub" / "a.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), label)
        assert image.getpalette()[:768] == voc_palette().flatten().tolist()
    assert artefacts.png_settings(tmp_path / "sub" / "a.png") == '{"a": 1}'
    for bad in (
        np.zeros((2, 2)),
        np.zeros(4, dtype=int),
        np.full((2, 2), 256),
        np.full((2, 2), -1),
        np.zeros((0, 3), dtype=int),
    ):
        with pytest.raises(ValueError, match="label must be"):
            files.write_label(tmp_path / "b.png", bad)


def test_same_input_gives_the_same_bytes(tmp_path, monkeypatch):
    for name in ("a.npz", "b.npz"):
        files.write_maps(tmp_path / name, np.array([4]), np.ones((1, 3, 3)), settings="x")
        monkeypatch.setattr("time.time", lambda: 2e9)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for ids, cams in (
        ([1], np.ones((2, 3, 3))),
        ([1], np.full((1, 1, 1), 1e6)),
        ([1], np.full((1, 1, 1), np.nan)),
        ([0], np.ones((1, 2, 2))),
    ):
        with pytest.raises(ValueError, match="must be"):
            files.write_maps(tmp_path / "c.npz", np.array(ids), cams)


def test_no_cut_or_changed_file_counts_as_complete(tmp_path):
    files.write_label(tmp_path / "a.png", np.arange(64).reshape(8, 8), settings="s")
    files.write_maps(tmp_path / "a.npz", np.array([1]), np.random.default_rng(0).random((1, 8, 8)), settings="s")
    for name, settings in (("a.png", artefacts.png_settings), ("a.npz", artefacts.npz_settings)):
        whole = (tmp_path / name).read_bytes()
        for cut in range(0, len(whole), 3):
            (tmp_path / f"cut-{name}").write_bytes(whole[:cut])
            assert settings(tmp_path / f"cut-{name}") is None
    whole = (tmp_path / "a.png").read_bytes()
    for at in range(len(whole)):
        (tmp_path / "b.png").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert artefacts.png_settings(tmp_path / "b.png") is None
    assert artefacts.png_settings(tmp_path / "none.png") is None


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    artefacts.write_atomically(tmp_path / "a", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artefacts.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_symlink_in_the_place_of_the_output_is_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    artefacts.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert not (tmp_path / "a").is_symlink()


def test_stale_parts_go_and_living_ones_stay(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = artefacts._host()
    dead = tmp_path / f".wsss-{host}-{gone.pid}-0.part"
    living = tmp_path / "sub" / f".wsss-{host}-{os.getppid()}-0.part"
    elsewhere, old = tmp_path / ".wsss-otherhost-1-0.part", tmp_path / ".wsss-otherhost-2-0.part"
    living.parent.mkdir()
    for path in (dead, living, elsewhere, old):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert artefacts.remove_stale(tmp_path) == 2
    assert [path.exists() for path in (dead, living, elsewhere, old)] == [False, True, True, False]
