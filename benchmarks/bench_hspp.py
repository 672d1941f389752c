"""`hspp` beside torch's pooling, eager and compiled, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.cases import Aim, Case, Inputs, Result, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

TRAIN = Size("vwe 28x28 batch 16", 28, 28, batch=16, dim=2048)  # 448x448 crops at stride 16
CROP = Size("vwe 32x32 batch 4", 32, 32, batch=4, dim=2048)


def _inputs(size: Size) -> Inputs:
    generator = torch.Generator().manual_seed(11)
    feats = torch.randn(size.batch, size.dim, size.height, size.width, generator=generator).relu_()
    return {"feats": feats, "grad": torch.randn(size.batch, size.dim, generator=generator)}


def _run(op: Callable[[Tensor], Tensor], inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    feats = inputs["feats"].detach().requires_grad_(backward)
    pooled = op(feats)
    if not backward:
        return (pooled,)
    return pooled.detach(), *torch.autograd.grad(pooled, feats, inputs["grad"].to(pooled.dtype))


def _case(size: Size, backward: bool, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    def compiled(i: Inputs) -> Callable[[], Result]:
        op = torch.compile(wk.reference.hspp, dynamic=False)
        return lambda: _run(op, i, backward)

    return Case(
        name=f"hspp, forward{' + backward' if backward else ''} {size.name}",
        op="hspp",
        groups=("pyramid",),
        size=size,
        channels=size.dim,
        inputs=_inputs,
        expected=lambda i: _run(wk.reference.hspp, {name: x.double() for name, x in i.items()}, backward),
        ways=(
            Way("ours", "ours", lambda i: lambda: _run(wk.hspp, i, backward)),
            Way("torch", "library", lambda i: lambda: _run(wk.reference.hspp, i, backward)),
            *((Way("torch.compile", "library", compiled),) if size is TRAIN else ()),
        ),
        aims=aims,
        quick=quick,
    )


def _work(size: Size, backward: bool) -> Work:
    """Features read, their gradient written."""
    values = size.dim * sizes.pixels(size)
    return Work(flop=(5 if backward else 4) * values, bytes=(8 if backward else 4) * values)


CASES: list[Case] = [
    _case(TRAIN, False, (Aim("ours", "median_ms", most=2.5),)),
    _case(TRAIN, True, (Aim("ours", "median_ms", most=5),)),
    _case(CROP, False, quick=True),
    _case(CROP, True, quick=True),
]
ONE = Size("vwe 28x28 batch 1", 28, 28, dim=2048)
GPU_CASES: list[Case] = [
    on_gpu(_case(size, backward), _work(size, backward)) for size in (TRAIN, ONE) for backward in (False, True)
]


def test_hspp(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
