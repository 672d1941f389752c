"""Labels from maps and boundaries, as IRNet makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_kernels import _check
from wsss_kernels.labels import check_maps, finite, labels_at, per_image
from wsss_kernels.methods import Size, check_boundary
from wsss_kernels.refine import refine_cams

_STRIDE = 4  # of IRNet's boundaries


def boundary_labels(
    cams: Tensor,
    boundary: Tensor,
    *,
    background: float | Tensor | str = 0.25,
    size: Size | None = None,
    class_ids: Tensor | Sequence[int] | None = None,
    radius: int = 5,
    beta: float = 10,
    steps: int = 256,
) -> Tensor:
    """IRNet's last step: maps spread up to the boundaries, and the label of every pixel.

        maps = `refine_cams(cams, boundary, preset="irn")` brought to size, divided by the image's maximum
        label = 1 + argmax_c maps[b, c] (or class_ids of it) where that is > background, else 0

    Sizes as published: cams and boundary at stride 4 of the picture, h = ceil(H / 4), and size = (H, W): the refined
    maps grow fourfold and lose what hangs over the picture's edge. A size for which h and w are no such quarter is
    reached by bilinear resizing; cams that have not the boundary's size are brought to it first, as `refine_cams` does.

    Args:
        cams: [B, C, H', W'] (or [C, H', W']) floating point, of the classes present only; negative values count as 0.
        boundary: [B, 1, h, w] (or [1, h, w]) probability of a boundary, 0..1.
        background: score up to which a pixel is background, in 0..1 of the image's maximum; one number, a tensor [B],
            or "auto": found for each image from its maps alone (`background_threshold`).
        size: of the labels, (height, width) in pixels; None = that of cams.
        class_ids: integers to write for the C classes instead of 1..C, as in `labels_from_maps`.
        radius, beta, steps: of the walk, see `random_walk`; as published. 256 steps suit boundaries of about 94 x 125
            pixels that are closed: on smaller maps, or through gaps, fewer leak less.

    Returns:
        Tensor: [B, height, width] (or [height, width]) int64 on the device of cams. Maps without a positive score give
        background alone.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn, Cho and Kwak, CVPR 2019, section 4.3, and the published code.

    Example:
        >>> boundary_labels(torch.rand(2, 94, 125), torch.rand(1, 94, 125), size=(375, 500)).shape
        torch.Size([375, 500])
    """
    single = check_maps("cams", cams).ndim == 3
    if single:
        cams = cams[None]
        boundary = boundary[None] if isinstance(boundary, Tensor) and boundary.ndim == 3 else boundary
    check_boundary("boundary", boundary)
    _check.same_device("cams", cams, "boundary", boundary)
    if boundary.shape[0] != cams.shape[0] or (cams.shape[0] and 0 in boundary.shape):
        raise ValueError(
            f"boundary must have the batch of cams ({cams.shape[0]}) and at least one pixel, "
            f"got {_check.describe(boundary)}"
        )
    height, width = cams.shape[-2:] if size is None else _check_pair("size", size)
    cams = cams if cams.dtype == torch.float64 else cams.float()
    if not isinstance(background, str):
        background = per_image("background", background, cams).flatten().expand(len(cams))
    elif background != "auto":
        raise ValueError(f'background must be a number, a tensor [B] or "auto", got {background!r}')
    walk = {"radius": radius, "beta": beta, "steps": steps}
    if cams.numel() == 0:
        maps = cams.new_zeros(*cams.shape[:2], height, width)
    elif size is None:
        maps = _irn_maps(cams, boundary, None, walk)
    elif tuple(boundary.shape[-2:]) == (-(-height // _STRIDE), -(-width // _STRIDE)):
        maps = _irn_maps(cams, boundary, "feats", walk)
        maps = F.interpolate(maps, scale_factor=_STRIDE, mode="bilinear", align_corners=False)[..., :height, :width]
    else:
        maps = _irn_maps(cams, boundary, (height, width), walk)
    if maps.numel():
        peak = finite(maps).amax(dim=(1, 2, 3), keepdim=True)
        maps = maps / torch.where(peak > 0, peak, 1.0)
    labels = labels_at(maps, background, class_ids, None)
    return labels[0] if single else labels


def _irn_maps(cams: Tensor, boundary: Tensor, size: Size | str | None, walk: dict[str, Any]) -> Tensor:
    maps = refine_cams(cams, boundary, preset="irn", size=size, normalize=None, **walk)
    assert isinstance(maps, Tensor)
    return maps


def _check_pair(name: str, size: object) -> Size:
    contract = f"{name} must be None or a pair (height, width) of whole numbers >= 1, got {size!r}"
    if not isinstance(size, (tuple, list, torch.Size)):
        raise TypeError(contract)
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(contract)
    return size[0], size[1]
