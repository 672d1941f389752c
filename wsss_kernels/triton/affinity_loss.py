# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of affinity_loss in Triton: sums by program, then over all of them by one, always in one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.half_disc import reach
from wsss_kernels.triton.launch import kernel

EPSILON = tl.constexpr(1e-5)


@triton.jit
def log_near_one(x, minus_one):
    """log(x) for x > 0 and normal, where x - 1 is known better than x is: the hardware's is 1 % off at 1 + 1e-5."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = tl.where(exponent == 0, minus_one, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
    p = f * 7.0376836292e-2 - 1.1514610310e-1  # log(1 + f) = f - f^2/2 + f^3 p(f)
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    y = exponent.to(tl.float32) * 0.693147182 + (f + (p * square * f - 0.5 * square))
    return tl.where(x != x, x, y)


@triton.jit
def pixels_of(codes, height, width, margin, BLOCK: tl.constexpr):
    """Image, pixels (-1 past the last), their rows and columns, and the codes of those that are a source."""
    plane = height * width
    blocks = tl.cdiv(plane, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y = p // width
    x = p % width
    source = (p < plane) & (y < height - margin) & (x >= margin) & (x < width - margin)
    here = tl.load(codes + (image * plane + p), mask=source, other=-1)
    return image, p, y, x, here


@kernel
def sum_costs(affinity, codes, partial, height, width, neighbours, radius, margin, BLOCK: tl.constexpr):
    """partial [programs, 6] float64: costs of the pairs of background, of foreground, of unlike ones; their numbers."""
    image, p, y, x, here = pixels_of(codes, height, width, margin, BLOCK)
    plane = (height * width).to(tl.int64)
    affinity += image * neighbours * plane
    codes += image * plane
    bg = tl.zeros([BLOCK], tl.float32)
    fg = tl.zeros([BLOCK], tl.float32)
    neg = tl.zeros([BLOCK], tl.float32)
    bg_pairs = tl.zeros([BLOCK], tl.int32)
    fg_pairs = tl.zeros([BLOCK], tl.int32)
    neg_pairs = tl.zeros([BLOCK], tl.int32)
    for dy in range(radius):
        across = reach(radius, dy)
        for dx in range(tl.where(dy == 0, 1, -across), across + 1):
            inside = (here >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            there = tl.load(codes + (p.to(tl.int64) + dy * width + dx), mask=inside, other=-1)
            paired = there >= 0
            a = tl.load(affinity + p.to(tl.int64), mask=paired, other=0.5).to(tl.float32)
            a = tl.where(a < 0.0, 0.0, tl.where(a > 1.0, 1.0, a))
            unlike = paired & (there != here)
            argument = tl.where(unlike, 1.0 - a, a) + EPSILON
            cost = -log_near_one(argument, tl.where(unlike, -a, a - 1.0) + EPSILON)
            back = paired & (there == here) & (here == 0)
            fore = paired & (there == here) & (here != 0)
            bg += tl.where(back, cost, 0.0)
            fg += tl.where(fore, cost, 0.0)
            neg += tl.where(unlike, cost, 0.0)
            bg_pairs += back.to(tl.int32)
            fg_pairs += fore.to(tl.int32)
            neg_pairs += unlike.to(tl.int32)
            affinity += plane
    partial += tl.program_id(0).to(tl.int64) * 6
    tl.store(partial, tl.sum(bg.to(tl.float64), axis=0))
    tl.store(partial + tl.full([], 1, tl.int64), tl.sum(fg.to(tl.float64), axis=0))
    tl.store(partial + tl.full([], 2, tl.int64), tl.sum(neg.to(tl.float64), axis=0))
    tl.store(partial + tl.full([], 3, tl.int64), tl.sum(bg_pairs.to(tl.float64), axis=0))
    tl.store(partial + tl.full([], 4, tl.int64), tl.sum(fg_pairs.to(tl.float64), axis=0))
    tl.store(partial + tl.full([], 5, tl.int64), tl.sum(neg_pairs.to(tl.float64), axis=0))


@kernel
def weigh(partial, loss, counts, programs, BLOCK: tl.constexpr):
    """One program: the loss, and the pairs of each class [3]."""
    result = tl.full([], 0.0, tl.float64)
    for c in range(3):
        total = tl.zeros([BLOCK], tl.float64)
        pairs = tl.zeros([BLOCK], tl.float64)
        for first in range(0, programs, BLOCK):
            i = first + tl.arange(0, BLOCK)
            total += tl.load(partial + (i.to(tl.int64) * 6 + c), mask=i < programs, other=0.0)
            pairs += tl.load(partial + (i.to(tl.int64) * 6 + c + 3), mask=i < programs, other=0.0)
        count = tl.sum(pairs, axis=0)
        share = tl.where(c == 2, 0.5, 0.25).to(tl.float64)
        result += share * tl.sum(total, axis=0) / (count + 1e-5)
        tl.store(counts + tl.full([], 1, tl.int64) * c, count)
    tl.store(loss, result.to(tl.float32))


@kernel
def gradient(grad, affinity, codes, counts, out, height, width, neighbours, radius, margin, BLOCK: tl.constexpr):
    image, p, y, x, here = pixels_of(codes, height, width, margin, BLOCK)
    plane = (height * width).to(tl.int64)
    affinity += image * neighbours * plane
    out += image * neighbours * plane
    codes += image * plane
    upstream = tl.load(grad).to(tl.float64)
    one = tl.full([], 1, tl.int64)
    bg = -(0.25 * upstream / (tl.load(counts) + 1e-5)).to(tl.float32)
    fg = -(0.25 * upstream / (tl.load(counts + one) + 1e-5)).to(tl.float32)
    neg = (0.5 * upstream / (tl.load(counts + 2 * one) + 1e-5)).to(tl.float32)
    for dy in range(radius):
        across = reach(radius, dy)
        for dx in range(tl.where(dy == 0, 1, -across), across + 1):
            inside = (here >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            there = tl.load(codes + (p.to(tl.int64) + dy * width + dx), mask=inside, other=-1)
            paired = there >= 0
            a = tl.load(affinity + p.to(tl.int64), mask=paired, other=0.5).to(tl.float32)
            unlike = there != here
            weight = tl.where(unlike, neg, tl.where(here == 0, bg, fg))
            slope = weight / (tl.where(unlike, 1.0 - a, a) + EPSILON)
            counted = paired & ~((a < 0.0) | (a > 1.0))
            tl.store(out + p.to(tl.int64), tl.where(counted, slope, 0.0), mask=p < height * width)
            affinity += plane
            out += plane


def label_codes(labels: Tensor, ignore_index: int) -> Tensor:
    """int32, -1 for what makes no pair."""
    wide = labels.long()
    ignored = (wide < 0) | (wide == ignore_index) | (wide > 2**31 - 1)
    return torch.where(ignored, -1, wide).int().contiguous()


def affinity_loss(
    affinity: Tensor, labels: Tensor, radius: int, cropped: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    batch, neighbours, height, width = affinity.shape
    with torch.cuda.device_of(affinity):
        x = affinity.resolve_neg().contiguous()
        counts = torch.zeros(3, dtype=torch.float64, device=x.device)
        if x.numel() == 0:
            return x.new_zeros(()), counts
        programs = batch * triton.cdiv(height * width, launch.LOSS.blocks["BLOCK"])
        partial = torch.empty(programs, 6, dtype=torch.float64, device=x.device)
        loss = torch.empty((), dtype=torch.float32, device=x.device)
        launch.launch(
            sum_costs, programs, launch.LOSS,
            x, label_codes(labels, ignore_index), partial, height, width, neighbours, radius,
            radius - 1 if cropped else 0,
        )  # fmt: skip
        launch.launch(weigh, 1, launch.REDUCTION, partial, loss, counts, programs)
        return loss.to(affinity.dtype), counts


def affinity_loss_backward(
    grad: Tensor, affinity: Tensor, labels: Tensor, counts: Tensor, radius: int, cropped: bool, ignore_index: int
) -> Tensor:
    batch, neighbours, height, width = affinity.shape
    with torch.cuda.device_of(affinity):
        x = affinity.resolve_neg().contiguous()
        out = torch.empty_like(x)
        if out.numel() == 0:
            return out
        launch.launch(
            gradient, batch * triton.cdiv(height * width, launch.LOSS.blocks["BLOCK"]), launch.LOSS,
            grad.to(torch.float32), x, label_codes(labels, ignore_index), counts, out, height, width, neighbours,
            radius, radius - 1 if cropped else 0,
        )  # fmt: skip
        return out
