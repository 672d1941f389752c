"""What is measured: cases, the ways to the result of each, and the figures they aim at."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Work
from benchmarks.sizes import Size

Inputs = dict[str, Any]
Result = Tensor | Sequence[Tensor]

MODULES = (
    "benchmarks.bench_random_walk",
    "benchmarks.bench_local_affinity",
    "benchmarks.bench_attention_walk",
    "benchmarks.bench_mask_vote",
    "benchmarks.bench_pixel_adaptive",
    "benchmarks.bench_class_context",
    "benchmarks.bench_cross_image_attention",
    "benchmarks.bench_attention_entropy",
    "benchmarks.bench_dense_crf",
    "benchmarks.bench_dense_energy_loss",
    "benchmarks.bench_boundary_affinity",
    "benchmarks.bench_affinity_loss",
    "benchmarks.bench_kmeans",
    "benchmarks.bench_soft_histogram",
    "benchmarks.bench_hspp",
    "benchmarks.bench_refine",
)


def relative_error(result: Result, expected: Result, inputs: Inputs | None = None) -> float:
    """max |result - expected| / max |expected|, the worst of several tensors."""
    if isinstance(result, Tensor) or isinstance(expected, Tensor):
        result, expected = [result], [expected]  # type: ignore[list-item]
    worst = 0.0
    for a, b in zip(result, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"a result must have the shape {list(b.shape)}, got {list(a.shape)}")
        error = float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


@dataclass(frozen=True)
class Way:
    """One way to the result.

    kind: "ours"; "library", what a careful user writes, whose fastest is our opponent; "published"; "context", other
    work shown for scale, compared with nothing.
    """

    name: str
    kind: str
    prepare: Callable[[Inputs], Callable[[], Result]]  # what is not timed, such as building a matrix that is "given"
    tolerance: float = 1e-5  # of the error against float64; a way above it gets no number
    compare: Callable[[Result, Result, Inputs], float] = relative_error
    flop: float | None = None
    work: Work | None = None  # for the limit of the GPU
    gigabytes: float = 0.0  # free memory without which the way is left out
    only_full: bool = False  # takes minutes
    form: Callable[[Inputs], str] | None = None  # which of a kernel's forms runs on a GPU; "" where it has one


@dataclass(frozen=True)
class Aim:
    """A figure to reach, with two threads on the developers' machine."""

    way: str
    column: str  # of the row; "workspace_mb" = peak_mb - output_mb
    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    groups: tuple[str, ...]  # the first is where the table lists it
    size: Size
    channels: int
    inputs: Callable[[Size], Inputs]
    expected: Callable[[Inputs], Result]  # in float64
    ways: tuple[Way, ...]
    aims: tuple[Aim, ...] = ()
    quick: bool = False
    only_full: bool = False
    timed: bool = True
    unit: str = "ms"  # of the table
    by_image: bool = True  # no result is a sum over the batch: some of its images may repeat others


def on_gpu(case: Case, work: Work, *, without: Sequence[str] = ()) -> Case:
    """The same on a GPU, with the limit of ours: without the aims of a CPU, and without the ways named."""
    ways = tuple(replace(way, work=work) if way.kind == "ours" else way for way in case.ways if way.name not in without)
    return replace(case, groups=case.groups[:1], ways=ways, aims=(), quick=False)


def beside_compiled(case: Case, op: Callable[[Inputs], Result]) -> Case:
    """On a GPU, in the group of what takes long to prepare: ours, and an op's reference compiled by torch."""
    ours = case.ways[0]

    def prepare(inputs: Inputs) -> Callable[[], Result]:
        compiled = torch.compile(op, dynamic=False)
        return lambda: compiled(inputs)

    way = Way("torch.compile of the reference", "library", prepare, ours.tolerance)
    return replace(case, name=f"{case.name}, compiled", groups=("compile",), ways=(ours, way), quick=False)


def all_cases(device: str = "cpu") -> list[Case]:
    name = "CASES" if device == "cpu" else "GPU_CASES"
    return [case for module in MODULES for case in getattr(importlib.import_module(module), name)]
