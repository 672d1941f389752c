"""`refine_cams`: coarse class activation maps to object-shaped maps, composed of the ops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wsss_kernels import _check, _maps
from wsss_kernels.methods import GUIDE, PRESETS, Reader, Size, Stage, stages_of

NORMALIZATIONS = ("image", "class", None)
# Batches of a list that take each step together: kernels find one a thread, and Python's own code, which has left the
# caches after each, runs in one go.
_TOGETHER = 32


def refine_cams(
    cams: Tensor | Sequence[Tensor],
    feats: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]] | None,
    *,
    method: str | tuple[str, ...] = "affinity",
    labels: Tensor | Sequence[Tensor] | None = None,
    guide: Tensor | Sequence[Tensor] | None = None,
    background: float | Tensor | Sequence[float] | None = None,
    size: str | Size | None = None,
    normalize: str | None = "image",
    preset: str | None = None,
    **method_options: Any,
) -> Tensor | list[Tensor]:
    """Refine class activation maps so that they follow the objects.

    Each map diffuses over the affinity between neighbouring pixels: across like pixels, not across edges. The
    defaults need no tuning: multiplying feats by any constant changes nothing.

        cams --area / bilinear--> working grid --[background | present classes]--> walk --bilinear--> size, normalised

    Methods:
        "affinity": feats are [B, D, h, w] features of any network, layer, scale and D; the working grid is theirs
            (features are never upsampled). Options: those of `local_affinity` (radius, metric, scale, border; here
            scale="auto") and `random_walk` (beta, steps, solver, tol; here steps="auto" =
            clamp(round(256 (max(h, w) / 128)^2), 16, 256)). For AffinityNet-trained features: scale=1.0, steps=256.
        "image": feats are the RGB picture [B, 3, h', w'], uint8 or float 0..255, any size: the walk runs on its
            colours (CIE Lab in a unit that suits the picture, see `colour.walk_features`, on a grid with long side <=
            `grid`). Options: grid=128, scale=1.0, and radius, border, beta, steps, solver, tol as above; steps="auto"
            mixes walks of 120 and 400 steps (of a grid of 128), the more of the longer the less of the picture cams
            cover: small seeds have yet to fill their objects, broad ones only to lose what leaks.
        "boundary": feats are [B, 1, h, w] probabilities of a boundary in 0..1 (others are refused on the CPU; elsewhere
            they are not looked at); the working grid is theirs. The maps times (1 - feats) walk over
            `boundary_affinity`, as IRNet's do. Options: radius, beta=10, steps=256, solver, tol.
        "attention": feats are the attention between a transformer's patch tokens, [B, n, n] (row: from, column: to), or
            [B, heads, n, n], or a list of such layers, averaged; without class token. The working grid is the tokens',
            `grid`=(h, w): by default that of cams if h w = n, else a square. Options: those of `attention_walk`
            (sinkhorn, squarings, box_threshold). In a list of images each has its own list of layers.
        "pamr", "par": feats are the RGB picture; `pixel_adaptive` at its size. Options: dilations, iterations.
        "crf": feats are the RGB picture; the maps become the marginals of `dense_crf` at its size, started from
            -log(clip(score, 1e-5, 1)), score = [background, present classes] divided by their sum. Without `background`
            that map is a constant, `background_threshold` of the maps but at least 0.15 of their maximum (and goes
            again). A gentle set by default: iterations=5, gaussian=(1, 1.5), bilateral=(64, 3, 2). Best after a walk:
            ("image", "crf"). It has no gradient, and refuses cams that require one outside no_grad.
        "vote": `segments`=, superpixels [B, H, W] of integers or a list of masks [m, H, W] of bool, one an image: each
            segment takes its mean score (see `mask_vote`; the result is a constant for the gradient). feats may be
            None if no other method of the chain needs them. Option: reduce.
        A tuple runs several in turn on the same feats, such as ("image", "vote"); each option goes to every method
        that has it.

    Args:
        cams: [B, C, H, W], or [C, H, W], or a list of [C_i, H_i, W_i] of any sizes (feats, labels, guide and segments
            are lists too, and a list comes back). Floating point, any scale. Negative values count as 0, with one
            warning.
        feats: what the method needs, see above; the batch of cams.
        labels: [B, C] bool ([C] for one image): the classes present. The others come back as zeros and cost nothing.
        guide: [B, 3, h', w'] RGB picture: after the walk on feats a second, short walk as method="image" sharpens the
            result to the picture's edges.
        background: alpha > 0, one number or one per image: prepends the map (1 - max_c cam_c / max(cam_c))^alpha of the
            present classes, which is refined with them. For published pipelines, whose cams have peak 1; for labels
            use `labels_from_maps`.
        size: of the result: None = that of cams, "feats", "guide", or (height, width).
        normalize: "image" divides all maps of an image by their common maximum (the order between classes stays),
            "class" each map by its own, None leaves them.
        preset: "psa", "irn", "afa" or "clip-es": method, its options and background as published; what is given wins.
            For IRNet's labels see `boundary_labels`.
        **method_options: see above. One the method does not have is a TypeError that lists the valid ones.

    Returns:
        [B, C, h, w] (C + 1 with background), or as cams came; dtype of cams; differentiable in cams and feats.

    Memory: the affinity [B, K, h, w] and the walk's workspace (see `random_walk`) on the working grid.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Ahn and Kwak, CVPR 2018; Ahn, Cho and Kwak, CVPR 2019 ("boundary"); the automatic scale and steps and the
    walk on colours are ours.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> cams, picture = torch.rand(1, 2, 24, 32), torch.randint(0, 256, (1, 3, 375, 500), dtype=torch.uint8)
        >>> wk.refine_cams(cams, picture, method="image", size="guide", guide=picture).shape
        torch.Size([1, 2, 375, 500])
    """
    if preset is not None:
        _check.choice("preset", preset, tuple(PRESETS))
        method, published_background, published = PRESETS[preset]
        background = published_background if background is None else background
        method_options = {**published, **method_options}
    stages = stages_of(method, method_options)
    _check_normalize(normalize)
    _check_size(size)
    given = {"feats": feats, "labels": labels, "guide": guide}
    if guide is not None:
        stages.append(GUIDE)
    readers: dict[str, Reader] = {"labels": _batched_labels}
    for stage in stages:
        readers.setdefault(stage.reads, stage.batched)
        if stage.reads in stage.options:
            given[stage.reads] = stage.options[stage.reads]
    if labels is None:
        del readers["labels"]
    if isinstance(cams, Tensor):
        return _refine_tensor(cams, given, readers, background, stages, size, normalize)
    return _refine_list(cams, given, readers, background, stages, size, normalize)


def _check_normalize(normalize: object) -> None:
    if normalize is not None:
        _check.choice("normalize", normalize, tuple(n for n in NORMALIZATIONS if n))


def _check_size(size: object) -> None:
    contract = f'size must be None, "feats", "guide" or a pair (height, width) of whole numbers >= 1, got {size!r}'
    if size is None or size in ("feats", "guide"):
        return
    if not isinstance(size, (tuple, list, torch.Size)):
        raise TypeError(contract) if not isinstance(size, str) else ValueError(contract)
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(contract)


def _refine_list(
    cams: Any,
    given: dict[str, Any],
    readers: dict[str, Reader],
    background: Any,
    stages: list[Stage],
    size: str | Size | None,
    normalize: str | None,
) -> list[Tensor]:
    """Pictures of any sizes; those whose shapes agree go through together."""
    if not isinstance(cams, (list, tuple)):
        raise TypeError(f"cams must be a tensor [B, C, H, W] or [C, H, W], or a list, got {_check.describe(cams)}")
    count = len(cams)
    for name, value in (("cams", cams), *((name, given[name]) for name in readers)):
        if isinstance(value, Tensor) or not isinstance(value, Sequence) or len(value) != count:
            raise TypeError(f"{name} must be a list of {count} tensors, as cams is, got {_describe_list(value)}")
    alphas = _per_image(background, count)
    images: list[dict[str, Any]] = []
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in range(count):
        _check.tensor(f"cams[{i}]", cams[i], "C H W")
        image = {name: reader(f"{name}[{i}]", given[name][i], True) for name, reader in readers.items()}
        images.append({"cams": cams[i].unsqueeze(0), **image})
        groups.setdefault(tuple(map(_kind, images[i].values())), []).append(i)
    results: dict[int, Tensor] = {}
    shapes = list(groups.values())
    step = _TOGETHER if all(stage.together for stage in stages) else 1
    for first in range(0, len(shapes), step):
        together = shapes[first : first + step]
        batches = []
        for indices in together:
            inputs = {name: _joined([images[i][name] for i in indices]) for name in images[indices[0]]}
            alpha = None if alphas is None else [alphas[i] for i in indices]
            batches.append((inputs.pop("cams"), inputs, alpha))
        for indices, refined in zip(together, _refine_batches(batches, stages, size, normalize), strict=True):
            results.update(zip(indices, refined.unbind(), strict=True))
    return [results[i] for i in range(count)]


def _kind(value: Any) -> tuple[Any, ...]:
    """What images must agree on to go through together."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else tuple(map(_kind, value))


