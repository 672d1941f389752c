"""What `wsss_kernels.affinity_loss` means, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels.neighbours import neighbour_offsets
from wsss_kernels.reference.local_affinity import local_affinity, pair_exists, shifted

EPSILON = 1e-5


def affinity_loss(
    affinity: Tensor, labels: Tensor, *, radius: int = 5, border: str = "cropped", ignore_index: int = 255
) -> Tensor:
    """Meaning of `wsss_kernels.affinity_loss` in plain PyTorch: any device, any floating point dtype."""
    a = (affinity if affinity.dtype == torch.float64 else affinity.float()).clamp(0, 1)
    if a.shape[1] == 0:
        return a.sum().to(affinity.dtype)  # radius 1: no pairs, 0
    code = labels.long()  # [B, H, W]; first, since comparing int8 with 255 would compare it with -1
    code = torch.where((code < 0) | (code == ignore_index) | (code > 2**31 - 1), -1, code)
    neighbours = [shifted(code + 1, dy, dx) - 1 for dy, dx in neighbour_offsets(radius)]
    there = torch.stack(neighbours, dim=1)  # [B, K, H, W], -1 outside the map
    here = code[:, None]
    paired = (here >= 0) & (there >= 0) & pair_exists(a.shape[2], a.shape[3], radius, border, a.device)
    like = paired & (here == there)
    background, foreground, unlike = like & (here == 0), like & (here != 0), paired & (here != there)
    # As (a - 1) + 1e-5 and -a + 1e-5: in float32, 1 + 1e-5 alone makes the logarithm 0.1 % wrong at the end.
    near = -torch.where(a > 0.5, torch.log1p((a - 1) + EPSILON), torch.log(a + EPSILON))
    far = -torch.where(a < 0.5, torch.log1p(-a + EPSILON), torch.log((1 - a) + EPSILON))
    terms = [(0.25, background, near), (0.25, foreground, near), (0.5, unlike, far)]
    loss = a.new_zeros((), dtype=torch.float64)
    for share, pairs, cost in terms:
        total = torch.where(pairs, cost, torch.zeros_like(cost)).double().sum()
        loss = loss + share * total / (pairs.sum().double() + EPSILON)
    return loss.to(affinity.dtype)


def affinity_loss_from_features(
    feats: Tensor,
    labels: Tensor,
    *,
    radius: int = 5,
    metric: str = "l1",
    scale: float | str = 1.0,
    border: str = "cropped",
    ignore_index: int = 255,
) -> Tensor:
    """Meaning of `wsss_kernels.affinity_loss_from_features` in plain PyTorch: any device, any floating point dtype."""
    x = feats if feats.dtype == torch.float64 else feats.float()
    affinity = local_affinity(x, radius, metric=metric, scale=scale, border=border)
    loss = affinity_loss(affinity, labels, radius=radius, border=border, ignore_index=ignore_index)
    return loss.to(feats.dtype)
