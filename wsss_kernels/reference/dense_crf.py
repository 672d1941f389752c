"""What `wsss_kernels.dense_crf` means, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsss_kernels.reference.permutohedral import Lattice, bilateral_features, spatial_features


def dense_crf(
    image: Tensor,
    unary: Tensor,
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] = (3.0, 3.0),
    bilateral: tuple[float, float, float] = (80.0, 13.0, 10.0),
) -> Tensor:
    """Meaning of `wsss_kernels.dense_crf` in plain PyTorch: any device, any floating point dtype."""
    (g_xy, g_compat), (b_xy, b_rgb, b_compat) = gaussian, bilateral
    return mean_field(image, unary, iterations, (g_xy, g_xy, g_compat), (b_xy, b_xy, b_rgb, b_rgb, b_rgb, b_compat))


@torch.no_grad()
def mean_field(
    image: Tensor, unary: Tensor, iterations: int, gaussian: Sequence[float], bilateral: Sequence[float]
) -> Tensor:
    """The same with a sigma for every axis: gaussian (x, y, compat), bilateral (x, y, r, g, b, compat)."""
    if unary.numel() == 0:
        return torch.empty_like(unary, memory_format=torch.contiguous_format)
    energy = -(unary if unary.dtype == torch.float64 else unary.float())
    out = []
    for picture, own in zip(image, energy.flatten(2).mT, strict=True):  # own [N, C]
        marginals = torch.softmax(own, dim=1)
        terms = _terms(picture, gaussian, bilateral, own.dtype) if iterations else []
        for _ in range(iterations):
            total = own
            for compat, norm, lattice in terms:
                total = total + compat * norm * lattice.filter(norm * marginals)
            marginals = torch.softmax(total, dim=1)
        out.append(marginals.T)
    return torch.stack(out).reshape(unary.shape).to(unary.dtype)


def _terms(
    picture: Tensor, gaussian: Sequence[float], bilateral: Sequence[float], dtype: torch.dtype
) -> list[tuple[float, Tensor, Lattice]]:
    """(compat, norm [N, 1], lattice) of each term that is switched on."""
    terms = []
    height, width = picture.shape[1:]
    if gaussian[-1] != 0:
        features = spatial_features(height, width, (gaussian[0], gaussian[1]), picture.device)
        terms.append((gaussian[-1], Lattice(features)))
    if bilateral[-1] != 0:
        terms.append((bilateral[-1], Lattice(bilateral_features(picture, tuple(bilateral[:-1])))))
    ones = torch.ones(picture[0].numel(), 1, dtype=dtype, device=picture.device)
    return [(compat, (lattice.filter(ones) + 1e-20).rsqrt(), lattice) for compat, lattice in terms]
