"""Hybrid spatial pyramid pooling as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from wsss_kernels import _check
from wsss_kernels.ops.hspp import hspp


class HybridSpatialPyramidPool(nn.Module):
    """`wsss_kernels.hspp` in the place of a global pooling: [B, D, H, W] -> [B, D]. Without parameters.

    Args:
        levels: whole numbers >= 1; the maps must have as many rows and columns as the largest.
        gamma: weight of the mean, >= 0; 2 as published.

    Raises:
        TypeError, ValueError: as `wsss_kernels.hspp`.

    Source: Ru et al., IJCAI 2021, section 3.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.HybridSpatialPyramidPool()(torch.rand(2, 16, 28, 28)).shape
        torch.Size([2, 16])
    """

    def __init__(self, levels: Sequence[int] = (1, 2, 4), gamma: float = 2.0) -> None:
        super().__init__()
        self.levels = tuple(_check.whole("levels", level, "whole numbers >= 1", least=1) for level in levels)
        if not self.levels:
            raise ValueError("levels must be one whole number >= 1 or more, got none")
        self.gamma = _check.number("gamma", gamma, "a number >= 0", least=0)

    def forward(self, feats: Tensor) -> Tensor:
        """feats [B, D, H, W] -> [B, D]."""
        return hspp(feats, levels=self.levels, gamma=self.gamma)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, gamma={self.gamma:g}"
