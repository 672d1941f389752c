"""random_walk: gradients of the maps and of the affinity."""

import math

import pytest
import torch

import wsss_kernels as wk
from tests.test_random_walk import NATIVE, SOLVERS, links, rand
from wsss_kernels import reference


def gradients(op, maps, affinity, upstream, *args, **kwargs):
    maps, affinity = maps.clone().requires_grad_(), affinity.clone().requires_grad_()
    op(maps, affinity, *args, **kwargs).backward(upstream.to(maps.dtype))
    return maps.grad, affinity.grad


def check_gradients(
    wk, shape, radius, beta, steps, solver, oracle, assert_close, affinity=None, tol=1e-4, of_affinity=5e-5
):
    batch, _, height, width = shape
    maps = rand(*shape) * 2 - 0.5
    affinity = rand(batch, links(radius), height, width, seed=1) if affinity is None else affinity
    upstream = rand(*shape, seed=2) * 2 - 1
    expected = gradients(oracle.dense_walk, maps.double(), affinity.double(), upstream, radius, beta, steps)
    actual = gradients(
        wk.random_walk, maps, affinity, upstream, radius=radius, beta=beta, steps=steps, solver=solver, tol=tol
    )
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], of_affinity)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 16, 17, 64, *([255, 256] if NATIVE else [])])
def test_gradients(wk, steps, solver, oracle, assert_close, nan_filled):
    check_gradients(wk, (2, 7, 9, 13), 5, 8.0, steps, solver, oracle, assert_close)


@pytest.mark.parametrize("radius", range(2, 11))
def test_gradients_of_every_radius(wk, radius, oracle, assert_close, nan_filled):
    check_gradients(wk, (1, 3, 11, 18), radius, 2.0, 40, "auto", oracle, assert_close)


@pytest.mark.parametrize("beta", [0, 0.5, 1, 1.5, 8, 10, 70])
def test_gradients_of_every_beta(wk, beta, oracle, assert_close):
    affinity = rand(1, 34, 9, 13, seed=1) * 0.95 + 0.05
    affinity[0, ::3] = 0  # no link: no gradient
    check_gradients(wk, (1, 3, 9, 13), 5, float(beta), 30, "auto", oracle, assert_close, affinity)


@pytest.mark.parametrize("channels", range(1, 13))
def test_gradients_of_every_number_of_maps(wk, channels, oracle, assert_close, nan_filled):
    check_gradients(wk, (1, channels, 6, 17), 3, 1.0, 12, "auto", oracle, assert_close)


@pytest.mark.native  # torch's own float32 gradient of 256 steps is off by up to 1e-3
@pytest.mark.parametrize("border", ["full", "cropped"])
@pytest.mark.parametrize("steps", [16, 256])
def test_gradients_on_affinities_of_features(wk, border, steps, scenes, oracle, assert_close):
    affinity = wk.local_affinity(scenes.features(1, 16, 16, 19), scale="auto", border=border)
    check_gradients(wk, (1, 4, 16, 19), 5, 8.0, steps, "auto", oracle, assert_close, affinity)


@pytest.mark.native
@pytest.mark.parametrize("radius, size", [(5, (17, 20)), (10, (16, 20))])
def test_gradients_on_strong_edges(wk, radius, size, scenes, oracle, assert_close):
    affinity = scenes.edge_affinity(*size, radius)
    check_gradients(wk, (1, 3, *size), radius, 10.0, 256, "auto", oracle, assert_close, affinity)


@pytest.mark.native
@pytest.mark.parametrize(
    "radius, beta, steps, solver, tol, exact",
    [
        (7, 2.0, 40, "auto", 1e-4, 1e-4),
        (5, 1.0, 30, "auto", 1e-4, 1e-4),
        (5, 8.0, 256, "auto", 1e-4, 1e-4),
        (5, 8.0, 256, "power", 1e-4, 1e-6),
        (5, 8.0, 256, "auto", 1e-6, 1e-6),
    ],
)
def test_gradient_of_the_affinity_keeps_tol(wk, radius, beta, steps, solver, tol, exact, oracle, assert_close):
    """By power, and below float32's own rounding, in double."""
    for size in ((9, 13), (11, 18)):
        check_gradients(
            wk, (1, 3, *size), radius, beta, steps, solver, oracle, assert_close, tol=tol, of_affinity=exact
        )
        affinity = torch.where(
            rand(1, links(radius), *size) > 0.3, rand(1, links(radius), *size, seed=1) * 0.95 + 0.05, 0.0
        )
        check_gradients(wk, (1, 3, *size), radius, beta, steps, solver, oracle, assert_close, affinity, tol, exact)


