"""Labels from score maps, with a background threshold that needs no ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = 255

# Constants of the automatic threshold; all live on u = sqrt(score / image maximum).
_BINS = 128  # histogram cells; 64 to 256 give the same labels within 0.1 points of mIoU
_FLOOR = 0.2  # u below it counts as 0.2: a 25th of the maximum is background, however exact its zeros are
_SPREAD = 0.036  # least standard deviation of a class
_PRIOR = 0.5  # weight of the class-size entropy: 1 is Kittler and Illingworth, 0 is equal class sizes
_TINY = torch.finfo(torch.float32).tiny  # keeps 0 / 0 at 0
_SHARPNESS = 50.0  # of the soft minimum that makes the threshold continuous in the maps


@torch.no_grad()
def background_threshold(maps: Tensor) -> Tensor:
    """Score that separates object from background in each image, found from its maps alone.

    With m = max_c maps[b, c] / max(maps[b]) and u = sqrt(max(m, 0.04)), the minimum-error threshold of u:

        J(u) = w0 log(v0) + w1 log(v1) - H,    H = w0 log(w0) + w1 log(w1)

    where w0, w1 are the shares of the pixels below and above u and v0, v1 their variances of u plus a floor. The
    answer is the soft minimum exp(mean of log t) with weights exp(-50 (J - min J)), t = u^2, in the units of `maps`.
    Unlike Otsu's rule the two classes have variances of their own: clean seeds leave a narrow background, so the
    threshold falls close to it; leaky ones leave a wide background, so it rises above the leak.

    NaN and negative scores count as 0. An image without a positive score gets 0, and so does one whose scores all
    fall into one cell of the histogram (a constant map): with "score > threshold" the first is all background, the
    second all object.

    Args:
        maps: [B, C, H, W] (or [C, H, W]) floating point scores, any scale; only ratios within an image matter.

    Returns:
        Tensor: [B] (or a scalar) float32 (float64 for float64 maps) on the device of `maps`; no host synchronisation.

    Raises:
        TypeError: `maps` is not a floating point tensor.
        ValueError: `maps` has neither three nor four dimensions.

    It is meant for refined maps. On raw CAMs it falls too low, as do Otsu's rules on the logarithm and the square
    root; so it does where a leak is separate from both the object and the rest (three levels, no slope between).

    Source: Kittler and Illingworth, Minimum error thresholding, Pattern Recognition 19(1), 1986. Ours: the square
    root (between the raw score and its logarithm), the floor on the deviations, half the weight on the class sizes
    and the soft minimum. The constants were set once for 24 photographs with three kinds of seeds and sit on a flat
    optimum: deviations of 0.027 to 0.045, weights of 0.25 to 0.5 and scores cut off at 0.01 to 0.06 of the maximum
    move the mean loss against the best threshold by less than a point.

    Example:
        >>> maps = torch.tensor([[[[0.04, 0.05, 0.03, 0.8, 0.9, 1.0]]]])
        >>> bool(0.05 < background_threshold(maps) < 0.8)
        True
    """
    check_maps("maps", maps)
    if maps.ndim == 3:
        return background_threshold(maps[None])[0]
    batch = maps.shape[0]
    if maps.numel() == 0:
        return finite(maps).new_zeros(batch)
    score = finite(maps).amax(dim=1).clamp_min(0).flatten(1)  # [B, HW]
    peak = score.amax(dim=1)  # [B]
    u = (score / peak.clamp_min(_TINY)[:, None]).sqrt().clamp(_FLOOR, 1)
    cell = ((u - _FLOOR) * (_BINS / (1 - _FLOOR))).long().clamp_(0, _BINS - 1)
    cell = cell + _BINS * torch.arange(batch, device=maps.device)[:, None]
    ones = torch.ones((), dtype=torch.int64, device=maps.device).expand(cell.numel())  # integers: exact in any order
    count = torch.zeros(batch * _BINS, dtype=torch.int64, device=maps.device)
    count = count.index_add(0, cell.flatten(), ones).view(batch, _BINS)

    edge = _FLOOR + (1 - _FLOOR) / _BINS * torch.arange(1, _BINS + 1, device=maps.device, dtype=score.dtype)
    centre = edge - (1 - _FLOOR) / (2 * _BINS)
    below = count.cumsum(dim=1)  # [B, BINS] pixels at or below each cell
    above = below[:, -1:] - below
    share = count.to(score.dtype) / score.shape[1]
    first, second = (share * centre).cumsum(1), (share * centre * centre).cumsum(1)
    w0, w1 = below.to(score.dtype) / score.shape[1], above.to(score.dtype) / score.shape[1]
    cost = (
        w0 * _log_variance(w0, first, second)
        + w1 * _log_variance(w1, first[:, -1:] - first, second[:, -1:] - second)
        - 2 * _PRIOR * (torch.xlogy(w0, w0) + torch.xlogy(w1, w1))
    )
    split = (below > 0) & (above > 0)  # both classes hold a pixel
    cost = cost.masked_fill(~split, math.inf)
    least = cost.amin(dim=1, keepdim=True)
    weight = torch.exp(-_SHARPNESS * (cost - least)).masked_fill(~split, 0)
    some = split.any(dim=1)
    log_u = (weight * edge.log()).sum(1) / weight.sum(1).clamp_min(_TINY)
    return torch.where(some, peak * torch.exp(2 * log_u), torch.zeros_like(peak))


def labels_from_maps(
    maps: Tensor | Sequence[Tensor],
    *,
    background: float | Tensor | str | None = "auto",
    class_ids: Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor] | None = None,
    ignore: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Label of every pixel: the class with the highest score, or background.

        s = max_c maps[b, c],  label = 1 + argmax_c maps[b, c] (or class_ids of it) where s > threshold, else 0

    Ties go to the lowest index, the background's being the lowest. NaN counts as 0. Without a class (C = 0) and
    where the maps are zero everywhere, "auto" gives background; a constant positive map is all object.

    Args:
        maps: [B, C, H, W] or [C, H, W] floating point scores, or a list of [C_i, H_i, W_i], one an image.
        background: a number (or a tensor [B], one an image) in the units of `maps`: the threshold; "auto": the
            image's own `background_threshold`, no ground truth and no tuning; None: map 0 is the background's.
        class_ids: integers to write for the C classes (without the background) instead of 1..C: a sequence or an
            integer tensor [C], or [B, C]; for a list of maps, a list with one sequence an image.
        ignore: (low, high) in the units of `maps`, also with "auto" (for a band around the automatic threshold t
            pass (0.8 * t, 1.2 * t) with t = background_threshold(maps)); numbers or tensors [B]. Pixels with
            low < s <= high become 255; with background=None, s is the maximum over all maps.

    Returns:
        Tensor: [B, H, W] or [H, W] int64 on the device of `maps`; a list of [H_i, W_i] for a list.

    Raises:
        TypeError: an argument is of the wrong kind (maps not floating point, class_ids not integers).
        ValueError: a shape or a word does not fit, or low > high.

    Source: the argmax over [background, maps] of Ahn and Kwak, CVPR 2018, with the threshold found per image.

    Example:
        >>> maps = torch.tensor([[[0.9, 0.2]], [[0.1, 0.6]]])
        >>> labels_from_maps(maps, background=0.3, class_ids=[12, 15]).tolist()
        [[12, 15]]
    """
    if isinstance(maps, (list, tuple)):
        ids = _ids_of_list(class_ids, len(maps))
        grounds = _backgrounds_of_list(background, len(maps))
        images = zip(maps, grounds, ids, strict=True)
        return [labels_at(check_maps("maps", m)[None], b, i, ignore)[0] for m, b, i in images]
    maps = check_maps("maps", maps)
    if maps.ndim == 3:
        return labels_at(maps[None], background, class_ids, ignore)[0]
    return labels_at(maps, background, class_ids, ignore)


