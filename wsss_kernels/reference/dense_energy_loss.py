"""What `wsss_kernels.dense_energy_loss` means, written for reading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsss_kernels.reference.permutohedral import Lattice, bilateral_features


def dense_energy_loss(
    image: Tensor, probs: Tensor, *, roi: Tensor | None = None, sigma_rgb: float = 15.0, sigma_xy: float = 100.0
) -> Tensor:
    """Meaning of `wsss_kernels.dense_energy_loss` in plain PyTorch: any device, any floating point dtype."""
    sigmas = (sigma_xy, sigma_xy, sigma_rgb, sigma_rgb, sigma_rgb)
    if roi is not None and roi.dim() == 3:
        roi = roi[:, None]
    loss: Tensor = _DenseEnergy.apply(image, probs, roi, sigmas)
    return loss


class _DenseEnergy(torch.autograd.Function):
    """The filter's blur is not quite symmetric; the gradient is the published one, which takes it as such."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, probs: Tensor, roi: Tensor | None, sigmas: tuple[float, ...]) -> Tensor:
        values = probs if probs.dtype == torch.float64 else probs.float()
        weight = torch.ones_like(values[:, :1]) if roi is None else roi.to(values.dtype)
        source = values * weight
        filtered = torch.zeros_like(source)
        if probs.numel():
            for picture, here, there in zip(image, source, filtered, strict=True):
                lattice = Lattice(bilateral_features(picture, sigmas))
                there.copy_(lattice.filter(here.flatten(1).T.contiguous()).T.reshape(here.shape))
        batch = max(1, probs.shape[0])
        ctx.dtype = probs.dtype
        ctx.save_for_backward(-2 / batch * filtered * weight)
        return -(source.double() * filtered.double()).sum().to(values.dtype) / batch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return None, (grad * slope).to(ctx.dtype), None, None