def _joined(values: list[Any]) -> Any:
    """The batch of these, each a batch of one."""
    if len(values) == 1:
        return values[0]
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def _describe_list(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    return _check.describe(value)


def _per_image(background: Any, count: int) -> list[float] | None:
    contract = "a number > 0 (alpha), or one per image"
    if background is None:
        return None
    if isinstance(background, Tensor):
        background = background.tolist()
    if not isinstance(background, Sequence) or isinstance(background, str):
        return [_check.number("background", background, contract, above=0)] * count
    if len(background) != count:
        raise ValueError(f"background must be {contract} ({count}), got {len(background)} values")
    return [_check.number("background", alpha, contract, above=0) for alpha in background]


def _refine_tensor(
    cams: Tensor,
    given: dict[str, Any],
    readers: dict[str, Reader],
    background: Any,
    stages: list[Stage],
    size: str | Size | None,
    normalize: str | None,
) -> Tensor:
    single = cams.dim() == 3
    _check.tensor("cams", cams, "C H W" if single else "B C H W")
    if single:
        cams = cams.unsqueeze(0)
    inputs = {name: reader(name, given[name], single) for name, reader in readers.items()}
    alphas = _per_image(background, len(cams))
    refined = _refine_batches([(cams, inputs, alphas)], stages, size, normalize)[0]
    return refined[0] if single else refined


@dataclass
class _Batch:
    """A batch on its way through the stages."""

    cams: Tensor
    inputs: dict[str, Any]
    target: Size
    maps: Tensor  # with the background, if there is one, without absent classes where that is known
    positions: Tensor | None  # see _present
    present: Tensor | None
    has_background: bool


def _refine_batches(
    batches: list[tuple[Tensor, dict[str, Any], list[float] | None]],
    stages: list[Stage],
    size: str | Size | None,
    normalize: str | None,
) -> list[Tensor]:
    """Of (cams, inputs, alphas): each step for all batches before the next one."""
    begun = []
    for cams, inputs, alphas in batches:
        begun.append(_begin(cams, inputs, alphas, stages, size))
    for stage in stages:
        _run(stage, begun)
    return [_finished(batch, normalize) for batch in begun]


def _begin(
    cams: Tensor, inputs: dict[str, Any], alphas: list[float] | None, stages: list[Stage], size: str | Size | None
) -> _Batch:
    batch, channels = cams.shape[:2]
    for stage in stages:
        stage.check(stage.reads, inputs[stage.reads])
    labels = inputs.get("labels")
    if labels is not None and labels.shape != (batch, channels):
        raise ValueError(
            f"labels must be a bool tensor [B, C] = {[batch, channels]} of the classes present, "
            f"got {_check.describe(labels)}"
        )
    for name, value in inputs.items():
        if len(value) != batch:
            raise ValueError(f"{name} must have the batch of cams ({batch}), got {_describe_batch(value)}")
        for tensor in (value,) if isinstance(value, Tensor) else value:
            if name != "labels":
                _check.same_device("cams", cams, name, tensor)
    target = _target_size(size, cams, inputs, stages)
    maps = _without_negative(cams if cams.dtype == torch.float64 else cams.float())
    maps, positions, present = _present(maps, labels)
    if alphas is not None:
        maps = torch.cat([_background_map(maps, alphas), maps], dim=1)
    return _Batch(cams, inputs, target, maps, positions, present, alphas is not None)


def _finished(batch: _Batch, normalize: str | None) -> Tensor:
    maps = _maps.normalized(_maps.bilinear(batch.maps, batch.target), normalize)
    if batch.positions is not None:
        maps = _dense(maps, batch.positions, batch.cams.shape[1], batch.has_background)
    return maps.to(batch.cams.dtype)


def _batched_labels(name: str, value: Any, single: bool) -> Tensor:
    """[B, C] bool, from [C] where there is a single image."""
    shape = "[C]" if single else "[B, C]"
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor {shape} of the classes present, got {_check.describe(value)}")
    if single and value.dim() == 1:
        value = value.unsqueeze(0)
    if value.dim() != 2:
        raise ValueError(f"{name} must be a bool tensor {shape} of the classes present, got {_check.describe(value)}")
    return value


def _describe_batch(value: Any) -> str:
    return _check.describe(value) if isinstance(value, Tensor) else f"{len(value)} images"


def _target_size(size: str | Size | None, cams: Tensor, inputs: dict[str, Any], stages: list[Stage]) -> Size:
    if size is None:
        return cams.shape[-2], cams.shape[-1]
    if not isinstance(size, str):
        height, width = size
        return height, width
    reader = next((stage for stage in stages if stage.reads == size), None)
    if reader is None:
        why = "without a guide" if size == "guide" else "where no method works on feats"
        raise ValueError(f'size must not be "{size}" {why}, got size="{size}"')
    like = inputs[size]
    return (like.shape[-2], like.shape[-1]) if like.dim() == 4 else reader.grid(cams, like, reader.options)


def _without_negative(maps: Tensor) -> Tensor:
    if _maps.reads_values(maps) and maps.numel():
        least = maps.detach().amin().item()
        if least >= 0:
            return maps
        if least < 0:
            warnings.warn("negative values in cams count as 0 (logits? pass their ReLU)", UserWarning, stacklevel=6)
    return maps.clamp(min=0)


def _present(maps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Only the classes present: [B, P, H, W], P the most an image has; where they stood [B, P]; which are present.

    Where the labels cannot be read without a synchronisation the absent classes are zeroed instead, which the walk
    skips.
    """
    if labels is None:
        return maps, None, None
    if not _maps.reads_values(labels):
        present = labels.to(maps.device)
        return maps * present[:, :, None, None], None, present
    most = int(labels.sum(dim=1).max()) if labels.numel() else 0
    positions = torch.argsort(labels, dim=1, descending=True, stable=True)[:, :most]
    present = labels.gather(1, positions).to(maps.device)
    positions = positions.to(maps.device)
    index = positions[:, :, None, None].expand(-1, -1, *maps.shape[-2:])
    return maps.gather(1, index).where(present[:, :, None, None], maps.new_zeros(())), positions, present


def _dense(maps: Tensor, positions: Tensor, channels: int, has_background: bool) -> Tensor:
    extra = int(has_background)
    if has_background:
        positions = torch.cat([positions.new_zeros(len(positions), 1), positions + 1], dim=1)
    index = positions[:, :, None, None].expand_as(maps)
    return maps.new_zeros(maps.shape[0], channels + extra, *maps.shape[-2:]).scatter(1, index, maps)


def _background_map(maps: Tensor, alphas: list[float]) -> Tensor:
    """(1 - max_c cam_c / max(cam_c))^alpha [B, 1, H, W]; a class without any score stays zero."""
    if maps.shape[1] == 0 or maps.numel() == 0:
        return maps.new_ones(maps.shape[0], 1, *maps.shape[-2:])
    strongest = _maps.scaled(maps, _maps.maximum(maps, (2, 3))).nan_to_num(0, 0).amax(dim=1, keepdim=True)
    exponent = alphas[0] if len(set(alphas)) <= 1 else maps.new_tensor(alphas)[:, None, None, None]
    return (1 - strongest).clamp(min=0) ** exponent


def _run(stage: Stage, batches: list[_Batch]) -> None:
    given = []
    for batch in batches:
        value = batch.inputs[stage.reads]
        grid = stage.grid(batch.maps, value, stage.options)
        maps = _maps.resized(batch.maps, grid)
        if stage.background is not None and not batch.has_background:
            maps = torch.cat([stage.background(maps), maps], dim=1)
        given.append((maps, value, grid, int(batch.has_background)))
    for batch, maps in zip(batches, stage.run(given, stage.options), strict=True):
        batch.maps = maps if stage.background is None else _competed(batch, maps)


def _competed(batch: _Batch, maps: Tensor) -> Tensor:
    """Without what the stage added: a background, and shares for maps of zeros."""
    background, scores = maps.tensor_split([1], dim=1)
    if batch.present is not None:
        scores = scores.where(batch.present[:, :, None, None], scores.new_zeros(()))
    return torch.cat([background, scores], dim=1) if batch.has_background else scores
