"""`wsss refine`: what it writes, what it refuses, and what a crash leaves behind."""

import errno
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.cli import pictures, refine_jobs
from wsss_models.cli import refine as module
from wsss_models.cli.main import main
from wsss_models.data import artefacts, files

import wsss_kernels as wk

SIZES = ((40, 56), (56, 40), (33, 47), (48, 48))


def make_set(root: Path, count: int = 6, feats: bool = False, seed: int = 0) -> Path:
    """Small pictures of a bright disc, a coarse map on it, and features."""
    rng = np.random.default_rng(seed)
    for name in ("images", "cams", "feats"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        ys, xs = np.mgrid[:height, :width]
        disc = (ys - height / 2) ** 2 + (xs - width / 2) ** 2 < (min(height, width) / 3) ** 2
        picture = np.where(disc[..., None], (220, 60, 40), (30, 90, 60)) + rng.integers(-9, 10, (height, width, 3))
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"p{i:02d}.png")
        cams = rng.random((2, 5, 6)).astype(np.float32) * 0.1
        cams[0, 2:3, 2:4] = 1
        np.savez(root / "cams" / f"p{i:02d}.npz", class_ids=[5 + i, 2], cams=cams)
        if feats:
            maps = np.stack([disc[::4, ::4], ~disc[::4, ::4]]).astype(np.float32)
            np.save(root / "feats" / f"p{i:02d}.npy", 1e3 * maps + rng.random(maps.shape).astype(np.float32))
    return root


