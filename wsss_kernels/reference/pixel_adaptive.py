"""What `wsss_kernels.pixel_adaptive` means, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RING = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def pixel_adaptive(
    image: Tensor,
    maps: Tensor,
    *,
    variant: str = "par",
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
) -> Tensor:
    """Meaning of `wsss_kernels.pixel_adaptive` in plain PyTorch: any device, any floating point dtype."""
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    out = maps.to(dtype)
    if out.numel() == 0 or 0 in image.shape:
        return maps.new_zeros(*maps.shape[:2], *image.shape[2:])
    if out.shape[2:] != image.shape[2:]:
        out = F.interpolate(out, image.shape[2:], mode="bilinear", align_corners=True)
    weights = _weights(image.detach().to(dtype), variant, dilations)  # [B, K, H, W]
    for _ in range(iterations):
        views = _neighbours(out, dilations)
        out = sum((w.unsqueeze(1) * view for w, view in zip(weights.unbind(1), views, strict=True)), out.new_zeros(()))
    return out.to(maps.dtype, copy=iterations == 0).contiguous()


def _neighbours(x: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    """x at each neighbour [B, C, H, W], its coordinates clamped to the map."""
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
    height, width = x.shape[2:]
    return [
        x[:, :, (rows + d * dy).clamp(0, height - 1)[:, None], (columns + d * dx).clamp(0, width - 1)]
        for d in dilations
        for dy, dx in RING
    ]


def _weights(x: Tensor, variant: str, dilations: Sequence[int]) -> Tensor:
    near = torch.stack(_neighbours(x, dilations), dim=2)  # [B, 3, K, H, W]
    centre = x.unsqueeze(2)
    if variant == "pamr":
        deviation = torch.cat([near, *[centre] * len(dilations)], dim=2).std(dim=2, keepdim=True)
        return torch.softmax((-(near - centre).abs() / (1e-8 + 0.1 * deviation)).mean(dim=1), dim=1)
    deviation = near.std(dim=2, keepdim=True)
    similarity = torch.softmax((-(((near - centre).abs() / (deviation + 1e-8) / 0.3) ** 2)).mean(dim=1), dim=1)
    distance = x.new_tensor([d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in RING])
    position = torch.softmax(-((distance / (distance.std() + 1e-8) / 0.3) ** 2), dim=0)
    return similarity + 0.01 * position.view(1, -1, 1, 1)
