"""A folder of one's own: pictures and a table of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.files import PICTURE_SUFFIXES
from wsss_models.data.folder import inside, list_files
from wsss_models.data.lists import CLASSES_FILE, read_classes, read_split
from wsss_models.data.pictures import PictureSet, classes_in, read_set_mask
from wsss_models.data.table import TABLE, Table, read_labels


class LabelledFolder(PictureSet):
    """See `dataset.open_dataset`."""

    kind = "folder"

    def __init__(
        self,
        root: Path,
        split: str | None = None,
        *,
        classes: Sequence[str] | None = None,
        labels: Path | str | None = None,
        masks: str | None = None,
    ) -> None:
        self._table = read_labels(root / TABLE if labels in (None, "masks") else Path(str(labels)))
        super().__init__(root, split, classes or _classes(root, self._table), _ids(root, split, self._table))
        self._from_masks = labels == "masks"
        self.image_folder = root / "images" if (root / "images").is_dir() else root
        self.mask_folder = root / (masks or "masks")
        if masks is not None and not self.mask_folder.is_dir():
            raise FileError(self.mask_folder, "no such folder of masks")

    def image_path(self, i: int) -> Path:
        row = self._table.rows.get(self.ids[i])
        if row is not None and row.file != self.ids[i]:
            return inside(self.image_folder, row.file, "")
        candidates = [inside(self.image_folder, self.ids[i], suffix) for suffix in PICTURE_SUFFIXES]
        return next((path for path in candidates if path.exists()), candidates[0])

    def class_ids(self, i: int) -> list[int]:
        if not self._from_masks:
            return self._table.class_ids(self.ids[i], self.classes)
        mask = self.mask(i)
        if mask is None:
            raise FileError(self.mask_path(i), "no such mask, from which the label was to be read")
        return classes_in(mask)

    def mask_path(self, i: int) -> Path:
        return inside(self.mask_folder, self.ids[i], ".png")

    def mask(self, i: int) -> np.ndarray | None:
        return read_set_mask(self.mask_path(i), len(self.classes))

    def has_mask(self, i: int) -> bool:
        return self.mask_path(i).exists()

    def unlisted(self) -> list[str]:
        """Ids of pictures in the folder that have no row in the table."""
        return [name for name in list_files(self.image_folder, PICTURE_SUFFIXES) if name not in self._table.rows]


def _classes(root: Path, table: Table) -> Sequence[str]:
    classes = read_classes(root) or table.names()
    if not classes:
        raise FileError(table.path, f"must name a class, got none (or list the classes in {CLASSES_FILE})")
    if all(name.isdecimal() for name in classes):
        raise FileError(table.path, f"holds ids of classes, whose names belong in {CLASSES_FILE}, one a line")
    return classes


def _ids(root: Path, split: str | None, table: Table) -> list[str]:
    if split is None:
        return list(table.rows)
    ids = [name for name, row in table.rows.items() if row.split == split]
    if ids:
        return ids
    for path in (root / f"{split}.txt", Path(split)):
        if path.is_file():
            return read_split(path)
    known = ", ".join(splits(root, table)) or "(none found)"
    raise FileError(root, f"split must be one of {known}, got {shown(split)!r}")


def splits(root: Path, table: Table) -> list[str]:
    """Names in the column `split`, then of the lists beside the table."""
    named = dict.fromkeys(row.split for row in table.rows.values() if row.split)
    lists = (path.stem for path in sorted(root.glob("*.txt")) if path.name != CLASSES_FILE)
    return list(dict.fromkeys([*named, *lists]))
