"""`wsss evaluate`: label pictures or score maps against masks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import shown, write_atomically
from wsss_models.data.dataset import open_dataset
from wsss_models.data.folder import parse_shard
from wsss_models.data.pictures import PictureSet
from wsss_models.evaluate import NORMALIZATIONS, NUM_THRESHOLDS, Confusion, Evaluation, evaluate_labels, evaluate_maps

_FORMAT = 1  # of the JSON


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="VOC, COCO or own folder, with masks")
    add("--split", metavar="NAME", help="of the set, or a file with one id a line; default: all pictures")
    add("--masks", metavar="NAME", help="folder of the masks in --data, such as SegmentationClassAug")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", type=Path, metavar="DIR", help="one label PNG a picture")
    what.add_argument(
        "--cams", type=Path, metavar="DIR", help="one .npz of score maps a picture: all thresholds at once"
    )
    add("--ignored", default="background", choices=("background", "skip"), help="what a predicted 255 counts as")
    add(
        "--normalize", default="image", choices=NORMALIZATIONS, help="maps by the picture's maximum, or each by its own"
    )
    add("--thresholds", type=int, default=NUM_THRESHOLDS, metavar="N", help=f"evenly in 0..1 ({NUM_THRESHOLDS})")
    add("--shard", default="0/1", metavar="i/n", help="take every n-th picture from the i-th on; the counts add up")
    add("--workers", type=int, default=2, metavar="N", help="threads (2)")
    add("--json", type=Path, metavar="FILE", help="also write everything, the counts too, as JSON")


def run(arguments: argparse.Namespace) -> int:
    for name in ("thresholds", "workers"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    folder = arguments.labels or arguments.cams
    if not folder.is_dir():
        raise UsageError(f"--{'labels' if arguments.labels else 'cams'} must be a folder, got {shown(folder)}")
    try:
        index, count = parse_shard(arguments.shard)
        pictures = open_dataset(arguments.data, arguments.split, masks=arguments.masks)
    except ValueError as error:
        raise UsageError(str(error)) from None
    numbers = range(index, len(pictures), count)
    with Progress(len(numbers)) as progress:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a picture a thread
        try:
            result = _evaluate(arguments, pictures, folder, numbers, progress)
        finally:
            torch.set_num_threads(threads)
        for name, reason in result.failed:
            progress.say(f"failed: {shown(name)}: {reason}")
    if not result.pictures and not result.failed:
        raise UsageError(f"none of the {len(numbers)} pictures of {shown(arguments.data)} has a mask")
    report = _report(arguments, pictures, result, len(numbers))
    print("\n".join(_table(report)))
    if arguments.json is not None:
        try:
            write_atomically(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"--json must be a file that can be written ({error})") from None
        print(f"written: {shown(arguments.json)}")
    return SOME_FAILED if result.failed else DONE


def _evaluate(
    arguments: argparse.Namespace, pictures: PictureSet, folder: Path, numbers: range, progress: Progress
) -> Evaluation:
    workers = arguments.workers
    if arguments.labels is not None:
        skip = arguments.ignored == "skip"
        return evaluate_labels(
            pictures, folder, skip_ignored=skip, numbers=numbers, workers=workers, progress=progress.add
        )
    return evaluate_maps(
        pictures,
        folder,
        thresholds=np.arange(arguments.thresholds) / arguments.thresholds,
        normalize=arguments.normalize,
        numbers=numbers,
        workers=workers,
        progress=progress.add,
    )


def _report(arguments: argparse.Namespace, pictures: PictureSet, result: Evaluation, count: int) -> dict[str, Any]:
    report: dict[str, Any] = {
        "format": _FORMAT,
        "data": shown(pictures.root),
        "split": pictures.split or "all pictures",
        "shard": arguments.shard,
        "pictures": result.pictures,
        "of": count,
        "without_mask": result.without_mask,
        "failed": [{"id": shown(name), "reason": reason} for name, reason in result.failed],
        "classes": ["background", *pictures.classes],
    }
    if result.sweep is None:
        report["labels"] = _numbers(result.confusion)
        report["labels"]["predicted_255"] = {"pixels": result.ignored, "counted_as": arguments.ignored}
        return report
    threshold, confusion = result.sweep.best()
    means = zip(result.sweep.thresholds.tolist(), result.sweep.mean_iou().tolist(), strict=True)
    report["label_free"] = _numbers(result.confusion)
    report["oracle"] = {"threshold": threshold, **_numbers(confusion)}
    report["sweep"] = [{"threshold": t, "mean_iou": _number(m)} for t, m in means]
    return report


def _numbers(confusion: Confusion) -> dict[str, Any]:
    return {
        "mean_iou": _number(confusion.mean_iou()),
        "iou": [_number(x) for x in confusion.iou().tolist()],
        "precision": [_number(x) for x in confusion.precision().tolist()],
        "recall": [_number(x) for x in confusion.recall().tolist()],
        "pixel_accuracy": _number(confusion.pixel_accuracy()),
        "confusion": confusion.counts.tolist(),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _table(report: dict[str, Any]) -> list[str]:
    title = f"{report['data']}, {report['split']}: {report['pictures']} of {report['of']} pictures"
    if report["shard"] != "0/1":
        title += f" (shard {report['shard']})"
    if report["without_mask"]:
        title += f", {report['without_mask']} without a mask"
    if report["failed"]:
        title += f", {len(report['failed'])} failed"
    columns = [(name, report[name]) for name in ("labels", "label_free", "oracle") if name in report]
    width = max(12, *(len(shown(name)) for name in report["classes"]))
    heading = {"labels": "IoU %", "label_free": "label-free", "oracle": "oracle"}
    lines = [title, " ".join([" " * width, *(f"{heading[name]:>10}" for name, _ in columns)])]
    for c, name in enumerate(report["classes"]):
        lines.append(" ".join([f"{shown(name):<{width}}", *(f"{_percent(x['iou'][c]):>10}" for _, x in columns)]))
    lines.append(" ".join([f"{'mean IoU':<{width}}", *(f"{_percent(x['mean_iou']):>10}" for _, x in columns)]))
    absent = sum(x is None for x in columns[0][1]["iou"])
    if absent:
        lines.append(f"{absent} classes are in no mask and in no prediction; the mean leaves them out")
    if "oracle" in report:
        lines.append("label-free: each picture's threshold from its maps alone, as without masks")
        lines.append(f"oracle: the one threshold ({report['oracle']['threshold']:g}) that is best with the masks known")
    else:
        undecided = report["labels"]["predicted_255"]
        if undecided["pixels"]:
            how = "left out" if undecided["counted_as"] == "skip" else "counted as background"
            lines.append(f"{undecided['pixels']:,} pixels predicted 255 are {how}")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
