"""boundary_affinity: paths, values by hand, against float64, gradients and ties, borders, layouts, refusals."""

import functools
import math

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference
from wsss_kernels.neighbours import neighbour_path

NATIVE = _dispatch.native is not None
SHAPES = [
    (1, 1, 1, 1), (2, 1, 1, 7), (1, 1, 9, 1), (2, 1, 3, 4), (1, 1, 17, 16), (1, 1, 18, 130), (1, 1, 6, 257),
    (3, 1, 5, 15), (1, 1, 41, 64), (0, 1, 4, 5), (2, 1, 0, 5), (2, 1, 4, 0),
]  # fmt: skip


def rand(*shape, seed=0, device="cpu"):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@functools.lru_cache
def published_paths(radius):
    """IRNet's index of paths once more: the search over the half disc, offsets grouped by the length of their path."""
    directions = [(0, x) for x in range(1, radius)]
    for y in range(1, radius):
        directions += [(y, x) for x in range(1 - radius, radius) if x * x + y * y < radius**2]
    by_length = {}
    for to_y, to_x in directions:
        low_y, high_y = sorted((0, to_y))
        low_x, high_x = sorted((0, to_x))
        path = []
        for y in range(low_y, high_y + 1):
            for x in range(low_x, high_x + 1):
                distance = (to_y * x - to_x * y) ** 2 / (to_y**2 + to_x**2)
                if distance < 1:
                    path.append([y, x])
        path.sort(key=lambda point: -abs(point[0]) - abs(point[1]))
        by_length.setdefault(len(path), []).append(path)
    return by_length


@functools.lru_cache
def path_pixels(height, width, radius):
    """Of every neighbour, in row-major order: pixel indices [L, H, W] along its path, and where it is in the map."""
    paths = {tuple(path[0]): path for group in published_paths(radius).values() for path in group}
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    found = []
    for offset in sorted(paths):
        dy, dx = torch.tensor(paths[offset])[:, :, None, None].unbind(1)
        pixels = (y + dy).clamp(max=max(height - 1, 0)) * width + (x + dx).clamp(0, max(width - 1, 0))
        found.append((pixels, (y + offset[0] < height) & (x + offset[1] >= 0) & (x + offset[1] < width)))
    return found


def oracle(boundary, radius=5):
    """Gather every path, then its maximum; the gradient goes to the first. [B, 1, H, W] float64 -> [B, K, H, W]."""
    batch, _, height, width = boundary.shape
    planes = []
    for pixels, exists in path_pixels(height, width, radius):
        values = boundary.reshape(batch, height * width)[:, pixels]  # [B, L, H, W]
        first = values.argmax(dim=1, keepdim=True) if values.numel() else values[:, :1].long()
        planes.append((1 - values.gather(1, first)[:, 0]) * exists)
    return torch.stack(planes, 1) if planes else boundary[:, :0]


# Paths


def test_path_lists():
    assert {length: len(paths) for length, paths in published_paths(5).items()} == {
        2: 2, 3: 2, 4: 4, 5: 2, 6: 4, 7: 2, 8: 8, 10: 6, 11: 4
    }  # fmt: skip
    for radius, points in ((5, 242), (10, 2134)):
        paths = [path for group in published_paths(radius).values() for path in group]
        assert sum(map(len, paths)) == points
        ours = [neighbour_path(offset) for offset in wk.neighbour_offsets(radius)]
        assert sorted(map(list, ours)) == sorted([tuple(point) for point in path] for path in paths)
        for path, offset in zip(ours, wk.neighbour_offsets(radius), strict=True):
            assert path[0] == offset and path[-1] == (0, 0)


def test_paths_by_hand():
    assert neighbour_path((0, 3)) == [(0, 3), (0, 2), (0, 1), (0, 0)]
    assert neighbour_path((1, 1)) == [(1, 1), (0, 1), (1, 0), (0, 0)]
    assert neighbour_path((1, -2)) == [(1, -2), (0, -2), (1, -1), (0, -1), (1, 0), (0, 0)]


# Values


def test_a_wall_by_hand(device):
    boundary = torch.tensor([[[[0.1, 0.9, 0.2, 0.0]]]], device=device)
    affinity = wk.boundary_affinity(boundary, 3)[0, :2, 0].cpu()  # neighbours one and two columns to the right
    torch.testing.assert_close(affinity, torch.tensor([[0.1, 0.1, 0.8, 0.0], [0.1, 0.1, 0.0, 0.0]]))


