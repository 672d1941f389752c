"""A set of pictures as a torch data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wsss_models.data.artefacts import FileError
from wsss_models.data.augment import Augment, generator
from wsss_models.data.pictures import PictureSet

Reader = Callable[[int], np.ndarray]  # number of the picture -> what belongs to it
WHOLE = Augment(flip=False)  # the picture as it is, normalised


class Samples(Dataset[dict[str, Any]]):
    """Samples {"image": [3, h, w] float32, "label": [C] float32, "id": str} and what else is asked for.

    Every draw comes from (seed, epoch, number of the picture): the samples of an epoch are the same for any number of
    workers, in any order, and after a resumption. `set_epoch` reaches workers that are alive, too.

    Args:
        pictures: the set.
        augment: what is done to them; the default only normalises, so that sizes differ between samples.
        seed: >= 0.
        mask: adds "mask" [h, w] int64, 0 background, 1..C, 255 ignore and padding. A picture without one is an error.
        maps: name -> reader of an array [H, W] or [k, H, W] of the picture's size, augmented with it: integers (labels)
            become int64, floating point (scores) float32.
        extras: name -> reader of an array that is handed on as it is.
        finish: called with the sample last; what it returns is the sample. For labels made from augmented maps.

    Example:
        >>> pictures = open_dataset("VOC2012", "train")  # doctest: +SKIP
        >>> samples = Samples(pictures, Augment(crop=448, long_side=(256, 512)))  # doctest: +SKIP
        >>> loader = DataLoader(samples, batch_size=16, num_workers=4, drop_last=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        pictures: PictureSet,
        augment: Augment = WHOLE,
        *,
        seed: int = 0,
        mask: bool = False,
        maps: Mapping[str, Reader] | None = None,
        extras: Mapping[str, Reader] | None = None,
        finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.pictures, self.augment, self.seed = pictures, augment, seed
        self._readers = dict(maps or {})
        if mask:
            self._readers["mask"] = self._mask
        self._extras, self._finish = dict(extras or {}), finish
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Before the loader is iterated over."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"picture must be in 0..{len(self) - 1}, got {i}")
        image = self.pictures.image(i)
        maps = {name: read(i) for name, read in self._readers.items()}
        try:
            tensor, done = self.augment(image, maps, generator(self.seed, self.epoch, i))
        except ValueError as error:
            raise FileError(self.pictures.image_path(i), str(error)) from None
        sample: dict[str, Any] = {"image": tensor, "label": torch.from_numpy(self.pictures.label(i)), **done}
        sample["id"] = self.pictures.ids[i]
        for name, read in self._extras.items():
            sample[name] = _as_tensor(read(i))
        return sample if self._finish is None else self._finish(sample)

    def _mask(self, i: int) -> np.ndarray:
        mask = self.pictures.mask(i)
        if mask is None:
            raise FileError(self.pictures.image_path(i), "no mask of this picture")
        return mask


def _as_tensor(values: np.ndarray) -> Tensor:
    values = np.asarray(values)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32 if values.dtype.kind == "f" else np.int64))
