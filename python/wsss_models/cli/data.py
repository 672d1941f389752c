"""`wsss data`: sets of pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import shown
from wsss_models.data.check import Findings, look_over
from wsss_models.data.dataset import layout_of, list_splits, open_dataset
from wsss_models.data.labelled_folder import LabelledFolder
from wsss_models.data.pictures import PictureSet
from wsss_models.data.synth import Settings, write_set

_LAYOUTS = {"voc": "PASCAL VOC", "coco": "COCO", "folder": "pictures and a table of labels"}
_PRINTED = 20  # problems; --all prints the rest


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
    purpose = "read every picture, label and mask of a set and say what is there, what is missing, what cannot be used"
    check = actions.add_parser("check", help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
    check.add_argument("data", type=Path, metavar="DIR", help="PASCAL VOC, COCO, or pictures with a labels.csv")
    add = check.add_argument
    add("--split", metavar="NAME", help="only this one, or a file with one id a line; default: all there are")
    add("--labels", metavar="FILE", help='another table of labels, or "masks": the classes that the masks show')
    add("--masks", metavar="NAME", help="folder of the masks in DIR, such as SegmentationClassAug")
    add("--workers", type=int, default=2, metavar="N", help="threads (2)")
    add("--all", action="store_true", help=f"print every problem, not only the first {_PRINTED}")


def run(arguments: argparse.Namespace) -> int:
    return {"synth": _synth, "check": _check}[arguments.action](arguments)


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


def _check(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {arguments.workers}")
    try:
        known = list_splits(arguments.data, labels=arguments.labels)
        sets = _sets(arguments, known)
        overview, problems = _split_lines(arguments, known, sets[0])
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    first = sets[0]
    print(f"{shown(arguments.data)}: {_LAYOUTS[first.kind]}, {len(first.classes)} classes")
    print("\n".join(overview))
    with Progress(sum(map(len, sets))) as progress:
        for pictures in sets:
            found = look_over(pictures, workers=arguments.workers, progress=progress.add)
            print("\n".join(_lines(pictures, found)))
            problems += found.problems
    shown_count = len(problems) if arguments.all else _PRINTED
    print("problems   " + (str(len(problems)) if problems else "none"))
    for problem in problems[:shown_count]:
        print(f"  {problem}")
    if len(problems) > shown_count:
        print(f"  and {len(problems) - shown_count} more (--all prints them)")
    return SOME_FAILED if problems else DONE


def _sets(arguments: argparse.Namespace, known: list[str]) -> list[PictureSet]:
    """All pictures of a layout that keeps them together, else every split."""

    def opened(split: str | None) -> PictureSet:
        return open_dataset(arguments.data, split, labels=arguments.labels, masks=arguments.masks)

    if arguments.split is not None:
        return [opened(arguments.split)]
    if layout_of(arguments.data, arguments.labels) == "coco":
        return [opened(split) for split in known]
    return [opened(None)]


def _split_lines(arguments: argparse.Namespace, known: list[str], base: PictureSet) -> tuple[list[str], list[str]]:
    """What there is of splits, and what is wrong with their lists."""
    if arguments.split is not None or base.kind == "coco":
        return [f"splits     {', '.join(known) or 'none'}"], []
    ids, sizes, problems, there = {}, [], [], set(base.ids)
    for split in known:
        try:
            ids[split] = set(open_dataset(arguments.data, split, labels=arguments.labels, masks=arguments.masks).ids)
        except ValueError as error:
            problems.append(str(error))
            continue
        sizes.append(f"{split} {len(ids[split])}")
        missing = sorted(ids[split] - there)
        problems += [f"split {split}: no picture or label of {shown(name)!r}" for name in missing]
    lines = [f"splits     {', '.join(sizes) or 'none'}"]
    if "train" in ids and "val" in ids and ids["train"] & ids["val"]:
        lines.append(f"           {len(ids['train'] & ids['val'])} pictures are in both train and val")
    if isinstance(base, LabelledFolder):
        unlisted = [name for name in base.unlisted() if not name.startswith(f"{base.mask_folder.name}/")]
        if unlisted:
            lines.append(
                f"           {len(unlisted)} pictures have no line in the table, such as {shown(unlisted[0])!r}"
            )
    return lines, problems


def _lines(pictures: PictureSet, found: Findings) -> Iterator[str]:
    if pictures.split is not None:
        yield f"{pictures.split}:"
    sizes = sorted(found.sizes, key=lambda size: size[0] * size[1])
    spans = "no size" if not sizes else f"{sizes[0][0]} x {sizes[0][1]}"
    if len(sizes) > 1:
        spans += f" to {sizes[-1][0]} x {sizes[-1][1]} pixels, {len(sizes)} sizes"
    yield f"pictures   {found.sizes.total()} of {found.pictures} can be read, {spans}"
    mean = found.labels.total() / max(1, found.labelled)
    yield f"labels     {found.labelled}, {mean:.2f} classes a picture, {found.without_class} without any class"
    yield f"masks      {found.masks}" if found.masks else "masks      none: training needs none, evaluation does"
    if found.not_in_label:
        yield f"           {found.not_in_label} show a class that the picture's label lacks"
    if found.not_in_mask:
        yield f"           {found.not_in_mask} do not show a class of the picture's label"
    known = found.mask_pixels.total() - found.mask_pixels[255]
    if found.mask_pixels[255]:
        share = 100 * found.mask_pixels[255] / found.mask_pixels.total()
        yield f"           {share:.1f} % of the masks' pixels are ignored (255)"
    width = max(12, *(len(shown(name)) for name in pictures.classes))
    yield f"  id {'class':<{width}} pictures    masks  pixels %"
    for c, name in enumerate(pictures.classes, start=1):
        pixels = f"{100 * found.mask_pixels[c] / known:9.2f}" if known else "        -"
        yield f" {c:>3} {shown(name):<{width}} {found.labels[c]:>8} {found.mask_pictures[c]:>8} {pixels}"
    unused = [name for c, name in enumerate(pictures.classes, start=1) if not found.labels[c]]
    if unused and found.labelled:
        yield f"           {len(unused)} classes are in no label: {', '.join(map(shown, unused[:8]))}"
