"""random_walk: values by hand, AffinityNet's dense algorithm, precision, tolerance, gradients, layouts, refusals."""

import math

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference

NATIVE = _dispatch.native is not None

SOLVERS = ("power", "chebyshev", "auto") if NATIVE else ("auto",)  # the reference has one way for all
STEPS = (1, 2, 3, 15, 16, 17, 64, 255, 256, 1000, 5000)


def rand(*shape, seed=0, device="cpu"):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def links(radius):
    return len(wk.neighbour_offsets(radius))


# Values


def test_two_pixels_by_hand(device):
    affinity = torch.zeros(1, 4, 1, 2, device=device)
    affinity[0, 0, 0, 0] = 0.5  # W = 0.25 with beta = 2: P = [[0.8, 0.2], [0.2, 0.8]]
    maps = torch.tensor([[[[1.0, 0.0]], [[3.0, 3.0]]]], device=device)
    out = wk.random_walk(maps, affinity, radius=2, beta=2, steps=1)
    torch.testing.assert_close(out.cpu(), torch.tensor([[[[0.8, 0.2]], [[3.0, 3.0]]]]))
    out = wk.random_walk(maps, affinity, radius=2, beta=2, steps=2)
    torch.testing.assert_close(out.cpu(), torch.tensor([[[[0.68, 0.32]], [[3.0, 3.0]]]]))
    assert torch.equal(wk.random_walk(maps, affinity, radius=2, beta=2, steps=0), maps)


def test_three_pixels_by_hand(wk):
    affinity = torch.zeros(1, 4, 3, 1)
    affinity[0, 2, :, 0] = torch.tensor([1.0, 0.5, 0.9])  # straight down; the last leads outside
    # W = 1, 1/2: degrees 2, 5/2, 3/2
    out = wk.random_walk(torch.tensor([[[[1.0], [2.0], [4.0]]]]), affinity, radius=2, beta=1, steps=1)
    torch.testing.assert_close(out.flatten(), torch.tensor([3 / 2, (1 + 2 + 2) / 2.5, (4 + 1) / 1.5]))


def published_walk(maps, affinity, radius, beta, log_steps):
    """As AffinityNet and IRNet publish it: a dense matrix, columns divided by their sums, squared log_steps times."""
    channels, height, width = maps.shape
    a = torch.eye(height * width, dtype=torch.float64)
    for k, (dy, dx) in enumerate(wk.neighbour_offsets(radius)):
        for y in range(height - dy):
            for x in range(max(0, -dx), width - max(0, dx)):
                i, j = y * width + x, (y + dy) * width + x + dx
                a[i, j] = a[j, i] = affinity[k, y, x]
    t = a**beta
    t = t / t.sum(dim=0, keepdim=True)
    for _ in range(log_steps):
        t = t @ t
    return (maps.double().reshape(channels, -1) @ t).reshape(maps.shape)


@pytest.mark.parametrize("border", ["full", "cropped"])
@pytest.mark.parametrize("solver, tol", [("power", 1e-5), ("chebyshev", 1e-4), ("auto", 1e-4)])
def test_published_algorithm(wk, border, solver, tol, scenes, assert_close):
    feats = scenes.features(1, 16, 14, 19)
    affinity, maps = wk.local_affinity(feats, border=border), scenes.maps(1, 3, 14, 19)
    expected = published_walk(maps[0], affinity[0], 5, 8, log_steps=8)
    assert_close(wk.random_walk(maps, affinity, solver=solver, tol=tol)[0], expected, tol)
    assert_close(reference.random_walk(maps.double(), affinity.double())[0], expected, 1e-11)


def test_isolated_border_nodes_keep_their_value(wk):
    """ "cropped" leaves 10 corner pixels of a 56x56 map without links."""
    affinity, maps = wk.local_affinity(torch.zeros(1, 1, 56, 56), border="cropped"), rand(1, 2, 56, 56)
    corners = [(0, 0), (0, 1), (0, 2), (0, 3)]
    for solver in SOLVERS:
        out = wk.random_walk(maps, affinity, steps=64, solver=solver)
        kept = (out - maps).abs().amax((0, 1)) < 1e-6
        assert kept.sum() == 10
        assert all(kept[corner] for corner in corners)


def test_the_reference_is_the_oracle(oracle, assert_close):
    """Three independent float64 walks agree, so the tests below may use the quickest."""
    for radius, shape in ((1, (3, 4)), (2, (5, 1)), (3, (4, 7)), (5, (6, 9)), (9, (5, 5))):
        maps, affinity = rand(2, 3, *shape).double(), rand(2, links(radius), *shape, seed=1).double()
        for steps in (0, 1, 2, 9):
            arguments = {"radius": radius, "beta": 2.5, "steps": steps}
            expected = reference.random_walk(maps, affinity, **arguments)
            assert_close(oracle.walk(maps, affinity, **arguments), expected)
            assert_close(oracle.dense_walk(maps, affinity, **arguments), expected)


