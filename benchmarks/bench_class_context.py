"""`class_context` beside the masked sum in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.bench_cross_image_attention import VGG, crops
from benchmarks.cases import Case, Inputs, Way, beside_compiled, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

CLASSES = 21


def _inputs(size: Size) -> Inputs:
    confidence = sizes.maps(size, CLASSES)
    return {"feats": sizes.features(size), "confidence": confidence / confidence.amax((2, 3), keepdim=True)}


def einsum(feats: Tensor, confidence: Tensor) -> list[Tensor]:
    """The published code, with its loop over classes as one product."""
    first = torch.nn.functional.one_hot(confidence.argmax(1), CLASSES).permute(0, 3, 1, 2)
    weights = torch.where((confidence > 0.5) & (first > 0), confidence, 0.0)
    sums = weights.sum((2, 3))
    return [torch.einsum("bchw,bdhw->bcd", weights, feats) / (sums[..., None] + 1e-5), sums]


def _case(size: Size) -> Case:
    return Case(
        name=f"class context {size.name}, {CLASSES} classes",
        op="class_context",
        groups=("memory-attention",),
        size=size,
        channels=CLASSES,
        inputs=_inputs,
        expected=lambda i: wk.reference.class_context(i["feats"].double(), i["confidence"], threshold=0.5),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.class_context(i["feats"], i["confidence"], threshold=0.5)),
            Way("torch einsum", "library", lambda i: lambda: einsum(i["feats"], i["confidence"])),
        ),
    )


def _work(size: Size) -> Work:
    """Each feature once, into the sum of one class."""
    return Work(flop=2 * size.dim * sizes.pixels(size), bytes=4 * (size.dim + CLASSES) * sizes.pixels(size))


CASES: list[Case] = [_case(VGG)]
GPU_CASES: list[Case] = [
    *(on_gpu(_case(size), _work(size)) for size in (VGG, crops(1, 512), crops(64, 512))),
    beside_compiled(_case(VGG), lambda i: wk.reference.class_context(i["feats"], i["confidence"], threshold=0.5)),
]


def test_class_context(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
