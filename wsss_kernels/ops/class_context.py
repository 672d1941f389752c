"""Class contexts of an image: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference
from wsss_kernels.ops.mask_vote import INTEGERS


def class_context(
    feats: Tensor, confidence: Tensor, *, threshold: float, assign: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum up each class of an image in one feature vector: the mean of its confident pixels, weighted by confidence.

        w_cp = confidence_cp where confidence_cp > threshold and assign_p = c, else 0
        prototypes_c = sum over p of w_cp feats_p / (weights_c + 1e-5),  weights_c = sum over p of w_cp

    Args:
        feats: [B, D, H, W], D >= 1; float16, bfloat16, float32 (float32 arithmetic, sums in double precision on the
            CPU), or float64 (the reference).
        confidence: [B, C, H, W], same H and W; any floating point dtype. A constant for the gradient.
        threshold: finite number; published: 0.5 of a confidence in 0..1.
        assign: [B, H, W] integers, the class of each pixel; a number outside 0..C-1 is of none. None: the most
            confident, ties to the lowest.

    Returns:
        prototypes [B, C, D] in the dtype of feats, 0 for a class without pixels, differentiable once in feats (float64:
        any order); and weights [B, C], a constant (published: a prototype counts where its weight is above 1). NaN in
        confidence counts for no class; features of pixels that do not count are never read.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: context extractor of Fan and Zhang, Memory-based Cross-image Contexts, TPAMI 2022.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> feats = torch.tensor([[[[2.0, 4.0, 100.0]]]])
        >>> confidence = torch.tensor([[[[0.9, 0.9, 0.2]], [[0.1, 0.0, 0.4]]]])
        >>> prototypes, weights = wk.class_context(feats, confidence, threshold=0.5)
        >>> round(prototypes[0, 0, 0].item(), 3), prototypes[0, 1, 0].item(), round(weights[0, 0].item(), 3)
        (3.0, 0.0, 1.8)
    """
    _check.tensor("feats", feats, "B D H W")
    _check.tensor("confidence", confidence, "B C H W")
    batch, dim, height, width = feats.shape
    if dim == 0:
        raise ValueError(f"feats must have D >= 1 channels, got {_check.describe(feats)}")
    if (confidence.shape[0], *confidence.shape[2:]) != (batch, height, width):
        raise ValueError(
            f"confidence must have the batch, height and width of feats {[batch, height, width]}, "
            f"got {_check.describe(confidence)}"
        )
    _check.same_device("feats", feats, "confidence", confidence)
    threshold = _check.number("threshold", threshold, "a finite number (of the confidence)")
    if assign is not None:
        if not isinstance(assign, Tensor) or assign.dtype not in INTEGERS:
            raise TypeError(f"assign must be an integer tensor [B, H, W] or None, got {_check.describe(assign)}")
        if assign.shape != (batch, height, width):
            raise ValueError(f"assign must be [B, H, W] = {[batch, height, width]}, got {_check.describe(assign)}")
        _check.same_device("feats", feats, "assign", assign)
    if not _dispatch.runs_native("class_context", feats):
        return reference.class_context(feats, confidence, threshold=threshold, assign=assign)
    classes = confidence.shape[1]
    weights, chosen = _chosen(confidence.detach(), threshold, assign)
    if _dispatch.calls_directly(feats, confidence):
        out, sums = (_context_cuda if feats.is_cuda else _context_cpu)(feats, weights, chosen, classes)
    else:
        out, sums = torch.ops.wsss_kernels.class_context(feats, weights, chosen, classes)
    return out, sums.to(feats.dtype)


def _chosen(confidence: Tensor, threshold: float, assign: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight [B, H, W] float32 and class [B, H, W] int32 (-1: of none) of every pixel."""
    classes = confidence.shape[1]
    confidence = confidence.to(torch.promote_types(confidence.dtype, torch.float32))
    if classes == 0:
        none = torch.zeros_like(confidence.sum(1), dtype=torch.float32)
        return none, (none - 1).int()
    if assign is None:
        largest = confidence.amax(1)
        number = torch.arange(classes, device=confidence.device, dtype=torch.int32)[:, None, None]
        assign = torch.where(confidence == largest.unsqueeze(1), number, classes).amin(1)
    inside = (assign >= 0) & (assign < classes)
    assign = torch.where(inside, assign, 0).long()
    weights = confidence.gather(1, assign.unsqueeze(1)).squeeze(1)
    counts = inside & (weights > threshold)
    return torch.where(counts, weights, 0.0).float(), torch.where(counts, assign, -1).int()


_dispatch.LIBRARY.define(
    "class_context(Tensor feats, Tensor weights, Tensor chosen, SymInt classes) -> (Tensor, Tensor)"
)
_dispatch.LIBRARY.define("class_context_backward(Tensor grad, Tensor weights, Tensor chosen, Tensor sums) -> Tensor")


def _context_cpu(feats: Tensor, weights: Tensor, chosen: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    batch, dim, height, width = feats.shape
    x, w, c = _dispatch.as_kernel_input(feats), weights.contiguous(), chosen.contiguous()
    out, sums = torch.empty(batch, classes, dim), torch.empty(batch, classes)
    _dispatch.native.class_context(
        x.data_ptr(), w.data_ptr(), c.data_ptr(), out.data_ptr(), sums.data_ptr(), batch, classes, dim, height * width,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, feats.dtype), sums


def _context_backward_cpu(grad: Tensor, weights: Tensor, chosen: Tensor, sums: Tensor) -> Tensor:
    assert _dispatch.native is not None
    batch, classes, dim = grad.shape
    height, width = weights.shape[1:]
    g, w, c = _dispatch.as_kernel_input(grad), weights.contiguous(), chosen.contiguous()
    out = torch.empty(batch, dim, height, width)
    _dispatch.native.class_context_backward(
        g.data_ptr(), w.data_ptr(), c.data_ptr(), sums.contiguous().data_ptr(), out.data_ptr(), batch, classes, dim,
        height * width, torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, grad.dtype)


def _context_cuda(feats: Tensor, weights: Tensor, chosen: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    from wsss_kernels.triton.class_context import class_context

    return class_context(feats, weights, chosen, classes)


def _context_backward_cuda(grad: Tensor, weights: Tensor, chosen: Tensor, sums: Tensor) -> Tensor:
    from wsss_kernels.triton.class_context import class_context_backward

    return class_context_backward(grad, weights, chosen, sums)


def _context_fake(feats: Tensor, weights: Tensor, chosen: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    batch, dim = feats.shape[:2]
    return feats.new_empty(batch, classes, dim), weights.new_empty(batch, classes)


def _context_backward_fake(grad: Tensor, weights: Tensor, chosen: Tensor, sums: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[2], *weights.shape[1:])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, weights, chosen, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(weights, chosen, output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return torch.ops.wsss_kernels.class_context_backward(grad, *ctx.saved_tensors), None, None, None


_dispatch.LIBRARY.impl("class_context", _context_cpu, "CPU")
_dispatch.LIBRARY.impl("class_context", _context_cuda, "CUDA")
_dispatch.LIBRARY.impl("class_context_backward", _context_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("class_context_backward", _context_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::class_context", _context_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::class_context_backward", _context_backward_fake, lib=_dispatch.LIBRARY)
torch.library.register_autograd(
    "wsss_kernels::class_context", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("class_context")
