"""MCIC: contexts of a class, remembered from other images, teach a segmentation network in one stage.

Fan and Zhang, Memory-based Cross-image Contexts for Weakly Supervised Semantic Segmentation, TPAMI 2022, and its
published code, whose formulas and numbers these are:

    f = backbone(image)                                                    features
    h = classification(f), s = segmentation(f)                             scores of C classes, of C + 1 with background
    memory <- contexts of f under the confidence of s                      of the classes in each image's label
    f~ = f + relu(LN(attention(f, memory))), s~ = segmentation(f~)         what other images know of the same classes
    total = L_cls(mean h) + ramp (sum over the seeds i of scale_i (CE(s, seed_i) + CE(s~, seed_i)) + entropy)

with seeds from h, from s~, and from where the two agree. The loss of s~ trains nothing but the attention and its
normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import wsss_kernels as wk
from wsss_kernels import MemoryBank
from wsss_models.backbones import build_backbone
from wsss_models.recipe import TINY, Recipe, of_batch, parameter_groups

__all__ = ["PRESETS", "Config", "MemoryBank", "Model"]

TAKES_SALIENCY = True
MEMORIES = ("prototypes", "pixels", "none")
CONFIDENCES = ("segmentation", "classification")
IGNORE = 255


@dataclass(frozen=True)
class Config:
    """Defaults: VGG-16 with LargeFOV heads at output stride 8."""

    num_classes: int = 20  # without the background
    backbone: str = "vgg16"
    strides: tuple[int, int, int, int] = (2, 2, 1, 1)  # of a ResNet
    dilations: tuple[int, int, int, int] = (1, 1, 2, 4)  # of a ResNet
    width: int = 64  # channels of a ResNet's stem
    norm: str = "fixed"
    head_width: int | None = 1024  # channels of the heads' two hidden layers; None = a head is one 3 x 3 convolution
    rates: tuple[int, ...] = (12,)  # dilations of the segmentation head's branches; (6, 12, 18, 24) is ASPP
    dropout: float = 0.5  # in the heads, after each hidden layer
    cam_threshold: float = 0.1  # a seed's pixel is known where its best map is at least this
    saliency_threshold: float = 0.1  # below, a saliency map says background
    saliency_weight: float = 0.5  # of the saliency map in the background of the seed from s~
    background: float = 22.0  # without saliency maps the background is (1 - max)^background: 22 is a threshold of 0.1
    memory: str = "prototypes"  # what it holds: a context a class and image, every confident pixel, or "none"
    capacity: int = 64  # entries a class
    confidence: str = "segmentation"  # the scores that contexts are weighted by: of s, or of h and the background
    context_threshold: float = 0.5  # of a pixel's confidence, 0..1
    context_mass: float = 1.0  # pixels: a context is remembered where its confidences sum to more
    normalise: bool = False  # queries and memory to length 1
    attention_dropout: float = 0.1
    stop_gradient: bool = True  # the loss of s~ trains the attention only; False: backbone and segmentation head too
    entropy: bool = False  # also the mean entropy of the attention is made small
    warm_up: float = 0.25  # share of the training until the ramp is 1: 5 of 20 epochs
    cam_seed_floor: float = 0.6  # the seed from h weighs 1 - ramp, but never less
    segmentation_weight: float = 1.0  # of the losses of s and s~, and of the entropy, beside that of h
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=20,
            batch_size=16,
            lr=1e-3,
            lr_multiples=(1, 1, 10, 10),
            weight_decay=5e-4,
            momentum=0.9,
            crop=321,
            scale=(0.5, 1.5),
            normalisation="caffe-rgb",
        )
    )

    def __post_init__(self) -> None:
        for name, known in (("memory", MEMORIES), ("confidence", CONFIDENCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.rates or min(self.rates) < 1:
            raise ValueError(f"rates must be one or more numbers of at least 1 pixel, got {self.rates}")
        for name in ("dropout", "attention_dropout", "saliency_weight", "warm_up", "cam_seed_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("capacity", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.segmentation_weight >= 0:
            raise ValueError(f"segmentation_weight must be at least 0, got {self.segmentation_weight}")
        if not self.background > 0:
            raise ValueError(f"background must be a power above 0, got {self.background}")


_PUBLISHED = Config()
_RESNET = Config(backbone="resnet101", head_width=None, dropout=0.0)
_TINY = Config(
    backbone="resnet18",
    strides=(2, 1, 2, 1),
    dilations=(1, 1, 1, 1),
    width=24,
    norm="train",
    head_width=None,
    rates=(1, 2, 3, 4),  # a grid of 12 x 12
    dropout=0.0,
    warm_up=0.5,
    recipe=replace(TINY, epochs=40, lr=0.03, scale=(0.75, 1.25)),  # at 0.05 one of five trainings lost its classes
)
PRESETS = {
    "published": _PUBLISHED,
    "vgg16_largefov": _PUBLISHED,
    "vgg16_aspp": replace(_PUBLISHED, rates=(6, 12, 18, 24)),
    "resnet101": _RESNET,
    "resnet101_aspp": replace(_RESNET, rates=(6, 12, 18, 24)),
    "tiny": _TINY,
}
ABLATIONS = {
    "no memory": ["classifier.memory=none"],
    "pixels in memory": ["classifier.memory=pixels"],
    "entropy": ["classifier.entropy=True"],
    "no stop-gradient": ["classifier.stop_gradient=False"],
    "contexts by the classifier": ["classifier.confidence=classification"],
}


class Model(nn.Module):
    """Backbone, two heads, and the memory with its attention. Classes of the memory: 0 the background, then 1..C.

    The memory is in the state_dict. Several processes put into it what all of them found, so that theirs stay equal.
    """

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        options = {"top": False} if config.backbone == "vgg16" else {}
        self.backbone = build_backbone(
            config.backbone,
            strides=config.strides,
            dilations=config.dilations,
            width=config.width,
            norm=config.norm,
            **options,
        )
        for name in getattr(self.backbone, "untrained", ()):
            getattr(self.backbone, name).requires_grad_(False)
        dim = self.backbone.channels[-1]
        self.classification = Head(dim, config.num_classes, (1,), config.head_width, config.dropout)
        self.segmentation = Head(dim, config.num_classes + 1, config.rates, config.head_width, config.dropout)
        if config.memory != "none":
            self.bank = MemoryBank(config.num_classes + 1, dim, config.capacity, gather="all")
            self.propagation = Propagation(dim, config.attention_dropout, config.normalise)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w], at 1/8 of the size in the published settings."""
        return self.backbone.features(images)[-1]

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        """Terms classification, segmentation (of s), attention (of s~) and entropy; in training, the memory learns.

        `batch` holds image [B, 3, H, W] and label [B, C], and may hold saliency [B, 1, H, W] in 0..1.
        """
        config = self.config
        images, label = of_batch(batch, "image", "label")
        expected = (len(images), config.num_classes)
        if tuple(label.shape) != expected:
            raise ValueError(f"label must be [B, C] = {list(expected)}, got {list(label.shape)}")
        feats = self.features(images)
        scores, logits = self.classification(feats), self.segmentation(feats)
        with torch.no_grad():
            cams = peak_maps(scores, label)
            hard, soft = self._backgrounds(cams, batch.get("saliency"), images)
        terms = {"classification": classification_loss(scores.mean(dim=(2, 3)), label)}
        improved = logits
        if config.memory != "none":
            if self.training:
                self._remember(feats, logits, torch.cat([hard, cams], dim=1), label)
            improved, entropy = self._with_memory(feats, label)
        with torch.no_grad():
            seeds = self._seeds(cams, improved, label, hard, soft)
        share = ramp(progress, config.warm_up)
        scales = (max(1 - share, config.cam_seed_floor), 1.0, 1.0)
        terms["segmentation"] = weighted_loss(logits, seeds, scales)
        extra = terms["segmentation"]
        if config.memory != "none":
            terms["attention"] = weighted_loss(improved, seeds, scales)
            extra = extra + terms["attention"]
            if config.entropy:
                terms["entropy"] = entropy
                extra = extra + entropy
        return {"total": terms["classification"] + share * config.segmentation_weight * extra, **terms}

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0."""
        return F.relu(self.classification(self.features(images)))

    def scores(self, images: Tensor) -> Tensor:
        """The segmentation without its memory: [B, 3, H, W] normalised -> [B, C + 1, H, W] probabilities."""
        return _resized(self.segmentation(self.features(images)), images).softmax(dim=1)

    def labelled_scores(self, images: Tensor, label: Tensor) -> Tensor:
        """The segmentation with its memory, of pictures whose classes are known: training labels for another network.

        Args:
            images: [B, 3, H, W] normalised.
            label: [B, C], above 0 where a class is in the image; or [C], the same for all.

        Returns:
            Tensor: [B, C + 1, H, W] probabilities of the background and the classes present; 0 of the others.
        """
        label = label.expand(len(images), -1)
        feats = self.features(images)
        logits = self.segmentation(feats) if self.config.memory == "none" else self._with_memory(feats, label)[0]
        absent = (with_background(label) <= 0)[:, :, None, None]
        return _resized(logits, images).masked_fill(absent, -torch.inf).softmax(dim=1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """New, with the higher rate: the last layer of each head, the attention and its normalisation."""
        heads = (self.classification, self.segmentation)
        old = [self.backbone, *(layer for head in heads for layer in head.hidden())]
        new = [layer for head in heads for layer in head.last()]
        return parameter_groups(
            self.config.recipe, old, [*new, self.propagation] if self.config.memory != "none" else new
        )

    def _backgrounds(self, cams: Tensor, saliency: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """Background maps [B, 1, h, w] in 0..1 for the seed from h and for the one from s~."""
        if saliency is None:
            background = (1 - cams.amax(dim=1, keepdim=True)) ** self.config.background
            return background, background
        expected = (len(images), 1, *images.shape[-2:])
        if tuple(saliency.shape) != expected:
            raise ValueError(f"saliency must be [B, 1, H, W] = {list(expected)}, got {list(saliency.shape)}")
        saliency = F.interpolate(saliency.to(cams.dtype), cams.shape[-2:], mode="bilinear", align_corners=True)
        return (saliency < self.config.saliency_threshold).to(cams.dtype), 1 - saliency

    def _seeds(self, cams: Tensor, improved: Tensor, label: Tensor, hard: Tensor, soft: Tensor) -> list[Tensor]:
        weight, threshold = self.config.saliency_weight, self.config.cam_threshold
        probabilities = improved.softmax(dim=1)
        background = weight * soft + (1 - weight) * probabilities[:, :1]
        first = best_of(torch.cat([hard, cams], dim=1), threshold)
        second = best_of(torch.cat([background, probabilities[:, 1:] * label[:, :, None, None]], dim=1), threshold)
        return [first, second, merged_seed(first, second, self.config.num_classes)]

    @torch.no_grad()
    def _remember(self, feats: Tensor, logits: Tensor, maps: Tensor, label: Tensor) -> None:
        config = self.config
        if config.confidence == "segmentation":
            maps = peak_maps(logits, with_background(label))
        maps = maps.float()
        if config.memory == "pixels":
            value, ids = maps.max(dim=1)
            ids = ids.masked_fill(value <= config.context_threshold, -1)
            rows = feats.permute(0, 2, 3, 1).flatten(0, 2)
        else:
            rows, mass = wk.class_context(feats.detach(), maps, threshold=config.context_threshold)
            ids = torch.arange(maps.shape[1], device=maps.device).expand(mass.shape)
            ids = ids.masked_fill(mass <= config.context_mass, -1)
            rows = rows.flatten(0, 1)
        self.bank.push(rows, ids.flatten())

    def _with_memory(self, feats: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """s~ [B, C + 1, h, w] and the entropy of the attention."""
        memory, _, mask = self.bank.pull(with_background(label))
        if not self.config.stop_gradient:
            context, entropy = self.propagation(feats, memory, mask)
            return self.segmentation(feats + context), entropy
        feats = feats.detach()
        context, entropy = self.propagation(feats, memory, mask)
        fixed = {name: p.detach() for name, p in self.segmentation.named_parameters()}
        return functional_call(self.segmentation, fixed, (feats + context,)), entropy


class Head(nn.Module):
    """[B, D, h, w] -> [B, C, h, w]: a sum of branches, one a dilation.

    A branch is a dilated 3 x 3 convolution; with `width`, one to `width` channels and two of 1 x 1 behind it, ReLU and
    dropout after each hidden layer (LargeFOV).
    """

    def __init__(self, ins: int, outs: int, rates: tuple[int, ...], width: int | None, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for rate in rates:
            layers: list[nn.Module] = []
            if width is None:
                layers.append(nn.Conv2d(ins, outs, 3, padding=rate, dilation=rate))
            else:
                layers += [nn.Conv2d(ins, width, 3, padding=rate, dilation=rate), nn.ReLU(), nn.Dropout(dropout)]
                layers += [nn.Conv2d(width, width, 1), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(width, outs, 1)]
            self.branches.append(nn.Sequential(*layers))
        for layer in self.hidden():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        for layer in self.last():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def hidden(self) -> list[nn.Conv2d]:
        return [layer for branch in self.branches for layer in branch[:-1] if isinstance(layer, nn.Conv2d)]

    def last(self) -> list[nn.Conv2d]:
        return [branch[-1] for branch in self.branches]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(dim=0)


class Propagation(nn.Module):
    """What the memory adds to the features: relu(LN(dropout(attention))), 0 for an image that may use none of it."""

    def __init__(self, dim: int, dropout: float, normalise: bool) -> None:
        super().__init__()
        self.attention = wk.CrossImageAttention(dim)
        self.dropout, self.norm, self.normalise = nn.Dropout(dropout), nn.LayerNorm(dim), normalise

    def forward(self, feats: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D, h, w], memory [M, D], mask [B, M] -> [B, D, h, w] and the entropy, a number."""
        if self.normalise:
            feats, memory = F.normalize(feats, dim=1), F.normalize(memory, dim=1)
        found, entropy = self.attention(feats, memory, mask, return_entropy=True)
        found = found.movedim(1, -1).contiguous()  # what is dropped follows the layout, and that the kernel
        found = self.norm(self.dropout(found)).movedim(-1, 1)
        return F.relu(found) * mask.any(dim=1)[:, None, None, None], entropy


