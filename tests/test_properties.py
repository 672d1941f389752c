"""What holds for every input: hypothesis draws shapes, values and options."""

from typing import NamedTuple

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import wsss_kernels as wk


class Walk(NamedTuple):
    maps: Tensor
    affinity: Tensor
    options: dict  # radius, beta, steps, solver


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SEEDS = st.integers(0, 2**31 - 1)
SIDES = st.integers(1, 24)


@st.composite
def walks(draw, max_steps=64, solvers=("power", "chebyshev", "auto")) -> Walk:
    batch, channels, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(SIDES), draw(SIDES)
    options = {
        "radius": draw(st.sampled_from([1, 2, 3, 5, 5, 5, 8])),
        "beta": draw(st.sampled_from([0.5, 1.0, 2.0, 8.0, 10.0, 3.7])),
        "steps": draw(st.integers(0, max_steps)),
        "solver": draw(st.sampled_from(solvers)),
    }
    random = generator(draw(SEEDS))
    maps = torch.rand(batch, channels, height, width, generator=random)
    affinity = torch.rand(batch, len(wk.neighbour_offsets(options["radius"])), height, width, generator=random)
    affinity[affinity < draw(st.sampled_from([0.0, 0.3, 0.9]))] = 0
    if draw(st.booleans()):
        maps = maps.round()
    return Walk(maps, affinity, options)


@st.composite
def features(draw, max_dim=12) -> Tensor:
    shape = draw(st.integers(1, 3)), draw(st.integers(1, max_dim)), draw(SIDES), draw(SIDES)
    return torch.randn(shape, generator=generator(draw(SEEDS)))


radii = st.sampled_from([1, 2, 3, 5, 5, 8])
variants = st.sampled_from(
    [{"metric": metric, "scale": scale, "border": border}
     for metric in ("l1", "cosine") for scale in (1.0, "auto") for border in ("full", "cropped")]
)  # fmt: skip


def run(wk, walk: Walk, **changed) -> Tensor:
    return wk.random_walk(walk.maps, walk.affinity, **walk.options | changed)


def close(actual: Tensor, expected: Tensor, tol: float = 1e-5) -> bool:
    assert actual.shape == expected.shape
    return not actual.numel() or bool((actual - expected).abs().max() <= tol * expected.abs().max().clamp_min(1e-30))


def tolerance(walk: Walk) -> float:
    return 1e-5 if walk.options["solver"] == "power" else 2e-4


def flipped(affinity: Tensor, radius: int, axis: str) -> Tensor:
    """The affinity of the mirrored image: pair (p, p + offset) is found at its other end, or under another offset."""
    offsets = wk.neighbour_offsets(radius)
    out = torch.zeros_like(affinity)
    height, width = affinity.shape[-2:]
    for k, (dy, dx) in enumerate(offsets):
        mirrored = affinity[:, k].flip(-1 if axis == "x" else -2)
        # mirrored along x, source p becomes the source of offset (dy, -dx); along y, of (-dy, dx)
        to = (dy, -dx) if axis == "x" else (-dy, dx)
        if to in offsets:
            out[:, offsets.index(to)] = mirrored
        else:  # the other half plane: the pair belongs to the pixel at p + to
            j = offsets.index((-to[0], -to[1]))
            ys = torch.arange(height)[:, None] - to[0]
            xs = torch.arange(width)[None] - to[1]
            inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
            out[:, j] = torch.where(inside, mirrored[:, ys.clamp(0, height - 1), xs.clamp(0, width - 1)], 0.0)
    return out


# The walk


@given(walks())
def test_mass_is_conserved_weighted_by_degree(wk, walk):
    """D^-1 W leaves sum_i d_i x_i as it is."""
    offsets, weights = wk.neighbour_offsets(walk.options["radius"]), walk.affinity.double() ** walk.options["beta"]
    height, width = walk.maps.shape[-2:]
    degree = torch.ones(walk.maps.shape[0], height, width, dtype=torch.float64)
    for k, (dy, dx) in enumerate(offsets):
        here = (slice(None), slice(0, max(0, height - dy)), slice(max(0, -dx), max(0, -dx, width - max(0, dx))))
        there = (slice(None), slice(dy, max(dy, height)), slice(max(0, dx), max(0, dx, width + min(0, dx))))
        if walk.affinity[:, k][here].numel():
            link = torch.where(walk.affinity[:, k] > 0, weights[:, k], 0.0)[here]
            degree[here] += link
            degree[there] += link
    before = (degree[:, None] * walk.maps).sum((2, 3))
    after = (degree[:, None] * run(wk, walk)).sum((2, 3))
    largest = degree.sum((1, 2))[:, None] * walk.maps.amax((2, 3))
    assert ((after - before).abs() <= tolerance(walk) * largest + 1e-12).all()