# Precision


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


TOLERANCES = (1e-2, 1e-3, 1e-4, 3e-5, 1e-6, 1e-7)
ROUNDING = 6e-8  # of the float32 that comes out


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


@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 1, 2, 7.5, 8, 10, 63, 64, 65, 64.5, 200.0])
def test_every_beta(wk, beta, oracle, assert_close):
    maps, affinity = rand(1, 3, 9, 17), rand(1, 34, 9, 17, seed=1)
    affinity[affinity < 0.2] = 0  # no link, with beta = 0 too
    assert_close(
        wk.random_walk(maps, affinity, beta=beta, steps=20, solver="power"),
        oracle.walk(maps, affinity, beta=beta, steps=20),
    )


@pytest.mark.parametrize(
    "beta",
    [1e3, 1e30, 1e39],
)
def test_huge_beta_keeps_links_of_exactly_one(wk, beta, oracle, assert_close):
    maps, affinity = rand(1, 3, 9, 17), rand(1, 34, 9, 17, seed=1) * 0.9
    affinity[0, 3] = 1
    assert_close(wk.random_walk(maps, affinity, beta=beta, steps=8), oracle.walk(maps, affinity, beta=beta, steps=8))


@pytest.mark.parametrize("radius", range(1, 17))
def test_every_radius(wk, radius, oracle, assert_close, nan_filled):
    maps, affinity = rand(1, 6, 18, 35), rand(1, links(radius), 18, 35, seed=1)
    for solver in ("power", "chebyshev"):
        out = wk.random_walk(maps, affinity, radius=radius, beta=2, steps=18, solver=solver, tol=1e-5)
        assert_close(out, oracle.walk(maps, affinity, radius, 2, 18))


@pytest.mark.parametrize("width", range(1, 36))
def test_every_width(wk, width, oracle, assert_close, nan_filled):
    """Rows are cut into vector lanes: every remainder, with every group size of maps."""
    for channels, radius in ((1 + width % 6, 5), (1 + width % 11, 3)):
        maps, affinity = rand(2, channels, 7, width), rand(2, links(radius), 7, width, seed=1)
        out = wk.random_walk(maps, affinity, radius=radius, beta=1, steps=5)
        assert_close(out, oracle.walk(maps, affinity, radius, 1, 5))


def test_what_leads_outside_is_ignored(wk, oracle, assert_close):
    """The affinity of pairs that leave the map may hold anything."""
    maps, affinity = rand(1, 3, 9, 12), rand(1, 34, 9, 12, seed=1)
    inside = wk.local_affinity(torch.zeros(1, 1, 9, 12)) > 0
    for anything in (0.0, 1.0, 1e30, math.nan, math.inf):
        out = wk.random_walk(maps, torch.where(inside, affinity, anything), steps=20)
        assert torch.equal(out, wk.random_walk(maps, torch.where(inside, affinity, 0.5), steps=20))


@pytest.mark.parametrize("anything", [1e30, math.nan])
def test_what_leads_outside_has_no_gradient(wk, anything):
    inside = wk.local_affinity(torch.zeros(1, 1, 9, 12)) > 0
    leaf = torch.where(inside, rand(1, 34, 9, 12, seed=1), anything).requires_grad_()
    wk.random_walk(rand(1, 3, 9, 12), leaf, steps=20).sum().backward()
    assert leaf.grad[~inside].eq(0).all() and leaf.grad.isfinite().all()


# Odd numbers


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_in_nothing_out(wk, shape, solver):
    batch, _, height, width = shape
    maps, affinity = torch.zeros(shape, requires_grad=True), torch.zeros(batch, 34, height, width, requires_grad=True)
    for steps in (0, 5, 256):
        out = wk.random_walk(maps, affinity, solver=solver, steps=steps)
        assert out.shape == shape
        gradients = torch.autograd.grad(out.sum(), (maps, affinity), allow_unused=True)
        assert gradients[1] is None or gradients[1].eq(0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 17), (3, 2), (16, 1), (15, 4)])
@pytest.mark.parametrize("radius", [1, 2, 5, 16])
def test_maps_smaller_than_the_radius(wk, size, radius, oracle, assert_close, nan_filled):
    maps = rand(2, 6, *size).requires_grad_()
    affinity = rand(2, links(radius), *size, seed=1).requires_grad_()
    for solver in SOLVERS:
        out = wk.random_walk(maps, affinity, radius=radius, solver=solver, tol=1e-5, steps=40)
        assert_close(out, oracle.walk(maps, affinity, radius, steps=40))
        gradients = torch.autograd.grad(out.sum(), (maps, affinity), allow_unused=True, materialize_grads=True)
        assert all(grad.isfinite().all() for grad in gradients)


