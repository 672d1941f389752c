"""Dense energy loss: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference
from wsss_kernels.ops.dense_crf import check_image_and, check_lattice


def dense_energy_loss(
    image: Tensor, probs: Tensor, *, roi: Tensor | None = None, sigma_rgb: float = 15.0, sigma_xy: float = 100.0
) -> Tensor:
    """How much the classes of near pixels of like colour differ: the pairwise energy of a dense CRF as a loss.

        S = probs * roi,  loss = -<S, F S> / B,  d loss / d probs = -2 (F S) roi / B

    F filters with a Gaussian over (x, y, r, g, b) on the permutohedral lattice, not normalised: values grow with the
    number of pixels (the published weights are of the order of 1e-7). The gradient takes F as symmetric, as published;
    the lattice's is so to a few per cent.

    Args:
        image: [B, 3, H, W] RGB, uint8 or floating point 0..255 (not the normalised input; beyond 0..255 counts as the
            nearer end, NaN as 0). A constant for the gradient.
        probs: [B, C, H, W] class probabilities; float16, bfloat16, float32, or float64 (the reference). The published
            code passes image (nearest), probs (bilinear) and roi at half size, and sigma_xy halved too.
        roi: [B, H, W] or [B, 1, H, W] weight of each pixel, any real dtype or bool (0 for padding); None is 1.
        sigma_rgb: grey levels, > 0.
        sigma_xy: pixels, > 0.

    Returns:
        A number: float32 (float64 for float64 probs), also under autocast, since float16 could not hold it. 0 without
        pixels, NaN with a NaN in probs. Differentiable once in probs: the gradient is found together with the loss.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Tang et al., On Regularized Losses for Weakly-supervised CNN Segmentation, ECCV 2018.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> picture = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
        >>> bool(wk.dense_energy_loss(picture, torch.rand(1, 2, 24, 32).softmax(1)) < 0)
        True
    """
    check_image_and("probs", image, probs)
    sigma_rgb = _check.number("sigma_rgb", sigma_rgb, "a number > 0 (grey levels)", above=0)
    sigma_xy = _check.number("sigma_xy", sigma_xy, "a number > 0 (pixels)", above=0)
    batch, _, height, width = probs.shape
    if roi is not None:
        if not isinstance(roi, Tensor) or roi.is_complex():
            raise TypeError(f"roi must be a real tensor [B, H, W] or None, got {_check.describe(roi)}")
        if tuple(roi.shape) not in ((batch, height, width), (batch, 1, height, width)):
            raise ValueError(f"roi must be [B, H, W] = {[batch, height, width]}, got {_check.describe(roi)}")
        _check.same_device("probs", probs, "roi", roi)
        roi = roi.detach().reshape(batch, height, width)
    check_lattice("sigma_xy, sigma_rgb", height, width, (sigma_xy, sigma_xy, sigma_rgb, sigma_rgb, sigma_rgb))
    if not _dispatch.runs_native("dense_energy_loss", probs):
        return reference.dense_energy_loss(image, probs, roi=roi, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy)
    wants_slope = probs.requires_grad and torch.is_grad_enabled()
    if _dispatch.calls_directly(probs):
        kernel = _dense_energy_cuda if probs.is_cuda else _dense_energy_cpu
        return kernel(image, probs, roi, sigma_rgb, sigma_xy, False)[0]
    return torch.ops.wsss_kernels.dense_energy_loss(image.detach(), probs, roi, sigma_rgb, sigma_xy, wants_slope)[0]


_dispatch.NO_TRITON_KERNEL.add("dense_energy_loss")
_dispatch.GRADIENT_WITH_FORWARD.add("dense_energy_loss_backward")
_dispatch.LIBRARY.define(
    "dense_energy_loss(Tensor image, Tensor probs, Tensor? roi, float sigma_rgb, float sigma_xy, bool wants_slope) -> "
    "(Tensor, Tensor)"
)
_dispatch.LIBRARY.define("dense_energy_loss_backward(Tensor grad, Tensor slope, Tensor probs) -> Tensor")


def _dense_energy_cpu(
    image: Tensor, probs: Tensor, roi: Tensor | None, sigma_rgb: float, sigma_xy: float, wants_slope: bool
) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    picture, x = _dispatch.as_kernel_input(image), _dispatch.as_kernel_input(probs)
    weight = None if roi is None else _dispatch.as_kernel_input(roi)
    loss, slope = torch.empty(()), torch.empty(probs.shape if wants_slope else 0)
    _dispatch.native.dense_energy_loss(
        picture.data_ptr(), x.data_ptr(), 0 if weight is None else weight.data_ptr(), loss.data_ptr(),
        slope.data_ptr() if wants_slope else 0, *x.shape, [sigma_xy] * 2 + [sigma_rgb] * 3, torch.get_num_threads(),
    )  # fmt: skip
    return loss, slope


def _dense_energy_cuda(
    image: Tensor, probs: Tensor, roi: Tensor | None, sigma_rgb: float, sigma_xy: float, wants_slope: bool
) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    picture, x = _dispatch.as_kernel_input(image), _dispatch.as_kernel_input(probs)
    weight = None if roi is None else _dispatch.as_kernel_input(roi)
    loss, slope = x.new_empty(()), x.new_empty(probs.shape if wants_slope else 0)
    call = _dispatch.CudaCall(x)
    arguments = (*x.shape, [sigma_xy] * 2 + [sigma_rgb] * 3)
    workspace = call.workspace(_dispatch.native.dense_energy_loss_cuda_workspace(*arguments))
    _dispatch.native.dense_energy_loss_cuda(
        picture.data_ptr(), x.data_ptr(), 0 if weight is None else weight.data_ptr(), loss.data_ptr(),
        slope.data_ptr() if wants_slope else 0, *arguments, workspace.data_ptr(), workspace.numel(), call.index,
        call.stream,
    )  # fmt: skip
    return loss, slope


def _dense_energy_fake(
    image: Tensor, probs: Tensor, roi: Tensor | None, sigma_rgb: float, sigma_xy: float, wants_slope: bool
) -> tuple[Tensor, Tensor]:
    slope = probs.new_empty(probs.shape if wants_slope else 0, dtype=torch.float32)
    return probs.new_empty((), dtype=torch.float32), slope


def _dense_energy_backward(grad: Tensor, slope: Tensor, probs: Tensor) -> Tensor:
    return (grad * slope).to(probs.dtype)  # in float32: under a gradient scaler only the product fits float16


def _dense_energy_backward_fake(grad: Tensor, slope: Tensor, probs: Tensor) -> Tensor:
    return torch.empty_like(slope, dtype=probs.dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1], output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    probs, slope = ctx.saved_tensors
    return None, torch.ops.wsss_kernels.dense_energy_loss_backward(grad, slope, probs), None, None, None, None


_dispatch.LIBRARY.impl("dense_energy_loss", _dense_energy_cpu, "CPU")
_dispatch.LIBRARY.impl("dense_energy_loss", _dense_energy_cuda, "CUDA")
for _device in ("CPU", "CUDA"):
    _dispatch.LIBRARY.impl("dense_energy_loss_backward", _dense_energy_backward, _device)
torch.library.register_fake("wsss_kernels::dense_energy_loss", _dense_energy_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::dense_energy_loss_backward", _dense_energy_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::dense_energy_loss", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("dense_energy_loss")
