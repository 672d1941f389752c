"""`wsss segment`: label pictures of a set by a trained segmentation network."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from wsss_models.cli import over_set
from wsss_models.cli.main import UsageError
from wsss_models.infer import run_hash
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
    over_set.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    work = over_set.work_of(arguments, "scores", "deeplab or mcic, got {system}; its maps are those of wsss cams")
    if arguments.labelled and not hasattr(work.model, "labelled_scores"):
        raise UsageError(f"--labelled must be with a system that has a memory (mcic), got {work.manifest['system']}")
    try:
        scales = tuple(float(text) for text in arguments.scales.split(","))
    except ValueError as error:
        raise UsageError(str(error)) from None

    def write(failed: over_set.Failed, advance: Callable[[], None]) -> tuple[int, int]:
        return write_segmentation(
            work.model,
            work.pictures,
            arguments.out,
            scales=scales,
            flip=not arguments.no_flip,
            crf=arguments.crf,
            labelled=arguments.labelled,
            source=run_hash(arguments.training),
            normalisation=work.manifest["config"]["recipe"]["normalisation"],
            device=work.device,
            workers=arguments.workers,
            shard=work.shard,
            failed=failed,
            advance=advance,
        )

    return over_set.write_all(work, arguments.out, "labels", write)
