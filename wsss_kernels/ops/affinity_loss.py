"""AffinityNet's loss, from affinities or straight from features: contract, checks, registration."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch, reference
from wsss_kernels.neighbours import check_radius, neighbour_count
from wsss_kernels.ops.local_affinity import (
    _local_affinity_backward_cuda,
    _local_affinity_cpu,
    _local_affinity_cuda,
    check_arguments,
)

LABELS = (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8)
_WIDE = (torch.int64, torch.int32, torch.uint8)  # what the kernels read as it is
_CLASSES = 3  # like pairs of background, of foreground; unlike pairs


def affinity_loss(
    affinity: Tensor, labels: Tensor, *, radius: int = 5, border: str = "cropped", ignore_index: int = 255
) -> Tensor:
    """How far affinities are from the labels: 1 between pixels of one class, 0 between two.

        cost of a pair of equal labels: -log(a + 1e-5); of unequal ones: -log(1 - a + 1e-5)
        loss = bg / 4 + fg / 4 + neg / 2

    bg, fg and neg are the mean costs of the pairs of background (both labels 0), of one foreground class, and of
    different labels, over the whole batch: a sum over (their number + 1e-5). A kind of pairs that does not occur adds
    0. A pair is a pixel and its neighbour k; the pairs that lead outside the map do not exist.

    Sums are taken in one order, in double precision: the same bits for any number of threads. NaN in a pair that counts
    makes the loss NaN; one in any other pair has no effect.

    Args:
        affinity: [B, K, H, W] as local_affinity or boundary_affinity gives it; float16, bfloat16, float32 (float32
            arithmetic), or float64 (the reference). Values beyond 0..1 count as the nearer end, without a gradient.
        labels: [B, H, W] of int64, int32, int16, int8 or uint8; 0 is the background. Negative ones are ignored.
        radius: pixels, 1..16, of the affinity; 5 as published (34 neighbours).
        border: "cropped", as published, takes no pair with its source in the last radius - 1 rows or in the first or
            last radius - 1 columns; "full" takes every in-map pair.
        ignore_index: label of pixels that make no pair.

    Returns:
        A number in the dtype of affinity; 0 without pairs. Differentiable once in affinity.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn and Kwak, CVPR 2018, section 3.2; the shares 1/4, 1/4, 1/2 and the counts over the whole batch are the
    published code's. Its 1 + 1e-5 - a is taken as (1 - a) + 1e-5, which float32 can hold.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> affinity = wk.local_affinity(torch.rand(2, 8, 12, 16))
        >>> bool(wk.affinity_loss(affinity, torch.randint(0, 3, (2, 12, 16))) > 0)
        True
    """
    _check.tensor("affinity", affinity, "B K H W")
    check_radius(radius)
    _check.choice("border", border, ("full", "cropped"))
    if affinity.shape[1] != neighbour_count(radius):
        raise ValueError(
            f"affinity must have the {neighbour_count(radius)} neighbours of radius {radius} (axis 1), "
            f"got {_check.describe(affinity)}"
        )
    labels = _checked_labels("affinity", affinity, labels, ignore_index)
    if not _dispatch.runs_native("affinity_loss", affinity):
        return reference.affinity_loss(affinity, labels, radius=radius, border=border, ignore_index=ignore_index)
    arguments = (radius, border == "cropped", ignore_index)
    if _dispatch.calls_directly(affinity, labels):
        kernel = _affinity_loss_cuda if affinity.is_cuda else _affinity_loss_cpu
        return kernel(affinity, labels, *arguments)[0]
    return torch.ops.wsss_kernels.affinity_loss(affinity, labels, *arguments)[0]


def affinity_loss_from_features(
    feats: Tensor,
    labels: Tensor,
    *,
    radius: int = 5,
    metric: str = "l1",
    scale: float | str = 1.0,
    border: str = "cropped",
    ignore_index: int = 255,
) -> Tensor:
    """`affinity_loss` of `local_affinity` of feats, as one op.

        loss = affinity_loss(local_affinity(feats, radius, metric=metric, scale=scale, border=border), labels, ...)

    Kept for the backward pass are feats and the float32 affinities (K / D of the features' memory); their gradient
    exists for one image at a time.

    Args:
        feats: [B, D, H, W], D >= 1; float16, bfloat16, float32 (float32 arithmetic, also between the two ops), or
            float64 (the reference).
        labels, ignore_index: as in affinity_loss.
        radius, metric, scale, border: as in local_affinity; the defaults are AffinityNet's.

    Returns:
        A number in the dtype of feats; 0 without pairs. Differentiable once in feats (the automatic scale is a constant
        for the gradient).

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn and Kwak, CVPR 2018, section 3.2.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> feats = torch.rand(2, 8, 12, 16, requires_grad=True)
        >>> wk.affinity_loss_from_features(feats, torch.randint(0, 3, (2, 12, 16))).backward()
        >>> feats.grad.shape
        torch.Size([2, 8, 12, 16])
    """
    number = check_arguments(feats, radius, metric, scale, border)
    labels = _checked_labels("feats", feats, labels, ignore_index)
    if not _dispatch.runs_native("affinity_loss_from_features", feats):
        return reference.affinity_loss_from_features(
            feats, labels, radius=radius, metric=metric, scale=scale, border=border, ignore_index=ignore_index
        )
    arguments = (radius, metric == "cosine", number, border == "cropped", ignore_index)
    if _dispatch.calls_directly(feats, labels):
        kernel = _from_features_cuda if feats.is_cuda else _from_features_cpu
        return kernel(feats, labels, *arguments)[0]
    return torch.ops.wsss_kernels.affinity_loss_from_features(feats, labels, *arguments)[0]


def _checked_labels(name: str, main: Tensor, labels: object, ignore_index: object) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype not in LABELS:
        raise TypeError(f"labels must be an integer tensor [B, H, W], got {_check.describe(labels)}")
    batch, _, height, width = main.shape
    if labels.dim() != 3 or tuple(labels.shape) != (batch, height, width):
        raise ValueError(
            f"labels must be [B, H, W] = {[batch, height, width]}, as {name} is, got {_check.describe(labels)}"
        )
    _check.same_device(name, main, "labels", labels)
    _check.whole("ignore_index", ignore_index, "an int of at most 64 bits", least=-(2**63), most=2**63 - 1)
    return labels if labels.dtype in _WIDE else labels.int()


_dispatch.LIBRARY.define(
    "affinity_loss(Tensor affinity, Tensor labels, int radius, bool cropped, int ignore_index) -> (Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "affinity_loss_backward(Tensor grad, Tensor affinity, Tensor labels, Tensor counts, int radius, bool cropped, "
    "int ignore_index) -> Tensor"
)
_dispatch.LIBRARY.define(
    "affinity_loss_from_features(Tensor feats, Tensor labels, int radius, bool cosine, float scale, bool cropped, "
    "int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)"
)
_dispatch.LIBRARY.define(
    "affinity_loss_from_features_backward(Tensor grad, Tensor feats, Tensor labels, Tensor counts, Tensor affinity, "
    "Tensor scales, int radius, bool cosine, float scale, bool cropped, int ignore_index) -> Tensor"
)


def _affinity_loss_cpu(
    affinity: Tensor, labels: Tensor, radius: int, cropped: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    assert _dispatch.native is not None
    batch, _, height, width = affinity.shape
    x, ids = _dispatch.as_kernel_input(affinity), labels.contiguous()
    loss, counts = _dispatch.native.affinity_loss(
        x.data_ptr(), ids.data_ptr(), ids.dtype.itemsize, ignore_index, batch, height, width, radius, cropped,
        torch.get_num_threads(),
    )  # fmt: skip
    return torch.tensor(loss, dtype=affinity.dtype), torch.tensor(counts, dtype=torch.float64)


def _affinity_loss_backward_cpu(
    grad: Tensor, affinity: Tensor, labels: Tensor, counts: Tensor, radius: int, cropped: bool, ignore_index: int
) -> Tensor:
    assert _dispatch.native is not None
    batch, _, height, width = affinity.shape
    x, ids = _dispatch.as_kernel_input(affinity), labels.contiguous()
    out = torch.empty_like(x)
    _dispatch.native.affinity_loss_backward(
        float(grad), x.data_ptr(), ids.data_ptr(), ids.dtype.itemsize, ignore_index, counts.tolist(), out.data_ptr(),
        batch, height, width, radius, cropped, torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, affinity.dtype)


def _from_features_cpu(
    feats: Tensor, labels: Tensor, radius: int, cosine: bool, scale: float, cropped: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    affinity, scales = _local_affinity_cpu(feats.float(), radius, cosine, scale, cropped)
    loss, counts = _affinity_loss_cpu(affinity, labels, radius, cropped, ignore_index)
    return loss.to(feats.dtype), counts, affinity, scales


def _from_features_backward_cpu(
    grad: Tensor,
    feats: Tensor,
    labels: Tensor,
    counts: Tensor,
    affinity: Tensor,
    scales: Tensor,
    radius: int,
    cosine: bool,
    scale: float,
    cropped: bool,
    ignore_index: int,
) -> Tensor:
    assert _dispatch.native is not None
    ids, pairs, upstream = labels.contiguous(), counts.tolist(), float(grad)
    batch, dim, height, width = feats.shape
    out = torch.empty(feats.shape, dtype=feats.dtype)
    slope = torch.empty(affinity.shape[1:])
    for b in range(batch):  # so that an image's affinities and their gradient stay in the cache between the two
        _dispatch.native.affinity_loss_backward(
            upstream, affinity[b].data_ptr(), ids[b].data_ptr(), ids.dtype.itemsize, ignore_index, pairs,
            slope.data_ptr(), 1, height, width, radius, cropped, torch.get_num_threads(),
        )  # fmt: skip
        x = _dispatch.as_kernel_input(feats[b])
        grad_feats = out[b] if out.dtype is torch.float32 else torch.empty_like(x)
        _dispatch.native.local_affinity_backward(
            slope.data_ptr(), x.data_ptr(), affinity[b].data_ptr(), scales[b].data_ptr(), grad_feats.data_ptr(),
            1, dim, height, width, radius, cosine, scale, cropped, torch.get_num_threads(),
        )  # fmt: skip
        if out.dtype is not torch.float32:
            out[b] = grad_feats
    return out


def _affinity_loss_cuda(
    affinity: Tensor, labels: Tensor, radius: int, cropped: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    from wsss_kernels.triton.affinity_loss import affinity_loss

    return affinity_loss(affinity, labels, radius, cropped, ignore_index)


def _affinity_loss_backward_cuda(
    grad: Tensor, affinity: Tensor, labels: Tensor, counts: Tensor, radius: int, cropped: bool, ignore_index: int
) -> Tensor:
    from wsss_kernels.triton.affinity_loss import affinity_loss_backward

    return affinity_loss_backward(grad, affinity, labels, counts, radius, cropped, ignore_index)


def _from_features_cuda(
    feats: Tensor, labels: Tensor, radius: int, cosine: bool, scale: float, cropped: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    affinity, scales = _local_affinity_cuda(feats.float(), radius, cosine, scale, cropped)
    loss, counts = _affinity_loss_cuda(affinity, labels, radius, cropped, ignore_index)
    return loss.to(feats.dtype), counts, affinity, scales


def _from_features_backward_cuda(
    grad: Tensor,
    feats: Tensor,
    labels: Tensor,
    counts: Tensor,
    affinity: Tensor,
    scales: Tensor,
    radius: int,
    cosine: bool,
    scale: float,
    cropped: bool,
    ignore_index: int,
) -> Tensor:
    slope = _affinity_loss_backward_cuda(grad, affinity, labels, counts, radius, cropped, ignore_index)
    grad_feats = _local_affinity_backward_cuda(slope, feats.float(), affinity, scales, radius, cosine, scale, cropped)
    return grad_feats.to(feats.dtype)


def _affinity_loss_fake(affinity: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return affinity.new_empty(()), affinity.new_empty(_CLASSES, dtype=torch.float64)


def _affinity_loss_backward_fake(grad: Tensor, affinity: Tensor, *_: object) -> Tensor:
    return torch.empty_like(affinity, memory_format=torch.contiguous_format)


def _from_features_fake(feats: Tensor, labels: Tensor, radius: int, *_: object) -> tuple[Tensor, ...]:
    batch, height, width = feats.shape[0], feats.shape[2], feats.shape[3]
    affinity = feats.new_empty(batch, neighbour_count(radius), height, width, dtype=torch.float32)
    counts = feats.new_empty(_CLASSES, dtype=torch.float64)
    return feats.new_empty(()), counts, affinity, feats.new_empty(batch, dtype=torch.float32)


def _from_features_backward_fake(grad: Tensor, feats: Tensor, *_: object) -> Tensor:
    return torch.empty_like(feats, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    main, labels, *ctx.arguments = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(main, labels, *output[1:])


def _affinity_loss_gradient(ctx, grad, *_):  # type: ignore[no-untyped-def]
    slope = torch.ops.wsss_kernels.affinity_loss_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return slope, None, None, None, None


def _from_features_gradient(ctx, grad, *_):  # type: ignore[no-untyped-def]
    slope = torch.ops.wsss_kernels.affinity_loss_from_features_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return slope, None, None, None, None, None, None


_dispatch.LIBRARY.impl("affinity_loss", _affinity_loss_cpu, "CPU")
_dispatch.LIBRARY.impl("affinity_loss_backward", _affinity_loss_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("affinity_loss_from_features", _from_features_cpu, "CPU")
_dispatch.LIBRARY.impl("affinity_loss_from_features_backward", _from_features_backward_cpu, "CPU")
_dispatch.LIBRARY.impl("affinity_loss", _affinity_loss_cuda, "CUDA")
_dispatch.LIBRARY.impl("affinity_loss_backward", _affinity_loss_backward_cuda, "CUDA")
_dispatch.LIBRARY.impl("affinity_loss_from_features", _from_features_cuda, "CUDA")
_dispatch.LIBRARY.impl("affinity_loss_from_features_backward", _from_features_backward_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::affinity_loss", _affinity_loss_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::affinity_loss_backward", _affinity_loss_backward_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake("wsss_kernels::affinity_loss_from_features", _from_features_fake, lib=_dispatch.LIBRARY)
torch.library.register_fake(
    "wsss_kernels::affinity_loss_from_features_backward", _from_features_backward_fake, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::affinity_loss", _affinity_loss_gradient, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
torch.library.register_autograd(
    "wsss_kernels::affinity_loss_from_features",
    _from_features_gradient,
    setup_context=_setup_context,
    lib=_dispatch.LIBRARY,
)
_dispatch.refuse_second_derivative("affinity_loss")
_dispatch.refuse_second_derivative("affinity_loss_from_features")
