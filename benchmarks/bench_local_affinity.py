"""`local_affinity` beside the published gather and shifted views, alone and with a loss on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks import baselines, sizes
from benchmarks.cases import Aim, Case, Inputs, Result, Way, beside_compiled, relative_error
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size


def _inputs(size: Size) -> Inputs:
    return {"feats": sizes.features(size), "pairs": baselines.published_pairs(size.height, size.width)}


def _on_published_pairs(result: Result, expected: Result, inputs: Inputs) -> float:
    assert isinstance(expected, Tensor)
    return relative_error(result, baselines.published_view(expected))


def _affinity(size: Size, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    pixels = (size.height - 4) * (size.width - 8)
    return Case(
        name=f"affinity {size.name}",
        op="local_affinity",
        groups=("affinity",),
        size=size,
        channels=34,
        inputs=_inputs,
        expected=lambda i: wk.reference.local_affinity(i["feats"].double()),
        ways=(
            Way("ours", "ours", lambda i: lambda: wk.local_affinity(i["feats"])),
            Way(
                "gather, published",  # builds fewer pairs: none of the outer columns and last rows
                "published",
                lambda i: lambda: baselines.gathered_affinity(i["feats"], *i["pairs"]),
                compare=_on_published_pairs,
                gigabytes=5 * 4e-9 * size.batch * size.dim * 34 * pixels,
            ),
            Way("torch shifted views", "library", lambda i: lambda: baselines.shifted_affinity(i["feats"])),
        ),
        aims=aims,
        quick=quick,
    )


def _training_inputs(size: Size) -> Inputs:
    pairs = baselines.published_pairs(size.height, size.width)
    targets = baselines.pair_targets(sizes.pixel_labels(size), *pairs)
    return {"feats": sizes.features(size), "pairs": pairs, "targets": targets}


def _loss_and_gradient(inputs: Inputs, affinity: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """affinity: feats -> [B, K, S]."""
    feats = inputs["feats"].detach().requires_grad_()
    loss = baselines.pair_loss(affinity(feats), inputs["targets"])
    loss.backward()
    assert feats.grad is not None
    return loss.detach(), feats.grad


def _expected_gradient(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Image by image, since autograd keeps 34 copies of the features."""

    def affinity(feats: Tensor) -> Tensor:
        return baselines.published_view(wk.reference.local_affinity(feats.double(), border="cropped"))

    images = inputs["feats"].split(1)
    with torch.no_grad():
        pairs = torch.cat([affinity(image) for image in images])
    pairs.requires_grad_()
    loss = baselines.pair_loss(pairs, inputs["targets"])
    (grad,) = torch.autograd.grad(loss, pairs)
    grads = []
    for image, grad_of_image in zip(images, grad.split(1), strict=True):
        image = image.double().requires_grad_()
        grads += torch.autograd.grad(affinity(image), image, grad_of_image)
    return loss.detach(), torch.cat(grads)


def _ours_cropped(feats: Tensor) -> Tensor:
    return baselines.published_view(wk.local_affinity(feats, border="cropped"))


