"""`pixel_adaptive` beside the published module and shifted views in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.cases import Aim, Case, Inputs, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

CROP = Size("448x448", 448, 448)
DILATIONS = (1, 2, 4, 8, 12, 24)
ITERATIONS = 10


def _image(size: Size) -> Tensor:
    """[B, 3, H, W] uint8: smooth colours with edges and noise."""
    coarse = sizes.maps(Size("coarse", 12, 12, batch=size.batch), 3)
    smooth = F.interpolate(coarse, (size.height, size.width), mode="bicubic").clamp(0, 1)
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(3))
    return (255 * (smooth > 0.4).float() * 0.4 + 140 * smooth + 4 * noise).clamp(0, 255).round().byte()


def published(image: Tensor, maps: Tensor, variant: str) -> Tensor:
    """The published modules: 48 neighbours of every value in one tensor, by a dilated convolution a ring."""
    kernel = torch.zeros(8, 1, 3, 3, device=maps.device)
    places = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    for k, (y, x) in enumerate(places):
        kernel[k, 0, y, x] = 1

    def gathered(x: Tensor) -> Tensor:
        planes = x.flatten(0, 1).unsqueeze(1)
        near = [F.conv2d(F.pad(planes, (d,) * 4, mode="replicate"), kernel, dilation=d) for d in DILATIONS]
        return torch.cat(near, 1).view(*x.shape[:2], -1, *x.shape[2:])

    weights = _weights(gathered(image.float()), image.float().unsqueeze(2), variant)
    for _ in range(ITERATIONS):
        maps = (gathered(maps) * weights).sum(2)
    return maps


def _weights(near: Tensor, centre: Tensor, variant: str) -> Tensor:
    """[B, 1, K, H, W]."""
    if variant == "pamr":
        deviation = torch.cat([near, *[centre] * len(DILATIONS)], 2).std(2, keepdim=True)
        return (-(near - centre).abs() / (1e-8 + 0.1 * deviation)).mean(1, keepdim=True).softmax(2)
    similarity = (-(((near - centre).abs() / (near.std(2, keepdim=True) + 1e-8) / 0.3) ** 2)).mean(1, keepdim=True)
    ring = (2**0.5, 1.0, 2**0.5, 1.0, 1.0, 2**0.5, 1.0, 2**0.5)
    steps = torch.tensor([d * r for d in DILATIONS for r in ring], device=near.device)
    return similarity.softmax(2) + 0.01 * (-((steps / (steps.std() + 1e-8) / 0.3) ** 2)).softmax(0).view(1, 1, -1, 1, 1)


def shifted_views(image: Tensor, maps: Tensor, variant: str) -> Tensor:
    """The same by views into a padded tensor, a neighbour at a time."""

    def views(x: Tensor) -> list[Tensor]:
        far, (height, width) = DILATIONS[-1], x.shape[2:]
        padded = F.pad(x, (far,) * 4, mode="replicate")
        return [
            padded[:, :, far + dy : far + dy + height, far + dx : far + dx + width]
            for d in DILATIONS
            for dy in (-d, 0, d)
            for dx in (-d, 0, d)
            if dy or dx
        ]

    x = image.float()
    weights = _weights(torch.stack(views(x), 2), x.unsqueeze(2), variant)[:, 0].unbind(1)
    for _ in range(ITERATIONS):
        out = torch.zeros_like(maps)
        for weight, view in zip(weights, views(maps), strict=True):
            out.addcmul_(weight.unsqueeze(1), view)
        maps = out
    return maps


def _case(variant: str, channels: int, aims: tuple[Aim, ...] = (), *, size: Size = CROP, quick: bool = False) -> Case:
    def inputs(size: Size) -> Inputs:
        return {"image": _image(size), "maps": sizes.maps(size, channels)}

    return Case(
        name=f"{variant} {size.name} C={channels}",
        op="pixel_adaptive",
        groups=("adaptive", "memory"),
        size=size,
        channels=channels,
        inputs=inputs,
        expected=lambda i: wk.reference.pixel_adaptive(i["image"], i["maps"].double(), variant=variant),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.pixel_adaptive(i["image"], i["maps"], variant=variant),
                tolerance=5e-5),
            Way("module, published", "published", lambda i: lambda: published(i["image"], i["maps"], variant),
                tolerance=1e-4),
            Way("torch shifted views", "library", lambda i: lambda: shifted_views(i["image"], i["maps"], variant),
                tolerance=1e-4),
        ),
        aims=aims,
        quick=quick,
    )  # fmt: skip


def _work(size: Size, channels: int) -> Work:
    """A multiply-add a neighbour, map and iteration, about 18 operations for a neighbour's weight."""
    neighbours, pixels = 8 * len(DILATIONS), sizes.pixels(size)
    return Work(flop=neighbours * (2 * ITERATIONS * channels + 18) * pixels, bytes=4 * (3 + 2 * channels) * pixels)


_AIMS = (
    Aim("module, published", "ratio", least=100),
    Aim("torch shifted views", "ratio", least=10),
    Aim("ours", "peak_mb", most=60),
)
CASES: list[Case] = [
    _case("par", 3, quick=True),
    _case("par", 21, _AIMS),
    _case("pamr", 21, _AIMS),
]
GPU_CASES: list[Case] = [
    on_gpu(_case(variant, 21, size=size), _work(size, 21))
    for variant in ("par", "pamr")
    for size in (CROP, sizes.batched(CROP, 16))
]


def test_pixel_adaptive(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
