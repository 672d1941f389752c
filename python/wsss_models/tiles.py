"""Large pictures in overlapping tiles: refined one at a time, blended, normalised once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

RefineTile = Callable[[Tensor, slice, slice], Tensor]  # cams [k, h, w] of the tile, its rows and columns -> [k, h, w]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along an axis; the last tile ends where the axis ends."""
    if length <= tile:
        return [0]
    stride = tile - overlap
    return [*range(0, length - tile, stride), length - tile]


def tile_weights(length: int, tile: int, overlap: int) -> list[Tensor]:
    """Weights [min(tile, length)] of each tile along an axis, a partition of unity: at every pixel they sum to 1.

    Each rises over the overlap on its left and falls over that on its right.
    """
    starts, size = tile_starts(length, tile, overlap), min(tile, length)
    ramp = (torch.arange(size) + 0.5) / max(overlap, 1)
    weights = []
    for start in starts:
        rising = ramp.clamp(max=1) if start > 0 else torch.ones(size)
        falling = ramp.flip(0).clamp(max=1) if start + size < length else torch.ones(size)
        weights.append(torch.minimum(rising, falling))
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    return [weight / total[start : start + size] for start, weight in zip(starts, weights, strict=True)]


def refine_tiles(
    cams: Tensor, picture_size: tuple[int, int], refine: RefineTile, *, tile: int, overlap: int
) -> np.ndarray:
    """Refine a picture in tiles.

    Args:
        cams: [k, h, w] float32 >= 0, any stride, of the whole picture.
        picture_size: (H, W).
        refine: what is done with a tile, whose cams come at the picture's resolution; the result is not normalised.
        tile: side of a tile in pixels.
        overlap: pixels two neighbouring tiles share, at most half a tile.

    Returns:
        np.ndarray: [k, H, W] float16, the largest value 1 (all zero where nothing is found). The working memory is a
        row of tiles; a tile in which no class has a score is not refined.
    """
    classes, (height, width) = cams.shape[0], picture_size
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    row_weights, column_weights = tile_weights(height, tile, overlap), tile_weights(width, tile, overlap)
    size = min(tile, height), min(tile, width)
    cams = cams / cams.amax().clamp_min(torch.finfo(torch.float32).tiny)
    out = np.zeros((classes, height, width), dtype=np.float16)
    band = torch.zeros(classes, size[0], width)  # rows from `top` on
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            part = crop_resized(cams, (height, width), (top, left), size)
            if not bool((part > 0).any()):
                continue
            piece = refine(part, slice(top, top + size[0]), slice(left, left + size[1]))
            piece *= row_weights[i][:, None] * column_weights[j]
            band[:, :, left : left + size[1]] += piece
        done = (rows[i + 1] if i + 1 < len(rows) else height) - top
        out[:, top : top + done] = band[:, :done].numpy()
        rest = band[:, done:].clone()
        band[:, : size[0] - done] = rest
        band[:, size[0] - done :] = 0
    largest = float(out.max(initial=0))
    for first in range(0, height if largest > 0 else 0, tile):  # no second array of this size
        out[:, first : first + tile] /= np.float16(largest)
    return out


def crop_resized(maps: Tensor, size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int]) -> Tensor:
    """A rectangle of maps [k, h, w] brought to `size` bilinearly (align_corners=False): [k, *crop]."""
    for axis in (1, 2):
        length, target = maps.shape[axis], size[axis - 1]
        at = (torch.arange(corner[axis - 1], corner[axis - 1] + crop[axis - 1]) + 0.5) * (length / target) - 0.5
        at = at.clamp(0, length - 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=length - 1)
        share = (at - low).view(-1, 1) if axis == 1 else at - low
        maps = maps.index_select(axis, low) * (1 - share) + maps.index_select(axis, high) * share
    return maps
