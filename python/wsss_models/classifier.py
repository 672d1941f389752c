"""A classifier with class activation maps: the baseline, and IRNet's first stage.

Zhou et al., Learning deep features for discriminative localization, CVPR 2016; settings of
Ahn, Cho and Kwak, CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wsss_models.backbones import build_backbone
from wsss_models.recipe import TINY, Recipe, classification_loss, of_batch, parameter_groups


@dataclass(frozen=True)
class Config:
    """Defaults: IRNet's classifier, ResNet-50 at output stride 16 without dilation."""

    num_classes: int = 20
    backbone: str = "resnet50"
    strides: tuple[int, int, int, int] = (2, 2, 2, 1)
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1)
    width: int = 64  # channels of a ResNet's stem
    norm: str = "fixed"
    cut: int | None = 2  # stages of a ResNet up to this one do not learn (0 = the stem); None = all learn
    dropout: float = 0.0  # of whole channels before the classifier
    recipe: Recipe = field(default_factory=lambda: Recipe(long_side=(320, 640)))


PRESETS = {
    "published": Config(),
    "resnet101": Config(backbone="resnet101"),
    "tiny": Config(
        backbone="resnet18",
        strides=(2, 1, 2, 1),  # small pictures: output stride 8
        width=24,
        norm="train",
        cut=None,
        recipe=TINY,
    ),
}


class Model(nn.Module):
    """Backbone -> 1 x 1 convolution -> mean over the pixels.

    Source of the cut after layer 2 and of the fixed statistics: IRNet's published code.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.backbone = build_backbone(
            config.backbone, strides=config.strides, dilations=config.dilations, width=config.width, norm=config.norm
        )
        if config.cut is not None:
            self.backbone.freeze_to(config.cut)
        self.classifier = nn.Conv2d(self.backbone.channels[-1], config.num_classes, 1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w], the last stage."""
        return self.backbone.features(images)[-1]

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        images, label = of_batch(batch, "image", "label")
        x = F.dropout2d(self.features(images), self.config.dropout, self.training)
        classification = classification_loss(self.classifier(x.mean(dim=(2, 3), keepdim=True)).flatten(1), label)
        return {"total": classification, "classification": classification}

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0."""
        return F.relu(self.classifier(self.features(images)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.config.recipe, [self.backbone], [self.classifier])
