from __future__ import annotations

import torch
from torch import Tensor


def class_context(
    feats: Tensor, confidence: Tensor, *, threshold: float, assign: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Meaning of `wsss_kernels.class_context`, written for reading, not for speed."""
    confidence = confidence.detach().to(feats.dtype)
    number = torch.arange(confidence.shape[1], device=feats.device)[:, None, None]
    if assign is None and confidence.shape[1] == 0:
        assign = torch.full_like(feats[:, 0], -1, dtype=torch.int64)
    elif assign is None:
        ties = torch.where(confidence == confidence.amax(1, keepdim=True), number, confidence.shape[1])
        assign = ties.amin(1)
    counts = (confidence > threshold) & (assign[:, None] == number)
    weights = torch.where(counts, confidence, 0.0)  # [B, C, H, W]
    sums = weights.sum((2, 3))
    found = torch.where(counts[:, :, None], weights[:, :, None] * feats[:, None], 0.0).sum((3, 4))  # [B, C, D]
    return found / (sums[:, :, None] + 1e-5), sums
