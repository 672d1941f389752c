"""`wsss refine`: what fails, what is refused, and that nothing else suffers from it."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.cli import pictures, refine_jobs
from wsss_models.cli import refine as module

from tests.cli.refining import contents, label, make_set, refine

# --- pictures, maps, names --------------------------------------------------------------------------------------------


def test_broken_pictures_are_named_and_the_rest_is_finished(tmp_path, capsys):
    make_set(tmp_path, 8)
    images, cams = tmp_path / "images", tmp_path / "cams"
    (images / "p00.png").write_bytes(b"")
    (images / "p01.png").write_bytes((images / "p01.png").read_bytes()[:200])
    (cams / "p02.npz").unlink()
    np.savez(cams / "p03.npz", class_ids=[4, 4], cams=np.ones((2, 3, 3)))
    np.savez(cams / "p04.npz", class_ids=[21], cams=np.ones((1, 3, 3)))
    Image.new("RGB", (4, 4)).save(images / "p05.jpg")  # two pictures of one name
    assert refine(tmp_path, "--num-classes", "20") == 1
    captured = capsys.readouterr()
    for words in (
        "failed: p00: .*p00.png: the file is empty", "failed: p01: ", "failed: p02: .*p02.npz: no such file",
        "failed: p03: .*got 4 twice", "failed: p04: .*1..20, got 21",
            "failed: p05: 2 pictures of this name: p05.jpg, p05.png",
    ):  # fmt: skip
        assert re.search(words, captured.err), captured.err
    assert "2 written, 6 failed" in captured.out
    assert list(contents(tmp_path / "out")) == ["p06.png", "p07.png"]
    assert refine(tmp_path, "--num-classes", "20") == 1
    assert "0 written, 2 already done, 6 failed" in capsys.readouterr().out


def test_one_culprit_in_a_batch_does_not_take_the_others_along(tmp_path, capsys, monkeypatch):
    """The way of a GPU, on the CPU."""
    make_set(tmp_path, 6)
    assert refine(tmp_path, out="expected") == 0
    np.savez(tmp_path / "cams" / "p04.npz", class_ids=np.zeros(0, dtype=int), cams=np.zeros((0, 5, 6)))
    batches = []

    def fails_on_p03(batch, *rest):
        batches.append(len(batch))
        if any(item.job.name == "p03" for item in batch):
            raise RuntimeError("out of memory")
        return refine_jobs.refine_together(batch, *rest)

    class OnCpu:  # what the engine is given; the launcher sees another device
        type = "gpu"

    def as_on_a_gpu(pool, jobs, settings, arguments, device, failed):
        return batched(pool, jobs, settings, arguments, torch.device("cpu"), failed)

    batched = module._batched
    monkeypatch.setattr(pictures, "torch_device", lambda name: OnCpu())
    monkeypatch.setattr(module, "_batched", as_on_a_gpu)
    monkeypatch.setattr(module, "refine_together", fails_on_p03)
    assert refine(tmp_path, "--batch", "4") == 1
    captured = capsys.readouterr()
    assert "failed: p03: out of memory" in captured.err
    assert "5 written, 1 failed" in captured.out
    assert batches == [4, 1, 1, 1, 1, 2]
    for name in ("p00", "p01", "p02", "p05"):
        assert np.array_equal(label(tmp_path / "out" / f"{name}.png"), label(tmp_path / "expected" / f"{name}.png"))
    assert not label(tmp_path / "out" / "p04.png").any()


def test_strict_stops_at_the_first_failure(tmp_path, capsys):
    make_set(tmp_path, 12)
    (tmp_path / "images" / "p01.png").write_bytes(b"")
    assert refine(tmp_path, "--strict", "--workers", "1") == 1
    captured = capsys.readouterr()
    written = len(contents(tmp_path / "out"))
    assert "stopped at the first failure" in captured.err
    assert f"{written} written, 1 failed" in captured.out
    assert 1 <= written <= 4


def test_crafted_ids_write_nothing_outside(tmp_path, capsys):
    make_set(tmp_path / "in", 1)
    outside = tmp_path / "in" / "secret.png"
    Image.new("RGB", (4, 4)).save(outside)
    ids = [
        "../secret", "../../x", "/etc/passwd", f"{tmp_path}/x", "p00/../../x", "./p00", "..", ".", "p00/", "//p00",
        "..\\x", "C:\\x", "p00\0", "\x1b[2J", ".p00", "a/./b", "a/../p00", "a//b", "a/..", "x:/../../y", "missing",
    ]  # fmt: skip
    (tmp_path / "ids.txt").write_text("\n".join(["p00", *ids]))
    before = set(contents(tmp_path))
    assert refine(tmp_path / "in", "--ids", f"{tmp_path}/ids.txt", "--maps") == 1
    assert set(contents(tmp_path)) - before == {"in/out/p00.png", "in/out/p00.npz"}
    captured = capsys.readouterr()
    assert captured.err.count("failed: ") == len(ids)
    assert "\x1b" not in captured.err
    assert "\0" not in captured.err


def test_symlinks_out_of_the_folders(tmp_path, capsys):
    make_set(tmp_path, 3)
    (tmp_path / "elsewhere").mkdir()
    for folder, name in (("images", "p00.png"), ("cams", "p01.npz")):
        (tmp_path / folder / name).rename(tmp_path / "elsewhere" / name)
        (tmp_path / folder / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p02.png").symlink_to(tmp_path / "elsewhere" / "p00.png")
    before = contents(tmp_path / "elsewhere")
    assert refine(tmp_path) == 1
    assert capsys.readouterr().err.count("symlink leads out of") == 3
    assert contents(tmp_path / "elsewhere") == before


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "image,affinity", "--feats", "feats"], "a method that comes first"),
        (["--compare", "image"], "give --sheet FILE too"),
        (["--sheet", "s.png", "--compare", "magic"], "method must be one of"),
        (["--tile", "8"], "--tile must be at least 16"),
        (["--tile", "64", "--overlap", "33"], "--overlap must be in 0..32"),
        (["--tile", "64", "--overlap", "8", "--size", "cams"], "labels of the picture's size"),
        (["--method", "magic"], "method must be one of"),
        (["--method", ""], "method must be one of"),
        (["--background", "2"], "--background must be auto or a number"),
        (["--background", "nan"], "--background must be auto or a number"),
        (["--size", "0x4"], "--size must be"),
        (["--size", "large"], "--size must be"),
        (["--shard", "3/3"], "shard must be i/n"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--device", "tpu"], "--device must be"),
        (["--ids", "none.txt"], "none.txt"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, more, words):
    make_set(tmp_path, 1)
    assert refine(tmp_path, *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_folders(tmp_path, capsys):
    make_set(tmp_path, 1, feats=True)
    assert refine(tmp_path, out="images") == 2  # the labels would replace the pictures
    assert refine(tmp_path, out="images/labels") == 2
    assert refine(tmp_path, "--maps", f"{tmp_path}/cams") == 2
    assert refine(tmp_path / "nowhere") == 2
    assert refine(tmp_path, "--feats", f"{tmp_path}/feats", "--method", "image") == 2
    assert refine(tmp_path, "--feats", f"{tmp_path}/feats", "--tile", "256") == 2
    (tmp_path / "file").write_bytes(b"")
    assert refine(tmp_path, out="file") == 2
    assert capsys.readouterr().err.count("wsss refine: error: ") == 7
    assert sorted(contents(tmp_path)) == ["cams/p00.npz", "feats/p00.npy", "file", "images/p00.png"]
