# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
# ruff: noqa: RUF005
"""Affinity between each pixel and its neighbours in Triton: what ops/local_affinity.py says, on any device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.neighbours import neighbour_count, neighbour_offsets
from wsss_kernels.triton import launch
from wsss_kernels.triton.half_disc import next_centre, reach
from wsss_kernels.triton.launch import kernel

# A mean distance 1 - cos up to this is the rounding of the cosines, not a difference between features.
_COSINE_NOISE = 1e-6
# Below this float32 cannot hold 1 / scale; the affinities are the same.
_LEAST_SCALE = 1e-37


@kernel
def inverse_norms(feats, norms, dim, plane: tl.int64, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """norms [B, H * W]: 1 / |f|, 0 for a zero vector."""
    tiles = tl.cdiv(plane, PIXELS)
    image = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)[:, None]
    at = feats + (image * dim + channel) * plane + pixel[None, :]
    largest = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for d in range(0, dim, CHANNELS):
        value = tl.load(at + d * plane, mask=(d + channel < dim) & (pixel < plane)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
    largest = tl.max(largest, axis=0)
    unit = tl.where(largest > 0, tl.div_rn(1.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    squares = tl.zeros([CHANNELS, PIXELS], tl.float32)  # of values up to 1: none overflows or vanishes
    for d in range(0, dim, CHANNELS):
        value = tl.load(at + d * plane, mask=(d + channel < dim) & (pixel < plane)[None, :], other=0.0)
        value = value.to(tl.float32) * unit[None, :]
        squares += value * value
    length = tl.sqrt_rn(tl.sum(squares, axis=0))
    norm = tl.where(length == 0, 0.0, tl.div_rn(unit, tl.where(length == 0, 1.0, length)))
    tl.store(norms + image * plane + pixel, norm, mask=pixel < plane)


@triton.jit
def load_row(at, offset, mask, norm, COSINE: tl.constexpr):
    value = tl.load(at + offset, mask=mask, other=0.0).to(tl.float32)
    if COSINE:
        value *= norm
    return value


@triton.jit
def load_norm(norms, offset, mask, COSINE: tl.constexpr):
    if COSINE:
        return tl.load(norms + offset, mask=mask, other=0.0)
    else:
        return 0.0


@kernel
def affinities(
    feats, norms, out, partial_sums, dim, height, width, radius, margin, count, slope,
    COSINE: tl.constexpr, AUTOMATIC: tl.constexpr,
    ROWS: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS pixels of one image and their neighbours dx away in BAND stencil rows.

    With the automatic scale the bare distances, -1 where there is no pair, and their sum.
    """
    shifts = 2 * radius - 1
    parts = shifts * tl.cdiv(radius, BAND)
    tiles_x, tiles_y = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    # The parts of a tile run at the same time and share what they load through the second-level cache.
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    dx = part % shifts - (radius - 1)
    dy0 = part // shifts * BAND
    y0 = tile // tiles_x % tiles_y * ROWS
    image = (tile // (tiles_x * tiles_y)).to(tl.int64)
    if dx * dx + dy0 * dy0 >= radius * radius:
        return

    plane = height.to(tl.int64) * width
    x = tile % tiles_x * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    channel = tl.arange(0, CHANNELS)[:, None]
    column = x < width
    column_there = column & (x + dx >= 0) & (x + dx < width)
    here = y0.to(tl.int64) * width + x
    there = here + dy0 * width + dx
    in_map_here, in_map_there, norm_here, norm_there = (), (), (), ()
    for t in tl.static_range(ROWS):
        in_map_here = in_map_here + (column & (y0 + t < height),)
        norm_here = norm_here + (load_norm(norms + image * plane, here + t * width, in_map_here[t], COSINE),)
    for i in tl.static_range(ROWS + BAND - 1):
        in_map_there = in_map_there + (column_there & (y0 + dy0 + i < height),)
        norm_there = norm_there + (load_norm(norms + image * plane, there + i * width, in_map_there[i], COSINE),)
    sums = ()  # what registers hold side by side: a tuple, which in Triton grows by + alone
    for _ in tl.static_range(ROWS * BAND):
        sums = sums + (tl.zeros([CHANNELS, COLUMNS], tl.float32),)

    for d in range(0, dim, CHANNELS):
        real = d + channel < dim
        at = feats + (image * dim + d + channel) * plane
        centres = ()
        for t in tl.static_range(ROWS):
            centres = centres + (load_row(at, here + t * width, real & in_map_here[t], norm_here[t], COSINE),)
        rows = ()
        for i in tl.static_range(ROWS + BAND - 1):
            rows = rows + (load_row(at, there + i * width, real & in_map_there[i], norm_there[i], COSINE),)
        longer = ()
        for r in tl.static_range(BAND):
            for t in tl.static_range(ROWS):
                if COSINE:
                    longer = longer + (sums[r * ROWS + t] + centres[t] * rows[t + r],)
                else:
                    longer = longer + (sums[r * ROWS + t] + tl.abs(centres[t] - rows[t + r]),)
        sums = longer

    total = tl.zeros([COLUMNS], tl.float64)
    x = tl.ravel(x)
    in_columns = tl.ravel(column_there)
    wanted_columns = in_columns & (x >= margin) & (x < width - margin)
    centre = radius * 0 - 1
    for row in range(1, dy0 + 1):
        centre = next_centre(centre, radius, row)
    for r in tl.static_range(BAND):
        dy = dy0 + r
        if r > 0:
            centre = next_centre(centre, radius, tl.minimum(dy, radius - 1))
        if (dx * dx + dy * dy < radius * radius) & ((dy > 0) | (dx > 0)):
            for t in tl.static_range(ROWS):
                value = tl.sum(sums[r * ROWS + t], axis=0)
                in_map = in_columns & (y0 + t + dy < height)
                wanted = wanted_columns & (y0 + t + dy < height) & (y0 + t < height - margin)
                if AUTOMATIC:
                    if COSINE:
                        value = tl.where(value > 1, 0.0, 1 - value)
                    else:
                        value = value / dim
                    total += tl.where(in_map, value, 0.0)
                    value = tl.where(wanted, value, -1.0)
                else:
                    if COSINE:
                        value = tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value))
                    else:
                        value = tl.exp(value * slope)
                    value = tl.where(wanted, value, 0.0)
                at = (image * count + centre + dx) * plane + (y0 + t).to(tl.int64) * width + x
                tl.store(out + at, value.to(out.dtype.element_ty), mask=(x < width) & (y0 + t < height))
    if AUTOMATIC:
        tl.store(partial_sums + tl.program_id(0).to(tl.int64), tl.sum(total, axis=0))


