"""The sub-categories of a run for its page: of each class the clusters of the last round, and pictures of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.dataset import open_dataset
from wsss_models.data.pictures import PictureSet
from wsss_models.report import Panel, Run, jpeg, reduced
from wsss_models.subcategories import SUB_CATEGORIES, Found, read_sub_categories

NEAREST = 8  # pictures of a sub-category on the page
_SIDE = 96  # pixels of their long side


@dataclass(frozen=True)
class SubCategory:
    """Pictures of one class whose features are alike."""

    number: int  # 0..K-1
    pictures: int  # that belong to it
    nearest: list[Panel]  # to its center, the nearest first


@dataclass(frozen=True)
class SubCategoryGallery:
    """The sub-categories that the last round of a run was trained on."""

    run: str
    stage: str  # folder of the round
    classes: dict[str, list[SubCategory]] = field(default_factory=dict)  # those in no picture left out


def make_sub_category_galleries(
    runs: Sequence[Run],
    data: Path | None,
    *,
    count: int = NEAREST,
    failed: Callable[[str, str], None] = lambda name, reason: None,
) -> list[SubCategoryGallery]:
    """One of each run that has sub-categories.

    Args:
        runs: the runs of a page.
        data: the set's folder, where it is not (or no longer) that of the results.
        count: pictures of a sub-category, those nearest to its center.
        failed: called with the name and the reason where a file cannot be used.
    """
    galleries = []
    for run in runs:
        path = _last(run.path)
        if path is None:
            continue
        try:
            found = read_sub_categories(path)
            pictures = open_dataset(Path(str(run.results.get("data", "?"))) if data is None else data)
        except (ValueError, OSError) as error:
            failed(shown(path), str(error))
            continue
        galleries.append(SubCategoryGallery(run.name, path.parent.name, _classes(found, pictures, count, failed)))
    return galleries


def _last(run: Path) -> Path | None:
    """The file of the round with the highest number."""
    numbers = {path: re.fullmatch(r"round(\d+)", path.parent.name) for path in run.glob(f"*/{SUB_CATEGORIES}")}
    return max((p for p, n in numbers.items() if n), key=lambda p: int(p.parent.name[5:]), default=None)


def _classes(
    found: Found, pictures: PictureSet, count: int, failed: Callable[[str, str], None]
) -> dict[str, list[SubCategory]]:
    numbers = {name: i for i, name in enumerate(pictures.ids)}
    drawn: dict[str, Panel] = {}

    def panel(name: str) -> Panel:
        if name not in drawn:
            try:
                if name not in numbers:
                    raise FileError(name, "not in the set of pictures")
                small = reduced(pictures.image(numbers[name]), _SIDE)
                drawn[name] = Panel(name, jpeg(small), small.shape[1::-1])
            except (ValueError, OSError, MemoryError) as error:
                failed(name, str(error) or "not enough memory")
                drawn[name] = Panel(name, note="cannot be read")
        return drawn[name]

    classes = {}
    for c, title in enumerate(found.classes):
        parts = []
        for k in range(found.clusters):
            members = np.flatnonzero(found.assigned[:, c] == k)
            members = members[np.lexsort((members, found.distances[members, c]))]
            if len(members):
                nearest = [panel(found.ids[i]) for i in members[:count]]
                parts.append(SubCategory(k, len(members), nearest))
        if parts:
            classes[title] = parts
    return classes
