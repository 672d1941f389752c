"""`soft_histogram` beside torch's product and softmax, eager and compiled, forward and backward."""

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

WORDS = 256
TRAIN = Size("vwe 28x28 batch 16", 28, 28, batch=16, dim=2048)  # 448x448 crops at stride 16
CROP = Size("vwe 32x32 batch 4", 32, 32, batch=4, dim=2048)
SMALL = Size("14x14 d 512", 14, 14, batch=1, dim=512)

Op = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _inputs(size: Size, words: int) -> Inputs:
    generator = torch.Generator().manual_seed(11)
    feats = torch.randn(size.batch, size.dim, size.height, size.width, generator=generator).relu_()
    codebook = torch.randn(words, size.dim, generator=generator) * 0.0128
    return {"feats": feats, "codebook": codebook, "grad": torch.randn(size.batch, words, generator=generator)}


def _run(op: Op, inputs: Inputs, leaves: tuple[str, ...]) -> tuple[Tensor, ...]:
    given = {name: inputs[name].detach().requires_grad_(name in leaves) for name in ("feats", "codebook")}
    histogram = op(given["feats"], given["codebook"])[0]
    if not leaves:
        return (histogram,)
    grads = torch.autograd.grad(histogram, [given[name] for name in leaves], inputs["grad"].to(histogram.dtype))
    return histogram.detach(), *grads


def _case(
    size: Size, leaves: tuple[str, ...], aims: tuple[Aim, ...] = (), *, words: int = WORDS, quick: bool = False
) -> Case:
    def expected(i: Inputs) -> tuple[Tensor, ...]:
        return _run(wk.reference.soft_histogram, {name: x.double() for name, x in i.items()}, leaves)

    def compiled(i: Inputs) -> Callable[[], Result]:
        op = torch.compile(wk.reference.soft_histogram, dynamic=False)
        return lambda: _run(op, i, leaves)

    direction = f"forward + backward to {' and '.join(leaves)}" if leaves else "forward"
    return Case(
        name=f"soft_histogram, {direction} {size.name}, {words} words",
        op="soft_histogram",
        groups=("histogram",),
        size=size,
        channels=words,
        inputs=lambda size: _inputs(size, words),
        expected=expected,
        ways=(
            Way("ours", "ours", lambda i: lambda: _run(wk.soft_histogram, i, leaves), tolerance=1e-4),
            Way("torch", "library", lambda i: lambda: _run(wk.reference.soft_histogram, i, leaves), tolerance=1e-4),
            *((Way("torch.compile", "library", compiled, tolerance=1e-4),) if size is TRAIN else ()),
        ),
        aims=aims,
        quick=quick,
        by_image=False,
    )


def _work(size: Size, leaves: tuple[str, ...]) -> Work:
    """Backward the scores are made again: keeping them would be memory. Then a product a gradient."""
    values = size.dim * sizes.pixels(size)
    products = 2 + len(leaves) if leaves else 1
    return Work(flop=0, bytes=4 * (1 + ("feats" in leaves)) * values, products=2 * products * WORDS * values)


_FASTER = (Aim("torch", "ratio", least=1.5),)
_NOT_SLOWER = (Aim("torch", "ratio", least=1),)
# The scores of all pixels would be 12.8 MB; the copy of the codebook is 2.1.
_NO_SCORES = Aim("ours", "workspace_mb", most=10)
CASES: list[Case] = [
    _case(TRAIN, (), (*_FASTER, _NO_SCORES)),
    _case(TRAIN, ("codebook",), _FASTER),
    _case(TRAIN, ("feats", "codebook"), _FASTER),
    _case(CROP, (), _NOT_SLOWER, quick=True),
    _case(CROP, ("codebook",), _NOT_SLOWER, quick=True),
    _case(CROP, ("feats", "codebook"), _NOT_SLOWER),
    _case(SMALL, (), _NOT_SLOWER, words=64, quick=True),
    _case(SMALL, ("codebook",), _NOT_SLOWER, words=64),
    _case(SMALL, ("feats", "codebook"), _NOT_SLOWER, words=64),
]
ONE = Size("vwe 28x28 batch 1", 28, 28, dim=2048)
GPU_CASES: list[Case] = [
    on_gpu(_case(size, leaves), _work(size, leaves))
    for size in (TRAIN, ONE)
    for leaves in ((), ("codebook",), ("feats", "codebook"))
]


def test_soft_histogram(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