@kernel
def mean_distances(partial_sums, scales, count, pairs: tl.float64, least, BLOCK: tl.constexpr):
    """scales [B]: the mean distance of an image, added up in one order; 1 where that is no more than `least`."""
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial_sums + (image * count + i), mask=i < count, other=0.0)
    mean = (tl.sum(total, axis=0) / pairs).to(tl.float32)
    tl.store(scales + image, tl.where(mean <= least, 1.0, mean))


@kernel
def apply_scales(distances, scales, out, per_image: tl.int64, BLOCK: tl.constexpr):
    blocks = tl.cdiv(per_image, BLOCK)
    image = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    distance = tl.load(distances + image * per_image + i, mask=i < per_image, other=-1.0)
    value = tl.where(distance < 0, 0.0, tl.exp(-distance / tl.load(scales + image)))
    tl.store(out + image * per_image + i, value.to(out.dtype.element_ty), mask=i < per_image)


@triton.jit
def pair_weight(grad, affinity, at, slope, mask, EXPONENTIAL: tl.constexpr):
    """h of a pair, such that grad_i = sum of h times sign(f_i - f_j) (l1) or f_j / |f_j| (cosine); 0 for no pair."""
    weight = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(affinity + at, mask=mask, other=0.0).to(tl.float32)
    if EXPONENTIAL:
        weight *= value * slope
    return tl.where(value == 0, 0.0, weight)


