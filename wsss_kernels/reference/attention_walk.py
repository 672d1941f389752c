"""What `wsss_kernels.attention_walk` means, written for reading."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def region_labels(on: Tensor) -> Tensor:
    """[M, h, w] bool -> int64: 0 where off, else the largest 1 + y w + x of the pixel's 8-connected region."""
    height, width = on.shape[-2:]
    index = torch.arange(1, height * width + 1, device=on.device, dtype=torch.float64).view(height, width)
    labels = torch.where(on, index, 0.0)
    while True:  # each region takes the largest number in it, a pixel further every time
        spread = torch.where(on, F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0], 0.0)
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def region_boxes(maps: Tensor, threshold: float) -> Tensor:
    """[B, C, h, w] bool: inside the box of some 8-connected region of map > threshold * max(map)."""
    boxes = torch.zeros(maps.shape, dtype=torch.bool, device=maps.device)
    if maps.numel() == 0:
        return boxes
    peak = maps.where(maps.isfinite(), -torch.inf).amax(dim=(2, 3), keepdim=True)
    on = (maps > threshold * peak) & (peak > 0)
    for box, labels in zip(boxes.flatten(0, 1), region_labels(on.flatten(0, 1)), strict=True):
        for label in labels.unique():
            if label > 0:
                ys, xs = torch.nonzero(labels == label, as_tuple=True)
                box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
    return boxes


def transition(attention: Tensor, sinkhorn: int) -> Tensor:
    """S [B, n, n]: columns, then rows, divided by their sums, `sinkhorn` times; made symmetric."""
    t = attention
    for _ in range(sinkhorn):
        for dim in (1, 2):
            total = t.sum(dim=dim, keepdim=True)
            some = total >= torch.finfo(torch.float32).tiny  # less has no inverse in float32
            t = torch.where(some, t / torch.where(some, total, 1.0), 0.0)
    return (t + t.mT) / 2


def attention_walk(
    maps: Tensor,
    attention: Tensor,
    *,
    sinkhorn: int = 3,
    squarings: int = 1,
    box_threshold: float | None = 0.4,
) -> Tensor:
    """Meaning of `wsss_kernels.attention_walk` in plain PyTorch: any device, any floating point dtype."""
    dtype = torch.float64 if torch.float64 in (maps.dtype, attention.dtype) else torch.float32
    x = maps.to(dtype)
    if maps.numel() == 0:
        return maps.clone(memory_format=torch.contiguous_format)
    s = transition(attention.detach().to(dtype), sinkhorn)
    for _ in range(squarings):
        s = s @ s
    if box_threshold is not None:
        x = torch.where(region_boxes(x.detach(), box_threshold), x, 0.0)
    out = (s @ x.flatten(2).mT).mT  # a walk's step: each token gathers from all
    return out.unflatten(2, maps.shape[-2:]).to(maps.dtype).contiguous()
