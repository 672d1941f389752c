"""How evenly queries spread their attention: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _dispatch, reference
from wsss_kernels.ops.cross_image_attention import (
    STATS,
    attention_backward_cpu,
    attention_backward_cuda,
    attention_cpu,
    attention_cuda,
    check_memory,
    check_scale,
    mean_entropy,
    runs_native,
)


def attention_entropy(query: Tensor, keys: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """How evenly the queries spread their attention: 0 where each looks at one entry, log M where at all M alike.

        -mean over images, heads and queries of sum over m of p log(p + 1e-5),  p = softmax(scale query keys^T)

    over the entries the mask allows. The weights are never stored. A query that may use nothing counts 0.

    Args:
        query: [B, heads, S, d], d >= 1; float16, bfloat16, float32 (float32 arithmetic), or float64 (the reference).
        keys: [heads, M, d], shared by the batch, or [B, heads, M, d].
        mask: [B, M] bool, True: may be used. None: all.
        scale: number > 0; None is d**-0.5.

    Returns:
        A number in the dtype of query, 0 without queries. Differentiable once in query and keys (float64: any order).

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: the entropy loss of Fan and Zhang, Memory-based Cross-image Contexts, TPAMI 2022.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> round(wk.attention_entropy(torch.zeros(1, 1, 3, 8), torch.randn(1, 4, 8)).item(), 4)  # log 4
        1.3863
    """
    check_memory(query, keys, mask)
    scale = check_scale(scale)
    if not runs_native("attention_entropy", query, keys):
        return reference.attention_entropy(query, keys, mask=mask, scale=scale)
    arguments = (query, keys, mask, scale or 0.0)
    if _dispatch.calls_directly(query, keys):
        entropy, _ = (_entropy_cuda if query.is_cuda else _entropy_cpu)(*arguments)
    else:
        entropy, _ = torch.ops.wsss_kernels.attention_entropy(*arguments)
    return mean_entropy(entropy, query.dtype)


_dispatch.LIBRARY.define("attention_entropy(Tensor query, Tensor keys, Tensor? mask, float scale) -> (Tensor, Tensor)")
_dispatch.LIBRARY.define(
    "attention_entropy_backward(Tensor grad, Tensor query, Tensor keys, Tensor? mask, Tensor stats, float scale, "
    "bool wants_query, bool wants_keys) -> (Tensor, Tensor)"
)


def _entropy_cpu(query: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Of each query [B, heads, S], and what its gradient needs."""
    return attention_cpu(query, keys, None, mask, scale, 0, 0.0, True)[1:]


def _entropy_cuda(query: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return attention_cuda(query, keys, None, mask, scale, 0, 0.0, True)[1:]


def _entropy_backward_cpu(
    grad: Tensor, query: Tensor, keys: Tensor, mask: Tensor | None, stats: Tensor, scale: float, wants_query: bool,
    wants_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention_backward_cpu(
        query, grad, query, keys, None, mask, query, stats, None, scale, wants_query, wants_keys
    )[:2]


def _entropy_backward_cuda(
    grad: Tensor, query: Tensor, keys: Tensor, mask: Tensor | None, stats: Tensor, scale: float, wants_query: bool,
    wants_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention_backward_cuda(
        query, grad, query, keys, None, mask, query, stats, None, scale, wants_query, wants_keys
    )[:2]


def _entropy_fake(query: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return (
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(*rows, STATS, dtype=torch.float32),
    )


def _entropy_backward_fake(
    grad: Tensor, query: Tensor, keys: Tensor, mask: Tensor | None, stats: Tensor, scale: float, wants_query: bool,
    wants_keys: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape if wants_query else 0), keys.new_empty(keys.shape if wants_keys else 0)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, keys, mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, keys, mask, output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    wanted = ctx.needs_input_grad[:2]
    found = torch.ops.wsss_kernels.attention_entropy_backward(grad, *ctx.saved_tensors, ctx.scale, *wanted)
    return *(g if wants else None for g, wants in zip(found, wanted, strict=True)), None, None


_dispatch.LIBRARY.impl("attention_entropy", _entropy_cpu, "CPU")
_dispatch.LIBRARY.impl("attention_entropy", _entropy_cuda, "CUDA")
_dispatch.LIBRARY.impl("attention_entropy_backward", _entropy_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("attention_entropy_backward", _entropy_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::attention_entropy", _entropy_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::attention_entropy_backward", _entropy_backward_fake, lib=_dispatch.LIBRARY)
torch.library.register_autograd(
    "wsss_kernels::attention_entropy", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("attention_entropy")
