"""From a set of pictures to what a system trains on, training labels made from CAMs included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import wsss_kernels as wk
from wsss_models.data.artefacts import FileError, png_settings
from wsss_models.data.files import fingerprint, read_maps, write_label
from wsss_models.data.folder import inside
from wsss_models.data.masks import read_grey, read_mask
from wsss_models.data.pictures import PictureSet
from wsss_models.data.samples import Samples
from wsss_models.recipe import Recipe

_FORMAT = 1  # raised when the same settings give other labels


def needs_affinity_labels(module: ModuleType, config: Any) -> bool:
    """Whether this stage of a system trains on labels from CAMs."""
    return hasattr(module, "shrink_labels") and getattr(config, "stage", "affinity") == "affinity"


def needs_masks(module: ModuleType) -> bool:
    """Whether a system trains on label pictures: pseudo-labels, or masks."""
    return getattr(module, "TRAINS_ON_MASKS", False)


def takes_saliency(module: ModuleType) -> bool:
    """Whether a system can make use of saliency maps."""
    return getattr(module, "TAKES_SALIENCY", False)


def needs_sub_labels(module: ModuleType) -> bool:
    """Whether a system trains on sub-categories of the classes."""
    return hasattr(module, "sub_categories")


def samples_of(
    module: ModuleType,
    config: Any,
    pictures: PictureSet,
    *,
    seed: int = 0,
    labels: Path | None = None,
    saliency: Path | None = None,
    sub_labels: np.ndarray | None = None,
) -> Samples:
    """The augmented samples that the loss of a system takes.

    Args:
        module: of the system.
        config: its settings.
        pictures: the set.
        seed: of the augmentations.
        labels: folder of label PNGs of the pictures' sizes (0 background, 255 not sure), where the stage needs them; a
            system that trains on masks takes the set's own without it.
        saliency: folder of saliency PNGs of the pictures' sizes (grey, 0..255), where the system takes them
            (`takes_saliency`); its samples then have "saliency" [1, h, w] in 0..1, 0 in the padding.
        sub_labels: [N, C * K] in the order of the set, where the system needs them.
    """
    recipe: Recipe = config.recipe
    if needs_sub_labels(module):
        if sub_labels is None or len(sub_labels) != len(pictures):
            got = None if sub_labels is None else list(sub_labels.shape)
            raise ValueError(f"sub_labels must be [N, C * K] with N = {len(pictures)} for this system, got {got}")
        return Samples(pictures, recipe.augment(), seed=seed, extras={"sublabel": sub_labels.__getitem__})
    if needs_masks(module):
        if labels is None:
            return Samples(pictures, recipe.augment(), seed=seed, mask=True)
        return Samples(pictures, recipe.augment(), seed=seed, maps={"mask": partial(_label, pictures, labels)})
    if not needs_affinity_labels(module, config):
        maps = {} if saliency is None else {"saliency": partial(_saliency, pictures, saliency)}
        return Samples(pictures, recipe.augment(), seed=seed, maps=maps)
    if labels is None:
        raise ValueError("labels must be a folder of label PNGs for this stage, got None")
    stride = module.STRIDE
    if recipe.crop % stride:
        raise ValueError(f"crop must be a multiple of {stride} for this stage, got {recipe.crop}")
    read = partial(_label, pictures, labels)
    finish = partial(_shrunk, module.shrink_labels)
    return Samples(pictures, recipe.augment(), seed=seed, maps={"affinity_label": read}, finish=finish)


def labels_hash(pictures: PictureSet, labels: Path) -> str:
    """Tells folders of label or saliency PNGs apart by the bytes of the files of this set.

    Raises:
        FileError: a picture has none.
    """
    digest = hashlib.sha256()
    for name in pictures.ids:
        path = inside(labels, name, ".png")
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise FileError(path, (error.strerror or str(error)).rstrip(".")) from None
    return digest.hexdigest()[:16]


def write_training_labels(
    pictures: PictureSet,
    cams: Path,
    out: Path,
    *,
    how: str,
    options: Mapping[str, float] | None = None,
    workers: int = 2,
    failed: Callable[[str, str], None] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Label PNGs of a whole set from its CAMs, where two dense CRFs agree; what is there already is kept.

    Args:
        pictures: the set.
        cams: folder of one .npz a picture.
        out: folder of the PNGs.
        how: "affinity" (AffinityNet's low and high background) or "confident" (IRNet's).
        options: of `affinity_labels` or `confident_labels`, in place of the published ones.
        workers: pictures in work at the same time.
        failed: told id and reason of a picture that cannot be used; None = that is raised.
        advance: called with a count of pictures now and then.

    Returns:
        int: how many were written.

    Raises:
        FileError: a picture or its CAMs cannot be used, where `failed` is None.
    """
    make = {"affinity": wk.affinity_labels, "confident": wk.confident_labels}[how]
    chosen = dict(options or {})

    def one(i: int) -> bool:
        name = pictures.ids[i]
        path, maps = inside(out, name, ".png"), inside(cams, name, ".npz")
        inputs = [fingerprint(pictures.image_path(i)), fingerprint(maps)]
        settings = json.dumps({"labels": how, "format": _FORMAT, "options": chosen, "inputs": inputs})
        if png_settings(path) == settings:
            return False
        class_ids, values = read_maps(maps, num_classes=len(pictures.classes))
        image = torch.from_numpy(pictures.image(i)).permute(2, 0, 1)
        if len(class_ids):
            found = make(image, torch.from_numpy(values), **chosen).numpy()
            table = np.arange(256)
            table[1 : len(class_ids) + 1] = class_ids
            label = table[found]
        else:
            label = np.zeros(image.shape[1:], dtype=np.int64)
        write_label(path, label, settings=settings)
        return True

    written = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a picture a thread
    try:
        with ThreadPoolExecutor(workers) as pool:
            for i, future in enumerate([pool.submit(one, i) for i in range(len(pictures))]):
                try:
                    written += future.result()
                except (ValueError, OSError) as error:
                    if failed is None:
                        pool.shutdown(cancel_futures=True)
                        raise
                    failed(pictures.ids[i], str(error))
                advance(1)
    finally:
        torch.set_num_threads(threads)
    return written


def _label(pictures: PictureSet, labels: Path, i: int) -> np.ndarray:
    return read_mask(inside(labels, pictures.ids[i], ".png"), num_classes=len(pictures.classes))


def _saliency(pictures: PictureSet, folder: Path, i: int) -> np.ndarray:
    return read_grey(inside(folder, pictures.ids[i], ".png"))[None].astype(np.float32) / 255


def _shrunk(shrink: Callable[[torch.Tensor], torch.Tensor], sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "affinity_label": shrink(sample["affinity_label"])}
