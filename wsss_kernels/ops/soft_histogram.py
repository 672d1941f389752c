"""Soft histogram of pixels over a codebook of visual words: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference


def soft_histogram(feats: Tensor, codebook: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """How often each visual word of a codebook occurs in an image, softly, and which words win a pixel.

    * s[b, m, p] = cos(codebook[m], feats[b, :, p]), 0 where either is a zero vector (not longer than 1e-12)
    * histogram[b, m] = sum over pixels of softmax_m(temperature * s); an image's bins add up to H W
    * assignment[b, p] = the word of the largest cosine, in float32, the lowest index among equals
    * words[b, m] = some pixel is assigned to m

    One pass: the scores are never stored, backward computes them again. An image without pixels has zeros and no words.
    A NaN or infinite feature makes the histogram of its image NaN (its pixel goes to word 0); one in a word makes every
    histogram NaN (and takes every pixel). A pixel's or word's squares must add up to less than 3e38.

    Args:
        feats: [B, D, H, W] features of any scale, D >= 1; float16, bfloat16, float32 (float32 arithmetic), or float64
            (the reference). Any memory format.
        codebook: [M, D] the words, M >= 1, of any length and any of these dtypes: a float32 parameter beside features
            from autocast is as welcome.
        temperature: multiplies the cosines, > 0; 1 as published, where the softmax is nearly even.

    Returns:
        histogram [B, M] in the dtype of feats, differentiable in feats (detach them as published: the histogram then
        trains the codebook alone) and codebook; words [B, M] bool; assignment [B, H, W] int64.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ru et al., "Learning Visual Words for Weakly-Supervised Semantic Segmentation", IJCAI 2021, section 3; the
    temperature is that of the journal version (IJCV 2022). The published code's zero vectors pass a gradient of 1e12
    times its own; ours pass none.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> feats = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # two pixels: along x, along y
        >>> histogram, words, assignment = wk.soft_histogram(feats, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]))
        >>> words.tolist(), assignment.tolist()
        ([[True, True, False]], [[[1, 0]]])
    """
    _check.tensor("feats", feats, "B D H W")
    _check.tensor("codebook", codebook, "M D")
    temperature = _check.number("temperature", temperature, "a number > 0", above=0)
    if feats.shape[1] == 0:
        raise ValueError(f"feats must have at least one channel (D >= 1), got {_check.describe(feats)}")
    if codebook.shape[0] == 0 or codebook.shape[1] != feats.shape[1]:
        raise ValueError(
            f"codebook must hold at least one word of {feats.shape[1]} channels, as feats has, "
            f"got {_check.describe(codebook)}"
        )
    _check.same_device("feats", feats, "codebook", codebook)
    exact = codebook.dtype not in _dispatch.NATIVE_DTYPES
    if exact or not _dispatch.runs_native("soft_histogram", feats):
        return reference.soft_histogram(feats, codebook, temperature=temperature)
    if _dispatch.calls_directly(feats, codebook):
        kernel = _soft_histogram_cuda if feats.is_cuda else _soft_histogram_cpu
        return kernel(feats, codebook, temperature)[:3]
    return torch.ops.wsss_kernels.soft_histogram(feats, codebook, temperature)[:3]


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# The last two outputs, [B, H, W], are kept for the backward: 1 / |f| and the log of the softmax's denominator.
_dispatch.LIBRARY.define(
    "soft_histogram(Tensor feats, Tensor codebook, float temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "soft_histogram_backward(Tensor grad, Tensor feats, Tensor codebook, Tensor inverse_norm, Tensor log_sum, "
    "float temperature, bool wants_feats, bool wants_codebook) -> (Tensor, Tensor)"
)


def _soft_histogram_cpu(feats: Tensor, codebook: Tensor, temperature: float) -> _Outputs:
    assert _dispatch.native is not None
    batch, dim, height, width = feats.shape
    x, c = _dispatch.as_kernel_input(feats), _dispatch.as_kernel_input(codebook)
    histogram = torch.empty(batch, len(c))
    words = torch.empty(batch, len(c), dtype=torch.bool)
    assignment = torch.empty(batch, height, width, dtype=torch.int64)
    inverse_norm, log_sum = (torch.empty(batch, height, width) for _ in range(2))
    _dispatch.native.soft_histogram(
        x.data_ptr(), c.data_ptr(), histogram.data_ptr(), words.data_ptr(), assignment.data_ptr(),
        inverse_norm.data_ptr(), log_sum.data_ptr(), batch, dim, height * width, len(c), temperature,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(histogram, feats.dtype), words, assignment, inverse_norm, log_sum


def _soft_histogram_backward_cpu(
    grad: Tensor,
    feats: Tensor,
    codebook: Tensor,
    inverse_norm: Tensor,
    log_sum: Tensor,
    temperature: float,
    wants_feats: bool,
    wants_codebook: bool,
) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    batch, dim, height, width = feats.shape
    grad, x, c, inverse_norm, log_sum = map(_dispatch.as_kernel_input, (grad, feats, codebook, inverse_norm, log_sum))
    grad_feats = torch.empty_like(x) if wants_feats else x.new_empty(0)
    grad_codebook = torch.empty_like(c) if wants_codebook else c.new_empty(0)
    _dispatch.native.soft_histogram_backward(
        grad.data_ptr(), x.data_ptr(), c.data_ptr(), inverse_norm.data_ptr(), log_sum.data_ptr(),
        grad_feats.data_ptr(), grad_codebook.data_ptr(), batch, dim, height * width, len(c), temperature,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(grad_feats, feats.dtype), _dispatch.as_output(grad_codebook, codebook.dtype)


def _soft_histogram_cuda(feats: Tensor, codebook: Tensor, temperature: float) -> _Outputs:
    from wsss_kernels.triton.soft_histogram import soft_histogram

    return soft_histogram(feats, codebook, temperature)


def _soft_histogram_backward_cuda(
    grad: Tensor,
    feats: Tensor,
    codebook: Tensor,
    inverse_norm: Tensor,
    log_sum: Tensor,
    temperature: float,
    wants_feats: bool,
    wants_codebook: bool,
) -> tuple[Tensor, Tensor]:
    from wsss_kernels.triton.soft_histogram import soft_histogram_backward

    return soft_histogram_backward(
        grad, feats, codebook, inverse_norm, log_sum, temperature, wants_feats, wants_codebook
    )


def _soft_histogram_fake(feats: Tensor, codebook: Tensor, temperature: float) -> _Outputs:
    batch, _, height, width = feats.shape
    histogram = feats.new_empty(batch, codebook.shape[0])
    assignment = feats.new_empty(batch, height, width, dtype=torch.int64)
    inverse_norm, log_sum = (feats.new_empty(batch, height, width, dtype=torch.float32) for _ in range(2))
    return histogram, torch.empty_like(histogram, dtype=torch.bool), assignment, inverse_norm, log_sum


def _soft_histogram_backward_fake(
    grad: Tensor,
    feats: Tensor,
    codebook: Tensor,
    inverse_norm: Tensor,
    log_sum: Tensor,
    temperature: float,
    wants_feats: bool,
    wants_codebook: bool,
) -> tuple[Tensor, Tensor]:
    return (
        feats.new_empty(feats.shape if wants_feats else (0,)),
        codebook.new_empty(codebook.shape if wants_codebook else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    feats, codebook, ctx.temperature = inputs
    _, words, assignment, inverse_norm, log_sum = output
    ctx.mark_non_differentiable(words, assignment, inverse_norm, log_sum)
    ctx.save_for_backward(feats, codebook, inverse_norm, log_sum)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    wants_feats, wants_codebook = ctx.needs_input_grad[:2]
    grad_feats, grad_codebook = torch.ops.wsss_kernels.soft_histogram_backward(
        grad, *ctx.saved_tensors, ctx.temperature, wants_feats, wants_codebook
    )
    return grad_feats if wants_feats else None, grad_codebook if wants_codebook else None, None


_dispatch.LIBRARY.impl("soft_histogram", _soft_histogram_cpu, "CPU")
_dispatch.LIBRARY.impl("soft_histogram_backward", _soft_histogram_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("soft_histogram", _soft_histogram_cuda, "CUDA")
_dispatch.LIBRARY.impl("soft_histogram_backward", _soft_histogram_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::soft_histogram", _soft_histogram_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::soft_histogram_backward", _soft_histogram_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::soft_histogram", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("soft_histogram")
