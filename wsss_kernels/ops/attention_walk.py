"""Walk of maps over a transformer's attention: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference

_TINY = torch.finfo(torch.float32).tiny


def attention_walk(
    maps: Tensor,
    attention: Tensor,
    *,
    sinkhorn: int = 3,
    squarings: int = 1,
    box_threshold: float | None = 0.4,
) -> Tensor:
    """Let every map spread along a transformer's attention between its patch tokens.

    With T = attention, its columns divided by their sums, then its rows by theirs, `sinkhorn` times, and
    S = (T + T^t) / 2, each map becomes

        S^(2^squarings) (box * map)

    box is 1 inside the smallest rectangle round each 8-connected region of map > box_threshold * max(map), else 0: what
    lies far from every strong response has no say. A token whose row or column of attention sums to 0 (under 1e-38)
    gives nothing that way; attention of zeros gives zeros, never NaN. NaN and infinity stay in their map, from the
    attention in their image; NaN belongs to no region, and the maximum is the largest finite value (one <= 0 has no
    region, so the map becomes 0).

    Neither T nor S nor its squares are formed where products with the maps are cheaper: the sums are found as two
    vectors that scale rows and columns, and attention is read only.

    Args:
        maps: [B, C, h, w], any scale; float16, bfloat16, float32, or float64 (the reference).
        attention: [B, n, n] with n = h w, attention[b, i, j] from token i to token j, row by row, >= 0 (looked at on
            the CPU, outside torch.compile). Without class token and registers. A constant for the gradient.
        sinkhorn: times that columns and rows are divided, whole number >= 0; 3 as published.
        squarings: of S, whole number 0..16; 1 as published.
        box_threshold: share of the map's maximum, 0 <= t < 1; 0.4 as published; None = no boxes. The boxes are
            constants for the gradient.

    Returns:
        [B, C, h, w], contiguous, in the dtype of maps. Differentiable once in maps (float64: any order).

    Memory: attention in float32 (no copy if it is that and contiguous), 4 n^2 floats an image only where the powers of
    S are formed.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Lin et al., CLIP is Also an Efficient Segmenter (CLIP-ES), CVPR 2023, section 3.3. There T^2 is formed and
    masked class by class.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.attention_walk(torch.rand(1, 2, 4, 6), torch.rand(1, 24, 24)).shape
        torch.Size([1, 2, 4, 6])
    """
    _check.tensor("maps", maps, "B C h w")
    _check.tensor("attention", attention, "B n n")
    _check.same_device("maps", maps, "attention", attention)
    _check.whole("sinkhorn", sinkhorn, "a whole number >= 0", least=0)
    _check.whole("squarings", squarings, "a whole number in 0..16", least=0, most=16)
    if box_threshold is not None:
        contract = "a number in 0 <= t < 1 (share of the map's maximum) or None"
        box_threshold = _check.number("box_threshold", box_threshold, contract, least=0)
        if box_threshold >= 1:
            raise ValueError(f"box_threshold must be {contract}, got {box_threshold!r}")
    batch, _, height, width = maps.shape
    expected = (batch, height * width, height * width)
    if attention.shape != expected:
        raise ValueError(
            f"attention must be [B, n, n] = {list(expected)} for these maps (without class token), "
            f"got {_check.describe(attention)}"
        )
    attention = attention.detach()
    if attention.device.type == "cpu" and not torch.compiler.is_compiling() and attention.numel():
        least = attention.amin().item()
        if least < 0:
            raise ValueError(f"attention must be >= 0 (after the softmax), got a minimum of {least:g}")
    if attention.dtype == torch.float64 or not _dispatch.runs_native("attention_walk", maps):
        return reference.attention_walk(
            maps, attention, sinkhorn=sinkhorn, squarings=squarings, box_threshold=box_threshold
        )
    arguments = (sinkhorn, squarings, box_threshold)
    if _dispatch.calls_directly(maps, attention):
        return _attention_walk(maps, attention, *arguments)[0]
    return torch.ops.wsss_kernels.attention_walk(maps, attention, *arguments)[0]


_dispatch.LIBRARY.define(
    "attention_walk(Tensor maps, Tensor attention, int sinkhorn, int squarings, float? box_threshold) "
    "-> (Tensor, Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "attention_walk_backward(Tensor grad, Tensor attention, Tensor scales, Tensor boxes, int squarings) -> Tensor"
)


def _attention_walk(
    maps: Tensor, attention: Tensor, sinkhorn: int, squarings: int, box_threshold: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the scales [2, B, n] of rows and columns, and the boxes [B, C, h, w] (no map without a threshold)."""
    x, a = _dispatch.as_kernel_input(maps), _dispatch.as_kernel_input(attention)
    if box_threshold is None:
        boxes = x.new_empty(x.shape[0], 0, *x.shape[2:], dtype=torch.bool)
    else:
        boxes = _region_boxes(x, box_threshold)
        x = x.where(boxes, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        scales = _sinkhorn(a, sinkhorn)
        out = _powers(x, a, scales, squarings)
    return _dispatch.as_output(out, maps.dtype), scales, boxes


def _attention_walk_backward(grad: Tensor, attention: Tensor, scales: Tensor, boxes: Tensor, squarings: int) -> Tensor:
    """S and its powers are symmetric: the same walk, boxed at its end."""
    x, a = _dispatch.as_kernel_input(grad), _dispatch.as_kernel_input(attention)
    with torch.autocast(x.device.type, enabled=False):
        out = _powers(x, a, scales, squarings)
    if boxes.shape == out.shape:
        out = out.where(boxes, 0.0)
    return _dispatch.as_output(out, grad.dtype)


def _sinkhorn(attention: Tensor, times: int) -> Tensor:
    """rows, columns [2, B, n] such that T = diag(rows) attention diag(columns)."""
    rows = columns = attention.new_ones(attention.shape[0], 1, attention.shape[1])
    for _ in range(times):
        columns = columns * _inverse(columns * (rows @ attention))
        rows = rows * _inverse(rows * (columns @ attention.mT))
    return torch.stack([rows[:, 0], columns[:, 0]])


def _inverse(totals: Tensor) -> Tensor:
    return torch.where(totals >= _TINY, 1 / totals, 0.0)


def _powers(maps: Tensor, attention: Tensor, scales: Tensor, squarings: int) -> Tensor:
    """S^(2^squarings) on every map, by the cheapest mixture of squares of S and products with the maps."""
    channels, n = maps.shape[1], attention.shape[1]
    if maps.numel() == 0:
        return maps.clone()
    x, rows, columns = maps.flatten(2), scales[0][:, None], scales[1][:, None]
    # Multiplications over n^2: forming S, which is all memory, takes as long as products with over a hundred maps, each
    # square costs n, a product with S costs a map one, a product without forming it two.
    formed = [128 + squares * n + channels * 2 ** (squarings - squares) for squares in range(squarings + 1)]
    unformed = 2 * channels * 2**squarings
    if unformed <= min(formed):
        for _ in range(2**squarings):
            x = 0.5 * (rows * ((columns * x) @ attention.mT) + columns * ((rows * x) @ attention))
        return x.unflatten(2, maps.shape[2:])
    squares = formed.index(min(formed))
    s = attention * (0.5 * rows.mT) * columns
    s = s + s.mT
    for _ in range(squares):
        s = s @ s
    for _ in range(2 ** (squarings - squares)):
        x = x @ s  # S is symmetric
    return x.unflatten(2, maps.shape[2:])


def _region_boxes(maps: Tensor, threshold: float) -> Tensor:
    if maps.is_cuda:
        from wsss_kernels.triton.region_boxes import region_boxes

        return region_boxes(maps, threshold)
    assert _dispatch.native is not None
    out = torch.empty(maps.shape, dtype=torch.bool)
    _dispatch.native.region_boxes(maps.data_ptr(), out.data_ptr(), *maps.shape, threshold, torch.get_num_threads())
    return out


def _attention_walk_fake(
    maps: Tensor, attention: Tensor, sinkhorn: int, squarings: int, box_threshold: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = maps.shape
    scales = maps.new_empty(2, batch, height * width, dtype=torch.float32)
    boxes = maps.new_empty(batch, 0 if box_threshold is None else channels, height, width, dtype=torch.bool)
    return maps.new_empty(maps.shape), scales, boxes


def _attention_walk_backward_fake(grad: Tensor, *_: object) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, attention, _, ctx.squarings, _ = inputs
    _, scales, boxes = output
    ctx.mark_non_differentiable(scales, boxes)
    ctx.save_for_backward(attention, scales, boxes)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    grad_maps = torch.ops.wsss_kernels.attention_walk_backward(grad, *ctx.saved_tensors, ctx.squarings)
    return grad_maps, None, None, None, None


for _device in ("CPU", "CUDA"):
    _dispatch.LIBRARY.impl("attention_walk", _attention_walk, _device)
    _dispatch.LIBRARY.impl("attention_walk_backward", _attention_walk_backward, _device)
torch.library.register_fake("wsss_kernels::attention_walk", _attention_walk_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::attention_walk_backward", _attention_walk_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::attention_walk", _backward, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
_dispatch.refuse_second_derivative("attention_walk")
