"""IRNet: boundaries learnt from labels that two CRFs agree on, and maps spread up to them.

Ahn, Cho and Kwak, Weakly supervised learning of instance segmentation with inter-pixel relations, CVPR 2019, and its
published code. Its first stage is `classifier`; the displacement branch, which only instance masks need, is left out
(the backbone is frozen, so that the boundaries do not depend on it).
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
from wsss_models.recipe import TINY, Recipe, of_batch, parameter_groups

STRIDE = 4  # of boundaries and of affinity labels


@dataclass(frozen=True)
class Config:
    """Defaults: the boundary branch on a frozen ResNet-50."""

    num_classes: int = 20
    backbone: str = "resnet50"  # a ResNet
    strides: tuple[int, int, int, int] = (2, 2, 2, 1)
    width: int = 64  # channels of its stem
    edge_width: int = 32  # channels from each of the backbone's five stages
    norm: str = "frozen"  # of the backbone
    frozen: bool = True  # the backbone does not learn; one without pretraining has not seen boundaries yet, and should
    radius: int = 10  # pixels of the boundaries' grid; neighbours nearer than that are compared
    border: str = "cropped"  # pairs of neighbours, see `affinity_loss`
    fg: float = 0.30  # scores of the background from which the labels of the training are made: `confident_labels`
    bg: float = 0.05
    walk_radius: int = 5  # of the walk in `labels`: pixels of the boundaries' grid,
    beta: float = 10.0  # power of the affinities,
    steps: int = 256
    background: float | None = 0.25  # score up to which a pixel is background there; None = found for each picture
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=3, batch_size=32, lr_multiples=(1, 1, 1, 1), weight_decay=1e-4, momentum=1e-4, scale=(0.5, 1.5)
        )
    )

    def label_options(self) -> dict[str, float]:
        """Of `confident_labels`."""
        return {"fg": self.fg, "bg": self.bg}


_TINY = Config(
    backbone="resnet18",
    strides=(2, 1, 2, 1),
    width=24,
    edge_width=16,
    norm="train",
    frozen=False,
    radius=5,
    fg=0.15,  # its CAMs have narrow peaks
    steps=16,  # on maps of 28 x 28, that far across as 256 on the published ones
    recipe=replace(TINY, weight_decay=1e-4),
)
PRESETS = {
    "published": Config(),
    "resnet101": Config(backbone="resnet101"),
    "tiny": _TINY,
    # After Puzzle-CAM, which has label settings of its own:
    "puzzlecam-published": Config(fg=0.40, bg=0.10, background=0.35),
    "puzzlecam-tiny": replace(_TINY, fg=0.10, bg=0.03),  # its maps are narrower still
}
ABLATIONS = {
    "published labels": ["affinity.fg=0.3", "affinity.bg=0.05"],
    "frozen backbone": ["affinity.frozen=True", "affinity.norm=frozen"],
    "256 steps": ["affinity.steps=256"],
    "each picture's own threshold": ["affinity.background=None"],
}


class Model(nn.Module):
    """A backbone, frozen as published, the classifier of stage one, and the boundary branch, named as published."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.backbone = build_backbone(config.backbone, strides=config.strides, width=config.width, norm=config.norm)
        if config.frozen:
            self.backbone.requires_grad_(False)
        self.classifier = nn.Conv2d(self.backbone.channels[-1], config.num_classes, 1, bias=False).requires_grad_(False)
        for i, channels in enumerate(self.backbone.channels, start=1):
            layers = nn.Sequential(
                nn.Conv2d(channels, config.edge_width, 1, bias=False), nn.GroupNorm(4, config.edge_width)
            )
            setattr(self, f"fc_edge{i}", layers)
        self.fc_edge6 = nn.Conv2d(5 * config.edge_width, 1, 1)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        images, _, labels = of_batch(batch, "image", "label", "affinity_label")
        boundary = self.boundary_logits(images).sigmoid()
        if labels.shape != (len(boundary), *boundary.shape[-2:]):
            expected = [len(boundary), *boundary.shape[-2:]]
            raise ValueError(f"affinity_label must be {expected}, got {list(labels.shape)}")
        radius = self.config.radius
        links = wk.boundary_affinity(boundary, radius)
        affinity = wk.affinity_loss(links, labels, radius=radius, border=self.config.border, ignore_index=255)
        return {"total": affinity, "affinity": affinity}

    def boundary_logits(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1, ceil(H / 4), ceil(W / 4)], before the sigmoid."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            stages = self.backbone.features(images)
        height, width = stages[1].shape[-2:]
        parts = []
        for i, x in enumerate(stages, start=1):
            y = getattr(self, f"fc_edge{i}")(x)
            factor = self.backbone.strides[i - 1] // STRIDE
            if factor > 1:
                y = F.interpolate(y, scale_factor=factor, mode="bilinear", align_corners=False)
            parts.append(F.relu(y)[..., :height, :width])
        return self.fc_edge6(torch.cat(parts, dim=1))

    @torch.no_grad()
    def boundaries(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> [B, 1, ceil(H / 4), ceil(W / 4)] in 0..1, the mean logit with the flipped picture.

        Of any size: the published code cuts pictures larger than 512 pixels off.
        """
        plain, flipped = self.boundary_logits(torch.cat([images, images.flip(3)])).chunk(2)
        return (plain / 2 + flipped.flip(3) / 2).sigmoid()

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0, by the classifier that the weights brought along.

        Of use with a frozen backbone alone: one that learns boundaries moves away from what that classifier knows.
        """
        return F.relu(self.classifier(self.backbone.features(images)[-1]))

    @torch.no_grad()
    def labels(
        self,
        images: Tensor,
        cams: Tensor,
        *,
        background: float | None = None,
        class_ids: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Labels of the pictures' size: maps of the present classes spread up to the boundaries (`boundary_labels`).

        Args:
            images: [B, 3, H, W] normalised, in evaluation mode.
            cams: [B, C, h, w], of the classes present only.
            background: score up to which a pixel is background, in place of the settings'.
            class_ids: what to write for the C classes instead of 1..C.

        Returns:
            Tensor: [B, H, W] int64.
        """
        config = self.config
        background = config.background if background is None else background
        return wk.boundary_labels(
            cams,
            self.boundaries(images),
            background="auto" if background is None else background,
            size=(images.shape[-2], images.shape[-1]),
            class_ids=class_ids,
            radius=config.walk_radius,
            beta=config.beta,
            steps=config.steps,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        heads = [getattr(self, f"fc_edge{i}") for i in range(1, 7)]
        return parameter_groups(self.config.recipe, [self.backbone], heads)


def shrink_labels(labels: Tensor, stride: int = STRIDE) -> Tensor:
    """Labels of a picture's size to those of the boundaries: the pixel at 4 i + 2, as Pillow's nearest takes it.

    Args:
        labels: [..., H, W] int, 0..255.

    Returns:
        Tensor: [..., ceil(H / stride), ceil(W / stride)], the last row or column again where there is none at 4 i + 2.
    """
    rows, columns = (
        (torch.arange(-(-n // stride)) * stride + stride // 2).clamp(max=n - 1).to(labels.device)
        for n in labels.shape[-2:]
    )
    return labels[..., rows[:, None], columns].to(torch.int64)
