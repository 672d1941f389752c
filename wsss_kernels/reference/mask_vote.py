"""What `wsss_kernels.mask_vote` means, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_score(scores: Tensor, inside: Tensor, reduce: str) -> Tensor:
    """Mean or maximum of scores [C, H, W] over inside [H, W] bool, which holds a pixel: [C]."""
    chosen = scores[:, inside]
    return chosen.mean(dim=1) if reduce == "mean" else chosen.amax(dim=1)


def mask_vote(maps: Tensor, segments: Tensor | Sequence[Tensor], *, reduce: str = "mean") -> Tensor:
    """Meaning of `wsss_kernels.mask_vote` in plain PyTorch: any device, any floating point dtype."""
    x = maps.detach() if maps.dtype == torch.float64 else maps.detach().float()
    out = x.clone(memory_format=torch.contiguous_format)
    for scores, result, image in zip(x, out, segments, strict=True):
        if image.dtype != torch.bool:
            for label in image.unique():
                if label >= 0:
                    result[:, image == label] = segment_score(scores, image == label, reduce)[:, None]
            continue
        covered = image.any(dim=0)
        voices = [(mask, segment_score(scores, mask, reduce)[:, None, None]) for mask in image if mask.any()]
        if not voices:
            continue
        if reduce == "mean":
            total = torch.stack([torch.where(mask, score, 0.0) for mask, score in voices]).sum(dim=0)
            voted = total / image.sum(dim=0).clamp(min=1)
        else:
            voted = torch.stack([torch.where(mask, score, -torch.inf) for mask, score in voices]).amax(dim=0)
        result.copy_(torch.where(covered, voted, scores))
    return out.to(maps.dtype)
