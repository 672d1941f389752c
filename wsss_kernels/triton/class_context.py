# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of class_context in Triton. Every sum has one order; nothing waits for the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel


@kernel
def sums_of_classes(
    feats, weights, chosen, out, sums, classes, dim, pixels, CHANNELS: tl.constexpr, PIXELS: tl.constexpr
):
    """One program a class of an image and a few channels; blocks without a pixel of the class are not read."""
    blocks = tl.cdiv(dim, CHANNELS)
    block = tl.program_id(0) % blocks
    number = (tl.program_id(0) // blocks).to(tl.int64)
    image = number // classes
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    found = tl.zeros([CHANNELS], tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    for p in range(0, pixels, PIXELS):
        place = p + tl.arange(0, PIXELS)
        at = image * pixels + place
        own = (tl.load(chosen + at, mask=place < pixels, other=-1) == number % classes) & (place < pixels)
        if tl.max(own.to(tl.int32), axis=0) > 0:
            w = tl.load(weights + at, mask=own, other=0.0)
            total += w
            rows = (image * dim + channel.to(tl.int64))[:, None] * pixels
            x = tl.load(feats + (rows + place[None, :]), mask=(channel[:, None] < dim) & own[None, :], other=0.0)
            found += tl.sum(x.to(tl.float32) * w[None, :], axis=1)
    weight = tl.sum(total, axis=0)
    tl.store(out + (number * dim + channel), found / (weight + 1e-5), mask=channel < dim)
    tl.store(sums + number, weight, mask=block == 0)


@kernel
def values_of_pixels(
    grad, weights, chosen, sums, out, classes, dim, pixels, CHANNELS: tl.constexpr, PIXELS: tl.constexpr
):
    """One program a few channels and pixels of an image."""
    across = tl.cdiv(pixels, PIXELS)
    down = tl.cdiv(dim, CHANNELS)
    image = (tl.program_id(0) // across // down).to(tl.int64)
    channel = (tl.program_id(0) // across % down * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    place = tl.program_id(0) % across * PIXELS + tl.arange(0, PIXELS)
    at = image * pixels + place
    own = tl.load(chosen + at, mask=place < pixels, other=-1)
    w = tl.load(weights + at, mask=own >= 0, other=0.0)
    total = tl.load(sums + (image * classes + own), mask=own >= 0, other=0.0)
    inside = (channel < dim) & (place < pixels)[None, :]
    row = (image * classes + own)[None, :] * dim
    g = tl.load(grad + (row + channel), mask=inside & (own >= 0)[None, :], other=0.0)
    to = (image * dim + channel.to(tl.int64)) * pixels + place[None, :]
    tl.store(out + to, g * (w / (total + 1e-5))[None, :], mask=inside)


def class_context(feats: Tensor, weights: Tensor, chosen: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    batch, dim, height, width = feats.shape
    with torch.cuda.device_of(feats):
        x = feats.resolve_neg().contiguous()
        out = weights.new_zeros(batch, classes, dim)
        sums = weights.new_zeros(batch, classes)
        launch.launch(
            sums_of_classes, batch * classes * triton.cdiv(dim, launch.CONTEXT.blocks["CHANNELS"]), launch.CONTEXT,
            x, weights.contiguous(), chosen.contiguous(), out, sums, classes, dim, height * width,
        )  # fmt: skip
        return out.to(feats.dtype), sums


def class_context_backward(grad: Tensor, weights: Tensor, chosen: Tensor, sums: Tensor) -> Tensor:
    batch, classes, dim = grad.shape
    height, width = weights.shape[1:]
    with torch.cuda.device_of(grad):
        g = grad.resolve_neg().to(torch.float32).contiguous()
        out = g.new_empty(batch, dim, height, width)
        blocks = launch.CONTEXT_GRADIENT.blocks
        programs = batch * triton.cdiv(dim, blocks["CHANNELS"]) * triton.cdiv(height * width, blocks["PIXELS"])
        launch.launch(
            values_of_pixels, programs, launch.CONTEXT_GRADIENT,
            g, weights.contiguous(), chosen.contiguous(), sums.contiguous(), out, classes, dim, height * width,
        )  # fmt: skip
        return out.to(grad.dtype)
