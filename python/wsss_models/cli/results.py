"""The rows of a run's table: what a stage's maps or labels are worth against the masks of a split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.pictures import PictureSet
from wsss_models.evaluate import Confusion, Evaluation, evaluate_labels, evaluate_maps

_WORKERS = 2  # threads


@dataclass(frozen=True)
class Row:
    """IoU of a stage in 0..1; None of a class that is in no mask and no prediction, and where there are no masks."""

    stage: str
    split: str
    pictures: int  # that have a mask
    miou: float | None
    per_class: dict[str, float | None]
    note: str


def of_labels(stage: str, pictures: PictureSet, folder: Path, note: str) -> Row:
    result = _with_one_thread(lambda: evaluate_labels(pictures, folder, workers=_WORKERS))
    return _row(stage, pictures, result, result.confusion, note)


def of_maps(stage: str, pictures: PictureSet, folder: Path) -> list[Row]:
    """At the threshold that is best with the masks known, and at each picture's own, found without."""
    result = _with_one_thread(lambda: evaluate_maps(pictures, folder, workers=_WORKERS))
    assert result.sweep is not None
    threshold, best = result.sweep.best()
    chosen = f"one threshold, {threshold:g}, the best with the masks known"
    return [
        _row(f"{stage} best", pictures, result, best, chosen),
        _row(f"{stage} free", pictures, result, result.confusion, "each picture's threshold found without masks"),
    ]


def table(rows: list[Row]) -> list[str]:
    """Classes downwards, stages across; what each stage is below."""
    if not any(row.pictures for row in rows):
        return ["No picture has a mask to compare with, so nothing is measured."]
    classes = list(rows[0].per_class)
    width = max(10, *(len(shown(name)) for name in classes))
    widths = [max(8, len(row.stage), len(row.split)) for row in rows]

    def line(first: str, cells: list[str]) -> str:
        return "  ".join([f"{first:<{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))])

    lines = [line("IoU %", [row.stage for row in rows]), line("split", [shown(row.split) for row in rows])]
    lines.append(line("pictures", [str(row.pictures) for row in rows]))
    lines += [line(shown(name), [_percent(row.per_class[name]) for row in rows]) for name in classes]
    lines.append(line("mean", [_percent(row.miou) for row in rows]))
    return [*lines, *(f"{row.stage}: {row.note}" for row in rows)]


def _row(stage: str, pictures: PictureSet, result: Evaluation, confusion: Confusion, note: str) -> Row:
    if result.failed:
        name, reason = result.failed[0]
        raise FileError(name, f"cannot be evaluated ({reason})")
    names = ["background", *pictures.classes]
    values = dict(zip(names, map(_number, confusion.iou().tolist()), strict=True))
    if not result.pictures:
        note = f"{note}; no masks to compare with"
    return Row(stage, pictures.split or "all", result.pictures, _number(confusion.mean_iou()), values, note)


def _with_one_thread(work: Callable[[], Evaluation]) -> Evaluation:
    """A picture a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
