"""Visual words: an image classifier that must also tell which words of a learnt codebook occur in the picture.

VWE: Ru, Du and Wu, Learning visual words for weakly-supervised semantic segmentation, IJCAI 2021. VWL: Ru, Du, Zhan and
Wu, Weakly-supervised semantic segmentation with visual words learning and hybrid pooling, IJCV 2022. The presets hold
the numbers of the published code. Its CAMs are those of the convolution alone; the word branch of the paper and the
maximum of both are built here after its text (`Config.cam`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import wsss_kernels as wk
from wsss_models.backbones import build_backbone
from wsss_models.recipe import TINY, Recipe, classification_loss, of_batch, parameter_groups

CODEBOOKS = ("gradient", "memory", "none")
POOLINGS = ("hspp", "gap", "gmp")
BRANCHES = ("convolution", "words", "maximum")
FLIP = "max"  # how the maps of the flipped picture are merged, as published
_COUNT_EPS = 1e-4
_MAXIMUM_EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """Defaults: VWE on ResNet-50."""

    num_classes: int = 20
    backbone: str = "resnet50"
    strides: tuple[int, int, int, int] = (2, 2, 2, 1)  # of a ResNet: output stride 16
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1)
    width: int = 64  # channels of a ResNet's stem
    norm: str = "fixed"
    cut: int | None = 2  # stages of a ResNet up to this one do not learn (0 = the stem); None = all learn
    codebook: str = "gradient"  # learnt by the word frequencies' loss; "memory" = a moving mean; "none" = no words
    words: int = 256
    temperature: float = 1.0  # multiplies the cosine of pixel and word
    decorrelation: float = 0.0  # weight of `decorrelation_loss` (VWL-L)
    memory_rate: float = 1e-3  # share of a batch's means in the memory after a step (VWL-M)
    pooling: str = "hspp"  # before the classifier: hybrid spatial pyramid, "gap" mean, "gmp" maximum
    levels: tuple[int, ...] = (1, 2, 4)  # of the pyramid
    gamma: float = 2.0  # weight of the mean in it
    cam: str = "convolution"  # which branch's maps `cams` gives, or the "maximum" of both
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=6, lr=0.01, long_side=(320, 640)))

    def __post_init__(self) -> None:
        for name, known in (("codebook", CODEBOOKS), ("pooling", POOLINGS), ("cam", BRANCHES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.cam not in branches(self):
            raise ValueError(f'cam must be "convolution" where codebook is {self.codebook!r}, got {self.cam!r}')
        if not 0 <= self.decorrelation < math.inf:
            raise ValueError(f"decorrelation must be a number >= 0, got {self.decorrelation}")
        if self.decorrelation and self.codebook != "gradient":
            raise ValueError(f"decorrelation must be 0 where codebook is {self.codebook!r}, got {self.decorrelation}")
        if not 0 <= self.memory_rate <= 1:
            raise ValueError(f"memory_rate must be in 0..1, got {self.memory_rate}")


def branches(config: Config) -> tuple[str, ...]:
    """The maps that a model of these settings can give; the word branch needs the classifier of word frequencies."""
    return BRANCHES if config.codebook == "gradient" else BRANCHES[:1]


_VWL = Config(backbone="resnet101")
_TINY = Config(
    backbone="resnet18",
    strides=(2, 1, 2, 1),  # small pictures: output stride 8
    width=24,
    norm="train",
    cut=None,
    words=32,  # a picture has 12 x 12 pixels
    pooling="gap",  # a maximum is content with one pixel: CAMs of parts, where nothing is pretrained to see more
    memory_rate=0.05,  # 300 steps
    recipe=TINY,
)
PRESETS = {
    "published": Config(),
    "vwl-l": replace(_VWL, decorrelation=1.0),
    "vwl-m": replace(_VWL, codebook="memory", cut=0),
    "tiny": _TINY,
    "tiny-l": replace(_TINY, decorrelation=1.0),
    "tiny-m": replace(_TINY, codebook="memory"),
}
ABLATIONS = {
    "GAP, no words": ["classifier.pooling=gap", "classifier.codebook=none"],
    "GMP, no words": ["classifier.pooling=gmp", "classifier.codebook=none"],
    "HSPP, no words": ["classifier.pooling=hspp", "classifier.codebook=none"],
    "HSPP": ["classifier.pooling=hspp"],
    "GAP": ["classifier.pooling=gap"],
    "GMP": ["classifier.pooling=gmp"],
    "codebook by memory": ["classifier.codebook=memory"],
    "decorrelated words": ["classifier.decorrelation=1"],
    "CAMs of the words": ["classifier.cam=words"],
    "CAMs of both": ["classifier.cam=maximum"],
}


def decorrelation_loss(codebook: Tensor) -> Tensor:
    """How alike the words of a codebook are: |G| - |diag G|, halved, G the words' covariances, | | Frobenius' norm.

        C' = codebook - mean of each word over its channels,  G = C' C'^T

    Args:
        codebook: [M, D].

    Returns:
        Tensor: a scalar >= 0, 0 where every pair of words is uncorrelated.

    Source: VWL's published code; it weighs it by 1.

    Example:
        >>> import torch
        >>> decorrelation_loss(torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])).item()
        0.0
    """
    if codebook.dim() != 2:
        raise ValueError(f"codebook must be [M, D], got {list(codebook.shape)}")
    centred = codebook - codebook.mean(dim=1, keepdim=True)
    gram = centred @ centred.T
    return (torch.linalg.vector_norm(gram) - torch.linalg.vector_norm(gram.diagonal())) / 2


class Model(nn.Module):
    """Backbone -> hybrid pooling -> classifier, beside it the words: parameter names fc_a and fc_b as published.

    fc_a tells the classes from the frequencies of the words (that trains the codebook alone), fc_b tells from the
    features' mean which words win a pixel (that trains the backbone).
    """

    memory: Tensor  # [M, D], zeros until the first step

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.backbone = build_backbone(
            config.backbone, strides=config.strides, dilations=config.dilations, width=config.width, norm=config.norm
        )
        if config.cut is not None:
            self.backbone.freeze_to(config.cut)
        dim = self.backbone.channels[-1]
        self.pool = wk.HybridSpatialPyramidPool(config.levels, config.gamma)
        self.classifier = nn.Conv2d(dim, config.num_classes, 1, bias=False)
        if config.codebook == "gradient":
            self.encoder = wk.VisualWordEncoder(dim, config.words, temperature=config.temperature)
            self.fc_a = nn.Conv2d(config.words, config.num_classes, 1, bias=False)
        if config.codebook == "memory":
            self.register_buffer("memory", torch.zeros(config.words, dim))
        if config.codebook != "none":
            self.fc_b = nn.Conv2d(dim, config.words, 1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w], the last stage."""
        return self.backbone.features(images)[-1]

    def loss(self, batch: Mapping[str, Any], *, progress: float = 1.0) -> dict[str, Tensor]:
        """total = classification + frequencies + words + weight of decorrelation * decorrelation.

        In training the memory moves on, after the words of this batch are found.
        """
        images, label = of_batch(batch, "image", "label")
        feats = self.features(images)
        terms = {"classification": classification_loss(_scores(self.classifier, self._pooled(feats)), label)}
        if self.config.codebook == "none":
            return {"total": terms["classification"], **terms}
        if self.config.codebook == "gradient":
            histogram, words, _ = self.encoder(feats)
            terms["frequencies"] = classification_loss(_scores(self.fc_a, histogram), label)
        else:
            words = self._remembered(feats.detach())
        terms["words"] = classification_loss(_scores(self.fc_b, feats.mean(dim=(2, 3))), words.to(label.dtype))
        total = sum(terms.values())
        if self.config.decorrelation:
            terms["decorrelation"] = decorrelation_loss(self.encoder.codebook)
            total = total + self.config.decorrelation * terms["decorrelation"]
        return {"total": total, **terms}

    def cams(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w] >= 0, of the branch that `config.cam` names.

        convolution: max(classifier of each pixel, 0). words: max(sum over words j of fc_a[c, j] p[j], 0), p the softmax
        of the pixel over the words. maximum: the larger of the two, each divided by its maximum + 1e-5 first.
        """
        feats = self.features(images)
        if self.config.cam == "words":
            return self._word_cams(feats)
        convolution = F.relu(self.classifier(feats))
        if self.config.cam == "convolution":
            return convolution
        return torch.maximum(_to_one(convolution), _to_one(self._word_cams(feats)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        new = [module for name, module in self.named_children() if name not in ("backbone", "pool")]
        return parameter_groups(self.config.recipe, [self.backbone], new)

    def _pooled(self, feats: Tensor) -> Tensor:
        if self.config.pooling == "hspp":
            return self.pool(feats)
        return feats.mean(dim=(2, 3)) if self.config.pooling == "gap" else feats.amax(dim=(2, 3))

    def _word_cams(self, feats: Tensor) -> Tensor:
        codebook = F.normalize(self.encoder.codebook, dim=1)
        cosine = F.conv2d(F.normalize(feats, dim=1), codebook[:, :, None, None])
        return F.relu(self.fc_a((self.config.temperature * cosine).softmax(dim=1)))

    @torch.no_grad()
    def _remembered(self, feats: Tensor) -> Tensor:
        """[B, D, h, w] -> words [B, M]; in training the memory is filled first where it is empty, then moves on.

        memory = rate * (sum of a word's pixels / (their number + 1e-4)) + (1 - rate) * memory: the word of no pixel
        shrinks, which changes no cosine. Several processes keep one memory, that of all their pixels.
        """
        pixels = feats.permute(0, 2, 3, 1).reshape(-1, feats.shape[1]).to(self.memory.dtype)
        together = distributed.is_available() and distributed.is_initialized()
        if self.training and not self.memory.any():
            count = len(self.memory)
            drawn = torch.randperm(len(pixels), device=feats.device)[
                torch.arange(count, device=feats.device) % len(pixels)
            ]
            self.memory.copy_(pixels[drawn])
            if together:
                distributed.broadcast(self.memory, 0)
        _, words, assignment = wk.soft_histogram(feats, self.memory, temperature=self.config.temperature)
        if self.training:
            ids = assignment.flatten()
            sums = torch.zeros_like(self.memory).index_add_(0, ids, pixels)
            counts = self.memory.new_zeros(len(self.memory)).index_add_(0, ids, torch.ones_like(pixels[:, 0]))
            if together:
                distributed.all_reduce(sums)
                distributed.all_reduce(counts)
            self.memory.lerp_(sums / (counts[:, None] + _COUNT_EPS), self.config.memory_rate)
        return words


def _scores(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of vectors [B, D] -> [B, C]."""
    return layer(x[:, :, None, None]).flatten(1)


def _to_one(cams: Tensor) -> Tensor:
    return cams / (cams.amax(dim=(2, 3), keepdim=True) + _MAXIMUM_EPS)
