"""The Triton kernels of random_walk, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.neighbours import neighbour_count
from wsss_kernels.triton import launch
from wsss_kernels.triton.random_walk import random_walk, random_walk_backward

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
]


def uniform(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def inputs(batch, channels, height, width, radius, dtype=torch.float32):
    maps = uniform(batch, channels, height, width, dtype=dtype) - 0.3
    return maps, uniform(batch, neighbour_count(radius), height, width, dtype=dtype, seed=1) ** 0.25


def exact(maps, affinity, radius, beta, steps):
    return reference.random_walk(maps.double(), affinity.double(), radius=radius, beta=beta, steps=steps)


def exact_gradients(grad, maps, affinity, radius, beta, steps):
    maps, affinity = maps.double().requires_grad_(), affinity.double().requires_grad_()
    return torch.autograd.grad(exact(maps, affinity, radius, beta, steps), (maps, affinity), grad.double())


@pytest.fixture(params=["side_by_side", "in_turn"])
def configuration(request, monkeypatch):
    """Neighbours side by side, as for small maps, or one after the other."""
    monkeypatch.setattr(launch, "_FEW_PROGRAMS", 1 << 30 if request.param == "side_by_side" else 0)


CASES = [  # shape, radius, beta, steps, solver, tol
    ((1, 2, 3, 4), 1, 8.0, 5, "auto", 1e-4),
    ((2, 1, 5, 6), 2, 8.0, 7, "auto", 1e-4),
    ((1, 5, 5, 7), 2, 2.5, 2, "power", 1e-4),  # two groups of maps
    ((1, 3, 13, 11), 3, 8.0, 7, "power", 1e-4),  # two tiles of 128 pixels
    ((1, 2, 5, 6), 4, 10.0, 64, "auto", 1e-4),
    ((1, 1, 2, 3), 5, 0.3, 1, "auto", 1e-4),
    ((1, 2, 6, 9), 5, 0.0, 7, "chebyshev", 1e-4),
    ((1, 2, 8, 9), 7, 40.5, 2, "chebyshev", 1e-3),
    ((1, 2, 1, 1), 3, 8.0, 3, "auto", 1e-4),
]


@pytest.mark.usefixtures("configuration")
@pytest.mark.parametrize(("shape", "radius", "beta", "steps", "solver", "tol"), CASES)
def test_like_the_reference(assert_close, shape, radius, beta, steps, solver, tol):
    maps, affinity = inputs(*shape, radius)
    result = random_walk(maps, affinity, radius, beta, steps, solver, tol)
    assert result.is_contiguous() and result.dtype == maps.dtype
    assert_close(result, exact(maps, affinity, radius, beta, steps), 1e-5 if solver == "power" or steps < 8 else tol)


@pytest.mark.parametrize(("shape", "radius", "beta", "steps", "solver", "tol"), CASES[1:-1])
def test_gradients_like_the_reference(assert_close, shape, radius, beta, steps, solver, tol):
    maps, affinity = inputs(*shape, radius)
    grad = uniform(*shape, seed=2) - 0.4
    arguments = (radius, beta, steps, solver, tol)
    grad_maps, grad_affinity = random_walk_backward(grad, maps, affinity, *arguments, True, True)
    exact_maps, exact_affinity = exact_gradients(grad, maps, affinity, radius, beta, steps)
    assert_close(grad_maps, exact_maps, 1e-5 if steps < 8 else tol)
    assert_close(grad_affinity, exact_affinity, 1e-5 if steps < 8 else tol)


@pytest.mark.usefixtures("configuration")
@pytest.mark.parametrize(("steps", "solver"), [(7, "power"), (32, "chebyshev")])
def test_in_float64_where_tol_asks_for_it(assert_close, steps, solver):
    """The error is that of rounding the result alone: a walk in float32 would leave more."""
    maps, affinity = inputs(1, 2, 5, 6, 3)
    result = random_walk(maps, affinity, 3, 0.3, steps, solver, 1e-9)
    assert_close(result, exact(maps, affinity, 3, 0.3, steps), 6e-8)


def test_gradients_in_float64_where_tol_asks_for_it(assert_close):
    maps, affinity = inputs(1, 2, 5, 6, 3)
    grad = uniform(*maps.shape, seed=2) - 0.4
    gradients = random_walk_backward(grad, maps, affinity, 3, 0.3, 16, "auto", 1e-9, True, True)
    for gradient, reference_gradient in zip(gradients, exact_gradients(grad, maps, affinity, 3, 0.3, 16), strict=True):
        assert_close(gradient, reference_gradient, 6e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tol", [1e-4, 1e-9])
def test_half_precision(assert_close, dtype, tol):
    maps, affinity = inputs(1, 2, 5, 6, 3, dtype=dtype)
    assert_close(random_walk(maps, affinity, 3, 8.0, 7, "auto", tol), exact(maps, affinity, 3, 8.0, 7))
    grad = (uniform(*maps.shape, seed=2) - 0.4).to(dtype)
    gradients = random_walk_backward(grad, maps, affinity, 3, 8.0, 7, "auto", tol, True, True)
    for gradient, reference_gradient in zip(gradients, exact_gradients(grad, maps, affinity, 3, 8.0, 7), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, reference_gradient)


def test_affinity_of_another_dtype(assert_close):
    maps, affinity = inputs(1, 2, 5, 6, 3)
    affinity = affinity.half()
    result = random_walk(maps, affinity, 3, 8.0, 2, "auto", 1e-4)
    assert result.dtype == torch.float32
    assert_close(result, exact(maps, affinity, 3, 8.0, 2))
    gradients = random_walk_backward(maps, maps, affinity, 3, 8.0, 2, "auto", 1e-4, True, True)
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float16]


def test_no_steps():
    maps, affinity = inputs(1, 2, 5, 6, 3)
    result = random_walk(maps, affinity, 3, 8.0, 0, "auto", 1e-4)
    assert torch.equal(result, maps) and result.data_ptr() != maps.data_ptr()
    grad_maps, grad_affinity = random_walk_backward(maps, maps, affinity, 3, 8.0, 0, "auto", 1e-4, True, True)
    assert torch.equal(grad_maps, maps) and torch.equal(grad_affinity, torch.zeros_like(affinity))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)])
def test_empty(shape):
    maps, affinity = inputs(*shape, 3)
    assert random_walk(maps, affinity, 3, 8.0, 7, "auto", 1e-4).shape == shape
    grad_maps, grad_affinity = random_walk_backward(maps, maps, affinity, 3, 8.0, 7, "auto", 1e-4, True, True)
    assert grad_maps.shape == shape and torch.equal(grad_affinity, torch.zeros_like(affinity))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_wanted(wanted):
    maps, affinity = inputs(1, 2, 4, 5, 3)
    both = random_walk_backward(maps, maps, affinity, 3, 8.0, 3, "auto", 1e-4, True, True)
    some = random_walk_backward(maps, maps, affinity, 3, 8.0, 3, "auto", 1e-4, *wanted)
    for gradient, full, want in zip(some, both, wanted, strict=True):
        assert torch.equal(gradient, full) if want else gradient.shape == (0,)


@pytest.mark.usefixtures("configuration")
@pytest.mark.parametrize("solver", ["power", "chebyshev"])
def test_absent_maps(solver):
    """What is left out changes no other map, is zero, and stays so beside an affinity that is NaN."""
    maps, affinity = inputs(2, 9, 4, 5, 2)
    maps[0, [0, 1, 2, 5, 8]] = 0
    maps[0, 3] = 0
    maps[0, 3, 2, 2] = float("nan")
    maps[1] = 0
    affinity[1, 1, 1, 1] = float("nan")
    result = random_walk(maps, affinity, 2, 8.0, 9, solver, 1e-4)
    for channel in range(9):
        alone = random_walk(maps[:1, channel : channel + 1], affinity[:1], 2, 8.0, 9, solver, 1e-4)
        torch.testing.assert_close(result[0, channel], alone[0, 0], rtol=0, atol=2e-7, equal_nan=True)
    assert result[0, [0, 1, 2, 5, 8]].eq(0).all() and result[0, 3].isnan().any() and result[1].eq(0).all()
    grad_maps, grad_affinity = random_walk_backward(maps, maps, affinity, 2, 8.0, 3, solver, 1e-4, True, True)
    assert grad_maps[0, [0, 1, 2, 5, 8]].eq(0).all() and grad_maps[1].eq(0).all() and grad_affinity[1].eq(0).all()


@pytest.mark.usefixtures("configuration")
def test_nan_stays_in_its_map_and_image():
    maps, affinity = inputs(2, 3, 6, 7, 3)
    clean = random_walk(maps, affinity, 3, 8.0, 2, "power", 1e-4)
    maps[0, 1, 0, 0] = float("nan")
    result = random_walk(maps, affinity, 3, 8.0, 2, "power", 1e-4)
    assert torch.equal(result[0, 1].isnan(), exact(maps, affinity, 3, 8.0, 2)[0, 1].isnan())
    assert not result[0, 1].isnan().all()
    assert torch.equal(result[0, [0, 2]], clean[0, [0, 2]]) and torch.equal(result[1], clean[1])


@pytest.mark.usefixtures("configuration")
def test_what_lies_outside_the_map_is_not_read(assert_close):
    maps, affinity = inputs(1, 2, 5, 6, 3)
    exists = reference.local_affinity(torch.zeros(1, 1, 5, 6), 3) > 0
    outside = torch.where(exists, affinity, float("nan"))
    arguments = (3, 8.0, 3, "auto", 1e-4)
    assert torch.equal(random_walk(maps, outside, *arguments), random_walk(maps, affinity, *arguments))
    gradients = random_walk_backward(maps, maps, outside, *arguments, True, True)
    for gradient, clean in zip(
        gradients, random_walk_backward(maps, maps, affinity, *arguments, True, True), strict=True
    ):
        assert torch.equal(gradient, clean)


def test_no_link():
    """Affinities <= 0 are none, whatever beta: a pixel without links keeps its value, and no gradient reaches them."""
    maps, affinity = inputs(1, 1, 4, 5, 2)
    affinity[:] = -affinity
    for beta in (0.0, 0.5, 8.0, 1e300):
        assert torch.equal(random_walk(maps, affinity, 2, beta, 2, "power", 1e-4), maps)
        _, gradient = random_walk_backward(maps, maps, affinity, 2, beta, 2, "auto", 1e-4, True, True)
        assert torch.equal(gradient, torch.zeros_like(affinity))


def test_infinite_beta(assert_close):
    maps, affinity = inputs(1, 1, 4, 5, 2)
    affinity[:, :2] = 1
    result = random_walk(maps, affinity, 2, 1e300, 3, "power", 1e-4)
    assert_close(result, exact(maps, (affinity == 1).float(), 2, 1.0, 3))


@pytest.mark.usefixtures("configuration")
def test_constant_map_stays_what_it_is():
    _, affinity = inputs(1, 1, 6, 7, 3)
    constant = torch.full((1, 1, 6, 7), 0.7)
    assert torch.equal(random_walk(constant, affinity, 3, 8.0, 9, "power", 1e-4), constant)


def test_memory_formats(layout):
    maps, affinity = layout(uniform(2, 4, 3, 4)), layout(uniform(2, 4, 3, 4, seed=1))  # K of radius 2 is 4
    plain = [x.clone().resolve_neg().contiguous() for x in (maps, affinity)]
    arguments = (2, 8.0, 2, "auto", 1e-4)
    assert torch.equal(random_walk(maps, affinity, *arguments), random_walk(*plain, *arguments))
    gradients = random_walk_backward(maps, maps, affinity, *arguments, True, True)
    for gradient, expected in zip(
        gradients, random_walk_backward(plain[0], *plain, *arguments, True, True), strict=True
    ):
        assert torch.equal(gradient, expected)


def test_launch_grows_with_the_batch_on_the_first_axis(monkeypatch):
    """The other axes of a grid end at 65,535."""
    grids = []
    monkeypatch.setattr(launch, "launch", lambda function, programs, *_, **__: grids.append(programs))
    batch = 70_000
    random_walk(torch.empty(batch, 1, 2, 2, device="meta"), torch.empty(batch, 1, 2, 2, device="meta"), 2, 8.0, 1,
                "power", 1e-4)  # fmt: skip
    assert all(isinstance(programs, int) for programs in grids) and max(grids) >= batch
