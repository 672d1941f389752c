# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
"""Affinity between pixels with no boundary between them in Triton: what ops/boundary_affinity.py says, on any device.

A path to (dy, dx) has one or two points at each distance |y| + |x| = c from the pixel, c = 0 .. n = dy + |dx|: the
point (y, c - y) lies |dy c - n y| / sqrt(dy^2 + dx^2) off the line, so that y is the quotient of dy c and n, rounded
down, up, or either. Descending c and ascending y is the order in which equal maxima count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.neighbours import neighbour_count
from wsss_kernels.triton import launch
from wsss_kernels.triton.half_disc import next_centre, reach
from wsss_kernels.triton.launch import kernel

_LEAST = tl.constexpr(-(2**31))  # below the key of every value
_NAN = tl.constexpr(2**31 - 1)
_NO_PAIR = tl.constexpr(255)  # no point of a path has this number


@kernel
def write_keys(boundary, keys, size: tl.int64, BLOCK: tl.constexpr):
    """Integers in the order of the values: NaN above all, -0 and 0 the same."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(boundary + i, mask=i < size, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, _LEAST - bits, bits)
    tl.store(keys + i, tl.where(value == value, key, _NAN), mask=i < size)


@triton.jit
def value_of(key):
    return tl.where(key < 0, _LEAST - key, key).to(tl.float32, bitcast=True)


@triton.jit
def level(dy, dx, c):
    """Of the points at distance c: the first one's y, whether it and whether the next are on the path."""
    n = dy + tl.abs(dx)
    length = dy * dy + dx * dx
    y = dy * c // n
    past = dy * c - n * y
    return y, past * past < length, (n - past) * (n - past) < length


@triton.jit
def column_of(y, dx, c):
    return tl.where(dx < 0, y - c, c - y)


