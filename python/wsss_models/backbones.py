"""Backbones under one face, and weights from files. Nothing is downloaded."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from wsss_models.data.artefacts import FileError
from wsss_models.networks.norm import set_norm
from wsss_models.networks.resnet import ResNet
from wsss_models.networks.resnet38 import ResNet38
from wsss_models.networks.vgg import VGG16

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet38", "vgg16")
_TIMM = "timm/"  # prefix of a network of the timm library
_WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")  # keys under which files keep the weights
_SHOWN = 5  # names listed of each kind of mismatch


class Backbone(Protocol):
    """Stages of features from pictures [B, 3, H, W]: `channels[i]` channels at 1 / `strides[i]` of the size."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def features(self, images: Tensor) -> list[Tensor]: ...


def build_backbone(
    name: str,
    *,
    strides: tuple[int, int, int, int] = (2, 2, 2, 1),
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1),
    width: int = 64,
    norm: str = "fixed",
    **options: object,
) -> nn.Module:
    """A backbone with random weights.

    Args:
        name: one of `NAMES`, or "timm/NAME": any network of the timm library that gives stages of features (ResNeSt,
            ConvNeXt, ViT, DINO, ...).
        strides, dilations, width: of a ResNet, see `ResNet`; the others have their own.
        norm: "train", "fixed" or "frozen", see `set_norm`.
        **options: of the family (ResNet38: drop; VGG16: fc6_dilation, width, drop; timm: what timm.create_model takes,
            such as output_stride=16).

    Returns:
        nn.Module: a `Backbone`.

    Raises:
        ValueError: an unknown name, norm or depth.
        ModuleNotFoundError: a timm network without timm.

    Example:
        >>> backbone = build_backbone("resnet50")
        >>> [tuple(x.shape[1:]) for x in backbone.features(torch.zeros(1, 3, 64, 64))][-1]
        (2048, 4, 4)
    """
    if name.startswith(_TIMM):
        backbone: nn.Module = TimmBackbone(name.removeprefix(_TIMM), **options)
    elif name == "resnet38":
        backbone = ResNet38(**options)  # type: ignore[arg-type]
    elif name == "vgg16":
        backbone = VGG16(**options)  # type: ignore[arg-type]
    elif name in NAMES:
        backbone = ResNet(
            int(name.removeprefix("resnet")), strides=strides, dilations=dilations, width=width, **options
        )
    else:
        raise ValueError(f'name must be one of {", ".join(NAMES)} or "{_TIMM}NAME", got {name!r}')
    set_norm(backbone, norm)
    return backbone


class TimmBackbone(nn.Module):
    """A network of the timm library; its parameters keep timm's names under `network.`."""

    classifier_names = ("fc.", "head.", "classifier.", "head_dist.", "last_linear.")

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            text = f'the backbone "{_TIMM}{name}" needs timm: pip install timm'
            raise ModuleNotFoundError(text, name=error.name) from None
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.partition('_')[0]}*")[:_SHOWN])
            raise ValueError(
                f'name must be "{_TIMM}" and a network of timm{f" ({near}, ...)" if near else ""}, got {name!r}'
            )
        self.network = timm.create_model(name, pretrained=False, features_only=True, **options)
        self.channels = tuple(self.network.feature_info.channels())
        self.strides = tuple(self.network.feature_info.reduction())

    def features(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images))


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Names and tensors of a weight file (.pth, .pt, .ckpt; .safetensors where that library is installed).

    No code of the file runs: it is read with weights_only=True. Wrappers ("state_dict", "model") and the prefix
    "module." of parallel training are taken off.

    Raises:
        FileError: missing, damaged, no weights, or one that holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(path, "no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise FileError(path, f"must hold weights and nothing else, no Python objects ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise FileError(path, f"no weight file, or a damaged one ({str(error).partition(chr(10))[0]})") from None
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise FileError(path, f"must hold a dictionary of weights, got {type(loaded).__name__}")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def load_backbone(
    backbone: nn.Module, weights: Mapping[str, Tensor], *, source: Path | str, prefixes: Iterable[str] = ()
) -> None:
    """Load public weights into a backbone, all of them: a name too many or too few is an error.

    Left out: the classifier of the public network, and counters (num_batches_tracked) on either side.

    Args:
        backbone: of `build_backbone`.
        weights: of `read_weights`.
        source: the file, for messages.
        prefixes: in front of the backbone's names in a file that holds a whole model; "backbone." and the family's own
            name are known.

    Raises:
        FileError: names or shapes differ; lists them.
    """
    if isinstance(backbone, TimmBackbone):
        prefixes = (*prefixes, "network.")
    names = weights.keys()
    for prefix in (*prefixes, "backbone.", "encoder.", "resnet50.", "resnet101."):
        if any(name.startswith(prefix) for name in names):
            weights = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
            break
    target = backbone.network if isinstance(backbone, TimmBackbone) else backbone
    ignored: tuple[str, ...] = getattr(backbone, "classifier_names", ())
    load_strictly(target, {n: t for n, t in weights.items() if not n.startswith(ignored)}, source=source)


def load_model(model: nn.Module, weights: Mapping[str, Tensor], *, source: Path | str) -> list[str]:
    """Start a model from public weights or from another training: the backbone whole, the heads as far as they fit.

    Args:
        model: has `backbone`; everything else in it is a head.

    Returns:
        list[str]: names of the heads' parameters that stay as they are.

    Raises:
        FileError: the backbone's names or shapes differ.
    """
    load_backbone(model.backbone, weights, source=source)
    heads = {name: t for name, t in model.state_dict().items() if not name.startswith("backbone.")}
    fitting = {n: weights[n] for n, t in heads.items() if n in weights and weights[n].shape == t.shape}
    model.load_state_dict(fitting, strict=False)
    return [name for name in heads if name not in fitting]


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Load all weights of a module; nothing is loaded where one is missing, left over or of another shape.

    Raises:
        FileError: lists what differs.
    """
    own = {n: t for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")}
    given = {n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    differing = [n for n in own if n in given and own[n].shape != given[n].shape]
    problems = [
        _some("missing", [n for n in own if n not in given]),
        _some("not of this network", [n for n in given if n not in own]),
        _some("of another shape", [f"{n} {tuple(given[n].shape)} instead of {tuple(own[n].shape)}" for n in differing]),
    ]
    if any(problems):
        raise FileError(source, "weights do not fit: " + "; ".join(text for text in problems if text))
    module.load_state_dict(given, strict=False)


def _some(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})" if names else ""
