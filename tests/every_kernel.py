"""Calls every kernel on small inputs and compares with the CPU: a short run for compute-sanitizer.

python tests/every_kernel.py [OP ...] [--device cuda], OP of those at the end of this file
"""

from __future__ import annotations

import argparse
import itertools

import torch

import wsss_kernels as wk

TOLERANCE = 1e-3  # of the largest value: a kernel gone wrong misses by more, half precision by less


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(name, op, inputs, device, *, gradients=True):
    """op(*inputs) and the gradients of its sum, on the device and on the CPU."""
    results = []
    for place in (device, torch.device("cpu")):
        leaves = [x.to(place, copy=True).requires_grad_() for x in inputs]
        out = op(*leaves)
        results.append([out, *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if gradients else ())])
        with torch.no_grad():
            results[-1].append(op(*leaves))  # past torch's dispatcher
    for got, wanted in zip(*results, strict=True):
        got, wanted = got.detach().cpu().double(), wanted.detach().double()
        error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30) if wanted.numel() else 0.0
        tolerance = TOLERANCE if inputs[0].dtype == torch.float32 else 2e-2
        assert error <= tolerance, f"{name}: off by {error:.1e} of the largest value"
    print(name, flush=True)


def affinity(device):
    shapes = ((2, 20, 9, 13, torch.float32), (1, 37, 34, 45, torch.float32), (1, 5, 3, 2, torch.float16))
    variants = (("l1", 1.0, "full"), ("l1", "auto", "cropped"), ("cosine", 1.0, "full"), ("cosine", "auto", "full"))
    for (*shape, dtype), (metric, scale, border) in itertools.product(shapes, variants):
        for radius in (5, 3) if shape[2] < 10 else (5,):
            compare(
                f"affinity {shape} {dtype} radius {radius} {metric} {scale} {border}",
                lambda x: wk.local_affinity(x, radius, metric=metric, scale=scale, border=border),  # noqa: B023
                [rand(*shape, dtype=dtype)],
                device,
            )


def boundary(device):
    shapes = ((2, 1, 9, 13, torch.float32), (1, 1, 34, 45, torch.float32), (1, 1, 3, 2, torch.float16))
    for (*shape, dtype), radius in itertools.product(shapes, (5, 10)):
        compare(
            f"boundary {shape} {dtype} radius {radius}",
            lambda x: wk.boundary_affinity(x, radius),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
        )


def adaptive(device):
    shapes = ((2, 3, 9, 13, torch.float32), (1, 21, 34, 45, torch.float32), (1, 1, 3, 2, torch.float16))
    for (*shape, dtype), variant in itertools.product(shapes, ("pamr", "par")):
        batch, _, height, width = shape
        picture = 255 * rand(batch, 3, height, width, seed=1)
        compare(
            f"pixel-adaptive {shape} {dtype} {variant}",
            lambda x: wk.pixel_adaptive(picture.to(x.device), x, variant=variant, iterations=3),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
        )


def walk(device):
    shapes = ((2, 3, 9, 13, 5), (1, 7, 47, 63, 5), (1, 2, 94, 125, 5), (2, 4, 12, 17, 3), (1, 1, 2, 3, 9))
    for (*shape, radius), (solver, tol) in itertools.product(
        shapes, (("power", 1e-4), ("chebyshev", 1e-4), ("auto", 1e-7))
    ):
        batch, _, height, width = shape
        compare(
            f"walk {shape} radius {radius} {solver} {tol:g}",
            lambda x, a: wk.random_walk(x, a, radius=radius, steps=20, solver=solver, tol=tol),  # noqa: B023
            [rand(*shape), rand(batch, len(wk.neighbour_offsets(radius)), height, width, seed=1)],
            device,
        )


def attention(device):
    for (*shape, dtype), squarings in itertools.product(
        ((2, 3, 5, 7, torch.float32), (1, 2, 40, 41, torch.float32), (1, 1, 6, 6, torch.float16)), (0, 1, 3)
    ):
        batch, _, height, width = shape
        tokens = rand(batch, height * width, height * width, seed=1)
        compare(
            f"attention walk {shape} {dtype} squarings {squarings}",
            lambda x: wk.attention_walk(x, tokens.to(x.device), squarings=squarings),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
        )


def vote(device):
    for (*shape, dtype), reduce in itertools.product(
        ((2, 3, 5, 7, torch.float32), (1, 5, 60, 61, torch.float32), (1, 1, 6, 6, torch.float16)), ("mean", "max")
    ):
        batch, _, height, width = shape
        segments = (20 * rand(batch, height, width, seed=1)).long() - 1
        masks = [rand(count + 1, height, width, seed=count) > 0.7 for count in range(batch)]
        compare(
            f"vote of segments {shape} {dtype} {reduce}",
            lambda x: wk.mask_vote(x, segments.to(x.device), reduce=reduce),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
            gradients=False,
        )
        compare(
            f"vote of masks {shape} {dtype} {reduce}",
            lambda x: wk.mask_vote(x, [image.to(x.device) for image in masks], reduce=reduce),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
            gradients=False,
        )