@torch.no_grad()
def labels_at(
    maps: Tensor,
    background: float | Tensor | str | None,
    class_ids: Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor] | None,
    ignore: tuple[float | Tensor, float | Tensor] | None,
) -> Tensor:
    if maps.ndim != 4:
        raise ValueError(f"maps must be [C, H, W] each in a list, got shape {tuple(maps.shape[1:])}")
    maps = maps.detach()
    batch, channels, height, width = maps.shape
    classes = channels - 1 if background is None else channels
    if classes < 0:
        raise ValueError("maps must hold the background as map 0 when background is None, got no map (C = 0)")
    ids = _index_to_id(class_ids, batch, classes, maps.device)
    band = None if ignore is None else _check_ignore(ignore, maps)
    threshold = None if background is None else _threshold(background, maps)
    if maps.numel() == 0:
        return torch.zeros(batch, height, width, dtype=torch.int64, device=maps.device)
    score, index = finite(maps).max(dim=1)  # ties: the first
    if threshold is not None:
        index = torch.where(score > threshold, index + 1, 0)
    if ids is not None:
        index = torch.gather(ids, 1, index.flatten(1)).view(batch, height, width)
    if band is not None:
        index = torch.where((score > band[0]) & (score <= band[1]), IGNORE, index)
    return index


