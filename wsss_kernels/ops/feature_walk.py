"""Walks of many images of any sizes, each over the affinity of its own features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wsss_kernels import _dispatch
from wsss_kernels.neighbours import check_radius, neighbour_count
from wsss_kernels.ops.local_affinity import check_arguments as check_affinity
from wsss_kernels.ops.local_affinity import local_affinity
from wsss_kernels.ops.random_walk import SOLVERS, random_walk
from wsss_kernels.ops.random_walk import check_arguments as check_walk

Walk = tuple[Tensor, Tensor, int]  # maps [B, C, h, w], feats [B, D, h, w], steps

# Links of an image, as floats: those of a larger one fill more than a core's own cache, and it has work for all cores.
_LINKS = 2**18


def feature_walks(
    walks: list[Walk],
    *,
    radius: int,
    metric: str,
    scale: float | str,
    border: str,
    beta: float,
    solver: str,
    tol: float,
) -> list[Tensor]:
    """Of each (maps, feats, steps): random_walk(maps, local_affinity(feats)), all arguments as theirs.

    Small images on the CPU go to a kernel together, one a thread; the results are the same.
    """
    check_radius(radius)
    together: list[int] = []
    if len(walks) > 1:
        together = [i for i, (maps, feats, _) in enumerate(walks) if _goes_together(maps, feats, radius)]
    results: dict[int, Tensor] = {}
    if len(together) > 1 and len(together) >= torch.get_num_threads():
        arguments: tuple[Any, ...] = ()
        inputs, addresses = [], []
        for i in together:
            maps, feats, steps = walks[i]
            number = check_affinity(feats, radius, metric, scale, border)
            beta, tol = check_walk(radius, beta, steps, solver, tol)
            arguments = (radius, metric == "cosine", number, border == "cropped", beta, SOLVERS.index(solver), tol)
            maps, feats = _dispatch.as_kernel_input(maps), _dispatch.as_kernel_input(feats)
            results[i] = out = torch.empty_like(maps)
            inputs += [maps, feats]  # until the kernel has read them
            addresses.append(
                (feats.data_ptr(), maps.data_ptr(), out.data_ptr(), *feats.shape[:2], *maps.shape[1:], steps)
            )
        assert _dispatch.native is not None
        _dispatch.native.feature_walks(addresses, *arguments, torch.get_num_threads())
    for i, (maps, feats, steps) in enumerate(walks):
        if i not in results:
            affinity = local_affinity(feats, radius, metric=metric, scale=scale, border=border)
            results[i] = random_walk(maps, affinity, radius=radius, beta=beta, steps=steps, solver=solver, tol=tol)
    return [results[i] for i in range(len(walks))]


def _goes_together(maps: Tensor, feats: Tensor, radius: int) -> bool:
    return (
        maps.device.type == "cpu"
        and maps.dtype == torch.float32
        and feats.dtype == torch.float32
        and maps.shape[2:] == feats.shape[2:]
        and neighbour_count(radius) * maps.shape[2] * maps.shape[3] <= _LINKS
        and _dispatch.calls_directly(maps, feats)
        and _dispatch.runs_native("local_affinity", feats)
        and _dispatch.runs_native("random_walk", maps)
    )
