"""A set of pictures with image-level labels and, where known, masks: the contract every layout on disk fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np

from wsss_models.data.artefacts import shown
from wsss_models.data.files import read_picture
from wsss_models.data.lists import check_classes
from wsss_models.data.masks import read_mask


class PictureSet(ABC):
    """Pictures, labels and masks by number, 0 <= i < len(set). Nothing is read before it is asked for.

    Attributes:
        root: the folder.
        kind: "voc", "coco" or "folder".
        split: as asked for; None = all pictures.
        classes: names; class id c + 1 (in masks, label PNGs and `class_ids`) is classes[c], 0 is the background.
        ids: of the pictures; plain names without suffix, "sub/name" for pictures in sub-folders.
    """

    kind: str

    def __init__(self, root: Path, split: str | None, classes: Sequence[str], ids: Sequence[str]) -> None:
        self.root, self.split = root, split
        self.classes, self.ids = check_classes(root, classes), tuple(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        split = self.split or "all"
        return f"<{self.kind} {shown(self.root)}, {split}: {len(self)} pictures, {len(self.classes)} classes>"

    @abstractmethod
    def image_path(self, i: int) -> Path:
        """Where the picture is; the file need not exist."""

    @abstractmethod
    def class_ids(self, i: int) -> list[int]:
        """Ids (1..C, ascending) of the classes in the picture's label; empty = nothing of any class.

        Raises:
            FileError: the label is missing, damaged or names an unknown class; names the file and the line.
        """

    @abstractmethod
    def mask(self, i: int) -> np.ndarray | None:
        """[H, W] uint8, 0 background, 1..C classes, 255 ignore; None where the set has no mask of this picture.

        Raises:
            FileError: there is one that cannot be used.
        """

    @abstractmethod
    def has_mask(self, i: int) -> bool:
        """Whether `mask(i)` has something to read, without reading it."""

    def image(self, i: int) -> np.ndarray:
        """[H, W, 3] uint8 RGB, upright (`files.read_picture`).

        Raises:
            FileError: missing or damaged.
        """
        return read_picture(self.image_path(i))

    def label(self, i: int) -> np.ndarray:
        """[C] float32, 1 where the class is in the picture. Raises as `class_ids`."""
        label = np.zeros(len(self.classes), dtype=np.float32)
        label[[c - 1 for c in self.class_ids(i)]] = 1
        return label

    def labels(self) -> np.ndarray:
        """[N, C] float32, the labels of all pictures. Raises as `class_ids`."""
        labels = np.zeros((len(self), len(self.classes)), dtype=np.float32)
        for i in range(len(self)):
            labels[i] = self.label(i)
        return labels

    def index(self, name: str) -> int:
        """Number of the picture with this id.

        Raises:
            KeyError: there is none.
        """
        return self.ids.index(name)

    def subset(self, numbers: Sequence[int]) -> PictureSet:
        """The set of these pictures only, in this order.

        Example:
            >>> few = pictures.subset(range(10))  # doctest: +SKIP
        """
        part = copy(self)
        part._select([int(i) for i in numbers])
        return part

    def _select(self, numbers: list[int]) -> None:
        self.ids = tuple(self.ids[i] for i in numbers)


def read_set_mask(path: Path, num_classes: int) -> np.ndarray | None:
    """The mask at `path`, None where there is none."""
    return read_mask(path, num_classes=num_classes) if path.exists() else None


def classes_in(mask: np.ndarray) -> list[int]:
    """Ids that a mask shows, background and ignore left out."""
    counts = np.bincount(mask.reshape(-1), minlength=256)
    return [int(c) for c in np.flatnonzero(counts[:255]) if c]
