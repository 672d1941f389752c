"""The real sizes by name, and the data the benchmarks run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Size:
    name: str
    height: int  # pixels of the map
    width: int
    batch: int = 1
    dim: int = 448  # feature channels; 448 is AffinityNet's head

    def tiny(self) -> Size:
        """The same thing small enough for a first call that only loads code."""
        return replace(
            self,
            height=min(self.height, 32),
            width=min(self.width, 32),
            batch=min(self.batch, 2),
            dim=min(self.dim, 64),
        )


def batched(size: Size, batch: int, **changed: int) -> Size:
    return replace(size, name=f"{size.name} batch {batch}", batch=batch, **changed)


def pixels(size: Size) -> int:
    return size.batch * size.height * size.width


CALL = Size("4x4", 4, 4, dim=1)  # nothing to compute: what a call costs
SMALL = Size("24x32", 24, 32)
PSA = Size("psa 47x63", 47, 63)  # a 375x500 picture at stride 8, AffinityNet's inference
IRN = Size("irn 94x125", 94, 125)  # the same picture at stride 4, IRNet's inference
SQUARE = Size("128x128", 128, 128)
CROP = Size("crop 56x56 batch 8", 56, 56, batch=8)  # AffinityNet's training: 448x448 crops
CROP_2 = Size("crop 56x56 batch 2", 56, 56, batch=2)
LARGE = Size("256x256", 256, 256, dim=64)
HUGE = Size("1024x1024", 1024, 1024, dim=1)
TOKENS = Size("tokens 32x32", 32, 32)  # a 512x512 crop in patches of 16
PHOTOGRAPH = Size("photograph", 375, 500, dim=1)  # the most common picture of PASCAL VOC
GPU_SIZES = (PSA, IRN, SQUARE)
GPU_BATCHES = (1, 16, 256)
PICTURE = (375, 500)  # pixels, height and width of the most common PASCAL VOC picture


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _coarse(count: int, channels: int, height: int, width: int, cell: int, seed: int) -> Tensor:
    return torch.rand(count, channels, height // cell + 2, width // cell + 2, generator=_generator(seed))


def features(size: Size, seed: int = 0) -> Tensor:
    """[B, D, H, W]: regions with edges, slopes inside them, a little noise; mean |difference| 0.1 to 0.6."""
    grid = (size.height, size.width)
    coarse = 3 * _coarse(size.batch, size.dim, *grid, 6, seed)
    regions = F.interpolate(coarse, grid, mode="nearest")
    slopes = F.interpolate(coarse.flip(1), grid, mode="bilinear", align_corners=False)
    noise = torch.randn(size.batch, size.dim, *grid, generator=_generator(seed + 1))
    return regions.mul_(0.3).add_(slopes, alpha=0.7).add_(noise, alpha=0.05)


def maps(size: Size, channels: int, seed: int = 2) -> Tensor:
    """[B, C, H, W] blobs in 0..1, each with peak 1."""
    grid = (size.height, size.width)
    blobs = F.interpolate(_coarse(size.batch, channels, *grid, 8, seed), grid, mode="bilinear", align_corners=False)
    return blobs / blobs.amax(dim=(2, 3), keepdim=True)


def picture(size: tuple[int, int] = PICTURE, seed: int = 3) -> Tensor:
    """[1, 3, H, W] uint8."""
    coarse = F.interpolate(_coarse(1, 3, *size, 40, seed), size, mode="nearest") * 200
    noise = torch.rand(1, 3, *size, generator=_generator(seed + 1)) * 55
    return (coarse + noise).to(torch.uint8)


def pixel_labels(size: Size, seed: int = 4) -> Tensor:
    """[B, H, W] int64: background 0, two classes, 255 = ignore, in patches."""
    coarse = _coarse(size.batch, 1, size.height, size.width, 7, seed)
    patches = F.interpolate(coarse, (size.height, size.width), mode="nearest")[:, 0]
    return torch.tensor([0, 0, 1, 2, 255])[(patches * 5).long().clamp(max=4)]


def ragged_sizes(count: int, pixels: int) -> list[tuple[int, int]]:
    """`count` different sizes (height, width) of about the same number of pixels."""
    first = max(1, round(pixels**0.5) - count // 2)
    return [(height, max(1, round(pixels / height))) for height in range(first, first + count)]


def photograph_sizes(count: int, long_side: int = 63) -> list[tuple[int, int]]:
    """`count` different sizes (height, width) of pictures, lying and standing: 63 is 500 pixels at stride 8."""
    half = count // 2
    lying = [(short, long_side) for short in range(long_side - half + 1, long_side + 1)]
    return lying + [(long_side, height - 1) for height, _ in lying]
