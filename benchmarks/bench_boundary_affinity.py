"""`boundary_affinity` beside the published gather and shifted views, and IRNet's propagation as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import baselines, sizes
from benchmarks.cases import Aim, Case, Inputs, Result, Way, on_gpu, relative_error
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size


def _boundary(size: Size) -> Tensor:
    """[B, 1, H, W] in 0..1: thin lines between regions on a noisy ground."""
    regions = sizes.features(Size(size.name, size.height, size.width, size.batch, dim=1))
    across = (regions[..., 1:] - regions[..., :-1]).abs()
    boundary = torch.nn.functional.pad(across, (0, 1)).clamp(max=1)
    return boundary.pow(0.5)


def _points(size: Size, radius: int) -> int:
    margin = radius - 1
    sources = (size.height - margin) * (size.width - 2 * margin)
    return size.batch * sources * sum(len(baselines._points_between(o)) for o in wk.neighbour_offsets(radius))


def _forward(size: Size, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    def inputs(size: Size) -> Inputs:
        return {"boundary": _boundary(size), "paths": baselines.published_paths(size.height, size.width, 5)}

    def on_published_pairs(result: Result, expected: Result, inputs: Inputs) -> float:
        assert isinstance(expected, Tensor)
        return relative_error(result, baselines.published_boundary_view(expected, 5))

    return Case(
        name=f"boundary affinity {size.name}",
        op="boundary_affinity",
        groups=("boundary",),
        size=size,
        channels=34,
        inputs=inputs,
        expected=lambda i: wk.reference.boundary_affinity(i["boundary"].double()),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.boundary_affinity(i["boundary"])),
            Way(
                "gather, published",  # builds fewer pairs: none of the outer columns and last rows
                "published",
                lambda i: lambda: baselines.gathered_boundary_affinity(i["boundary"], i["paths"]),
                compare=on_published_pairs,
            ),
            Way(
                "torch shifted views",
                "library",
                lambda i: lambda: baselines.shifted_boundary_affinity(i["boundary"], 5),
            ),
        ),
        aims=aims,
        quick=quick,
    )


def _gradient(inputs: Inputs, affinity: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """affinity: boundary -> [B, K, S]."""
    boundary = inputs["boundary"].detach().requires_grad_()
    result = affinity(boundary)
    return result.detach(), *torch.autograd.grad(result, boundary, inputs["grad"].to(result.dtype))


def _training(size: Size, radius: int, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    """Forward and backward on the published pairs, whose upstream gradient is given."""

    def inputs(size: Size) -> Inputs:
        reach = min(radius, min(size.height, size.width) // 2)  # a tiny map must have published pairs too
        paths = baselines.published_paths(size.height, size.width, reach)
        pairs = sum(len(pixels) for pixels in paths)
        grad = torch.rand(size.batch, pairs, paths[0].shape[2], generator=torch.Generator().manual_seed(5)) - 0.5
        whole = torch.zeros(size.batch, pairs, size.height, size.width)
        lengths = [len(baselines._points_between(offset)) for offset in wk.neighbour_offsets(reach)]
        order = sorted(range(pairs), key=lambda k: lengths[k])
        margin = reach - 1
        inner = whole[:, :, : size.height - margin, margin : size.width - margin]
        inner[:, order] = grad.unflatten(2, inner.shape[2:])
        return {"boundary": _boundary(size), "paths": paths, "grad": grad, "whole": whole, "radius": reach}

    def ours(i: Inputs, affinity: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        result, grad = _gradient({"boundary": i["boundary"], "grad": i["whole"]}, lambda b: affinity(b, i["radius"]))
        return result, grad

    def expected(i: Inputs) -> tuple[Tensor, Tensor]:
        images = zip(i["boundary"].double().split(1), i["whole"].double().split(1), strict=True)
        parts = [ours({**i, "boundary": b, "whole": w}, wk.reference.boundary_affinity) for b, w in images]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def on_published_pairs(result: Result, expected: Result, inputs: Inputs) -> float:
        assert isinstance(result, tuple) and isinstance(expected, tuple)
        view = baselines.published_boundary_view(expected[0], inputs["radius"])
        return max(relative_error(result[0], view), relative_error(result[1], expected[1]))

    return Case(
        name=f"boundary affinity radius {radius}, forward + backward {size.name}",
        op="boundary_affinity",
        groups=("boundary", "memory"),
        size=size,
        channels=len(wk.neighbour_offsets(radius)),
        inputs=inputs,
        expected=expected,
        ways=(
            Way("ours", "ours", lambda i: lambda: ours(i, wk.boundary_affinity), tolerance=1e-4),
            Way(
                "gather, published",
                "published",
                lambda i: lambda: _gradient(i, lambda b: baselines.gathered_boundary_affinity(b, i["paths"])),
                compare=on_published_pairs,
                tolerance=1e-4,
                gigabytes=4 * 4e-9 * _points(size, radius),
            ),
        ),
        aims=aims,
        quick=quick,
    )


def _propagation(size: Size, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    """IRNet's inference from boundaries to spread maps: the affinity, then 256 steps of the walk, two maps."""

    def inputs(size: Size) -> Inputs:
        return {"boundary": _boundary(size), "maps": sizes.maps(size, 2)}

    def ours(i: Inputs) -> Tensor:
        affinity = wk.boundary_affinity(i["boundary"])
        return wk.random_walk(i["maps"], affinity, beta=10, steps=256)

    def expected(i: Inputs) -> Tensor:
        affinity = wk.reference.boundary_affinity(i["boundary"].double())
        return wk.reference.random_walk(i["maps"].double(), affinity, beta=10, steps=256)

    def library(i: Inputs) -> Tensor:
        affinity = baselines.shifted_boundary_affinity(i["boundary"], 5)
        return baselines.torch_csr_walk(i["maps"], baselines.torch_transition_csr(affinity, 10), 256)

    return Case(
        name=f"irnet propagation {size.name}",
        op="boundary_affinity",
        groups=("boundary", "memory"),
        size=size,
        channels=2,
        inputs=inputs,
        expected=expected,
        ways=(
            Way("ours", "ours", lambda i: lambda: ours(i), tolerance=2e-4),
            Way("shifted views, torch CSR", "library", lambda i: lambda: library(i), tolerance=1e-2),
        ),
        aims=aims,
        quick=quick,
    )


BATCH_8 = sizes.batched(sizes.SQUARE, 8)


def _work(size: Size, radius: int, directions: int = 1) -> Work:
    """A plane of affinities written, or its gradient read; a plane of boundaries read, or its gradient written."""
    planes, pixels = len(wk.neighbour_offsets(radius)), directions * sizes.pixels(size)
    return Work(flop=planes * pixels, bytes=4 * (planes + 1) * pixels)


CASES: list[Case] = [
    _forward(sizes.IRN, quick=True),
    _training(sizes.batched(sizes.SQUARE, 2), 10, quick=True),
    _training(BATCH_8, 10, (Aim("gather, published", "ratio", least=50),)),
    _propagation(sizes.IRN, (Aim("ours", "median_ms", most=7), Aim("ours", "peak_mb", most=20)), quick=True),
]
GPU_CASES: list[Case] = [
    *(on_gpu(_forward(size), _work(size, 5)) for size in (sizes.IRN, sizes.batched(sizes.IRN, 16))),
    *(on_gpu(_training(size, 10), _work(size, 10, 2)) for size in (sizes.batched(sizes.SQUARE, 1), BATCH_8)),
]


def test_boundary_affinity(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
