"""`attention_entropy`, forward and backward, beside the same written out over all and over compacted entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks.bench_cross_image_attention import (
    CAPACITY,
    CLASSES,
    VGG,
    attention_work,
    crops,
    memory_inputs,
    whole_memory,
)
from benchmarks.cases import Case, Inputs, Way, on_gpu
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size


def _entropy(scores: Tensor) -> Tensor:
    weights = scores.softmax(-1)
    return -(weights * (weights + 1e-5).log()).sum(-1).mean()


def masked(query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    return _entropy(scores.masked_fill(~mask[:, None, None], -torch.inf))


def compacted(query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """As many entries an image here, so that they fit one tensor."""
    chosen = keys[0][torch.stack([row.nonzero()[:, 0] for row in mask])]
    return _entropy(query @ chosen[:, None].transpose(-1, -2) * query.shape[-1] ** -0.5)


def _reference(query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    return wk.reference.attention_entropy(query, keys, mask=mask)


def _ours(query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    return wk.attention_entropy(query, keys, mask=mask)


def _both_ways(entropy: Callable[..., Tensor]) -> Callable[[Inputs], Callable[[], Sequence[Tensor]]]:
    """The entropy, and its gradients in query and keys."""

    def prepare(inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
        query, keys = (x.detach().clone().requires_grad_() for x in (inputs["query"], inputs["memory"][None]))

        def run() -> Sequence[Tensor]:
            value = entropy(query, keys, inputs["mask"])
            return [value.detach(), *torch.autograd.grad(value, [query, keys])]

        return run

    return prepare


def _expected(inputs: Inputs) -> Sequence[Tensor]:
    return _both_ways(_reference)({**inputs, "query": inputs["query"].double(), "memory": inputs["memory"].double()})()


def _case(size: Size) -> Case:
    return Case(
        name=f"attention_entropy {size.name}, {CLASSES * CAPACITY} entries, forward and backward",
        op="attention_entropy",
        groups=("memory-attention",),
        size=size,
        channels=1,
        inputs=lambda size: memory_inputs(size, CLASSES * CAPACITY, whole_memory),
        expected=_expected,
        ways=(
            Way("ours", "ours", _both_ways(_ours)),
            Way("torch, masked", "library", _both_ways(masked), tolerance=1e-4),
            Way("torch, compacted", "library", _both_ways(compacted), tolerance=1e-4),
            Way("torch.compile, masked", "library", _both_ways(torch.compile(masked)), tolerance=1e-4),
        ),
        by_image=False,
    )


CASES: list[Case] = [_case(VGG)]
GPU_CASES: list[Case] = [
    on_gpu(_case(VGG), attention_work(VGG, 192, 3, 2)),
    *(
        on_gpu(_case(size), attention_work(size, 192, 3, 2), without=("torch.compile, masked",))
        for size in (crops(1, 512), crops(32, 512))
    ),
]


def test_attention_entropy(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
