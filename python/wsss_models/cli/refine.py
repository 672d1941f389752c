"""`wsss refine`: a folder of pictures and their class activation maps to label pictures."""

from __future__ import annotations

import argparse
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

import wsss_kernels as wk
from wsss_models.cli import pictures
from wsss_models.cli.main import UsageError
from wsss_models.cli.pictures import Failures, Job, Tally, Work
from wsss_models.cli.refine_jobs import FEATURE_METHODS, Item, Refined, Settings, read, refine_together, write
from wsss_models.cli.refine_sheet import ROWS, write_sheet
from wsss_models.data.artefacts import shown

COMPARED = (
    ("image",),
    ("par",),
    ("pamr",),
    ("crf",),
    ("image", "par"),
    ("image", "crf"),
)  # on a sheet, beside the method asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures.add_inputs(parser)
    add = parser.add_argument
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
        help="one .npy or .npz a picture, what the first method takes: affinity: features [D, h, w] of any network "
        "(the picture guides); boundary: probabilities [h, w]; attention: [n, n] or [heads, n, n] between patch tokens",
    )
    add(
        "--segments",
        type=Path,
        metavar="DIR",
        help="for vote: one .png or .npy [H, W] of superpixels, or masks [m, H, W]",
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
    add("--device", default="cpu", metavar="cpu|cuda")
    add("--batch", type=int, default=8, metavar="N", help="pictures refined together on a GPU")
    add("--tile", type=int, metavar="N", help="refine pictures larger than N x N in tiles of that size (1024 is good)")
    add("--overlap", type=int, default=128, metavar="N", help="pixels two neighbouring tiles share, blended (128)")
    add("--sheet", type=Path, metavar="FILE", help=f"also draw {ROWS} pictures: seed and methods side by side")
    add(
        "--compare",
        action="append",
        metavar="NAME[,NAME]",
        help="a method, or several in turn, on the sheet beside --method; may be given several times; default: "
        + " ".join(",".join(chain) for chain in COMPARED),
    )
    pictures.add_selection(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    device = pictures.torch_device(arguments.device)
    pictures.check_counts(arguments, "batch", "workers", "num_classes")
    chains = _compared(arguments, settings)
    maps_root = arguments.out if arguments.maps == Path() else arguments.maps
    outputs = {root for root in (arguments.out, maps_root) if root is not None}
    pictures.check_folders(arguments, ("images", "cams", "feats", "segments"), outputs)
    names, found = pictures.chosen_names(arguments)
    pictures.make_folders(outputs)
    print(_announcement(settings, len(names), device), flush=True)

    on_cpu, workers = device.type == "cpu", arguments.workers
    if settings.tile is not None:
        Image.MAX_IMAGE_PIXELS = None  # large pictures are meant; read_picture has a limit of its own
        workers = 1  # a picture at a time, all threads at its tiles

    def find(name: str) -> Job:
        roots = (arguments.feats, arguments.segments)
        return pictures.find_job(name, found.get(name, []), arguments, maps_root, settings.text, *roots)

    def start(pool: ThreadPoolExecutor, failed: Failures, tally: Tally) -> Iterator[Work]:
        jobs = pictures.left_to_do(names, find, failed, tally)
        if on_cpu:
            return pictures.each_picture(pool, jobs, partial(_process, arguments.num_classes, settings))
        return _batched(pool, jobs, settings, arguments, device, failed)

    code = pictures.run_all(
        len(names),
        start,
        workers=workers,
        depth=2 * (workers if on_cpu else arguments.batch),
        strict=arguments.strict,
        one_thread_each=on_cpu and settings.tile is None,
        out=arguments.out,
    )
    if arguments.sheet is not None:
        _draw(arguments, names, find, settings, chains, device)
    return code


def _process(num_classes: int, settings: Settings, job: Job) -> bool:
    item = read(job, num_classes, settings)
    write(*refine_together([item], settings, torch.device("cpu"))[0])
    return item.negative


def _settings(arguments: argparse.Namespace) -> Settings:
    method = _chain(arguments.method)
    if arguments.feats is None:  # the affinity of the picture's own colours
        method = tuple("image" if word == "affinity" else word for word in method)
    elif method[0] not in FEATURE_METHODS:
        raise UsageError(
            f"--feats is for a method that comes first, one of {', '.join(FEATURE_METHODS)}, "
            f"got --method {arguments.method}"
        )
    from_picture = method if arguments.feats is None else method[1:]
    for word in FEATURE_METHODS:
        if word in from_picture:
            why = "so give --feats" if arguments.feats is None else "so it must come first"
            raise UsageError(f'method "{word}" takes features, {why}, got --method {arguments.method}')
    if from_picture:
        _check_chain(from_picture)
    if ("vote" in method) != (arguments.segments is not None):
        raise UsageError(f'--segments and the method "vote" need each other, got --method {arguments.method}')
    background = pictures.threshold("--background", arguments.background)
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
        if arguments.segments is not None:
            raise UsageError("--tile cuts the picture, and would cut its --segments: refine it whole")
        if size != "image":
            raise UsageError(f"--tile writes labels of the picture's size, got --size {arguments.size}")
    return Settings(method, arguments.feats is not None, background, size, tile, overlap if tile is not None else 0)


def _chain(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _check_chain(chain: tuple[str, ...]) -> None:
    """On a picture of a few pixels: the engine itself says what it takes."""
    options = {"segments": torch.zeros(4, 4, dtype=torch.int64)} if "vote" in chain else {}
    try:
        wk.refine_cams(torch.ones(1, 4, 4), torch.full((3, 4, 4), 9, dtype=torch.uint8), method=chain, **options)
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
        if "vote" in chain and arguments.segments is None:
            raise UsageError(f'the method "vote" needs --segments, got --compare {",".join(chain)}')
    return [chain for chain in chains or COMPARED if settings.uses_features or chain != settings.method]


def _announcement(settings: Settings, count: int, device: torch.device) -> str:
    why = "on the pictures' own colours, no --feats given"
    if settings.uses_features:
        why = "--feats given" + ("; the picture is the guide" if settings.method[0] == "affinity" else "")
    return f"{count} pictures, method {', then '.join(settings.method)} ({why}), on {device}"


def _draw(
    arguments: argparse.Namespace,
    names: list[str],
    find: Callable[[str], Job],
    settings: Settings,
    chains: list[tuple[str, ...]],
    device: torch.device,
) -> None:
    """The sheet; what could not be refined has been named before."""
    jobs = []
    for name in names[:ROWS]:
        with contextlib.suppress(ValueError, OSError):
            jobs.append(find(name))
    try:
        drawn = write_sheet(arguments.sheet, jobs, settings, chains, arguments.num_classes, device)
    except OSError as error:
        raise UsageError(f"--sheet must be a file that can be written ({error})") from None
    print(f"{drawn} pictures on the sheet {shown(arguments.sheet)}")


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
        except pictures.OF_THE_PICTURE as error:
            failed(job.name, str(error) or "not enough memory")
        else:
            yield item


def _refine(
    batch: list[Item], settings: Settings, device: torch.device, failed: Failures
) -> list[tuple[Item, Refined]]:
    """The whole batch at once; where that fails, one by one to find the culprit."""
    try:
        return list(zip(batch, refine_together(batch, settings, device), strict=True))
    except pictures.OF_THE_PICTURE as error:
        if len(batch) == 1:
            failed(batch[0].job.name, str(error) or "not enough memory")
            return []
    return [pair for item in batch for pair in _refine([item], settings, device, failed)]
