"""One picture of `wsss refine`: where its files are, how they are read, refined and written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import wsss_kernels as wk
from wsss_models.data import files
from wsss_models.data.artefacts import npz_settings, png_settings

_FORMAT = 1  # of what is written: raised when the same settings give other files


@dataclass(frozen=True)
class Settings:
    """What decides the result; everything else is only about how it is computed."""

    method: tuple[str, ...]
    uses_features: bool
    background: float | str
    size: str | tuple[int, int]  # "image", "cams" or (height, width)

    def text(self, inputs: list[str]) -> str:
        """Kept in every file written: the same text means the file need not be made again."""
        values = {
            "format": _FORMAT,
            "version": wk.__version__,
            "method": self.method,
            "features": self.uses_features,
            "background": self.background,
            "size": self.size,
            "inputs": inputs,
        }
        return json.dumps(values, sort_keys=True)


@dataclass(frozen=True)
class Job:
    name: str
    picture: Path
    cams: Path
    feats: Path | None
    label: Path
    maps: Path | None
    settings: str

    def is_done(self) -> bool:
        """Complete, undamaged, and made from these inputs with these settings."""
        if png_settings(self.label) != self.settings:
            return False
        return self.maps is None or npz_settings(self.maps) == self.settings


@dataclass
class Item:
    job: Job
    picture: Tensor  # [3, H, W] uint8
    class_ids: np.ndarray  # [k] int64
    cams: Tensor  # [k, h, w] float32
    feats: Tensor | None  # [D, h', w'] float32


Refined = tuple[Job, np.ndarray, np.ndarray, np.ndarray]  # label [H, W] uint8, maps [k, H, W] float32, class_ids [k]


def read(job: Job, num_classes: int) -> Item:
    class_ids, cams = files.read_maps(job.cams, num_classes=num_classes)
    feats = None if job.feats is None else torch.from_numpy(files.read_features(job.feats))
    picture = torch.from_numpy(files.read_picture(job.picture)).permute(2, 0, 1)
    return Item(job, picture, class_ids, torch.from_numpy(cams), feats)


@torch.inference_mode()
def refine_together(batch: list[Item], settings: Settings, device: torch.device) -> list[Refined]:
    done: list[Refined] = []
    with_classes = []
    for item in batch:
        if len(item.class_ids):
            with_classes.append(item)
        else:  # no class: background everywhere
            height, width = _label_size(item, settings.size)
            empty = np.zeros((0, height, width), dtype=np.float32)
            done.append((item.job, np.zeros((height, width), dtype=np.uint8), empty, item.class_ids))
    if not with_classes:
        return done
    pictures = [item.picture.to(device) for item in with_classes]
    if settings.uses_features:
        feats, guide = [item.feats.to(device) for item in with_classes], pictures  # type: ignore[union-attr]
        size = {"image": "guide", "cams": None}.get(settings.size, settings.size)  # type: ignore[arg-type]
    else:
        feats, guide = pictures, None
        size = {"image": "feats", "cams": None}.get(settings.size, settings.size)  # type: ignore[arg-type]
    method = settings.method if len(settings.method) > 1 else settings.method[0]
    cams = [item.cams.to(device) for item in with_classes]
    maps = wk.refine_cams(cams, feats, method=method, guide=guide, size=size)
    ids = [item.class_ids.tolist() for item in with_classes]
    labels = wk.labels_from_maps(maps, background=settings.background, class_ids=ids)
    for item, m, label in zip(with_classes, maps, labels, strict=True):
        done.append((item.job, label.to(torch.uint8).cpu().numpy(), m.cpu().numpy(), item.class_ids))
    return done


def _label_size(item: Item, size: str | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, tuple):
        return size
    given = item.cams.shape[-2:]
    return tuple(given) if size == "cams" and 0 not in given else tuple(item.picture.shape[-2:])  # type: ignore[return-value]


def write(job: Job, label: np.ndarray, maps: np.ndarray, class_ids: np.ndarray) -> None:
    """The label last: it tells that the picture is done."""
    if job.maps is not None:
        files.write_maps(job.maps, class_ids, maps, settings=job.settings)
    files.write_label(job.label, label, settings=job.settings)
