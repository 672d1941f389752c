"""`random_walk` beside sparse products, shifted views and the published dense squarings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import baselines, sizes
from benchmarks.cases import Aim, Case, Inputs, Way
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size
from benchmarks.step_chain import step_chain
from wsss_kernels import _dispatch
from wsss_kernels.ops.random_walk import SOLVERS, cuda_plan
from wsss_kernels.reference.random_walk import walk_step, walk_weights

BETA, STEPS = 8.0, 256
SUM_ERROR = 1e-3  # plain float32 sums over 256 products drift this far (the published squarings less)


def _inputs(channels: int) -> Callable[[Size], Inputs]:
    def build(size: Size) -> Inputs:
        affinity = wk.local_affinity(sizes.features(size))
        return {"maps": sizes.maps(size, channels), "affinity": affinity}

    return build


def _expected(inputs: Inputs) -> Tensor:
    return wk.reference.random_walk(inputs["maps"].double(), inputs["affinity"].double(), beta=BETA, steps=STEPS)


def _ours(solver: str) -> Callable[[Inputs], Callable[[], Tensor]]:
    return lambda i: lambda: wk.random_walk(i["maps"], i["affinity"], beta=BETA, steps=STEPS, solver=solver)


def _form(solver: str) -> Callable[[Inputs], str]:
    def form(inputs: Inputs) -> str:
        maps = inputs["maps"]
        if not maps.is_cuda or _dispatch.gpu_kernel("random_walk", maps.device.index)[0] != "cuda":
            return ""
        shape = (*maps.shape, baselines.RADIUS, STEPS)
        return str(cuda_plan(*shape, SOLVERS.index(solver), 1e-4, maps.device.index).form)

    return form


def _torch_csr(inputs: Inputs) -> Callable[[], Tensor]:
    matrix = baselines.to_torch_csr(baselines.transition_matrix(inputs["affinity"], BETA))
    return lambda: baselines.torch_csr_walk(inputs["maps"], matrix, STEPS)


def _scipy_csr(inputs: Inputs) -> Callable[[], Tensor]:
    matrix = baselines.transition_matrix(inputs["affinity"], BETA)
    return lambda: baselines.scipy_csr_walk(inputs["maps"], matrix, STEPS)


def _shifted(inputs: Inputs) -> Callable[[], Tensor]:
    planes = baselines.transition_planes(inputs["affinity"], BETA)
    return lambda: baselines.shifted_walk(inputs["maps"], planes, STEPS)


def _dense(inputs: Inputs) -> Callable[[], Tensor]:
    dense = baselines.dense_affinity(inputs["affinity"])
    return lambda: baselines.dense_walk(inputs["maps"], dense, BETA, STEPS)


def _walk(
    size: Size,
    channels: int,
    aims: tuple[Aim, ...] = (),
    *,
    quick: bool = False,
    only_full: bool = False,
    dense: bool | None = None,
) -> Case:
    """dense: None leaves the published way out, False keeps it for --full."""
    flop = 2.0 * 69 * size.height * size.width * channels * STEPS
    ways = [
        Way("ours, auto", "ours", _ours("auto"), tolerance=1e-4),
        Way("ours, power", "ours", _ours("power"), flop=flop),
        Way("torch CSR", "library", _torch_csr, tolerance=SUM_ERROR, flop=flop),
        Way("scipy CSR", "library", _scipy_csr, tolerance=SUM_ERROR, flop=flop),
        Way("torch shifted views", "library", _shifted, tolerance=SUM_ERROR, flop=flop),
    ]
    if dense is not None:
        gigabytes = 5 * 4e-9 * (size.height * size.width) ** 2
        ways.append(Way("dense, published", "published", _dense, SUM_ERROR, gigabytes=gigabytes, only_full=not dense))
    return Case(
        name=f"walk {size.name} C={channels}",
        op="random_walk",
        groups=("walk",),
        size=size,
        channels=channels,
        inputs=_inputs(channels),
        expected=_expected,
        ways=tuple(ways),
        aims=aims,
        quick=quick,
        only_full=only_full,
    )


def _with_gradient(inputs: Inputs, walk: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    maps, affinity = inputs["maps"].detach().requires_grad_(), inputs["affinity"].detach().requires_grad_()
    result = walk(maps, affinity)
    return result.detach(), *torch.autograd.grad(result, (maps, affinity), inputs["grad"])


def _training(size: Size, channels: int, steps: int, *, gigabytes: float = 0.0, quick: bool = False) -> Case:
    def inputs(size: Size) -> Inputs:
        return {**_inputs(channels)(size), "grad": sizes.maps(size, channels, seed=9) - 0.5}

    def expected(i: Inputs) -> tuple[Tensor, ...]:
        wide = {key: value.double() for key, value in i.items()}
        return _with_gradient(wide, lambda x, a: wk.reference.random_walk(x, a, beta=BETA, steps=steps))

    def ours(i: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: _with_gradient(i, lambda x, a: wk.random_walk(x, a, beta=BETA, steps=steps))

    def shifted(i: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: _with_gradient(i, lambda x, a: baselines.shifted_walk_autograd(x, a, BETA, steps))

    return Case(
        name=f"walk forward + backward {size.name} C={channels}, {steps} steps",
        op="random_walk",
        groups=("walk",),
        size=size,
        channels=channels,
        inputs=inputs,
        expected=expected,
        ways=(
            Way("ours, auto", "ours", ours, tolerance=1e-4),
            Way("torch shifted views, autograd", "library", shifted, tolerance=SUM_ERROR, gigabytes=gigabytes),
        ),
        quick=quick,
    )


def _huge() -> Case:
    def inputs(size: Size) -> Inputs:
        affinity = torch.rand(1, 34, size.height, size.width, generator=torch.Generator().manual_seed(0))
        return {"maps": sizes.maps(size, 21), "affinity": affinity}

    return Case(
        name="walk 1024x1024 C=21",
        op="random_walk",
        groups=("memory",),
        size=sizes.HUGE,
        channels=21,
        inputs=inputs,
        expected=_expected,
        ways=(Way("ours, auto", "ours", _ours("auto")),),
        aims=(Aim("ours, auto", "peak_mb", most=512),),
        timed=False,
    )


def _call() -> Case:
    def watched(i: Inputs) -> Callable[[], Tensor]:
        maps = i["maps"].clone().requires_grad_()
        return lambda: wk.random_walk(maps, i["affinity"], steps=1).detach()

    return Case(
        name="random_walk, one call on 4x4 C=1, 1 step",
        op="random_walk",
        groups=("overhead",),
        size=sizes.CALL,
        channels=1,
        inputs=_inputs(1),
        expected=lambda i: wk.reference.random_walk(i["maps"].double(), i["affinity"].double(), steps=1),
        ways=(
            Way("eager", "ours", lambda i: lambda: wk.random_walk(i["maps"], i["affinity"], steps=1)),
            Way("with grad, forward", "ours", watched),
            Way("torch.add", "context", lambda i: lambda: torch.add(i["maps"], i["maps"])),
        ),
        unit="us",
        quick=True,
    )


# On a GPU -------------------------------------------------------------------------------------------------------------


def _products(solver: str) -> tuple[int, bool]:
    """How many the solver makes, and whether they are a series."""
    series = _dispatch.native.walk_method(STEPS, SOLVERS.index(solver), 1e-4)[1] if _dispatch.native else []
    return (len(series) - 1, True) if series else (STEPS, False)


def _work(size: Size, channels: int, solver: str) -> Work:
    """The products that the solver makes, with the weights in the half-stencil form and every map read and written."""
    pixels = size.batch * size.height * size.width
    products, series = _products(solver)
    each = 2 * 69 + 4 if series else 2 * 69
    return Work(flop=each * products * pixels * channels, bytes=4 * pixels * (34 + 2 * channels))


def _gpu_csr(inputs: Inputs) -> Callable[[], Tensor]:
    matrix = baselines.torch_transition_csr(inputs["affinity"], BETA)
    return lambda: baselines.torch_csr_walk(inputs["maps"], matrix, STEPS)


def _gpu_walk(size: Size, batch: int, channels: int) -> Case:
    size = sizes.batched(size, batch, dim=64)
    pixels = size.height * size.width
    flop = 2.0 * 69 * batch * pixels * channels * STEPS
    ways = [
        Way(
            "ours, auto", "ours", _ours("auto"), tolerance=1e-4, work=_work(size, channels, "auto"), form=_form("auto")
        ),
        Way("ours, power", "ours", _ours("power"), flop=flop, work=_work(size, channels, "power"), form=_form("power")),
        Way("torch shifted views", "library", _shifted, SUM_ERROR, flop=flop, gigabytes=2e-6 * batch * pixels),
    ]
    if batch <= 16:
        ways.append(Way("torch CSR", "library", _gpu_csr, tolerance=SUM_ERROR, flop=flop))
    if batch == 1:
        ways.append(Way("dense, published", "published", _dense, SUM_ERROR, gigabytes=5 * 4e-9 * pixels**2))
    return Case(
        name=f"walk {size.name} C={channels}",
        op="random_walk",
        groups=("walk",),
        size=size,
        channels=channels,
        inputs=_inputs(channels),
        expected=_expected,
        ways=tuple(ways),
        quick=batch == 1,
    )


def _chain() -> Case:
    """A walk of one image beside its steps without any work. Launches: eager_ms one by one, median_ms in a graph."""
    steps, _ = _products("auto")

    def of(kind: str, blocks: int) -> Way:
        return Way(f"{steps} {kind}, {blocks} blocks", "context", lambda i: step_chain(kind, steps, blocks))

    case = _gpu_walk(sizes.PSA, 1, 3)
    limits = [
        of("launches", 16),
        *(of("grid barriers", n) for n in (16, 64)),
        *(of("cluster barriers", n) for n in (8, 16)),
    ]
    return replace(case, name=f"{case.name}, its chain of steps", ways=(case.ways[0], *limits), quick=False)


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    """One step compiled and called again and again: all of them in one graph take torch an hour."""
    weights = walk_weights(inputs["affinity"], baselines.RADIUS, BETA)
    degree = baselines.transition_planes(inputs["affinity"], BETA)[0].reciprocal()
    step, offsets = torch.compile(walk_step, dynamic=False), wk.neighbour_offsets(baselines.RADIUS)

    def walk() -> Tensor:
        x = inputs["maps"]
        for _ in range(STEPS):
            x = step(x, weights, degree, offsets)
        return x

    return walk


def _gpu_compiled(size: Size, batch: int, channels: int) -> Case:
    case = _gpu_walk(size, batch, channels)
    compiled = Way("torch.compile of the reference's step", "library", _compiled, tolerance=SUM_ERROR)
    return replace(case, name=f"{case.name}, compiled", groups=("compile",), ways=(case.ways[0], compiled), quick=False)


CASES: list[Case] = [
    _walk(sizes.SMALL, 5, dense=True),
    _walk(sizes.PSA, 2, quick=True),
    _walk(sizes.PSA, 3),
    _walk(
        sizes.PSA,
        5,
        (Aim("torch CSR", "ratio", least=15), Aim("dense, published", "ratio", least=1000)),
        dense=True,
        quick=True,
    ),
    _walk(sizes.PSA, 21, dense=True),
    _walk(sizes.IRN, 2, (Aim("torch CSR", "ratio", least=12), Aim("ours, auto", "median_ms", most=4))),
    _walk(sizes.IRN, 3, dense=False),
    _walk(sizes.IRN, 5, (Aim("ours, power", "gflops", least=100),), dense=False, quick=True),
    _walk(sizes.SQUARE, 5),
    _walk(sizes.SQUARE, 7),
    _walk(sizes.LARGE, 5, only_full=True),
    _training(sizes.SMALL, 5, 64, quick=True),
    _training(sizes.PSA, 5, 256, gigabytes=8),
    _huge(),
    _call(),
]

GPU_CASES: list[Case] = [
    *(_gpu_walk(size, batch, 3) for batch in sizes.GPU_BATCHES for size in sizes.GPU_SIZES),
    _training(sizes.PSA, 5, 256, gigabytes=8),
    _call(),
    _chain(),
    _gpu_compiled(sizes.PSA, 16, 3),
]


def test_random_walk(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
