"""What `wsss_kernels.local_affinity` means, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels.neighbours import neighbour_offsets


def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """x at (y + dy, x + dx), 0 outside the map. x [..., H, W]."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    ys, xs = slice(max(0, -dy), max(0, height - max(0, dy))), slice(max(0, -dx), max(0, width - max(0, dx)))
    if ys.start < ys.stop and xs.start < xs.stop:
        out[..., ys, xs] = x[..., ys.start + dy : ys.stop + dy, xs.start + dx : xs.stop + dx]
    return out


def pair_exists(height: int, width: int, radius: int, border: str, device: torch.device) -> Tensor:
    """[K, H, W] bool: the neighbour is inside the map and, for "cropped", the source where PSA builds pairs."""
    inside = torch.ones(height, width, device=device)
    planes = [shifted(inside, dy, dx) for dy, dx in neighbour_offsets(radius)]
    exists = (torch.stack(planes) if planes else inside.new_zeros(0, height, width)) > 0
    if border == "cropped":
        margin = radius - 1
        source = torch.zeros(height, width, dtype=torch.bool, device=device)
        source[: max(0, height - margin), margin : max(margin, width - margin)] = True
        exists = exists & source
    return exists


def local_affinity(
    feats: Tensor, radius: int = 5, *, metric: str = "l1", scale: float | str = 1.0, border: str = "full"
) -> Tensor:
    """Meaning of `wsss_kernels.local_affinity` in plain PyTorch: any device, any floating point dtype."""
    x = feats if feats.dtype == torch.float64 else feats.float()
    height, width = x.shape[-2:]
    if metric == "cosine":
        largest = x.abs().amax(dim=1, keepdim=True)
        unit = x / torch.where(largest > 0, largest, torch.ones_like(largest)).detach()
        length = unit.square().sum(dim=1, keepdim=True)
        length = torch.where(length > 0, length, torch.ones_like(length)).sqrt()
        x = unit / length  # a zero vector stays zero
    planes = []
    for dy, dx in neighbour_offsets(radius):
        there = shifted(x, dy, dx)
        if metric == "l1":
            planes.append((x - there).abs().mean(dim=1))
        else:
            planes.append((x * there).sum(dim=1))
    if not planes:
        return feats[:, :0].clone()
    value = torch.stack(planes, dim=1)  # [B, K, H, W]: a distance, or a cosine
    in_map = pair_exists(height, width, radius, "full", x.device)
    if scale == "auto":
        distance = value if metric == "l1" else (1 - value).clamp(min=0)
        pairs = max(1, int(in_map.sum()))
        mean = (distance.double() * in_map).sum(dim=(1, 2, 3)) / pairs  # one number an image
        least = 0 if metric == "l1" else 1e-6  # what is left of 1 - cos between like vectors is rounding
        mean = torch.where(mean <= least, torch.ones_like(mean), mean).to(value.dtype).detach()
        affinity = torch.exp(-distance / mean[:, None, None, None])
    elif metric == "l1":
        affinity = torch.exp(-value / max(float(scale), 1e-37))
    else:
        affinity = value.relu().clamp(max=1)
    exists = pair_exists(height, width, radius, border, x.device)
    return torch.where(exists, affinity, torch.zeros_like(affinity)).to(feats.dtype)