def _training(size: Size, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    copies = 4e-9 * size.batch * size.dim * 34 * (size.height - 4) * (size.width - 8)  # GB of the gathered features

    def gathered(i: Inputs) -> Callable[[], Result]:
        return lambda: _loss_and_gradient(i, lambda f: baselines.gathered_affinity(f, *i["pairs"]))

    def shifted(i: Inputs) -> Callable[[], Result]:
        return lambda: _loss_and_gradient(i, lambda f: baselines.published_view(baselines.shifted_affinity(f)))

    return Case(
        name=f"affinity + loss, forward + backward {size.name}",
        op="local_affinity",
        groups=("affinity", "memory"),
        size=size,
        channels=34,
        inputs=_training_inputs,
        expected=_expected_gradient,
        ways=(
            Way("ours", "ours", lambda i: lambda: _loss_and_gradient(i, _ours_cropped), tolerance=1e-4),
            Way("gather, published", "published", gathered, tolerance=1e-4, gigabytes=6 * copies),
            Way("torch shifted views", "library", shifted, tolerance=1e-4, gigabytes=6 * copies),
        ),
        aims=aims,
        quick=quick,
    )


def _call() -> Case:
    def watched(i: Inputs) -> Callable[[], Tensor]:
        feats = i["feats"].clone().requires_grad_()
        return lambda: wk.local_affinity(feats).detach()

    return Case(
        name="local_affinity, one call on 4x4 D=1",
        op="local_affinity",
        groups=("overhead",),
        size=sizes.CALL,
        channels=34,
        inputs=lambda size: {"feats": sizes.features(size)},
        expected=lambda i: wk.reference.local_affinity(i["feats"].double()),
        ways=(
            Way("eager", "ours", lambda i: lambda: wk.local_affinity(i["feats"])),
            Way("with grad, forward", "ours", watched),
            Way("torch.add", "context", lambda i: lambda: torch.add(i["feats"], i["feats"])),
        ),
        unit="us",
        quick=True,
    )


# On a GPU -------------------------------------------------------------------------------------------------------------


def _work(size: Size, *, backward: bool = False) -> Work:
    """Forward: features read, affinity written. Backward: both and a gradient read, a gradient written."""
    pixels = size.batch * size.height * size.width
    forward = Work(flop=3 * size.dim * 34 * pixels, bytes=4 * pixels * (size.dim + 34))
    if not backward:
        return forward
    return Work(flop=3 * forward.flop, bytes=forward.bytes + 4 * pixels * (2 * size.dim + 2 * 34))


def _gpu_affinity(size: Size, batch: int) -> Case:
    size = sizes.batched(size, batch)
    case = _affinity(size, quick=batch == 1)
    features = 4e-9 * batch * size.dim * size.height * size.width
    ours, gather, shifted = case.ways
    ways = (
        replace(ours, work=_work(size)),
        *((gather,) if batch == 1 else ()),
        replace(shifted, gigabytes=5 * features),
    )
    return replace(case, ways=ways)


def _gpu_training(size: Size) -> Case:
    case = _training(size)
    ours, *others = case.ways
    return replace(case, groups=("affinity",), ways=(replace(ours, work=_work(size, backward=True)), *others))


def _gradient(inputs: Inputs, affinity: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    feats = inputs["feats"].detach().requires_grad_()
    result = affinity(feats)
    return result.detach(), *torch.autograd.grad(result, feats, inputs["grad"])


def _gpu_gradient(size: Size) -> Case:
    """Forward and backward of the op alone, its upstream gradient given."""

    def inputs(size: Size) -> Inputs:
        generator = torch.Generator().manual_seed(5)
        grad = torch.rand(size.batch, 34, size.height, size.width, generator=generator) - 0.5
        return {"feats": sizes.features(size), "grad": grad}

    def expected(i: Inputs) -> tuple[Tensor, ...]:
        images = zip(i["feats"].double().split(1), i["grad"].double().split(1), strict=True)
        results = [_gradient({"feats": f, "grad": g}, wk.reference.local_affinity) for f, g in images]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    copies = 4e-9 * size.batch * size.dim * 34 * size.height * size.width
    return Case(
        name=f"affinity, forward + backward {size.name}",
        op="local_affinity",
        groups=("affinity",),
        size=size,
        channels=34,
        inputs=inputs,
        expected=expected,
        ways=(
            Way(
                "ours",
                "ours",
                lambda i: lambda: _gradient(i, wk.local_affinity),
                tolerance=1e-4,
                work=_work(size, backward=True),
            ),
            Way(
                "torch shifted views",
                "library",
                lambda i: lambda: _gradient(i, baselines.shifted_affinity),
                tolerance=1e-4,
                gigabytes=3 * copies,
            ),
        ),
        quick=True,
    )


CASES: list[Case] = [
    _affinity(
        sizes.PSA,
        (Aim("gather, published", "ratio", least=100), Aim("ours", "median_ms", most=1.5)),
        quick=True,
    ),
    _affinity(sizes.IRN),
    _training(sizes.CROP_2, quick=True),
    _training(sizes.CROP, (Aim("gather, published", "ratio", least=50), Aim("ours", "peak_mb", most=100))),
    _call(),
]

GPU_CASES: list[Case] = [
    *(_gpu_affinity(size, batch) for batch in sizes.GPU_BATCHES for size in sizes.GPU_SIZES),
    _gpu_gradient(sizes.CROP),
    _gpu_training(sizes.CROP),
    _call(),
    beside_compiled(_gpu_affinity(sizes.PSA, 16), lambda i: wk.reference.local_affinity(i["feats"])),
]


def test_local_affinity(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