@given(walks())
def test_range_of_the_walk(wk, walk):
    out, slack = run(wk, walk), tolerance(walk) if walk.options["solver"] != "power" else 1e-6
    assert (out <= walk.maps.amax((2, 3), keepdim=True) + slack).all()
    assert (out >= walk.maps.amin((2, 3), keepdim=True) - slack).all()


@given(walks(), st.randoms(use_true_random=False))
def test_order_of_classes_does_not_matter(wk, walk, random):
    order = list(range(walk.maps.shape[1]))
    random.shuffle(order)
    permuted = wk.random_walk(walk.maps[:, order], walk.affinity, **walk.options)
    assert close(permuted, run(wk, walk)[:, order], 1e-6)


@given(walks(), st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter(wk, walk, random):
    order = list(range(walk.maps.shape[0]))
    random.shuffle(order)
    permuted = wk.random_walk(walk.maps[order], walk.affinity[order], **walk.options)
    assert torch.equal(permuted, run(wk, walk)[order])


@given(walks())
def test_a_batch_is_its_images(wk, same, walk):
    alone = [wk.random_walk(m[None], a[None], **walk.options) for m, a in zip(walk.maps, walk.affinity, strict=True)]
    assert same(torch.cat(alone), run(wk, walk), tolerance(walk))


@given(walks(), st.sampled_from("xy"))
def test_the_walk_commutes_with_flips(wk, walk, axis):
    dim = -1 if axis == "x" else -2
    mirrored = flipped(walk.affinity, walk.options["radius"], axis)
    assert close(
        wk.random_walk(walk.maps.flip(dim), mirrored, **walk.options), run(wk, walk).flip(dim), tolerance(walk)
    )


@given(walks(), st.floats(-3, 3), st.floats(-3, 3))
def test_the_walk_is_linear(wk, walk, a, b):
    x, y = walk.maps, walk.maps.flip(1) ** 2
    mixed = wk.random_walk(a * x + b * y, walk.affinity, **walk.options)
    apart = a * run(wk, walk) + b * wk.random_walk(y, walk.affinity, **walk.options)
    assert (mixed - apart).abs().max() <= 3 * tolerance(walk) * (abs(a) + abs(b)) + 1e-7


@given(walks(solvers=("power",)), st.integers(0, 40))
def test_steps_add_up(wk, walk, more):
    assert close(wk.random_walk(run(wk, walk), walk.affinity, **walk.options | {"steps": more}),
                 run(wk, walk, steps=walk.options["steps"] + more))  # fmt: skip


@given(walks())
def test_no_step_is_the_identity(wk, walk):
    assert torch.equal(run(wk, walk, steps=0), walk.maps)


@given(walks())
def test_a_large_beta_keeps_only_links_of_one(wk, walk):
    assume(walk.options["radius"] > 1)
    affinity = (walk.affinity * 0.9).clone()
    assert close(wk.random_walk(walk.maps, affinity, **walk.options | {"beta": 1e4}), walk.maps)  # 0.9^1e4 = 0
    affinity[:, 0] = 1
    only = torch.zeros_like(affinity)
    only[:, 0] = 1
    assert close(wk.random_walk(walk.maps, affinity, **walk.options | {"beta": 1e4}),
                 wk.random_walk(walk.maps, only, **walk.options))  # fmt: skip


@given(walks())
def test_beta_zero_counts_links(wk, walk):
    assert close(run(wk, walk, beta=0.0), wk.random_walk(walk.maps, (walk.affinity > 0).float(), **walk.options))


@given(walks())
def test_whole_and_broken_beta_meet(wk, walk):
    beta = float(round(walk.options["beta"]) or 1)
    assert close(run(wk, walk, beta=beta), run(wk, walk, beta=beta * (1 + 1e-7)), tolerance(walk))


@given(walks(), st.integers(0, 100))
def test_constant_maps_stay(wk, walk, value):
    maps = torch.full_like(walk.maps, value / 7)
    out = wk.random_walk(maps, walk.affinity, **walk.options)
    assert torch.equal(out, maps) if walk.options["solver"] == "power" else close(out, maps, 5e-7)


@given(walks())
def test_a_map_twice_is_walked_alike(wk, walk):
    out = wk.random_walk(walk.maps.repeat(1, 2, 1, 1), walk.affinity, **walk.options)
    first, second = out.chunk(2, dim=1)
    assert close(first, second, 1e-6)


@given(walks(max_steps=300), st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-6]))
def test_solvers_agree_within_tol(wk, walk, tol):
    exact = wk.random_walk(
        walk.maps.double(), walk.affinity.double(), **walk.options | {"steps": walk.options["steps"] % 20}
    )
    out = run(wk, walk, steps=walk.options["steps"] % 20, tol=tol)
    allowed = (max(tol, 1e-5) + 1e-6) * walk.maps.amax((2, 3), keepdim=True)  # the reference ignores a smaller tol
    assert ((out - exact).abs() <= allowed).all()


