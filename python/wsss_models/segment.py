"""Label pictures by a trained segmentation network: several scales and flips, a dense CRF where wanted, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import wsss_kernels as wk
from wsss_models.data.artefacts import FileError, png_settings, remove_stale
from wsss_models.data.files import fingerprint, write_label
from wsss_models.data.folder import inside
from wsss_models.data.pictures import PictureSet
from wsss_models.infer import Pyramid, Scales
from wsss_models.recipe import NORMALISATIONS

CRF = {"gaussian": (3.0, 3.0), "bilateral": (80.0, 13.0, 10.0), "iterations": 10}  # the published one of the test
_FORMAT = 1  # raised when the same settings give other labels
_WAITING = 4  # label pictures on their way to the disk


def merged_scores(
    scores: Callable[[Tensor], Tensor], pyramid: list[Tensor], size: tuple[int, int], *, flip: bool = True
) -> Tensor:
    """Mean of the probabilities over scales and flips, each brought to the picture's size.

    Args:
        scores: [B, 3, h, w] -> [B, C + 1, h, w] probabilities.
        pyramid: the pictures at each scale, [B, 3, h_s, w_s], normalised.
        size: of the result, (height, width).
        flip: also the flipped pictures.

    Returns:
        Tensor: [B, C + 1, height, width] float32, resized bilinearly (align_corners=False).
    """
    total: Tensor | None = None
    for images in pyramid:
        found = scores(torch.cat([images, images.flip(3)]) if flip else images).float()
        if flip:
            plain, flipped = found.chunk(2)
            found = (plain + flipped.flip(3)) / 2
        found = F.interpolate(found, size, mode="bilinear", align_corners=False)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("pyramid must hold one or more scales, got none")
    return total / len(pyramid)


def with_crf(image: Tensor, probabilities: Tensor) -> Tensor:
    """Marginals of the published dense CRF on probabilities [B, C + 1, H, W]; image [B, 3, H, W] uint8."""
    return wk.dense_crf(image, wk.unary_from_probabilities(probabilities), **CRF)  # type: ignore[arg-type]


def write_segmentation(
    model: nn.Module,
    pictures: PictureSet,
    out: Path | str,
    *,
    scales: tuple[float, ...] = (0.75, 1.0, 1.25),
    flip: bool = True,
    crf: bool = False,
    labelled: bool = False,
    source: str = "",
    normalisation: str = "imagenet",
    device: torch.device | str = "cpu",
    workers: int = 2,
    shard: tuple[int, int] = (0, 1),
    failed: Callable[[str, str], None] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[int, int]:
    """Write one label PNG a picture; no label of the set is looked at, unless `labelled`.

    What is there with the same settings is kept, so that the same call goes on where an interrupted one stopped.

    Args:
        model: has `scores` (`labelled_scores`); its mode and device are changed.
        pictures: the set.
        out: folder; an id "sub/name" becomes "sub/name.png".
        scales: of the pictures; the network's probabilities are averaged over them.
        flip: average over the flipped pictures, too.
        crf: label by the marginals of the dense CRF instead of the mean.
        labelled: by the model's `labelled_scores`, only classes of the picture's image-level label: training labels.
        source: what tells the weights apart (`run_hash`); part of the settings.
        normalisation: of the pictures, as in training.
        workers: processes that read pictures; 0 = none but this one.
        shard: (i, n) = every n-th picture from the i-th on.
        failed: told id and reason of a picture that cannot be used; None = that is raised.
        advance: called with a count of pictures now and then.

    Returns:
        (written, kept): counts of pictures.

    Raises:
        FileError: a picture that cannot be used, where `failed` is None.
        OSError: of the file layer (disk full).
    """
    out = Path(out)
    sizes = Scales(scales, "sum" if flip else "none", 1)
    crf_settings = CRF if crf else None
    settings: dict[str, Any] = {"format": _FORMAT, "scales": list(scales), "flip": flip, "crf": crf_settings}
    settings |= {"source": source, "normalisation": normalisation}
    settings |= {"labelled": True} if labelled else {}
    remove_stale(out)
    numbers, texts, kept = [], {}, 0

    def tell(i: int, reason: str) -> None:
        if failed is None:
            raise FileError(pictures.ids[i], reason)
        failed(pictures.ids[i], reason)

    for i in range(shard[0], len(pictures), shard[1]):
        try:
            text = json.dumps({**settings, "inputs": [fingerprint(pictures.image_path(i))]})
            finished = png_settings(inside(out, pictures.ids[i], ".png")) == text
        except ValueError as error:  # an id that leads out of a folder
            tell(i, str(error))
            continue
        if finished:
            kept += 1
        else:
            numbers.append(i)
            texts[i] = text
    advance(kept)
    model.to(device).eval()
    dataset = Pyramid(pictures, numbers, sizes, NORMALISATIONS[normalisation])
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    written = 0
    with ThreadPoolExecutor(1) as pool, torch.inference_mode():
        pending: list[Future[None]] = []
        for item in loader:
            i = item["number"]
            if "error" in item:
                tell(i, item["error"])
                continue
            pyramid = [level[None].to(device) for level in item["pyramid"]]
            scores = model.scores
            if labelled:
                label = torch.zeros(len(pictures.classes), device=device)
                label[torch.as_tensor(item["class_ids"] - 1, device=device)] = 1
                scores = partial(model.labelled_scores, label=label)
            try:
                mean = merged_scores(scores, pyramid, tuple(item["size"]), flip=flip)
                if crf:
                    image = torch.from_numpy(pictures.image(i)).permute(2, 0, 1)[None].to(device)
                    mean = with_crf(image, mean)
            except MemoryError:
                tell(i, "not enough memory")
                continue
            label = mean[0].argmax(dim=0).cpu().numpy()
            target = inside(out, pictures.ids[i], ".png")
            pending.append(pool.submit(write_label, target, label, settings=texts[i]))
            while len(pending) > _WAITING:
                pending.pop(0).result()
            written += 1
            advance(1)
        for future in pending:
            future.result()
    return written, kept
