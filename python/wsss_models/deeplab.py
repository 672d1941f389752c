"""DeepLab v2 and v3+: the network that learns to segment from pseudo-labels, or from masks.

Chen et al., DeepLab: semantic image segmentation with deep convolutional nets, atrous convolution, and fully connected
CRFs, PAMI 2018 (v2); Chen et al., Encoder-decoder with atrous separable convolution, ECCV 2018 (v3+), as Puzzle-CAM's
published code has it: plain convolutions, group normalisation in the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_models.backbones import build_backbone
from wsss_models.recipe import TINY, Recipe, of_batch, parameter_groups

VERSIONS = ("v2", "v3plus")
TRAINS_ON_MASKS = True
IGNORE = 255
_LOW_LEVEL_STRIDE = 4  # of the features that the decoder of v3+ adds
_GROUPS = 4  # of the normalisation in the head of v3+


@dataclass(frozen=True)
class Config:
    """Defaults: DeepLab v2 on ResNet-101 at output stride 8."""

    num_classes: int = 20  # without the background
    version: str = "v2"
    backbone: str = "resnet101"
    strides: tuple[int, int, int, int] = (2, 2, 1, 1)
    dilations: tuple[int, int, int, int] = (1, 1, 2, 4)
    width: int = 64  # channels of a ResNet's stem
    norm: str = "frozen"
    rates: tuple[int, ...] = (6, 12, 18, 24)  # dilations of the 3 x 3 convolutions in parallel
    head_width: int = 256  # channels in the head of v3+
    low_width: int = 48  # channels of the low-level features there
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=19,  # 20 000 steps of 10 of the 10 582 pictures of VOC train_aug
            batch_size=10,
            lr=2.5e-4,
            lr_multiples=(1, 2, 10, 20),
            decay_biases=False,
            weight_decay=5e-4,
            momentum=0.9,
            crop=321,
            scale=(0.5, 1.5),
        )
    )

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {self.version!r}")
        if not self.rates or min(self.rates) < 1:
            raise ValueError(f"rates must be one or more numbers of at least 1 pixel, got {self.rates}")
        for name in ("head_width", "low_width"):
            if getattr(self, name) < 1 or getattr(self, name) % _GROUPS:
                raise ValueError(f"{name} must be a multiple of {_GROUPS} channels, got {getattr(self, name)}")


_TINY = Config(
    version="v3plus",  # v2's head has no normalisation: over random features it needs a learning rate of its own
    backbone="resnet18",
    strides=(2, 1, 2, 1),
    dilations=(1, 1, 1, 2),
    width=24,
    norm="train",
    rates=(1, 2, 3, 4),  # a grid of 12 x 12
    head_width=48,
    low_width=16,
    recipe=replace(TINY, scale=(0.75, 1.25)),
)
PRESETS = {
    "published": Config(),
    "v3plus": Config(
        version="v3plus",
        strides=(2, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        rates=(6, 12, 18),
        recipe=Recipe(
            epochs=50,
            batch_size=32,
            lr=0.007,
            lr_multiples=(1, 2, 10, 20),
            decay_biases=False,
            weight_decay=4e-5,
            momentum=0.9,
            crop=512,
            long_side=(256, 1024),
        ),
    ),
    "tiny": _TINY,
}


class Model(nn.Module):
    """Backbone -> head -> a score for the background and each class, at the head's resolution.

    v2: the sum of 3 x 3 convolutions, one a rate. v3+: a 1 x 1 convolution, a 3 x 3 one a rate and the mean over the
    picture side by side, brought to the size of the low-level features, two 3 x 3 convolutions over both.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.backbone = build_backbone(
            config.backbone, strides=config.strides, dilations=config.dilations, width=config.width, norm=config.norm
        )
        for name in getattr(self.backbone, "untrained", ()):
            getattr(self.backbone, name).requires_grad_(False)
        classes, channels = config.num_classes + 1, self.backbone.channels
        if config.version == "v2":
            self.aspp: nn.Module = SummedPyramid(channels[-1], classes, config.rates)
            return
        near = [i for i, stride in enumerate(self.backbone.strides) if stride <= _LOW_LEVEL_STRIDE]
        if not near:
            raise ValueError(f"backbone must have features at 1/{_LOW_LEVEL_STRIDE} of the size, got {config.backbone}")
        self._low_stage = near[-1]
        self.aspp = PooledPyramid(channels[-1], config.head_width, config.rates)
        self.low = _convolution(channels[self._low_stage], config.low_width, 1)
        self.decoder = nn.Sequential(
            _convolution(config.head_width + config.low_width, config.head_width, 3),
            _convolution(config.head_width, config.head_width, 3),
            nn.Conv2d(config.head_width, classes, 1),
        )

    def logits(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C + 1, h, w]: v2 at the backbone's output stride, v3+ at the low-level features'."""
        stages = self.backbone.features(images)
        x = self.aspp(stages[-1])
        if self.config.version == "v2":
            return x
        low = self.low(stages[self._low_stage])
        x = F.interpolate(x, low.shape[-2:], mode="bilinear", align_corners=True)
        return self.decoder(torch.cat([x, low], dim=1))

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        """Mean cross-entropy over the pixels whose mask is not 255, at the pictures' size; 0 where there is none."""
        images, mask = of_batch(batch, "image", "mask")
        expected = (len(images), *images.shape[-2:])
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask must be [B, H, W] = {list(expected)}, got {list(mask.shape)}")
        counted = (mask != IGNORE).sum().clamp_min(1)
        logits = self._resized(self.logits(images), images)
        segmentation = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum") / counted
        return {"total": segmentation, "segmentation": segmentation}

    def scores(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> [B, C + 1, H, W] probabilities, 0 the background."""
        return self._resized(self.logits(images), images).float().softmax(dim=1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        heads = [module for name, module in self.named_children() if name != "backbone"]
        return parameter_groups(self.config.recipe, [self.backbone], heads)

    def _resized(self, logits: Tensor, images: Tensor) -> Tensor:
        corners = self.config.version == "v3plus"
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=corners)


class SummedPyramid(nn.Module):
    """[B, D, h, w] -> [B, C, h, w]: the sum of 3 x 3 convolutions, one a rate."""

    def __init__(self, ins: int, outs: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(ins, outs, 3, padding=rate, dilation=rate) for rate in rates)
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(dim=0)


class PooledPyramid(nn.Module):
    """[B, D, h, w] -> [B, width, h, w]: 1 x 1, 3 x 3 at each rate and the picture's mean, mixed by a 1 x 1."""

    def __init__(self, ins: int, width: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_convolution(ins, width, 1), *(_convolution(ins, width, 3, rate) for rate in rates)]
        )
        self.pool = _convolution(ins, width, 1)
        self.mix = _convolution(width * (len(rates) + 2), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.mix(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


def _convolution(ins: int, outs: int, size: int, rate: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(ins, outs, size, padding=rate * (size // 2), dilation=rate, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.GroupNorm(_GROUPS, outs), nn.ReLU())
