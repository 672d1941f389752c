"""What the published systems do to a picture and its maps before training, from one random generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from wsss_models.data.masks import IGNORE

_RESAMPLING = {"picture": Image.Resampling.BICUBIC, "score": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Normalisation:
    """(value - mean) / std a channel, of values 0..255."""

    mean: tuple[float, float, float]  # in the order red, green, blue
    std: tuple[float, float, float]
    bgr: bool = False  # channels out in the order blue, green, red

    def __call__(self, image: np.ndarray) -> Tensor:
        """[H, W, 3] uint8 -> [3, H, W] float32."""
        values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(torch.float32)
        values = (values - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)
        return values.flip(0) if self.bgr else values

    def undo(self, values: Tensor) -> np.ndarray:
        """[3, H, W] -> [H, W, 3] uint8, to look at."""
        values = values.detach().cpu().to(torch.float32)
        values = values.flip(0) if self.bgr else values
        values = values * torch.tensor(self.std).view(3, 1, 1) + torch.tensor(self.mean).view(3, 1, 1)
        return values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _of_255(*shares: float) -> tuple[float, float, float]:
    red, green, blue = (255 * share for share in shares)
    return red, green, blue


IMAGENET = Normalisation(_of_255(0.485, 0.456, 0.406), _of_255(0.229, 0.224, 0.225))
CAFFE_RGB = Normalisation((124.0, 117.0, 104.0), (1.0, 1.0, 1.0))  # MCIC
CAFFE_BGR = Normalisation((122.675, 116.669, 104.008), (1.0, 1.0, 1.0), bgr=True)  # AffinityNet's VGG-16


@dataclass(frozen=True)
class Augment:
    """A random training crop. Steps in this order, as published; None leaves one out.

    1. `long_side`: the longer side becomes a whole number of pixels drawn from lo..hi (AffinityNet 256..512, IRNet
       320..640), bicubic.
    2. `scale`: both sides times a factor drawn from lo..hi (IRNet's labels and MCIC 0.5..1.5), bicubic.
    3. `flip`: left-right, in half of the draws.
    4. `jitter`: `colour_jitter`.
    5. `normalisation`.
    6. `crop`: a window of this size; a random one where the picture is larger, and where it is smaller, a random place
       in a container of 0 (the mean colour, as it comes after normalisation), or of black where `black_padding`
       (AffinityNet's affinity stage, which crops before it normalises).

    Maps go through the same geometry. Integer maps (labels) are resampled to the nearest and padded with 255, floating
    point maps (scores) bilinearly and with 0.

    Example:
        >>> train = Augment(crop=448, long_side=(256, 512), jitter=(0.3, 0.3, 0.3, 0.1))
        >>> image = np.zeros((300, 500, 3), dtype=np.uint8)
        >>> crop, maps = train(image, {"mask": np.zeros((300, 500), dtype=np.uint8)}, np.random.default_rng(0))
        >>> crop.shape, maps["mask"].shape, maps["mask"].dtype
        (torch.Size([3, 448, 448]), torch.Size([448, 448]), torch.int64)
    """

    crop: int | tuple[int, int] | None = None
    long_side: tuple[int, int] | None = None
    scale: tuple[float, float] | None = None
    flip: bool = True
    jitter: tuple[float, float, float, float] | None = None
    normalisation: Normalisation = IMAGENET
    black_padding: bool = False

    def __post_init__(self) -> None:
        crop = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if crop is not None and min(crop) < 1:
            raise ValueError(f"crop must be at least 1 pixel, got {self.crop}")
        for name in ("long_side", "scale"):
            limits = getattr(self, name)
            if limits is not None and not 0 < limits[0] <= limits[1]:
                raise ValueError(f"{name} must be (lo, hi) with 0 < lo <= hi, got {limits}")

    def __call__(
        self, image: np.ndarray, maps: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[H, W, 3] uint8 and maps [H, W] or [k, H, W] -> [3, h, w] float32 and maps int64 or float32.

        Raises:
            ValueError: a map is not of the picture's size.
        """
        height, width = image.shape[:2]
        for name, values in maps.items():
            if values.shape[-2:] != (height, width):
                raise ValueError(f"{name} must have the picture's size {height} x {width}, got shape {values.shape}")
        if self.long_side is not None:
            long = int(rng.integers(self.long_side[0], self.long_side[1] + 1))
            height, width = _scaled(height, width, long / max(height, width))
        if self.scale is not None:
            height, width = _scaled(height, width, rng.uniform(*self.scale))
        image = _resized(image, height, width)
        done = {name: _resized_map(values, height, width) for name, values in maps.items()}
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
            done = {name: values[..., ::-1] for name, values in done.items()}
        if self.jitter is not None:
            image = colour_jitter(image, rng, *self.jitter)
        normalised = self.normalisation(image)
        tensors = {name: _tensor(values) for name, values in done.items()}
        if self.crop is None:
            return normalised, tensors
        size = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        place = _place((height, width), size, rng)
        black = self.normalisation(np.zeros((1, 1, 3), dtype=np.uint8)) if self.black_padding else torch.zeros(3, 1, 1)
        cropped = _cropped(normalised, black, size, place)
        return cropped, {n: _cropped(t, _padding(t), size, place) for n, t in tensors.items()}


def colour_jitter(
    image: np.ndarray, rng: np.random.Generator, brightness: float, contrast: float, saturation: float, hue: float
) -> np.ndarray:
    """Change the colours of a picture [H, W, 3] uint8, in 8 bits a step, the four steps in a random order.

    Brightness, contrast and saturation: a factor drawn from [max(0, 1 - x), 1 + x] blends with black, the mean grey
    and the picture's own grey. Hue: turned by a share of the circle drawn from [-hue, hue].
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    low, high = zip(*((max(0.0, 1 - x), 1 + x) for x in (brightness, contrast, saturation)), strict=True)
    factors = rng.uniform(low, high)
    turn = rng.uniform(-hue, hue)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for step in rng.permutation(4):
        if step < 3:
            picture = enhancers[step](picture).enhance(float(factors[step]))
        elif hue:
            hsv = np.array(picture.convert("HSV"))
            hsv[..., 0] += np.uint8(int(turn * 255) % 256)  # wraps round, as hues do
            picture = Image.frombytes("HSV", picture.size, hsv.tobytes()).convert("RGB")
    return np.array(picture)


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one picture in one epoch: the same however many workers there are, and after a resumption."""
    return np.random.default_rng([seed, epoch, index])


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), _RESAMPLING["picture"]))


