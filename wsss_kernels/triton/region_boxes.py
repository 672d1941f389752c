# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Boxes round the strong regions of each map in Triton; csrc/region_boxes.h says what they are.

One program a map: a token grid has a few thousand places. Each place of a region takes the largest number among its
neighbours, and then that of the place so numbered, until nothing changes: the end is the same whatever the order. The
boxes are then summed up from their corners, along columns and along rows.
"""

import torch
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel


@kernel
def mark_boxes(maps, labels, edges, corners, out, threshold, height, width, BLOCK: tl.constexpr):
    """labels [M, n], edges [M, 4, n] (top, bottom, left, right) scratch; corners [M, h + 1, w + 1] zeros."""
    pixels = height * width
    at = tl.program_id(0).to(tl.int64)
    maps += at * pixels
    labels += at * pixels
    edges += at * 4 * pixels
    corners += at * (height + 1) * (width + 1)
    out += at * pixels
    lane = tl.arange(0, BLOCK)
    line = width + 1

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, pixels, BLOCK):
        i = start + lane
        value = tl.load(maps + i.to(tl.int64), mask=i < pixels, other=float("-inf"))
        highest = tl.maximum(highest, tl.where(tl.abs(value) < float("inf"), value, float("-inf")))
    peak = tl.max(highest, axis=0)
    least = tl.where(peak > 0.0, threshold * peak, float("inf"))
    for start in range(0, pixels, BLOCK):
        i = start + lane
        inside = i < pixels
        value = tl.load(maps + i.to(tl.int64), mask=inside, other=float("-inf"))
        tl.store(labels + i, tl.where(value > least, i, -1), mask=inside)
        tl.store(edges + i, tl.zeros([BLOCK], tl.int32) + height, mask=inside)
        tl.store(edges + pixels + i, tl.full([BLOCK], -1, tl.int32), mask=inside)
        tl.store(edges + 2 * pixels + i, tl.zeros([BLOCK], tl.int32) + width, mask=inside)
        tl.store(edges + 3 * pixels + i, tl.full([BLOCK], -1, tl.int32), mask=inside)

    changed = height * 0 + 1
    while changed > 0:
        tl.debug_barrier()
        grew = tl.zeros([BLOCK], tl.int32)
        for start in range(0, pixels, BLOCK):
            i = start + lane
            own = tl.load(labels + i, mask=i < pixels, other=-1)
            on = own >= 0
            y = i // width
            x = i - y * width
            best = own
            for dy in tl.static_range(-1, 2):
                for dx in tl.static_range(-1, 2):
                    there = on & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
                    best = tl.maximum(best, tl.load(labels + i + dy * width + dx, mask=there, other=-1))
            best = tl.maximum(best, tl.load(labels + best, mask=on, other=-1))
            tl.store(labels + i, best, mask=best > own)
            grew = tl.maximum(grew, (best > own).to(tl.int32))
        changed = tl.max(grew, axis=0)
    tl.debug_barrier()
    for start in range(0, pixels, BLOCK):
        i = start + lane
        root = tl.load(labels + i, mask=i < pixels, other=-1)
        on = root >= 0
        y = i // width
        x = i - y * width
        tl.atomic_min(edges + root, y, mask=on, sem="relaxed")
        tl.atomic_max(edges + pixels + root, y, mask=on, sem="relaxed")
        tl.atomic_min(edges + 2 * pixels + root, x, mask=on, sem="relaxed")
        tl.atomic_max(edges + 3 * pixels + root, x, mask=on, sem="relaxed")
    tl.debug_barrier()
    one = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, pixels, BLOCK):
        i = start + lane
        root = tl.load(labels + i, mask=i < pixels, other=-1) == i
        root = root & (i < pixels)
        top = tl.load(edges + i, mask=root, other=0)
        bottom = tl.load(edges + pixels + i, mask=root, other=0) + 1
        left = tl.load(edges + 2 * pixels + i, mask=root, other=0)
        right = tl.load(edges + 3 * pixels + i, mask=root, other=0) + 1
        tl.atomic_add(corners + top * line + left, one, mask=root, sem="relaxed")
        tl.atomic_add(corners + top * line + right, -one, mask=root, sem="relaxed")
        tl.atomic_add(corners + bottom * line + left, -one, mask=root, sem="relaxed")
        tl.atomic_add(corners + bottom * line + right, one, mask=root, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, width, BLOCK):
        x = start + lane
        covers = tl.zeros([BLOCK], tl.int32)
        for y in range(height):
            covers += tl.load(corners + y * line + x, mask=x < width, other=0)
            tl.store(corners + y * line + x, covers, mask=x < width)
    tl.debug_barrier()
    for start in range(0, height, BLOCK):
        y = start + lane
        covers = tl.zeros([BLOCK], tl.int32)
        for x in range(width):
            covers += tl.load(corners + y * line + x, mask=y < height, other=0)
            tl.store(out + y * width + x, (covers > 0).to(tl.uint8), mask=y < height)


def region_boxes(maps: Tensor, threshold: float) -> Tensor:
    """[B, C, h, w] bool, of contiguous float32 maps."""
    batch, channels, height, width = maps.shape
    with torch.cuda.device_of(maps):
        out = torch.empty(maps.shape, dtype=torch.bool, device=maps.device)
        if out.numel() == 0:
            return out
        places = batch * channels * height * width
        labels = torch.empty(places, dtype=torch.int32, device=maps.device)
        edges = torch.empty(4 * places, dtype=torch.int32, device=maps.device)
        corners = torch.zeros(batch * channels * (height + 1) * (width + 1), dtype=torch.int32, device=maps.device)
        launch.launch(
            mark_boxes, batch * channels, launch.REGIONS,
            maps, labels, edges, corners, out.view(torch.uint8), threshold, height, width,
        )  # fmt: skip
        return out
