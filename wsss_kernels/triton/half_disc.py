# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The half-disc of neighbours (wsss_kernels/neighbours.py) in Triton."""

import triton
import triton.language as tl

from wsss_kernels.triton.launch import kernel


@triton.jit
def reach(radius, dy):
    """Largest |dx| of stencil row dy < radius."""
    # Half way between two whole numbers: whatever the root's rounding, the floor is right.
    return tl.sqrt((radius * radius - dy * dy).to(tl.float32) - 0.5).to(tl.int32)


@triton.jit
def next_centre(centre, radius, dy):
    """Index of offset (dy, 0) from that of (dy - 1, 0); of (0, 0), which is none, it is -1."""
    return centre + reach(radius, dy - 1) + 1 + reach(radius, dy)


@kernel
def write_offsets(offsets, radius, count, BLOCK: tl.constexpr):
    """offsets [2, K]: dy and dx of every neighbour."""
    k = tl.arange(0, BLOCK)
    dy = tl.zeros([BLOCK], tl.int32)
    middle = tl.full([BLOCK], -1, tl.int32)
    centre = radius * 0 - 1
    for row in range(1, radius):
        centre = next_centre(centre, radius, row)
        here = k >= centre - reach(radius, row)
        dy = tl.where(here, row, dy)
        middle = tl.where(here, centre, middle)
    tl.store(offsets + k, dy, mask=k < count)
    tl.store(offsets + count + k, k - middle, mask=k < count)
