"""What the commands share that turn folders of pictures into folders of labels: arguments, jobs, failures, the run."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data import files
from wsss_models.data.artefacts import npz_settings, png_settings, remove_stale, shown
from wsss_models.data.companions import FEATURE_SUFFIXES, SEGMENT_SUFFIXES
from wsss_models.data.folder import inside, list_files, parse_shard, read_ids, shard

A = TypeVar("A")
B = TypeVar("B")
OF_THE_PICTURE = (ValueError, TypeError, RuntimeError, OSError, MemoryError)  # name it and go on
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@dataclass(frozen=True)
class Job:
    """The files of one picture."""

    name: str
    picture: Path
    cams: Path
    feats: Path | None
    segments: Path | None
    label: Path
    maps: Path | None
    settings: str

    def is_done(self) -> bool:
        """Complete, undamaged, and made from these inputs with these settings."""
        if png_settings(self.label) != self.settings:
            return False
        return self.maps is None or npz_settings(self.maps) == self.settings


Work = tuple[Job, "Future[bool]"]  # done when the picture is written; its result: were there negative scores


class DiskFullError(Exception):
    pass


class StrictError(Exception):
    pass


@dataclass
class Tally:
    written: int = 0
    kept: int = 0
    failed: int = 0
    negative: int = 0  # pictures with scores below 0

    def __str__(self) -> str:
        kept = f", {self.kept} already done" if self.kept else ""
        return f"{self.written} written{kept}, {self.failed} failed"


class Failures:
    """Names what failed, and why; the rest goes on unless --strict."""

    def __init__(self, progress: Progress, strict: bool, tally: Tally) -> None:
        self.progress, self._strict, self._tally = progress, strict, tally

    def __call__(self, name: str, reason: object) -> None:
        self._tally.failed += 1
        self.progress.add()
        self.progress.say(f"failed: {shown(name)}: {reason}")
        if self._strict:
            raise StrictError("stopped at the first failure (--strict)")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """--images, --cams, --out."""
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="pictures, sub-folders too; EXIF rotation is applied")
    add(
        "--cams",
        type=Path,
        required=True,
        metavar="DIR",
        help="one .npz a picture: class_ids int [k] (1..254), cams float [k, h, w], upright as the picture",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="label PNGs (VOC palette) go here")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """--num-classes, --ids, --shard, --workers, --strict."""
    add = parser.add_argument
    add("--num-classes", type=int, default=files.MAX_CLASS_ID, metavar="N", help="refuse class ids above N")
    add("--ids", type=Path, metavar="FILE", help="take only these: one id (path without suffix) a line")
    add("--shard", default="0/1", metavar="i/n", help="take every n-th picture from the i-th on, i = 0..n-1")
    add(
        "--workers",
        type=int,
        default=_workers(),
        metavar="N",
        help="CPU: pictures in work at the same time; GPU: threads that read and write; default: the cores, at most 16",
    )
    add("--strict", action="store_true", help="stop at the first picture that fails instead of finishing the rest")


def _workers() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def or_usage_error(parse: Callable[[A], B], value: A) -> B:
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(str(error)) from None


def threshold(name: str, text: str) -> float | str:
    """ "auto", or a share of the maximum in 0..1."""
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UsageError(f"{name} must be auto or a number in 0..1, got {text!r}")
    return value


def torch_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device must be cpu or a GPU that torch can use, got {name!r} ({error})") from None
    return device


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")


def check_folders(arguments: argparse.Namespace, inputs: Sequence[str], outputs: set[Path]) -> None:
    """No output may fall among the inputs."""
    for name in inputs:
        folder = getattr(arguments, name)
        if folder is not None and not folder.is_dir():
            raise UsageError(f"--{name} must be a folder, got {shown(folder)}")
    for out in outputs:
        for name in inputs:
            folder = getattr(arguments, name)
            if folder is not None and folder.resolve() in (out.resolve(), *out.resolve().parents):
                raise UsageError(f"the output folder must lie outside --{name} {shown(folder)}, got {shown(out)}")


def make_folders(roots: set[Path]) -> None:
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_stale(root)
        except OSError as error:
            raise UsageError(f"{shown(root)} must be a folder that can be written to ({error})") from None


def chosen_names(arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[Path]]]:
    """The ids to work on, and the pictures of every id there is."""
    index, count = or_usage_error(parse_shard, arguments.shard)
    pictures = list_files(arguments.images, files.PICTURE_SUFFIXES)
    names = list(pictures) if arguments.ids is None else or_usage_error(read_ids, arguments.ids)
    return shard(names, index, count), pictures


def find_job(
    name: str,
    found: list[Path],
    arguments: argparse.Namespace,
    maps_root: Path | None,
    settings_text: Callable[[list[str]], str],
    feats_root: Path | None = None,
    segments_root: Path | None = None,
) -> Job:
    """The files of an id, its pictures being `found`.

    Raises:
        ValueError: none or several pictures, or a path that leads out of its folder.
    """
    inside(arguments.images, name, "")
    if len(found) != 1:
        many = f"{len(found)} pictures of this name: {', '.join(shown(p.name) for p in found)}"
        raise ValueError(many if found else f"no picture of this name in {shown(arguments.images)}")
    picture = inside(arguments.images, name, found[0].suffix)
    cams = inside(arguments.cams, name, ".npz")
    feats = _first_there(feats_root, name, FEATURE_SUFFIXES)
    segments = _first_there(segments_root, name, SEGMENT_SUFFIXES)
    label = inside(arguments.out, name, ".png")
    maps = None if maps_root is None else inside(maps_root, name, ".npz")
    inputs = [files.fingerprint(path) for path in (picture, cams, feats, segments) if path is not None]
    return Job(name, picture, cams, feats, segments, label, maps, settings_text(inputs))


def _first_there(root: Path | None, name: str, suffixes: tuple[str, ...]) -> Path | None:
    """The file of a picture in a folder, whatever its suffix; the last one where there is none."""
    if root is None:
        return None
    paths = [inside(root, name, suffix) for suffix in suffixes]
    return next((path for path in paths if path.exists()), paths[-1])


def left_to_do(names: list[str], find: Callable[[str], Job], failed: Failures, tally: Tally) -> Iterator[Job]:
    for name in names:
        try:
            job = find(name)
        except (ValueError, OSError) as error:
            failed(name, error)
            continue
        if job.is_done():
            tally.kept += 1
            failed.progress.add()
        else:
            yield job


Start = Callable[[ThreadPoolExecutor, Failures, Tally], Iterator[Work]]


def run_all(
    count: int, start: Start, *, workers: int, depth: int, strict: bool, one_thread_each: bool, out: Path
) -> int:
    """Do the work that `start` hands to a pool, name what fails, print what came of it.

    Args:
        count: pictures, those already done too.
        start: given the pool, what to tell of failures, and the tally; yields the work as it is handed out.
        workers: threads of the pool.
        depth: work handed out and not finished, at most.
        strict: stop at the first failure.
        one_thread_each: a picture takes one thread of torch.
        out: named in what is printed.

    Returns:
        int: the exit code.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused with a message of our own
    began, tally = time.monotonic(), Tally()
    with Progress(count) as progress, ThreadPoolExecutor(workers) as pool, _threads_of_torch(one_thread_each):
        failed = Failures(progress, strict, tally)
        pending: deque[Work] = deque()
        try:
            for entry in start(pool, failed, tally):
                pending.append(entry)
                while len(pending) > depth:
                    finish(pending.popleft(), failed, tally)
            while pending:
                finish(pending.popleft(), failed, tally)
        except (StrictError, DiskFullError) as error:
            progress.say(str(error))
            pool.shutdown(cancel_futures=True)
            finished = [f for _, f in pending if not f.cancelled() and f.exception() is None]
            tally.written += len(finished)
    print(f"{tally} in {time.monotonic() - began:.1f} s; labels in {shown(out)}")
    if tally.negative:
        print(f"{tally.negative} with negative scores, which count as 0 (if these are logits, their ReLU is meant)")
    return SOME_FAILED if tally.failed else DONE


def each_picture(pool: ThreadPoolExecutor, jobs: Iterator[Job], process: Callable[[Job], bool]) -> Iterator[Work]:
    """A picture is read, worked on and written by one thread."""
    for job in jobs:
        yield job, pool.submit(process, job)


def finish(work: Work, failed: Failures, tally: Tally) -> None:
    job, future = work
    try:
        tally.negative += future.result()
    except OF_THE_PICTURE as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            tally.failed += 1
            raise DiskFullError(
                f"error: the disk is full ({error.strerror}) at {shown(job.label)}. "
                "What is finished is kept: make room, then run the same command again."
            ) from None
        failed(job.name, str(error) or "not enough memory")
    else:
        tally.written += 1
        failed.progress.add()


@contextlib.contextmanager
def _threads_of_torch(one_each: bool) -> Iterator[None]:
    """On a CPU one thread a picture, and a picture for every core: nothing waits for anything, whatever else runs."""
    before = torch.get_num_threads()
    if one_each:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
