"""random_walk: values by hand, AffinityNet's dense algorithm, options, odd numbers, layouts, refusals."""

import math

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference

NATIVE = _dispatch.native is not None

SOLVERS = ("power", "chebyshev", "auto") if NATIVE else ("auto",)  # the reference has one way for all


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
