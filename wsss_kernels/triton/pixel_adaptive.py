# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of pixel_adaptive in Triton: weights once, then one launch an iteration, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel

# A weight w is kept as 2^16 sqrt(w / 1.02) in whole numbers, less 2^15 to fit a signed one; for the reason see
# csrc/pixel_adaptive.simd.cpp. A factor for each pixel undoes the scale and what the rounding made of the sum.
_SCALE = tl.constexpr(65536.0 * 65536.0 / 1.02)
_OFFSET = tl.constexpr(32768.0)


@triton.jit
def ring_step(j):
    """Step j of 8 around a pixel, row by row."""
    place = j + (j >= 4)
    return place // 3 - 1, place % 3 - 1


@triton.jit
def neighbour(y, x, j, dilation, height, width):
    """Where in a plane the neighbour lies, its coordinates clamped."""
    down, right = ring_step(j)
    row = tl.minimum(tl.maximum(y + down * dilation, 0), height - 1)
    column = tl.minimum(tl.maximum(x + right * dilation, 0), width - 1)
    return row * width + column


@triton.jit
def deviation(plane, centre, y, x, inside, height, width, DILATIONS: tl.constexpr, PAR: tl.constexpr):
    """Standard deviation (unbiased) of the neighbours' differences to the centre, PAMR's with a 0 for each ring."""
    rings: tl.constexpr = len(DILATIONS)
    zeros: tl.constexpr = 0 if PAR else rings
    count: tl.constexpr = 8 * rings + zeros
    total = tl.zeros_like(centre)
    for i in tl.static_range(rings):
        for j in range(8):
            near = neighbour(y, x, j, DILATIONS[i], height, width)
            total += tl.load(plane + near.to(tl.int64), mask=inside, other=0.0) - centre
    mean = total / count
    squares = mean * mean * zeros
    for i in tl.static_range(rings):
        for j in range(8):
            near = neighbour(y, x, j, DILATIONS[i], height, width)
            off = tl.load(plane + near.to(tl.int64), mask=inside, other=0.0) - centre - mean
            squares += off * off
    return tl.sqrt(squares / (count - 1))


@triton.jit
def inverse_scale(plane, centre, y, x, inside, height, width, DILATIONS: tl.constexpr, PAR: tl.constexpr):
    sd = deviation(plane, centre, y, x, inside, height, width, DILATIONS, PAR)
    if PAR:
        return 1.0 / (sd + 1e-8) / 0.3
    return 1.0 / (1e-8 + 0.1 * sd)


@triton.jit
def distance(plane, centre, scale, near, inside, PAR: tl.constexpr):
    off = tl.abs(tl.load(plane + near.to(tl.int64), mask=inside, other=0.0) - centre) * scale
    if PAR:
        return off * off
    return off


@triton.jit
def likeness(
    red, green, blue, r, g, b, scale_r, scale_g, scale_b, y, x, j, inside, height, width,
    DILATION: tl.constexpr, PAR: tl.constexpr,
):  # fmt: skip
    """The logarithm of a weight before the softmax."""
    near = neighbour(y, x, j, DILATION, height, width)
    sum_of_channels = distance(red, r, scale_r, near, inside, PAR) + distance(green, g, scale_g, near, inside, PAR)
    return (sum_of_channels + distance(blue, b, scale_b, near, inside, PAR)) / -3.0


@triton.jit
def position_weight(j, edge, corner):
    down, right = ring_step(j)
    return tl.where(down * right == 0, edge, corner).to(tl.float32)


