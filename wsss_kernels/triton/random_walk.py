# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Random walk of maps over a local affinity in Triton: what ops/random_walk.py says, on any device.

A launch a step, everything in device memory; docs/kernels.md has the form of a step, the series and the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels import _dispatch
from wsss_kernels.neighbours import neighbour_count
from wsss_kernels.ops.random_walk import SOLVERS
from wsss_kernels.triton import launch
from wsss_kernels.triton.half_disc import write_offsets
from wsss_kernels.triton.launch import kernel

_MAX_EXPONENT = 64  # of the powers taken by squaring
_INFINITE_BETA = 1e30  # infinity times log2(1) would be NaN


@kernel
def find_present(maps, present, plane: tl.int64, BLOCK: tl.constexpr):
    """present [B * C]: 1 where a map has anything but zeros."""
    map_at = tl.program_id(0).to(tl.int64)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, plane, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(maps + map_at * plane + i, mask=i < plane, other=0.0).to(tl.float32)
        found |= tl.where(value == 0, 0, 1)
    tl.store(present + map_at, tl.max(found, axis=0))


@kernel
def list_present(present, listed, counts, channels, BLOCK: tl.constexpr):
    """listed [B, C]: the present maps of an image, in order; counts [B]: how many."""
    image = tl.program_id(0).to(tl.int64)
    count = tl.program_id(0) * 0
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        one = tl.load(present + image * channels + c, mask=c < channels, other=0)
        slot = count + tl.cumsum(one, axis=0) - 1
        tl.store(listed + image * channels + slot, c, mask=one != 0)
        count += tl.sum(one, axis=0)
    tl.store(counts + image, count)


@triton.jit
def number(value, pointer):
    """An argument in the precision of what a pointer leads to."""
    return tl.full([], value, pointer.dtype.element_ty)


@triton.jit
def power(base, exponent, beta):
    """base ** beta, 0 where base <= 0; whole powers (`exponent` >= 0) by squaring."""
    result = tl.full(base.shape, 1.0, base.dtype)
    if exponent >= 0:
        square = base
        while exponent > 0:
            result = tl.where(exponent % 2 == 1, result * square, result)
            square *= square
            exponent //= 2
    else:
        result = tl.exp2(tl.full([], beta, base.dtype) * tl.log2(tl.where(base <= 0, 1.0, base)))
    return tl.where(base <= 0, 0.0, result)


@kernel
def link_weights(affinity, weights, links: tl.int64, exponent, beta: tl.float64, BLOCK: tl.constexpr):
    """weights = affinity ** beta, whatever that is where a link leads out of the map: no one reads it there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(affinity + at, mask=at < links, other=0.0).to(tl.float32).to(weights.dtype.element_ty)
    tl.store(weights + at, power(value, exponent, beta), mask=at < links)


@kernel
def affinity_gradient(
    gradient, affinity, out, links: tl.int64, exponent, beta: tl.float64, slope: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    """From the gradient of the weights; slope * affinity ** beta is the derivative of a weight."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(affinity + at, mask=at < links, other=0.0).to(tl.float32).to(gradient.dtype.element_ty)
    reached = tl.load(gradient + at, mask=at < links, other=0.0)
    result = reached * number(slope, gradient)
    # What did not reach the link, as none does that leads out of the map, stays 0 whatever its derivative.
    nothing = (reached == 0) | (result == 0) | (value <= 0)
    result = tl.where(nothing, 0.0, result * power(value, exponent, beta))
    tl.store(out + at, result.to(tl.float32).to(out.dtype.element_ty), mask=at < links)


@triton.jit
def neighbours(offsets, k, count, y, x, height, width):
    """dy * width + dx, and whether the neighbours k ahead and behind lie in the map."""
    real = k < count
    dy = tl.load(offsets + k, mask=real, other=0)
    dx = tl.load(offsets + count + k, mask=real, other=0)
    ahead = real & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    behind = real & (y >= dy) & (x >= dx) & (x - dx < width)
    return dy.to(tl.int64) * width + dx, ahead, behind