@triton.jit
def pair_gradient(feats, norms, here, at, pixel, weight, mask, inside, COSINE: tl.constexpr):
    other = tl.load(feats + at, mask=mask, other=0.0).to(tl.float32)
    if COSINE:
        return weight * (other * tl.load(norms + pixel, mask=inside, other=0.0))
    else:
        return tl.where(here == other, 0.0, tl.where(here < other, -weight, weight))


@kernel
def gather_gradient(
    grad, feats, affinity, scales, norms, out, dim, height, width, radius, count, inverse_dim,
    COSINE: tl.constexpr, EXPONENTIAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the features, of the normalised ones for the cosine: the sum over a pixel's 2 K links."""
    tiles_x, tiles_y = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    slices = tl.cdiv(dim, CHANNELS)
    channel = tl.program_id(0) % slices * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    tile = tl.program_id(0) // slices
    image = (tile // (tiles_x * tiles_y)).to(tl.int64)
    i = tl.arange(0, ROWS * COLUMNS)[None, :]
    y = tile // tiles_x % tiles_y * ROWS + i // COLUMNS
    x = tile % tiles_x * COLUMNS + i % COLUMNS
    plane = height.to(tl.int64) * width
    pixel = y.to(tl.int64) * width + x
    in_map = (y < height) & (x < width)
    real = channel < dim
    at = (image * dim + channel) * plane + pixel
    here = tl.load(feats + at, mask=real & in_map, other=0.0).to(tl.float32)
    slope = -inverse_dim
    if COSINE:
        slope = -slope
    if EXPONENTIAL:
        slope = slope / tl.load(scales + image)
    norms += image * plane

    total = tl.zeros([CHANNELS, ROWS * COLUMNS], tl.float32)
    centre = radius * 0 - 1
    for dy in range(radius):
        if dy > 0:
            centre = next_centre(centre, radius, dy)
        half_width = reach(radius, dy)
        for dx in range(1 if dy == 0 else -half_width, half_width + 1):
            link = (image * count + centre + dx) * plane + pixel
            step = dy * width.to(tl.int64) + dx
            inside = in_map & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            weight = pair_weight(grad, affinity, link, slope, inside, EXPONENTIAL)
            total += pair_gradient(feats, norms, here, at + step, pixel + step, weight, real & inside, inside, COSINE)
            inside = in_map & (y >= dy) & (x >= dx) & (x - dx < width)
            weight = pair_weight(grad, affinity, link - step, slope, inside, EXPONENTIAL)
            total += pair_gradient(feats, norms, here, at - step, pixel - step, weight, real & inside, inside, COSINE)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real & in_map)


@kernel
def through_norm(feats, norms, gathered, out, dim, plane: tl.int64, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """d/df of a function of f / |f| whose gradient there is `gathered`: what lies along f goes, the rest by 1 / |f|."""
    tiles = tl.cdiv(plane, PIXELS)
    image = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)[:, None]
    at = (image * dim + channel) * plane + pixel[None, :]
    norm = tl.load(norms + image * plane + pixel, mask=pixel < plane, other=0.0)[None, :]
    along = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for d in range(0, dim, CHANNELS):
        mask = (d + channel < dim) & (pixel < plane)[None, :]
        unit = tl.load(feats + at + d * plane, mask=mask, other=0.0).to(tl.float32) * norm
        along += unit * tl.load(gathered + at + d * plane, mask=mask, other=0.0)
    along = tl.sum(along, axis=0)[None, :]
    for d in range(0, dim, CHANNELS):
        mask = (d + channel < dim) & (pixel < plane)[None, :]
        unit = tl.load(feats + at + d * plane, mask=mask, other=0.0).to(tl.float32) * norm
        value = (tl.load(gathered + at + d * plane, mask=mask, other=0.0) - unit * along) * norm
        tl.store(out + at + d * plane, value.to(out.dtype.element_ty), mask=mask)


def _contiguous(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous()


def _norms_of(feats: Tensor) -> Tensor:
    batch, dim, height, width = feats.shape
    plane = height * width
    norms = feats.new_empty(batch, plane, dtype=torch.float32)
    programs = batch * triton.cdiv(plane, launch.NORM.blocks["PIXELS"])
    launch.launch(inverse_norms, programs, launch.NORM, feats, norms, dim, plane)
    return norms


def _in_map_pairs(height: int, width: int, radius: int) -> int:
    return sum(max(height - dy, 0) * max(width - abs(dx), 0) for dy, dx in neighbour_offsets(radius))


def local_affinity(feats: Tensor, radius: int, cosine: bool, scale: float, cropped: bool) -> tuple[Tensor, Tensor]:
    """Affinity [B, K, H, W] in the dtype of feats and the scales [B] used; scale 0 is the automatic one."""
    batch, dim, height, width = feats.shape
    count, plane = neighbour_count(radius), height * width
    automatic = scale == 0
    with torch.cuda.device_of(feats):
        out = feats.new_empty(batch, count, height, width)
        scales = torch.full((batch,), 1.0 if automatic else max(scale, _LEAST_SCALE), device=feats.device)
        if out.numel() == 0:
            return out, scales
        feats = _contiguous(feats)
        norms = _norms_of(feats) if cosine else scales
        result = torch.empty_like(out, dtype=torch.float32) if automatic and out.dtype != torch.float32 else out
        configuration = launch.affinity(radius)
        blocks = configuration.blocks
        parts = (2 * radius - 1) * triton.cdiv(radius, blocks["BAND"])
        programs = parts * triton.cdiv(height, blocks["ROWS"]) * triton.cdiv(width, blocks["COLUMNS"])  # an image's
        # Programs whose offsets all lie outside the disc write nothing.
        partial_sums = torch.zeros(batch * programs if automatic else 0, dtype=torch.float64, device=feats.device)
        slope = 0.0 if automatic else -1.0 / (dim * max(scale, _LEAST_SCALE))
        margin = radius - 1 if cropped else 0
        launch.launch(
            affinities, batch * programs, configuration,
            feats, norms, result, partial_sums, dim, height, width, radius, margin, count, slope,
            COSINE=cosine, AUTOMATIC=automatic,
        )  # fmt: skip
        if automatic:
            pairs = float(max(1, _in_map_pairs(height, width, radius)))
            least = _COSINE_NOISE if cosine else 0.0
            launch.launch(mean_distances, batch, launch.REDUCTION, partial_sums, scales, programs, pairs, least)
            blocks_per_image = triton.cdiv(count * plane, launch.ELEMENTWISE.blocks["BLOCK"])
            launch.launch(
                apply_scales, batch * blocks_per_image, launch.ELEMENTWISE, result, scales, out, count * plane
            )
        return out, scales


def local_affinity_backward(
    grad: Tensor,
    feats: Tensor,
    affinity: Tensor,
    scales: Tensor,
    radius: int,
    cosine: bool,
    scale: float,
    cropped: bool,
) -> Tensor:
    """Gradient of the features; pairs outside `cropped` have affinity 0, and so no gradient."""
    batch, dim, height, width = feats.shape
    plane = height * width
    with torch.cuda.device_of(feats):
        out = torch.empty_like(feats, memory_format=torch.contiguous_format)
        if out.numel() == 0:
            return out
        grad, feats, affinity = _contiguous(grad), _contiguous(feats), _contiguous(affinity)
        norms = _norms_of(feats) if cosine else scales
        result = torch.empty_like(out, dtype=torch.float32) if cosine and out.dtype != torch.float32 else out
        blocks = launch.AFFINITY_GRADIENT.blocks
        tiles = triton.cdiv(height, blocks["ROWS"]) * triton.cdiv(width, blocks["COLUMNS"])
        launch.launch(
            gather_gradient, batch * tiles * triton.cdiv(dim, blocks["CHANNELS"]), launch.AFFINITY_GRADIENT,
            grad, feats, affinity, scales, norms, result,
            dim, height, width, radius, neighbour_count(radius), 1.0 if cosine else 1.0 / dim,
            COSINE=cosine, EXPONENTIAL=not cosine or scale == 0,
        )  # fmt: skip
        if cosine:
            programs = batch * triton.cdiv(plane, launch.NORM.blocks["PIXELS"])
            launch.launch(through_norm, programs, launch.NORM, feats, norms, result, out, dim, plane)
        return out