def crf(device):
    if device.type == "cuda" and wk.info()["ops"]["dense_crf"]["cuda"]["forward"]["kernel"] != "cuda":
        print("crf: the module was compiled without CUDA", flush=True)
        return
    for *shape, dtype in ((2, 3, 9, 13, torch.float32), (1, 21, 40, 41, torch.float32), (1, 140, 5, 6, torch.float16)):
        batch, _, height, width = shape
        picture = 255 * rand(batch, 3, height, width, seed=1)
        compare(
            f"crf {shape} {dtype}",
            lambda x: wk.dense_crf(picture.to(x.device), x.detach(), iterations=2),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
            gradients=False,
        )
        compare(
            f"energy of the crf {shape} {dtype}",
            lambda x: wk.dense_energy_loss(picture.to(x.device), x),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
        )


def loss(device):
    for (*shape, dtype), border in itertools.product(
        ((2, 3, 9, 11, torch.float32), (1, 20, 40, 41, torch.float32), (1, 4, 12, 16, torch.float16)),
        ("full", "cropped"),
    ):
        batch, _, height, width = shape
        labels = (4 * rand(batch, height, width, seed=1)).long() - 1
        compare(
            f"affinity loss {shape} {dtype} {border}",
            lambda x: wk.affinity_loss(x, labels.to(x.device), border=border),  # noqa: B023
            [rand(batch, 34, height, width, dtype=dtype)],
            device,
        )
        compare(
            f"affinity loss from features {shape} {dtype} {border}",
            lambda x: wk.affinity_loss_from_features(x, labels.to(x.device), border=border),  # noqa: B023
            [rand(*shape, dtype=dtype)],
            device,
        )


def kmeans(device):
    for rows, dim, k in ((40, 20, 7), (300, 65, 18), (1, 1, 1)):
        x = rand(rows, dim)
        compare(
            f"k-means {rows}x{dim} k={k}",
            lambda x: wk.kmeans(x, k, init=x[:k]).centers,  # noqa: B023
            [x],
            device,
            gradients=False,
        )


def memory_attention(device):
    for (batch, heads, queries, entries, dim), shared in itertools.product(
        ((2, 2, 40, 37, 20), (1, 1, 70, 5, 3)), (True, False)
    ):
        own = (heads, entries, dim) if shared else (batch, heads, entries, dim)
        mask = rand(batch, entries, seed=4) > 0.4
        compare(
            f"cross_image_attention {queries} x {entries} shared {shared}",
            lambda q, k, v: wk.cross_image_attention(q, k, v, mask=mask.to(q.device)),  # noqa: B023
            [rand(batch, heads, queries, dim), rand(*own, seed=1), rand(*own, seed=2)],
            device,
        )
        compare(
            f"attention_entropy {queries} x {entries} shared {shared}",
            lambda q, k: wk.attention_entropy(q, k, mask=mask.to(q.device)),  # noqa: B023
            [rand(batch, heads, queries, dim), rand(*own, seed=1)],
            device,
        )
    confidence = rand(2, 4, 9, 11, seed=3)
    compare(
        "class_context",
        lambda x: wk.class_context(x, confidence.to(x.device), threshold=0.3)[0],
        [rand(2, 20, 9, 11)],
        device,
    )


def histogram(device):
    for (*shape, dtype), words in itertools.product(
        ((2, 20, 9, 13, torch.float32), (1, 64, 28, 28, torch.float32), (1, 5, 3, 2, torch.float16)), (7, 256)
    ):
        compare(
            f"histogram {shape} {dtype} {words} words",
            lambda x, w: wk.soft_histogram(x, w)[0],
            [rand(*shape, dtype=dtype), rand(words, shape[1], seed=1, dtype=dtype)],
            device,
        )


def pyramid(device):
    for *shape, dtype in ((2, 20, 9, 13, torch.float32), (1, 64, 28, 28, torch.float32), (1, 5, 4, 5, torch.float16)):
        compare(f"pyramid {shape} {dtype}", wk.hspp, [rand(*shape, dtype=dtype)], device)


def refine(device):
    compare(
        "refine_cams",
        lambda cams, feats: wk.refine_cams(cams, feats, background=16, steps=20),
        [rand(2, 2, 14, 19), rand(2, 16, 14, 19, seed=1)],
        device,
    )


def main(argv: list[str] | None = None) -> None:
    groups = {
        "affinity": affinity,
        "boundary": boundary,
        "adaptive": adaptive,
        "walk": walk,
        "attention": attention,
        "vote": vote,
        "crf": crf,
        "loss": loss,
        "kmeans": kmeans,
        "memory-attention": memory_attention,
        "histogram": histogram,
        "pyramid": pyramid,
        "refine": refine,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(groups)} (default: all)")
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args(argv)
    unknown = set(options.ops) - set(groups)
    if unknown:
        parser.error(f"OP must be of {', '.join(groups)}, got {', '.join(sorted(unknown))}")
    for name in options.ops or groups:
        groups[name](options.device)
    if options.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
