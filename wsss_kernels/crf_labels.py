"""Training labels where two dense CRFs agree, as IRNet and AffinityNet make them from CAMs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_kernels import _check
from wsss_kernels.colour import check_picture
from wsss_kernels.labels import IGNORE, labels_from_maps
from wsss_kernels.ops.dense_crf import dense_crf, unary_from_labels, unary_from_probabilities


@torch.no_grad()
def confident_labels(image: Tensor, cams: Tensor, *, fg: float = 0.30, bg: float = 0.05) -> Tensor:
    """Labels where two dense CRFs agree, one started with a high background and one with a low one.

    sure object     = CRF(argmax [fg, cams]) is no background: that class
    sure background = both CRF(argmax [fg, cams]) and CRF(argmax [bg, cams]) are background: 0
    anything else   = 255

    Each CRF starts from hard labels, right with probability 0.7, over the background and the image's own classes alone
    (gaussian (3, 3), bilateral (50, 5, 10), 10 iterations; see `dense_crf`). A class without a positive score is not
    present: it costs nothing. An image without any class is all background.

    Args:
        image: [B, 3, H, W] or [3, H, W] RGB picture, uint8 or float 0..255.
        cams: [B, C, h, w] or [C, h, w] floating point scores with a peak of 1 a class (as `refine_cams` gives them with
            normalize="class"), C <= 254; brought to the picture bilinearly. NaN and negative scores count as 0.
        fg, bg: the background's score in the one and the other, 0 <= bg <= fg; 0.30 and 0.05 as published (PuzzleCAM:
            0.40 and 0.10).

    Returns:
        Tensor: [B, H, W] or [H, W] int64: 0 = background, c + 1 = class c, 255 = not sure. On a GPU the number of
        classes of each image is read, which waits for it.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn et al., Weakly supervised learning of instance segmentation with inter-pixel relations (IRNet), CVPR
    2019, and its published code.
    """
    fg, bg = (_check.number(name, value, "a number >= 0", least=0) for name, value in (("fg", fg), ("bg", bg)))
    if bg > fg:
        raise ValueError(f"bg must be <= fg ({fg}), got {bg}")

    def settle(picture: Tensor, maps: Tensor) -> Tensor:
        sure = []
        for background in (fg, bg):
            start = labels_from_maps(maps, background=background)
            assert isinstance(start, Tensor)
            unary = unary_from_labels(start, maps.shape[1] + 1, confidence=0.7)
            q = dense_crf(picture, unary, iterations=10, gaussian=(3.0, 3.0), bilateral=(50.0, 5.0, 10.0))
            sure.append(q.argmax(dim=1))
        return _agreed(*sure)

    return _class_by_class(image, cams, settle)


@torch.no_grad()
def affinity_labels(image: Tensor, cams: Tensor, *, low: float = 4.0, high: float = 32.0) -> Tensor:
    """Labels where two dense CRFs agree, with a strong background and a weak one: what AffinityNet is trained on.

    With background(alpha) = (1 - max_c cams)^alpha (a low alpha makes it strong, so what remains is surely object; a
    high one weak, so what remains is surely background):

    sure object     = CRF([background(low), cams]) is no background: that class
    sure background = CRF([background(high), cams]) is background: 0, also where the other says object
    anything else   = 255

    The unaries are -log(score), the scores cut off at 1e-5 and 1 and not normalised (gaussian (3, 3), bilateral (80,
    13, 10), 10 iterations; see `dense_crf`), over the background and the image's own classes alone. A class without a
    positive score is not present: it costs nothing. An image without any class is all background.

    Args:
        image: [B, 3, H, W] or [3, H, W] RGB picture, uint8 or float 0..255.
        cams: [B, C, h, w] or [C, h, w] floating point scores with a peak of 1 a class (as `refine_cams` gives them with
            normalize="class"), C <= 254; brought to the picture bilinearly. NaN and negative scores count as 0.
        low, high: powers of the background, 0 < low <= high; 4 and 32 in the published code (4 and 24 in the paper).

    Returns:
        Tensor: [B, H, W] or [H, W] int64: 0 = background, c + 1 = class c, 255 = not sure. On a GPU the number of
        classes of each image is read, which waits for it. (The published training averages the marginals over blocks
        of 8 x 8 pixels before the argmax.)

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn and Kwak, Learning pixel-level semantic affinity with image-level supervision, CVPR 2018, section 3.2,
    and its published code.
    """
    low, high = (_check.number(name, value, "a number > 0", above=0) for name, value in (("low", low), ("high", high)))
    if low > high:
        raise ValueError(f"low must be <= high ({high}), got {low}")

    def settle(picture: Tensor, maps: Tensor) -> Tensor:
        rest = (1 - maps.amax(dim=1, keepdim=True)).clamp_min(0)
        sure = []
        for alpha in (low, high):
            unary = unary_from_probabilities(torch.cat([rest**alpha, maps], dim=1))
            q = dense_crf(picture, unary, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0))
            sure.append(q.argmax(dim=1))
        labels = torch.where(sure[0] == 0, IGNORE, sure[0])
        return torch.where(sure[1] == 0, 0, labels)

    return _class_by_class(image, cams, settle)


def _agreed(objects: Tensor, rest: Tensor) -> Tensor:
    """The class where `objects` has one, 0 where both have none, else 255."""
    return torch.where(objects > 0, objects, torch.where(rest == 0, 0, IGNORE))


def _class_by_class(image: Tensor, cams: Tensor, settle: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """settle(pictures [G, 3, H, W], maps [G, k, H, W]) -> labels in 0..k or 255, once for all images of k classes."""
    check_picture("image", image)
    if not isinstance(cams, Tensor) or not cams.is_floating_point():
        raise TypeError(f"cams must be a floating point tensor [B, C, h, w] or [C, h, w], got {_check.describe(cams)}")
    if cams.ndim not in (3, 4):
        raise ValueError(f"cams must be [B, C, h, w] or [C, h, w], got shape {tuple(cams.shape)}")
    if image.ndim != cams.ndim:
        raise ValueError(
            f"cams must have a batch where image has one, got shapes {tuple(image.shape)}, {tuple(cams.shape)}"
        )
    if cams.ndim == 3:
        return _class_by_class(image[None], cams[None], settle)[0]
    _check.same_device("image", image, "cams", cams)
    if len(image) != len(cams):
        raise ValueError(f"cams must be of {len(image)} images, as image is, got {len(cams)}")
    if cams.shape[1] >= IGNORE:
        raise ValueError(f"cams must have at most {IGNORE - 1} classes, got {cams.shape[1]}")
    size = image.shape[-2:]
    if len(cams) and 0 in (*size, *cams.shape[-2:]):
        raise ValueError(
            f"image and cams must have at least one pixel, got shapes {tuple(image.shape)}, {tuple(cams.shape)}"
        )
    labels = torch.zeros(len(cams), *size, dtype=torch.int64, device=cams.device)
    if cams.numel() == 0:
        return labels
    maps = torch.nan_to_num(cams if cams.dtype == torch.float64 else cams.float()).clamp_min(0)
    present = maps.flatten(2).amax(dim=2) > 0  # [B, C]
    counts = present.sum(dim=1)
    for classes in counts.unique().tolist():
        if classes == 0:
            continue
        images = torch.nonzero(counts == classes)[:, 0]
        ids = torch.argsort(present[images], dim=1, descending=True, stable=True)[:, :classes]
        chosen = F.interpolate(maps[images[:, None], ids], size, mode="bilinear", align_corners=False)
        found = settle(image[images], chosen)
        table = torch.cat([ids.new_zeros(len(ids), 1), ids + 1], dim=1)
        named = torch.gather(table, 1, found.clamp(max=classes).flatten(1)).view_as(found)
        labels[images] = torch.where(found == IGNORE, IGNORE, named)
    return labels