def test_zero_and_constant_maps_are_exact(wk, scenes):
    affinity, constants = scenes.edge_affinity(33, 40, 5), torch.tensor([0.0, 0.7, -3e4, 1e-30])
    maps = torch.cat([rand(1, 4, 33, 40), constants.view(1, 4, 1, 1).expand(1, 4, 33, 40)], dim=1)
    for tol in (1e-2, 1e-4):
        assert torch.equal(wk.random_walk(maps, affinity, beta=10, solver="power", tol=tol)[:, 4:], maps[:, 4:])
        for solver in ("chebyshev", "auto"):  # the coefficients' sum is 1 up to rounding
            out = wk.random_walk(maps, affinity, beta=10, solver=solver, tol=tol)
            assert out[:, 4].eq(0).all()
            assert (out[:, 5:] / maps[:, 5:] - 1).abs().max() < 5e-7
    assert wk.random_walk(torch.zeros(2, 3, 5, 6), rand(2, 34, 5, 6)).eq(0).all()
    assert wk.random_walk(-torch.zeros(2, 3, 5, 6), rand(2, 34, 5, 6)).eq(0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", ["power", "chebyshev"])
def test_a_bad_map_harms_no_other(wk, poison, solver):
    maps, affinity = rand(3, 7, 20, 33), rand(3, 34, 20, 33, seed=1)
    clean = wk.random_walk(maps, affinity, solver=solver)
    for y, x in ((0, 0), (10, 16), (19, 32)):
        bad = maps.clone()
        bad[1, 2, y, x] = poison
        out = wk.random_walk(bad, affinity, solver=solver)
        assert not out[1, 2].isfinite().any() or solver == "power"
        assert not out[1, 2, y, x].isfinite()
        out[1, 2] = clean[1, 2]
        assert torch.equal(out, clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ["power", "chebyshev"])
def test_a_bad_affinity_harms_no_other_image(wk, poison, solver):
    maps, affinity = rand(4, 6, 20, 33), rand(4, 34, 20, 33, seed=1)
    clean = wk.random_walk(maps, affinity, solver=solver, steps=40)
    affinity[1, 7, 10, 16] = poison
    affinity.requires_grad_(), maps.requires_grad_()
    out = wk.random_walk(maps, affinity, solver=solver, steps=40)
    assert not out[1].isfinite().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    out.sum().backward()
    for grad in (maps.grad, affinity.grad):
        assert grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("steps", [0, 3])
def test_reference_results_are_contiguous_and_new(steps):
    maps, affinity = rand(2, 3, 7, 5).mT, rand(2, 34, 5, 7)
    for dtype in (torch.float32, torch.float64):
        out = reference.random_walk(maps.to(dtype), affinity.to(dtype), steps=steps)
        assert out.is_contiguous()
        kept = maps.to(dtype).clone()
        out.add_(1)
        assert torch.equal(maps.to(dtype), kept)


def test_reference_of_nothing():
    for shape in ((2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)):
        for radius in (1, 5):
            feats = torch.zeros(shape, dtype=torch.float64)
            affinity = wk.local_affinity(feats, radius)
            assert affinity.shape == (shape[0], links(radius), *shape[2:])
            assert wk.random_walk(feats, affinity, radius=radius, steps=3).shape == shape


def test_all_zero_classes_change_nothing_for_the_others(wk):
    maps, affinity = rand(1, 9, 20, 33), rand(1, 34, 20, 33, seed=1)
    maps[0, [0, 3, 4, 8]] = 0
    for solver in SOLVERS:
        out = wk.random_walk(maps, affinity, solver=solver)
        alone = torch.cat([wk.random_walk(maps[:, c : c + 1], affinity, solver=solver) for c in range(9)], dim=1)
        assert (out - alone).abs().max() < 1e-6
        assert out[0, [0, 3, 4, 8]].eq(0).all()


# Memory


def same(x, y):
    """Bit for bit; the reference's sums follow the strides."""
    return torch.equal(x, y) if NATIVE else torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def contiguous(x):
    return x.resolve_neg().clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("argument", ["maps", "affinity"])
def test_layouts(device, layout, argument):
    maps, affinity = rand(2, 6, 11, 13, device=device), rand(2, 34, 11, 13, seed=1, device=device)
    maps, affinity = (layout(maps), affinity) if argument == "maps" else (maps, layout(affinity))
    for steps in (0, 20):
        out = wk.random_walk(maps, affinity, steps=steps)
        assert out.is_contiguous()
        assert same(out, wk.random_walk(contiguous(maps), contiguous(affinity), steps=steps))


def test_layouts_in_backward(device, layout):
    upstream = layout(rand(2, 6, 11, 13, seed=2, device=device))
    gradients = []
    for grad in (upstream, contiguous(upstream)):
        maps = layout(rand(2, 6, 11, 13, device=device)).detach().requires_grad_()
        affinity = layout(rand(2, 34, 11, 13, seed=1, device=device)).detach().requires_grad_()
        gradients.append(torch.autograd.grad(wk.random_walk(maps, affinity, steps=20), (maps, affinity), grad))
    assert same(gradients[0][0], gradients[1][0]) and same(gradients[0][1], gradients[1][1])


def test_inputs_are_left_alone(device):
    maps = rand(2, 6, 11, 13, device=device).requires_grad_()
    affinity = rand(2, 34, 11, 13, seed=1, device=device).requires_grad_()
    copies = maps.detach().clone(), affinity.detach().clone()
    for steps in (0, 1, 30):
        out = wk.random_walk(maps, affinity, steps=steps)
        with torch.no_grad():
            wk.random_walk(maps, affinity, steps=steps).add_(1)  # a result is never the input itself
        kept = out.detach().clone()
        out.sum().backward()
        assert torch.equal(out, kept)
        assert torch.equal(maps, copies[0]) and torch.equal(affinity, copies[1])


# Gradients


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


# Refusals

BAD = [
    ({"maps": torch.zeros(2, 4, 5)}, ValueError, r"maps must be .*got .*\[2, 4, 5\]"),
    ({"maps": torch.zeros(1, 2, 4, 5, dtype=torch.int32)}, TypeError, "maps must be .*got .*int32"),
    ({"maps": torch.zeros(1, 2, 4, 5, dtype=torch.complex64)}, TypeError, "maps must be .*got .*complex64"),
    ({"maps": "maps"}, TypeError, "maps must be .*got 'maps'"),
    ({"affinity": torch.zeros(34, 4, 5)}, ValueError, r"affinity must be .*got .*\[34, 4, 5\]"),
    ({"affinity": torch.zeros(1, 33, 4, 5)}, ValueError, r"affinity must be .*\[1, 34, 4, 5\].*got .*\[1, 33, 4, 5\]"),
    ({"affinity": torch.zeros(1, 34, 5, 4)}, ValueError, r"affinity must be .*got .*\[1, 34, 5, 4\]"),
    ({"affinity": torch.zeros(2, 34, 4, 5)}, ValueError, r"affinity must be .*got .*\[2, 34, 4, 5\]"),
    ({"affinity": torch.zeros(1, 34, 4, 5).bool()}, TypeError, "affinity must be .*got .*bool"),
    (
        {"affinity": torch.zeros(1, 34, 4, 5, device="meta")},
        ValueError,
        "affinity must be on the device of maps.*got .*meta",
    ),
    ({"affinity": None}, TypeError, "affinity must be .*got None"),
    ({"radius": 4}, ValueError, r"affinity must be .*radius 4.*got .*\[1, 34, 4, 5\]"),
    ({"radius": 99}, ValueError, "radius must be .*got 99"),
    ({"radius": None}, TypeError, "radius must be .*got None"),
    ({"beta": -1}, ValueError, "beta must be .*>= 0.*got -1"),
    ({"beta": math.nan}, ValueError, "beta must be .*got nan"),
    ({"beta": math.inf}, ValueError, "beta must be .*got inf"),
    ({"beta": "8"}, TypeError, "beta must be .*got '8'"),
    ({"beta": 1j}, TypeError, "beta must be .*got 1j"),
    ({"steps": -1}, ValueError, "steps must be .*>= 0.*got -1"),
    ({"steps": 2.0}, TypeError, "steps must be .*got 2.0"),
    ({"steps": "auto"}, TypeError, "steps must be .*got 'auto'"),
    ({"steps": True}, TypeError, "steps must be .*got True"),
    ({"steps": 2**63}, ValueError, "steps must be .*got 9223372036854775808"),
    ({"solver": "lanczos"}, ValueError, "solver must be one of .*'chebyshev'.*got 'lanczos'"),
    ({"solver": None}, TypeError, "solver must be .*got None"),
    ({"tol": 0}, ValueError, "tol must be .*> 0.*got 0"),
    ({"tol": -1e-3}, ValueError, "tol must be .*got -0.001"),
    ({"tol": math.nan}, ValueError, "tol must be .*got nan"),
    ({"tol": None}, TypeError, "tol must be .*got None"),
]


@pytest.mark.parametrize("bad, error, message", BAD)
def test_refusals(bad, error, message):
    with pytest.raises(error, match=message):
        wk.random_walk(**{"maps": torch.zeros(1, 2, 4, 5), "affinity": torch.zeros(1, 34, 4, 5)} | bad)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        wk.random_walk(torch.zeros(1, 2, 4, 5), torch.zeros(1, 34, 4, 5), 5)
