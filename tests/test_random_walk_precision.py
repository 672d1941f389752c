"""random_walk: what power is exact to, the tolerance that Chebyshev keeps, units and dtypes."""

import pytest
import torch

import wsss_kernels as wk
from tests.test_random_walk import SOLVERS, links, rand

STEPS = (1, 2, 3, 15, 16, 17, 64, 255, 256, 1000, 5000)
TOLERANCES = (1e-2, 1e-3, 1e-4, 3e-5, 1e-6, 1e-7)
ROUNDING = 6e-8  # of the float32 that comes out


# Power


@pytest.mark.parametrize("height, width", [(47, 63), (64, 64), (56, 56)])
def test_power_is_exact_to_1e_5_on_affinitynet_like_maps(wk, height, width, scenes, oracle, assert_close):
    feats, maps = scenes.features(1, 64, height, width, noise=0.1), scenes.maps(1, 4, height, width)
    affinity = wk.local_affinity(feats, scale=0.3)
    assert_close(wk.random_walk(maps, affinity, solver="power"), oracle.walk(maps, affinity), 1e-5)


@pytest.mark.parametrize("height, width, radius", [(94, 125, 5), (64, 64, 10)])
def test_power_is_exact_to_1e_5_on_irnet_like_maps(wk, height, width, radius, scenes, oracle, assert_close):
    affinity, maps = scenes.edge_affinity(height, width, radius), scenes.maps(1, 4, height, width)
    out = wk.random_walk(maps, affinity, radius=radius, beta=10, solver="power")
    assert_close(out, oracle.walk(maps, affinity, radius, 10), 1e-5)


