"""`wsss refine`: what it writes, of pictures and maps alone and of what some methods take beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.data import files

import wsss_kernels as wk
from tests.cli.refining import SIZES, contents, label, make_set, refine

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
