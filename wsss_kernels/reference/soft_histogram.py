"""What `wsss_kernels.soft_histogram` means, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO = 1e-12  # a vector no longer than this has no direction


def unit_vectors(x: Tensor, dim: int) -> Tensor:
    """x / |x| along dim; zeros, with gradient zero, where x is zero."""
    squares = x.square().sum(dim, keepdim=True)
    zero = squares <= ZERO**2
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, squares).sqrt())


def soft_histogram(feats: Tensor, codebook: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Meaning of `wsss_kernels.soft_histogram` in plain PyTorch: any device, any floating point dtype."""
    wide = torch.promote_types(torch.promote_types(feats.dtype, codebook.dtype), torch.float32)
    pixels = unit_vectors(feats.to(wide).flatten(2), 1)  # [B, D, N]
    cosine = unit_vectors(codebook.to(wide), 1) @ pixels  # [B, M, N]
    histogram = (temperature * cosine).softmax(1).sum(2)
    assignment = cosine.detach().argmax(1)  # torch takes the first of equal values
    words = torch.zeros(histogram.shape, dtype=torch.bool, device=feats.device).scatter(1, assignment, True)
    return histogram.to(feats.dtype), words, assignment.unflatten(1, feats.shape[2:])
