"""The permutohedral lattice in plain PyTorch: a Gaussian filter over feature vectors (Adams et al. 2010)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Lattice:
    """The points that a set of feature vectors touches, and the filter over them.

    Built in float32 in the order of operations of the code everybody compares with: which simplex a vector falls into
    is decided by rounding where it lies between two.
    """

    def __init__(self, features: Tensor) -> None:
        """features: [N, d] float32, finite, in units of the Gaussian's deviation."""
        self.dim = dim = features.shape[1]
        rounded, rank, offset = _simplices(features)
        self.weights = _barycentric(rank, offset)  # [N, d + 1]
        self.vertices, self.neighbours = _points(rounded.long(), rank.long())
        self.alpha = 1 / (1 + 2.0**-dim)

    def filter(self, values: Tensor) -> Tensor:
        """[N, C] -> [N, C]: what each vector receives from all, itself included; values in any floating point dtype."""
        weights = self.weights.to(values.dtype)
        count = self.neighbours.shape[2]
        points = values.new_zeros(count + 1, values.shape[1])  # the last row stands for every missing point
        for vertex, weight in zip(self.vertices.unbind(1), weights.unbind(1), strict=True):
            points.index_add_(0, vertex, weight[:, None] * values)
        for before, after in self.neighbours.unbind(0):
            blurred = points[:-1] + 0.5 * (points[before] + points[after])
            points = torch.cat([blurred, points[-1:]])
        out = torch.zeros_like(values)
        for vertex, weight in zip(self.vertices.unbind(1), weights.unbind(1), strict=True):
            out += weight[:, None] * points[vertex]
        return self.alpha * out


def spatial_features(height: int, width: int, sigmas: tuple[float, float], device: torch.device) -> Tensor:
    """[H W, 2]: (x, y), each divided by its sigma."""
    # Divisors of the device: by one of the host's torch multiplies with the rounded reciprocal on a GPU.
    by_x, by_y = (torch.full((), sigma, dtype=torch.float32, device=device) for sigma in sigmas)
    x = torch.arange(width, dtype=torch.float32, device=device) / by_x
    y = torch.arange(height, dtype=torch.float32, device=device) / by_y
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


def bilateral_features(image: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """image [3, H, W] -> [H W, 5]: (x, y, r, g, b), each divided by its sigma; colours taken into 0..255, NaN to 0."""
    height, width = image.shape[1:]
    colour = image.to(torch.float32).nan_to_num(0.0).clamp(0, 255)
    colour = colour / torch.tensor(sigmas[2:], dtype=torch.float32, device=image.device).view(3, 1, 1)
    place = spatial_features(height, width, (sigmas[0], sigmas[1]), image.device)
    return torch.cat([place, colour.flatten(1).T], dim=1)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every vector: the remainder-0 point of its simplex, the rank of each coordinate, and how far it is from there.

    All [N, d + 1] float32.
    """
    count, dim = features.shape
    scale = [math.sqrt(2 / 3) * (dim + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(dim)]
    elevated = features.new_empty(count, dim + 1)
    total = features.new_zeros(count)
    for j in range(dim, 0, -1):
        c = features[:, j - 1] * scale[j - 1]
        elevated[:, j] = total - j * c
        total = total + c
    elevated[:, 0] = total
    # A multiplication, not a division: the peer's, which decides halves.
    multiple = torch.round(elevated * features.new_tensor(1 / (dim + 1)))
    rounded = multiple * (dim + 1)
    surplus = multiple.sum(dim=1, keepdim=True)
    offset = elevated - rounded
    rank = torch.zeros_like(elevated)
    for i in range(dim):
        for j in range(i + 1, dim + 1):
            less = (offset[:, i] < offset[:, j]).to(rank.dtype)
            rank[:, i] += less
            rank[:, j] += 1 - less
    rank += surplus
    wrapped = (dim + 1) * ((rank < 0).to(rank.dtype) - (rank > dim).to(rank.dtype))
    return rounded + wrapped, rank + wrapped, elevated - (rounded + wrapped)


def _barycentric(rank: Tensor, offset: Tensor) -> Tensor:
    """[N, d + 1]: the weight of each vertex of the simplex."""
    dim = rank.shape[1] - 1
    steps = offset * offset.new_tensor(1 / (dim + 1))
    sorted_steps = torch.empty_like(steps).scatter_(1, dim - rank.long(), steps)  # smallest offset first
    weights = sorted_steps.clone()
    weights[:, 1:] -= sorted_steps[:, :-1]
    weights[:, 0] += 1 - sorted_steps[:, -1]
    return weights


def _points(rounded: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Number of every vertex [N, d + 1], and of both neighbours of every point along each axis [d + 1, 2, M].

    A missing neighbour has the number M. The (d + 1)-th coordinate of a point is implied and left out.
    """
    dim = rank.shape[1] - 1
    keys = []
    for remainder in range(dim + 1):
        keys.append(rounded[:, :dim] + remainder - (dim + 1) * (rank[:, :dim] > dim - remainder))
    every = torch.stack(keys, dim=1)  # [N, d + 1, d]
    if every.numel() == 0:
        return every.new_zeros(rank.shape), every.new_zeros(dim + 1, 2, 0)
    # One whole number a point, with room for its neighbours on both sides.
    low, high = every.amin(dim=(0, 1)) - dim, every.amax(dim=(0, 1)) + dim
    sides = (high - low + 1).tolist()
    strides = every.new_tensor([math.prod(sides[i + 1 :]) for i in range(dim)])
    points, vertices = torch.unique(((every - low) * strides).sum(-1), return_inverse=True)
    count = points.numel()
    neighbours = []
    for axis in range(dim + 1):
        step = every.new_full((dim,), -1)
        if axis < dim:
            step[axis] = dim
        pair = []
        for wanted in (points + (step * strides).sum(), points - (step * strides).sum()):
            found = torch.searchsorted(points, wanted).clamp(max=count - 1)
            pair.append(torch.where(points[found] == wanted, found, count))
        neighbours.append(torch.stack(pair))
    return vertices, torch.stack(neighbours)