def test_nothing_slips_through_a_diagonal(device):
    boundary = torch.eye(6, device=device)[None, None]
    affinity = wk.boundary_affinity(boundary, 3)
    side = torch.arange(6)[:, None] - torch.arange(6)
    for k, (dy, dx) in enumerate(wk.neighbour_offsets(3)):
        here, there = side[: 6 - dy, max(0, -dx) : 6 - max(0, dx)], side[dy:, max(0, dx) : 6 + min(0, dx)]
        plane = affinity[0, k, : 6 - dy, max(0, -dx) : 6 - max(0, dx)].cpu()
        assert plane[here * there <= 0].eq(0).all()


@pytest.mark.parametrize("radius", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(wk, shape, radius, assert_close, nan_filled):
    boundary = rand(*shape)
    expected = oracle(boundary.double(), radius)
    assert_close(wk.boundary_affinity(boundary, radius), expected)
    assert torch.equal(wk.boundary_affinity(boundary.double(), radius), expected)
    assert_close(reference.boundary_affinity(boundary, radius), expected)


@pytest.mark.native
@pytest.mark.parametrize("width", [144, 143])
def test_a_result_larger_than_a_cache(width, assert_close, nan_filled):
    boundary = rand(1, 1, 101, width)  # 8.4 MiB, which is written past the caches where rows begin on a cache line
    assert_close(wk.boundary_affinity(boundary, 10), reference.boundary_affinity(boundary.double(), 10))


@pytest.mark.parametrize("radius", range(1, 17))
def test_every_radius(wk, radius, assert_close, nan_filled):
    for size in ((19, 37), (3, 5)):
        boundary = rand(1, 1, *size)
        exact = boundary.double().requires_grad_()
        expected = oracle(exact, radius)
        assert_close(wk.boundary_affinity(boundary, radius), expected)
        if expected.shape[1]:
            upstream = rand(*expected.shape, seed=1)
            wanted = torch.autograd.grad(expected, exact, upstream.double())[0]
            assert_close(gradient(wk.boundary_affinity, boundary, upstream, radius), wanted)


def test_dtypes(dtype, device, assert_close):
    boundary = rand(2, 1, 11, 18).to(dtype).to(device)
    out = wk.boundary_affinity(boundary)
    assert out.dtype == dtype and out.device.type == device.type and out.is_contiguous()
    assert_close(out, oracle(boundary.cpu().double()))


def test_values_outside_the_range_are_taken_as_they_are(wk, assert_close):
    boundary = 1e3 * rand(1, 1, 9, 17) - 500
    assert_close(wk.boundary_affinity(boundary), oracle(boundary.double()))
    infinite = boundary.where(boundary < 400, math.inf).where(boundary > -400, -math.inf)
    out = wk.boundary_affinity(infinite)
    assert torch.equal(out, torch.where(oracle(torch.zeros(1, 1, 9, 17)) > 0, reference.boundary_affinity(infinite), 0))


@pytest.mark.parametrize("radius", [2, 5])
def test_nan_stays_with_the_paths_through_it(wk, radius):
    boundary = rand(2, 1, 13, 21)
    clean = wk.boundary_affinity(boundary, radius)
    boundary[0, 0, 6, 9] = math.nan
    out = wk.boundary_affinity(boundary, radius)
    through = torch.zeros(len(wk.neighbour_offsets(radius)), 13, 21, dtype=torch.bool)
    for k, offset in enumerate(wk.neighbour_offsets(radius)):
        for dy, dx in neighbour_path(offset):
            through[k, 6 - dy, 9 - dx] = 6 - dy + offset[0] < 13
    assert torch.equal(out[0].isnan(), through)
    assert torch.equal(out[0][~through], clean[0][~through]) and torch.equal(out[1], clean[1])
    upstream = rand(*out.shape, seed=1)
    assert torch.allclose(
        gradient(wk.boundary_affinity, boundary, upstream, radius),
        gradient(reference.boundary_affinity, boundary.double(), upstream, radius).float(),
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(0, 1, 4, 5), (2, 1, 0, 5), (2, 1, 4, 0)], ids=str)
def test_nothing_in_nothing_out(wk, shape):
    boundary = torch.zeros(shape, requires_grad=True)
    out = wk.boundary_affinity(boundary)
    assert out.shape == (shape[0], 34, *shape[2:])
    out.sum().backward()
    assert boundary.grad.shape == shape