def refine(root: Path, *more: str, out: str = "out") -> int:
    return main(["refine", "--images", f"{root}/images", "--cams", f"{root}/cams", "--out", f"{root}/{out}", *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def label(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


# --- what it does -----------------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_engine(tmp_path, capsys):
    make_set(tmp_path)
    threads = torch.get_num_threads()
    assert refine(tmp_path, "--maps") == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "method image" in printed
    assert "no --feats given" in printed
    assert "6 written, 0 failed" in printed
    for i in range(6):
        picture = torch.from_numpy(files.read_picture(tmp_path / "images" / f"p{i:02d}.png")).permute(2, 0, 1)
        class_ids, cams = files.read_maps(tmp_path / "cams" / f"p{i:02d}.npz")
        maps = wk.refine_cams(torch.from_numpy(cams), picture, method="image", size="feats")
        expected = wk.labels_from_maps(maps, class_ids=class_ids.tolist())
        written = label(tmp_path / "out" / f"p{i:02d}.png")
        assert np.array_equal(written, expected.numpy())
        assert written.shape == SIZES[i % 4]
        read_ids, read = files.read_maps(tmp_path / "out" / f"p{i:02d}.npz")
        assert read_ids.tolist() == [5 + i, 2]
        assert np.abs(read - maps.numpy()).max() < 1e-3
        with np.load(tmp_path / "out" / f"p{i:02d}.npz", allow_pickle=False) as npz:
            assert npz["cams"].dtype == np.float16


def test_labels_follow_the_object(tmp_path):
    make_set(tmp_path, 1)
    assert refine(tmp_path) == 0
    written = label(tmp_path / "out" / "p00.png")
    ys, xs = np.mgrid[:40, :56]
    disc = (ys - 20) ** 2 + (xs - 28) ** 2 < (40 / 3) ** 2
    assert ((written == 5) & disc).sum() / ((written == 5) | disc).sum() > 0.9


def test_features_are_used_with_the_picture_as_guide(tmp_path, capsys):
    make_set(tmp_path, 3, feats=True)
    assert refine(tmp_path, "--feats", f"{tmp_path}/feats", "--maps", f"{tmp_path}/maps") == 0
    assert "method affinity (--feats given; the picture is the guide)" in capsys.readouterr().out
    picture = torch.from_numpy(files.read_picture(tmp_path / "images" / "p01.png")).permute(2, 0, 1)
    _, cams = files.read_maps(tmp_path / "cams" / "p01.npz")
    feats = torch.from_numpy(files.read_features(tmp_path / "feats" / "p01.npy"))
    maps = wk.refine_cams(torch.from_numpy(cams), feats, guide=picture, size="guide")
    assert np.abs(files.read_maps(tmp_path / "maps" / "p01.npz")[1] - maps.numpy()).max() < 1e-3


def test_a_chain_starts_on_the_features(tmp_path):
    make_set(tmp_path, 1, feats=True)
    more = ("--feats", f"{tmp_path}/feats", "--method", "affinity,image", "--maps")
    picture = torch.from_numpy(files.read_picture(tmp_path / "images" / "p00.png")).permute(2, 0, 1)
    cams = torch.from_numpy(files.read_maps(tmp_path / "cams" / "p00.npz")[1])
    feats = torch.from_numpy(files.read_features(tmp_path / "feats" / "p00.npy"))
    first = wk.refine_cams(cams, feats, guide=picture, size="guide")
    for size, shape in (("image", (40, 56)), ("cams", (5, 6)), ("20x30", (20, 30))):
        assert refine(tmp_path, *more, "--size", size, out=f"out-{size}") == 0
        written = files.read_maps(tmp_path / f"out-{size}" / "p00.npz")[1]
        assert written.shape == (2, *shape)
        if size == "image":
            expected = wk.refine_cams(first, picture, method="image", size="feats")
            assert np.abs(written - expected.numpy()).max() < 1e-3


def test_affinity_without_features_walks_on_colours(tmp_path):
    make_set(tmp_path, 1)
    assert refine(tmp_path, "--method", "affinity") == 0
    assert refine(tmp_path, "--method", "image", out="other") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_bands_beyond_three_are_walked_on(tmp_path):
    """The object shows in the fifth band only."""
    make_set(tmp_path, 1)
    (tmp_path / "images" / "p00.png").unlink()
    ys, xs = np.mgrid[:40, :56]
    disc = (ys - 20) ** 2 + (xs - 28) ** 2 < (40 / 3) ** 2
    bands = np.random.default_rng(0).normal(300, 2, (5, 40, 56)).astype(np.float32)
    bands[4] += 40 * disc
    np.save(tmp_path / "images" / "p00.npy", bands)
    for more in ((), ("--tile", "48", "--overlap", "8")):
        assert refine(tmp_path, *more, out=f"out{len(more)}") == 0
        written = label(tmp_path / f"out{len(more)}" / "p00.png")
        assert ((written == 5) & disc).sum() / ((written == 5) | disc).sum() > 0.85


@pytest.mark.parametrize("tile, overlap", [(24, 8), (32, 16), (40, 0)])
def test_tiles(tmp_path, tile, overlap):
    """A picture of one tile is refined as without; of several, nearly as the whole."""
    make_set(tmp_path, 4)
    assert refine(tmp_path, "--maps") == 0
    assert refine(tmp_path, "--maps", "--tile", "64", "--overlap", "8", out="one") == 0
    assert refine(tmp_path, "--maps", "--tile", f"{tile}", "--overlap", f"{overlap}", out="many") == 0
    for name in ("p00", "p01", "p02", "p03"):
        whole, one, many = (files.read_maps(tmp_path / out / f"{name}.npz")[1] for out in ("out", "one", "many"))
        assert np.abs(one - whole).max() < 2e-3
        assert many.max() == 1 and many.shape == whole.shape
        labels = [label(tmp_path / out / f"{name}.png") for out in ("out", "one", "many")]
        assert (labels[0] == labels[1]).mean() > 0.995
        assert (labels[0] == labels[2]).mean() > 0.9


def test_sheet(tmp_path, capsys):
    make_set(tmp_path, 3)
    (tmp_path / "images" / "p01.png").write_bytes(b"")
    np.savez(tmp_path / "cams" / "p02.npz", class_ids=np.zeros(0, dtype=int), cams=np.zeros((0, 5, 6)))
    more = ("--sheet", f"{tmp_path}/sheet.png", "--compare", "image,image", "--compare", "affinity")
    assert refine(tmp_path, *more) == 1
    assert "2 pictures on the sheet" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.width == 14 + 4 * (320 + 14)  # photograph, seed, image, image + image; affinity is image here
        colours = {colour for _, colour in page.convert("RGB").getcolors(1 << 24)}
    assert tuple(files.voc_palette()[5]) in colours  # the outline of class 5
    assert refine(tmp_path, *more) == 1  # nothing left to refine, and the sheet again
    assert "2 pictures on the sheet" in capsys.readouterr().out


def test_batch_workers_and_shards_change_no_byte(tmp_path):
    make_set(tmp_path, 9)
    assert refine(tmp_path, "--maps", "--batch", "1", "--workers", "1") == 0
    assert refine(tmp_path, "--maps", "--batch", "4", "--workers", "3", out="b") == 0
    for i in range(4):
        assert refine(tmp_path, "--maps", "--shard", f"{i}/4", out="c") == 0
        assert len(list((tmp_path / "c").glob("*.png"))) == sum(len(range(j, 9, 4)) for j in range(i + 1))
    assert len(contents(tmp_path / "out")) == 18
    assert contents(tmp_path / "out") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_batch_gives_the_labels_of_its_pictures(tmp_path):
    """What a GPU run does, on the CPU: the list goes to the engine at once."""
    make_set(tmp_path, 8)
    read = [files.read_maps(tmp_path / "cams" / f"p{i:02d}.npz")[1] for i in range(8)]
    cams = [torch.from_numpy(c) for c in read]
    pictures = [
        torch.from_numpy(files.read_picture(tmp_path / "images" / f"p{i:02d}.png")).permute(2, 0, 1) for i in range(8)
    ]
    together = wk.labels_from_maps(wk.refine_cams(cams, pictures, method="image", size="feats"))
    for cam, picture, whole in zip(cams, pictures, together, strict=True):
        assert torch.equal(wk.labels_from_maps(wk.refine_cams(cam, picture, method="image", size="feats")), whole)


def test_options(tmp_path):
    make_set(tmp_path, 2)
    assert refine(tmp_path, "--size", "20x30", "--background", "0.5") == 0
    assert label(tmp_path / "out" / "p00.png").shape == (20, 30)
    few = (label(tmp_path / "out" / "p00.png") > 0).mean()
    assert refine(tmp_path, "--size", "cams", "--background", "0.0", "--method", "image,image") == 0
    assert label(tmp_path / "out" / "p00.png").shape == (5, 6)
    assert (label(tmp_path / "out" / "p00.png") > 0).mean() > few
    (tmp_path / "ids.txt").write_text("p01\n")
    assert refine(tmp_path, "--ids", f"{tmp_path}/ids.txt", out="one") == 0
    assert list(contents(tmp_path / "one")) == ["p01.png"]


def test_subfolders_and_a_picture_without_classes(tmp_path):
    make_set(tmp_path, 1)
    for name, suffix in (("images", ".png"), ("cams", ".npz")):
        (tmp_path / name / "train").mkdir()
        (tmp_path / name / f"p00{suffix}").rename(tmp_path / name / "train" / f"x{suffix}")
    np.savez(tmp_path / "cams" / "train" / "x.npz", class_ids=np.zeros(0, dtype=int), cams=np.zeros((0, 5, 6)))
    assert refine(tmp_path, "--maps") == 0
    assert not label(tmp_path / "out" / "train" / "x.png").any()
    assert files.read_maps(tmp_path / "out" / "train" / "x.npz")[1].shape == (0, 40, 56)


def test_maps_of_zeros_and_negative_maps(tmp_path):
    make_set(tmp_path, 2)
    np.savez(tmp_path / "cams" / "p00.npz", class_ids=[3], cams=np.zeros((1, 4, 4)))
    np.savez(tmp_path / "cams" / "p01.npz", class_ids=[3], cams=-np.ones((1, 4, 4)))
    assert refine(tmp_path, "--maps") == 0
    assert not label(tmp_path / "out" / "p00.png").any()
    assert not label(tmp_path / "out" / "p01.png").any()


# --- what fails -------------------------------------------------------------------------------------------------------


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


def test_command_itself(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wsss {wk.__version__}\n"
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert main(["--help"]) == 0
    assert main(["refine", "--help"]) == 0
    capsys.readouterr()

    def missing(name):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr("importlib.import_module", missing)
    assert main(["refine", "--images", "x"]) == 2
    assert capsys.readouterr().err == 'wsss refine needs PIL: pip install "wsss-kernels[cli]"\n'


def test_threads_that_wait_sleep(monkeypatch):
    """OpenMP reads that when torch is loaded: it must be said before, and what the user says stays."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    code = "import os, sys; from wsss_models.cli.main import main; main(['--help']); "
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "passive False"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "wsss_models", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout == f"wsss {wk.__version__}\n"


# --- stop and continue ------------------------------------------------------------------------------------------------


def test_only_what_is_missing_damaged_or_outdated_is_made_again(tmp_path, capsys):
    make_set(tmp_path, 6)
    assert refine(tmp_path, "--maps") == 0
    whole = contents(tmp_path / "out")
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "p00.png").unlink()
    (tmp_path / "out" / "p01.png").write_bytes(whole["p01.png"][:-5])
    (tmp_path / "out" / "p02.npz").write_bytes(whole["p02.npz"][:100])
    (tmp_path / "out" / f".wsss-{artefacts._host()}-{os.getpid()}-7.part").write_bytes(b"left behind")
    capsys.readouterr()
    assert refine(tmp_path, "--maps") == 0
    assert "3 written, 3 already done" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole
    unchanged = [n for n, t in stamps.items() if (tmp_path / "out" / n).stat().st_mtime_ns == t]
    assert sorted(unchanged) == ["p03.npz", "p03.png", "p04.npz", "p04.png", "p05.npz", "p05.png"]

    np.savez(tmp_path / "cams" / "p05.npz", class_ids=[9], cams=np.ones((1, 4, 4)))  # new input
    assert refine(tmp_path, "--maps") == 0
    assert "1 written, 5 already done" in capsys.readouterr().out
    assert refine(tmp_path, "--maps", "--background", "0.4") == 0  # new settings
    assert "6 written, 0 failed" in capsys.readouterr().out
    assert refine(tmp_path, "--background", "0.4") == 0  # labels alone: nothing to do
    assert "0 written, 6 already done" in capsys.readouterr().out


def test_full_disk(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, 12)
    real, writes = artefacts._write_bytes, itertools.count()

    def fills_up(path, data):
        if next(writes) >= 5:
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(artefacts, "_write_bytes", fills_up)
    assert refine(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("error: the disk is full") == 1
    assert "failed:" not in error
    kept = contents(tmp_path / "out")
    assert len(kept) == 5
    assert all(artefacts.png_settings(tmp_path / "out" / name) for name in kept)
    monkeypatch.undo()
    assert refine(tmp_path) == 0
    assert "7 written, 5 already done" in capsys.readouterr().out


def test_interrupt(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "finish", interrupted)
    assert refine(tmp_path) == 130
    assert "continues where it stopped" in capsys.readouterr().err


# One process that has loaded everything but computed nothing forks a run per trial, and kills it.
KILLER = """
import contextlib, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from wsss_models.cli import refine
from wsss_models.cli.main import main
from wsss_models.data.artefacts import npz_settings, png_settings

root, trials = Path(sys.argv[1]), int(sys.argv[2])
arguments = ["refine", "--images", f"{root}/images", "--cams", f"{root}/cams", "--maps", "--out"]

def start(out):
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            os._exit(main([*arguments, str(out)]))
    return pid

def read(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")} if out.exists() else {}

assert os.waitpid(start(root / "whole"), 0)[1] == 0
whole = read(root / "whole")
random.seed(0)
killed = partial = 0
for trial in range(trials):
    out = root / f"trial{trial // 3}"  # three kills in a row on one folder
    wanted = random.randint(min(len(read(out)), len(whole) - 1), len(whole) - 1)  # files, perhaps one half written
    pid = start(out)
    status = None
    while status is None and len(list(out.iterdir()) if out.exists() else []) <= wanted:
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = code if ended else None
    if status is None:
        time.sleep(random.uniform(0, 0.002))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    killed += os.WIFSIGNALED(status)
    found = read(out)
    partial += 0 < len(found) < len(whole)
    for name, data in found.items():
        assert data == whole[name], f"{name} is not complete"
        assert (png_settings if name.endswith("png") else npz_settings)(out / name)
    if trial % 3 == 2:
        assert os.waitpid(start(out), 0)[1] == 0
        assert read(out) == whole, "the final set differs"
        assert not [p for p in out.iterdir() if p.name.startswith(".")], "a temporary file is left"
print(killed, partial)
"""


@pytest.mark.native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_random_moments(tmp_path):
    make_set(tmp_path, 24)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "51"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    killed, partial = map(int, done.stdout.split())
    assert killed >= 17
    assert partial >= 8


# --- what some methods take beside the picture ------------------------------------------------------------------------


def picture_and_cams(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    picture = torch.from_numpy(files.read_picture(root / "images" / f"{name}.png")).permute(2, 0, 1)
    return picture, torch.from_numpy(files.read_maps(root / "cams" / f"{name}.npz")[1])


def save_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def test_boundary_and_attention_come_from_feats(tmp_path):
    make_set(tmp_path, 2)
    rng = np.random.default_rng(1)
    inputs = {
        "boundary": {name: rng.random((10, 14)).astype(np.float32) for name in ("p00", "p01")},
        "attention": {name: rng.random((3, 30, 30)).astype(np.float32) for name in ("p00", "p01")},
    }
    for method, arrays in inputs.items():
        save_arrays(tmp_path / method, arrays)
        more = ("--method", method, "--feats", f"{tmp_path}/{method}", "--maps")
        assert refine(tmp_path, *more, out=f"out-{method}") == 0
        for name, array in arrays.items():
            picture, cams = picture_and_cams(tmp_path, name)
            feats = torch.from_numpy(array[None] if method == "boundary" else array.mean(0))
            expected = wk.refine_cams(cams, feats, method=method, size=picture.shape[-2:])
            assert (
                np.abs(files.read_maps(tmp_path / f"out-{method}" / f"{name}.npz")[1] - expected.numpy()).max() < 1e-3
            )


@pytest.mark.parametrize("kind", ["png", "superpixels", "masks"])
def test_segments_vote(tmp_path, kind):
    make_set(tmp_path, 1)
    ys, xs = np.mgrid[:40, :56]
    segments = (ys // 9 * 7 + xs // 8).astype(np.int32)
    if kind == "masks":
        segments = np.stack([segments % 3 == 0, segments % 5 == 0, xs > 30])
    if kind == "png":
        (tmp_path / "segments").mkdir()
        Image.fromarray(segments.astype(np.uint8)).save(tmp_path / "segments" / "p00.png")
    else:
        save_arrays(tmp_path / "segments", {"p00": segments})
    more = ("--method", "image,vote", "--segments", f"{tmp_path}/segments", "--maps")
    picture, cams = picture_and_cams(tmp_path, "p00")
    given = torch.from_numpy(segments if kind == "masks" else segments.astype(np.int64))
    expected = wk.refine_cams(cams, picture, method=("image", "vote"), segments=given, size="feats")
    sheet = ("--sheet", f"{tmp_path}/sheet.png", "--compare", "vote", "--compare", "par,vote")
    assert refine(tmp_path, *more, *sheet) == 0
    assert np.abs(files.read_maps(tmp_path / "out" / "p00.npz")[1] - expected.numpy()).max() < 1e-3
    assert (tmp_path / "sheet.png").exists()
    np.save(tmp_path / "segments" / "p00.npy", (given != given.flatten()[0]).long().numpy()[-40:].reshape(-1, 56)[:40])
    assert refine(tmp_path, *more) == 0  # other segments: made again
    assert np.abs(files.read_maps(tmp_path / "out" / "p00.npz")[1] - expected.numpy()).max() > 1e-3


@pytest.mark.parametrize(
    "more, message",
    [
        (["--method", "boundary"], 'method "boundary" takes features, so give --feats'),
        (["--method", "image,attention"], 'method "attention" takes features, so give --feats'),
        (["--method", "par", "--feats", "feats"], "--feats is for a method that comes first, one of affinity"),
        (["--method", "image,vote"], '--segments and the method "vote" need each other'),
        (["--method", "image", "--segments", "feats"], '--segments and the method "vote" need each other'),
        (["--method", "vote", "--segments", "feats", "--tile", "256"], "would cut its --segments"),
        (["--method", "vote", "--segments", "nowhere"], "--segments must be a folder"),
    ],
)
def test_what_a_method_needs_is_asked_for(tmp_path, capsys, monkeypatch, more, message):
    make_set(tmp_path, 1, feats=True)
    monkeypatch.chdir(tmp_path)
    assert refine(tmp_path, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, array, message",
    [
        ("boundary", np.zeros((2, 4, 4), np.float32), "a boundary must be [h, w] or [1, h, w]"),
        ("boundary", np.full((4, 4), 2, np.float32), "must be boundary probabilities in 0..1"),
        ("attention", np.zeros((4, 5), np.float32), "attention must be [n, n]"),
        ("image,vote", np.zeros((4, 4), np.float32), "segments must be integers [H, W] or bool masks"),
    ],
)
def test_a_wrong_companion_is_named(tmp_path, capsys, method, array, message):
    make_set(tmp_path, 1)
    save_arrays(tmp_path / "given", {"p00": array})
    option = "--segments" if method == "image,vote" else "--feats"
    assert refine(tmp_path, "--method", method, option, f"{tmp_path}/given") == 1
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


@pytest.mark.parametrize("method", ["crf", "image,crf"])
def test_a_tile_of_weak_scores_stays_weak(tmp_path, method):
    """A CRF's marginals compete within a tile; a weak blob must not come out as strong as another tile's object."""
    for name in ("images", "cams"):
        (tmp_path / name).mkdir()
    ys, xs = np.mgrid[:64, :256]
    strong, weak = ((ys - 32) ** 2 + (xs - x) ** 2 < 15**2 for x in (40, 216))
    picture = np.where((strong | weak)[..., None], (220, 60, 40), (30, 90, 60)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "images" / "p.png")
    np.savez(tmp_path / "cams" / "p.npz", class_ids=[1], cams=(strong + 0.1 * weak).astype(np.float32)[None])
    assert refine(tmp_path, "--method", method, "--tile", "64", "--overlap", "16", "--maps") == 0
    maps = files.read_maps(tmp_path / "out" / "p.npz")[1][0]
    assert maps[strong].mean() > 0.9
    assert maps[weak].mean() < 0.15
