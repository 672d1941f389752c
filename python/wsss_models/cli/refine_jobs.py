"""One picture of `wsss refine`: where its files are, how they are read, refined and written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk
from wsss_kernels.colour import average_to, grid_size
from wsss_models.cli.pictures import Job
from wsss_models.data import companions, files
from wsss_models.data.bands import as_rgb
from wsss_models.tiles import refine_tiles

_FORMAT = 1  # of what is written: raised when the same settings give other files
_BANDS_GRID = 128  # long side of the grid on which more than three bands are walked, as method "image" has it
_MAX_TILED_PIXELS = 1 << 30  # 32,768 x 32,768
_SAMPLE = 1_000_000  # pixels of a tiled picture from which its threshold is found, at least


@dataclass(frozen=True)
class Settings:
    """What decides the result; everything else is only about how it is computed."""

    method: tuple[str, ...]
    uses_features: bool  # the first method does; those that follow see the picture
    background: float | str
    size: str | tuple[int, int]  # "image", "cams" or (height, width)
    tile: int | None = None  # pixels; None: pictures are refined whole
    overlap: int = 0

    def text(self, inputs: list[str]) -> str:
        """Kept in every file written: the same text means the file need not be made again."""
        values = {
            "format": _FORMAT,
            "version": wk.__version__,
            "method": self.method,
            "features": self.uses_features,
            "background": self.background,
            "size": self.size,
            "tile": [self.tile, self.overlap],
            "inputs": inputs,
        }
        return json.dumps(values, sort_keys=True)


@dataclass
class Item:
    job: Job
    picture: Tensor  # [3, H, W] uint8
    class_ids: np.ndarray  # [k] int64
    cams: Tensor  # [k, h, w] float32
    feats: Tensor | None  # float32, what the first method takes: [D, h', w'] features, [1, h', w'], [n, n] attention
    segments: Tensor | None  # [H', W'] int64 or [m, H', W'] bool
    bands: np.ndarray | None  # [H, W, bands] where there are more than three: the walk on colours takes them all
    negative: bool  # scores below 0 were there, and are 0 now


# What --feats holds by the first method. The methods that take the picture need none.
_READ = {
    "affinity": files.read_features,
    "boundary": companions.read_boundary,
    "attention": companions.read_attention,
}
FEATURE_METHODS = tuple(_READ)

Refined = tuple[Job, np.ndarray, np.ndarray, np.ndarray]  # label [H, W] uint8, maps [k, H, W] float, class_ids [k]


def read(job: Job, num_classes: int, settings: Settings) -> Item:
    max_pixels = files.MAX_PIXELS if settings.tile is None else _MAX_TILED_PIXELS
    class_ids, cams = files.read_maps(job.cams, num_classes=num_classes)
    feats = None if job.feats is None else torch.from_numpy(_READ[settings.method[0]](job.feats))
    segments = None if job.segments is None else torch.from_numpy(companions.read_segments(job.segments))
    bands = None
    if job.picture.suffix.lower() == ".npy":
        bands = files.read_bands(job.picture, max_pixels=max_pixels)
        picture, bands = as_rgb(bands), bands if bands.shape[2] > 3 else None
    else:
        picture = files.read_picture(job.picture, max_pixels=max_pixels)
    negative = bool((cams < 0).any())
    upright = torch.from_numpy(picture).permute(2, 0, 1)
    return Item(job, upright, class_ids, torch.from_numpy(cams.clip(0)), feats, segments, bands, negative)


@torch.inference_mode()
def refine_together(batch: list[Item], settings: Settings, device: torch.device) -> list[Refined]:
    """In the order of the batch. Sizes may differ; a picture without classes is background everywhere."""
    items = [item for item in batch if len(item.class_ids)]
    done: dict[int, Refined] = {}
    if settings.tile is not None:
        done = {id(item): _refine_in_tiles(item, settings, device) for item in items}
    else:
        for walk_on_bands in (False, True):
            alike = [item for item in items if _walks_on_bands(item, settings) == walk_on_bands]
            if alike:
                done.update(_refine_whole(alike, settings, device))
    return [done[id(item)] if id(item) in done else _background(item, settings.size) for item in batch]


def _walks_on_bands(item: Item, settings: Settings) -> bool:
    return item.bands is not None and settings.method[0] == "image"


def _refine_whole(items: list[Item], settings: Settings, device: torch.device) -> dict[int, Refined]:
    cams = [item.cams.to(device) for item in items]
    pictures = [item.picture.to(device) for item in items]
    feats = None
    if settings.uses_features:
        feats = [item.feats.to(device) for item in items if item.feats is not None]
    elif _walks_on_bands(items[0], settings):
        feats = [band_features(item.bands).to(device) for item in items if item.bands is not None]
    segments = [item.segments.to(device) for item in items if item.segments is not None]
    maps = refine_maps(cams, pictures, feats, settings, segments=segments)
    ids = [item.class_ids.tolist() for item in items]
    labels = wk.labels_from_maps(maps, background=settings.background, class_ids=ids)
    return {
        id(item): (item.job, label.to(torch.uint8).cpu().numpy(), m.cpu().numpy(), item.class_ids)
        for item, m, label in zip(items, maps, labels, strict=True)
    }


def refine_maps(
    cams: list[Tensor],
    pictures: list[Tensor],
    feats: list[Tensor] | None,
    settings: Settings,
    *,
    segments: list[Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The methods in turn: the first on the features, if any, the picture guiding the walk; the rest on the picture."""
    size = {"image": "picture", "cams": None}[settings.size] if isinstance(settings.size, str) else settings.size
    maps, rest = cams, settings.method
    if feats is not None:
        first, rest = settings.method[0] if settings.uses_features else "affinity", settings.method[1:]
        of_picture = size == "picture" or bool(rest)
        if first == "affinity":
            own = "guide" if of_picture else size
            maps = _list(wk.refine_cams(maps, feats, method=first, guide=pictures, size=own, **options))
        else:  # a guide would walk once more on colours
            sizes = [p.shape[-2:] if of_picture else size for p in pictures]
            each = zip(maps, feats, sizes, strict=True)
            maps = [wk.refine_cams(m, f, method=first, size=to, **options) for m, f, to in each]
    if rest:
        if "vote" in rest:
            options["segments"] = segments
        own = "feats" if size == "picture" or feats is not None else size
        maps = _list(wk.refine_cams(maps, pictures, method=rest, size=own, **options))
        if feats is not None and size != "picture":
            sizes = [(m.shape[-2], m.shape[-1]) if size is None else size for m in cams]
            maps = [_resized(m, to) for m, to in zip(maps, sizes, strict=True)]
    return maps