@kernel
def weigh(
    image, weights, factors, height, width,
    DILATIONS: tl.constexpr, POSITIONS: tl.constexpr, PAR: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """weights [B, 8 rings, H, W], factors [B, H, W]. POSITIONS: PAR's addition at edges and corners of each ring."""
    rings: tl.constexpr = len(DILATIONS)
    plane = height.to(tl.int64) * width
    blocks = tl.cdiv(plane, PIXELS)
    batch = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < plane
    y, x = (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)
    red = image + batch * 3 * plane
    green = red + plane
    blue = green + plane
    r = tl.load(red + pixel, mask=inside, other=0.0)
    g = tl.load(green + pixel, mask=inside, other=0.0)
    b = tl.load(blue + pixel, mask=inside, other=0.0)
    scale_r = inverse_scale(red, r, y, x, inside, height, width, DILATIONS, PAR)
    scale_g = inverse_scale(green, g, y, x, inside, height, width, DILATIONS, PAR)
    scale_b = inverse_scale(blue, b, y, x, inside, height, width, DILATIONS, PAR)
    largest = tl.full([PIXELS], float("-inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    for i in tl.static_range(rings):
        for j in range(8):
            like = likeness(
                red, green, blue, r, g, b, scale_r, scale_g, scale_b, y, x, j, inside, height, width, DILATIONS[i], PAR
            )
            before = largest
            largest = tl.maximum(largest, like)
            total = total * tl.exp(before - largest) + tl.exp(like - largest)
    out = weights + batch * rings * 8 * plane + pixel
    wanted = tl.zeros([PIXELS], tl.float32)
    kept = tl.zeros([PIXELS], tl.float32)
    for i in tl.static_range(rings):
        for j in range(8):
            like = likeness(
                red, green, blue, r, g, b, scale_r, scale_g, scale_b, y, x, j, inside, height, width, DILATIONS[i], PAR
            )
            weight = tl.exp(like - largest) / total
            if PAR:
                weight += position_weight(j, POSITIONS[2 * i], POSITIONS[2 * i + 1])
            root = tl.floor(tl.sqrt(weight * _SCALE) + 0.5)
            tl.store(out, (root - _OFFSET).to(tl.int16), mask=inside)
            wanted += weight
            kept += root * root
            out += plane
    tl.store(factors + batch * plane + pixel, wanted / kept, mask=inside)  # NaN where the picture is


@triton.jit
def load_weight(pointer, mask):
    root = tl.load(pointer, mask=mask, other=-32768).to(tl.float32) + _OFFSET
    return root * root


@kernel
def smooth(
    maps, weights, factors, out, channels, height, width,
    DILATIONS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One iteration: a program takes some pixels of some maps."""
    rings: tl.constexpr = len(DILATIONS)
    plane = height.to(tl.int64) * width
    blocks = tl.cdiv(plane, PIXELS)
    groups = tl.cdiv(channels, CHANNELS)
    batch = tl.program_id(0) // (blocks * groups)
    channel = tl.program_id(0) // blocks % groups * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < plane
    y, x = (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)
    used = inside[None, :] & (channel < channels)
    planes = (batch * channels + channel) * plane
    weights += batch * rings * 8 * plane
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for i in tl.static_range(rings):
        for j in range(8):
            near = neighbour(y, x, j, DILATIONS[i], height, width).to(tl.int64)
            weight = load_weight(weights + pixel, inside)
            total += weight[None, :] * tl.load(maps + (planes + near[None, :]), mask=used, other=0.0)
            weights += plane
    factor = tl.load(factors + batch * plane + pixel, mask=inside, other=0.0)
    tl.store(out + (planes + pixel[None, :]), total * factor[None, :], mask=used)


@triton.jit
def sources(place, step, dilation, size):
    """first and count of the coordinates whose step, clamped to the map, leads to place; outside the map none is."""
    first = place - step * dilation
    reach = tl.minimum(dilation, size - 1) + 1
    at_start, at_end = (step < 0) & (place == 0), (step > 0) & (place == size - 1)
    first = tl.where(at_start, 0, tl.where(at_end, size - reach, first))
    return first, tl.where(at_start | at_end, reach, 1)


@kernel
def spread(
    grad, weights, factors, out, channels, height, width,
    DILATIONS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The transpose of `smooth`: a pixel collects from those that it is a neighbour of, a border pixel from many."""
    rings: tl.constexpr = len(DILATIONS)
    plane = height.to(tl.int64) * width
    blocks = tl.cdiv(plane, PIXELS)
    groups = tl.cdiv(channels, CHANNELS)
    batch = tl.program_id(0) // (blocks * groups)
    channel = tl.program_id(0) // blocks % groups * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < plane
    y, x = (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)
    used = inside[None, :] & (channel < channels)
    planes = (batch * channels + channel) * plane
    weights += batch * rings * 8 * plane
    factors += batch * plane
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for i in tl.static_range(rings):
        for j in range(8):
            down, right = ring_step(j)
            row, rows = sources(y, down, DILATIONS[i], height)
            column, columns = sources(x, right, DILATIONS[i], width)
            for v in range(tl.max(tl.where(inside, rows, 0))):
                for u in range(tl.max(tl.where(inside, columns, 0))):
                    from_row, from_column = row + v, column + u
                    there = inside & (v < rows) & (u < columns)
                    there &= (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
                    source = from_row.to(tl.int64) * width + from_column
                    weight = load_weight(weights + source, there) * tl.load(factors + source, mask=there, other=0.0)
                    part = tl.load(grad + (planes + source[None, :]), mask=used & there[None, :], other=0.0)
                    total += tl.where(there, weight, 0.0)[None, :] * part
            weights += plane
    tl.store(out + (planes + pixel[None, :]), total, mask=used)


def position_weights(dilations: list[int]) -> tuple[float, ...]:
    """What PAR adds for the distance alone: at the edges and the corners of each ring."""
    distances = torch.tensor([[d, d * 2**0.5] for d in dilations], dtype=torch.float64)
    spread_of_all = distances.repeat_interleave(4, dim=1).std()
    logits = -((distances / (spread_of_all + 1e-8) / 0.3) ** 2)
    weights = (logits - logits.max()).exp()
    return tuple((0.01 * weights / (4 * weights.sum())).flatten().tolist())


def _iterate(iteration, image: Tensor, maps: Tensor, par: bool, dilations: list[int], iterations: int) -> Tensor:
    batch, channels, height, width = maps.shape
    x = maps.resolve_neg().to(torch.float32).contiguous()
    picture = image.resolve_neg().to(torch.float32).contiguous()
    weights = torch.empty(batch, 8 * len(dilations), height, width, dtype=torch.int16, device=x.device)
    factors = torch.empty(batch, height, width, device=x.device)
    # A step past the map leads to its edge, as a step of its size does.
    rings = tuple(min(d, max(height, width)) for d in dilations)
    blocks = triton.cdiv(height * width, launch.ADAPTIVE_WEIGHTS.blocks["PIXELS"])
    launch.launch(
        weigh, batch * blocks, launch.ADAPTIVE_WEIGHTS, picture, weights, factors, height, width,
        DILATIONS=rings, POSITIONS=position_weights(dilations) if par else (), PAR=par,
    )  # fmt: skip
    configuration = launch.adaptive(channels, gradient=iteration is spread)
    blocks = triton.cdiv(height * width, configuration.blocks["PIXELS"])
    programs = batch * blocks * triton.cdiv(channels, configuration.blocks["CHANNELS"])
    for _ in range(iterations):
        out = torch.empty_like(x)
        launch.launch(
            iteration, programs, configuration, x, weights, factors, out, channels, height, width, DILATIONS=rings
        )
        x = out
    return x.clone() if x is maps else x.to(maps.dtype)  # an op returns none of its arguments


def pixel_adaptive(image: Tensor, maps: Tensor, par: bool, dilations: list[int], iterations: int) -> Tensor:
    with torch.cuda.device_of(maps):
        return _iterate(smooth, image, maps, par, dilations, iterations)


def pixel_adaptive_backward(grad: Tensor, image: Tensor, par: bool, dilations: list[int], iterations: int) -> Tensor:
    with torch.cuda.device_of(grad):
        return _iterate(spread, image, grad, par, dilations, iterations)
