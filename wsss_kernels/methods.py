"""What each method of `refine_cams` does, its options and their defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wsss_kernels import _check
from wsss_kernels.colour import check_picture, grid_size, walk_features
from wsss_kernels.ops import boundary_affinity, local_affinity, random_walk

Size = tuple[int, int]

# What a published pipeline sets: (method, background, options).
PRESETS: dict[str, tuple[str, float | None, dict[str, Any]]] = {
    # Ahn and Kwak, CVPR 2018: walk on AffinityNet's own features, whose affinity was trained with scale 1.
    "psa": (
        "affinity",
        16.0,
        {"radius": 5, "metric": "l1", "scale": 1.0, "border": "cropped", "beta": 8, "steps": 256},
    ),
    # Ahn, Cho and Kwak, CVPR 2019; its background is no map but the constant 0.25 of `boundary_labels`.
    "irn": ("boundary", None, {"radius": 5, "beta": 10, "steps": 256}),
}


@dataclass(frozen=True)
class Stage:
    """One refinement: where it works and what it does there."""

    check: Callable[[str, Tensor], None]
    grid: Callable[[Tensor, dict[str, Any]], Size]
    run: Callable[[Tensor, Tensor, Size, dict[str, Any]], Tensor]  # maps on the grid, feats, grid, options
    options: dict[str, Any]


# Steps at a grid of 128 of: a walk on features, a walk on colours (240 and 256 are equally good on most photographs,
# fewer leak less), and the short walk on colours that follows features.
_STEPS = {"affinity": 256, "image": 240, "guide": 64}


def _auto_steps(stage: str, grid: Size) -> int:
    """A walk of t steps reaches sqrt(t) pixels: this many reach the same share of the map on every grid."""
    return min(256, max(16, round(_STEPS[stage] * (max(grid) / 128) ** 2)))


def _walk(maps: Tensor, feats: Tensor, stage: str, grid: Size, o: dict[str, Any], metric: str = "l1") -> Tensor:
    steps = _auto_steps(stage, grid) if o["steps"] == "auto" else o["steps"]
    affinity = local_affinity(feats, o["radius"], metric=metric, scale=o["scale"], border=o["border"])
    return random_walk(
        maps, affinity, radius=o["radius"], beta=o["beta"], steps=steps, solver=o["solver"], tol=o["tol"]
    )


def _run_affinity(maps: Tensor, feats: Tensor, grid: Size, o: dict[str, Any]) -> Tensor:
    return _walk(maps, feats.to(maps.dtype), "affinity", grid, o, o["metric"])


def _run_image(maps: Tensor, picture: Tensor, grid: Size, o: dict[str, Any]) -> Tensor:
    return _walk(maps, walk_features(picture, grid).to(maps.dtype), "image", grid, o)


def _run_guide(maps: Tensor, picture: Tensor, grid: Size, o: dict[str, Any]) -> Tensor:
    return _walk(maps, walk_features(picture, grid).to(maps.dtype), "guide", grid, o)


def _run_boundary(maps: Tensor, boundary: Tensor, _: Size, o: dict[str, Any]) -> Tensor:
    boundary = boundary.to(maps.dtype)
    affinity = boundary_affinity(boundary, o["radius"])
    return random_walk(
        maps * (1 - boundary), affinity, radius=o["radius"], beta=o["beta"], steps=o["steps"], solver=o["solver"],
        tol=o["tol"],
    )  # fmt: skip


def _feature_grid(feats: Tensor, _: dict[str, Any]) -> Size:
    return feats.shape[-2], feats.shape[-1]


def _image_grid(picture: Tensor, o: dict[str, Any]) -> Size:
    height, width = picture.shape[-2:]
    return grid_size(height, width, o["grid"])


def _check_features(name: str, feats: Tensor) -> None:
    _check.tensor(name, feats, "B D h w")


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
METHODS = {  # with their default options
    "affinity": Stage(_check_features, _feature_grid, _run_affinity, {**_WALK, "metric": "l1", "scale": "auto"}),
    "image": Stage(check_picture, _image_grid, _run_image, _IMAGE),
    "boundary": Stage(
        check_boundary, _feature_grid, _run_boundary,
        {"radius": 5, "beta": 10.0, "steps": 256, "solver": "auto", "tol": 1e-4},
    ),
}  # fmt: skip
GUIDE = Stage(check_picture, _image_grid, _run_guide, _IMAGE)  # follows a walk on features


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
    if "steps" in given and isinstance(given["steps"], str):
        if "boundary" in names:
            raise TypeError(f'steps must be a whole number >= 0 for method="boundary", got {given["steps"]!r}')
        _check.choice("steps", given["steps"], ("auto",))
    if "grid" in given:
        _check.whole("grid", given["grid"], "a whole number of pixels >= 1 (long side)", least=1)
    stages = (METHODS[name] for name in names)
    return [replace(s, options={key: given.get(key, default) for key, default in s.options.items()}) for s in stages]
