"""`mask_vote` beside torch's scatter and products, and beside a loop over segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.cases import Aim, Case, Inputs, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

SUPERPIXEL = 19  # pixels across: about 520 in a picture of 375 x 500
MASKS = 60  # of one picture, as Segment Anything's automatic mode gives them


def _superpixels(size: Size) -> Tensor:
    """[B, H, W] int64: blocks with wavy borders."""
    y, x = torch.meshgrid(torch.arange(size.height), torch.arange(size.width), indexing="ij")
    wave = (6 + 3 * torch.sin(y / 9.0) + 3 * torch.cos(x / 7.0)).long()
    across = size.width // SUPERPIXEL + 2
    return ((y + wave) // SUPERPIXEL * across + (x + wave) // SUPERPIXEL).expand(size.batch, -1, -1).contiguous()


def _masks(size: Size) -> list[Tensor]:
    """For each image discs of many sizes: bool [m, H, W]."""
    generator = torch.Generator().manual_seed(7)
    y, x = torch.meshgrid(torch.arange(size.height), torch.arange(size.width), indexing="ij")
    images = []
    for _ in range(size.batch):
        place = torch.rand(MASKS, 3, 1, 1, generator=generator)
        radius = min(size.height, size.width) * (0.04 + 0.3 * place[:, 2] ** 3)
        images.append((y - place[:, 0] * size.height) ** 2 + (x - place[:, 1] * size.width) ** 2 < radius**2)
    return images


def _scatter(inputs: Inputs) -> Tensor:
    maps, ids = inputs["maps"], inputs["segments"].flatten(1)
    batch, channels = maps.shape[:2]
    count = int(ids.max()) + 1
    index = ids[:, None].expand(-1, channels, -1)
    totals = maps.new_zeros(batch, channels, count).scatter_add_(2, index, maps.flatten(2))
    pixels = maps.new_zeros(batch, count).scatter_add_(1, ids, maps.new_ones(ids.shape))
    return (totals / pixels.clamp(min=1)[:, None]).gather(2, index).view_as(maps)


def _segment_by_segment(inputs: Inputs) -> Tensor:
    out = inputs["maps"].clone()
    for image, ids in zip(out, inputs["segments"], strict=True):
        for label in ids.unique():
            inside = ids == label
            image[:, inside] = image[:, inside].mean(dim=1, keepdim=True)
    return out


def _products(inputs: Inputs) -> Tensor:
    images = []
    for maps, masks in zip(inputs["maps"], inputs["masks"], strict=True):
        held, x = masks.flatten(1).float(), maps.flatten(1)
        means = (x @ held.T) / held.sum(1).clamp(min=1)
        cover = held.sum(0)
        images.append(torch.where(cover > 0, (means @ held) / cover.clamp(min=1), x).view_as(maps))
    return torch.stack(images)


def _mask_by_mask(inputs: Inputs) -> Tensor:
    out = inputs["maps"].clone()
    for maps, masks, image in zip(inputs["maps"], inputs["masks"], out, strict=True):
        total, cover = torch.zeros_like(maps), masks.sum(0)
        for mask in masks:
            if mask.any():
                total[:, mask] += maps[:, mask].mean(dim=1, keepdim=True)
        image.copy_(torch.where(cover > 0, total / cover.clamp(min=1), maps))
    return out


def _segments(size: Size, channels: int, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    return Case(
        name=f"vote of superpixels {size.name} C={channels}",
        op="mask_vote",
        groups=("vote",),
        size=size,
        channels=channels,
        inputs=lambda size: {"maps": sizes.maps(size, channels), "segments": _superpixels(size)},
        expected=lambda i: wk.reference.mask_vote(i["maps"].double(), i["segments"]),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.mask_vote(i["maps"], i["segments"])),
            Way("segment by segment", "published", lambda i: lambda: _segment_by_segment(i)),
            Way("torch scatter", "library", lambda i: lambda: _scatter(i)),
        ),
        aims=aims,
        quick=quick,
    )


def _overlapping(size: Size, channels: int, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    return Case(
        name=f"vote of masks {size.name} C={channels}",
        op="mask_vote",
        groups=("vote",),
        size=size,
        channels=channels,
        inputs=lambda size: {"maps": sizes.maps(size, channels), "masks": _masks(size)},
        expected=lambda i: wk.reference.mask_vote(i["maps"].double(), i["masks"]),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.mask_vote(i["maps"], i["masks"])),
            Way("mask by mask", "published", lambda i: lambda: _mask_by_mask(i)),
            Way("torch products", "library", lambda i: lambda: _products(i)),
        ),
        aims=aims,
        quick=quick,
    )


def _work(size: Size, channels: int, bytes_of_labels: int) -> Work:
    """Maps read and written, segments or masks read."""
    pixels = sizes.pixels(size)
    return Work(flop=2 * channels * pixels, bytes=(8 * channels + bytes_of_labels) * pixels)


CASES: list[Case] = [
    _segments(sizes.PHOTOGRAPH, 3, (Aim("torch scatter", "ratio", least=2),), quick=True),
    _segments(sizes.PHOTOGRAPH, 21),
    _overlapping(sizes.PHOTOGRAPH, 3, (Aim("torch products", "ratio", least=10),), quick=True),
    _overlapping(sizes.PHOTOGRAPH, 21),
]
GPU_CASES: list[Case] = [
    case
    for size in (sizes.PHOTOGRAPH, sizes.batched(sizes.PHOTOGRAPH, 8))
    for case in (
        on_gpu(_segments(size, 21), _work(size, 21, bytes_of_labels=8)),
        on_gpu(_overlapping(size, 21), _work(size, 21, bytes_of_labels=MASKS)),
    )
]


def test_mask_vote(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
