"""What each method of `refine_cams` does, its options and their defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wsss_kernels import _check, _maps
from wsss_kernels.colour import check_picture, grid_size, walk_features
from wsss_kernels.labels import background_threshold
from wsss_kernels.ops.attention_walk import attention_walk
from wsss_kernels.ops.boundary_affinity import boundary_affinity
from wsss_kernels.ops.dense_crf import dense_crf
from wsss_kernels.ops.feature_walk import Walk, feature_walks
from wsss_kernels.ops.mask_vote import check_segments, mask_vote
from wsss_kernels.ops.pixel_adaptive import pixel_adaptive
from wsss_kernels.ops.random_walk import random_walk

Size = tuple[int, int]
Reader = Callable[[str, Any, bool], Any]  # name, argument, whether of a single image -> the argument with a batch
Given = tuple[Tensor, Any, Size, int]  # maps on the grid, input, grid, how many maps at the front are background

# What a published pipeline sets: (method, background, options).
PRESETS: dict[str, tuple[str, float | None, dict[str, Any]]] = {
    # Ahn and Kwak, CVPR 2018: walk on AffinityNet's own features, whose affinity was trained with scale 1.
    "psa": (
        "affinity",
        16.0,
        {"radius": 5, "metric": "l1", "scale": 1.0, "border": "cropped", "beta": 8, "steps": 256},
    ),
    # Ru et al., CVPR 2022: PAR with its own dilations; the published training runs it on the softmax over a constant
    # background and the present classes, on a picture of half the size.
    "afa": ("par", None, {"dilations": (1, 2, 4, 8, 12, 24), "iterations": 10}),
    # Lin et al., CVPR 2023: on the mean attention of the last 8 layers of CLIP, each class by itself; its background
    # (1 - max) is made from the result.
    "clip-es": ("attention", None, {"sinkhorn": 3, "squarings": 1, "box_threshold": 0.4}),
    # Ahn, Cho and Kwak, CVPR 2019; its background is no map but the constant 0.25 of `boundary_labels`.
    "irn": ("boundary", None, {"radius": 5, "beta": 10, "steps": 256}),
}


def batched_maps(name: str, value: Any, single: bool) -> Tensor:
    """[B, D, h, w], from [D, h, w] where there is a single image."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, as cams is, got {_check.describe(value)}")
    if single and value.dim() == 3:
        value = value.unsqueeze(0)
    if value.dim() != 4:
        shape = "[D, h, w]" if single else "[B, D, h, w]"
        raise ValueError(f"{name} must be {shape}, as cams is, got {_check.describe(value)}")
    if len(value) and 0 in value.shape[-2:]:
        raise ValueError(f"{name} must have at least one pixel, got {_check.describe(value)}")
    return value


@dataclass(frozen=True)
class Stage:
    """One refinement: what it works on, where, and what it does there.

    Its input is the argument of `refine_cams` that `reads` names, with a batch: a tensor [B, ...], or a list of one
    tensor an image. Its maps come without the classes that no image has; an image with fewer than the others ends in
    maps of zeros.
    """

    check: Callable[[str, Any], None]  # name and input
    grid: Callable[[Tensor, Any, dict[str, Any]], Size]  # maps, input, options
    run: Callable[[list[Given], dict[str, Any]], list[Tensor]]  # batches of any sizes, options
    options: dict[str, Any]  # and their defaults
    reads: str = "feats"
    batched: Reader = batched_maps
    check_options: Callable[[dict[str, Any]], None] = lambda given: None  # those that its ops do not check
    together: bool = False  # whether batches are small and quick, so that several at a time are quicker
    background: Callable[[Tensor], Tensor] | None = None  # where maps compete: the one they have if the caller has none


# Steps at a grid of 128 of a walk on features, and of the short walk on colours that follows it.
_FEATURE_STEPS, _GUIDE_STEPS = 256, 64
# Those of a walk on colours, for maps that cover at least and at most this share of the picture.
_COLOUR_STEPS, _COVER = (120, 400), (0.3, 0.06)


def _steps_on(grid: Size, steps: int) -> int:
    """A walk of t steps reaches sqrt(t) pixels: so many on this grid reach as far on the map as `steps` at 128."""
    return round(steps * (max(grid) / 128) ** 2)


def _each(run: Callable[[Tensor, Any, Size, dict[str, Any]], Tensor]) -> Callable[..., list[Tensor]]:
    return lambda given, options: [run(maps, value, grid, options) for maps, value, grid, _ in given]


