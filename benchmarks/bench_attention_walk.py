"""`attention_walk` beside the published walk, class by class, and beside one on all classes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.cases import Aim, Case, Inputs, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

THRESHOLD = 0.4


def _inputs(size: Size, channels: int) -> Inputs:
    """Attention as a transformer's: like features attend to each other, near ones more."""
    feats = sizes.features(replace(size, dim=16)).flatten(2)
    attention = torch.softmax(feats.mT @ feats / 4, dim=-1)
    return {"maps": sizes.maps(size, channels), "attention": attention}


def _boxes(plane: Tensor) -> Tensor:
    """Found on the CPU, as published."""
    values = plane.cpu().numpy()
    regions, _ = scipy.ndimage.label(values > np.float32(THRESHOLD) * values.max(), structure=np.ones((3, 3)))
    mask = np.zeros(values.shape, dtype=bool)
    for box in scipy.ndimage.find_objects(regions):
        mask[box] = True
    return torch.from_numpy(mask).to(plane.device)


def _transition(attention: Tensor) -> Tensor:
    t = attention
    for _ in range(3):
        t = t / t.sum(0, keepdim=True)
        t = t / t.sum(1, keepdim=True)
    return (t + t.T) / 2


def _published(inputs: Inputs) -> Tensor:
    """The square of T is formed, and masked, anew for every class, as in the published code (whose boxes are cv2's)."""
    images = []
    for maps, attention in zip(inputs["maps"], inputs["attention"], strict=True):
        refined = []
        for plane in maps:
            mask = _boxes(plane).view(1, -1)
            t = _transition(attention)
            t = (t @ t) * mask
            refined.append((t @ plane.reshape(-1, 1)).view_as(plane))
        images.append(torch.stack(refined))
    return torch.stack(images)


def _library(inputs: Inputs) -> Tensor:
    """T once for all classes, and two products instead of its square."""
    images = []
    for maps, attention in zip(inputs["maps"], inputs["attention"], strict=True):
        t = _transition(attention)
        x = torch.stack([plane * _boxes(plane) for plane in maps]).flatten(1).T
        images.append((t @ (t @ x)).T.reshape(maps.shape))
    return torch.stack(images)


def _walk(size: Size, channels: int, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    return Case(
        name=f"attention walk {size.name} C={channels}",
        op="attention_walk",
        groups=("attention",),
        size=size,
        channels=channels,
        inputs=lambda size: _inputs(size, channels),
        expected=lambda i: wk.reference.attention_walk(i["maps"], i["attention"].double()),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.attention_walk(i["maps"], i["attention"])),
            Way("squared, published", "published", lambda i: lambda: _published(i)),
            Way("torch, two products", "library", lambda i: lambda: _library(i)),
        ),
        aims=aims,
        quick=quick,
    )


def _call() -> Case:
    def watched(i: Inputs) -> Callable[[], Tensor]:
        maps = i["maps"].clone().requires_grad_()
        return lambda: wk.attention_walk(maps, i["attention"]).detach()

    return Case(
        name="attention_walk, one call on 4x4",
        op="attention_walk",
        groups=("overhead",),
        size=sizes.CALL,
        channels=1,
        inputs=lambda size: _inputs(size, 1),
        expected=lambda i: wk.reference.attention_walk(i["maps"], i["attention"].double()),
        ways=(
            Way("eager", "ours", lambda i: lambda: wk.attention_walk(i["maps"], i["attention"])),
            Way("with grad, forward", "ours", watched),
            Way("torch.bmm", "context", lambda i: lambda: torch.bmm(i["attention"], i["attention"])),
        ),
        unit="us",
        quick=True,
    )


def _work(size: Size, channels: int) -> Work:
    """The attention once, two products."""
    entries = size.batch * (size.height * size.width) ** 2
    return Work(flop=0, bytes=4 * entries, products=4 * channels * entries)


CASES: list[Case] = [
    _walk(sizes.SMALL, 2, (Aim("squared, published", "ratio", least=20),), quick=True),
    _walk(sizes.SMALL, 20),
    _walk(sizes.TOKENS, 3, (Aim("squared, published", "ratio", least=30),)),
    _call(),
]
GPU_CASES: list[Case] = [
    on_gpu(_walk(size, channels), _work(size, channels))
    for size, channels in ((sizes.SMALL, 20), (sizes.TOKENS, 3), (sizes.batched(sizes.TOKENS, 16), 3))
]


def test_attention_walk(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
