"""Puzzle-CAM: a picture's class activation maps and those of its tiles, put together again, must agree.

Jo and Yu, Puzzle-CAM: Improved localization via matching partial and full features, ICIP 2021, and its published code,
whose numbers the presets hold. That code keeps the checkpoint whose CAMs fit the ground truth masks of the training set
best, which is full supervision by the back door; here no mask is looked at and the last step's weights count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wsss_models.backbones import build_backbone
from wsss_models.recipe import TINY, Recipe, classification_loss, of_batch, parameter_groups

KINDS = ("masked", "selected", "none")
LEVELS = ("scores", "cam")
_EPS = 1e-5


def _pieces_a_side(pieces: int) -> int:
    if pieces >= 1 and math.isqrt(pieces) ** 2 == pieces:
        return math.isqrt(pieces)
    raise ValueError(f"pieces must be a square number such as 4 or 16, got {pieces}")


def _check_kind(name: str, kind: str, p: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"{name} must be one of {', '.join(KINDS)}, got {kind!r}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")


@dataclass(frozen=True)
class Config:
    """Defaults: the published classifier on ResNet-50."""

    num_classes: int = 20
    backbone: str = "resnet50"  # or "timm/NAME"
    strides: tuple[int, int, int, int] = (2, 2, 2, 1)  # of a ResNet: output stride 16
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1)  # of a ResNet
    width: int = 64  # channels of a ResNet's stem
    output_stride: int | None = None  # of a timm network that takes one, such as ResNeSt
    norm: str = "train"  # the published numbers need batch statistics, of 8 pictures a GPU or more
    pieces: int = 4  # tiles of a picture, a square number
    tile_loss: bool = True  # the classification loss on the merged maps
    reconstruction: str = "masked"  # see `reconstruction_loss`
    p: int = 1  # its power: 1 = absolute, 2 = squared differences
    level: str = "scores"  # what is compared: the "scores" of the pixels, or the "cam" made of them
    alpha: float = 4.0  # weight of the reconstruction
    ramp: float = 0.5  # share of the training in which that weight grows from 0 to alpha
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=15,
            batch_size=32,
            lr_multiples=(1, 2, 10, 20),
            decay_biases=False,
            nesterov=True,
            long_side=(320, 640),
        )
    )

    def __post_init__(self) -> None:
        _pieces_a_side(self.pieces)
        _check_kind("reconstruction", self.reconstruction, self.p)
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        for name in ("alpha", "ramp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number >= 0, got {getattr(self, name)}")


PRESETS = {
    "published": Config(),
    "resnest101": Config(backbone="timm/resnest101e", output_stride=16),
    "tiny": Config(
        backbone="resnet18",
        strides=(2, 1, 2, 1),  # small pictures: output stride 8
        width=24,
        # Scores agree best where they are small, and maps shrink to what tells a class; normalised, they do so less.
        level="cam",
        tile_loss=False,  # half an object need not hold that part
        recipe=TINY,
    ),
}
ABLATIONS = {
    "baseline": ["classifier.alpha=0", "classifier.tile_loss=False"],
    "reconstruction only": ["classifier.tile_loss=False"],
    "tiles' loss only": ["classifier.alpha=0", "classifier.tile_loss=True"],
    "both": ["classifier.tile_loss=True"],
    "scores compared": ["classifier.level=scores"],
    "maps compared": ["classifier.level=cam"],
    "16 pieces": ["classifier.pieces=16"],
    "present classes only": ["classifier.reconstruction=selected"],
    "squares": ["classifier.p=2"],
}


def tile(x: Tensor, pieces: int = 4) -> Tensor:
    """Cut pictures or maps into tiles: [B, C, H, W] -> [pieces * B, C, H / n, W / n] with n = sqrt(pieces).

    The tiles of all pictures that lie in the same place follow each other, places row by row: tile t of picture b is
    number t * B + b.

    Raises:
        ValueError: pieces is no square number, or n does not divide the height and the width.

    Example:
        >>> import torch
        >>> tile(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    n = _pieces_a_side(pieces)
    batch, channels, height, width = _maps("x", x)
    if height % n or width % n:
        raise ValueError(
            f"x must have a height and width that {n} divides, for {pieces} pieces, got {height} x {width}"
        )
    parts = x.reshape(batch, channels, n, height // n, n, width // n)
    return parts.permute(2, 4, 0, 1, 3, 5).reshape(pieces * batch, channels, height // n, width // n)


def merge(tiles: Tensor, pieces: int = 4) -> Tensor:
    """Put tiles together again, `tile` backwards: [pieces * B, C, h, w] -> [B, C, n h, n w] with n = sqrt(pieces).

    Raises:
        ValueError: pieces is no square number, or does not divide the number of tiles.

    Example:
        >>> import torch
        >>> merge(torch.arange(4.0).view(4, 1, 1, 1)).tolist()
        [[[[0.0, 1.0], [2.0, 3.0]]]]
    """
    n = _pieces_a_side(pieces)
    count, channels, height, width = _maps("tiles", tiles)
    if count % pieces:
        raise ValueError(f"tiles must be a multiple of {pieces} (pieces), got {count}")
    parts = tiles.reshape(n, n, count // pieces, channels, height, width)
    return parts.permute(2, 3, 0, 4, 1, 5).reshape(count // pieces, channels, n * height, n * width)


def reconstruction_loss(full: Tensor, merged: Tensor, labels: Tensor, *, kind: str = "masked", p: int = 1) -> Tensor:
    """How far the merged maps are from the picture's, |full - merged|^p on average.

    Args:
        full: [B, C, h, w].
        merged: [B, C, h, w]; the gradient reaches both.
        labels: [B, C], 1 where a class is in the picture, else 0.
        kind: "masked": the mean over all classes and pixels, absent classes counted as 0; "selected": the mean over the
            present classes of each picture, then over the pictures (one without a class counts as 0); "none": the mean
            over all classes, whatever the labels say.
        p: 1 or 2.

    Returns:
        Tensor: a scalar.

    Raises:
        ValueError: an argument outside this contract.

    Source: Puzzle-CAM's published code, where "selected" is NaN for a picture without a class.

    Example:
        >>> import torch
        >>> full, merged = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
        >>> labels = torch.tensor([[1.0, 0.0]])
        >>> [reconstruction_loss(full, merged, labels, kind=kind).item() for kind in ("masked", "selected")]
        [0.5, 1.0]
    """
    _check_kind("kind", kind, p)
    _maps("full", full)
    if merged.shape != full.shape:
        raise ValueError(f"merged must be {list(full.shape)} as full, got {list(merged.shape)}")
    if labels.shape != full.shape[:2]:
        raise ValueError(f"labels must be [B, C] = {list(full.shape[:2])}, got {list(labels.shape)}")
    difference = (full - merged).abs() if p == 1 else (full - merged).square()
    if kind == "none":
        return difference.mean()
    present = labels.to(difference.dtype)
    if kind == "masked":
        return (difference * present[:, :, None, None]).mean()
    means = (difference.mean(dim=(2, 3)) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return means.mean()


def normalised(scores: Tensor) -> Tensor:
    """CAMs from scores [B, C, h, w]: max(max(s, 0) - eps, 0) / (maximum of the map + eps), in 0..1."""
    cams = F.relu(scores)
    return F.relu(cams - _EPS) / (cams.amax(dim=(2, 3), keepdim=True) + _EPS)


class Model(nn.Module):
    """Backbone -> 1 x 1 convolution = the maps; their mean over the pixels is the score of a class."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        options = {} if config.output_stride is None else {"output_stride": config.output_stride}
        self.backbone = build_backbone(
            config.backbone,
            strides=config.strides,
            dilations=config.dilations,
            width=config.width,
            norm=config.norm,
            **options,
        )
        step = _pieces_a_side(config.pieces) * self.backbone.strides[-1]
        if config.recipe.crop % step:
            raise ValueError(
                f"crop must be a multiple of {step} pixels ({config.pieces} pieces, output stride "
                f"{self.backbone.strides[-1]}), got {config.recipe.crop}"
            )
        self.classifier = nn.Conv2d(self.backbone.channels[-1], config.num_classes, 1, bias=False)
        nn.init.kaiming_normal_(self.classifier.weight)

    def scores(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w], of each pixel."""
        return self.classifier(self.backbone.features(images)[-1])

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        """total = classification + tiles + min(progress / ramp, 1) * alpha * reconstruction; terms without weights."""
        images, label = of_batch(batch, "image", "label")
        config = self.config
        full = self.scores(images)
        merged = merge(self.scores(tile(images, config.pieces)), config.pieces)
        if merged.shape != full.shape:
            raise ValueError(
                f"image must have a height and width that {_pieces_a_side(config.pieces)} * the output stride "
                f"{self.backbone.strides[-1]} divides, got {list(images.shape)}"
            )
        terms = {"classification": classification_loss(full.mean(dim=(2, 3)), label)}
        if config.tile_loss:
            terms["tiles"] = classification_loss(merged.mean(dim=(2, 3)), label)
        if config.level == "cam":
            full, merged = normalised(full), normalised(merged)
        reconstruction = reconstruction_loss(full, merged, label, kind=config.reconstruction, p=config.p)
        total = sum(terms.values()) + self.weight(progress) * reconstruction
        return {"total": total, **terms, "reconstruction": reconstruction}

    def weight(self, progress: float) -> float:
        """Of the reconstruction: grows linearly to alpha."""
        config = self.config
        return config.alpha if progress >= config.ramp else config.alpha * progress / config.ramp

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0; of the whole picture, as published."""
        return F.relu(self.scores(images))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.config.recipe, [self.backbone], [self.classifier])


def _maps(name: str, x: Tensor) -> tuple[int, int, int, int]:
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got {list(x.shape)}")
    batch, channels, height, width = x.shape
    return batch, channels, height, width
