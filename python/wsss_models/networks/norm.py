"""Batch normalisation that stays as it was trained."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("train", "fixed", "frozen")


class FixedBatchNorm(nn.BatchNorm2d):
    """Normalises by the running statistics, in training too, and leaves them alone. Names as `nn.BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def set_norm(network: nn.Module, norm: str) -> None:
    """What the batch normalisations of a network do in training.

    Args:
        norm: "train" = batch statistics, all learnt; "fixed" = running statistics, scale and shift learnt (IRNet, VWE);
            "frozen" = neither moves (AffinityNet).

    Raises:
        ValueError: an unknown norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d if norm == "train" else FixedBatchNorm  # same parameters and buffers
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(norm != "frozen")