def _walks(walks: list[Walk], o: dict[str, Any], metric: str = "l1") -> list[Tensor]:
    chosen = {name: o[name] for name in ("radius", "scale", "border", "beta", "solver", "tol")}
    return feature_walks(walks, metric=metric, **chosen)


def _walk_once(given: list[Given], steps: int, o: dict[str, Any], metric: str = "l1") -> list[Tensor]:
    """Of maps and features, as many steps as the options say; "auto": `steps` at a grid of 128, within 16 and 256."""
    walks = []
    for maps, feats, grid, _ in given:
        number = min(256, max(16, _steps_on(grid, steps))) if o["steps"] == "auto" else o["steps"]
        walks.append((maps, feats.to(maps.dtype), number))
    return _walks(walks, o, metric)


def _walk_on_features(given: list[Given], o: dict[str, Any]) -> list[Tensor]:
    return _walk_once(given, _FEATURE_STEPS, o, o["metric"])


def _coloured(given: list[Given]) -> list[Given]:
    return [(maps, walk_features(picture, grid), grid, extra) for maps, picture, grid, extra in given]


def _walk_on_guide(given: list[Given], o: dict[str, Any]) -> list[Tensor]:
    return _walk_once(_coloured(given), _GUIDE_STEPS, o)


def _walk_on_colours(given: list[Given], o: dict[str, Any]) -> list[Tensor]:
    """As many steps as the options say; "auto": more for maps that cover little, which have yet to fill their objects.

    T^n m, n by the share of the picture that the maps cover, would need n, and so wait for a GPU; the mean of T^short m
    and T^long m, weighted by log(share), does as well.
    """
    given = _coloured(given)
    inputs = [(maps, feats.to(maps.dtype)) for maps, feats, _, _ in given]
    if o["steps"] != "auto":
        return _walks([(*pair, o["steps"]) for pair in inputs], o)
    lengths = [[max(1, _steps_on(grid, steps)) for steps in _COLOUR_STEPS] for _, _, grid, _ in given]
    short = _walks([(*pair, steps) for pair, (steps, _) in zip(inputs, lengths, strict=True)], o)
    on = [(maps, feats, much - few) for maps, (_, feats), (few, much) in zip(short, inputs, lengths, strict=True)]
    long = _walks(on, o)
    weights = [_haste(maps[:, extra:]) for maps, _, _, extra in given]
    return [torch.lerp(b, a, weight) for a, b, weight in zip(short, long, weights, strict=True)]


def _haste(maps: Tensor) -> Tensor:
    """[B, 1, 1, 1]: 1 = maps that cover the picture as much as needs the fewest steps, 0 = the most.

    The share that an image's maps cover: the mean over the pixels of max_c m / max(m).
    """
    if maps.numel() == 0:
        return maps.new_ones(())
    score = _maps.scaled(maps, _maps.maximum(maps, (1, 2, 3))).nan_to_num(0, 0).amax(dim=1, keepdim=True)
    share = score.double().mean(dim=(2, 3), keepdim=True)  # in double: the same bits alone and in a batch
    most, least = _COVER
    return ((share.clamp_min(least) / least).log() / math.log(most / least)).clamp(max=1).to(maps.dtype)


def _run_boundary(maps: Tensor, boundary: Tensor, _: Size, o: dict[str, Any]) -> Tensor:
    boundary = boundary.to(maps.dtype)
    affinity = boundary_affinity(boundary, o["radius"])
    return random_walk(
        maps * (1 - boundary), affinity, radius=o["radius"], beta=o["beta"], steps=o["steps"], solver=o["solver"],
        tol=o["tol"],
    )  # fmt: skip


def _feature_grid(_: Tensor, feats: Tensor, o: dict[str, Any]) -> Size:
    return feats.shape[-2], feats.shape[-1]


def _image_grid(_: Tensor, picture: Tensor, o: dict[str, Any]) -> Size:
    height, width = picture.shape[-2:]
    return grid_size(height, width, o["grid"])


def _check_features(name: str, feats: Tensor) -> None:
    _check.tensor(name, feats, "B D h w")


def _run_attention(maps: Tensor, attention: Tensor, _: Size, o: dict[str, Any]) -> Tensor:
    chosen = {name: o[name] for name in ("sinkhorn", "squarings", "box_threshold")}
    return attention_walk(maps, attention.to(maps.dtype), **chosen)


def _run_vote(maps: Tensor, segments: Tensor | list[Tensor], _: Size, o: dict[str, Any]) -> Tensor:
    return mask_vote(maps, segments, reduce=o["reduce"])