# The affinity


@given(features(), radii, variants)
def test_range_of_the_affinity(wk, feats, radius, variant):
    affinity = wk.local_affinity(feats, radius, **variant)
    assert (affinity >= 0).all()
    assert (affinity <= 1 + 1e-5).all()  # test_local_affinity.py: cosines that round over 1


@given(features(), radii, variants, st.randoms(use_true_random=False))
def test_order_of_channels_does_not_matter(wk, feats, radius, variant, random):
    order = list(range(feats.shape[1]))
    random.shuffle(order)
    assume(feats.shape[1] > 1 or variant["metric"] == "l1")
    assert close(wk.local_affinity(feats[:, order], radius, **variant), wk.local_affinity(feats, radius, **variant))


@given(features(), radii, variants, st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter_to_affinities(wk, same, feats, radius, variant, random):
    order = list(range(feats.shape[0]))
    random.shuffle(order)
    expected = wk.local_affinity(feats, radius, **variant)[order]
    assert torch.equal(wk.local_affinity(feats[order], radius, **variant), expected)
    assert same(torch.cat([wk.local_affinity(f[None], radius, **variant) for f in feats[order]]), expected)


@given(features(), st.sampled_from([2, 3, 5, 8]), st.sampled_from([1.0, "auto"]), st.sampled_from("xy"))
def test_the_affinity_commutes_with_flips(wk, feats, radius, scale, axis):
    dim = -1 if axis == "x" else -2
    mirrored = wk.local_affinity(feats.flip(dim), radius, scale=scale)
    assert close(mirrored, flipped(wk.local_affinity(feats, radius, scale=scale), radius, axis))


@given(features(), radii, st.integers(-20, 20), st.sampled_from(["l1", "cosine"]))
def test_automatic_scale_ignores_powers_of_two(wk, feats, radius, power, metric):
    expected = wk.local_affinity(feats, radius, metric=metric, scale="auto")
    assert torch.equal(wk.local_affinity(feats * 2.0**power, radius, metric=metric, scale="auto"), expected)


@given(features(), radii, st.sampled_from([1e-3, 1e3]))
def test_automatic_scale_ignores_the_unit(wk, feats, radius, unit):
    expected = wk.local_affinity(feats, radius, scale="auto")
    assert (wk.local_affinity(feats * unit, radius, scale="auto") - expected).abs().sum() <= 1e-5 * max(
        1, expected.numel()
    )


@given(features(), radii, st.floats(0.1, 10))
def test_the_scale_divides_the_distance(wk, feats, radius, scale):
    expected = wk.local_affinity(feats / scale, radius)
    assert ((wk.local_affinity(feats, radius, scale=scale) - expected).abs() <= 1e-5).all()


@given(features(), radii, SEEDS)
def test_cosine_ignores_the_length_of_every_pixel(wk, feats, radius, seed):
    lengths = torch.rand(feats.shape[0], 1, *feats.shape[2:], generator=generator(seed)) * 1000 + 1e-3
    difference = wk.local_affinity(feats * lengths, radius, metric="cosine") - wk.local_affinity(
        feats, radius, metric="cosine"
    )
    assert (difference.abs() <= 1e-5).all()


@given(features(), radii, st.sampled_from([1.0, "auto"]))
def test_channels_twice_change_nothing(wk, feats, radius, scale):
    for metric in ("l1", "cosine"):
        if metric == "cosine" and feats.shape[1] == 1:
            continue
        twice = wk.local_affinity(feats.repeat(1, 2, 1, 1), radius, metric=metric, scale=scale)
        assert ((twice - wk.local_affinity(feats, radius, metric=metric, scale=scale)).abs() <= 1e-5).all()


@given(features(), radii)
def test_l1_ignores_an_offset(wk, feats, radius):
    shifted = (feats * 64).round() / 64
    assert torch.equal(wk.local_affinity(shifted + 5, radius), wk.local_affinity(shifted, radius))


@given(features(), radii, variants)
def test_cropped_is_full_with_zeros(wk, feats, radius, variant):
    full = wk.local_affinity(feats, radius, **variant | {"border": "full"})
    cropped = wk.local_affinity(feats, radius, **variant | {"border": "cropped"})
    assert torch.equal(torch.where(cropped > 0, full, 0.0), cropped)
    assert cropped[:, :, feats.shape[2] - radius + 1 :].eq(0).all() or radius == 1
