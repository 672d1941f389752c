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
    negative: bool  # scores below 0 were there, and are 0 now


Refined = tuple[Job, np.ndarray, np.ndarray, np.ndarray]  # label [H, W] uint8, maps [k, H, W] float32, class_ids [k]


def read(job: Job, num_classes: int) -> Item:
    class_ids, cams = files.read_maps(job.cams, num_classes=num_classes)
    feats = None if job.feats is None else torch.from_numpy(files.read_features(job.feats))
    picture = torch.from_numpy(files.read_picture(job.picture)).permute(2, 0, 1)
    negative = bool((cams < 0).any())
    return Item(job, picture, class_ids, torch.from_numpy(cams.clip(0)), feats, negative)


@torch.inference_mode()
def refine_together(batch: list[Item], settings: Settings, device: torch.device) -> list[Refined]:
    """In the order of the batch. Sizes may differ; a picture without classes is background everywhere."""
    items = [item for item in batch if len(item.class_ids)]
    if not items:
        return [_background(item, settings.size) for item in batch]
    pictures = [item.picture.to(device) for item in items]
    feats, guide, of_picture = pictures, None, "feats"
    if settings.uses_features:
        feats, guide, of_picture = (
            [item.feats.to(device) for item in items if item.feats is not None],
            pictures,
            "guide",
        )
    size = {"image": of_picture, "cams": None}[settings.size] if isinstance(settings.size, str) else settings.size
    method = settings.method if len(settings.method) > 1 else settings.method[0]
    cams = [item.cams.to(device) for item in items]
    maps = wk.refine_cams(cams, feats, method=method, guide=guide, size=size)
    ids = [item.class_ids.tolist() for item in items]
    labels = wk.labels_from_maps(maps, background=settings.background, class_ids=ids)
    done = {
        id(item): (item.job, label.to(torch.uint8).cpu().numpy(), m.cpu().numpy(), item.class_ids)
        for item, m, label in zip(items, maps, labels, strict=True)
    }
    return [done[id(item)] if id(item) in done else _background(item, settings.size) for item in batch]


def _background(item: Item, size: str | tuple[int, int]) -> Refined:
    if isinstance(size, tuple):
        height, width = size
    else:
        given = item.cams.shape[-2:]
        height, width = given if size == "cams" and 0 not in given else item.picture.shape[-2:]
    label = np.zeros((height, width), dtype=np.uint8)
    return item.job, label, np.zeros((0, height, width), dtype=np.float32), item.class_ids


def write(job: Job, label: np.ndarray, maps: np.ndarray, class_ids: np.ndarray) -> None:
    """The label last: it tells that the picture is done."""
    if job.maps is not None:
        files.write_maps(job.maps, class_ids, maps, settings=job.settings)
    files.write_label(job.label, label, settings=job.settings)
