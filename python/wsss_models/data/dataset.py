"""Open a folder of pictures, whatever its layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wsss_models.data import coco, labelled_folder, voc
from wsss_models.data.artefacts import FileError
from wsss_models.data.coco import CocoSet
from wsss_models.data.labelled_folder import LabelledFolder
from wsss_models.data.pictures import PictureSet
from wsss_models.data.table import TABLE, read_labels
from wsss_models.data.voc import VocSet


def open_dataset(
    path: Path | str,
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    labels: Path | str | None = None,
    masks: str | None = None,
) -> PictureSet:
    """Open a folder of pictures with image-level labels; its layout is recognised by what is in it.

    * PASCAL VOC: a folder `JPEGImages`. Splits are lists in `ImageSets/Segmentation` or `ImageSets/Main`, labels the
      object names of `Annotations/<id>.xml`, masks `SegmentationClass/<id>.png` (`SegmentationClassAug` for the split
      "train_aug"). Classes are those of `classes.txt`, one name a line, or else the 20 of VOC.
    * COCO: `annotations/instances_<split>.json`, such as train2014. Labels and masks come from the instances, classes
      from the categories in the order of their ids, numbered without gaps.
    * A folder of one's own: `labels.csv` (`table.read_labels` has the format), pictures beside it or in `images`,
      masks `masks/<id>.png` where there are any. Splits are lists `<split>.txt`, or a column `split` of the table.

    Args:
        path: the folder.
        split: name of the split, or path of a list with one id a line; None = all pictures (COCO: the only split).
        classes: names in the order of their ids, instead of the set's own. COCO refuses it.
        labels: a table of labels instead of the set's own (VOC and one's own folder), or "masks": the classes that
            each picture's mask shows. COCO refuses it.
        masks: name of the folder of the masks instead of the set's own.

    Returns:
        PictureSet: opened. Damaged pictures, labels and masks are found when read; `wsss data check` reads all.

    Raises:
        FileError: no such folder, no known layout, no such split; names the file and the line.

    Example:
        >>> pictures = open_dataset("VOCdevkit/VOC2012", "train_aug")  # doctest: +SKIP
        >>> pictures.image(0).shape, pictures.label(0).shape  # doctest: +SKIP
        ((375, 500, 3), (20,))
    """
    root = Path(path)
    kind = layout_of(root, labels)
    if kind == "voc":
        return VocSet(root, split, classes=classes, labels=labels, masks=masks)
    if kind == "folder":
        return LabelledFolder(root, split, classes=classes, labels=labels, masks=masks)
    if classes is not None or labels is not None:
        raise ValueError("classes and labels must be None for a COCO folder, whose json holds both")
    return CocoSet(root, split, masks=masks)


def list_splits(path: Path | str, *, labels: Path | str | None = None) -> list[str]:
    """Names of the splits that `open_dataset` knows of a folder.

    Raises:
        FileError: no such folder, no known layout.
    """
    root = Path(path)
    kind = layout_of(root, labels)
    if kind == "voc":
        return voc.splits(root)
    if kind == "coco":
        return coco.splits(root)
    return labelled_folder.splits(root, read_labels(root / TABLE if labels in (None, "masks") else Path(str(labels))))


def layout_of(root: Path, labels: Path | str | None = None) -> str:
    """ "voc", "coco" or "folder".

    Raises:
        FileError: no such folder, no known layout.
    """
    if not root.is_dir():
        raise FileError(root, "no such folder" if not root.exists() else "not a folder")
    if (root / "JPEGImages").is_dir():
        return "voc"
    if any((root / "annotations").glob("instances_*.json")):
        return "coco"
    if labels not in (None, "masks") or (root / TABLE).is_file():
        return "folder"
    raise FileError(
        root,
        f"must hold JPEGImages (PASCAL VOC), annotations/instances_*.json (COCO), or {TABLE} (a folder of your own)",
    )