def _run_pamr(maps: Tensor, picture: Tensor, _: Size, o: dict[str, Any]) -> Tensor:
    return pixel_adaptive(picture.to(maps.dtype), maps, variant="pamr", **o)


def _run_par(maps: Tensor, picture: Tensor, _: Size, o: dict[str, Any]) -> Tensor:
    return pixel_adaptive(picture.to(maps.dtype), maps, variant="par", **o)


def _run_crf(maps: Tensor, picture: Tensor, _: Size, o: dict[str, Any]) -> Tensor:
    shares = maps / maps.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    unary = -shares.clamp(1e-5, 1).log()
    return dense_crf(picture, unary, iterations=o["iterations"], gaussian=o["gaussian"], bilateral=o["bilateral"])


# Of the maximum, at least: on maps of blobs the threshold is low, and a weak background gives way to them everywhere.
_LEAST_BACKGROUND = 0.15


def _constant_background(maps: Tensor) -> Tensor:
    """[B, 1, h, w]: the image's own threshold between object and background, everywhere; 1 where nothing scores."""
    if maps.numel() == 0:
        return maps.new_ones(maps.shape[0], 1, *maps.shape[-2:])
    scores = (maps > 0).flatten(1).any(dim=1)
    threshold = background_threshold(maps).to(maps.dtype).maximum(_LEAST_BACKGROUND * maps.flatten(1).amax(dim=1))
    threshold = threshold.where(scores, maps.new_ones(()))
    return threshold[:, None, None, None].expand(-1, 1, *maps.shape[-2:])


def _picture_grid(_: Tensor, picture: Tensor, o: dict[str, Any]) -> Size:
    return picture.shape[-2], picture.shape[-1]


def _batched_attention(name: str, value: Any, single: bool) -> Tensor:
    """[B, n, n]: the mean over layers and heads, in float32 at least; from [n, n] where there is a single image."""
    layers = [value] if isinstance(value, Tensor) else value
    one, many = ("[n, n]", "[heads, n, n]") if single else ("[B, n, n]", "[B, heads, n, n]")
    contract = f"{name} must be attention {one} or {many}, or a list of layers of it"
    if not isinstance(layers, Sequence) or not all(isinstance(layer, Tensor) for layer in layers):
        raise TypeError(f"{contract}, got {_check.describe(value)}")
    if not layers:
        raise ValueError(f"{contract}, got an empty list")
    total: Tensor | None = None
    for layer in layers:
        if not layer.is_floating_point():
            raise TypeError(f"{contract}, floating point, got {_check.describe(layer)}")
        heads = layer.dim() - (2 if single else 3)
        if heads not in (0, 1) or layer.shape[-1] != layer.shape[-2] or 0 in layer.shape[-3 if heads else -2 :]:
            raise ValueError(f"{contract}, n >= 1, got {_check.describe(layer)}")
        layer = layer.detach() if layer.dtype == torch.float64 else layer.detach().float()
        layer = layer.mean(dim=-3) if heads else layer
        if total is not None and layer.shape != total.shape:
            raise ValueError(f"{name} must be layers of one number of tokens, got {_check.describe(layer)} among them")
        total = layer if total is None else total + layer
    assert total is not None
    total = total / len(layers) if len(layers) > 1 else total
    return total.unsqueeze(0) if single else total


def _batched_segments(name: str, value: Any, single: bool) -> Tensor | list[Tensor]:
    """Integers [B, H, W], or a list of bool [m, H, W]; from [H, W], or [m, H, W], where there is a single image."""
    if single and isinstance(value, Tensor):
        if value.dtype != torch.bool and value.dim() != 2:
            raise ValueError(
                f"{name} must be segment ids [H, W] or masks, bool [m, H, W], got {_check.describe(value)}"
            )
        value = [value] if value.dtype == torch.bool else value.unsqueeze(0)
    check_segments(name, value)
    return value if isinstance(value, Tensor) else list(value)


def _token_grid(maps: Tensor, attention: Tensor, o: dict[str, Any]) -> Size:
    """The grid given, else that of the maps if it has as many places, else a square."""
    tokens, (height, width) = attention.shape[-1], maps.shape[-2:]
    if o["grid"] is not None:
        height, width = o["grid"]
        if height * width != tokens:
            raise ValueError(f"grid must be (h, w) with h w = {tokens} tokens (no class token), got {tuple(o['grid'])}")
        return height, width
    if height * width == tokens:
        return height, width
    side = int(tokens**0.5 + 0.5)
    if side * side != tokens:
        raise ValueError(f"grid must be given, (h, w) with h w = {tokens} tokens (no class token), got None")
    return side, side


