"""Every segment takes its mean score: contract, checks, registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference

INTEGERS = (torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16)
_MOST_PIXELS = 2**31 - 1


def mask_vote(maps: Tensor, segments: Tensor | Sequence[Tensor], *, reduce: str = "mean") -> Tensor:
    """Give every pixel the mean score of its segment, class by class: the map takes the segments' outlines.

    Superpixels (an integer tensor): out[b, c, p] = mean of maps[b, c] over the pixels with p's id. Masks (a list, one
    [m, H, W] of bool an image, which may overlap and leave gaps): each mask takes its mean, and out[b, c, p] is the
    mean of those of the masks that hold p, each with one voice whatever its size. reduce="max" takes the maximum for
    both means. A pixel of no segment (a negative id; in no mask) keeps its own score.

    Sums are taken in one order, in double precision: the same bits for any number of threads. A NaN or infinity
    reaches the segments that hold it, in its own map.

    Args:
        maps: [B, C, H, W], any scale; float16, bfloat16, float32, or float64 (the reference).
        segments: [B, H, W] of int64, int32, int16, int8 or uint8, ids of any size and not necessarily consecutive, each
            image with its own; or a list of B tensors [m_i, H, W] of bool, m_i >= 0 (Segment Anything's masks).
        reduce: "mean" or "max".

    Returns:
        [B, C, H, W], contiguous, in the dtype of maps. A constant for the gradient.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: superpixel and mask voting of refined CAMs, in use since SAM; the rule for overlapping masks is ours.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> scores, left_and_right = torch.tensor([[[[1.0, 3.0, 0.0, 5.0]]]]), torch.tensor([[[7, 7, 7, -1]]])
        >>> wk.mask_vote(scores, left_and_right).flatten().tolist()  # -1: keeps its own
        [1.3333333730697632, 1.3333333730697632, 1.3333333730697632, 5.0]
    """
    _check.tensor("maps", maps, "B C H W")
    _check.choice("reduce", reduce, ("mean", "max"))
    check_segments("segments", segments)
    batch, _, height, width = maps.shape
    if height * width > _MOST_PIXELS:
        raise ValueError(f"maps must have fewer than 2^31 pixels each, got {_check.describe(maps)}")
    if len(segments) != batch:
        raise ValueError(f"segments must be of {batch} images, as maps is, got {len(segments)}")
    for image in [segments] if isinstance(segments, Tensor) else segments:
        _check.same_device("maps", maps, "segments", image)
        if image.shape[1:] != (height, width):
            raise ValueError(
                f"segments must have the height and width of maps ({height}, {width}), got {_check.describe(image)}"
            )
    maps = maps.detach()
    if not _dispatch.runs_native("mask_vote", maps):
        return reference.mask_vote(maps, segments, reduce=reduce)
    maximum = reduce == "max"
    if isinstance(segments, Tensor):
        if segments.dtype.itemsize < 4:
            segments = segments.int()
        if _dispatch.calls_directly(maps, segments):
            return (_segment_vote_cuda if maps.is_cuda else _segment_vote_cpu)(maps, segments, maximum)
        return torch.ops.wsss_kernels.mask_vote(maps, segments, maximum)
    masks = list(segments)
    if _dispatch.calls_directly(maps, *masks):
        return (_mask_vote_cuda if maps.is_cuda else _mask_vote_cpu)(maps, masks, maximum)
    return torch.ops.wsss_kernels.mask_vote_masks(maps, masks, maximum)


def check_segments(name: str, segments: object) -> None:
    """Integers [B, H, W], or a list of bool [m, H, W]."""
    if isinstance(segments, Tensor):
        if segments.dtype in INTEGERS and segments.dim() == 3:
            return
        wrong = ValueError if segments.dtype in INTEGERS else TypeError
    elif isinstance(segments, Sequence) and not isinstance(segments, (str, bytes)):
        for i, masks in enumerate(segments):
            if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
                raise TypeError(f"{name}[{i}] must be a bool tensor [m, H, W] of masks, got {_check.describe(masks)}")
            if masks.dim() != 3:
                raise ValueError(f"{name}[{i}] must be a bool tensor [m, H, W] of masks, got {_check.describe(masks)}")
        return
    else:
        wrong = TypeError
    raise wrong(
        f"{name} must be an integer tensor [B, H, W] of segment ids or a list with the masks of each image, "
        f"bool [m, H, W], got {_check.describe(segments)}"
    )


_dispatch.LIBRARY.define("mask_vote(Tensor maps, Tensor segments, bool maximum) -> Tensor")
_dispatch.LIBRARY.define("mask_vote_masks(Tensor maps, Tensor[] masks, bool maximum) -> Tensor")


def _segment_vote_cpu(maps: Tensor, segments: Tensor, maximum: bool) -> Tensor:
    assert _dispatch.native is not None
    batch, channels, height, width = maps.shape
    x, ids = _dispatch.as_kernel_input(maps), segments.contiguous()
    out = torch.empty_like(x)
    for b in range(batch):
        _dispatch.native.segment_vote(
            x[b].data_ptr(), ids[b].data_ptr(), out[b].data_ptr(), channels, height * width, ids.dtype.itemsize,
            maximum, torch.get_num_threads(),
        )  # fmt: skip
    return _dispatch.as_output(out, maps.dtype)


def _mask_vote_cpu(maps: Tensor, masks: list[Tensor], maximum: bool) -> Tensor:
    assert _dispatch.native is not None
    _, channels, height, width = maps.shape
    x = _dispatch.as_kernel_input(maps)
    out = torch.empty_like(x)
    for b, image in enumerate(masks):
        image = image.contiguous()
        _dispatch.native.mask_vote(
            x[b].data_ptr(), image.data_ptr(), out[b].data_ptr(), channels, height * width, len(image), maximum,
            torch.get_num_threads(),
        )  # fmt: skip
    return _dispatch.as_output(out, maps.dtype)


def _segment_vote_cuda(maps: Tensor, segments: Tensor, maximum: bool) -> Tensor:
    from wsss_kernels.triton.mask_vote import segment_vote

    return segment_vote(maps, segments, maximum)


def _mask_vote_cuda(maps: Tensor, masks: list[Tensor], maximum: bool) -> Tensor:
    from wsss_kernels.triton.mask_vote import mask_vote

    return mask_vote(maps, masks, maximum)


def _vote_fake(maps: Tensor, _: object, maximum: bool) -> Tensor:
    return maps.new_empty(maps.shape)


_dispatch.LIBRARY.impl("mask_vote", _segment_vote_cpu, "CPU")
_dispatch.LIBRARY.impl("mask_vote", _segment_vote_cuda, "CUDA")
_dispatch.LIBRARY.impl("mask_vote_masks", _mask_vote_cpu, "CPU")
_dispatch.LIBRARY.impl("mask_vote_masks", _mask_vote_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::mask_vote", _vote_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::mask_vote_masks", _vote_fake, lib=_dispatch.LIBRARY)