def sum_form(maps, affinity, radius, beta, steps, oracle):
    """y_i = 1 / d_i * sum_j W_ij x_j, self first, in float32 with the degree summed alike: what not to write."""
    height, width = maps.shape[-2:]
    degree, taps = torch.ones(height, width), []
    for (dy, dx), plane in zip(oracle.offsets(radius), affinity[0] ** beta, strict=True):
        here = (..., slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        there = (..., slice(dy, height), slice(max(0, dx), width + min(0, dx)))
        taps += [(plane[here], here, there), (plane[here], there, here)]
    for link, to, _ in taps:
        degree[to] += link
    inverse, x = 1 / degree, maps
    for _ in range(steps):
        y = x.clone()
        for link, to, source in taps:
            y[to].addcmul_(link, x[source])
        x = y * inverse
    return x


@pytest.mark.parametrize("radius, side", [(5, 40), (10, 32)])
def test_the_naive_sum_form_would_be_caught(radius, side, scenes, oracle, assert_close):
    """A kernel that writes the step as a float32 weighted sum drifts past 1e-4 where the difference form keeps 1e-5."""
    maps, affinity = scenes.maps(1, 2, side, side), scenes.edge_affinity(side, side, radius)
    expected = oracle.walk(maps, affinity, radius, 10)
    assert_close(sum_form(maps, affinity, radius, 10, 1, oracle), oracle.walk(maps, affinity, radius, 10, 1), 2e-5)
    assert assert_close.error(sum_form(maps, affinity, radius, 10, 256, oracle), expected) > 1e-4
    assert_close(wk.random_walk(maps, affinity, radius=radius, beta=10, solver="power"), expected, 1e-5)


# Tolerance


def awkward_affinities(oracle, scenes, radius, height, width, seed):
    k, offsets = links(radius), oracle.offsets(radius)
    noise = rand(1, k, height, width, seed=seed)
    return {
        "flat": torch.ones(1, k, height, width),
        "zero": torch.zeros(1, k, height, width),
        "blocks": (noise > 0.7).float(),
        "few links": (noise > 0.97).float(),
        "strong edges": scenes.edge_affinity(height, width, radius, seed),
        "checkerboard": torch.tensor([1.0 if (dy + dx) % 2 else 0.02 for dy, dx in offsets])[None, :, None, None]
        .expand(1, k, height, width),
        "two lanes": torch.tensor([float(offset == (0, 1)) for offset in offsets])[None, :, None, None]
        .expand(1, k, height, width),
        "noise": noise,
        "weak": 0.3 * noise,
        "hubs": (noise[:, :1] > 0.9).float() * torch.ones(1, k, 1, 1),
    }  # fmt: skip


def awkward_maps(scenes, height, width, seed):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    spike = torch.zeros(height, width)
    spike[height // 2, width // 2] = 1
    corner = torch.zeros(height, width)
    corner[0, 0] = 1
    noise = rand(height, width, seed=seed)
    planes = [
        spike,
        corner,
        1.0 - 2.0 * ((x + y) % 2),
        1.0 - 2.0 * (x % 2),
        noise,
        noise.round() * 2 - 1,
        torch.ones(height, width),
    ]
    return torch.cat([torch.stack(planes)[None], scenes.maps(1, 2, height, width, seed)], dim=1)


def spectrum(affinity, radius, beta, oracle):
    """P^t for any t: P = D^-1/2 S D^1/2 with S symmetric."""
    p = oracle.transition(affinity, radius, beta)[0]
    root = p.diagonal().rsqrt()  # the diagonal of P is 1 / degree
    values, vectors = torch.linalg.eigh(root[:, None] * p / root)
    return values, vectors, root


def walked(maps, eigen, steps):
    values, vectors, root = eigen
    return (((maps.double().flatten(2) * root) @ vectors * values**steps) @ vectors.T / root).reshape(maps.shape)


def error_of_tolerance(out, expected, maps, tol):
    """Largest error in units of what is allowed; every map has its own maximum."""
    error = (out.double() - expected).abs().amax((2, 3))
    return (error / ((tol + ROUNDING) * maps.abs().amax((2, 3)))).max().item()


@pytest.mark.native  # the reference ignores tol: float32 and `steps` products
@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.release)], ids=["some tolerances", "every tolerance"]
)
@pytest.mark.parametrize(
    "radius, beta, size", [(5, 8.0, (17, 19)), (2, 1.0, (3, 61)), (10, 10.0, (12, 13)), (3, 2.5, (40, 1))]
)
def test_chebyshev_keeps_tol(wk, radius, beta, size, every, oracle, scenes):
    worst, at = 0.0, None
    turn = 0
    for seed in range(5 if every else 1):
        maps = awkward_maps(scenes, *size, seed)
        for name, affinity in awkward_affinities(oracle, scenes, radius, *size, seed).items():
            eigen = spectrum(affinity, radius, beta, oracle)
            for steps in STEPS:
                expected = walked(maps, eigen, steps)
                turn += 1
                for tol in TOLERANCES if every else (TOLERANCES[turn % 6],):
                    for solver in ("chebyshev", "auto") if every else ("auto" if turn % 7 == 0 else "chebyshev",):
                        out = wk.random_walk(
                            maps, affinity, radius=radius, beta=beta, steps=steps, solver=solver, tol=tol
                        )
                        ratio = error_of_tolerance(out, expected, maps, tol)
                        if ratio > worst:
                            worst, at = ratio, (name, steps, tol, solver, seed)
    assert worst <= 1, f"error {worst:.2f} times what tol allows, at {at}"


@pytest.mark.native
def test_chebyshev_keeps_tol_on_the_worst_maps(wk, oracle):
    """The map that a given error polynomial does the most harm to: the signs of a row of its matrix."""
    radius, height, width = 5, 12, 13
    every = torch.eye(height * width).reshape(1, -1, height, width)
    for name, affinity in {
        "blocks": (rand(1, links(radius), height, width) > 0.7).float(),
        "hubs": (rand(1, 1, height, width, seed=3) > 0.9) * torch.ones(1, links(radius), 1, 1),
        "noise": rand(1, links(radius), height, width, seed=4),
    }.items():
        eigen = spectrum(affinity, radius, 0.5, oracle)
        for steps in (15, 16, 17, 64, 256):
            expected = walked(every, eigen, steps)
            for tol in (1e-2, 1e-3, 1e-4):
                out = wk.random_walk(every, affinity, radius=radius, beta=0.5, steps=steps, solver="chebyshev", tol=tol)
                worst = (out.double() - expected).abs().sum(1).max().item()
                assert worst <= tol + 1e-5, (name, steps, tol, worst / tol)


