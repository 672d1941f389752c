"""Sub-categories of a set of pictures, on disk: features of a trained network and their clusters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wsss_models.data.artefacts import FileError, npz_settings
from wsss_models.data.files import read_array, read_arrays, write_arrays
from wsss_models.data.pictures import PictureSet
from wsss_models.infer import image_features, load_run, run_hash
from wsss_models.sccam import Config, sub_categories, sub_labels
from wsss_models.train import CHECKPOINT, data_hash

FEATURES, SUB_CATEGORIES = "features.npz", "subcategories.npz"
_FORMAT = 1  # raised when the same settings give other files


@dataclass(frozen=True)
class Found:
    """The sub-categories of a set."""

    ids: tuple[str, ...]  # of the pictures
    classes: tuple[str, ...]
    clusters: int  # of each class
    assigned: np.ndarray  # [N, C] int64, 0..clusters - 1; -1 where the class is not in the picture
    distances: np.ndarray  # [N, C] float32, to the center of the sub-category

    def digest(self) -> str:
        """Tells what is learnt from them apart."""
        digest = hashlib.sha256(f"{self.clusters} {self.assigned.shape}".encode())
        digest.update("\n".join(self.ids).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.assigned, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]

    def labels(self) -> np.ndarray:
        """[N, C * clusters] float32, what SC-CAM's loss takes."""
        return sub_labels(torch.from_numpy(self.assigned), self.clusters).numpy()


def write_sub_categories(
    previous: Path | str,
    pictures: PictureSet,
    out: Path | str,
    config: Config,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    workers: int = 2,
    advance: Callable[[int], None] = lambda count: None,
) -> Found:
    """Features of a set by a trained network, and their clusters: two files in `out`, each complete or not there.

    What is there of the same network, pictures and settings is kept.

    Args:
        previous: folder of a training that gives class activation maps: a classifier, or the round before.
        pictures: the set, in whose order the rows of both files are.
        out: folder; features.npz holds ids [N] and features [N, D], the means of the last stage over whole pictures at
            scale 1; subcategories.npz what `read_sub_categories` gives.
        config: clusters, starts and iterations count.
        device: of the network and of k-means.
        batch_size: pictures of one size that go through the network together.
        workers: processes that read pictures; 0 = none but this one.
        advance: called with a count of pictures now and then.

    Raises:
        FileError: a picture that cannot be used, or no such training.
        ValueError: the training is of other classes, or gives no maps.
    """
    out = Path(out)
    features_at, at = out / FEATURES, out / SUB_CATEGORIES
    settings = sub_category_settings(previous, pictures, config)
    if npz_settings(at) == settings:
        advance(len(pictures))
        return read_sub_categories(at)
    of_features = json.dumps(_feature_settings(previous, pictures))
    if npz_settings(features_at) == of_features:
        advance(len(pictures))
    else:
        values = _features(Path(previous), pictures, device, batch_size, workers, advance)
        write_arrays(features_at, {"ids": np.array(pictures.ids), "features": values}, settings=of_features)
    features = torch.from_numpy(read_array(features_at, "features")).to(device)
    found = sub_categories(
        features,
        torch.from_numpy(pictures.labels()),
        config.clusters,
        starts=config.starts,
        iterations=config.iterations,
    )
    arrays = {
        "ids": np.array(pictures.ids),
        "classes": np.array(pictures.classes),
        "clusters": np.array(config.clusters),
        "assigned": found.assigned.cpu().numpy(),
        "distances": found.distances.float().cpu().numpy(),
    }
    write_arrays(at, arrays, settings=settings)
    return read_sub_categories(at)


def sub_category_settings(previous: Path | str, pictures: PictureSet, config: Config) -> str:
    """What the comment of a finished subcategories.npz says.

    Raises:
        FileError: `previous` is no training.
    """
    kmeans = {name: getattr(config, name) for name in ("clusters", "starts", "iterations")}
    return json.dumps({**_feature_settings(previous, pictures), **kmeans}, sort_keys=True)


def read_sub_categories(path: Path | str) -> Found:
    """What `write_sub_categories` wrote.

    Raises:
        FileError: missing, damaged, or no such file.
    """
    path = Path(path)
    arrays = read_arrays(path)
    names = ("ids", "classes", "clusters", "assigned", "distances")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise FileError(path, f"must hold {', '.join(names)}; {', '.join(missing)} is missing")
    ids, classes, assigned, distances = (arrays[name] for name in ("ids", "classes", "assigned", "distances"))
    shape = (ids.size, classes.size)
    kinds = "".join(arrays[name].dtype.kind for name in names)
    if kinds != "UUiif" or not assigned.shape == distances.shape == shape or arrays["clusters"].size != 1:
        raise FileError(path, f"assigned and distances must be numbers [N, C] = {list(shape)}")
    clusters = int(arrays["clusters"])
    if assigned.size and not -1 <= assigned.min() <= assigned.max() < clusters:
        raise FileError(path, f"assigned must be in -1..{clusters - 1}, got {assigned.min()}..{assigned.max()}")
    return Found(tuple(ids.tolist()), tuple(classes.tolist()), clusters, assigned.astype(np.int64), distances)


def _feature_settings(previous: Path | str, pictures: PictureSet) -> dict[str, object]:
    if not (Path(previous) / CHECKPOINT).is_file():
        raise FileError(previous, f"no training: there is no {CHECKPOINT}")
    return {"format": _FORMAT, "network": run_hash(previous), "data": data_hash(pictures.ids, pictures.labels())}


def _features(
    previous: Path,
    pictures: PictureSet,
    device: torch.device | str,
    batch_size: int,
    workers: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    model, manifest = load_run(previous)
    if not hasattr(model, "cams"):
        raise ValueError(f"--previous must be a training of a classifier, got one of {manifest['system']}")
    classes = manifest.get("classes", list(pictures.classes))
    if list(pictures.classes) != classes:
        raise ValueError(f"--previous must have the classes of --data, {list(pictures.classes)}, got {classes}")
    return image_features(
        model,
        pictures,
        normalisation=manifest["config"]["recipe"]["normalisation"],
        device=device,
        batch_size=batch_size,
        workers=workers,
        advance=advance,
    )
