"""What the commands share that take a trained network over the pictures of a set."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.pictures import torch_device
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import shown
from wsss_models.data.dataset import open_dataset
from wsss_models.data.folder import parse_shard
from wsss_models.data.pictures import PictureSet
from wsss_models.infer import load_run

Failed = Callable[[str, str], None]


@dataclass(frozen=True)
class Work:
    model: nn.Module
    manifest: dict[str, Any]
    pictures: PictureSet
    shard: tuple[int, int]
    device: torch.device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="cpu|cuda")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    add("--shard", metavar="i/n", help="take every n-th picture from the i-th on; default: torchrun's, or 0/1")


def work_of(arguments: argparse.Namespace, method: str, expected: str) -> Work:
    """The network of --run, which must have `method`, and the pictures of --data.

    Raises:
        UsageError: one of them is missing or damaged, they do not fit, or the network is none of `expected`.
    """
    if arguments.workers < 0:
        raise UsageError("--workers must be at least 0")
    device = torch_device(arguments.device)
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        shard = parse_shard(arguments.shard or f"{rank}/{processes}")
        model, manifest = load_run(arguments.training)
        pictures = open_dataset(arguments.data, arguments.split)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not hasattr(model, method):
        raise UsageError(f"--run must be of {expected.format(system=manifest['system'])}")
    if list(pictures.classes) != manifest.get("classes", list(pictures.classes)):
        raise UsageError(f"--data must have the classes of --run, {manifest['classes']}, got {list(pictures.classes)}")
    return Work(model, manifest, pictures, shard, device)


def write_all(work: Work, out: Path, what: str, write: Callable[[Failed, Callable[[], None]], tuple[int, int]]) -> int:
    """Calls write(failed, advance) -> (written, kept) beside a progress bar; prints a summary.

    Returns:
        int: the exit code.
    """
    failures = 0
    began = time.monotonic()
    with Progress(len(range(work.shard[0], len(work.pictures), work.shard[1]))) as progress:

        def failed(name: str, reason: str) -> None:
            nonlocal failures
            failures += 1
            progress.add()
            progress.say(f"failed: {shown(name)}: {reason}")

        try:
            written, kept = write(failed, progress.add)
        except OSError as error:
            raise UsageError(f"--out must be a folder that can be written to ({error})") from None
        except ValueError as error:
            raise UsageError(str(error)) from None
    already = f", {kept} already done" if kept else ""
    seconds = time.monotonic() - began
    print(f"{written} written{already}, {failures} failed in {seconds:.1f} s; {what} in {shown(out)}")
    return SOME_FAILED if failures else DONE
