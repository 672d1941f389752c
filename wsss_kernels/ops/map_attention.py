"""`cross_image_attention` of a feature map, channels first and with biases: what `CrossImageAttention` computes."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _dispatch
from wsss_kernels.ops.cross_image_attention import (
    STATS,
    address,
    check_choice,
    check_memory,
    cross_image_attention,
    mean_entropy,
    room_for_weights,
    runs_native,
    weights_shape,
)


def map_attention(
    feats: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor, out_bias: Tensor, *, mask: Tensor | None,
    scale: float, top_k: int | None, threshold: float | None, return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The heads' sum of softmax(scale (f . keys + key_bias)) values, plus out_bias, for each pixel f of feats.

    feats [B, d, S], keys and values [heads, M, d], key_bias [heads, M], out_bias [d] -> [B, d, S] and the entropy. With
    one head the CPU's kernel takes the map as it lies, channels first or last; else the bias is one more channel, on
    which every f is 1.
    """
    heads, _, dim = keys.shape
    if heads > 1 or feats.device.type != "cpu" or not runs_native("cross_image_attention", feats, keys, values):
        query = torch.nn.functional.pad(feats.transpose(1, 2), (0, 1), value=1.0)[:, None].expand(-1, heads, -1, -1)
        found = cross_image_attention(
            query, torch.cat([keys, key_bias[..., None]], -1), torch.nn.functional.pad(values, (0, 1)), mask=mask,
            scale=scale, top_k=top_k, threshold=threshold, return_entropy=return_entropy,
        )  # fmt: skip
        out, entropy = found if isinstance(found, tuple) else (found, None)
        out = (out.flatten(0, 1) if heads == 1 else out.sum(1))[..., :dim] + out_bias.to(out.dtype)
        return out.transpose(1, 2), entropy
    check_memory(feats.transpose(1, 2)[:, None], keys, mask)
    top_k, threshold = check_choice(top_k, threshold)
    out, each, _, _ = torch.ops.wsss_kernels.map_attention(
        feats, keys[0], values[0], key_bias[0], out_bias, mask, scale, top_k or 0, threshold or 0.0, return_entropy
    )
    return out, mean_entropy(each, feats.dtype) if return_entropy else None


