"""Names in a folder: safe ones, symlinks, listings, shards, lists of ids."""

import pytest

pytest.importorskip("PIL")
from wsss_models.data import files, folder
from wsss_models.data.artefacts import FileError

CRAFTED = [
    "../../x", "..", ".", "", "/etc/x", "//host/x", "a/../x", "a/../../x", "a/..", "./a", "a/./b", "a//b", "a/",
    "..\\x",
    "a\\..\\..\\x", "C:\\x", "C:x", "a\0b", "a\nb", "\x1b[2Jx", ".hidden", "a/.git/x", " ", "a /b",
]  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_ids_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="id must be"):
        folder.inside(tmp_path, name, ".png")


@pytest.mark.parametrize("name", ["2007_000123", "a/b/c", "cat 1", "x..y", "naïve", "日本", "a.b", "~x", "-x"])
def test_honest_ids_pass(tmp_path, name):
    assert folder.inside(tmp_path, name, ".png") == tmp_path / f"{name}.png"


def test_symlinks_out_of_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (outside / "x.png").write_bytes(b"")
    (root / "x.png").symlink_to(outside / "x.png")
    (root / "sub").symlink_to(outside)
    (root / "in.png").symlink_to(root / "y.png")
    for name in ("x", "sub/x", "sub/new"):
        with pytest.raises(FileError, match="symlink"):
            folder.inside(root, name, ".png")
    assert folder.inside(root, "in", ".png")
    assert list(folder.list_files(root, (".png",))) == ["in", "x"]
    (tmp_path / "link").symlink_to(root)
    assert folder.inside(tmp_path / "link", "y", ".png")


def test_listing(tmp_path):
    for name in ("b.JPG", "a.png", "a.jpg", "sub/c.png", ".hidden.png", ".git/d.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listed = folder.list_files(tmp_path, files.PICTURE_SUFFIXES)
    assert {k: [p.name for p in v] for k, v in listed.items()} == {
        "a": ["a.jpg", "a.png"],
        "b": ["b.JPG"],
        "sub/c": ["c.png"],
    }


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("total", [0, 1, 5, 23])
def test_shards_are_a_partition(count, total):
    names = [f"{i}" for i in range(total)]
    shards = [folder.shard(names, i, count) for i in range(count)]
    assert sorted(name for part in shards for name in part) == sorted(names)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shard_text():
    assert folder.parse_shard("3/4") == (3, 4)
    for text in ("4/4", "-1/4", "1", "1/", "/2", "a/b", "0/0", "1.0/2"):
        with pytest.raises(ValueError, match="shard must be i/n"):
            folder.parse_shard(text)


def test_id_lists(tmp_path):
    (tmp_path / "train.txt").write_text("a 1\n\nb -1\na 1\n")
    assert folder.read_ids(tmp_path / "train.txt") == ["a", "b"]
    with pytest.raises(FileError):
        folder.read_ids(tmp_path / "none.txt")
