"""Affinity between pixels with no boundary between them: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference
from wsss_kernels.neighbours import check_radius, neighbour_count


def boundary_affinity(boundary: Tensor, radius: int = 5) -> Tensor:
    """How free of boundaries the way from each pixel to each neighbour is.

    affinity[b, k, y, x] = 1 - max of boundary[b, 0] over the path between (y, x) and (y, x) + neighbour_offsets(radius)
    [k], both ends included: the pixels of the box the two span that lie less than a pixel off the line between them. A
    diagonal step holds both pixels it passes between, so nothing slips through a diagonal boundary.

    Pairs that lead outside the map are 0; paths stay inside the box, so maps of any size are fine, smaller than the
    radius too. NaN on a path makes its affinity NaN.

    Args:
        boundary: [B, 1, H, W] probability of a boundary, in 0..1 (after the sigmoid). Other values are taken as they
            are: the affinity is then outside 0..1. float16, bfloat16, float32 (float32 arithmetic), or float64 (the
            reference). Any memory format.
        radius: pixels, 1..16; 5 (34 neighbours) is what IRNet uses at inference, 10 (152) its training.

    Returns:
        [B, K, H, W], contiguous, in the dtype of boundary. Differentiable in boundary: the gradient of a pair goes to
        one pixel of its path, the maximum; of equal maxima to the one nearest the neighbour (largest |dy| + |dx| from
        the pixel), and of those equally near to the first row-major. The same bits whatever the number of threads.

    Memory: the result; backward, besides the gradients, about twice the size of boundary. Nothing is stored between.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn, Cho and Kwak, CVPR 2019, section 4.2; paths and tie rule are the published code's, the order of the
    neighbours is `neighbour_offsets` (row-major), not grouped by path length as there.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.boundary_affinity(torch.rand(1, 1, 5, 7)).shape
        torch.Size([1, 34, 5, 7])
    """
    _check.tensor("boundary", boundary, "B 1 H W")
    check_radius(radius)
    if boundary.shape[1] != 1:
        raise ValueError(f"boundary must have exactly one channel, [B, 1, H, W], got {_check.describe(boundary)}")
    if not _dispatch.runs_native("boundary_affinity", boundary):
        return reference.boundary_affinity(boundary, radius)
    if _dispatch.calls_directly(boundary):
        kernel = _boundary_affinity_cuda if boundary.is_cuda else _boundary_affinity_cpu
        return kernel(boundary, radius)
    return torch.ops.wsss_kernels.boundary_affinity(boundary, radius)


_dispatch.LIBRARY.define("boundary_affinity(Tensor boundary, int radius) -> Tensor")
_dispatch.LIBRARY.define("boundary_affinity_backward(Tensor grad, Tensor boundary, int radius) -> Tensor")


def _boundary_affinity_cpu(boundary: Tensor, radius: int) -> Tensor:
    assert _dispatch.native is not None
    batch, _, height, width = boundary.shape
    x = _dispatch.as_kernel_input(boundary)
    out = torch.empty(batch, neighbour_count(radius), height, width)
    _dispatch.native.boundary_affinity(
        x.data_ptr(), out.data_ptr(), batch, height, width, radius, torch.get_num_threads()
    )
    return _dispatch.as_output(out, boundary.dtype)


def _boundary_affinity_backward_cpu(grad: Tensor, boundary: Tensor, radius: int) -> Tensor:
    assert _dispatch.native is not None
    batch, _, height, width = boundary.shape
    grad, x = _dispatch.as_kernel_input(grad), _dispatch.as_kernel_input(boundary)
    out = torch.empty_like(x)
    _dispatch.native.boundary_affinity_backward(
        grad.data_ptr(), x.data_ptr(), out.data_ptr(), batch, height, width, radius, torch.get_num_threads()
    )
    return _dispatch.as_output(out, boundary.dtype)


def _boundary_affinity_cuda(boundary: Tensor, radius: int) -> Tensor:
    from wsss_kernels.triton.boundary_affinity import boundary_affinity

    return boundary_affinity(boundary, radius)


def _boundary_affinity_backward_cuda(grad: Tensor, boundary: Tensor, radius: int) -> Tensor:
    from wsss_kernels.triton.boundary_affinity import boundary_affinity_backward

    return boundary_affinity_backward(grad, boundary, radius)


def _boundary_affinity_fake(boundary: Tensor, radius: int) -> Tensor:
    batch, _, height, width = boundary.shape
    return boundary.new_empty(batch, neighbour_count(radius), height, width)


def _boundary_affinity_backward_fake(grad: Tensor, boundary: Tensor, radius: int) -> Tensor:
    return torch.empty_like(boundary, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    boundary, ctx.radius = inputs
    ctx.save_for_backward(boundary)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (boundary,) = ctx.saved_tensors
    return torch.ops.wsss_kernels.boundary_affinity_backward(grad, boundary, ctx.radius), None


_dispatch.LIBRARY.impl("boundary_affinity", _boundary_affinity_cpu, "CPU")
_dispatch.LIBRARY.impl("boundary_affinity_backward", _boundary_affinity_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("boundary_affinity", _boundary_affinity_cuda, "CUDA")
_dispatch.LIBRARY.impl("boundary_affinity_backward", _boundary_affinity_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::boundary_affinity", _boundary_affinity_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::boundary_affinity_backward", _boundary_affinity_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::boundary_affinity", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("boundary_affinity")