@pytest.mark.native
@pytest.mark.parametrize("tol", [1e-4, 3e-5, 1e-5, 1e-7])
def test_tol_holds_for_weak_links(wk, tol):
    """A link so weak that a float32 step of 3e-8 would round away, 256 times."""
    affinity = torch.zeros(1, 34, 1, 2)
    affinity[0, 0, 0, 0] = w = 2.9e-8
    maps = torch.tensor([[[[1.0, 0.0]]]])
    for solver in SOLVERS:
        out = wk.random_walk(maps, affinity, beta=1, solver=solver, tol=tol)
        gone = 0.5 * (1 - ((1 - w) / (1 + w)) ** 256)
        expected = torch.tensor([[[[1 - gone, gone]]]], dtype=torch.float64)
        assert error_of_tolerance(out, expected, maps, tol) <= 1


@pytest.mark.native
@pytest.mark.parametrize("steps, tol", [(1000, 2e-5), (5000, 3e-5), (5000, 1e-4), (20000, 1e-4), (100000, 1e-3)])
def test_tol_holds_for_many_steps(wk, steps, tol):
    affinity = torch.zeros(1, 34, 1, 2)
    affinity[0, 0, 0, 0] = w = 2.9e-8
    maps = torch.tensor([[[[1.0, 0.0]]]])
    gone = 0.5 * (1 - ((1 - w) / (1 + w)) ** steps)
    expected = torch.tensor([[[[1 - gone, gone]]]], dtype=torch.float64)
    for solver in SOLVERS:
        out = wk.random_walk(maps, affinity, beta=1, steps=steps, solver=solver, tol=tol)
        assert error_of_tolerance(out, expected, maps, tol) <= 1, solver


@pytest.mark.native
def test_auto_is_never_worse_than_tol_on_large_maps(wk, scenes, oracle):
    affinity, maps = scenes.edge_affinity(40, 44, 10, seed=2), scenes.maps(1, 4, 40, 44)
    expected = oracle.walk(maps, affinity, 10, 10)
    for tol in TOLERANCES:
        for solver in ("auto", "chebyshev"):
            out = wk.random_walk(maps, affinity, radius=10, beta=10, solver=solver, tol=tol)
            assert error_of_tolerance(out, expected, maps, tol) <= 1, (solver, tol)


# Units and dtypes


@pytest.mark.parametrize("solver, tol", [("power", 1e-5), ("chebyshev", 1e-4)])
def test_large_values_and_units(wk, solver, tol, oracle, assert_close):
    maps, affinity = rand(1, 3, 9, 17), rand(1, 34, 9, 17, seed=1)
    for unit in (1e-20, 1e-6, 1e6, 1e20):
        out = wk.random_walk(maps * unit, affinity, steps=64, solver=solver)
        assert_close(out / unit, oracle.walk(maps, affinity, steps=64), tol)


def test_dtypes(dtype, device, oracle, assert_close):
    maps, affinity = rand(2, 7, 11, 18).to(dtype), rand(2, 34, 11, 18, seed=1).to(dtype)
    for solver in SOLVERS:
        out = wk.random_walk(maps.to(device), affinity.to(device), solver=solver, steps=64)
        assert out.dtype == dtype and out.device.type == device.type and out.is_contiguous()
        expected = oracle.walk(maps, affinity, steps=64)
        tol = {torch.float32: 1e-5 if solver == "power" else 1e-4}.get(dtype)
        assert_close(out, expected, tol)


@pytest.mark.parametrize("of_maps", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_affinity", [torch.float16, torch.float32, torch.float64])
def test_mixed_dtypes(wk, of_maps, of_affinity, oracle, assert_close):
    maps = rand(1, 2, 8, 9).to(of_maps).requires_grad_()
    affinity = rand(1, 34, 8, 9, seed=1).to(of_affinity).requires_grad_()
    out = wk.random_walk(maps, affinity, steps=16, solver="power")
    assert out.dtype == of_maps
    assert_close(out, oracle.walk(maps, affinity, steps=16))
    out.float().sum().backward()
    assert maps.grad.dtype == of_maps and affinity.grad.dtype == of_affinity


@pytest.mark.parametrize("size", [6e4, -6e4])
def test_half_precision_extremes(wk, size):
    maps = torch.full((1, 2, 9, 17), size).half()
    maps[:, 1, ::2] = 0
    affinity = rand(1, 34, 9, 17, seed=1).half()
    for solver in SOLVERS:
        out = wk.random_walk(maps, affinity, solver=solver)
        assert out.isfinite().all() and torch.equal(out[:, 0], maps[:, 0])