def test_radius_one_has_no_neighbours(wk):
    for dtype in (torch.float32, torch.float64):
        boundary = rand(2, 1, 4, 5).to(dtype).requires_grad_()
        out = wk.boundary_affinity(boundary, 1)
        assert out.shape == (2, 0, 4, 5)
        assert torch.autograd.grad(out.sum(), boundary)[0].eq(0).all()


# Gradients


def gradient(op, boundary, upstream, radius=5):
    leaf = boundary.clone().requires_grad_()
    op(leaf, radius).backward(upstream.to(boundary.dtype))
    return leaf.grad


@pytest.mark.parametrize("levels", [0, 1, 2, 4], ids=["distinct", "constant", "two values", "four values"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape)], ids=str)
def test_gradient(wk, shape, levels, assert_close, nan_filled):
    """Few values: nearly every path has equal maxima, and the first in its order takes the gradient."""
    boundary = rand(*shape)
    if levels:
        boundary = (boundary * levels).floor() / levels
    for radius in (2, 5, 10):
        upstream = rand(shape[0], len(wk.neighbour_offsets(radius)), *shape[2:], seed=1) - 0.5
        expected = gradient(oracle, boundary.double(), upstream, radius)
        assert_close(gradient(wk.boundary_affinity, boundary, upstream, radius), expected)
        assert_close(gradient(reference.boundary_affinity, boundary.double(), upstream, radius), expected, 1e-12)


def test_ties_by_hand(wk):
    """Nearest the neighbour first, then row-major."""
    for dtype in (torch.float32, torch.float64):
        flat = torch.full((1, 1, 2, 2), 0.5, dtype=dtype)
        upstream = torch.zeros(1, 4, 2, 2)
        upstream[0, 3, 0, 0] = 1  # (0, 0) -> (1, 1)
        assert gradient(wk.boundary_affinity, flat, upstream, 2).tolist() == [[[[0, 0], [0, -1]]]]
        lower = torch.tensor([[[[0.5, 0.5], [0.5, 0.1]]]], dtype=dtype)
        assert gradient(wk.boundary_affinity, lower, upstream, 2).tolist() == [[[[0, -1], [0, 0]]]]
        lowest = torch.tensor([[[[0.5, 0.1], [0.1, 0.1]]]], dtype=dtype)
        assert gradient(wk.boundary_affinity, lowest, upstream, 2).tolist() == [[[[-1, 0], [0, 0]]]]
        down_left = torch.zeros(1, 4, 2, 2)
        down_left[0, 1, 0, 1] = 1  # (0, 1) -> (1, 0): equal are (0, 0), (1, 1) next to the end, row-major
        lower = torch.tensor([[[[0.5, 0.5], [0.1, 0.5]]]], dtype=dtype)
        assert gradient(wk.boundary_affinity, lower, down_left, 2).tolist() == [[[[-1, 0], [0, 0]]]]


def test_zero_and_minus_zero_are_equal(wk):
    boundary = torch.tensor([[[[0.0, -0.0, 0.0, -0.0]]]])
    upstream = torch.ones(1, 12, 1, 4)
    assert gradient(wk.boundary_affinity, boundary, upstream, 3).tolist() == [[[[0, -1, -2, -2]]]]


def test_subnormal_values_are_told_apart(wk):
    boundary = torch.tensor([[[[2e-42, 1e-42, 0.0]]]])
    upstream = torch.ones(1, 12, 1, 3)
    assert gradient(wk.boundary_affinity, boundary, upstream, 3).tolist() == [[[[-2, -1, 0]]]]


def test_a_constant_gives_all_to_the_neighbour(wk):
    upstream = rand(1, 34, 9, 20)
    upstream = upstream * (reference.boundary_affinity(torch.zeros(1, 1, 9, 20)) > 0)
    grad = gradient(wk.boundary_affinity, torch.full((1, 1, 9, 20), 0.3), upstream)
    expected = torch.zeros(9, 20)
    for k, (dy, dx) in enumerate(wk.neighbour_offsets()):
        expected -= torch.roll(upstream[0, k], (dy, dx), (0, 1))  # no pair leads outside, so nothing wraps
    torch.testing.assert_close(grad[0, 0], expected)


