"""Pixel-adaptive refinement: contract, checks, registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference

VARIANTS = ("pamr", "par")
MAX_DILATIONS = 32
_IMAGE = "a tensor [B, 3, H, W] of uint8 or floating point"


def pixel_adaptive(
    image: Tensor,
    maps: Tensor,
    *,
    variant: str = "par",
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
) -> Tensor:
    """Let every pixel take the mean of its neighbours, the more of one the more its colour is like the pixel's own.

        m(p) <- sum over q of w(p, q) m(q), `iterations` times

    q runs over the 8 pixels of a 3 x 3 ring at each dilation, their coordinates clamped to the picture. With x_c the
    channels of the picture and sd_c(p) the unbiased standard deviation of x_c over the neighbours of p (PAMR: and over
    p itself, once for each dilation):

        "pamr"  w = softmax_q(-mean_c |x_c(q) - x_c(p)| / (1e-8 + 0.1 sd_c(p)))
        "par"   w = softmax_q(-mean_c (|x_c(q) - x_c(p)| / (sd_c(p) + 1e-8) / 0.3)^2) + 0.01 softmax_q(-(r / s / 0.3)^2)

    where r is the distance of q and s its deviation over the neighbours. The weights of "par" sum to 1.01, so maps grow
    by 1 % an iteration, as published. Only ratios between colours matter: 0..255, 0..1 and normalised pictures give
    the same result.

    Args:
        image: [B, 3, H, W] uint8 or floating point, any scale. A constant for the gradient.
        maps: [B, C, h, w], any scale; brought to H x W bilinearly (align_corners=True, as published) where they differ.
            float16, bfloat16, float32 (float32 arithmetic), or float64 (the reference).
        variant: "pamr" or "par".
        dilations: 1 to 32 whole numbers >= 1, pixels; larger than the picture is fine (the neighbours are its edges).
        iterations: whole number >= 0. Published: 10 (PAMR; PAR in AFA and ToCo), 20 (PAR in WeCLIP).

    Returns:
        [B, C, H, W], contiguous, in the dtype of maps, within 5e-5 of the float64 reference (of its largest value).
        Where all neighbours of a pixel have one value in a channel, not the pixel's own, "par" divides by 1e-8: what
        the other channels say is then lost to rounding, as published, in float32 more than in float64.
        Differentiable once in maps (float64: any order). NaN and infinity in a map stay in that map; NaN in the picture
        makes those pixels of all maps NaN that have it among their neighbours, and what they reach.

    Memory: of one image its weights, 16 bits each (96 bytes a pixel with 6 dilations), its maps once more and some
    rows for each thread.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Araslanov and Roth, Single-Stage Semantic Segmentation from Image Labels, CVPR 2020 (PAMR); Ru et al.,
    Learning Affinity from Attention, CVPR 2022 (PAR).

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.pixel_adaptive(torch.rand(1, 3, 32, 40), torch.rand(1, 2, 8, 10)).shape
        torch.Size([1, 2, 32, 40])
    """
    _check.tensor("maps", maps, "B C h w")
    if not isinstance(image, Tensor) or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise TypeError(f"image must be {_IMAGE}, got {_check.describe(image)}")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be {_IMAGE}, got {_check.describe(image)}")
    if image.shape[0] != maps.shape[0]:
        raise ValueError(f"image must have the batch of maps ({maps.shape[0]}), got {_check.describe(image)}")
    _check.same_device("maps", maps, "image", image)
    _check.choice("variant", variant, VARIANTS)
    _check.whole("iterations", iterations, "a whole number >= 0", least=0)
    rings = _check_dilations(dilations)
    if not _dispatch.runs_native("pixel_adaptive", maps):
        return reference.pixel_adaptive(image, maps, variant=variant, dilations=rings, iterations=iterations)
    size = image.shape[2:]
    if maps.numel() == 0 or 0 in size:
        return maps.new_zeros(*maps.shape[:2], *size)
    dtype = maps.dtype
    if maps.shape[2:] != size:
        with torch.autocast(maps.device.type, enabled=False):
            maps = F.interpolate(maps.float(), size, mode="bilinear", align_corners=True)
    arguments = (variant == "par", rings, iterations)
    if _dispatch.calls_directly(maps):
        out = (_pixel_adaptive_cuda if maps.is_cuda else _pixel_adaptive_cpu)(image, maps, *arguments)
    else:
        out = torch.ops.wsss_kernels.pixel_adaptive(image.detach(), maps, *arguments)
    return out.to(dtype)


def _check_dilations(dilations: object) -> list[int]:
    contract = f"1 to {MAX_DILATIONS} whole numbers >= 1"
    if not isinstance(dilations, Sequence) or isinstance(dilations, str):
        raise TypeError(f"dilations must be {contract}, got {_check.describe(dilations)}")
    if not 1 <= len(dilations) <= MAX_DILATIONS:
        raise ValueError(f"dilations must be {contract}, got {len(dilations)} of them")
    return [_check.whole("dilations", d, contract, least=1) for d in dilations]


_dispatch.LIBRARY.define(
    "pixel_adaptive(Tensor image, Tensor maps, bool par, int[] dilations, int iterations) -> Tensor"
)
_dispatch.LIBRARY.define(
    "pixel_adaptive_backward(Tensor grad, Tensor image, bool par, int[] dilations, int iterations) -> Tensor"
)


def _pixel_adaptive_cpu(image: Tensor, maps: Tensor, par: bool, dilations: list[int], iterations: int) -> Tensor:
    assert _dispatch.native is not None
    picture, x = _dispatch.as_kernel_input(image), _dispatch.as_kernel_input(maps)
    out = torch.empty_like(x)
    _dispatch.native.pixel_adaptive(
        picture.data_ptr(), x.data_ptr(), out.data_ptr(), *x.shape, par, dilations, iterations, torch.get_num_threads()
    )
    return _dispatch.as_output(out, maps.dtype)


def _pixel_adaptive_backward_cpu(
    grad: Tensor, image: Tensor, par: bool, dilations: list[int], iterations: int
) -> Tensor:
    assert _dispatch.native is not None
    picture, x = _dispatch.as_kernel_input(image), _dispatch.as_kernel_input(grad)
    out = torch.empty_like(x)
    _dispatch.native.pixel_adaptive_backward(
        x.data_ptr(), picture.data_ptr(), out.data_ptr(), *x.shape, par, dilations, iterations, torch.get_num_threads()
    )
    return _dispatch.as_output(out, grad.dtype)


def _pixel_adaptive_cuda(image: Tensor, maps: Tensor, par: bool, dilations: list[int], iterations: int) -> Tensor:
    from wsss_kernels.triton.pixel_adaptive import pixel_adaptive

    return pixel_adaptive(image, maps, par, dilations, iterations)


def _pixel_adaptive_backward_cuda(
    grad: Tensor, image: Tensor, par: bool, dilations: list[int], iterations: int
) -> Tensor:
    from wsss_kernels.triton.pixel_adaptive import pixel_adaptive_backward

    return pixel_adaptive_backward(grad, image, par, dilations, iterations)


def _pixel_adaptive_fake(image: Tensor, maps: Tensor, par: bool, dilations: list[int], iterations: int) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.contiguous_format)


def _pixel_adaptive_backward_fake(
    grad: Tensor, image: Tensor, par: bool, dilations: list[int], iterations: int
) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image, _, *ctx.arguments = inputs
    ctx.save_for_backward(image)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (image,) = ctx.saved_tensors
    return None, torch.ops.wsss_kernels.pixel_adaptive_backward(grad, image, *ctx.arguments), None, None, None


_dispatch.LIBRARY.impl("pixel_adaptive", _pixel_adaptive_cpu, "CPU")
_dispatch.LIBRARY.impl("pixel_adaptive_backward", _pixel_adaptive_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("pixel_adaptive", _pixel_adaptive_cuda, "CUDA")
_dispatch.LIBRARY.impl("pixel_adaptive_backward", _pixel_adaptive_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::pixel_adaptive", _pixel_adaptive_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::pixel_adaptive_backward", _pixel_adaptive_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::pixel_adaptive", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("pixel_adaptive")
