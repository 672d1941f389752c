"""What `wsss_kernels.boundary_affinity` means, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels.neighbours import neighbour_offsets, neighbour_path
from wsss_kernels.reference.local_affinity import pair_exists, shifted


def boundary_affinity(boundary: Tensor, radius: int = 5) -> Tensor:
    """Meaning of `wsss_kernels.boundary_affinity` in plain PyTorch: any device, any floating point dtype."""
    x = (boundary if boundary.dtype == torch.float64 else boundary.float())[:, 0]  # [B, H, W]
    planes = []
    for offset in neighbour_offsets(radius):
        *others, _ = neighbour_path(offset)  # the last is the pixel itself
        path = torch.stack([*(shifted(x, dy, dx) for dy, dx in others), x])
        planes.append(path.max(dim=0).values)  # the gradient goes to the first of equal maxima
    if not planes:
        return boundary[:, :0].clone()
    affinity = 1 - torch.stack(planes, dim=1)  # [B, K, H, W]
    exists = pair_exists(x.shape[1], x.shape[2], radius, "full", x.device)
    return torch.where(exists, affinity, torch.zeros_like(affinity)).to(boundary.dtype)