@pytest.mark.parametrize("size", [(3, 4), (1, 6), (5, 2), (1, 1)], ids=str)
def test_gradcheck(size):
    height, width = size
    distinct = torch.randperm(height * width, generator=torch.Generator().manual_seed(0)).double() / (height * width)
    boundary = distinct.view(1, 1, height, width).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: wk.boundary_affinity(x, 3), boundary)
    assert torch.autograd.gradgradcheck(lambda x: wk.boundary_affinity(x, 2).square(), boundary, fast_mode=True)


def test_gradient_dtypes(wk, dtype, assert_close):
    boundary, upstream = rand(1, 1, 11, 18).to(dtype), rand(1, 34, 11, 18, seed=1).to(dtype)
    grad = gradient(wk.boundary_affinity, boundary, upstream)
    assert grad.dtype == dtype
    assert_close(grad, gradient(oracle, boundary.double(), upstream), 1e-12 if dtype == torch.float64 else None)


def test_what_lies_outside_the_map_has_no_gradient(wk):
    boundary, upstream = rand(1, 1, 9, 18), rand(1, 34, 9, 18, seed=1)
    exists = reference.boundary_affinity(torch.zeros(1, 1, 9, 18)) > 0
    clean = gradient(wk.boundary_affinity, boundary, upstream)
    assert torch.equal(gradient(wk.boundary_affinity, boundary, upstream.where(exists, math.nan)), clean)


@pytest.mark.native
def test_same_bits_for_any_number_of_threads():
    boundary, upstream = rand(2, 1, 75, 133), rand(2, 152, 75, 133, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = wk.boundary_affinity(boundary, 10)
            results.append((out, gradient(wk.boundary_affinity, boundary, upstream, 10)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


# Memory


def test_layouts(device, layout):
    boundary = layout(rand(2, 1, 11, 13, device=device))
    plain = boundary.clone(memory_format=torch.contiguous_format).resolve_neg()
    out = wk.boundary_affinity(boundary)
    assert out.is_contiguous()
    assert torch.equal(out, wk.boundary_affinity(plain))


def test_layout_of_grad(device, layout):
    boundary = rand(2, 1, 11, 13, device=device)
    upstream = layout(rand(2, 34, 11, 13, device=device))
    plain = upstream.clone(memory_format=torch.contiguous_format).resolve_neg()
    assert torch.equal(
        gradient(wk.boundary_affinity, boundary, upstream), gradient(wk.boundary_affinity, boundary, plain)
    )


def test_inputs_are_left_alone(device):
    boundary = rand(2, 1, 11, 13, device=device).requires_grad_()
    before = boundary.detach().clone()
    out = wk.boundary_affinity(boundary)
    kept = out.detach().clone()
    out.sum().backward()
    assert torch.equal(boundary, before) and torch.equal(out, kept)


# Refusals


@pytest.mark.parametrize(
    "boundary, error, message",
    [
        ([[1.0]], TypeError, r"boundary must be a floating point tensor \[B, 1, H, W\]"),
        (torch.zeros(1, 1, 4, 5, dtype=torch.int64), TypeError, "boundary must be a floating point"),
        (torch.zeros(1, 1, 4, 5, dtype=torch.bool), TypeError, "boundary must be a floating point"),
        (torch.zeros(1, 1, 4, 5, dtype=torch.complex64), TypeError, "boundary must be a floating point"),
        (torch.zeros(1, 4, 5), ValueError, r"boundary must be .*\[B, 1, H, W\].*shape \[1, 4, 5\]"),
        (torch.zeros(4, 5), ValueError, "boundary must be"),
        (torch.zeros(1, 0, 4, 5), ValueError, "boundary must have exactly one channel"),
        (torch.zeros(1, 3, 4, 5), ValueError, "boundary must have exactly one channel"),
    ],
)
def test_bad_boundaries(boundary, error, message):
    with pytest.raises(error, match=message):
        wk.boundary_affinity(boundary)


@pytest.mark.parametrize(
    "radius, error",
    [(0, ValueError), (-1, ValueError), (17, ValueError), (10**20, ValueError), (5.0, TypeError), ("5", TypeError),
     (True, TypeError), (None, TypeError), (torch.tensor(5), TypeError)],
)  # fmt: skip
def test_bad_radius(radius, error):
    with pytest.raises(error, match=r"radius must be an int in 1\.\.16"):
        wk.boundary_affinity(torch.zeros(1, 1, 4, 5), radius)