def _resized_map(values: np.ndarray, height: int, width: int) -> np.ndarray:
    if values.shape[-2:] == (height, width):
        return values
    if values.dtype.kind != "f":
        ys = ((np.arange(height) + 0.5) * (values.shape[-2] / height)).astype(np.int64)
        xs = ((np.arange(width) + 0.5) * (values.shape[-1] / width)).astype(np.int64)
        return values[..., ys[:, None], xs]
    planes = values.reshape(-1, *values.shape[-2:]).astype(np.float32)
    resized = np.empty((len(planes), height, width), dtype=np.float32)
    for plane, out in zip(planes, resized, strict=True):
        out[:] = np.asarray(Image.fromarray(plane).resize((width, height), _RESAMPLING["score"]))
    return resized.reshape(*values.shape[:-2], height, width)


def _tensor(values: np.ndarray) -> Tensor:
    dtype = np.float32 if values.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))


def _padding(values: Tensor) -> Tensor:
    return torch.tensor(0.0 if values.is_floating_point() else IGNORE, dtype=values.dtype)


def _place(
    given: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of rows and columns: (first of the source, first of the container, how many)."""
    rows, columns = (
        (int(rng.integers(n - size + 1)), 0, size) if n >= size else (0, int(rng.integers(size - n + 1)), n)
        for n, size in zip(given, wanted, strict=True)
    )
    return rows, columns


def _cropped(
    values: Tensor, padding: Tensor, size: tuple[int, int], place: tuple[tuple[int, int, int], tuple[int, int, int]]
) -> Tensor:
    (y, to_y, rows), (x, to_x, columns) = place
    source = values[..., y : y + rows, x : x + columns]
    if (rows, columns) == size:
        return source.contiguous()
    container = padding.expand(*values.shape[:-2], *size).clone()
    container[..., to_y : to_y + rows, to_x : to_x + columns] = source
    return container