@kernel
def inverse_degrees(
    weights, inverse, offsets, height, width, count, LINKS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """inverse [B, H * W]: 1 / (1 + the sum of a pixel's weights), summed in double."""
    plane = height.to(tl.int64) * width
    tiles = tl.cdiv(plane, PIXELS)
    image = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * PIXELS + tl.arange(0, PIXELS)[None, :]
    y, x = pixel // width, pixel % width
    in_map = pixel < plane
    degree = tl.zeros([LINKS, PIXELS], tl.float64)
    for first in range(0, count, LINKS):
        k = first + tl.arange(0, LINKS)[:, None]
        step, ahead, behind = neighbours(offsets, k, count, y, x, height, width)
        at = weights + (image * count + k) * plane + pixel
        degree += tl.load(at, mask=ahead & in_map, other=0.0).to(tl.float64)
        degree += tl.load(at - step, mask=behind & in_map, other=0.0).to(tl.float64)
    result = 1.0 / (1.0 + tl.sum(degree, axis=0))
    pixel = tl.ravel(pixel)
    tl.store(inverse + image * plane + pixel, result.to(inverse.dtype.element_ty), mask=pixel < plane)


@kernel
def walk_step(
    state, following, added, total, product, weights, inverse, offsets, listed, counts,
    channels, height, width, count,
    scale: tl.float64, following_scale: tl.float64, added_scale: tl.float64, total_scale: tl.float64, wants_product,
    LINKS: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """following = scale * P state + following_scale * following + added_scale * added, and its share in the total.

    total += total_scale * following; product = P state where it is wanted. What has the scale 0 is not read. States are
    [B, C, H * W]; MAPS present maps of an image together, so that a weight is read once for all of them.
    """
    plane = height.to(tl.int64) * width
    tiles = tl.cdiv(plane, PIXELS)
    groups = tl.cdiv(channels, MAPS)
    tile, item = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    image, first_slot = item // groups, item % groups * MAPS
    present = tl.load(counts + image)
    if first_slot >= present:
        return
    slot = first_slot + tl.arange(0, MAPS)[None, :, None]
    walked = slot < present
    channel = tl.load(listed + image * channels + slot, mask=walked, other=0)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)[None, None, :]
    y, x = pixel // width, pixel % width
    in_map = pixel < plane
    at = (image * channels + channel) * plane + pixel
    centre = tl.load(state + at, mask=walked & in_map, other=0.0)
    change = tl.zeros([LINKS, MAPS, PIXELS], state.dtype.element_ty)
    for first in range(0, count, LINKS):
        k = first + tl.arange(0, LINKS)[:, None, None]
        step, ahead, behind = neighbours(offsets, k, count, y, x, height, width)
        ahead = ahead & in_map
        behind = behind & in_map
        link = weights + (image * count + k) * plane + pixel
        other = tl.load(state + at + step, mask=ahead & walked, other=0.0)
        change += tl.load(link, mask=ahead, other=0.0) * (other - centre)
        other = tl.load(state + at - step, mask=behind & walked, other=0.0)
        change += tl.load(link - step, mask=behind, other=0.0) * (other - centre)
    own = walked & in_map
    per_degree = tl.load(inverse + image * plane + pixel, mask=in_map, other=0.0)
    value = centre + per_degree * tl.sum(change, axis=0)[None, :, :]
    if wants_product != 0:
        tl.store(product + at, value, mask=own)
    value *= number(scale, state)
    if following_scale != 0:
        value += number(following_scale, state) * tl.load(following + at, mask=own, other=0.0)
    if added_scale != 0:
        value += number(added_scale, state) * tl.load(added + at, mask=own, other=0.0)
    shares = number(total_scale, state) * value
    if total_scale != 0:
        shares += tl.load(total + at, mask=own, other=0.0)
    # Where a block has fewer values than threads several hold the same one: all have read it before one writes.
    tl.debug_barrier()
    tl.store(following + at, value, mask=own)
    if total_scale != 0:
        tl.store(total + at, shares, mask=own)


@kernel
def add_weight_gradient(
    b, state, product, gradient, offsets, listed, counts, channels, height, width, count, scale: tl.float64,
    LINKS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """gradient += scale * the sum over present maps of b_i (x_j - q_i) + b_j (x_i - q_j), q = P x, for every link."""
    plane = height.to(tl.int64) * width
    tiles = tl.cdiv(plane, PIXELS)
    groups = tl.cdiv(count, LINKS)
    tile, item = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    image = item // groups
    present = tl.load(counts + image)
    if present == 0:
        return
    k = item % groups * LINKS + tl.arange(0, LINKS)[:, None]
    pixel = tile * PIXELS + tl.arange(0, PIXELS)[None, :]
    in_map = pixel < plane
    step, inside, _ = neighbours(offsets, k, count, pixel // width, pixel % width, height, width)
    inside = inside & in_map
    total = tl.zeros([LINKS, PIXELS], state.dtype.element_ty)
    for slot in range(present):
        channel = tl.load(listed + image * channels + slot)
        at = (image * channels + channel) * plane + pixel
        b_i = tl.load(b + at, mask=in_map, other=0.0)
        x_i = tl.load(state + at, mask=in_map, other=0.0)
        q_i = tl.load(product + at, mask=in_map, other=0.0)
        b_j = tl.load(b + at + step, mask=inside, other=0.0)
        x_j = tl.load(state + at + step, mask=inside, other=0.0)
        q_j = tl.load(product + at + step, mask=inside, other=0.0)
        total += b_i * (x_j - q_i) + b_j * (x_i - q_j)
    at = gradient + (image * count + k) * plane + pixel
    value = tl.load(at, mask=inside, other=0.0) + number(scale, state) * total
    tl.store(at, value, mask=inside)


@kernel
def write_maps(
    state, present, inverse, out, channels, plane: tl.int64, TIMES_DEGREE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The walked maps, times the degree where asked; zeros for the maps that are absent."""
    blocks = tl.cdiv(plane, BLOCK)
    map_at = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    walked = (i < plane) & (tl.load(present + map_at) != 0)
    value = tl.load(state + map_at * plane + i, mask=walked, other=0.0)
    if TIMES_DEGREE:
        value = tl.where(walked, value / tl.load(inverse + map_at // channels * plane + i, mask=walked, other=1.0), 0.0)
    tl.store(out + map_at * plane + i, value.to(tl.float32).to(out.dtype.element_ty), mask=i < plane)


def _states(maps: Tensor, in_double: bool) -> Tensor:
    """A contiguous copy to walk on."""
    return torch.empty(maps.shape, dtype=torch.float64 if in_double else torch.float32, device=maps.device).copy_(maps)


def _recurrence(k: int) -> tuple[float, float]:
    """Scales of P x_{k-1} and of x_{k-2} in x_k = T_k(P) x."""
    return (1.0, 0.0) if k == 1 else (2.0, -1.0)


class _Walk:
    """What every step needs; `maps` [B, C, H, W] decides which maps are walked."""

    def __init__(self, maps: Tensor, affinity: Tensor, radius: int, beta: float) -> None:
        self.batch, self.channels, self.height, self.width = maps.shape
        self.count = neighbour_count(radius)
        self.plane = self.height * self.width
        self.affinity = affinity.resolve_neg().contiguous()
        self.offsets = self._empty(2 * self.count, torch.int32)
        self.weights = torch.empty(affinity.shape, dtype=maps.dtype, device=maps.device)
        self.inverse = torch.empty(self.batch, self.plane, dtype=maps.dtype, device=maps.device)
        self.present, self.listed = (self._empty(self.batch * self.channels, torch.int32) for _ in range(2))
        self.counts = self._empty(self.batch, torch.int32)
        launch.launch(write_offsets, 1, launch.REDUCTION, self.offsets, radius, self.count)
        launch.launch(find_present, self.batch * self.channels, launch.REDUCTION, maps, self.present, self.plane)
        launch.launch(list_present, self.batch, launch.REDUCTION, self.present, self.listed, self.counts, self.channels)
        self._each_link(link_weights, self.affinity, self.weights, beta=beta)
        tiles = triton.cdiv(self.plane, launch.DEGREE.blocks["PIXELS"])
        launch.launch(
            inverse_degrees, self.batch * tiles, launch.DEGREE,
            self.weights, self.inverse, self.offsets, self.height, self.width, self.count,
        )  # fmt: skip
        self.configuration = launch.walk(self.batch, self.channels, self.plane)
        blocks = self.configuration.blocks
        groups, tiles = triton.cdiv(self.channels, blocks["MAPS"]), triton.cdiv(self.plane, blocks["PIXELS"])
        self.programs = self.batch * groups * tiles

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.affinity.device)

    def _each_link(self, function, *tensors: Tensor, beta: float, slope: tuple[float, ...] = ()) -> None:
        exponent = int(beta) if 0 <= beta <= _MAX_EXPONENT and beta == int(beta) else -1
        links = self.affinity.numel()
        programs = triton.cdiv(links, launch.ELEMENTWISE.blocks["BLOCK"])
        launch.launch(
            function, programs, launch.ELEMENTWISE, *tensors, links, exponent, min(beta, _INFINITE_BETA), *slope
        )

    def step(
        self,
        state: Tensor,
        following: Tensor,
        scale: float = 1.0,
        following_scale: float = 0.0,
        added: tuple[Tensor, float] | None = None,
        total: tuple[Tensor, float] | None = None,
        product: Tensor | None = None,
    ) -> None:
        added_tensor, added_scale = added or (state, 0.0)
        total_tensor, total_scale = total or (state, 0.0)
        launch.launch(
            walk_step, self.programs, self.configuration,
            state, following, added_tensor, total_tensor, state if product is None else product,
            self.weights, self.inverse, self.offsets, self.listed, self.counts,
            self.channels, self.height, self.width, self.count,
            scale, following_scale, added_scale, total_scale, int(product is not None),
        )  # fmt: skip

    def add_weight_gradient(self, b: Tensor, state: Tensor, product: Tensor, gradient: Tensor, scale: float) -> None:
        blocks = launch.WALK_GRADIENT.blocks
        tiles = triton.cdiv(self.plane, blocks["PIXELS"])
        launch.launch(
            add_weight_gradient, self.batch * triton.cdiv(self.count, blocks["LINKS"]) * tiles, launch.WALK_GRADIENT,
            b, state, product, gradient, self.offsets, self.listed, self.counts,
            self.channels, self.height, self.width, self.count, scale,
        )  # fmt: skip

    def affinity_gradient(self, gradient: Tensor, beta: float) -> Tensor:
        out = torch.empty_like(self.affinity)
        self._each_link(
            affinity_gradient, gradient, self.affinity, out, beta=beta - 1, slope=(min(beta, _INFINITE_BETA),)
        )
        return out

    def maps_of(self, state: Tensor, dtype: torch.dtype, times_degree: bool = False) -> Tensor:
        out = torch.empty_like(state, dtype=dtype)
        programs = self.batch * self.channels * triton.cdiv(self.plane, launch.ELEMENTWISE.blocks["BLOCK"])
        launch.launch(
            write_maps, programs, launch.ELEMENTWISE,
            state, self.present, self.inverse, out, self.channels, self.plane, TIMES_DEGREE=times_degree,
        )  # fmt: skip
        return out


def random_walk(
    maps: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, solver: str, tol: float
) -> Tensor:
    """The walked maps [B, C, H, W] in their dtype."""
    with torch.cuda.device_of(maps):
        if steps == 0 or maps.numel() == 0:
            return torch.empty_like(maps, memory_format=torch.contiguous_format).copy_(maps)
        assert _dispatch.native is not None
        in_double, series = _dispatch.native.walk_method(steps, SOLVERS.index(solver), tol)
        now = _states(maps, in_double)
        walk = _Walk(now, affinity, radius, beta)
        other = torch.empty_like(now)
        if not series:
            for _ in range(steps):
                walk.step(now, other)
                now, other = other, now
            return walk.maps_of(now, maps.dtype)
        total = now * series[0]
        for k, coefficient in enumerate(series[1:], 1):
            walk.step(now, other, *_recurrence(k), total=(total, coefficient))
            now, other = other, now
        return walk.maps_of(total, maps.dtype)


def random_walk_backward(
    grad: Tensor,
    maps: Tensor,
    affinity: Tensor,
    radius: int,
    beta: float,
    steps: int,
    solver: str,
    tol: float,
    wants_maps: bool,
    wants_affinity: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * out) in the dtypes of maps and affinity; empty where not wanted.

    Reverse mode through the Chebyshev recurrence: b_k = D^-1 dL/dx_k follows it downwards (W is symmetric, so
    P^T = D P D^-1), and the states are recovered on the way, since x_{k-1} = 2 P x_k - x_{k+1}.
    """
    with torch.cuda.device_of(maps):
        grad_maps, grad_affinity = maps.new_empty(0), affinity.new_empty(0)
        if steps == 0 or maps.numel() == 0:
            if wants_maps:
                grad_maps = torch.empty_like(maps, memory_format=torch.contiguous_format).copy_(grad)
            if wants_affinity:
                grad_affinity = torch.zeros_like(affinity, memory_format=torch.contiguous_format)
            return grad_maps, grad_affinity
        assert _dispatch.native is not None
        in_double, series = _dispatch.native.walk_gradient_method(steps, SOLVERS.index(solver), tol)
        g = _states(grad, in_double)
        walk = _Walk(g, affinity, radius, beta)
        g *= walk.inverse.view(walk.batch, 1, walk.height, walk.width)
        products = len(series) - 1
        b, b_after = g * series[-1], torch.zeros_like(g)
        if wants_affinity:
            x, x_after = _states(maps, in_double), torch.empty_like(g)
            product, gradient = torch.empty_like(g), torch.zeros_like(walk.weights)
            for k in range(1, products + 1):
                x, x_after = x_after, x  # x_after = x_{k-1}, and x holds x_{k-2}
                walk.step(x_after, x, *_recurrence(k))
            x, x_after = x_after, x
        for k in range(products - 1, -1, -1):
            scale = 1.0 if k == 0 else 2.0
            if wants_affinity:
                walk.step(x, x_after, 2.0, -1.0, product=product)  # x_after: from x_{k+1} to x_{k-1}
                walk.add_weight_gradient(b, x, product, gradient, scale)
                x, x_after = x_after, x
            walk.step(b, b_after, scale, -1.0, added=(g, series[k]))
            b, b_after = b_after, b
        if wants_maps:
            grad_maps = walk.maps_of(b, maps.dtype, times_degree=True)
        if wants_affinity:
            grad_affinity = walk.affinity_gradient(gradient, beta)
        return grad_maps, grad_affinity
