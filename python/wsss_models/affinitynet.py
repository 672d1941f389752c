"""AffinityNet: a classifier with class activation maps, and features whose distance says "same object".

Ahn and Kwak, Learning pixel-level semantic affinity with image-level supervision, CVPR 2018, and its published code,
whose numbers the presets hold (the paper's L1 distance is not divided by the number of channels, and weighs the losses
4 times as much).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wsss_kernels as wk
from wsss_models.backbones import build_backbone
from wsss_models.recipe import TINY, Recipe, classification_loss, of_batch, parameter_groups

STAGES = ("affinity", "classifier")
STRIDE = 8  # of features and of affinity labels
_GROUPS = (8, 16, 32)  # of the VGG-16 head's normalisation


@dataclass(frozen=True)
class Config:
    """Defaults: the affinity stage on ResNet-38."""

    num_classes: int = 20
    stage: str = "affinity"  # what `loss` trains: "affinity", or "classifier", which comes before it
    backbone: str = "resnet38"
    strides: tuple[int, int, int, int] = (2, 1, 2, 1)  # of a ResNet: output stride 8
    width: int = 64  # channels of a ResNet's stem
    norm: str = "frozen"
    dropout: float = 0.5  # of whole channels before the classifier
    head: tuple[int, int, int] = (64, 128, 256)  # channels from the backbone's last three stages
    radius: int = 5  # pixels of the features' grid; neighbours nearer than that are compared
    border: str = "cropped"  # pairs of neighbours, see `local_affinity`; "full" suits small pictures better
    paper_loss: bool = False  # the paper's: distances summed over the channels, losses 4 times as heavy
    low: float = 4.0  # powers of the background from which the labels of the training are made: `affinity_labels`
    high: float = 32.0
    background: float = 16.0  # power of the background that walks with the maps in `labels`
    beta: float = 8.0  # power of the affinities in the walk of `refine`
    steps: int = 256
    root: bool = False  # maps are the square root of the rectified scores
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=8,
            batch_size=8,
            lr_multiples=(1, 2, 10, 20),
            decay_biases=False,
            weight_decay=5e-4,
            momentum=5e-4,
            crop=448,
            jitter=(0.3, 0.3, 0.3, 0.1),
            black_padding=True,
        )
    )

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")

    def label_options(self) -> dict[str, float]:
        """Of `affinity_labels`."""
        return {"low": self.low, "high": self.high}


def _classifier(config: Config, **recipe: Any) -> Config:
    settings = {"epochs": 15, "batch_size": 16, "long_side": (256, 512), "black_padding": False, **recipe}
    return replace(config, stage="classifier", recipe=replace(config.recipe, **settings))


_PUBLISHED = Config()
_VGG16 = Config(backbone="vgg16", root=True, recipe=replace(_PUBLISHED.recipe, normalisation="caffe-bgr"))
_TINY = Config(
    backbone="resnet18",
    width=24,
    norm="train",
    dropout=0.0,
    head=(16, 32, 64),
    border="full",
    low=16.0,  # its CAMs have narrow peaks
    high=64.0,
    steps=32,  # a grid of 14 x 14 is smoothed out by many more
    recipe=TINY,
)
PRESETS = {
    "published": _PUBLISHED,
    "published-classifier": _classifier(_PUBLISHED),
    "vgg16": _VGG16,
    "vgg16-classifier": _classifier(_VGG16),
    "tiny": _TINY,
    "tiny-classifier": replace(_TINY, stage="classifier"),
}
ABLATIONS = {
    "paper's loss": ["affinity.paper_loss=True"],
    "published labels": ["affinity.low=4", "affinity.high=32"],
    "pairs not cropped": ["affinity.border=full"],
    "short walk": ["affinity.steps=4"],
    "beta 1": ["affinity.beta=1"],
}


class Model(nn.Module):
    """Backbone with two heads; the parameter names of the heads are the published ones.

    fc8 on the last stage gives the scores of the classes; f8_3, f8_4, f8_5 and f9 turn the last three stages into the
    features (448 channels with the published widths) that are compared.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        options = {"fc6_dilation": 4 if config.stage == "affinity" else 1} if config.backbone == "vgg16" else {}
        self.backbone = build_backbone(
            config.backbone, strides=config.strides, width=config.width, norm=config.norm, **options
        )
        for name in getattr(self.backbone, "untrained", ()):
            getattr(self.backbone, name).requires_grad_(False)
        self.fc8 = nn.Conv2d(self.backbone.channels[-1], config.num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        norms = config.backbone == "vgg16"
        for name, ins, outs, groups in zip(
            ("8_3", "8_4", "8_5"), self.backbone.channels[-3:], config.head, _GROUPS, strict=True
        ):
            conv = nn.Conv2d(ins, outs, 1, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            setattr(self, f"f{name}", conv)
            setattr(self, f"gn{name}", nn.GroupNorm(groups, outs) if norms else nn.Identity())
        self.f9 = nn.Conv2d(sum(config.head), sum(config.head), 1, bias=False)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)
        affinity = [self.f8_3, self.f8_4, self.f8_5, self.gn8_3, self.gn8_4, self.gn8_5, self.f9]
        for module in [self.fc8] if config.stage == "affinity" else affinity:
            module.requires_grad_(False)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        if self.config.stage == "classifier":
            images, label = of_batch(batch, "image", "label")
            x = F.dropout2d(self.backbone.features(images)[-1], self.config.dropout, self.training)
            classification = classification_loss(self.fc8(x.mean(dim=(2, 3), keepdim=True)).flatten(1), label)
            return {"total": classification, "classification": classification}
        images, _, labels = of_batch(batch, "image", "label", "affinity_label")
        feats = self.features(images)
        if labels.shape != (len(feats), *feats.shape[-2:]):
            expected = [len(feats), *feats.shape[-2:]]
            raise ValueError(f"affinity_label must be {expected}, got {list(labels.shape)}")
        radius = self.config.radius
        links = wk.local_affinity(feats, radius, scale=self._scale(feats))
        affinity = wk.affinity_loss(links, labels, radius=radius, border=self.config.border, ignore_index=255)
        affinity = 4 * affinity if self.config.paper_loss else affinity
        return {"total": affinity, "affinity": affinity}

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, sum(head), h, w], what the walk compares; of ResNet-38 and VGG-16 at H/8."""
        stages = self.backbone.features(images)[-3:]
        size = stages[-1].shape[-2:]
        parts = []
        for name, x in zip(("8_3", "8_4", "8_5"), stages, strict=True):
            y = F.elu(getattr(self, f"gn{name}")(getattr(self, f"f{name}")(x)))
            parts.append(y if y.shape[-2:] == size else F.interpolate(y, size, mode="bilinear", align_corners=False))
        return F.elu(self.f9(torch.cat(parts, dim=1)))

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0."""
        scores = F.relu(self.fc8(self.backbone.features(images)[-1]))
        return scores.sqrt() if self.config.root else scores

    @torch.no_grad()
    def refine(self, images: Tensor, cams: Tensor, *, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Spread maps over the learnt affinity: `refine_cams(preset="psa")` on this network's features.

        Args:
            images: [B, 3, H, W] normalised, in evaluation mode.
            cams: [B, C, h, w].
            labels: [B, C] bool, classes present.
            **options: of `refine_cams`, in place of the settings' (beta, steps, radius, border) and of the published
                background, 16.

        Returns:
            Tensor: [B, C + 1, h, w], map 0 the background.
        """
        config = self.config
        walk = {"radius": config.radius, "border": config.border, "beta": config.beta, "steps": config.steps}
        feats = self.features(images)
        options = {**walk, "scale": self._scale(feats), **options}
        return wk.refine_cams(cams, feats, labels=labels, preset="psa", **options)

    @torch.no_grad()
    def labels(
        self,
        images: Tensor,
        cams: Tensor,
        *,
        background: float | None = None,
        class_ids: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Labels of the pictures' size: the best of the refined maps and the refined background.

        Args:
            images: [B, 3, H, W] normalised, in evaluation mode.
            cams: [B, C, h, w] with a peak of 1 a class, of the classes present only.
            background: power of the background (1 - max)^background, in place of the settings'; a high one leaves
                less of it.
            class_ids: what to write for the C classes instead of 1..C.

        Returns:
            Tensor: [B, H, W] int64.
        """
        size = (images.shape[-2], images.shape[-1])
        background = self.config.background if background is None else background
        maps = self.refine(images, cams, background=background, size=size, normalize=None)
        return wk.labels_from_maps(maps, background=None, class_ids=class_ids)

    def _scale(self, feats: Tensor) -> float:
        """Of `local_affinity`, which takes the mean over the channels: 1 / D makes it the sum."""
        return 1 / feats.shape[1] if self.config.paper_loss else 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        new = [self.fc8, self.f8_3, self.f8_4, self.f8_5, self.f9, self.gn8_3, self.gn8_4, self.gn8_5]
        return parameter_groups(self.config.recipe, [self.backbone], new)


def shrink_labels(labels: Tensor, stride: int = STRIDE) -> Tensor:
    """Labels of a picture's size to those of the features: the most frequent of each block, ignored pixels included.

    The published code averages the two CRFs' marginals over a block before it takes the best; here, where one label
    picture holds what both agree on, its pixels vote. Ties go to the lower label.

    Args:
        labels: [..., H, W] int, 0..255; H and W multiples of stride.

    Returns:
        Tensor: [..., H / stride, W / stride] int64.
    """
    if labels.shape[-2] % stride or labels.shape[-1] % stride:
        raise ValueError(f"labels must have sides that are multiples of {stride}, got {tuple(labels.shape)}")
    blocks = labels.unflatten(-1, (-1, stride)).unflatten(-3, (-1, stride)).transpose(-3, -2).flatten(-2)
    votes = torch.stack([(blocks == value).sum(dim=-1) for value in labels.unique().tolist()])
    return labels.unique()[votes.argmax(dim=0)].to(torch.int64)
