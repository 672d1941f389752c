"""Affinity between each pixel and its neighbours: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference
from wsss_kernels.neighbours import check_radius, neighbour_count

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of DataType in csrc/local_affinity.h
_AUTO = 0.0  # how "auto" travels through the op's float argument


def local_affinity(
    feats: Tensor, radius: int = 5, *, metric: str = "l1", scale: float | str = 1.0, border: str = "full"
) -> Tensor:
    """How alike each pixel's features are to each neighbour's.

    affinity[b, k, y, x] links pixel (y, x) to (y, x) + neighbour_offsets(radius)[k]:

    * "l1": exp(-mean_d |f_i - f_j| / scale); distance: mean_d |f_i - f_j|
    * "cosine": max(cos(f_i, f_j), 0), a zero vector giving 0; distance: 1 - cos
    * scale="auto": exp(-distance / s) for both, s = the image's mean distance over all in-map neighbour pairs (1 for an
      image without any difference, for the cosine up to 1e-6). Multiplying the features by a constant then changes
      nothing.

    Pairs that lead outside the map are 0; so the result is defined for maps of any size, smaller than the radius too.

    Args:
        feats: [B, D, H, W] features of any scale, D >= 1; float16, bfloat16, float32 (float32 arithmetic), or float64
            (the reference). Any memory format.
        radius: pixels, 1..16; 5 as published (34 neighbours).
        metric: "l1" (AffinityNet) or "cosine".
        scale: the distance at which the affinity falls to 1/e, > 0, in the features' own unit; 1.0 as published, for
            features trained with it; "auto" for any others. The cosine metric uses no number.
        border: "full" keeps every in-map pair. "cropped" also zeroes those AffinityNet never builds: source in the last
            radius - 1 rows or in the first or last radius - 1 columns.

    Returns:
        [B, K, H, W] in 0..1, contiguous, in the dtype of feats. Differentiable in feats (the automatic scale is a
        constant for the gradient).

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn and Kwak, CVPR 2018, section 3.2; the division by D is the published code's.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.local_affinity(torch.rand(1, 8, 5, 7)).shape
        torch.Size([1, 34, 5, 7])
    """
    number = check_arguments(feats, radius, metric, scale, border)
    if not _dispatch.runs_native("local_affinity", feats):
        return reference.local_affinity(feats, radius, metric=metric, scale=scale, border=border)
    arguments = (radius, metric == "cosine", number, border == "cropped")
    if _dispatch.calls_directly(feats):
        kernel = _local_affinity_cuda if feats.is_cuda else _local_affinity_cpu
        return kernel(feats, *arguments)[0]
    return torch.ops.wsss_kernels.local_affinity(feats, *arguments)[0]


def check_arguments(feats: Tensor, radius: int, metric: str, scale: float | str, border: str) -> float:
    """-> the scale, 0 for "auto"."""
    _check.tensor("feats", feats, "B D H W")
    check_radius(radius)
    _check.choice("metric", metric, ("l1", "cosine"))
    _check.choice("border", border, ("full", "cropped"))
    if isinstance(scale, str):
        _check.choice("scale", scale, ("auto",))
        number = _AUTO
    else:
        number = _check.number("scale", scale, 'a number > 0 (unit of feats) or "auto"', above=0)
    if feats.shape[1] == 0:
        raise ValueError(f"feats must have at least one channel (D >= 1), got {_check.describe(feats)}")
    return number


_dispatch.LIBRARY.define(
    "local_affinity(Tensor feats, int radius, bool cosine, float scale, bool cropped) -> (Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "local_affinity_backward(Tensor grad, Tensor feats, Tensor affinity, Tensor scales, int radius, bool cosine, "
    "float scale, bool cropped) -> Tensor"
)


def _local_affinity_cpu(feats: Tensor, radius: int, cosine: bool, scale: float, cropped: bool) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    batch, dim, height, width = feats.shape
    x = _dispatch.as_kernel_input(feats)
    out = torch.empty(batch, neighbour_count(radius), height, width)
    scales = torch.empty(batch)
    _dispatch.native.local_affinity(
        x.data_ptr(), out.data_ptr(), scales.data_ptr(), batch, dim, height, width, radius, cosine, scale, cropped,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, feats.dtype), scales


def _local_affinity_backward_cpu(
    grad: Tensor,
    feats: Tensor,
    affinity: Tensor,
    scales: Tensor,
    radius: int,
    cosine: bool,
    scale: float,
    cropped: bool,
) -> Tensor:
    assert _dispatch.native is not None
    grad, x, affinity = map(_dispatch.as_kernel_input, (grad, feats, affinity))
    out = torch.empty_like(x)
    _dispatch.native.local_affinity_backward(
        grad.data_ptr(), x.data_ptr(), affinity.data_ptr(), scales.data_ptr(), out.data_ptr(), *feats.shape,
        radius, cosine, scale, cropped, torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, feats.dtype)


def _local_affinity_cuda(
    feats: Tensor, radius: int, cosine: bool, scale: float, cropped: bool
) -> tuple[Tensor, Tensor]:
    if _dispatch.gpu_kernel("local_affinity", feats.device.index)[0] == "triton":
        from wsss_kernels.triton.local_affinity import local_affinity

        return local_affinity(feats, radius, cosine, scale, cropped)
    assert _dispatch.native is not None
    batch, _, height, width = feats.shape
    x = feats.resolve_neg().contiguous()  # float16 and bfloat16 as they are: half the bytes to read
    out = x.new_empty(batch, neighbour_count(radius), height, width)
    scales = x.new_empty(batch, dtype=torch.float32)
    call = _dispatch.CudaCall(x)
    arguments = (*x.shape, radius, cosine, scale, cropped, DTYPES.index(x.dtype))
    workspace = call.workspace(_dispatch.native.local_affinity_cuda_workspace(*arguments, call.index))
    _dispatch.native.local_affinity_cuda(
        x.data_ptr(), out.data_ptr(), scales.data_ptr(), *arguments, workspace.data_ptr(), call.index, call.stream
    )
    return out, scales


def _local_affinity_backward_cuda(
    grad: Tensor,
    feats: Tensor,
    affinity: Tensor,
    scales: Tensor,
    radius: int,
    cosine: bool,
    scale: float,
    cropped: bool,
) -> Tensor:
    if _dispatch.gpu_kernel("local_affinity_backward", feats.device.index)[0] == "triton":
        from wsss_kernels.triton.local_affinity import local_affinity_backward

        return local_affinity_backward(grad, feats, affinity, scales, radius, cosine, scale, cropped)
    assert _dispatch.native is not None
    grad, x, affinity = (tensor.resolve_neg().to(feats.dtype).contiguous() for tensor in (grad, feats, affinity))
    out = torch.empty_like(x)
    call = _dispatch.CudaCall(x)
    arguments = (*x.shape, radius, cosine, scale, cropped, DTYPES.index(x.dtype))
    workspace = call.workspace(_dispatch.native.local_affinity_backward_cuda_workspace(*arguments, call.index))
    _dispatch.native.local_affinity_backward_cuda(
        grad.data_ptr(), x.data_ptr(), affinity.data_ptr(), scales.data_ptr(), out.data_ptr(), *arguments,
        workspace.data_ptr(), call.index, call.stream,
    )  # fmt: skip
    return out


def _local_affinity_fake(
    feats: Tensor, radius: int, cosine: bool, scale: float, cropped: bool
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = feats.shape
    affinity = feats.new_empty(batch, neighbour_count(radius), height, width)
    return affinity, feats.new_empty(batch, dtype=torch.float32)


def _local_affinity_backward_fake(grad: Tensor, feats: Tensor, *_: object) -> Tensor:
    return torch.empty_like(feats, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    feats, *ctx.arguments = inputs
    affinity, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.save_for_backward(feats, affinity, scales)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    feats, affinity, scales = ctx.saved_tensors
    grad_feats = torch.ops.wsss_kernels.local_affinity_backward(grad, feats, affinity, scales, *ctx.arguments)
    return grad_feats, None, None, None, None


_dispatch.LIBRARY.impl("local_affinity", _local_affinity_cpu, "CPU")
_dispatch.LIBRARY.impl("local_affinity_backward", _local_affinity_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("local_affinity", _local_affinity_cuda, "CUDA")
_dispatch.LIBRARY.impl("local_affinity_backward", _local_affinity_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::local_affinity", _local_affinity_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::local_affinity_backward", _local_affinity_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::local_affinity", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("local_affinity")
