"""Files that are either complete or absent, and carry the settings they were made with."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
import zipfile
import zlib
from pathlib import Path

SETTINGS_KEY = "wsss"  # keyword of the PNG text chunk and comment of the npz archive
_PART_PREFIX = ".wsss-"  # a file being written: .wsss-HOST-PID-COUNT.part, beside its target
_PART_SUFFIX = ".part"
_STALE_SECONDS = 24 * 3600.0  # when another machine's unfinished file counts as left behind
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_counter = itertools.count()


class FileError(ValueError):
    """A file that cannot be used: `<path>: <reason>`."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.reason = reason


def shown(path: Path | str) -> str:
    """The path as printable text, also where the name is no valid UTF-8."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is at any moment, a power cut included, either the old one, none, or complete.

    The data goes to a temporary file in the same folder, to the disk, and only then takes its name. The folder is
    made where it is missing. A symlink in the place of `path` is replaced, not followed.

    Raises:
        OSError: the file layer's own (disk full, permission); nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{_PART_PREFIX}{_host()}-{os.getpid()}-{next(_counter)}{_PART_SUFFIX}"
    try:
        _write_bytes(part, data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_stale(root: Path) -> int:
    """Remove unfinished files of writers that are gone, in `root` and below; those of living ones stay.

    Gone is a process of this machine that no longer runs, and any file older than a day.

    Returns:
        int: how many were removed.
    """
    removed = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(_PART_PREFIX) and name.endswith(_PART_SUFFIX) and _is_stale(Path(folder, name)):
                Path(folder, name).unlink(missing_ok=True)
                removed += 1
    return removed


def png_settings(path: Path) -> str | None:
    """The settings in a PNG, every chunk's checksum verified up to the end; None: absent, damaged, or without any."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_PNG_SIGNATURE):
        return None
    settings, at = None, len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data) or struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(data[at + 4 : end - 4]):
            return None
        kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if kind == b"IEND":
            return settings if end == len(data) else None
        keyword, _, text = body.partition(b"\0")
        if kind == b"tEXt" and keyword == SETTINGS_KEY.encode():
            settings = text.decode("latin-1")
        at = end
    return None


def npz_settings(path: Path) -> str | None:
    """The settings in an npz archive, every member's checksum verified; None: absent, damaged, or without any."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode("latin-1") or None if archive.testzip() is None else None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        return None


def _write_bytes(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The new name too reaches the disk, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum())[:40] or "host"


def _is_stale(part: Path) -> bool:
    host, _, rest = part.name[len(_PART_PREFIX) : -len(_PART_SUFFIX)].partition("-")
    pid = rest.partition("-")[0]
    try:
        if time.time() - part.stat().st_mtime > _STALE_SECONDS:
            return True
        if host != _host() or not pid.isdigit():
            return False
        os.kill(int(pid), 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return int(pid) == os.getpid()  # ours before we wrote anything: an earlier process had the same number
