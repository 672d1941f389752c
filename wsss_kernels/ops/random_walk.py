"""Random walk of maps over a local affinity: contract, checks, registration."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference
from wsss_kernels.neighbours import check_radius, neighbour_count

SOLVERS = ("auto", "power", "chebyshev")  # in the order of WalkSolver in csrc/random_walk.h


def random_walk(
    maps: Tensor,
    affinity: Tensor,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    solver: str = "auto",
    tol: float = 1e-4,
) -> Tensor:
    """Let every map diffuse over the affinity: each step replaces a pixel by the weighted mean of its neighbours.

    W = affinity^beta, symmetric, with 1 on the diagonal; result = (D^-1 W)^steps on every map. One step is
    x_i + sum_j W_ij (x_j - x_i) / d_i, so by power a constant map stays what it is and the result lies within
    [min, max] of the map (by Chebyshev series to rounding and to tol). A map of zeros costs nothing. A pixel without
    links keeps its value.

    Args:
        maps: [B, C, H, W]; any scale; float16, bfloat16, float32, or float64 (the reference).
        affinity: [B, K, H, W], K = len(neighbour_offsets(radius)), in 0..1, as `local_affinity` gives it. Values <= 0
            are no link, whatever beta; so are pairs that lead outside the map.
        radius: pixels; that of the affinity.
        beta: power of the affinity, >= 0; larger keeps the walk closer to like pixels. 8 as published (IRNet: 10).
        steps: whole number >= 0; 256 as published. 0 returns the maps.
        solver: "power" does `steps` products (256 in float32: within 1e-5 of exact, peak 1). "chebyshev" evaluates
            a truncated Chebyshev series of the same polynomial, about 74 products for 256 steps. "auto" takes the
            cheaper of the two that keeps tol.
        tol: largest error allowed, in units of max |map|, > 0; of the gradients, in units of their largest. Below 2e-5
            (power: 1e-5; gradients: 5e-5; more beyond 256 steps), under float32's own rounding, it runs in float64.

    Returns:
        [B, C, H, W], contiguous, in the dtype of maps. Differentiable once in maps and affinity (float64: any order).

    Memory: about 1.3 K H W floats for W and 3 (steps by power: 2) copies of up to 5 maps, an image at a time (small
    images: one a thread). The backward recovers the states by running the recurrence in reverse instead of storing
    them: twice W and 6 copies of 5 maps, whatever `steps`.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn and Kwak, CVPR 2018, section 3.4 (there by squaring a dense matrix).

    Example:
        >>> import torch, wsss_kernels as wk
        >>> affinity = wk.local_affinity(torch.rand(1, 8, 20, 30))
        >>> wk.random_walk(torch.rand(1, 2, 20, 30), affinity, steps=16).shape
        torch.Size([1, 2, 20, 30])
    """
    _check.tensor("maps", maps, "B C H W")
    _check.tensor("affinity", affinity, "B K H W")
    _check.same_device("maps", maps, "affinity", affinity)
    beta, tol = check_arguments(radius, beta, steps, solver, tol)
    batch, _, height, width = maps.shape
    expected = (batch, neighbour_count(radius), height, width)
    if affinity.shape != expected:
        raise ValueError(
            f"affinity must be [B, K, H, W] = {list(expected)} for these maps and radius {radius}, "
            f"got {_check.describe(affinity)}"
        )
    if affinity.dtype == torch.float64 or not _dispatch.runs_native("random_walk", maps):
        return reference.random_walk(maps, affinity, radius=radius, beta=beta, steps=steps, solver=solver, tol=tol)
    arguments = (radius, beta, steps, solver, tol)
    if _dispatch.calls_directly(maps, affinity):
        kernel = _random_walk_cuda if maps.is_cuda else _random_walk_cpu
        return kernel(maps, affinity, *arguments)
    return torch.ops.wsss_kernels.random_walk(maps, affinity, *arguments)


def check_arguments(radius: int, beta: float, steps: int, solver: str, tol: float) -> tuple[float, float]:
    """-> beta and tol."""
    check_radius(radius)
    beta = _check.number("beta", beta, "a number >= 0 (power of the affinity)", least=0)
    _check.whole("steps", steps, "a whole number >= 0", least=0)
    _check.choice("solver", solver, SOLVERS)
    return beta, _check.number("tol", tol, "a number > 0 (error in units of the map's maximum)", above=0)


_dispatch.LIBRARY.define(
    "random_walk(Tensor maps, Tensor affinity, int radius, float beta, int steps, str solver, float tol) -> Tensor"
)
_dispatch.LIBRARY.define(
    "random_walk_backward(Tensor grad, Tensor maps, Tensor affinity, int radius, float beta, int steps, str solver, "
    "float tol, bool wants_maps, bool wants_affinity) -> (Tensor, Tensor)"
)


def _random_walk_cpu(
    maps: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, solver: str, tol: float
) -> Tensor:
    assert _dispatch.native is not None
    x, links = _dispatch.as_kernel_input(maps), _dispatch.as_kernel_input(affinity)
    out = torch.empty_like(x)
    _dispatch.native.random_walk(
        x.data_ptr(), links.data_ptr(), out.data_ptr(), *maps.shape, radius, beta, steps, SOLVERS.index(solver), tol,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, maps.dtype)


def _random_walk_backward_cpu(
    grad: Tensor,
    maps: Tensor,
    affinity: Tensor,
    radius: int,
    beta: float,
    steps: int,
    solver: str,
    tol: float,
    wants_maps: bool,
    wants_affinity: bool,
) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    grad, x, links = map(_dispatch.as_kernel_input, (grad, maps, affinity))
    grad_maps = torch.empty(maps.shape if wants_maps else 0)
    grad_affinity = torch.empty(affinity.shape if wants_affinity else 0)
    _dispatch.native.random_walk_backward(
        grad.data_ptr(), x.data_ptr(), links.data_ptr(), grad_maps.data_ptr() if wants_maps else 0,
        grad_affinity.data_ptr() if wants_affinity else 0, *maps.shape, radius, beta, steps, SOLVERS.index(solver), tol,
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_maps.to(maps.dtype), grad_affinity.to(affinity.dtype)


@functools.lru_cache(maxsize=1024)
def cuda_plan(*arguments: Any) -> Any:
    """How the device walks maps of this shape: asked once, since the driver takes its time to answer."""
    assert _dispatch.native is not None
    return _dispatch.native.plan_random_walk_cuda(*arguments)


def _random_walk_cuda(
    maps: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, solver: str, tol: float
) -> Tensor:
    if _dispatch.gpu_kernel("random_walk", maps.device.index)[0] == "triton":
        from wsss_kernels.triton.random_walk import random_walk

        return random_walk(maps, affinity, radius, beta, steps, solver, tol)
    assert _dispatch.native is not None
    x, links = _dispatch.as_kernel_input(maps), _dispatch.as_kernel_input(affinity)
    out = torch.empty_like(x)
    call = _dispatch.CudaCall(x)
    plan = cuda_plan(*maps.shape, radius, steps, SOLVERS.index(solver), tol, call.index)
    workspace = call.workspace(plan.workspace)
    _dispatch.native.random_walk_cuda(
        x.data_ptr(), links.data_ptr(), out.data_ptr(), *maps.shape, radius, beta, steps, SOLVERS.index(solver), tol,
        plan, workspace.data_ptr(), call.index, call.stream,
    )  # fmt: skip
    return _dispatch.as_output(out, maps.dtype)


def _random_walk_backward_cuda(
    grad: Tensor,
    maps: Tensor,
    affinity: Tensor,
    radius: int,
    beta: float,
    steps: int,
    solver: str,
    tol: float,
    wants_maps: bool,
    wants_affinity: bool,
) -> tuple[Tensor, Tensor]:
    if _dispatch.gpu_kernel("random_walk_backward", maps.device.index)[0] == "triton":
        from wsss_kernels.triton.random_walk import random_walk_backward

        return random_walk_backward(grad, maps, affinity, radius, beta, steps, solver, tol, wants_maps, wants_affinity)
    assert _dispatch.native is not None
    grad, x, links = map(_dispatch.as_kernel_input, (grad, maps, affinity))
    grad_maps = x.new_empty(maps.shape if wants_maps else 0)
    grad_affinity = x.new_empty(affinity.shape if wants_affinity else 0)
    call = _dispatch.CudaCall(x)
    arguments = (*maps.shape, radius, beta, steps, SOLVERS.index(solver), tol)
    shape, rest = arguments[:5], arguments[6:]
    workspace = call.workspace(_dispatch.native.random_walk_backward_cuda_workspace(*shape, *rest, wants_affinity))
    _dispatch.native.random_walk_backward_cuda(
        grad.data_ptr(), x.data_ptr(), links.data_ptr(), grad_maps.data_ptr() if wants_maps else 0,
        grad_affinity.data_ptr() if wants_affinity else 0, *arguments, workspace.data_ptr(), call.index, call.stream,
    )  # fmt: skip
    return grad_maps.to(maps.dtype), grad_affinity.to(affinity.dtype)


def _random_walk_fake(maps: Tensor, *_: object) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.contiguous_format)


def _random_walk_backward_fake(grad: Tensor, maps: Tensor, affinity: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    wants_maps, wants_affinity = rest[-2:]
    return (
        maps.new_empty(maps.shape if wants_maps else 0),
        affinity.new_empty(affinity.shape if wants_affinity else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    maps, affinity, *ctx.arguments = inputs
    ctx.save_for_backward(maps, affinity)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    maps, affinity = ctx.saved_tensors
    wants_maps, wants_affinity = ctx.needs_input_grad[:2]
    grad_maps, grad_affinity = torch.ops.wsss_kernels.random_walk_backward(
        grad, maps, affinity, *ctx.arguments, wants_maps, wants_affinity
    )
    return grad_maps if wants_maps else None, grad_affinity if wants_affinity else None, None, None, None, None, None


_dispatch.LIBRARY.impl("random_walk", _random_walk_cpu, "CPU")
_dispatch.LIBRARY.impl("random_walk_backward", _random_walk_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("random_walk", _random_walk_cuda, "CUDA")
_dispatch.LIBRARY.impl("random_walk_backward", _random_walk_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::random_walk", _random_walk_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::random_walk_backward", _random_walk_backward_fake, lib=_dispatch.LIBRARY)
torch.library.register_autograd(
    "wsss_kernels::random_walk", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("random_walk")
