"""PASCAL VOC folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.files import PICTURE_SUFFIXES
from wsss_models.data.folder import inside, list_files
from wsss_models.data.lists import class_ids_of, read_classes, read_split
from wsss_models.data.pictures import PictureSet, classes_in, read_set_mask
from wsss_models.data.table import Table, read_labels

# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
_SPLIT_FOLDERS = ("Segmentation", "SegmentationAug", "Main", "")  # of ImageSets, in this order
_AUGMENTED = ("train_aug", "trainaug", "train_aug_val")  # their masks are in SegmentationClassAug
_MAX_XML_BYTES = 4 << 20


class VocSet(PictureSet):
    """See `dataset.open_dataset`. Labels are all object names of a picture's XML, those marked difficult too."""

    kind = "voc"

    def __init__(
        self,
        root: Path,
        split: str | None = None,
        *,
        classes: Sequence[str] | None = None,
        labels: Path | str | None = None,
        masks: str | None = None,
    ) -> None:
        super().__init__(root, split, classes or read_classes(root) or CLASSES, _ids(root, split))
        self._table: Table | None = None if labels in (None, "masks") else read_labels(Path(str(labels)))
        self._from_masks = labels == "masks"
        self.mask_folder = root / (masks or _mask_folder(root, split))
        if masks is not None and not self.mask_folder.is_dir():
            raise FileError(self.mask_folder, "no such folder of masks")

    def image_path(self, i: int) -> Path:
        folder = self.root / "JPEGImages"
        candidates = (inside(folder, self.ids[i], suffix) for suffix in (".jpg", *PICTURE_SUFFIXES))
        return next((path for path in candidates if path.exists()), inside(folder, self.ids[i], ".jpg"))

    def class_ids(self, i: int) -> list[int]:
        name = self.ids[i]
        if self._from_masks:
            mask = self.mask(i)
            if mask is None:
                raise FileError(self.mask_path(i), "no such mask, from which the label was to be read")
            return classes_in(mask)
        if self._table is not None:
            return self._table.class_ids(name, self.classes)
        path = inside(self.root / "Annotations", name, ".xml")
        found = object_names(path)
        for wanted, line in found:
            class_ids_of([wanted], self.classes, path, line)
        return class_ids_of([wanted for wanted, _ in found], self.classes, path)

    def mask_path(self, i: int) -> Path:
        return inside(self.mask_folder, self.ids[i], ".png")

    def mask(self, i: int) -> np.ndarray | None:
        return read_set_mask(self.mask_path(i), len(self.classes))

    def has_mask(self, i: int) -> bool:
        return self.mask_path(i).exists()


def object_names(path: Path) -> list[tuple[str, int]]:
    """(name, line) of every object in a VOC annotation.

    Raises:
        FileError: missing, damaged, or an object without a name.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileError(path, "no such annotation, which holds the picture's label") from None
    except OSError as error:
        raise FileError(path, (error.strerror or str(error)).rstrip(".")) from error
    if len(data) > _MAX_XML_BYTES or b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # entities can grow without end
        raise FileError(path, f"annotation must be plain XML under {_MAX_XML_BYTES >> 20} MB, without a DOCTYPE")
    try:
        objects = ElementTree.fromstring(data).findall("object")
    except ElementTree.ParseError as error:
        raise FileError(path, f"line {error.position[0]}: no valid XML ({error})") from None
    except (ValueError, LookupError) as error:  # the encoding it claims
        raise FileError(path, f"no valid XML ({error})") from None
    names = []
    at = 0
    for number, item in enumerate(objects, start=1):
        at = data.find(b"<object", at + 1)
        line = data.count(b"\n", 0, at) + 1
        name = (item.findtext("name") or "").strip()
        if not name:
            raise FileError(path, f"line {line}: object {number} must have a name, got none")
        names.append((name, line))
    return names


def _ids(root: Path, split: str | None) -> list[str]:
    if split is None:
        ids = list(list_files(root / "JPEGImages", PICTURE_SUFFIXES))
        if not ids:
            raise FileError(root / "JPEGImages", "must hold pictures, got none")
        return ids
    for folder in _SPLIT_FOLDERS:
        path = root / "ImageSets" / folder / f"{split}.txt"
        if path.is_file():
            return read_split(path)
    if Path(split).is_file():
        return read_split(Path(split))
    raise FileError(
        root / "ImageSets", f"split must be one of {', '.join(splits(root)) or '(none found)'}, got {shown(split)!r}"
    )


def splits(root: Path) -> list[str]:
    """Names of the lists in ImageSets; not those of one class (`cat_train.txt`), whose lines have a second word."""
    found = []
    for folder in _SPLIT_FOLDERS:
        for path in sorted((root / "ImageSets" / folder).glob("*.txt")):
            with path.open(encoding="utf-8", errors="replace") as file:
                words = file.readline().split()
            if path.stem not in found and (len(words) < 2 or words[0].startswith("/")):
                found.append(path.stem)
    return found


def _mask_folder(root: Path, split: str | None) -> str:
    first, second = "SegmentationClass", "SegmentationClassAug"
    if split in _AUGMENTED:
        first, second = second, first
    return first if (root / first).is_dir() or not (root / second).is_dir() else second