def _log_variance(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """log of the class variance of u plus the floor; finite also where the class is empty."""
    weight = weight.clamp_min(1e-12)
    mean = first / weight
    return torch.log((second / weight - mean * mean).clamp_min(0) + _SPREAD**2)


def finite(maps: Tensor) -> Tensor:
    return torch.nan_to_num(maps if maps.dtype == torch.float64 else maps.float())


def _threshold(background: float | Tensor | str, maps: Tensor) -> Tensor:
    """[B, 1, 1] (or one that broadcasts to it)."""
    if isinstance(background, str):
        if background != "auto":
            raise ValueError(f'background must be a number, a tensor [B], "auto" or None, got {background!r}')
        return background_threshold(maps)[:, None, None]
    return per_image("background", background, maps)


def per_image(name: str, value: float | Tensor, maps: Tensor) -> Tensor:
    """Rounded to the dtype of the maps first, so that a score equal to the threshold is a tie."""
    batch = maps.shape[0]
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a real number or a tensor [B], got a tensor of {value.dtype}")
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
            raise ValueError(f"{name} must be one number or a tensor [B] with B = {batch}, got {tuple(value.shape)}")
        return value.to(device=maps.device, dtype=maps.dtype, non_blocking=True).reshape(-1, 1, 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor [B], got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got nan")
    return torch.full((1, 1, 1), float(value), dtype=maps.dtype, device=maps.device)


def _check_ignore(ignore: tuple[float | Tensor, float | Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(ignore, (tuple, list)):
        raise TypeError(f"ignore must be a pair (low, high) or None, got {ignore!r}")
    if len(ignore) != 2:
        raise ValueError(f"ignore must be a pair (low, high), got {len(ignore)} values")
    low, high = ignore
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise ValueError(f"ignore must be (low, high) with low <= high, got {ignore!r}")
    return per_image("ignore", low, maps), per_image("ignore", high, maps)


def _backgrounds_of_list(background: float | Tensor | str | None, images: int) -> list[float | Tensor | str | None]:
    if isinstance(background, Tensor) and background.ndim:
        if tuple(background.shape) != (images,):
            raise ValueError(f"background must be one number an image ({images}), got shape {tuple(background.shape)}")
        return list(background)
    return [background] * images


def _ids_of_list(class_ids: object, images: int) -> list[Tensor | Sequence[int] | None]:
    if class_ids is None:
        return [None] * images
    if isinstance(class_ids, Tensor):
        class_ids = list(class_ids) if class_ids.ndim == 2 else class_ids
    if not isinstance(class_ids, (list, tuple)) or len(class_ids) != images:
        raise ValueError(f"class_ids must be a list with one sequence an image ({images}), got {class_ids!r}")
    return list(class_ids)


def _index_to_id(class_ids: object, batch: int, classes: int, device: torch.device) -> Tensor | None:
    """[B, classes + 1] int64: what to write for each index; column 0 is the background."""
    if class_ids is None:
        return None
    try:
        ids = torch.as_tensor(class_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_ids must be integers [C] or [B, C], got {class_ids!r}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"class_ids must be integers, got {ids.dtype}")
    if tuple(ids.shape) not in ((classes,), (batch, classes)):
        raise ValueError(
            f"class_ids must be [C] or [B, C] with B = {batch}, C = {classes}, got shape {tuple(ids.shape)}"
        )
    ids = ids.to(device=device, dtype=torch.int64, non_blocking=True).expand(batch, classes)
    return torch.cat([ids.new_zeros(batch, 1), ids], dim=1)


def check_maps(name: str, maps: object) -> Tensor:
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} must be a floating point tensor [B, C, H, W] or [C, H, W], got {type(maps).__name__}")
    if not maps.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {maps.dtype}")
    if maps.ndim not in (3, 4):
        raise ValueError(f"{name} must be [B, C, H, W] or [C, H, W], got shape {tuple(maps.shape)}")
    return maps
