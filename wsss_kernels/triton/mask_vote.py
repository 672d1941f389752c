# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of mask_vote in Triton. Every sum is taken by one program in one order; nothing waits for the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel


@triton.jit
def reduced(values, used, state, MAXIMUM: tl.constexpr):
    """state and the values used: their sum, or their maximum with NaN above all."""
    if MAXIMUM:
        return tl.maximum(state, tl.where(used, values, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    return state + tl.where(used, values, 0.0)


@triton.jit
def settled(state, size, MAXIMUM: tl.constexpr):
    """The score of a segment from a row of states: the mean over size, or the maximum."""
    if MAXIMUM:
        broken = tl.max((state != state).to(tl.int32), axis=1) > 0
        return tl.where(broken, float("nan"), tl.max(state, axis=1))
    return tl.sum(state, axis=1) / size


@kernel
def vote_of_segments(
    maps, ids, order, starts, out, channels, pixels, MAXIMUM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a segment: pixels order[starts[s]..starts[s + 1]), sorted by id; ids are sorted too."""
    image = (tl.program_id(0) // pixels).to(tl.int64)
    slot = tl.program_id(0) % pixels
    start = tl.load(starts + image * (pixels + 1) + slot)
    end = tl.load(starts + image * (pixels + 1) + slot + 1)
    order += image * pixels
    maps += image * channels * pixels
    out += image * channels * pixels
    if start < end:
        none = tl.load(ids + image * pixels + start) < 0
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)[:, None]
            plane = channel.to(tl.int64) * pixels
            empty = float("-inf") if MAXIMUM else 0.0
            state = tl.full([CHANNELS, BLOCK], empty, tl.float32)
            for p in range(start, end, BLOCK):
                place = p + tl.arange(0, BLOCK)[None, :]
                used = (place < end) & (channel < channels)
                pixel = tl.load(order + place, mask=place < end, other=0)
                state = reduced(tl.load(maps + (plane + pixel), mask=used, other=0.0), used, state, MAXIMUM)
            score = settled(state, (end - start).to(tl.float32), MAXIMUM)[:, None]
            for p in range(start, end, BLOCK):
                place = p + tl.arange(0, BLOCK)[None, :]
                used = (place < end) & (channel < channels)
                pixel = tl.load(order + place, mask=place < end, other=0)
                own = tl.load(maps + (plane + pixel), mask=used & none, other=0.0)
                tl.store(out + (plane + pixel), tl.where(none, own, score), mask=used)


@kernel
def scores_of_masks(
    maps, masks, scores, channels, pixels, count, MAXIMUM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """scores [C, m]: one program a mask and a few channels."""
    mask = (tl.program_id(0) % count).to(tl.int64)
    channel = tl.program_id(0) // count * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    plane = channel.to(tl.int64) * pixels
    empty = float("-inf") if MAXIMUM else 0.0
    state = tl.full([CHANNELS, BLOCK], empty, tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for p in range(0, pixels, BLOCK):
        place = (p + tl.arange(0, BLOCK)).to(tl.int64)
        inside = place < pixels
        held = (tl.load(masks + mask * pixels + place, mask=inside, other=0) != 0) & inside
        size += held.to(tl.float32)
        used = held[None, :] & (channel < channels)
        state = reduced(tl.load(maps + (plane + place[None, :]), mask=used, other=0.0), used, state, MAXIMUM)
    score = settled(state, tl.maximum(tl.sum(size, axis=0), 1.0), MAXIMUM)[:, None]
    tl.store(scores + (channel.to(tl.int64) * count + mask), score, mask=channel < channels)


@kernel
def vote_of_masks(
    maps, masks, scores, out, channels, pixels, count,
    MAXIMUM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of pixels and a few channels: all masks in turn."""
    blocks = tl.cdiv(pixels, BLOCK)
    place = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channel = tl.program_id(0) // blocks * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    inside = place < pixels
    used = inside[None, :] & (channel < channels)
    empty = float("-inf") if MAXIMUM else 0.0
    state = tl.full([CHANNELS, BLOCK], empty, tl.float32)
    votes = tl.zeros([BLOCK], tl.float32)
    for m in range(count):
        held = (tl.load(masks + place, mask=inside, other=0) != 0) & inside
        votes += held.to(tl.float32)
        score = tl.load(scores + (channel.to(tl.int64) * count + m), mask=channel < channels, other=0.0)
        state = reduced(score, used & held[None, :], state, MAXIMUM)
        masks += pixels
    if not MAXIMUM:
        state = state / tl.where(votes > 0.0, votes, 1.0)[None, :]
    at = channel.to(tl.int64) * pixels + place[None, :]
    own = tl.load(maps + at, mask=used & (votes == 0.0)[None, :], other=0.0)
    tl.store(out + at, tl.where((votes > 0.0)[None, :], state, own), mask=used)


def segment_vote(maps: Tensor, segments: Tensor, maximum: bool) -> Tensor:
    """segments [B, H, W] int32 or int64."""
    batch, channels, height, width = maps.shape
    pixels = height * width
    with torch.cuda.device_of(maps):
        x = maps.resolve_neg().to(torch.float32).contiguous()
        out = torch.empty_like(x)
        if out.numel() == 0:
            return out.to(maps.dtype)
        ids, order = torch.sort(segments.reshape(batch, pixels), dim=1, stable=True)
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        slots = new.cumsum(dim=1) - 1
        places = torch.arange(pixels, device=x.device).expand(batch, pixels)
        starts = torch.full((batch, pixels + 1), pixels, device=x.device)
        starts = starts.scatter_reduce(1, slots, places, "amin")  # integers: exact in any order
        launch.launch(
            vote_of_segments, batch * pixels, launch.VOTE_SEGMENTS,
            x, ids, order, starts, out, channels, pixels, MAXIMUM=maximum,
        )  # fmt: skip
        return out.to(maps.dtype)


def mask_vote(maps: Tensor, masks: list[Tensor], maximum: bool) -> Tensor:
    """masks: for each image [m, H, W] bool."""
    _, channels, height, width = maps.shape
    pixels = height * width
    with torch.cuda.device_of(maps):
        x = maps.resolve_neg().to(torch.float32).contiguous()
        out = torch.empty_like(x)
        if out.numel() == 0:
            return out.to(maps.dtype)
        for image, held, result in zip(x, masks, out, strict=True):
            held = held.contiguous().view(torch.uint8)
            scores = x.new_empty(channels, len(held))
            groups = triton.cdiv(channels, launch.VOTE_MASKS.blocks["CHANNELS"])
            launch.launch(
                scores_of_masks, len(held) * groups, launch.VOTE_MASKS,
                image, held, scores, channels, pixels, len(held), MAXIMUM=maximum,
            )  # fmt: skip
            blocks = triton.cdiv(pixels, launch.VOTE_MASKS.blocks["BLOCK"])
            launch.launch(
                vote_of_masks, blocks * groups, launch.VOTE_MASKS,
                image, held, scores, result, channels, pixels, len(held), MAXIMUM=maximum,
            )  # fmt: skip
        return out.to(maps.dtype)
