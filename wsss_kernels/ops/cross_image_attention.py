"""Attention to a memory of other images: contract, checks, registration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference

STATS = 5  # kAttentionStats
PANEL = 64  # kAttentionPanel


def cross_image_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let every pixel of an image attend to a memory of class prototypes that the batch shares.

        s = scale query keys^T over the entries the mask allows,  out = softmax(s over those kept) values

    Kept are of the allowed entries the top_k strongest (ties with the last of them too), and of these the ones whose
    softmax over all allowed entries is at least threshold; their weights sum to 1 again. Forbidden entries are left
    out, not computed and masked: the time follows the number of allowed ones, and what they hold (NaN) is never read.
    Scores live for some queries at a time; the CPU keeps the weights for the gradient where no image allows more than d
    entries (they are less than the query then), else they are computed again. A query with nothing kept gives 0.

    Args:
        query: [B, heads, S, d], d >= 1; float16, bfloat16, float32 (float32 arithmetic), or float64 (the reference).
        keys: [heads, M, d], one memory for the whole batch, never copied for each image, or [B, heads, M, d].
        values: as keys.
        mask: [B, M] bool, True: may be used (the entry's class is in the image). None: all.
        scale: number > 0; None is d**-0.5.
        top_k: whole number >= 1, None is all; above the number of allowed entries it keeps them all.
        threshold: 0 to 1, of a weight; None is 0.
        return_entropy: the result of `attention_entropy` too, found in the same pass.

    Returns:
        [B, heads, S, d], contiguous, in the dtype of query; with return_entropy also the entropy, a number in that
        dtype. Differentiable once in query, keys and values (float64: any order); which entries are kept is a constant
        for the gradient. NaN in a query stays in its row; NaN in an allowed entry reaches every query of the images
        that may use it, in values where its weight is not 0 too.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Fan and Zhang, Memory-based Cross-image Contexts for Weakly Supervised Semantic Segmentation, TPAMI 2022;
    top_k and threshold are ours, for the sparse attention that the paper asks of its entropy.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> pixels, memory = torch.randn(2, 1, 49, 16), torch.randn(1, 12, 16)
        >>> present = torch.tensor([[True] * 4 + [False] * 8, [False] * 12])
        >>> out = wk.cross_image_attention(pixels, memory, memory, mask=present)
        >>> out.shape, out[1].abs().max().item()  # the second image may use nothing
        (torch.Size([2, 1, 49, 16]), 0.0)
    """
    check_memory(query, keys, mask)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values must be a floating point tensor of the shape of keys, got {_check.describe(values)}")
    if values.shape != keys.shape:
        raise ValueError(f"values must have the shape of keys {list(keys.shape)}, got {_check.describe(values)}")
    _check.same_device("query", query, "values", values)
    scale = check_scale(scale)
    top_k, threshold = check_choice(top_k, threshold)
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool, got {_check.describe(return_entropy)}")
    if not runs_native("cross_image_attention", query, keys, values):
        return reference.cross_image_attention(
            query, keys, values, mask=mask, scale=scale, top_k=top_k, threshold=threshold, return_entropy=return_entropy
        )
    arguments = (query, keys, values, mask, scale or 0.0, top_k or 0, threshold or 0.0, return_entropy)
    if _dispatch.calls_directly(query, keys, values):
        out, entropy = (attention_cuda if query.is_cuda else attention_cpu)(*arguments)[:2]
    else:
        out, entropy, _, _ = torch.ops.wsss_kernels.cross_image_attention(*arguments)
    return (out, mean_entropy(entropy, query.dtype)) if return_entropy else out


