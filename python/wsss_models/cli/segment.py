"""`wsss segment`: label pictures of a set by a trained segmentation network."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.pictures import torch_device
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import shown
from wsss_models.data.dataset import open_dataset
from wsss_models.data.folder import parse_shard
from wsss_models.infer import load_run, run_hash
from wsss_models.segment import write_segmentation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        metavar="DIR",
        help="the --out of wsss train (deeplab, mcic)",
        dest="training",
    )
    add("--data", type=Path, required=True, metavar="DIR", help="PASCAL VOC, COCO, or pictures with a labels.csv")
    add("--split", metavar="NAME", help="of the set, or a file with one id a line; default: all pictures")
    add("--out", type=Path, required=True, metavar="DIR", help="label PNGs (VOC palette) go here")
    add("--scales", default="0.75,1,1.25", metavar="S,S,...", help="of the picture, averaged over (0.75,1,1.25)")
    add("--no-flip", action="store_true", help="leave the flipped pictures out of the mean")
    add("--crf", action="store_true", help="a dense CRF over the mean: gaussian 3, 3; bilateral 80, 13, 10; 10 times")
    add(
        "--labelled",
        action="store_true",
        help="mcic: by its memory, only the classes of each picture's label: training labels for another network",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="cpu|cuda")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    add("--shard", metavar="i/n", help="take every n-th picture from the i-th on; default: torchrun's, or 0/1")


def run(arguments: argparse.Namespace) -> int:
    if arguments.workers < 0:
        raise UsageError("--workers must be at least 0")
    device = torch_device(arguments.device)
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        scales = tuple(float(text) for text in arguments.scales.split(","))
        shard = parse_shard(arguments.shard or f"{rank}/{processes}")
        model, manifest = load_run(arguments.training)
        pictures = open_dataset(arguments.data, arguments.split)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not hasattr(model, "scores"):
        raise UsageError(f"--run must be of deeplab or mcic, got {manifest['system']}; its maps are those of wsss cams")
    if arguments.labelled and not hasattr(model, "labelled_scores"):
        raise UsageError(f"--labelled must be with a system that has a memory (mcic), got {manifest['system']}")
    if list(pictures.classes) != manifest.get("classes", list(pictures.classes)):
        raise UsageError(f"--data must have the classes of --run, {manifest['classes']}, got {list(pictures.classes)}")
    failures = 0
    began = time.monotonic()
    with Progress(len(range(shard[0], len(pictures), shard[1]))) as progress:

        def failed(name: str, reason: str) -> None:
            nonlocal failures
            failures += 1
            progress.add()
            progress.say(f"failed: {shown(name)}: {reason}")

        try:
            written, kept = write_segmentation(
                model,
                pictures,
                arguments.out,
                scales=scales,
                flip=not arguments.no_flip,
                crf=arguments.crf,
                labelled=arguments.labelled,
                source=run_hash(arguments.training),
                normalisation=manifest["config"]["recipe"]["normalisation"],
                device=device,
                workers=arguments.workers,
                shard=shard,
                failed=failed,
                advance=progress.add,
            )
        except OSError as error:
            raise UsageError(f"--out must be a folder that can be written to ({error})") from None
        except ValueError as error:
            raise UsageError(str(error)) from None
    already = f", {kept} already done" if kept else ""
    seconds = time.monotonic() - began
    print(f"{written} written{already}, {failures} failed in {seconds:.1f} s; labels in {shown(arguments.out)}")
    return SOME_FAILED if failures else DONE