def classification_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over images of the mean cross entropy of a class, divided by the classes present + 1e-5.

    An image without a class counts as one with one; the published division by 1e-5 makes any training diverge.
    """
    costs = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none").mean(dim=1)
    return (costs / (label.sum(dim=1).clamp_min(1) + 1e-5)).mean()


def ramp(progress: float, warm_up: float) -> float:
    """(3 t^2 - 2 t^3)^2 with t = progress / warm_up, 1 from t = 1 on."""
    if progress >= warm_up:
        return 1.0
    t = progress / warm_up
    return (3 * t**2 - 2 * t**3) ** 2


def peak_maps(scores: Tensor, label: Tensor) -> Tensor:
    """max(scores, 0) over its maximum in the map, of the classes of the label: [B, C, h, w] -> the same, in 0..1."""
    scores = scores.detach().relu()
    return scores / scores.amax(dim=(2, 3), keepdim=True).clamp_min(1e-5) * label[:, :, None, None]


def with_background(label: Tensor) -> Tensor:
    """[B, C] -> [B, C + 1], the background first, which is in every image."""
    return torch.cat([torch.ones_like(label[:, :1]), label], dim=1)


def best_of(maps: Tensor, threshold: float) -> Tensor:
    """Number of the highest map of each pixel (ties: the first), 255 where it is below the threshold: [B, h, w]."""
    value, seed = maps.max(dim=1)
    return seed.masked_fill(value < threshold, IGNORE)


def merged_seed(first: Tensor, second: Tensor, num_classes: int) -> Tensor:
    """Union of the classes, intersection of the background, 255 where that leaves none or more than one.

    Args:
        first, second: [B, h, w] 0 background, 1..C, 255 not known.
        num_classes: C.
    """
    votes = torch.stack([(first == c) | (second == c) for c in range(1, num_classes + 1)])
    votes = torch.cat([((first == 0) & (second == 0))[None], votes])
    return votes.int().argmax(dim=0).masked_fill(votes.sum(dim=0) != 1, IGNORE)


def weighted_loss(logits: Tensor, seeds: list[Tensor], scales: tuple[float, ...]) -> Tensor:
    """Sum over seeds of scale times the mean cross entropy over the batch's known pixels, 0 where there is none."""
    total = logits.new_zeros(())
    for seed, scale in zip(seeds, scales, strict=True):
        known = (seed != IGNORE).sum().clamp_min(1)
        total = total + scale * F.cross_entropy(logits, seed, ignore_index=IGNORE, reduction="sum") / known
    return total


def _resized(logits: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(logits.float(), images.shape[-2:], mode="bilinear", align_corners=False)