def test_gradients_of_the_reference(assert_close):
    maps, affinity, upstream = rand(2, 3, 8, 11), rand(2, 12, 8, 11, seed=1), rand(2, 3, 8, 11, seed=2)
    for steps in (0, 1, 7, 40):
        arguments = {"radius": 3, "beta": 4.0, "steps": steps}
        expected = gradients(reference.random_walk, maps.double(), affinity.double(), upstream, **arguments)
        for solver in SOLVERS:
            leaves = maps.clone().requires_grad_(), affinity.clone().requires_grad_()
            out = wk.random_walk(*leaves, **arguments, solver=solver)
            actual = torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)
            for got, want in zip(actual, expected, strict=True):
                assert_close(got, torch.zeros_like(got) if want is None else want)


def test_gradient_of_one_input_only(wk, oracle):
    maps, affinity, upstream = rand(2, 7, 9, 13), rand(2, 34, 9, 13, seed=1), rand(2, 7, 9, 13, seed=2)
    both = gradients(wk.random_walk, maps, affinity, upstream)
    leaf = maps.clone().requires_grad_()
    wk.random_walk(leaf, affinity).backward(upstream)
    assert (leaf.grad - both[0]).abs().max() < 1e-6
    leaf = affinity.clone().requires_grad_()
    wk.random_walk(maps, leaf).backward(upstream)
    assert torch.equal(leaf.grad, both[1])


def test_zero_upstream_gradient(wk):
    for grad in gradients(wk.random_walk, rand(2, 7, 9, 13), rand(2, 34, 9, 13, seed=1), torch.zeros(2, 7, 9, 13)):
        assert grad.eq(0).all()
    upstream = rand(2, 7, 9, 13)
    upstream[:, 2:5] = 0
    upstream[1] = 0
    of_maps, of_affinity = gradients(wk.random_walk, rand(2, 7, 9, 13), rand(2, 34, 9, 13, seed=1), upstream)
    assert of_maps[:, 2:5].eq(0).all() and of_maps[1].eq(0).all() and of_affinity[1].eq(0).all()


def test_gradient_accumulates_over_uses(wk, assert_close):
    maps, affinity = rand(1, 2, 6, 7).requires_grad_(), rand(1, 34, 6, 7).requires_grad_()
    once = torch.autograd.grad(wk.random_walk(maps, affinity, steps=9).sum(), affinity)[0]
    wk.random_walk(maps, affinity, steps=9).sum().backward()
    wk.random_walk(maps, affinity, steps=9).sum().backward()
    assert_close(affinity.grad, 2 * once.double())


@pytest.mark.parametrize("anything", [1e30, math.nan])
def test_what_leads_outside_has_no_gradient(wk, anything):
    inside = wk.local_affinity(torch.zeros(1, 1, 9, 12)) > 0
    leaf = torch.where(inside, rand(1, 34, 9, 12, seed=1), anything).requires_grad_()
    wk.random_walk(rand(1, 3, 9, 12), leaf, steps=20).sum().backward()
    assert leaf.grad[~inside].eq(0).all() and leaf.grad.isfinite().all()


def test_gradient_dtypes(wk, dtype, oracle, assert_close):
    maps, affinity, upstream = (
        rand(1, 3, 9, 13).to(dtype),
        rand(1, 34, 9, 13, seed=1).to(dtype),
        rand(1, 3, 9, 13, seed=2).to(dtype),
    )
    actual = gradients(wk.random_walk, maps, affinity, upstream, steps=20)
    expected = gradients(oracle.dense_walk, maps.double(), affinity.double(), upstream, steps=20)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, 1e-11 if dtype == torch.float64 else None)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 2, 3, 1), (2, 1, 1, 4), (1, 1, 3, 3), (2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("beta, steps", [(1.0, 3), (2.5, 2)])
def test_gradcheck(shape, beta, steps):
    batch, _, height, width = shape
    maps = rand(*shape).double().requires_grad_()
    affinity = (0.2 + 0.7 * rand(batch, 4, height, width, seed=1)).double().requires_grad_()

    def op(x, a):
        return wk.random_walk(x, a, radius=2, beta=beta, steps=steps)

    assert torch.autograd.gradcheck(op, (maps, affinity), atol=1e-7)
    assert torch.autograd.gradgradcheck(op, (maps, affinity), atol=1e-7)
