"""`wsss refine`: a folder of pictures and their class activation maps to label pictures."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

import wsss_kernels as wk
from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.cli.refine_jobs import Item, Job, Refined, Settings, read, refine_together, write
from wsss_models.cli.refine_sheet import ROWS, write_sheet
from wsss_models.data import files
from wsss_models.data.artefacts import remove_stale, shown
from wsss_models.data.folder import inside, list_files, parse_shard, read_ids, shard

A = TypeVar("A")
B = TypeVar("B")
Work = tuple[Job, "Future[bool]"]  # done when the picture is written; its result: were there negative scores
COMPARED = (("image",),)  # on a sheet, beside the method asked for
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_OF_THE_PICTURE = (ValueError, TypeError, RuntimeError, OSError, MemoryError)  # name it and go on


class DiskFullError(Exception):
    pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add(
        "--method",
        default="affinity",
        metavar="NAME[,NAME]",
        help="or several in turn; affinity (the default) walks on --feats or, without them, on the picture's colours",
    )
    add(
        "--feats",
        type=Path,
        metavar="DIR",
        help='one .npy or .npz a picture, [D, h, w], any network: method "affinity" with the picture as guide',
    )
    add(
        "--maps",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="DIR",
        help="also write the refined maps (.npz, half precision), here or, without DIR, beside the labels",
    )
    add(
        "--background",
        default="auto",
        metavar="auto|T",
        help="score up to which a pixel is background, as a share of the picture's maximum; auto: found per picture",
    )
    add("--size", default="image", metavar="image|cams|HxW", help="of the labels; default: the picture's")
    add("--num-classes", type=int, default=files.MAX_CLASS_ID, metavar="N", help="refuse class ids above N")
    add("--ids", type=Path, metavar="FILE", help="refine only these: one id (path without suffix) a line")
    add("--shard", default="0/1", metavar="i/n", help="refine every n-th picture from the i-th on, i = 0..n-1")
    add("--device", default="cpu", metavar="cpu|cuda")
    add("--batch", type=int, default=8, metavar="N", help="pictures refined together on a GPU")
    add(
        "--workers",
        type=int,
        default=_workers(),
        metavar="N",
        help="CPU: pictures in work at the same time; GPU: threads that read and write; default: the cores, at most 16",
    )
    add("--tile", type=int, metavar="N", help="refine pictures larger than N x N in tiles of that size (1024 is good)")
    add("--overlap", type=int, default=128, metavar="N", help="pixels two neighbouring tiles share, blended (128)")
    add(
        "--sheet",
        type=Path,
        metavar="FILE",
        help=f"also write a picture: {ROWS} of them, seed and methods side by side",
    )
    add(
        "--compare",
        action="append",
        metavar="NAME[,NAME]",
        help="a method, or several in turn, on the sheet beside --method; may be given several times; default: "
        + " ".join(",".join(chain) for chain in COMPARED),
    )
    add("--strict", action="store_true", help="stop at the first picture that fails instead of finishing the rest")


def _workers() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    index, count = _or_usage_error(parse_shard, arguments.shard)
    device = _device(arguments.device)
    for name in ("batch", "workers", "num_classes"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    chains = _compared(arguments, settings)
    maps_root = _folders(arguments)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused with a message of our own
    if settings.tile is not None:
        Image.MAX_IMAGE_PIXELS = None  # large pictures are meant; read_picture has a limit of its own
        arguments.workers = 1  # a picture at a time, all threads at its tiles

    start = time.monotonic()
    pictures = list_files(arguments.images, files.PICTURE_SUFFIXES)
    names = list(pictures) if arguments.ids is None else _or_usage_error(read_ids, arguments.ids)
    names = shard(names, index, count)
    try:
        for root in {arguments.out, maps_root} - {None}:
            root.mkdir(parents=True, exist_ok=True)
            remove_stale(root)
    except OSError as error:
        raise UsageError(f"{shown(arguments.out)} must be a folder that can be written to ({error})") from None
    print(_announcement(settings, len(names), device), flush=True)

    tally = Tally()
    one_each = device.type == "cpu" and settings.tile is None
    with Progress(len(names)) as progress, ThreadPoolExecutor(arguments.workers) as pool, _threads_of_torch(one_each):
        failed = Failures(progress, arguments.strict, tally)
        pending: deque[Work] = deque()
        try:
            jobs = _jobs(names, pictures, arguments, maps_root, settings, failed, tally)
            depth = 2 * (arguments.workers if device.type == "cpu" else arguments.batch)
            if device.type == "cpu":
                work = _whole_pictures(pool, jobs, settings, arguments.num_classes)
            else:
                work = _batched(pool, jobs, settings, arguments, device, failed)
            for entry in work:
                pending.append(entry)
                while len(pending) > depth:
                    _finish(pending.popleft(), failed, tally)
            while pending:
                _finish(pending.popleft(), failed, tally)
        except (StrictError, DiskFullError) as error:
            progress.say(str(error))
            pool.shutdown(cancel_futures=True)
            finished = [f for _, f in pending if not f.cancelled() and f.exception() is None]
            tally.written += len(finished)
    print(f"{tally} in {time.monotonic() - start:.1f} s; labels in {shown(arguments.out)}")
    if arguments.sheet is not None:
        _draw(arguments, names, pictures, settings, chains, device)
    if tally.negative:
        print(f"{tally.negative} with negative scores, which count as 0 (if these are logits, their ReLU is meant)")
    return SOME_FAILED if tally.failed else DONE


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


@dataclass
class Tally:
    written: int = 0
    kept: int = 0
    failed: int = 0
    negative: int = 0  # pictures with scores below 0

    def __str__(self) -> str:
        kept = f", {self.kept} already done" if self.kept else ""
        return f"{self.written} written{kept}, {self.failed} failed"


class StrictError(Exception):
    pass


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


def _or_usage_error(parse: Callable[[A], B], value: A) -> B:
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _settings(arguments: argparse.Namespace) -> Settings:
    method = _chain(arguments.method)
    if arguments.feats is None:  # the affinity of the picture's own colours
        method = tuple("image" if word == "affinity" else word for word in method)
    elif method[0] != "affinity":
        raise UsageError(
            f'--feats is for the method "affinity", which must come first, got --method {arguments.method}'
        )
    _check_chain(tuple("image" if word == "affinity" else word for word in method))
    if "affinity" in method[1:]:
        raise UsageError(
            f'method "affinity" takes the features, so it must come first, got --method {arguments.method}'
        )
    background = arguments.background
    if background != "auto":
        try:
            background = float(background)
        except ValueError:
            background = float("nan")
        if not 0 <= background <= 1:
            raise UsageError(f"--background must be auto or a number in 0..1, got {arguments.background!r}")
    size = arguments.size
    if size not in ("image", "cams"):
        height, _, width = size.partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) * int(width)):
            raise UsageError(f"--size must be image, cams or HxW such as 375x500, got {size!r}")
        size = (int(height), int(width))
    tile, overlap = arguments.tile, arguments.overlap
    if tile is not None:
        if tile < 16:
            raise UsageError(f"--tile must be at least 16 pixels, got {tile}")
        if not 0 <= overlap <= tile // 2:
            raise UsageError(f"--overlap must be in 0..{tile // 2}, half of --tile, got {overlap}")
        if arguments.feats is not None:
            raise UsageError("--tile cuts the picture; with --feats it is refined whole, on the features' own grid")
        if size != "image":
            raise UsageError(f"--tile writes labels of the picture's size, got --size {arguments.size}")
    return Settings(method, arguments.feats is not None, background, size, tile, overlap if tile is not None else 0)


def _chain(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _check_chain(chain: tuple[str, ...]) -> None:
    """On a picture of a few pixels: the engine itself says what it takes."""
    try:
        wk.refine_cams(torch.ones(1, 4, 4), torch.full((3, 4, 4), 9, dtype=torch.uint8), method=chain)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def _compared(arguments: argparse.Namespace, settings: Settings) -> list[tuple[str, ...]]:
    """The chains of a sheet beside the one asked for."""
    if arguments.sheet is None:
        if arguments.compare:
            raise UsageError("--compare names what is on the sheet: give --sheet FILE too")
        return []
    if arguments.sheet.is_dir():
        raise UsageError(f"--sheet must be a file, got the folder {shown(arguments.sheet)}")
    chains = [_chain(text) for text in arguments.compare or []]
    chains = [tuple("image" if word == "affinity" else word for word in chain) for chain in chains]
    for chain in chains:
        _check_chain(chain)
    return [chain for chain in chains or COMPARED if settings.uses_features or chain != settings.method]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device must be cpu or a GPU that torch can use, got {name!r} ({error})") from None
    return device


def _folders(arguments: argparse.Namespace) -> Path | None:
    """Where the maps go (None: nowhere); no output may fall among the inputs."""
    for name in ("images", "cams", "feats"):
        folder = getattr(arguments, name)
        if folder is not None and not folder.is_dir():
            raise UsageError(f"--{name} must be a folder, got {shown(folder)}")
    maps_root = arguments.out if arguments.maps == Path() else arguments.maps
    for out in {arguments.out, maps_root} - {None}:
        for name in ("images", "cams", "feats"):
            folder = getattr(arguments, name)
            if folder is not None and folder.resolve() in (out.resolve(), *out.resolve().parents):
                raise UsageError(f"the output folder must lie outside --{name} {shown(folder)}, got {shown(out)}")
    return maps_root


def _announcement(settings: Settings, count: int, device: torch.device) -> str:
    why = "on the pictures' own colours, no --feats given"
    if settings.uses_features:
        why = "--feats given; the picture is the guide"
    return f"{count} pictures, method {', then '.join(settings.method)} ({why}), on {device}"


def _jobs(
    names: list[str],
    pictures: dict[str, list[Path]],
    arguments: argparse.Namespace,
    maps_root: Path | None,
    settings: Settings,
    failed: Failures,
    tally: Tally,
) -> Iterator[Job]:
    """What is left to do."""
    for name in names:
        try:
            job = _job(name, pictures.get(name, []), arguments, maps_root, settings)
        except (ValueError, OSError) as error:
            failed(name, error)
            continue
        if job.is_done():
            tally.kept += 1
            failed.progress.add()
        else:
            yield job


def _job(
    name: str, found: list[Path], arguments: argparse.Namespace, maps_root: Path | None, settings: Settings
) -> Job:
    inside(arguments.images, name, "")
    if len(found) != 1:
        many = f"{len(found)} pictures of this name: {', '.join(shown(p.name) for p in found)}"
        raise ValueError(many if found else f"no picture of this name in {shown(arguments.images)}")
    picture = inside(arguments.images, name, found[0].suffix)
    cams = inside(arguments.cams, name, ".npz")
    feats = None
    if arguments.feats is not None:
        feats = inside(arguments.feats, name, ".npy")
        feats = feats if feats.exists() else inside(arguments.feats, name, ".npz")
    label = inside(arguments.out, name, ".png")
    maps = None if maps_root is None else inside(maps_root, name, ".npz")
    inputs = [files.fingerprint(path) for path in (picture, cams, feats) if path is not None]
    return Job(name, picture, cams, feats, label, maps, settings.text(inputs))


def _draw(
    arguments: argparse.Namespace,
    names: list[str],
    pictures: dict[str, list[Path]],
    settings: Settings,
    chains: list[tuple[str, ...]],
    device: torch.device,
) -> None:
    """The sheet; what could not be refined has been named before."""
    jobs = []
    for name in names[:ROWS]:
        with contextlib.suppress(ValueError, OSError):
            jobs.append(_job(name, pictures.get(name, []), arguments, None, settings))
    try:
        drawn = write_sheet(arguments.sheet, jobs, settings, chains, arguments.num_classes, device)
    except OSError as error:
        raise UsageError(
            f"--sheet must be a file that can be written, got {shown(arguments.sheet)} ({error})"
        ) from None
    print(f"{drawn} pictures on the sheet {shown(arguments.sheet)}")


def _whole_pictures(
    pool: ThreadPoolExecutor, jobs: Iterator[Job], settings: Settings, num_classes: int
) -> Iterator[Work]:
    """A picture is read, refined and written by one thread."""

    def process(job: Job) -> bool:
        item = read(job, num_classes, settings)
        write(*refine_together([item], settings, torch.device("cpu"))[0])
        return item.negative

    for job in jobs:
        yield job, pool.submit(process, job)


def _batched(
    pool: ThreadPoolExecutor,
    jobs: Iterator[Job],
    settings: Settings,
    arguments: argparse.Namespace,
    device: torch.device,
    failed: Failures,
) -> Iterator[Work]:
    """The pool reads ahead and writes; what it has read goes to the GPU in batches."""

    def save(item: Item, refined: Refined) -> bool:
        write(*refined)
        return item.negative

    items = _read_ahead(pool, jobs, settings, arguments.num_classes, 2 * arguments.batch, failed)
    while batch := list(islice(items, arguments.batch)):
        for item, refined in _refine(batch, settings, device, failed):
            yield item.job, pool.submit(save, item, refined)


def _read_ahead(
    pool: ThreadPoolExecutor, jobs: Iterator[Job], settings: Settings, num_classes: int, depth: int, failed: Failures
) -> Iterator[Item]:
    waiting: deque[tuple[Job, Future[Item]]] = deque()
    while True:
        waiting.extend(
            (job, pool.submit(read, job, num_classes, settings)) for job in islice(jobs, depth - len(waiting))
        )
        if not waiting:
            return
        job, future = waiting.popleft()
        try:
            item = future.result()
        except _OF_THE_PICTURE as error:
            failed(job.name, str(error) or "not enough memory")
        else:
            yield item


def _refine(
    batch: list[Item], settings: Settings, device: torch.device, failed: Failures
) -> list[tuple[Item, Refined]]:
    """The whole batch at once; where that fails, one by one to find the culprit."""
    try:
        return list(zip(batch, refine_together(batch, settings, device), strict=True))
    except _OF_THE_PICTURE as error:
        if len(batch) == 1:
            failed(batch[0].job.name, str(error) or "not enough memory")
            return []
    return [pair for item in batch for pair in _refine([item], settings, device, failed)]


def _finish(work: Work, failed: Failures, tally: Tally) -> None:
    job, future = work
    try:
        tally.negative += future.result()
    except _OF_THE_PICTURE as error:
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
