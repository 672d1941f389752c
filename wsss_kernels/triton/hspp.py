# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of hspp in Triton. Four levels a launch, more in further launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel

_LEVELS = 4


@triton.jit
def level_of(i: tl.constexpr, level0, level1, level2, level3):
    if i < 2:
        return level0 if i == 0 else level1
    else:
        return level2 if i == 2 else level3


@kernel
def pool_planes(
    feats, out, places, level0, level1, level2, level3, mean_weight, weight, height, width, windows, window,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[plane] += mean_weight * mean + weight * sum of levels; one program a plane, which stays in its cache.

    A level of 0 is none. KEEP: places[plane, windows], from `window` on, takes the first maximum of each window.
    """
    plane = tl.program_id(0).to(tl.int64)
    pixels = height * width
    feats += plane * pixels
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, pixels, BLOCK):
        pixel = first + tl.arange(0, BLOCK).to(tl.int64)
        sums += tl.load(feats + pixel, mask=pixel < pixels, other=0.0).to(tl.float32)
    result = tl.load(out + plane) + mean_weight * (tl.sum(sums, axis=0) / pixels)
    place = places + (plane * windows + window)
    for i in tl.static_range(4):
        level = level_of(i, level0, level1, level2, level3)
        if level > 0:
            tall = height // level
            wide = width // level
            columns = width // wide
            count = height // tall * columns
            total = tl.zeros([], tl.float32)
            for w in range(count):
                corner = w // columns * tall * width + w % columns * wide
                peaks = tl.full([BLOCK], float("-inf"), tl.float32)
                spots = tl.zeros([BLOCK], tl.int32)
                for first in range(0, tall * wide, BLOCK):
                    p = first + tl.arange(0, BLOCK)
                    inside = p < tall * wide
                    pixel = corner + p // wide * width + p % wide
                    value = tl.load(feats + pixel.to(tl.int64), mask=inside, other=float("-inf")).to(tl.float32)
                    larger = inside & ((value > peaks) | (first == 0))
                    peaks = tl.where(larger, value, peaks)
                    spots = tl.where(larger, pixel, spots)
                peak = tl.max(peaks, axis=0)
                total += peak
                if KEEP:
                    used = (peaks == peak) & (tl.arange(0, BLOCK) < tall * wide)
                    spot = tl.min(tl.where(used, spots, 2147483647), axis=0)
                    tl.store(place + w, tl.where(spot == 2147483647, corner, spot))
            place += count
            result += weight * (total / count)
    tl.store(out + plane, result)


@kernel
def spread_planes(
    grad, places, out, level0, level1, level2, level3, mean_weight, weight, height, width, windows, window, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[plane, pixel] += grad * (mean_weight / pixels + weight / windows of each level whose window chose it)."""
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    pixels = height * width
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    at = plane * pixels + pixel
    y = pixel // width
    x = pixel % width
    share = tl.load(out + at, mask=inside, other=0.0)
    g = tl.load(grad + plane)
    share += g * mean_weight / pixels
    place = places + (plane * windows + window)
    for i in tl.static_range(4):
        level = level_of(i, level0, level1, level2, level3)
        if level > 0:
            tall = height // level
            wide = width // level
            columns = width // wide
            count = height // tall * columns
            w = y // tall * columns + x // wide
            held = inside & (y // tall < height // tall) & (x // wide < columns)
            chosen = tl.load(place + w.to(tl.int64), mask=held, other=-1) == pixel
            share += tl.where(chosen, g * weight / count, 0.0)
            place += count
    tl.store(out + at, share, mask=inside)


def _groups(levels: list[int]) -> list[list[int]]:
    return [(levels[i : i + _LEVELS] + [0] * _LEVELS)[:_LEVELS] for i in range(0, len(levels), _LEVELS)]


def hspp(feats: Tensor, levels: list[int], gamma: float, keep_places: bool) -> tuple[Tensor, Tensor]:
    from wsss_kernels.ops.hspp import windows

    batch, dim, height, width = feats.shape
    with torch.cuda.device_of(feats):
        x = feats.resolve_neg().contiguous()
        out = x.new_zeros(batch, dim, dtype=torch.float32)
        count = windows(height, width, levels) if keep_places else 0
        places = x.new_empty(batch, dim, count, dtype=torch.int32)
        parts, first = gamma + len(levels), 0
        for group in _groups(levels):
            launch.launch(
                pool_planes, batch * dim, launch.PYRAMID, x, out, places, *group,
                float(gamma / parts) if first == 0 else 0.0, float(1 / parts), height, width, count, first,
                KEEP=keep_places,
            )  # fmt: skip
            first += windows(height, width, [level for level in group if level])
        return out.to(feats.dtype), places


def hspp_backward(grad: Tensor, places: Tensor, height: int, width: int, levels: list[int], gamma: float) -> Tensor:
    from wsss_kernels.ops.hspp import windows

    batch, dim = grad.shape
    with torch.cuda.device_of(grad):
        g, places = grad.to(torch.float32).contiguous(), places.contiguous()
        out = g.new_zeros(batch, dim, height, width)
        blocks = triton.cdiv(height * width, launch.PYRAMID_GRADIENT.blocks["BLOCK"])
        parts, first = gamma + len(levels), 0
        for group in _groups(levels):
            launch.launch(
                spread_planes, batch * dim * blocks, launch.PYRAMID_GRADIENT, g, places, out, *group,
                float(gamma / parts) if first == 0 else 0.0, float(1 / parts), height, width, places.shape[2], first,
                blocks,
            )  # fmt: skip
            first += windows(height, width, [level for level in group if level])
        return out.to(grad.dtype)
