"""Maps [B, C, H, W] resized and scaled, empty ones and values that are not finite included."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_kernels.colour import average_to

Size = tuple[int, int]


def reads_values(tensor: Tensor) -> bool:
    """Whether a value can decide what happens next: not where that would wait for a GPU or break a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def resized(maps: Tensor, size: Size) -> Tensor:
    """Area averaging where an axis shrinks, bilinear where it grows."""
    height, width = maps.shape[-2:]
    if 0 in maps.shape:
        return maps.new_zeros(*maps.shape[:2], *size)
    return bilinear(average_to(maps, (min(height, size[0]), min(width, size[1]))), size)


def bilinear(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    if 0 in maps.shape:
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def normalized(maps: Tensor, normalize: str | None) -> Tensor:
    if normalize is None or maps.numel() == 0:
        return maps
    return scaled(maps, maximum(maps, (2, 3) if normalize == "class" else (1, 2, 3)))


def maximum(maps: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest finite value: NaN and infinity stay in their own class."""
    if reads_values(maps):
        largest = maps.amax(dim=dims, keepdim=True)
        if math.isfinite(largest.detach().sum().item()):
            return largest
    return maps.nan_to_num(0, 0, 0).amax(dim=dims, keepdim=True)


def scaled(maps: Tensor, maximum: Tensor) -> Tensor:
    """maps / maximum, 0 where that is 0."""
    return maps / torch.where(maximum > 0, maximum, 1.0)
