"""`affinity_loss` beside the published gather and plain PyTorch, from affinities and from features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import baselines, sizes
from benchmarks.bench_local_affinity import _expected_gradient, _loss_and_gradient
from benchmarks.cases import Aim, Case, Inputs, Result, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

Loss = Callable[[Tensor, Tensor], Tensor]


def _affinity_inputs(size: Size) -> Inputs:
    return {"main": wk.local_affinity(sizes.features(size), border="cropped"), "labels": sizes.pixel_labels(size)}


def _feature_inputs(size: Size) -> Inputs:
    pairs = baselines.published_pairs(size.height, size.width)
    labels, feats = sizes.pixel_labels(size), sizes.features(size)
    return {"main": feats, "feats": feats, "labels": labels, "pairs": pairs,
            "targets": baselines.pair_targets(labels, *pairs)}  # fmt: skip


def _both(inputs: Inputs, loss: Loss) -> tuple[Tensor, Tensor]:
    leaf = inputs["main"].detach().requires_grad_()
    result = loss(leaf, inputs["labels"])
    (grad,) = torch.autograd.grad(result, leaf)
    return result.detach(), grad


def _way(name: str, kind: str, loss: Loss, gigabytes: float = 0.0) -> Way:
    return Way(name, kind, lambda i: lambda: _both(i, loss), tolerance=1e-4, gigabytes=gigabytes)


def _compiled(function: Loss) -> Loss:
    """Compiled when it is first called."""
    compiled: list[Loss] = []

    def call(main: Tensor, labels: Tensor) -> Tensor:
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True))
        return compiled[0](main, labels)

    return call


def _from_affinity(size: Size, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    return Case(
        name=f"affinity loss, forward + backward {size.name}",
        op="affinity_loss",
        groups=("loss",),
        size=size,
        channels=34,
        inputs=_affinity_inputs,
        expected=lambda i: _both({"main": i["main"].double(), "labels": i["labels"]}, wk.reference.affinity_loss),
        ways=(
            _way("ours", "ours", wk.affinity_loss),
            _way("torch eager", "library", wk.reference.affinity_loss),
            _way("torch.compile", "library", _compiled(wk.reference.affinity_loss)),
        ),
        aims=aims,
        quick=quick,
        by_image=False,
    )


def _from_features(size: Size, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    copies = 4e-9 * size.batch * size.dim * 34 * (size.height - 4) * (size.width - 8)  # GB of the gathered features
    reference = wk.reference.affinity_loss_from_features

    def gathered(i: Inputs) -> Callable[[], Result]:
        return lambda: _loss_and_gradient(i, lambda f: baselines.gathered_affinity(f, *i["pairs"]))

    return Case(
        name=f"affinity loss from features, forward + backward {size.name}",
        op="affinity_loss",
        groups=("loss", "memory"),
        size=size,
        channels=34,
        inputs=_feature_inputs,
        expected=_expected_gradient,
        ways=(
            _way("ours", "ours", wk.affinity_loss_from_features),
            Way("gather, published", "published", gathered, tolerance=1e-4, gigabytes=6 * copies),
            _way("torch eager", "library", reference, gigabytes=6 * copies),
            _way("torch.compile", "library", _compiled(reference), gigabytes=6 * copies),
        ),
        aims=aims,
        quick=quick,
        by_image=False,
    )


def _work(size: Size, planes: int, flop: int) -> Work:
    """Labels and planes read, the gradient of the planes written."""
    return Work(flop=flop * planes * sizes.pixels(size), bytes=(8 * planes + 8) * sizes.pixels(size))


CASES: list[Case] = [
    _from_affinity(sizes.CROP, (Aim("ours", "ratio", least=5),)),
    _from_features(sizes.CROP_2, (Aim("gather, published", "ratio", least=50),), quick=True),
    _from_features(sizes.CROP, (Aim("ours", "peak_mb", most=100),)),
]
ONE = Size("crop 56x56 batch 1", 56, 56)
GPU_CASES: list[Case] = [
    case
    for size, without in ((sizes.CROP, ()), (ONE, ("torch.compile",)))
    for case in (
        on_gpu(_from_affinity(size), _work(size, 34, 10), without=without),
        on_gpu(_from_features(size), _work(size, size.dim, 9 * 34), without=without),
    )
]


def test_affinity_loss(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
