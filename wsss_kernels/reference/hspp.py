"""What `wsss_kernels.hspp` means, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hspp(feats: Tensor, *, levels: Sequence[int] = (1, 2, 4), gamma: float = 2.0) -> Tensor:
    """Meaning of `wsss_kernels.hspp` in plain PyTorch: any device, any floating point dtype."""
    x = feats.to(torch.promote_types(feats.dtype, torch.float32))
    height, width = x.shape[2:]
    pooled = gamma * x.mean((2, 3))
    for level in levels:
        pooled = pooled + F.max_pool2d(x, (height // level, width // level)).mean((2, 3))
    return (pooled / (gamma + len(levels))).to(feats.dtype)
