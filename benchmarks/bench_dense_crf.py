"""`dense_crf` beside pydensecrf."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.cases import Aim, Case, Inputs, Result, Way
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

HAS_PYDENSECRF = importlib.util.find_spec("pydensecrf") is not None  # pip install pydensecrf2
VOC = Size("voc 375x500", *sizes.PICTURE)
COCO = Size("coco 480x640", 480, 640)


def pictures(size: Size) -> Tensor:
    """A picture with little noise, as photographs have: flat ones and noisy ones differ in their lattice."""
    seeds = range(3, 3 + size.batch)
    pictures = [sizes.picture((size.height, size.width), seed).float() for seed in seeds]
    smooth = torch.nn.functional.avg_pool2d(torch.cat(pictures), 5, stride=1, padding=2, count_include_pad=False)
    return smooth.round().to(torch.uint8)


def probabilities(size: Size, labels: int) -> Tensor:
    return (4 * sizes.maps(size, labels)).softmax(1)


def _wrong_labels(result: Result, expected: Result, inputs: Inputs) -> float:
    """The share of pixels whose label differs: where a pixel lies between two simplices, rounding decides."""
    assert isinstance(result, Tensor) and isinstance(expected, Tensor)
    return float((result.argmax(1) != expected.argmax(1)).double().mean())


def _pydensecrf(inputs: Inputs) -> Callable[[], Tensor]:
    from pydensecrf import densecrf

    labels, height, width = inputs["unary"].shape[1:]
    unary = inputs["unary"].reshape(labels, -1).numpy()
    image = np.ascontiguousarray(inputs["image"][0].permute(1, 2, 0).numpy())

    def call() -> Tensor:
        crf = densecrf.DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
        return torch.from_numpy(np.array(crf.inference(10))).view(1, labels, height, width)

    return call


def _crf(size: Size, labels: int, least: float, *, quick: bool = False) -> Case:
    def inputs(size: Size) -> Inputs:
        return {"image": pictures(size), "unary": wk.unary_from_probabilities(probabilities(size, labels))}

    peers = (Way("pydensecrf", "published", _pydensecrf, tolerance=1e-3, compare=_wrong_labels),)
    return Case(
        name=f"dense_crf {labels} labels {size.name}",
        op="dense_crf",
        groups=("crf",),
        size=size,
        channels=labels,
        inputs=inputs,
        expected=lambda i: wk.reference.dense_crf(i["image"], i["unary"].double()),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.dense_crf(i["image"], i["unary"]), tolerance=1e-4),
            *(peers if HAS_PYDENSECRF else ()),
        ),
        aims=(Aim("pydensecrf", "ratio", least=least),) if HAS_PYDENSECRF else (),
        quick=quick,
    )


def _gpu_crf(size: Size, labels: int) -> Case:
    """Beside the same in plain PyTorch on the GPU, and beside the CPU kernel with the way there and back."""

    def on_the_cpu(i: Inputs) -> Callable[[], Tensor]:
        return lambda: wk.dense_crf(i["image"].cpu(), i["unary"].cpu()).to(i["unary"].device)

    def in_pytorch(i: Inputs) -> Callable[[], Tensor]:
        return lambda: wk.reference.dense_crf(i["image"], i["unary"])

    case = _crf(size, labels, 0, quick=size.batch == 1)
    ways = (
        replace(case.ways[0], work=crf_work(size, labels, 10)),
        Way("PyTorch", "library", in_pytorch, tolerance=1e-3, compare=_wrong_labels),
        Way("ours, on the CPU", "library", on_the_cpu, tolerance=1e-3, compare=_wrong_labels),
    )
    return replace(case, ways=ways, aims=())


def crf_work(size: Size, labels: int, iterations: int) -> Work:
    """Scores read and written once; about 75 operations a value and iteration."""
    values = labels * sizes.pixels(size)
    return Work(flop=75 * iterations * values, bytes=8 * values)


CASES: list[Case] = [
    _crf(VOC, 3, 3, quick=True),
    _crf(VOC, 21, 4),
    _crf(COCO, 81, 5),
]
GPU_CASES: list[Case] = [
    _gpu_crf(VOC, 3),
    _gpu_crf(VOC, 21),
    _gpu_crf(sizes.batched(VOC, 8), 21),
    _gpu_crf(COCO, 81),
]


def test_dense_crf(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
