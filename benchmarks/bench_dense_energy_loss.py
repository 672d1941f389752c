"""`dense_energy_loss` beside a call for every image and class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks.bench_dense_crf import crf_work, pictures, probabilities
from benchmarks.cases import Aim, Case, Inputs, Way
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

CROP = Size("crop 160x160 batch 4", 160, 160, batch=4)  # a 320x320 training crop at half size


def _loss_and_gradient(inputs: Inputs, loss: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    probs = inputs["probs"].to(dtype).requires_grad_()
    value = loss(inputs["image"], probs, sigma_xy=50.0)
    return value.detach(), *torch.autograd.grad(value, probs)


def _by_image_and_class(image: Tensor, probs: Tensor, sigma_xy: float) -> Tensor:
    total = probs.new_zeros(())
    for picture, planes in zip(image.split(1), probs.split(1), strict=True):
        for plane in planes.split(1, dim=1):
            total = total + wk.dense_energy_loss(picture, plane, sigma_xy=sigma_xy)
    return total / len(image)


def _energy(size: Size, labels: int, *, quick: bool = False) -> Case:
    def way(name: str, kind: str, loss: Callable[..., Tensor]) -> Way:
        return Way(name, kind, lambda i: lambda: _loss_and_gradient(i, loss, torch.float32), tolerance=1e-4)

    return Case(
        name=f"dense_energy_loss, forward + backward {labels} labels {size.name}",
        op="dense_energy_loss",
        groups=("crf",),
        size=size,
        channels=labels,
        inputs=lambda size: {"image": pictures(size), "probs": probabilities(size, labels)},
        expected=lambda i: _loss_and_gradient(i, wk.reference.dense_energy_loss, torch.float64),
        ways=(
            way("ours", "ours", wk.dense_energy_loss),
            way("a call for every image and class", "library", _by_image_and_class),
        ),
        aims=(Aim("a call for every image and class", "ratio", least=4),),
        quick=quick,
    )


def _gpu_energy(size: Size, labels: int) -> Case:
    def on_the_cpu(image: Tensor, probs: Tensor, sigma_xy: float) -> Tensor:
        return wk.dense_energy_loss(image.cpu(), probs.cpu(), sigma_xy=sigma_xy).to(probs.device)

    case = _energy(size, labels)
    others = {"PyTorch": wk.reference.dense_energy_loss, "ours, on the CPU": on_the_cpu}
    ways = [
        Way(name, "library", lambda i, loss=loss: lambda: _loss_and_gradient(i, loss, torch.float32), tolerance=1e-4)
        for name, loss in others.items()
    ]
    ours = replace(case.ways[0], work=crf_work(size, labels, 1))
    return replace(case, ways=(ours, *ways), aims=(), by_image=False)


CASES: list[Case] = [_energy(CROP, 21, quick=True)]
GPU_CASES: list[Case] = [_gpu_energy(CROP, 21), _gpu_energy(replace(CROP, name="crop 160x160 batch 1", batch=1), 21)]


def test_dense_energy_loss(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
