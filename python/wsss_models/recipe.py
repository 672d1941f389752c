"""What every system shares: settings of a training, parameter groups, and how a batch is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_models.data.augment import CAFFE_BGR, CAFFE_RGB, IMAGENET, Augment

NORMALISATIONS = {"imagenet": IMAGENET, "caffe-rgb": CAFFE_RGB, "caffe-bgr": CAFFE_BGR}


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    The learning rate of a group at step t of T is lr * multiple * (1 - t / T)^power. `momentum` is SGD's. The published
    code of AffinityNet, IRNet, SC-CAM, VWE and Puzzle-CAM hands its weight decay to SGD as the momentum and uses the
    number it calls momentum (0.9) as the power; the presets hold what it thus does, a momentum of 5e-4 or 1e-4.
    """

    epochs: int = 5
    batch_size: int = 16  # over all processes
    lr: float = 0.1
    lr_multiples: tuple[float, float, float, float] = (1.0, 1.0, 10.0, 10.0)  # old weights, old biases, new, new biases
    decay_biases: bool = True
    weight_decay: float = 1e-4
    momentum: float = 1e-4
    nesterov: bool = False
    power: float = 0.9
    crop: int = 512  # pixels
    long_side: tuple[int, int] | None = None  # pixels
    scale: tuple[float, float] | None = None
    flip: bool = True
    jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    normalisation: str = "imagenet"
    black_padding: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "momentum", "power"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise ValueError(f"normalisation must be one of {known}, got {self.normalisation!r}")

    def augment(self) -> Augment:
        return Augment(
            crop=self.crop,
            long_side=self.long_side,
            scale=self.scale,
            flip=self.flip,
            jitter=self.jitter,
            normalisation=NORMALISATIONS[self.normalisation],
            black_padding=self.black_padding,
        )


# Of the presets `tiny`: a narrow ResNet-18 with random weights, pictures of about 100 pixels.
TINY = Recipe(epochs=20, batch_size=16, crop=96, lr=0.05, lr_multiples=(1, 1, 1, 1), momentum=0.9, weight_decay=5e-4)


def parameter_groups(recipe: Recipe, pretrained: Iterable[nn.Module], new: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with the key "multiple" of the learning rate; what is not trained is left out."""
    groups = []
    for i, modules in enumerate((list(pretrained), list(new))):
        named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        for j, biases in enumerate((False, True)):
            chosen = [p for name, p in named if (name.rpartition(".")[2] == "bias") == biases]
            multiple = recipe.lr_multiples[2 * i + j]
            decay = 0.0 if biases and not recipe.decay_biases else recipe.weight_decay
            if chosen:
                groups.append(
                    {"params": chosen, "lr": recipe.lr * multiple, "multiple": multiple, "weight_decay": decay}
                )
    return groups


def optimiser(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def set_rate(optimiser: torch.optim.Optimizer, recipe: Recipe, progress: float) -> None:
    """Before a step; progress = steps done / all steps, in 0..1."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * group["multiple"] * (1 - progress) ** recipe.power


def of_batch(batch: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """The entries of these names.

    Raises:
        KeyError: one is missing.
    """
    missing = [name for name in names if name not in batch]
    if missing:
        raise KeyError(f"batch must hold {', '.join(names)}; {', '.join(missing)} is missing, got {', '.join(batch)}")
    return tuple(batch[name] for name in names)


def classification_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over images and classes of the binary cross entropy of each class (multi-label soft margin)."""
    if logits.shape != label.shape:
        raise ValueError(f"label must be [B, C] = {list(logits.shape)}, got {list(label.shape)}")
    return F.multilabel_soft_margin_loss(logits, label)