def _segment_grid(maps: Tensor, segments: Tensor | list[Tensor], _: dict[str, Any]) -> Size:
    height, width = segments[0].shape[-2:] if len(segments) else maps.shape[-2:]
    return height, width


def _check_attention(name: str, attention: Tensor) -> None:
    _check.tensor(name, attention, "B n n")


def _check_token_grid(options: dict[str, Any]) -> None:
    grid = options["grid"]
    if grid is None:
        return
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid must be a pair (h, w) of tokens or None, got {_check.describe(grid)}")
    for side in grid:
        _check.whole("grid", side, "a pair of whole numbers (h, w) >= 1, of tokens", least=1)


def _check_walk(options: dict[str, Any]) -> None:
    if isinstance(options["steps"], str):
        _check.choice("steps", options["steps"], ("auto",))


def _check_image_walk(options: dict[str, Any]) -> None:
    _check_walk(options)
    _check.whole("grid", options["grid"], "a whole number of pixels >= 1 (long side)", least=1)


def check_boundary(name: str, boundary: Tensor) -> None:
    """Refuses what is no map of probabilities; the values are looked at where that waits for no GPU (NaN passes)."""
    _check.tensor(name, boundary, "B 1 h w")
    if boundary.shape[1] != 1:
        raise ValueError(f"{name} must have exactly one channel, [B, 1, h, w], got {_check.describe(boundary)}")
    if torch.compiler.is_compiling() or boundary.device.type != "cpu" or not boundary.numel():
        return
    low, high = (float(v) for v in torch.aminmax(boundary.detach()))
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must be boundary probabilities in 0..1, got {low:g} to {high:g} (logits? pass their sigmoid)"
        )


_WALK = {"radius": 5, "border": "full", "beta": 8.0, "steps": "auto", "solver": "auto", "tol": 1e-4}
_IMAGE = {**_WALK, "scale": 1.0, "grid": 128}
_PIXEL_ADAPTIVE = {"dilations": (1, 2, 4, 8, 12, 24), "iterations": 10}
METHODS = {
    "affinity": Stage(
        _check_features, _feature_grid, _walk_on_features, {**_WALK, "metric": "l1", "scale": "auto"},
        check_options=_check_walk, together=True,
    ),
    "image": Stage(
        check_picture, _image_grid, _walk_on_colours, _IMAGE, check_options=_check_image_walk, together=True
    ),
    "boundary": Stage(
        check_boundary, _feature_grid, _each(_run_boundary),
        {"radius": 5, "beta": 10.0, "steps": 256, "solver": "auto", "tol": 1e-4},
    ),
    "attention": Stage(
        _check_attention, _token_grid, _each(_run_attention),
        {"grid": None, "sinkhorn": 3, "squarings": 1, "box_threshold": 0.4},
        batched=_batched_attention, check_options=_check_token_grid,
    ),
    "pamr": Stage(check_picture, _picture_grid, _each(_run_pamr), _PIXEL_ADAPTIVE),
    "par": Stage(check_picture, _picture_grid, _each(_run_par), _PIXEL_ADAPTIVE),
    "crf": Stage(
        check_picture, _picture_grid, _each(_run_crf),
        {"iterations": 5, "gaussian": (1.0, 1.5), "bilateral": (64.0, 3.0, 2.0)}, background=_constant_background,
    ),
    "vote": Stage(
        check_segments, _segment_grid, _each(_run_vote), {"segments": None, "reduce": "mean"},
        reads="segments", batched=_batched_segments,
    ),
}  # fmt: skip
GUIDE = Stage(check_picture, _image_grid, _walk_on_guide, _IMAGE, reads="guide", together=True)  # follows the methods


def stages_of(method: str | tuple[str, ...], given: dict[str, Any]) -> list[Stage]:
    """The stages a call asks for, each with its own share of the options given."""
    names = method if isinstance(method, tuple) else (method,)
    if not names:
        raise ValueError("method must be one of the methods or a tuple of at least one, got ()")
    for name in names:
        _check.choice("method", name, tuple(METHODS))
    valid = {option for name in names for option in METHODS[name].options}
    unknown = sorted(set(given) - valid)
    if unknown:
        raise TypeError(f"{unknown[0]} is no option of method={method!r}, which has {', '.join(sorted(valid))}")
    stages = []
    for stage in (METHODS[name] for name in names):
        options = {key: given.get(key, default) for key, default in stage.options.items()}
        stage.check_options(options)
        stages.append(replace(stage, options=options))
    return stages
