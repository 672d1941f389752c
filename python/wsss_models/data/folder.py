"""Folders of files named by an id: what is in them, and nothing outside them."""

from __future__ import annotations

import os
from pathlib import Path

from wsss_models.data.artefacts import FileError, shown


def check_id(name: str) -> str:
    """Refuse an id that is not a plain name, or names joined by "/", of a file inside its folder.

    Raises:
        ValueError: empty, absolute, with "..", ".", an empty or hidden part, a backslash, a drive, or an unprintable
            character (NUL, line break, terminal codes).

    Example:
        >>> check_id("2007_000123"), check_id("train/cat 1")
        ('2007_000123', 'train/cat 1')
    """
    contract = 'id must be the name of a file inside the folder, without its suffix, without ".." or a leading "/"'
    parts = name.split("/")
    if (
        any(part == "" or part.startswith(".") for part in parts)
        or "\\" in name
        or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
        or (len(parts[0]) > 1 and parts[0][1] == ":")
        or any(part != part.strip() for part in parts)
    ):
        raise ValueError(f"{contract}, got {name!a}")
    return name


def inside(root: Path, name: str, suffix: str) -> Path:
    """Path of an id's file under `root`, which may be a symlink itself; one that leads elsewhere is refused.

    Raises:
        ValueError: `name` is no id, see `check_id`.
        FileError: the path goes through a symlink out of `root`.
    """
    path = root / f"{check_id(name)}{suffix}"
    real_root = os.path.realpath(root)
    if os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
        raise FileError(path, f"a symlink leads out of {shown(root)}")
    return path


def list_files(root: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """id -> its files under `root` (sub-folders too: "sub/name"), ids in sorted order.

    Hidden files and folders are left out; folders that are symlinks are not entered.
    """
    found: dict[str, list[Path]] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in suffixes and not file.startswith("."):
                name = os.path.relpath(os.path.join(folder, stem), root).replace(os.sep, "/")
                found.setdefault(name, []).append(Path(folder, file))
    return {name: sorted(found[name]) for name in sorted(found)}


def read_ids(path: Path) -> list[str]:
    """The first word of every line of a list such as ImageSets/Main/train.txt; blank lines left out, duplicates too.

    Raises:
        FileError: the list cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"the list of ids cannot be read ({error})") from error
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split()))


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" -> (i, n), 0 <= i < n.

    Example:
        >>> parse_shard("0/4")
        (0, 4)
    """
    first, slash, second = text.partition("/")
    if not slash or not first.isdecimal() or not second.isdecimal() or not int(first) < int(second):
        raise ValueError(f"shard must be i/n with 0 <= i < n, such as 0/4, got {text!r}")
    return int(first), int(second)


def shard(names: list[str], index: int, count: int) -> list[str]:
    """Every count-th name from `index` on: the shards of one list are disjoint and together complete."""
    return names[index::count]
