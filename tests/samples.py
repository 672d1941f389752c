"""Every op on small inputs, forward and backward, for tests that hold for all of them.

python tests/samples.py FILE: writes the results of the instruction set that WSSS_CPU_ISA names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import wsss_kernels as wk

# (batch, height, width): a row longer than a vector, several images, a map smaller than every radius.
SHAPES = ((1, 21, 37), (3, 12, 18), (2, 8, 8))


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_ways(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What an op gave, and the gradients in its inputs of a weighted sum of that."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    real = [out for out in outputs if out.requires_grad]
    weights = [rand(*out.shape, seed=9 + i, dtype=out.dtype) for i, out in enumerate(real)]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(real, inputs, weights))


def leaf(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return rand(*shape, seed=seed, dtype=dtype).requires_grad_()


def labels(batch: int, height: int, width: int) -> Tensor:
    return (
        (3.4 * rand(batch, height // 3 + 1, width // 3 + 1, seed=5))
        .long()
        .repeat_interleave(3, 1)
        .repeat_interleave(3, 2)[:, :height, :width]
    )


def picture(batch: int, height: int, width: int) -> Tensor:
    return (60 * labels(batch, height, width)[:, None] + 40 * rand(batch, 3, height, width, seed=6)).byte()


def smooth_picture(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth regions with edges and some noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colours = torch.rand(batch, 3, 3, generator=generator) * 255
    region = ((x + 2 * y > 0.9 * width).long() + (x * x + y * y < 0.3 * width * width).long())[None].expand(
        batch, -1, -1
    )
    image = torch.gather(colours, 2, region.flatten(1)[:, None].expand(-1, 3, -1)).view(batch, 3, height, width)
    image = image + 0.3 * x + 6 * torch.randn(batch, 3, height, width, generator=generator)
    return image.clamp(0, 255).round().byte()


def affinity_loss(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    x = leaf(b, len(wk.neighbour_offsets(5)), h, w, seed=1, dtype=dtype)
    return both_ways(wk.affinity_loss(x, labels(b, h, w), border="full"), [x])


def affinity_loss_from_features(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    x = leaf(b, 19, h, w, seed=1, dtype=dtype)
    return both_ways(wk.affinity_loss_from_features(x, labels(b, h, w), border="full"), [x])


def attention_entropy(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    query, keys = leaf(b, 2, h * w, 19, seed=1, dtype=dtype), leaf(2, 23, 19, seed=2, dtype=dtype)
    return both_ways(wk.attention_entropy(query, keys, mask=rand(b, 23, seed=3) < 0.6), [query, keys])


def attention_walk(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    maps = leaf(b, 3, h, w, seed=1, dtype=dtype)
    return both_ways(wk.attention_walk(maps, rand(b, h * w, h * w, seed=2, dtype=dtype)), [maps])


def boundary_affinity(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    x = leaf(b, 1, h, w, seed=1, dtype=dtype)
    return both_ways(wk.boundary_affinity(x, 5), [x])


def class_context(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    feats = leaf(b, 19, h, w, seed=1, dtype=dtype)
    return both_ways(wk.class_context(feats, rand(b, 4, h, w, seed=2, dtype=dtype), threshold=0.3), [feats])


def cross_image_attention(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    query = leaf(b, 2, h * w, 19, seed=1, dtype=dtype)
    keys, values = leaf(2, 23, 19, seed=2, dtype=dtype), leaf(2, 23, 19, seed=3, dtype=dtype)
    inputs, mask = [query, keys, values], rand(b, 23, seed=4) < 0.6
    plain = wk.cross_image_attention(*inputs, mask=mask, return_entropy=True)
    return both_ways(plain, inputs) + both_ways(wk.cross_image_attention(*inputs, mask=mask, top_k=4), inputs)


def dense_crf(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    return [wk.dense_crf(picture(b, h, w), 3 * rand(b, 4, h, w, seed=1, dtype=dtype), iterations=3)]


def dense_energy_loss(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    probs = leaf(b, 4, h, w, seed=1, dtype=dtype)
    return both_ways(wk.dense_energy_loss(picture(b, h, w), probs, roi=rand(b, h, w, seed=2, dtype=dtype)), [probs])


def hspp(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    feats = leaf(b, 19, h, w, seed=1, dtype=dtype)
    return both_ways(wk.hspp(feats), [feats])


def kmeans(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    rows = [rand(h * w, 7 * b, seed=1, dtype=dtype), rand(h + w, 3, seed=2, dtype=dtype)]
    found = wk.kmeans(rows, [5, 3], init=[x[: 5 - 2 * i] for i, x in enumerate(rows)], iterations=20)
    return [part for labels, centers, _, _ in found for part in (labels, centers)]


def local_affinity(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for metric in ("l1", "cosine"):
        feats = leaf(b, 19, h, w, seed=1, dtype=dtype)
        results += both_ways(wk.local_affinity(feats, 5, metric=metric, scale="auto"), [feats])
    return results


def mask_vote(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    maps, segments = rand(b, 3, h, w, seed=1, dtype=dtype), labels(b, h, w)
    return [wk.mask_vote(maps, segments), wk.mask_vote(maps, [s[None] == 1 for s in segments], reduce="max")]


def pixel_adaptive(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for variant in ("pamr", "par"):
        maps = leaf(b, 3, h, w, seed=1, dtype=dtype)
        results += both_ways(wk.pixel_adaptive(picture(b, h, w), maps, variant=variant, iterations=3), [maps])
    return results


def random_walk(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    results = []
    for solver, tol in (("power", 1e-4), ("chebyshev", 1e-5), ("auto", 1e-7)):
        maps = leaf(b, 3, h, w, seed=1, dtype=dtype)
        affinity = leaf(b, len(wk.neighbour_offsets(5)), h, w, seed=2, dtype=dtype)
        walked = wk.random_walk(maps, affinity, radius=5, beta=4, steps=20, solver=solver, tol=tol)
        results += both_ways(walked, [maps, affinity])
    return results


def soft_histogram(b: int, h: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    feats, codebook = leaf(b, 19, h, w, seed=1, dtype=dtype), leaf(37, 19, seed=2, dtype=dtype)
    histogram, assignment, words = wk.soft_histogram(feats, codebook, temperature=5)
    return both_ways((histogram, assignment, words), [feats, codebook])


SAMPLES: dict[str, Callable[[int, int, int, torch.dtype], list[Tensor]]] = {
    sample.__name__: sample
    for sample in (
        affinity_loss,
        affinity_loss_from_features,
        attention_entropy,
        attention_walk,
        boundary_affinity,
        class_context,
        cross_image_attention,
        dense_crf,
        dense_energy_loss,
        hspp,
        kmeans,
        local_affinity,
        mask_vote,
        pixel_adaptive,
        random_walk,
        soft_histogram,
    )
}


def results(dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    return {name: [x for shape in SHAPES for x in sample(*shape, dtype)] for name, sample in SAMPLES.items()}


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.save(results(), sys.argv[1])