@triton.jit
def pair_of(program, height, width, radius, PIXELS: tl.constexpr):
    """A program's neighbour, image, pixels, and which of their neighbours are in the map; whether it has any work."""
    shifts = 2 * radius - 1
    parts = shifts * radius
    # The neighbours of a tile run at the same time and share what they load through the caches.
    part, tile = program % parts, program // parts
    dy, dx = part // shifts, part % shifts - (radius - 1)
    plane = height.to(tl.int64) * width
    tiles = tl.cdiv(plane, PIXELS)
    image = tile // tiles
    pixel = tile % tiles * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    exists = (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    centre = radius * 0 - 1
    for row in range(1, dy + 1):
        centre = next_centre(centre, radius, row)
    works = (dx * dx + dy * dy < radius * radius) & ((dy > 0) | (dx > 0))
    return dy, dx, centre + dx, image, pixel, exists, works


@kernel
def path_maxima(keys, out, height, width, radius, count, PIXELS: tl.constexpr):
    """One neighbour of PIXELS pixels of an image."""
    dy, dx, k, image, pixel, exists, works = pair_of(tl.program_id(0), height, width, radius, PIXELS)
    if not works:
        return
    plane = height.to(tl.int64) * width
    at = keys + image * plane + pixel
    largest = tl.full([PIXELS], _LEAST, tl.int32)
    for c in range(dy + tl.abs(dx) + 1):
        y, first, second = level(dy, dx, c)
        step = y * width.to(tl.int64) + column_of(y, dx, c)
        largest = tl.maximum(largest, tl.load(at + step, mask=exists & first, other=_LEAST))
        step = (y + 1) * width.to(tl.int64) + column_of(y + 1, dx, c)
        largest = tl.maximum(largest, tl.load(at + step, mask=exists & second, other=_LEAST))
    value = tl.where(exists, 1 - value_of(largest), 0.0)
    tl.store(out + (image * count + k) * plane + pixel, value.to(out.dtype.element_ty), mask=pixel < plane)


@kernel
def path_winners(keys, winners, height, width, radius, count, PIXELS: tl.constexpr):
    """winners [B, K, H, W]: which point of the path is its maximum, 2 c and for the second of that distance 1 more."""
    dy, dx, k, image, pixel, exists, works = pair_of(tl.program_id(0), height, width, radius, PIXELS)
    if not works:
        return
    plane = height.to(tl.int64) * width
    at = keys + image * plane + pixel
    largest = tl.full([PIXELS], _LEAST, tl.int32)
    winner = tl.full([PIXELS], _NO_PAIR, tl.int32)
    n = dy + tl.abs(dx)
    for i in range(n + 1):
        c = n - i
        y, first, second = level(dy, dx, c)
        step = y * width.to(tl.int64) + column_of(y, dx, c)
        key = tl.load(at + step, mask=exists & first, other=_LEAST)
        winner = tl.where(key > largest, 2 * c, winner)
        largest = tl.maximum(largest, key)
        step = (y + 1) * width.to(tl.int64) + column_of(y + 1, dx, c)
        key = tl.load(at + step, mask=exists & second, other=_LEAST)
        winner = tl.where(key > largest, 2 * c + 1, winner)
        largest = tl.maximum(largest, key)
    tl.store(winners + (image * count + k) * plane + pixel, winner.to(tl.uint8), mask=pixel < plane)


@triton.jit
def share(grad, winners, at, y, x, py, px, number, wanted, width):
    """The gradient of the pairs that begin (py, px) before the pixels, where their maximum is the pixel."""
    there = wanted & (y >= py) & (x >= px) & (x - px < width)
    link = at - (py * width.to(tl.int64) + px)
    won = tl.load(winners + link, mask=there, other=_NO_PAIR).to(tl.int32) == number
    return tl.load(grad + link, mask=won, other=0.0).to(tl.float32)


@kernel
def gather_paths(grad, winners, out, height, width, radius, count, PIXELS: tl.constexpr):
    """The gradient of PIXELS pixels of an image: the sum over all paths through them, always in one order."""
    plane = height.to(tl.int64) * width
    tiles = tl.cdiv(plane, PIXELS)
    image = tl.program_id(0) // tiles
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    in_map = pixel < plane
    y, x = pixel // width, pixel % width
    total = tl.zeros([PIXELS], tl.float32)
    centre = radius * 0 - 1
    for dy in range(radius):
        if dy > 0:
            centre = next_centre(centre, radius, dy)
        half_width = reach(radius, dy)
        for dx in range(1 if dy == 0 else -half_width, half_width + 1):
            at = (image * count + centre + dx) * plane + pixel
            for c in range(dy + tl.abs(dx) + 1):
                py, first, second = level(dy, dx, c)
                px = column_of(py, dx, c)
                total += share(grad, winners, at, y, x, py, px, 2 * c, in_map & first, width)
                px = column_of(py + 1, dx, c)
                total += share(grad, winners, at, y, x, py + 1, px, 2 * c + 1, in_map & second, width)
    tl.store(out + image * plane + pixel, (0 - total).to(out.dtype.element_ty), mask=in_map)


def _keys_of(boundary: Tensor) -> Tensor:
    boundary = boundary.resolve_neg().contiguous()
    keys = torch.empty_like(boundary, dtype=torch.int32)
    programs = triton.cdiv(keys.numel(), launch.ELEMENTWISE.blocks["BLOCK"])
    launch.launch(write_keys, programs, launch.ELEMENTWISE, boundary, keys, keys.numel())
    return keys


def _pair_programs(keys: Tensor, radius: int) -> int:
    batch, _, height, width = keys.shape
    return (2 * radius - 1) * radius * batch * triton.cdiv(height * width, launch.PATHS.blocks["PIXELS"])


def boundary_affinity(boundary: Tensor, radius: int) -> Tensor:
    """Affinity [B, K, H, W] in the dtype of boundary [B, 1, H, W]."""
    batch, _, height, width = boundary.shape
    count = neighbour_count(radius)
    with torch.cuda.device_of(boundary):
        out = boundary.new_empty(batch, count, height, width)
        if out.numel() == 0:
            return out
        keys = _keys_of(boundary)
        launch.launch(
            path_maxima, _pair_programs(keys, radius), launch.PATHS, keys, out, height, width, radius, count
        )  # fmt: skip
        return out


def boundary_affinity_backward(grad: Tensor, boundary: Tensor, radius: int) -> Tensor:
    """Gradient of boundary. Workspace: 4 bytes a pixel and one a pair."""
    batch, _, height, width = boundary.shape
    count = neighbour_count(radius)
    with torch.cuda.device_of(boundary):
        out = torch.empty_like(boundary, memory_format=torch.contiguous_format)
        if out.numel() == 0:
            return out
        keys = _keys_of(boundary)
        winners = torch.empty(batch, count, height, width, dtype=torch.uint8, device=boundary.device)
        shape = (height, width, radius, count)
        launch.launch(path_winners, _pair_programs(keys, radius), launch.PATHS, keys, winners, *shape)
        grad = grad.resolve_neg().contiguous()
        programs = batch * triton.cdiv(height * width, launch.PATH_GRADIENT.blocks["PIXELS"])
        launch.launch(gather_paths, programs, launch.PATH_GRADIENT, grad, winners, out, *shape)
        return out
