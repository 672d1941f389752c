"""What `wsss_kernels.random_walk` means, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels.neighbours import neighbour_offsets
from wsss_kernels.reference.local_affinity import pair_exists, shifted


def walk_weights(affinity: Tensor, radius: int, beta: float) -> Tensor:
    """W = affinity^beta [B, K, H, W], 0 where there is no link."""
    height, width = affinity.shape[-2:]
    none = (affinity <= 0) | ~pair_exists(height, width, radius, "full", affinity.device)
    base = torch.where(none, torch.ones_like(affinity), affinity)  # keeps 0 out of the gradient of the power
    return torch.where(none, torch.zeros_like(affinity), base**beta)


def walk_step(x: Tensor, weights: Tensor, degree: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """(D^-1 W) x = x_i + sum_j W_ij (x_j - x_i) / d_i. x [B, C, H, W], degree [B, 1, H, W]."""
    change = torch.zeros_like(x)
    for k, (dy, dx) in enumerate(offsets):
        link = weights[:, k : k + 1]
        change = change + link * (shifted(x, dy, dx) - x)
        change = change + shifted(link, -dy, -dx) * (shifted(x, -dy, -dx) - x)
    return x + change / degree


def random_walk(
    maps: Tensor,
    affinity: Tensor,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    solver: str = "auto",
    tol: float = 1e-4,
) -> Tensor:
    """Meaning of `wsss_kernels.random_walk` in plain PyTorch: `steps` products, whatever the solver and tol."""
    dtype = torch.float64 if torch.float64 in (maps.dtype, affinity.dtype) else torch.float32
    offsets = neighbour_offsets(radius)
    weights = walk_weights(affinity.to(dtype), radius, beta)
    degree = torch.ones_like(weights[:, :1]) if offsets else torch.ones_like(maps[:, :1], dtype=dtype)
    if offsets:
        degree = degree + weights.sum(dim=1, keepdim=True)
        for k, (dy, dx) in enumerate(offsets):
            degree = degree + shifted(weights[:, k : k + 1], -dy, -dx)
    x = maps.to(dtype, copy=True)  # a result of its own, also after 0 steps
    for _ in range(steps):
        x = walk_step(x, weights, degree, offsets)
    return x.to(maps.dtype).contiguous()