def _list(maps: Tensor | list[Tensor]) -> list[Tensor]:
    assert isinstance(maps, list)  # a list in, a list out
    return maps


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    smaller = average_to(maps, (min(maps.shape[-2], size[0]), min(maps.shape[-1], size[1])))
    return F.interpolate(smaller[None], size, mode="bilinear", align_corners=False)[0]


def band_features(bands: np.ndarray) -> Tensor:
    """[H, W, bands] as features [bands, h, w] of a walk: averaged to its grid, each with a deviation of 1."""
    grid = grid_size(bands.shape[0], bands.shape[1], _BANDS_GRID)
    planes = (torch.tensor(bands[..., i], dtype=torch.float32)[None] for i in range(bands.shape[2]))
    feats = torch.cat([average_to(plane, grid) for plane in planes])
    deviation = feats.flatten(1).std(dim=1, unbiased=False).view(-1, 1, 1)
    return feats / torch.where(deviation > 0, deviation, 1.0)


def _refine_in_tiles(item: Item, settings: Settings, device: torch.device) -> Refined:
    def refine(cams: Tensor, rows: slice, columns: slice) -> Tensor:
        feats = None
        if _walks_on_bands(item, settings) and item.bands is not None:
            feats = [band_features(item.bands[rows, columns]).to(device)]
        picture = item.picture[:, rows, columns].to(device)
        maps = refine_maps([cams.to(device)], [picture], feats, settings, normalize=None)[0].cpu()
        # Marginals are as high where the scores of a whole tile are low: the tile's share of the picture's maximum.
        return maps * cams.max() if "crf" in settings.method else maps

    assert settings.tile is not None
    height, width = item.picture.shape[-2:]
    maps = refine_tiles(item.cams, (height, width), refine, tile=settings.tile, overlap=settings.overlap)
    threshold = settings.background
    if isinstance(threshold, str):
        step = max(1, math.isqrt(height * width // _SAMPLE))
        threshold = float(wk.background_threshold(torch.tensor(maps[:, ::step, ::step], dtype=torch.float32)))
    label = np.empty((height, width), dtype=np.uint8)
    ids = item.class_ids.tolist()
    for first in range(0, height, settings.tile):  # whole, the scores in float32 and int64 labels would be 1 GB a class
        part = torch.tensor(maps[:, first : first + settings.tile], dtype=torch.float32)
        label[first : first + settings.tile] = wk.labels_from_maps(part, background=threshold, class_ids=ids).numpy()
    return item.job, label, maps, item.class_ids


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
