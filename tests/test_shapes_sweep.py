"""Shapes, options, dtypes and memory formats drawn at random, forward and backward, against float64.

WSSS_SWEEP_SEED=random draws new cases, a number repeats a run; the seed stands in every failure. WSSS_SWEEP_CASES says
how many of each op.
"""

import os
import random

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference

_wanted = os.environ.get("WSSS_SWEEP_SEED", "0")
SEED = random.SystemRandom().randrange(10**6) if _wanted == "random" else int(_wanted)
CASES = int(os.environ.get("WSSS_SWEEP_CASES") or (100 if _dispatch.native else 30))
BLOCK = 10
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def odd_format(draw: random.Random, x: torch.Tensor) -> torch.Tensor:
    kind = draw.choice(["contiguous", "contiguous", "channels_last", "transposed", "every second", "offset"])
    if kind == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "transposed":
        return x.mT.contiguous().mT
    if kind == "every second":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def draw_sizes(draw: random.Random) -> tuple[int, int, int]:
    side = draw.choice([3, 9, 20, 40])
    return draw.choice([0, 1, 1, 1, 2, 3, 5]), draw.randint(draw.randint(0, 1), side), draw.randint(1, side)


def check(name, actual, expected, dtype, assert_close, case, tol=0.0):
    error = assert_close.error(actual, expected)
    allowed = max(TOLERANCE[dtype], tol)
    assert error <= allowed, f"WSSS_SWEEP_SEED={SEED}: {name} is off by {error:.2e} (allowed {allowed:.0e}) in {case}"


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_random_walk(device, first, oracle, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"walk {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        channels, radius, dtype = draw.randint(0, 12), draw.randint(1, 9), draw.choice(list(TOLERANCE))
        options = {
            "radius": radius,
            "beta": draw.choice([0.5, 1, 2, 8.0, 10, 3.3]),
            "steps": draw.choice([0, 1, 2, 5, 16, 31, 64, 128]) if dtype != torch.float64 else draw.randint(0, 6),
        }
        solver, tol = draw.choice(["power", "chebyshev", "auto"]), draw.choice([1e-2, 1e-3, 1e-4, 1e-5])
        maps = torch.randn(batch, channels, height, width).to(dtype)
        affinity = torch.rand(batch, len(oracle.offsets(radius)), height, width)
        affinity = affinity.where(affinity > draw.choice([0, 0.5]), 0).to(dtype)
        maps, affinity = odd_format(draw, maps.to(device)), odd_format(draw, affinity.to(device))
        case = {"shape": list(maps.shape), "dtype": dtype, "solver": solver, "tol": tol, "case": i} | options
        out = wk.random_walk(maps, affinity, **options, solver=solver, tol=tol)
        assert out.dtype == dtype and out.is_contiguous(), case
        expected = oracle.walk(maps, affinity, **options)
        largest = maps.double().abs().amax().item() / max(expected.abs().amax().item(), 1e-30) if maps.numel() else 1
        check("result", out, expected, dtype, assert_close, case, (1e-5 if solver == "power" else tol + 1e-6) * largest)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_local_affinity(device, first, oracle, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"affinity {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        dim, radius, dtype = (
            draw.choice([1, 2, 3, 7, 16, 31, 33, 70]),
            draw.randint(1, 16),
            draw.choice(list(TOLERANCE)),
        )
        metric = draw.choice(["l1", "cosine"]) if dim > 1 else "l1"
        scale, border = draw.choice([0.3, 1.0, 2.0, "auto"]), draw.choice(["full", "full", "cropped"])
        feats = odd_format(draw, torch.randn(batch, dim, height, width).to(dtype).to(device)).requires_grad_()
        case = {"shape": list(feats.shape), "dtype": dtype, "radius": radius, "metric": metric, "scale": scale,
                "border": border, "case": i}  # fmt: skip
        out = wk.local_affinity(feats, radius, metric=metric, scale=scale, border=border)
        assert out.dtype == dtype and out.is_contiguous(), case
        exact = feats.detach().double().cpu().requires_grad_()
        expected = oracle.affinity(exact, radius, metric, scale, border)
        check("result", out, expected, dtype, assert_close, case)
        upstream = torch.randn(out.shape).to(dtype)
        upstream[expected.detach() < 1e-3] = 0  # max(cos, 0) bends at 0, where rounding decides
        if expected.requires_grad:
            grad = torch.autograd.grad(out, feats, upstream.to(device))[0]
            wanted = torch.autograd.grad(expected, exact, upstream.double())[0]
            check("gradient", grad, wanted, dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_attention_walk(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"attention {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw.choice([0, 1, 1, 2, 3]), draw.randint(1, 14), draw.randint(1, 14)
        channels, dtype = draw.choice([0, 1, 2, 5, 30]), draw.choice(list(TOLERANCE))
        options = {"sinkhorn": draw.randint(0, 4), "squarings": draw.randint(0, 5),
                   "box_threshold": draw.choice([None, 0.0, 0.4, 0.8])}  # fmt: skip
        maps = odd_format(draw, torch.rand(batch, channels, height, width).pow(3).to(dtype).to(device))
        attention = torch.softmax(3 * torch.randn(batch, height * width, height * width), dim=-1).to(dtype).to(device)
        case = {"shape": list(maps.shape), "dtype": dtype, "case": i} | options
        maps.requires_grad_()
        out = wk.attention_walk(maps, attention, **options)
        assert out.dtype == dtype and out.is_contiguous(), case
        exact = maps.detach().double().cpu().requires_grad_()
        expected = wk.reference.attention_walk(exact, attention.double().cpu(), **options)
        check("result", out, expected, dtype, assert_close, case)
        if expected.numel():
            upstream = torch.rand(out.shape).to(dtype)
            grad = torch.autograd.grad(out, maps, upstream.to(device))[0]
            wanted = torch.autograd.grad(expected, exact, upstream.double())[0]
            check("gradient", grad, wanted, dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_pixel_adaptive(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"adaptive {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        channels, dtype = draw.randint(0, 10), draw.choice(list(TOLERANCE))
        options = {
            "variant": draw.choice(["pamr", "par"]),
            "dilations": draw.choice([(1,), (1, 2), (3, 50), (1, 2, 4, 8, 12, 24)]),
            "iterations": draw.choice([0, 1, 2, 5]),
        }
        levels = draw.choice([16, 256])  # fewer: 8 equal neighbours, a deviation of 0, and logarithms beyond float32
        image = torch.randint(0, levels, (batch, 3, height, width)).float()
        maps = odd_format(draw, torch.randn(batch, channels, height, width).to(dtype).to(device)).requires_grad_()
        case = {"shape": list(maps.shape), "dtype": dtype, **options, "levels": levels, "case": i}
        out = wk.pixel_adaptive(odd_format(draw, image.to(device)), maps, **options)
        assert out.dtype == dtype and out.is_contiguous(), case
        exact = maps.detach().double().cpu().requires_grad_()
        expected = reference.pixel_adaptive(image, exact, **options)
        check("result", out, expected, dtype, assert_close, case, tol=5e-5)
        if out.numel():
            upstream = torch.randn(out.shape).to(dtype)
            grad = torch.autograd.grad(out, maps, upstream.to(device))[0]
            wanted = torch.autograd.grad(expected, exact, upstream.double())[0]
            check("gradient", grad, wanted, dtype, assert_close, case, tol=5e-5)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_mask_vote(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"vote {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        channels, dtype, reduce = draw.randint(0, 6), draw.choice(list(TOLERANCE)), draw.choice(["mean", "max"])
        maps = odd_format(draw, torch.rand(batch, channels, height, width).to(dtype).to(device))
        if draw.random() < 0.5:
            cells = torch.randint(-2, draw.choice([2, 10, 300]), (batch, height // 3 + 1, width // 3 + 1))
            cells = cells * draw.choice([1, 1000003])
            segments = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :height, :width].to(device)
            segments = segments.to(draw.choice([torch.int32, torch.int64]))
        else:
            share = draw.choice([0.1, 0.7])
            segments = [torch.rand(draw.randint(0, 4), height, width, device=device) < share for _ in range(batch)]
        case = {"shape": list(maps.shape), "dtype": dtype, "reduce": reduce, "case": i}
        out = wk.mask_vote(maps, segments, reduce=reduce)
        assert out.dtype == dtype and out.is_contiguous(), case
        there = segments.cpu() if isinstance(segments, torch.Tensor) else [image.cpu() for image in segments]
        expected = wk.reference.mask_vote(maps.double().cpu(), there, reduce=reduce)
        check("result", out, expected, dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_boundary_affinity(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"boundary {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        radius, dtype, levels = (
            draw.choice([1, 2, 3, 4, 5, 6, 7, 9, 12]),
            draw.choice(list(TOLERANCE)),
            draw.choice([1, 3, 99]),
        )
        values = torch.randint(0, levels + 1, (batch, 1, height, width)) / levels
        boundary = odd_format(draw, values.to(dtype).to(device)).requires_grad_()
        case = {"shape": list(boundary.shape), "dtype": dtype, "radius": radius, "levels": levels, "case": i}
        out = wk.boundary_affinity(boundary, radius)
        assert out.dtype == dtype and out.is_contiguous(), case
        exact = boundary.detach().double().cpu().requires_grad_()
        expected = reference.boundary_affinity(exact, radius)
        check("result", out, expected, dtype, assert_close, case)
        upstream = torch.randn(out.shape).to(dtype)
        if radius > 1:
            grad = torch.autograd.grad(out, boundary, upstream.to(device))[0]
            wanted = torch.autograd.grad(expected, exact, upstream.double())[0]
            check("gradient", grad, wanted, dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_affinity_loss(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"loss {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        radius, dtype = draw.randint(1, 9), draw.choice(list(TOLERANCE))
        options = {"radius": radius, "border": draw.choice(["full", "cropped"]), "ignore_index": draw.choice([255, 0])}
        labels = torch.randint(-1, draw.randint(1, 5), (batch, height, width)).to(
            draw.choice([torch.int64, torch.int8])
        )
        affinity = torch.rand(batch, len(wk.neighbour_offsets(radius)), height, width).to(dtype)
        leaf = odd_format(draw, affinity).to(device).requires_grad_()
        exact = affinity.double().requires_grad_()
        out = wk.affinity_loss(leaf, labels.to(device), **options)
        expected = reference.affinity_loss(exact, labels, **options)
        case = (i, dtype, tuple(affinity.shape), options)
        check("loss", out.cpu(), expected, dtype, assert_close, case)
        grad = torch.autograd.grad(out, leaf)[0].cpu()
        check("gradient", grad, torch.autograd.grad(expected, exact)[0], dtype, assert_close, case)


def both_ways(names, outputs, expected, leaves, exact, dtype, assert_close, case, tol=0.0):
    """Checks outputs, and the gradients of a weighted sum of them in the leaves."""
    upstream = [torch.rand(out.shape).to(out.dtype) for out in outputs]
    for name, out, wanted in zip(names, outputs, expected, strict=True):
        assert out.dtype == dtype and out.is_contiguous(), (name, case)
        check(name, out, wanted, dtype, assert_close, case, tol)
    grads = torch.autograd.grad(outputs, leaves, [up.to(out.device) for up, out in zip(upstream, outputs, strict=True)])
    wanted = torch.autograd.grad(expected, exact, [up.double() for up in upstream])
    for i, (grad, exact_grad) in enumerate(zip(grads, wanted, strict=True)):
        check(f"gradient {i}", grad, exact_grad, dtype, assert_close, case, tol)


def leaf_and_exact(draw, device, dtype, *shape):
    x = odd_format(draw, torch.randn(*shape).to(dtype).to(device)).requires_grad_()
    return x, x.detach().double().cpu().requires_grad_()


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_soft_histogram(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"histogram {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        # One word or channel alone has a gradient of 0.
        depth, count, dtype = draw.randint(2, 40), draw.choice([2, 17, 50]), draw.choice(list(TOLERANCE))
        feats, exact_feats = leaf_and_exact(draw, device, dtype, batch, depth, height, width)
        codebook, exact_codebook = leaf_and_exact(draw, device, dtype, count, depth)
        temperature = draw.choice([1.0, 0.1, 20.0])
        case = {"feats": list(feats.shape), "words": count, "dtype": dtype, "temperature": temperature, "case": i}
        histogram, assignment, words = wk.soft_histogram(feats, codebook, temperature=temperature)
        expected, nearest, there = reference.soft_histogram(exact_feats, exact_codebook, temperature=temperature)
        assert torch.equal(assignment.cpu(), nearest) and torch.equal(words.cpu(), there), case
        leaves, exact = [feats, codebook], [exact_feats, exact_codebook]
        both_ways(["histogram"], [histogram], [expected], leaves, exact, dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_hspp(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"hspp {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        levels = draw.choice([(1,), (1, 2, 4), (3,), (2, 5), (1, 2, 3, 4, 5, 6)])
        height, width = max(height, *levels, 1), max(width, *levels, 1)
        dtype, gamma = draw.choice(list(TOLERANCE)), draw.choice([0, 1, 2.0])
        feats, exact = leaf_and_exact(draw, device, dtype, batch, draw.randint(1, 40), height, width)
        case = {"feats": list(feats.shape), "levels": levels, "gamma": gamma, "dtype": dtype, "case": i}
        out = wk.hspp(feats, levels=levels, gamma=gamma)
        expected = reference.hspp(exact, levels=levels, gamma=gamma)
        both_ways(["result"], [out], [expected], [feats], [exact], dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_memory_attention(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"memory {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, count, entries = draw.randint(0, 4), draw.choice([0, 1, 7, 33]), draw.choice([1, 3, 20, 65])
        heads, depth, dtype = draw.randint(1, 3), draw.choice([1, 5, 16, 37]), draw.choice(list(TOLERANCE))
        shared = draw.random() < 0.5
        memory = (heads, entries, depth) if shared else (batch, heads, entries, depth)
        query, exact_query = leaf_and_exact(draw, device, dtype, batch, heads, count, depth)
        keys, exact_keys = leaf_and_exact(draw, device, dtype, *memory)
        values, exact_values = leaf_and_exact(draw, device, dtype, *memory)
        mask = torch.rand(batch, entries) < draw.choice([0.0, 0.3, 0.9]) if draw.random() < 0.7 else None
        options = {"scale": draw.choice([None, 0.5])}
        if draw.random() < 0.3:
            options["threshold"] = 0.5 / entries
        case = {
            "query": list(query.shape),
            "memory": memory,
            "mask": mask is not None,
            "dtype": dtype,
            "case": i,
            **options,
        }
        there = mask if mask is None else mask.to(device)
        out, entropy = wk.cross_image_attention(query, keys, values, mask=there, return_entropy=True, **options)
        exact = [exact_query, exact_keys, exact_values]
        expected, wanted = reference.cross_image_attention(*exact, mask=mask, return_entropy=True, **options)
        outputs, expected = [out, 1 + entropy], [expected, 1 + wanted]  # 1e-5 where one entry is allowed
        leaves = [query, keys, values]
        both_ways(["result", "entropy"], outputs, expected, leaves, exact, dtype, assert_close, case)
        entropy = wk.attention_entropy(query, keys, mask=there, scale=options["scale"])
        check("entropy alone", 1 + entropy, expected[1], dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_class_context(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"context {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        batch, height, width = draw_sizes(draw)
        depth, classes, dtype = draw.randint(1, 40), draw.randint(1, 22), draw.choice(list(TOLERANCE))
        feats, exact = leaf_and_exact(draw, device, dtype, batch, depth, height, width)
        confidence = torch.rand(batch, classes, height, width).to(dtype)
        assign = torch.randint(-1, classes + 1, (batch, height, width)) if draw.random() < 0.5 else None
        threshold = draw.choice([0.0, 0.5, 0.99])
        case = {"feats": list(feats.shape), "classes": classes, "threshold": threshold, "dtype": dtype, "case": i}
        there = assign if assign is None else assign.to(device)
        outputs = wk.class_context(feats, odd_format(draw, confidence.to(device)), threshold=threshold, assign=there)
        expected = reference.class_context(exact, confidence.double(), threshold=threshold, assign=assign)
        check("weights", outputs[1], expected[1], outputs[1].dtype, assert_close, case)
        both_ways(["prototypes"], outputs[:1], expected[:1], [feats], [exact], dtype, assert_close, case)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_kmeans(device, first, assert_close, nan_filled):
    for i in range(first, first + BLOCK):
        draw = random.Random(f"kmeans {SEED} {i}")
        torch.manual_seed(draw.randrange(2**31))
        problems, starts, ks = [], [], []
        for _ in range(draw.randint(1, 4)):
            rows, depth = draw.randint(1, 120), draw.choice([1, 3, 20, 33])
            k = draw.randint(1, min(rows, 9))
            problems.append(4 * torch.randint(0, 4, (rows, depth)).float() + torch.randn(rows, depth))
            starts.append(problems[-1][torch.randperm(rows)[:k]])
            ks.append(k)
        iterations = draw.choice([1, 3, 50])
        case = {"rows": [list(x.shape) for x in problems], "k": ks, "iterations": iterations, "case": i}
        there = [odd_format(draw, x.to(device)) for x in problems]
        found = wk.kmeans(there, ks, init=[start.to(device) for start in starts], iterations=iterations, tol=0)
        exact = reference.kmeans(
            [x.double() for x in problems], ks, init=[s.double() for s in starts], iterations=iterations, tol=0
        )
        for rows, got, wanted in zip(problems, found, exact, strict=True):
            assert torch.equal(got.labels.cpu(), wanted.labels) and got.n_iter == wanted.n_iter, case
            check("centers", got.centers, wanted.centers, torch.float32, assert_close, case)
            assert abs(got.inertia - wanted.inertia) <= 1e-5 * float(rows.square().sum()) + 1e-30, case