_dispatch.LIBRARY.define(
    "map_attention(Tensor feats, Tensor keys, Tensor values, Tensor key_bias, Tensor out_bias, Tensor? mask, "
    "float scale, int top_k, float threshold, bool wants_entropy) -> (Tensor, Tensor, Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "map_attention_backward(Tensor grad, Tensor? grad_entropy, Tensor feats, Tensor keys, Tensor values, "
    "Tensor key_bias, Tensor? mask, Tensor stats, Tensor weights, float scale, bool wants_feats, bool wants_memory) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def _as_it_lies(feats: Tensor) -> tuple[Tensor, bool]:
    """float32, and whether the channels are first or last in memory."""
    last = feats.transpose(1, 2)
    if last.is_contiguous() and not feats.is_contiguous():
        return _dispatch.as_kernel_input(last), False
    return _dispatch.as_kernel_input(feats), True


def _sizes(feats: Tensor, keys: Tensor, *channels_first: bool) -> list[int]:
    """channels_first: feats, gradient, result."""
    batch, dim, queries = feats.shape
    return [batch, 1, queries, len(keys), dim, True, *channels_first]


def _map_attention_cpu(
    feats: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor, out_bias: Tensor, mask: Tensor | None, scale: float,
    top_k: int, threshold: float, wants_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert _dispatch.native is not None
    x, first = _as_it_lies(feats)
    k, v, bias, start = map(_dispatch.as_kernel_input, (keys, values, key_bias, out_bias))
    allowed = None if mask is None else mask.contiguous()
    batch, _, queries = feats.shape
    out = torch.empty(feats.shape)
    entropy = torch.empty((batch, queries) if wants_entropy else 0)
    stats = torch.empty(batch, queries, STATS)
    weights = room_for_weights(feats.transpose(1, 2), len(keys))
    if x.numel():
        _dispatch.native.cross_image_attention(
            x.data_ptr(), [k.data_ptr(), v.data_ptr(), bias.data_ptr(), start.data_ptr(), address(allowed)],
            out.data_ptr(), entropy.data_ptr() if wants_entropy else 0, stats.data_ptr(), weights.data_ptr(),
            _sizes(feats, k, first, True, True), scale, top_k, threshold, torch.get_num_threads(),
        )  # fmt: skip
    return _dispatch.as_output(out, feats.dtype), entropy, stats, weights


def _map_attention_backward_cpu(
    grad: Tensor, grad_entropy: Tensor | None, feats: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor,
    mask: Tensor | None, stats: Tensor, weights: Tensor, scale: float, wants_feats: bool, wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert _dispatch.native is not None
    (g, grad_first), (x, first) = _as_it_lies(grad), _as_it_lies(feats)
    k, v, bias = map(_dispatch.as_kernel_input, (keys, values, key_bias))
    e = None if grad_entropy is None else _dispatch.as_kernel_input(grad_entropy)
    allowed = None if mask is None else mask.contiguous()
    of_feats = torch.empty(feats.shape if wants_feats else 0)
    of_keys, of_values, of_bias = (torch.zeros(t.shape if wants_memory else 0) for t in (k, v, bias))
    if x.numel():
        _dispatch.native.cross_image_attention_backward(
            g.data_ptr(), address(e), x.data_ptr(),
            [k.data_ptr(), v.data_ptr(), bias.data_ptr(), 0, address(allowed)], stats.data_ptr(), weights.data_ptr(),
            [t.data_ptr() for t in (of_feats, of_keys, of_values, of_bias)],
            _sizes(feats, k, first, grad_first, True), scale, torch.get_num_threads(),
        )  # fmt: skip
    found = zip((of_feats, of_keys, of_values, of_bias), (feats, keys, values, key_bias), strict=True)
    a, b, c, d = (_dispatch.as_output(gradient, like.dtype) for gradient, like in found)
    return a, b, c, d


def _map_attention_fake(
    feats: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor, out_bias: Tensor, mask: Tensor | None, scale: float,
    top_k: int, threshold: float, wants_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, queries = feats.shape
    return (
        feats.new_empty(feats.shape),
        feats.new_empty((batch, queries) if wants_entropy else 0, dtype=torch.float32),
        feats.new_empty(batch, queries, STATS, dtype=torch.float32),
        feats.new_empty(weights_shape(feats.transpose(1, 2), len(keys)), dtype=torch.float32),
    )


def _map_attention_backward_fake(
    grad: Tensor, grad_entropy: Tensor | None, feats: Tensor, keys: Tensor, values: Tensor, key_bias: Tensor,
    mask: Tensor | None, stats: Tensor, weights: Tensor, scale: float, wants_feats: bool, wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        feats.new_empty(feats.shape if wants_feats else 0),
        keys.new_empty(keys.shape if wants_memory else 0),
        values.new_empty(values.shape if wants_memory else 0),
        key_bias.new_empty(key_bias.shape if wants_memory else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    feats, keys, values, key_bias, _, mask, ctx.scale, _, _, _ = inputs
    _, _, stats, weights = output
    ctx.mark_non_differentiable(stats, weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feats, keys, values, key_bias, mask, stats, weights)


def _backward(ctx, grad, grad_entropy, *_):  # type: ignore[no-untyped-def]
    feats = ctx.saved_tensors[0]
    grad = torch.zeros_like(feats) if grad is None else grad
    wanted = ctx.needs_input_grad[:5]
    found = torch.ops.wsss_kernels.map_attention_backward(
        grad, grad_entropy, *ctx.saved_tensors, ctx.scale, wanted[0], any(wanted[1:4])
    )
    # The bias takes the same part in every pixel.
    grads = [g if wants else None for g, wants in zip(found, wanted[:4], strict=True)]
    return *grads, grad.sum((0, 2)) if wanted[4] else None, None, None, None, None, None


_dispatch.LIBRARY.impl("map_attention", _map_attention_cpu, "CPU")
_dispatch.LIBRARY.impl("map_attention_backward", _map_attention_backward_cpu, "CPU")
torch.library.register_fake("wsss_kernels::map_attention", _map_attention_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::map_attention_backward", _map_attention_backward_fake, lib=_dispatch.LIBRARY)
torch.library.register_autograd(
    "wsss_kernels::map_attention", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("map_attention")