def check_memory(query: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    _check.tensor("query", query, "B heads S d")
    batch, heads, _, dim = query.shape
    if dim == 0:
        raise ValueError(f"query must have d >= 1 channels, got {_check.describe(query)}")
    contract = "a floating point tensor [heads, M, d] or [B, heads, M, d] with the heads, d (and B) of query"
    if not isinstance(keys, Tensor) or not keys.is_floating_point():
        raise TypeError(f"keys must be {contract}, got {_check.describe(keys)}")
    fits = keys.dim() in (3, 4) and keys.shape[-3] == heads and keys.shape[-1] == dim
    if not fits or (keys.dim() == 4 and keys.shape[0] != batch):
        raise ValueError(f"keys must be {contract} {list(query.shape)}, got {_check.describe(keys)}")
    _check.same_device("query", query, "keys", keys)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor [B, M] or None, got {_check.describe(mask)}")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != keys.shape[-2]:
        raise ValueError(f"mask must be [B, M] = {[batch, keys.shape[-2]]}, got {_check.describe(mask)}")
    _check.same_device("query", query, "mask", mask)


def check_choice(top_k: int | None, threshold: float | None) -> tuple[int | None, float | None]:
    if top_k is not None:
        top_k = _check.whole("top_k", top_k, "a whole number >= 1 or None", least=1)
    if threshold is not None:
        contract = "a number from 0 to 1 (of a weight) or None"
        threshold = _check.number("threshold", threshold, contract, least=0)
        if threshold > 1:
            raise ValueError(f"threshold must be {contract}, got {threshold}")
    return top_k, threshold


def check_scale(scale: float | None) -> float | None:
    return None if scale is None else _check.number("scale", scale, "a number > 0 or None", above=0)


def runs_native(op: str, *tensors: Tensor) -> bool:
    for tensor in tensors:
        if tensor.dtype not in _dispatch.NATIVE_DTYPES:
            return False
    return _dispatch.runs_native(op, tensors[0])


def mean_entropy(entropy: Tensor, dtype: torch.dtype) -> Tensor:
    return (entropy.mean() if entropy.numel() else entropy.sum()).to(dtype)


_dispatch.LIBRARY.define(
    "cross_image_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale, int top_k, "
    "float threshold, bool wants_entropy) -> (Tensor, Tensor, Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "cross_image_attention_backward(Tensor grad, Tensor? grad_entropy, Tensor query, Tensor keys, Tensor values, "
    "Tensor? mask, Tensor out, Tensor stats, Tensor weights, float scale, bool wants_query, bool wants_memory) -> "
    "(Tensor, Tensor, Tensor)"
)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sizes(query: Tensor, keys: Tensor) -> list[int]:
    batch, heads, queries, dim = query.shape
    return [batch, heads, queries, keys.shape[-2], dim, keys.dim() == 3, False, False, False]


def weights_shape(query: Tensor, entries: int) -> list[int]:
    """Of the weights kept for the gradient, of queries [..., S, d]; [0]: none."""
    queries, dim = query.shape[-2:]
    if query.device.type != "cpu" or entries > 8 * dim:
        return [0]
    return [*query.shape[:-2], entries, (queries + PANEL - 1) // PANEL * PANEL]


def room_for_weights(query: Tensor, entries: int) -> Tensor:
    """Zeros. numpy's take no memory until written, and only the part of allowed entries is."""
    return torch.from_numpy(np.zeros(weights_shape(query, entries), dtype=np.float32))


def attention_cpu(
    query: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, scale: float, top_k: int,
    threshold: float, wants_entropy: bool, weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert _dispatch.native is not None
    q, k = _dispatch.as_kernel_input(query), _dispatch.as_kernel_input(keys)
    v = None if values is None else _dispatch.as_kernel_input(values)
    allowed = None if mask is None else mask.contiguous()
    out = torch.empty(q.shape if v is not None else 0)
    entropy = torch.empty(q.shape[:3] if wants_entropy else 0)
    stats = torch.empty(*q.shape[:3], STATS)
    if q.numel():
        _dispatch.native.cross_image_attention(
            q.data_ptr(), [k.data_ptr(), address(v), 0, 0, address(allowed)], 0 if v is None else out.data_ptr(),
            entropy.data_ptr() if wants_entropy else 0, stats.data_ptr(), address(weights), _sizes(q, k),
            scale or q.shape[3] ** -0.5, top_k, threshold, torch.get_num_threads(),
        )  # fmt: skip
    return _dispatch.as_output(out, query.dtype), entropy, stats


def _attention_cpu(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, top_k: int, threshold: float,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = room_for_weights(query, keys.shape[-2])
    return *attention_cpu(query, keys, values, mask, scale, top_k, threshold, wants_entropy, weights), weights


def attention_backward_cpu(
    grad: Tensor, grad_entropy: Tensor | None, query: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None,
    out: Tensor, stats: Tensor, weights: Tensor | None, scale: float, wants_query: bool, wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert _dispatch.native is not None
    q, k = _dispatch.as_kernel_input(query), _dispatch.as_kernel_input(keys)
    v = None if values is None else _dispatch.as_kernel_input(values)
    g = None if values is None else _dispatch.as_kernel_input(grad)
    e = None if grad_entropy is None else _dispatch.as_kernel_input(grad_entropy)
    allowed = None if mask is None else mask.contiguous()
    grad_query = torch.empty(q.shape if wants_query else 0)
    grad_keys = torch.zeros(k.shape if wants_memory else 0)
    grad_values = torch.zeros(k.shape if wants_memory and v is not None else 0)
    if q.numel():
        _dispatch.native.cross_image_attention_backward(
            address(g), address(e), q.data_ptr(), [k.data_ptr(), address(v), 0, 0, address(allowed)], stats.data_ptr(),
            address(weights), [grad_query.data_ptr(), grad_keys.data_ptr(), grad_values.data_ptr(), 0], _sizes(q, k),
            scale or q.shape[3] ** -0.5, torch.get_num_threads(),
        )  # fmt: skip
    return (
        _dispatch.as_output(grad_query, query.dtype),
        _dispatch.as_output(grad_keys, keys.dtype),
        _dispatch.as_output(grad_values, keys.dtype if values is None else values.dtype),
    )


def attention_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from wsss_kernels.triton.cross_image_attention import cross_image_attention

    return cross_image_attention(*arguments)


def _attention_cuda(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *attention_cuda(query, *arguments), query.new_empty(0, dtype=torch.float32)


def attention_backward_cuda(
    grad: Tensor, grad_entropy: Tensor | None, query: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None,
    out: Tensor, stats: Tensor, weights: Tensor | None, *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from wsss_kernels.triton.cross_image_attention import cross_image_attention_backward

    return cross_image_attention_backward(grad, grad_entropy, query, keys, values, mask, out, stats, *arguments)


def _attention_fake(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, top_k: int,
    threshold: float, wants_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = query.shape[:3]
    return (
        query.new_empty(query.shape),
        query.new_empty(rows if wants_entropy else 0, dtype=torch.float32),
        query.new_empty(*rows, STATS, dtype=torch.float32),
        query.new_empty(weights_shape(query, keys.shape[-2]), dtype=torch.float32),
    )


def _attention_backward_fake(
    grad: Tensor, grad_entropy: Tensor | None, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
    out: Tensor, stats: Tensor, weights: Tensor, scale: float, wants_query: bool, wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        query.new_empty(query.shape if wants_query else 0),
        keys.new_empty(keys.shape if wants_memory else 0),
        values.new_empty(values.shape if wants_memory else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, keys, values, mask, ctx.scale, _, _, _ = inputs
    out, _, stats, weights = output
    ctx.mark_non_differentiable(stats, weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, keys, values, mask, out, stats, weights)


def _backward(ctx, grad, grad_entropy, *_):  # type: ignore[no-untyped-def]
    query, keys, values, mask, out, stats, weights = ctx.saved_tensors
    wants_query, wants_keys, wants_values = ctx.needs_input_grad[:3]
    found = torch.ops.wsss_kernels.cross_image_attention_backward(
        torch.zeros_like(out) if grad is None else grad, grad_entropy, query, keys, values, mask, out, stats, weights,
        ctx.scale, wants_query, wants_keys or wants_values,
    )  # fmt: skip
    wanted = (wants_query, wants_keys, wants_values)
    return *(g if wants else None for g, wants in zip(found, wanted, strict=True)), None, None, None, None, None


_dispatch.LIBRARY.impl("cross_image_attention", _attention_cpu, "CPU")
_dispatch.LIBRARY.impl("cross_image_attention", _attention_cuda, "CUDA")
_dispatch.LIBRARY.impl("cross_image_attention_backward", attention_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("cross_image_attention_backward", attention_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::cross_image_attention", _attention_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::cross_image_attention_backward", _attention_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::cross_image_attention", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("cross_image_attention")
