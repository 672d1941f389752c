"""Hybrid spatial pyramid pooling: contract, checks, registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference

_MOST_PIXELS = 2**31 - 1


def hspp(feats: Tensor, *, levels: Sequence[int] = (1, 2, 4), gamma: float = 2.0) -> Tensor:
    """Pool each channel to one value between its mean and its maxima (hybrid spatial pyramid pooling).

    out = (gamma * mean + sum over levels r of the mean of window maxima) / (gamma + number of levels)

    Level r has windows of (H // r) x (W // r) pixels side by side from the top left corner; rows and columns that fill
    no window are left out of the maxima, as published, and there can be more than r x r windows (H = 7, r = 4: windows
    one row high, 7 of them). Level 1 is the global maximum. A NaN reaches its own image and channel.

    Args:
        feats: [B, D, H, W] features, D >= 1, H and W at least the largest level; float16, bfloat16, float32 (float32
            arithmetic), or float64 (the reference). Any memory format.
        levels: whole numbers >= 1, at least one.
        gamma: weight of the mean, >= 0; 2 as published.

    Returns:
        [B, D] in the dtype of feats. Differentiable in feats: a window's gradient goes to its first maximum.

    Raises:
        TypeError, ValueError: an argument outside this contract, named; a map smaller than a level among them (the
            published code fails there too: its windows would have no pixels).

    Source: Ru et al., "Learning Visual Words for Weakly-Supervised Semantic Segmentation", IJCAI 2021, section 3.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> feats = torch.tensor([[[[0.0, 4.0], [2.0, 2.0]]]])
        >>> wk.hspp(feats, levels=(1, 2), gamma=2.0).item()  # mean 2 twice, maximum 4, mean of four maxima 2
        2.5
    """
    _check.tensor("feats", feats, "B D H W")
    gamma = _check.number("gamma", gamma, "a number >= 0", least=0)
    dim, height, width = feats.shape[1:]
    if dim == 0:
        raise ValueError(f"feats must have at least one channel (D >= 1), got {_check.describe(feats)}")
    if not isinstance(levels, (tuple, list)):
        raise TypeError(f"levels must be a tuple or list of whole numbers >= 1, got {_check.describe(levels)}")
    if not levels:
        raise ValueError("levels must be one whole number >= 1 or more, got none")
    for level in levels:
        _check.whole("levels", level, "whole numbers >= 1", least=1)
        if level > height or level > width:
            raise ValueError(
                f"feats must have at least {level} rows and columns for level {level}, got {_check.describe(feats)}"
            )
    if height * width > _MOST_PIXELS:
        raise ValueError(f"feats must have fewer than 2^31 pixels a channel, got {_check.describe(feats)}")
    if not _dispatch.runs_native("hspp", feats):
        return reference.hspp(feats, levels=levels, gamma=gamma)
    if _dispatch.calls_directly(feats):
        kernel = _hspp_cuda if feats.is_cuda else _hspp_cpu
        return kernel(feats, list(levels), gamma, False)[0]
    return torch.ops.wsss_kernels.hspp(feats, list(levels), gamma, True)[0]


def windows(height: int, width: int, levels: Sequence[int]) -> int:
    """How many windows all levels have together."""
    return sum((height // (height // level)) * (width // (width // level)) for level in levels)


# The second output: [B, D, windows] int32, the pixel of each window's first maximum; empty where it is not wanted.
_dispatch.LIBRARY.define("hspp(Tensor feats, int[] levels, float gamma, bool keep_places) -> (Tensor, Tensor)")
_dispatch.LIBRARY.define(
    "hspp_backward(Tensor grad, Tensor places, SymInt height, SymInt width, int[] levels, float gamma) -> Tensor"
)


def _hspp_cpu(feats: Tensor, levels: list[int], gamma: float, keep_places: bool) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    batch, dim, height, width = feats.shape
    x = _dispatch.as_kernel_input(feats)
    out = torch.empty(batch, dim)
    count = windows(height, width, levels) if keep_places else 0
    places = torch.empty(batch, dim, count, dtype=torch.int32)
    _dispatch.native.hspp(
        x.data_ptr(), out.data_ptr(), places.data_ptr() if keep_places else 0, batch * dim, height, width, levels,
        gamma, torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, feats.dtype), places


def _hspp_backward_cpu(
    grad: Tensor, places: Tensor, height: int, width: int, levels: list[int], gamma: float
) -> Tensor:
    assert _dispatch.native is not None
    batch, dim = grad.shape
    g = _dispatch.as_kernel_input(grad)
    out = torch.empty(batch, dim, height, width)
    _dispatch.native.hspp_backward(
        g.data_ptr(), places.contiguous().data_ptr(), out.data_ptr(), batch * dim, height, width, levels, gamma,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, grad.dtype)


def _hspp_cuda(feats: Tensor, levels: list[int], gamma: float, keep_places: bool) -> tuple[Tensor, Tensor]:
    from wsss_kernels.triton.hspp import hspp

    return hspp(feats, levels, gamma, keep_places)


def _hspp_backward_cuda(
    grad: Tensor, places: Tensor, height: int, width: int, levels: list[int], gamma: float
) -> Tensor:
    from wsss_kernels.triton.hspp import hspp_backward

    return hspp_backward(grad, places, height, width, levels, gamma)


def _hspp_fake(feats: Tensor, levels: list[int], gamma: float, keep_places: bool) -> tuple[Tensor, Tensor]:
    batch, dim, height, width = feats.shape
    count = windows(height, width, levels) if keep_places else 0
    return feats.new_empty(batch, dim), feats.new_empty(batch, dim, count, dtype=torch.int32)


def _hspp_backward_fake(grad: Tensor, places: Tensor, height: int, width: int, *_: object) -> Tensor:
    return grad.new_empty(*grad.shape, height, width)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    feats, levels, gamma, _ = inputs
    ctx.arguments = (*feats.shape[2:], levels, gamma)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    grad_feats = torch.ops.wsss_kernels.hspp_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return grad_feats, None, None, None


_dispatch.LIBRARY.impl("hspp", _hspp_cpu, "CPU")
_dispatch.LIBRARY.impl("hspp_backward", _hspp_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("hspp", _hspp_cuda, "CUDA")
_dispatch.LIBRARY.impl("hspp_backward", _hspp_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::hspp", _hspp_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::hspp_backward", _hspp_backward_fake, lib=_dispatch.LIBRARY)
torch.library.register_autograd("wsss_kernels::hspp", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY)
_dispatch.refuse_second_derivative("hspp")
