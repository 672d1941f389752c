"""Class activation maps of a set of pictures: several scales and flips, resumable."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wsss_models.data.artefacts import FileError, npz_settings
from wsss_models.data.augment import Normalisation
from wsss_models.data.files import fingerprint, write_maps
from wsss_models.data.folder import inside
from wsss_models.data.pictures import PictureSet
from wsss_models.recipe import NORMALISATIONS
from wsss_models.systems import from_dict, system
from wsss_models.train import CHECKPOINT, MANIFEST, read_checkpoint

FLIPS = ("sum", "max", "none")
_WAITING = 4  # batches of pictures read ahead while those of one size are collected


@dataclass(frozen=True)
class Scales:
    """How the maps of a picture are merged; the defaults are those of the published systems."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    flip: str = "sum"  # with the flipped picture's maps: "sum", "max" (VWE), "none" = no flipped picture
    stride: int = 4  # of the maps written: ceil(H / stride) x ceil(W / stride); 1 = the picture's size

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < s <= 8 for s in self.scales):
            raise ValueError(f"scales must be one or more numbers in 0..8, 0 excluded, got {self.scales}")
        if self.flip not in FLIPS:
            raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {self.flip!r}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 pixel, got {self.stride}")


def merged_cams(
    cams: Callable[[Tensor], Tensor],
    pyramid: list[Tensor],
    size: tuple[int, int],
    scales: Scales | None = None,
    *,
    join: Callable[[Tensor], Tensor] = lambda maps: maps,
) -> Tensor:
    """Maps of pictures of one size, merged over scales and flips as published.

        total = sum over scales of resize(merge(cams(x), unflip(cams(flip(x)))))
        result = join(total) / (max of each class + 1e-5)

    Args:
        cams: [B, 3, h, w] -> [B, C, h', w'] >= 0.
        pyramid: the pictures at each scale, [B, 3, h_s, w_s], normalised.
        size: of the pictures at scale 1, (height, width).
        scales: how they are merged; its `scales` have been used to make the pyramid.
        join: [B, m, h, w] -> [B, C, h, w], where `cams` gives more maps than classes.

    Returns:
        Tensor: [B, C, ceil(height / stride), ceil(width / stride)] float32. The flip pair is merged at the network's
        own resolution; every scale is brought to the result's bilinearly (align_corners=False). No minimum is taken
        off.
    """
    scales = scales or Scales()
    target = tuple(-(-n // scales.stride) for n in size)
    total: Tensor | None = None
    for images in pyramid:
        if scales.flip == "none":
            maps = cams(images)
        else:
            plain, flipped = cams(torch.cat([images, images.flip(3)])).chunk(2)
            flipped = flipped.flip(3)
            maps = torch.maximum(plain, flipped) if scales.flip == "max" else plain + flipped
        maps = F.interpolate(maps.float(), target, mode="bilinear", align_corners=False)
        total = maps if total is None else total + maps
    assert total is not None
    total = join(total)
    return total / (total.amax(dim=(2, 3), keepdim=True) + 1e-5)


class Pyramid(Dataset[dict[str, Any]]):
    """The pictures of a set at several scales, resized bicubically by Pillow before they are normalised."""

    def __init__(self, pictures: PictureSet, numbers: list[int], scales: Scales, normalisation: Normalisation) -> None:
        self._pictures, self._numbers, self._scales, self._normalise = pictures, numbers, scales, normalisation

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number = self._numbers[i]
        try:
            image, ids = self._pictures.image(number), np.array(self._pictures.class_ids(number), dtype=np.int64)
        except (ValueError, OSError) as error:
            return {"number": number, "error": str(error)}
        height, width = image.shape[:2]
        pyramid = []
        for scale in self._scales.scales:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            resized = image if size == (width, height) else _resized(image, size)
            pyramid.append(self._normalise(resized))
        return {"number": number, "size": (height, width), "class_ids": ids, "pyramid": pyramid}


def write_cams(
    model: nn.Module,
    pictures: PictureSet,
    out: Path | str,
    *,
    scales: Scales | None = None,
    source: str = "",
    normalisation: str = "imagenet",
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    workers: int = 2,
    shard: tuple[int, int] = (0, 1),
    failed: Callable[[str, str], None] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[int, int]:
    """Write one `.npz` a picture: class_ids and cams of the classes in its label, half precision.

    What is there with the same settings is kept, so that the same call goes on where an interrupted one stopped.

    Args:
        model: has `cams`, or `view_maps` (maps of one view) and `join` (what makes classes of their sum); its mode and
            device are changed.
        pictures: the set, with labels. A picture without a class gets a file without maps.
        out: folder; an id "sub/name" becomes "sub/name.npz".
        scales: how maps are merged.
        source: what tells the weights apart (`run_hash`); part of the settings.
        normalisation: of the pictures, as in training.
        batch_size: pictures of one size that go through the network together.
        workers: processes that read pictures; 0 = none but this one.
        shard: (i, n) = every n-th picture from the i-th on, for several machines or GPUs.
        failed: told id and reason of a picture that cannot be used; None = that is raised.
        advance: called with a count of pictures now and then.

    Returns:
        (written, kept): counts of pictures.

    Raises:
        FileError: a picture that cannot be used, where `failed` is None.
        OSError: of the file layer (disk full).
    """
    out, scales = Path(out), scales or Scales()
    settings = json.dumps({"cams": asdict(scales), "source": source, "normalisation": normalisation}, sort_keys=True)
    numbers, texts, kept = [], {}, 0
    for i in range(shard[0], len(pictures), shard[1]):
        try:
            text = f"{settings} {fingerprint(pictures.image_path(i))}"
            finished = npz_settings(inside(out, pictures.ids[i], ".npz")) == text
        except ValueError as error:  # an id that leads out of a folder
            _tell(failed, pictures.ids[i], str(error))
            continue
        if finished:
            kept += 1
        else:
            numbers.append(i)
            texts[i] = text
    advance(kept)
    model.to(device).eval()
    of_view = getattr(model, "view_maps", None)
    view, merge = (model.cams, {}) if of_view is None else (of_view, {"join": model.join})
    dataset = Pyramid(pictures, numbers, scales, NORMALISATIONS[normalisation])
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=_one_thread)
    written = 0

    def save(item: dict[str, Any], maps: np.ndarray) -> None:
        i = item["number"]
        write_maps(inside(out, pictures.ids[i], ".npz"), item["class_ids"], maps, settings=texts[i])

    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        pending: list[Future[None]] = []
        for items in _of_one_size(_usable(loader, pictures, failed), batch_size):
            pyramid = [
                torch.stack(level).to(device) for level in zip(*(item["pyramid"] for item in items), strict=True)
            ]
            maps = merged_cams(view, pyramid, items[0]["size"], scales, **merge)
            for item, planes in zip(items, maps, strict=True):
                chosen = planes[torch.as_tensor(item["class_ids"] - 1, device=maps.device)].cpu().numpy()
                pending.append(pool.submit(save, item, chosen))
            while len(pending) > 2 * batch_size:
                pending.pop(0).result()
            written += len(items)
            advance(len(items))
        for future in pending:
            future.result()
    return written, kept


def image_features(
    model: nn.Module,
    pictures: PictureSet,
    *,
    normalisation: str = "imagenet",
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    workers: int = 2,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """The mean over the pixels of the backbone's last stage, of whole pictures at scale 1 that are not flipped.

    Args:
        model: has `backbone`; its mode and device are changed.
        pictures: the set; at least one.
        normalisation, device, batch_size, workers, advance: as of `write_cams`.

    Returns:
        np.ndarray: [N, D] float32, in the order of the set.

    Raises:
        FileError: a picture that cannot be used.
    """
    model.to(device).eval()
    dataset = Pyramid(pictures, list(range(len(pictures))), Scales((1.0,)), NORMALISATIONS[normalisation])
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=_one_thread)
    rows: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for items in _of_one_size(_usable(loader, pictures, None), batch_size):
            images = torch.stack([item["pyramid"][0] for item in items]).to(device)
            means = model.backbone.features(images)[-1].mean(dim=(2, 3)).float().cpu().numpy()
            rows.update(zip((item["number"] for item in items), means, strict=True))
            advance(len(items))
    return np.stack([rows[i] for i in range(len(pictures))])


def load_run(run: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a training's folder, with its weights, and the manifest.

    Raises:
        FileError: no training, or a damaged one.
    """
    path = Path(run) / MANIFEST
    if not path.is_file():
        raise FileError(run, f"no training: there is no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        module = system(manifest["system"])
        model = module.Model(from_dict(module.Config, manifest["config"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(path, f"damaged, or of another version ({error})") from None
    try:
        model.load_state_dict(read_checkpoint(Path(run))["model"])
    except RuntimeError as error:
        raise FileError(Path(run) / CHECKPOINT, f"of another model ({str(error).partition(chr(10))[0]})") from None
    return model, manifest


def run_hash(run: Path | str) -> str:
    """Tells the weights of a training apart from those of another, or of another epoch."""
    digest = hashlib.sha256()
    with (Path(run) / CHECKPOINT).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _usable(
    loader: DataLoader[dict[str, Any]], pictures: PictureSet, failed: Callable[[str, str], None] | None
) -> Iterator[dict[str, Any]]:
    for item in loader:
        if "error" in item:
            _tell(failed, pictures.ids[item["number"]], item["error"])
        else:
            yield item


def _of_one_size(items: Iterator[dict[str, Any]], count: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of pictures of one size; a size that does not come up again is not waited for."""
    waiting: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        size = tuple(item["size"])
        waiting[size].append(item)
        if len(waiting[size]) == count:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= _WAITING * count:
            yield waiting.pop(next(iter(waiting)))  # the size that has waited longest
    yield from waiting.values()


def _tell(failed: Callable[[str, str], None] | None, name: str, reason: str) -> None:
    if failed is None:
        raise FileError(name, reason)
    failed(name, reason)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
