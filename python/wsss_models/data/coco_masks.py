"""Instance outlines of COCO as label pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wsss_models.data.artefacts import FileError


def paint(path: Path, instances: list[dict[str, Any]], class_of: dict[int, int], height: int, width: int) -> np.ndarray:
    """[H, W] uint8: crowds first, then larger instances under smaller ones.

    Raises:
        FileError: an outline that is neither polygons nor run lengths of this size; `path` is the json's.
    """
    mask = np.zeros((height, width), dtype=np.uint8)
    at: Any = None
    try:
        for instance in sorted(instances, key=lambda one: (not one.get("iscrowd"), -float(one.get("area", 0)))):
            at = instance.get("id")
            mask[outline_mask(instance["segmentation"], height, width)] = class_of[instance["category_id"]]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        name = "of the picture" if at is None else at
        raise FileError(path, f"annotation {name!a:.40}: segmentation cannot be used ({error})") from None
    return mask


def outline_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """[H, W] bool of a COCO `segmentation`: a list of polygons, or run lengths, plain or packed in a string.

    A pixel is inside a polygon where its centre is (even-odd rule); pixels on an edge may differ from pycocotools'.
    """
    if isinstance(segmentation, dict):
        size = [int(n) for n in segmentation["size"]]
        if size != [height, width]:
            raise ValueError(f"size must be that of the picture, {[height, width]}, got {size}")
        counts = segmentation["counts"]
        return run_lengths(unpacked(counts) if isinstance(counts, (str, bytes)) else counts, height, width)
    mask = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        mask |= polygon_mask(np.asarray(polygon, dtype=np.float64), height, width)
    return mask


def polygon_mask(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] bool: pixels (y, x) whose centre (x + 0.5, y + 0.5) is inside the polygon x0, y0, x1, y1, ..."""
    if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise ValueError(f"polygon must be three or more finite points x, y, got {polygon.size} numbers")
    xs, ys = polygon[0::2], polygon[1::2]
    crossings = np.zeros((height, width + 1), dtype=np.int32)
    for x0, y0, x1, y1 in zip(xs, ys, np.roll(xs, -1), np.roll(ys, -1), strict=True):
        low, high = sorted((y0, y1))
        rows = np.arange(
            max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5)))
        )  # centres in [low, high)
        if len(rows):
            at = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            crossings[rows, np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)] += 1
    return (np.cumsum(crossings, axis=1)[:, :width] & 1).astype(bool)


def run_lengths(counts: Any, height: int, width: int) -> np.ndarray:
    """[H, W] bool of runs of outside, inside, outside, ... down the columns, one after the other."""
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths must sum to {height * width} pixels, got {runs.sum()}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def unpacked(text: str | bytes) -> list[int]:
    """The run lengths of COCO's string: 5 bits a character from 48 on, bit 5 = more follow, bit 4 of the last = minus;
    from the fourth on a run is the difference to the one before the previous."""
    codes = text.encode("ascii") if isinstance(text, str) else text
    runs: list[int] = []
    at = 0
    while at < len(codes):
        value = shift = 0
        while True:
            bits = codes[at] - 48
            at += 1
            if not 0 <= bits < 64:
                raise ValueError(f"run lengths hold the character {codes[at - 1]}")
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:
                    value -= 1 << shift
                break
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
