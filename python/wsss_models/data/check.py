"""Look over a set of pictures: what is there, what is missing, what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.pictures import PictureSet


@dataclass
class Findings:
    """Of one set of pictures; counts are pictures unless said otherwise."""

    pictures: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)
    labelled: int = 0
    without_class: int = 0  # labelled, and nothing of any class in them
    labels: Counter[int] = field(default_factory=Counter)  # class id -> pictures
    masks: int = 0
    mask_pictures: Counter[int] = field(default_factory=Counter)  # class id -> pictures whose mask shows it
    mask_pixels: Counter[int] = field(default_factory=Counter)  # id -> pixels, 0 and 255 too
    not_in_label: int = 0  # whose mask shows a class that the label lacks
    not_in_mask: int = 0  # whose label has a class that the mask does not show
    problems: list[str] = field(default_factory=list)  # one line each, `<path>: <reason>`


def look_over(pictures: PictureSet, *, workers: int = 1, progress: Callable[[], None] = lambda: None) -> Findings:
    """Read every picture, label and mask of a set.

    Args:
        pictures: the set.
        workers: threads.
        progress: called after each picture.

    Returns:
        Findings: no file, however damaged, is an exception.
    """
    found = Findings()
    with ThreadPoolExecutor(workers) as pool:
        for one in pool.map(lambda i: _look_at(pictures, i), range(len(pictures))):
            _add(found, one)
            progress()
    return found


@dataclass
class _One:
    size: tuple[int, int] | None = None
    label: list[int] | None = None
    mask: np.ndarray | None = None  # [256] pixels of each id
    problems: list[str] = field(default_factory=list)


def _look_at(pictures: PictureSet, i: int) -> _One:
    one = _One()
    mask = None
    try:
        height, width = pictures.image(i).shape[:2]
        one.size = (height, width)
    except (ValueError, OSError) as error:
        one.problems.append(_line(pictures, i, error))
    try:
        one.label = pictures.class_ids(i)
    except (ValueError, OSError) as error:
        one.problems.append(_line(pictures, i, error))
    try:
        mask = pictures.mask(i)
    except (ValueError, OSError) as error:
        if _line(pictures, i, error) not in one.problems:  # labels read from masks fail with them
            one.problems.append(_line(pictures, i, error))
    if mask is not None:
        one.mask = np.bincount(mask.reshape(-1), minlength=256)
        if one.size is not None and mask.shape != one.size:
            sizes = f"{mask.shape[0]} x {mask.shape[1]} for a picture of {one.size[0]} x {one.size[1]}"
            one.problems.append(f"{shown(pictures.image_path(i))}: the mask must have the picture's size, got {sizes}")
    return one


def _line(pictures: PictureSet, i: int, error: Exception) -> str:
    return str(error) if isinstance(error, FileError) else f"{shown(pictures.ids[i])}: {error}"


def _add(found: Findings, one: _One) -> None:
    found.pictures += 1
    found.problems += one.problems
    if one.size is not None:
        found.sizes[one.size] += 1
    if one.label is not None:
        found.labelled += 1
        found.without_class += not one.label
        found.labels.update(one.label)
    if one.mask is None:
        return
    found.masks += 1
    found.mask_pixels.update({int(c): int(one.mask[c]) for c in np.flatnonzero(one.mask)})
    shows = {int(c) for c in np.flatnonzero(one.mask[:255]) if c}
    found.mask_pictures.update(shows)
    if one.label is not None:
        found.not_in_label += bool(shows - set(one.label))
        found.not_in_mask += bool(set(one.label) - shows)
