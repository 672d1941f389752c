"""COCO folders, read without pycocotools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wsss_models.data.artefacts import FileError, shown
from wsss_models.data.coco_masks import paint
from wsss_models.data.files import MAX_PIXELS
from wsss_models.data.folder import check_id, inside
from wsss_models.data.pictures import PictureSet, read_set_mask


class CocoSet(PictureSet):
    """See `dataset.open_dataset`. Ids are the pictures' file names without suffix, in the order of their numbers.

    Masks are painted from the instances: crowds first, then larger instances under smaller ones. Opening reads the
    whole json (COCO's train2014: some seconds, a few GB while it is parsed); the outlines are kept from the first
    mask on.
    """

    kind = "coco"

    def __init__(self, root: Path, split: str | None = None, *, masks: str | None = None) -> None:
        self._json = _annotations(root, split)
        split = self._json.stem.removeprefix("instances_")
        content = _read(self._json)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self._class_of = {category["id"]: c + 1 for c, category in enumerate(categories)}
        self._images = sorted((_Image(self._json, i) for i in content["images"]), key=lambda image: image.number)
        super().__init__(
            root, split, [str(category["name"]) for category in categories], [i.name for i in self._images]
        )
        number = {image.number: i for i, image in enumerate(self._images)}
        if len(number) < len(self._images) or len(set(self.ids)) < len(self._images):
            raise FileError(self._json, "each picture must have an id and a file_name of its own, got one twice")
        present: list[set[int]] = [set() for _ in self._images]
        for annotation in content["annotations"]:
            present[_picture(self._json, number, annotation)].add(_category(self._json, self._class_of, annotation))
        self._present = [sorted(found) for found in present]
        self._outlines: dict[int, list[Any]] | None = None
        folders = (root / split, root / "images" / split, root / "images", root)
        self._folder = next((folder for folder in folders if folder.is_dir()), root)
        self._mask_folder = None if masks is None else root / masks
        if self._mask_folder is not None and not self._mask_folder.is_dir():
            raise FileError(self._mask_folder, "no such folder of masks")

    def image_path(self, i: int) -> Path:
        return inside(self._folder, self._images[i].file, "")

    def class_ids(self, i: int) -> list[int]:
        return list(self._present[i])

    def mask(self, i: int) -> np.ndarray | None:
        if self._mask_folder is not None:
            return read_set_mask(inside(self._mask_folder, self.ids[i], ".png"), len(self.classes))
        if self._outlines is None:
            self._outlines = {}
            for annotation in _read(self._json)["annotations"]:
                self._outlines.setdefault(annotation["image_id"], []).append(annotation)
        image = self._images[i]
        instances = self._outlines.get(image.number, [])
        return paint(self._json, instances, self._class_of, image.height, image.width)

    def has_mask(self, i: int) -> bool:
        return self._mask_folder is None or inside(self._mask_folder, self.ids[i], ".png").exists()

    def _select(self, numbers: list[int]) -> None:
        super()._select(numbers)
        self._images = [self._images[i] for i in numbers]
        self._present = [self._present[i] for i in numbers]


class _Image:
    __slots__ = ("file", "height", "name", "number", "width")

    def __init__(self, path: Path, image: dict[str, Any]) -> None:
        try:
            self.number, self.file = int(image["id"]), str(image["file_name"])
            self.height, self.width = int(image["height"]), int(image["width"])
            self.name = check_id(self.file.rpartition(".")[0] or self.file)
            if not (self.height > 0 < self.width and self.height * self.width <= MAX_PIXELS):
                raise ValueError(f"{self.height} x {self.width} must be 1..{MAX_PIXELS} pixels")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FileError(path, f"image {image!a:.80} must have id, file_name, height and width ({error})") from None


def _annotations(root: Path, split: str | None) -> Path:
    found = {
        path.stem.removeprefix("instances_"): path for path in sorted((root / "annotations").glob("instances_*.json"))
    }
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise FileError(root / "annotations", f"split must be one of {', '.join(found)}, got {split!r}")
    return found[split]


def splits(root: Path) -> list[str]:
    return [path.stem.removeprefix("instances_") for path in sorted((root / "annotations").glob("instances_*.json"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise FileError(path, f"line {error.lineno}: no valid JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(path, f"cannot be read ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise FileError(path, f"must hold the lists images, annotations and categories, got no {key}")
    for category in content["categories"]:
        sound = isinstance(category, dict) and isinstance(category.get("id"), int)
        if not sound or not isinstance(category.get("name"), str):
            raise FileError(path, f"category must have an id and a name, got {category!a:.80}")
    return content


def _picture(path: Path, number: dict[int, int], annotation: dict[str, Any]) -> int:
    image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
    if not isinstance(image_id, int) or image_id not in number:
        raise FileError(
            path, f"annotation {_name(annotation)}: image_id must be that of a picture, got {image_id!a:.40}"
        )
    return number[image_id]


def _category(path: Path, class_of: dict[int, int], annotation: dict[str, Any]) -> int:
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in class_of:
        raise FileError(path, f"annotation {_name(annotation)}: unknown category_id {category!a:.40}")
    return class_of[category]


def _name(annotation: Any) -> str:
    return shown(str(annotation.get("id"))) if isinstance(annotation, dict) else f"{annotation!a:.40}"
