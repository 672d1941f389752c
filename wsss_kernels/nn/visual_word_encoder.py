"""A learned codebook of visual words as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wsss_kernels import _check
from wsss_kernels.ops.soft_histogram import soft_histogram


class VisualWordEncoder(nn.Module):
    """`wsss_kernels.soft_histogram` over a codebook of its own.

    Its one parameter, and all of its state_dict, is `codebook` [words, dim]. As published the features are detached:
    the histogram trains the codebook, not the network.

    Args:
        dim: channels of the features, >= 1; 2048 for a ResNet-50.
        words: codewords, >= 1; 256 as published.
        temperature: multiplies the cosines, > 0; 1 as published.
        detach: whether the features are a constant for the gradient.

    Raises:
        TypeError, ValueError: as `wsss_kernels.soft_histogram`.

    Source: Ru et al., IJCAI 2021, section 3; the initial codebook (Kaiming's normal with a = sqrt(5): a standard
    deviation of 1 / sqrt(3 dim)) is the published code's.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> histogram, words, assignment = wk.VisualWordEncoder(dim=16, words=8)(torch.rand(2, 16, 5, 7))
        >>> histogram.shape, words.shape, assignment.shape
        (torch.Size([2, 8]), torch.Size([2, 8]), torch.Size([2, 5, 7]))
    """

    def __init__(self, dim: int, words: int = 256, *, temperature: float = 1.0, detach: bool = True) -> None:
        super().__init__()
        dim = _check.whole("dim", dim, "a whole number >= 1 of channels", least=1)
        words = _check.whole("words", words, "a whole number >= 1 of codewords", least=1)
        self.temperature = _check.number("temperature", temperature, "a number > 0", above=0)
        self.detach = detach
        self.codebook = nn.Parameter(torch.empty(words, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.codebook, a=math.sqrt(5))

    def forward(self, feats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """feats [B, dim, H, W] -> histogram [B, words], words [B, words] bool, assignment [B, H, W] int64."""
        if self.detach:
            feats = feats.detach()
        return soft_histogram(feats, self.codebook, temperature=self.temperature)

    def extra_repr(self) -> str:
        count, dim = self.codebook.shape
        return f"dim={dim}, words={count}, temperature={self.temperature:g}, detach={self.detach}"
