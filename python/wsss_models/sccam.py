"""SC-CAM: a classifier that also tells the sub-categories of each class apart, which clusters of its features give.

Chang et al., Weakly-supervised semantic segmentation via sub-category exploration, CVPR 2020, section 3, and its
published code, whose numbers the preset "published" holds. A class that is seen by its parts alone gets maps of those
parts; to tell its sub-categories apart the network has to look at more of it.

A round takes the features of the pictures from the network before it (the first from a plain classifier), clusters
those of each class (`sub_categories`), and trains a network anew on classes and sub-categories at once, from the
weights that the first one began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wsss_kernels as wk
from wsss_models import classifier
from wsss_models.backbones import build_backbone
from wsss_models.recipe import Recipe, classification_loss, of_batch, parameter_groups

BRANCHES = ("parent", "sub")  # heads, and the maps of each


@dataclass(frozen=True)
class Config:
    """Defaults: the published rounds on ResNet-38."""

    num_classes: int = 20
    clusters: int = 10  # sub-categories of each class, the paper's K
    sub_weight: float = 5.0  # of the loss of the sub-categories, the paper's lambda
    rounds: int = 3  # of clustering and training in a whole run; 0 = the plain classifier
    round: int = 1  # which of them this training is
    round_epochs: tuple[int, ...] = (30, 40, 50)  # of recipe.epochs, after which each round ends; () = all
    starts: int = 10  # of k-means, of which the best counts
    iterations: int = 300  # of k-means, at most
    cam: str = "parent"  # head whose maps are the class activation maps: of the classes, or of the sub-categories
    backbone: str = "resnet38"
    strides: tuple[int, int, int, int] = (2, 1, 2, 1)  # of a ResNet: output stride 8
    width: int = 64  # channels of a ResNet's stem
    norm: str = "frozen"
    dropout: float = 0.5  # of whole channels before the heads
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=61,
            lr=0.01,
            lr_multiples=(1, 2, 10, 20),
            decay_biases=False,
            weight_decay=5e-4,
            momentum=5e-4,
            crop=224,
            long_side=(256, 512),
            jitter=(0.3, 0.3, 0.3, 0.1),
        )
    )

    def __post_init__(self) -> None:
        for name, least in (("clusters", 1), ("rounds", 0), ("round", 1), ("starts", 1), ("iterations", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.sub_weight >= 0:
            raise ValueError(f"sub_weight must be at least 0, got {self.sub_weight}")
        if any(epochs < 1 for epochs in self.round_epochs):
            raise ValueError(f"round_epochs must be at least 1 each, got {self.round_epochs}")
        if self.cam not in BRANCHES:
            raise ValueError(f"cam must be one of {', '.join(BRANCHES)}, got {self.cam!r}")

    @property
    def last_epoch(self) -> int:
        """Epochs of this round; rounds that `round_epochs` does not name are as long as the last one it does."""
        if not self.round_epochs:
            return self.recipe.epochs
        return min(self.recipe.epochs, self.round_epochs[min(self.round, len(self.round_epochs)) - 1])


_PLAIN = classifier.PRESETS["tiny"]
PRESETS = {
    "published": Config(),
    "tiny": Config(
        round_epochs=(),
        backbone=_PLAIN.backbone,
        strides=_PLAIN.strides,
        width=_PLAIN.width,
        norm=_PLAIN.norm,
        recipe=_PLAIN.recipe,
    ),
}
ABLATIONS = {
    **{f"{rounds} rounds": [f"sccam.rounds={rounds}"] for rounds in (0, 1, 2)},
    **{f"K {clusters}": [f"sccam.clusters={clusters}"] for clusters in (2, 5, 20)},
    **{f"lambda {weight}": [f"sccam.sub_weight={weight}"] for weight in (1, 10)},
    "CAMs of sub-categories": ["sccam.cam=sub"],
}


def branches(config: Config) -> tuple[str, ...]:
    """The maps that a model of these settings can give."""
    return BRANCHES


class SubCategories(NamedTuple):
    """What `sub_categories` found, by picture and class."""

    assigned: Tensor  # [N, C] int64: the class's sub-category 0..K-1; -1 where the class is not in the picture
    distances: Tensor  # [N, C]: of the picture's feature to the center of it; 0 where the class is not in the picture


def sub_categories(
    features: Tensor, labels: Tensor, clusters: int, *, starts: int = 10, iterations: int = 300, seed: int = 0
) -> SubCategories:
    """Cluster the features of the pictures of each class, all classes in one call of `wsss_kernels.kmeans`.

    A picture of several classes takes part in each of them, with the same feature. A class in fewer than K pictures has
    as many sub-categories as pictures, one each; the rest of its K are in no picture.

    Args:
        features: [N, D] floating point, of whole pictures.
        labels: [N, C], above 0 where the class is in the picture.
        clusters: K, of each class.
        starts: runs of k-means, of which the one of least inertia is kept.
        iterations: of k-means, at most.
        seed: of its starts; 0 as published.

    Raises:
        ValueError: features and labels are not of as many pictures, or the features are not finite.

    Source: section 3 of the paper; the published code reduces no dimensions, though it imports what would.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
        >>> found, _ = sub_categories(features, torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]]), 2)
        >>> bool(found[0, 0] == found[1, 0] != found[2, 0]), found[3].tolist(), found[2, 1].item()
        (True, [-1, -1], 0)
    """
    if features.ndim != 2 or labels.ndim != 2 or len(features) != len(labels):
        shapes = f"{list(features.shape)} and {list(labels.shape)}"
        raise ValueError(f"features and labels must be [N, D] and [N, C], got {shapes}")
    assigned = torch.full(labels.shape, -1, dtype=torch.int64, device=features.device)
    distances = features.new_zeros(labels.shape)
    pictures = {c: (labels[:, c] > 0).nonzero()[:, 0].to(features.device) for c in range(labels.shape[1])}
    pictures = {c: numbers for c, numbers in pictures.items() if len(numbers)}
    rows = [features[numbers] for numbers in pictures.values()]
    counts = [min(clusters, len(x)) for x in rows]
    found = wk.kmeans(rows, counts, n_init=starts, iterations=iterations, seed=seed)
    for (c, numbers), x, result in zip(pictures.items(), rows, found, strict=True):
        assigned[numbers, c] = result.labels
        distances[numbers, c] = (x - result.centers[result.labels]).norm(dim=1)
    return SubCategories(assigned, distances)


def sub_labels(assigned: Tensor, clusters: int) -> Tensor:
    """[N, C] of `sub_categories` -> [N, C * K] float32: 1 in column K * class + sub-category of each class there is."""
    return F.one_hot(assigned + 1, clusters + 1)[..., 1:].flatten(1).float()


class Model(nn.Module):
    """Backbone -> mean over the pixels -> two 1 x 1 convolutions without bias, of the C classes and of the C * K.

    The heads have the published names, whatever the number of classes here.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.backbone = build_backbone(config.backbone, strides=config.strides, width=config.width, norm=config.norm)
        for name in getattr(self.backbone, "untrained", ()):
            getattr(self.backbone, name).requires_grad_(False)
        channels, classes = self.backbone.channels[-1], config.num_classes
        self.fc8_20 = nn.Conv2d(channels, classes, 1, bias=False)
        self.fc8_200 = nn.Conv2d(channels, classes * config.clusters, 1, bias=False)
        for head in (self.fc8_20, self.fc8_200):
            nn.init.xavier_uniform_(head.weight)

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        """parent + lambda * sub, both multi-label soft margin."""
        images, label, sublabel = of_batch(batch, "image", "label", "sublabel")
        x = F.dropout2d(self.backbone.features(images)[-1], self.config.dropout, self.training)
        x = x.mean(dim=(2, 3), keepdim=True)
        scores = self.fc8_200(x).flatten(1)
        if sublabel.shape != scores.shape:
            raise ValueError(f"sublabel must be [B, C * K] = {list(scores.shape)}, got {list(sublabel.shape)}")
        parent = classification_loss(self.fc8_20(x).flatten(1), label)
        sub = classification_loss(scores, sublabel)
        return {"total": parent + self.config.sub_weight * sub, "parent": parent, "sub": sub}

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0, of the head that the settings name."""
        return self.join(self.view_maps(images))

    def view_maps(self, images: Tensor) -> Tensor:
        """What is added up over scales and flips: [B, C, h, w], of the sub-categories [B, C * K, h, w]."""
        head = self.fc8_20 if self.config.cam == "parent" else self.fc8_200
        return F.relu(head(self.backbone.features(images)[-1]))

    def join(self, maps: Tensor) -> Tensor:
        """`view_maps` -> [B, C, h, w]: the highest of a class's sub-categories.

        Divided by its peak it is what the published code has, which divides the sub-maps by their joint peak first.
        """
        if self.config.cam == "parent":
            return maps
        return maps.unflatten(1, (self.config.num_classes, self.config.clusters)).amax(dim=2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.config.recipe, [self.backbone], [self.fc8_20, self.fc8_200])
