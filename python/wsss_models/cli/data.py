"""`wsss data`: sets of pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from wsss_models.cli.main import DONE, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import shown
from wsss_models.data.synth import Settings, write_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    purpose = "generate pictures with known masks, in the layout of PASCAL VOC"
    synth = actions.add_parser("synth", help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
    synth.add_argument("out", type=Path, metavar="OUT", help="folder, new or empty")
    add = synth.add_argument
    add("--images", type=int, default=500, metavar="N", help="pictures, both splits together (500)")
    add("--classes", type=int, default=8, metavar="K", help="3..20 (8)")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same files (0)")
    add("--size", type=int, nargs=2, default=(112, 112), metavar=("H", "W"), help="pixels (112 112)")
    add("--val", type=float, default=0.2, metavar="SHARE", help="of the pictures that is the split val (0.2)")


def run(arguments: argparse.Namespace) -> int:
    return {"synth": _synth}[arguments.action](arguments)


def _synth(arguments: argparse.Namespace) -> int:
    height, width = arguments.size
    start = time.perf_counter()
    try:
        settings = Settings(arguments.images, arguments.classes, arguments.seed, height, width, arguments.val)
        with Progress(settings.images) as progress:
            written = write_set(arguments.out, settings, advance=progress.add)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    where = shown(arguments.out)
    if not written:
        print(f"{where} is complete: nothing to do")
        return DONE
    train = settings.images - settings.num_val
    rate = settings.images / (time.perf_counter() - start)
    print(
        f"{where}: {train} pictures in train, {settings.num_val} in val, {settings.classes} classes, "
        f"{height} x {width} pixels, {rate:.0f} a second"
    )
    return DONE
