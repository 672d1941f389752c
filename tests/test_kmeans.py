"""kmeans: by hand, against scikit-learn and float64, seeding, empty clusters, lists, odd numbers, refusals."""

import math

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import reference
from wsss_kernels.reference.kmeans import distances, random_draws, trials

SHAPES = [(1, 1, 1), (7, 3, 7), (300, 17, 5), (257, 64, 10), (500, 3, 40), (200, 1, 7), (90, 33, 1), (70, 600, 18)]


def blobs(rows, dim, seed=0, count=12, spread=0.8, offset=0.0):
    """Not negative, in clusters that overlap: like pooled features."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(count, dim, generator=generator)
    of = torch.randint(count, (rows,), generator=generator)
    return (centers[of] + spread * torch.randn(rows, dim, generator=generator)).relu() + offset


def some_rows(x, k, seed=1):
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]]


def sklearn_kmeans(x, k, **options):
    cluster = pytest.importorskip("sklearn.cluster")
    return cluster.KMeans(k, algorithm="lloyd", **{"n_init": 1} | options).fit(x.numpy())


def check_against_float64(result, x, k, assert_close, **options):
    """Same labels as the reference's but for rows whose two nearest centers are equally near in float32."""
    expected = reference.kmeans(x.double(), k, **options)
    assert result.labels.dtype == torch.int64 and result.labels.shape == (len(x),)
    assert result.centers.dtype == x.dtype and result.centers.shape == (k, x.shape[1])
    assert torch.equal(result.labels, expected.labels) and result.n_iter == expected.n_iter
    assert_close(result.centers, expected.centers)
    squares = x.double().square().sum().item()
    assert result.inertia == pytest.approx(expected.inertia, rel=1e-5, abs=1e-9 * min(1.0, squares))


# Values


def test_by_hand(wk):
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0], [10.0, 4.0]])
    result = wk.kmeans(x, 2, init=x[[0, 1]])
    # Rows 0, 2 | 1, 3, 4 at first: centers (5, 0), (20/3, 8/3); then 0 | rest; then 0, 1 | 2, 3, 4; then no change.
    assert result.labels.tolist() == [0, 0, 1, 1, 1]
    assert result.centers.tolist() == [[0.0, 1.0], [10.0, 2.0]]
    assert result.inertia == 10.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_against_float64(wk, shape, offset, assert_close, nan_filled):
    rows, dim, k = shape
    x = blobs(rows, dim, offset=offset)
    start = some_rows(x, k)
    for options in ({}, {"tol": 0.0}, {"iterations": 1}, {"iterations": 3}):
        result = wk.kmeans(x, k, init=start, **options)
        check_against_float64(result, x, k, assert_close, init=start.double(), **options)


def rows_of_kind(kind, rows, dim):
    """What bounds from rounded rows have to bear; clusters overlap, so that many iterations follow."""
    generator = torch.Generator().manual_seed(7)
    x = blobs(rows, dim, seed=5, count=30, spread=2.0)
    if kind == "signed":
        return x - 0.7
    if kind == "offset":
        return x + 3.0
    if kind == "one low column":
        x[:, dim // 2] -= 300
    if kind == "one large column":
        x[:, dim // 2] += 300 * torch.rand(rows, generator=generator)
    if kind == "rows of all sizes":
        return x * 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    if kind == "flat rows":
        x[::3] = torch.rand(len(x[::3]), 1, generator=generator)
    if kind == "repeated rows":
        return x[torch.randint(rows // 3, (rows,), generator=generator)]
    if kind == "tiny":
        return 1e-12 * x
    if kind == "squares of differences vanish":
        return 3e-18 * x
    return x


KINDS = ["plain", "signed", "offset", "one large column", "one low column", "rows of all sizes", "flat rows",
         "repeated rows", "tiny", "squares of differences vanish"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(700, 300, 10), (301, 1024, 16), (200, 512, 9), (64, 257, 3), (20, 256, 1)], ids=str)
def test_many_iterations_over_long_rows(wk, kind, shape, assert_close, nan_filled):
    """Most labels are told there without reading the rows: they are those of the plain algorithm all the same."""
    rows, dim, k = shape
    x = rows_of_kind(kind, rows, dim)
    start = some_rows(x, k)
    for options in ({"tol": 0.0}, {"iterations": 4}):
        result = wk.kmeans(x, k, init=start, **options)
        check_against_float64(result, x, k, assert_close, init=start.double(), **options)
    seeded = wk.kmeans(x, k, n_init=2, seed=2)
    check_against_float64(seeded, x, k, assert_close, n_init=2, seed=2)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_against_scikit_learn(wk, shape):
    rows, dim, k = shape
    x = blobs(rows, dim, seed=3)
    start = some_rows(x, k)
    for tol in (1e-4, 0.0):
        found, expected = wk.kmeans(x, k, init=start, tol=tol), sklearn_kmeans(x, k, init=start.numpy(), tol=tol)
        assert found.labels.tolist() == expected.labels_.tolist()
        # A label may change without a move: the row an empty center had taken. Their sums then differ by rounding.
        assert expected.n_iter_ - found.n_iter in ((0,) if tol else (0, 1))
        torch.testing.assert_close(found.centers, torch.from_numpy(expected.cluster_centers_), atol=2e-6, rtol=1e-5)
        assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5, abs=1e-6)


def test_seeding_is_as_good_as_scikit_learns(wk):
    """Mean inertia over seeds: the draws differ, the method does not."""
    ours, theirs = 0.0, 0.0
    for data in range(3):
        x = blobs(400, 24, seed=data, count=15, spread=0.3)
        for seed in range(12):
            ours += wk.kmeans(x, 15, seed=seed).inertia
            theirs += sklearn_kmeans(x, 15, init="k-means++", random_state=seed).inertia_
    assert ours < 1.02 * theirs


def test_seeding_finds_clusters_far_apart(wk):
    x = torch.cat([1000 * j + torch.rand(20, 5, generator=torch.Generator().manual_seed(j)) for j in range(12)])
    for seed in range(5):
        assert torch.equal(wk.kmeans(x, 12, seed=seed).labels.view(12, 20), wk.kmeans(x, 12, seed=seed).labels[::20]
                           [:, None].expand(12, 20))  # fmt: skip
        assert wk.kmeans(x, 12, seed=seed).labels.unique().numel() == 12


def test_seeds(wk, assert_close):
    x = blobs(300, 20)
    results = [wk.kmeans(x, 8, seed=seed) for seed in (0, 0, 1, 2**63 - 1)]
    assert torch.equal(results[0].labels, results[1].labels) and torch.equal(results[0].centers, results[1].centers)
    assert not torch.equal(results[0].labels, results[2].labels)
    check_against_float64(results[0], x, 8, assert_close)


def test_best_of_several_runs(wk):
    x = blobs(200, 6)
    draws = random_draws(9, 6, 5)
    assert draws.shape == (6, 1 + 8 * trials(9)) and trials(9) == 4 and trials(1) == 2
    several = [wk.kmeans(x, 9, n_init=n, seed=5).inertia for n in (1, 3, 6)]
    assert several[0] >= several[1] >= several[2] and several[0] > several[2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_is_consistent(wk, shape):
    rows, dim, k = shape
    x = blobs(rows, dim)
    for iterations in (1, 2, 300):
        labels, centers, inertia, n_iter = wk.kmeans(x, k, iterations=iterations)
        square = distances(x.double(), centers.double())
        chosen = square.gather(1, labels[:, None])[:, 0]
        assert (chosen <= square.amin(1) + 1e-4 * (1 + square.amax(1))).all()
        assert inertia == pytest.approx(chosen.sum().item(), rel=1e-4, abs=1e-4)
        assert 1 <= n_iter <= iterations and isinstance(n_iter, int) and isinstance(inertia, float)


def test_dtypes(dtype, device, assert_close):
    x = blobs(150, 32).to(dtype).to(device)
    start = some_rows(x.cpu(), 6).to(device)
    result = wk.kmeans(x, 6, init=start)
    assert result.centers.dtype == dtype and result.labels.device.type == result.centers.device.type == device.type
    expected = reference.kmeans(x.double().cpu(), 6, init=start.double().cpu())
    assert torch.equal(result.labels.cpu(), expected.labels)
    assert_close(result.centers, expected.centers)


def test_tight_clusters_keep_their_inertia(wk, assert_close):
    """Far smaller than the squares of the rows: no difference of large numbers."""
    x = 100 * blobs(12, 40).repeat(10, 1) + 1e-3 * torch.rand(120, 40, generator=torch.Generator().manual_seed(1))
    result = wk.kmeans(x, 12, init=x[:12])
    assert result.inertia == pytest.approx(reference.kmeans(x.double(), 12, init=x[:12].double()).inertia, rel=1e-2)
    assert 0 < result.inertia < 1e-2


# Empty clusters, ties


@pytest.mark.parametrize("dim", [7, 300])
def test_empty_clusters_take_the_farthest_rows(wk, dim, assert_close):
    x = blobs(100, dim)
    start = torch.cat([some_rows(x, 4), torch.full((3, dim), 1e3)])
    result = wk.kmeans(x, 7, init=start)
    check_against_float64(result, x, 7, assert_close, init=start.double())
    assert result.labels.unique().numel() == 7
    one = torch.cat([some_rows(x, 6), torch.full((1, dim), 1e3)])
    found, expected = wk.kmeans(x, 7, init=one), sklearn_kmeans(x, 7, init=one.numpy())
    assert found.labels.tolist() == expected.labels_.tolist()
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)


@pytest.mark.parametrize("far", [0, 2])
@pytest.mark.parametrize("dim", [8, 300])
def test_a_center_too_far_for_float32_is_nobodys(wk, dim, far):
    x = blobs(100, dim)
    start = some_rows(x, 5)
    start[far] = 3e38
    found = wk.kmeans(x, 5, init=start, iterations=1)
    expected = reference.kmeans(x.double(), 5, init=start.double(), iterations=1)
    assert torch.equal(found.labels, expected.labels)


def test_fewer_different_rows_than_clusters(wk):
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).repeat_interleave(4, 0)
    for result in (wk.kmeans(x, 5), wk.kmeans(x, 5, init=x[[0, 1, 4, 5, 6]]), wk.kmeans(torch.ones(6, 3), 4)):
        assert result.inertia == 0 and result.centers.isfinite().all()
    assert wk.kmeans(x, 5).labels.unique().numel() == 2


def test_ties_go_to_the_lowest_center(wk):
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    assert wk.kmeans(x, 2, init=torch.tensor([[-1.0], [1.0]]), iterations=1).labels.tolist()[0] == 0
    labels = wk.kmeans(x, 2, init=torch.tensor([[1.0], [-1.0]])).labels.tolist()
    assert labels == wk.kmeans(x.double(), 2, init=torch.tensor([[1.0], [-1.0]]).double()).labels.tolist()


def test_every_row_a_cluster(wk):
    x = blobs(20, 9)
    result = wk.kmeans(x, 20, init=x)
    assert result.labels.tolist() == list(range(20)) and result.inertia == 0
    torch.testing.assert_close(result.centers, x)


# Lists, memory, threads


def test_lists_are_their_problems_one_by_one(wk):
    problems = [blobs(n, 16, seed=n) for n in (40, 1, 333, 90)]
    ks = [5, 1, 10, 3]
    results = wk.kmeans(problems, ks)
    assert isinstance(results, list)
    for found, x, k in zip(results, problems, ks, strict=True):
        alone = wk.kmeans(x, k)
        assert torch.equal(found.labels, alone.labels) and torch.equal(found.centers, alone.centers)
        assert found[2:] == alone[2:]
    starts = ["k-means++", problems[1], some_rows(problems[2], 10), "k-means++"]
    mixed = wk.kmeans(tuple(problems), ks, init=starts)
    assert torch.equal(mixed[0].labels, results[0].labels)
    assert torch.equal(mixed[2].labels, wk.kmeans(problems[2], 10, init=starts[2]).labels)
    assert len(wk.kmeans(problems[2:], 3)) == 2
    assert wk.kmeans([], 3) == []
    both = wk.kmeans([problems[0], problems[0].double()], 5)
    assert both[1].centers.dtype == torch.float64 and torch.equal(both[0].labels, both[1].labels)


def test_layouts(wk):
    x = blobs(60, 24)
    expected = wk.kmeans(x, 4)
    wide = torch.full((60, 48), math.nan)
    wide[:, ::2] = x
    shifted = torch.empty(60 * 24 + 3)[3:].view(60, 24).copy_(x)
    for view in (x.T.contiguous().T, wide[:, ::2], torch._neg_view(-x), shifted):
        found = wk.kmeans(view, 4)
        assert torch.equal(found.labels, expected.labels) and torch.equal(found.centers, expected.centers)
    repeated = x[:1].expand(10, 24)
    assert wk.kmeans(repeated, 2).inertia == 0
    kept = x.clone()
    start = some_rows(x, 4)
    wk.kmeans(x, 4, init=start)
    assert torch.equal(x, kept) and torch.equal(start, some_rows(x, 4))


@pytest.mark.native
def test_same_bits_for_any_number_of_threads():
    problems = [blobs(700, 256, spread=2.0), blobs(130, 37, offset=50.0), blobs(400, 512, seed=2), blobs(9, 3)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2, 7):
            torch.set_num_threads(threads)
            found.append(wk.kmeans(problems, [12, 7, 20, 3], n_init=2))
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        for one, other in zip(found[0], results, strict=True):
            assert torch.equal(one.labels, other.labels) and torch.equal(one.centers, other.centers)
            assert one[2:] == other[2:]


def test_a_constant_for_the_gradient(wk):
    result = wk.kmeans(blobs(30, 4).requires_grad_(), 3, init=blobs(3, 4).requires_grad_())
    assert not result.centers.requires_grad


@pytest.mark.native
@pytest.mark.parametrize("shape", [(5, 3, 2), (40, 16, 7), (1, 1, 1), (33, 20, 33)], ids=str)
def test_opcheck(device, shape):
    rows, dim, k = shape
    x = blobs(rows, dim).to(device)
    none, draws = x.new_empty(0), random_draws(k, 2, 0)
    op = torch.ops.wsss_kernels.kmeans.default
    torch.library.opcheck(op, ([x, x], [k, k], [none, x[:k]], [draws, draws[:1]], 5, 1e-4))


# Refusals

GOOD = {"x": torch.ones(5, 3), "k": 2}
BAD = [
    ({"x": torch.zeros(5)}, ValueError, r"x must be a floating point tensor \[N, D\].*got .*\[5\]"),
    ({"x": torch.zeros(5, 3, 1)}, ValueError, r"x must be .*\[5, 3, 1\]"),
    ({"x": torch.zeros(5, 3).long()}, TypeError, "x must be .*int64"),
    ({"x": torch.zeros(5, 0)}, ValueError, r"x must have at least one column.*\[5, 0\]"),
    ({"x": None}, TypeError, "x must be .*or a list of them, got None"),
    ({"x": "rows"}, TypeError, "x must be .*got 'rows'"),
    ({"x": [torch.ones(5, 3), None]}, TypeError, r"x\[1\] must be a floating point tensor.*None"),
    ({"x": torch.zeros(0, 3)}, ValueError, "k must be an int in 1..N = 0"),
    ({"k": 6}, ValueError, "k must be an int in 1..N = 5, the rows of x, got 6"),
    ({"k": 0}, ValueError, "k must be an int in 1..N = 5.*got 0"),
    ({"k": -1}, ValueError, "k must be .*got -1"),
    ({"k": 2.0}, TypeError, "k must be .*got 2.0"),
    ({"k": True}, TypeError, "k must be .*got True"),
    ({"k": [2]}, TypeError, r"k must be .*got \[2\]"),
    ({"x": [torch.ones(5, 3)] * 2, "k": [2]}, ValueError, "k must be one for all or a list of 2.*got 1"),
    (
        {"x": [torch.ones(5, 3)] * 2, "k": [2, 9]},
        ValueError,
        r"k must be an int in 1..N = 5, the rows of x\[1\], got 9",
    ),
    ({"iterations": 0}, ValueError, "iterations must be an int >= 1, got 0"),
    ({"iterations": 1.5}, TypeError, "iterations must be .*got 1.5"),
    ({"tol": -1e-4}, ValueError, "tol must be a number >= 0.*got -0.0001"),
    ({"tol": math.nan}, ValueError, "tol must be .*got nan"),
    ({"tol": "auto"}, TypeError, "tol must be .*got 'auto'"),
    ({"init": "random"}, ValueError, "init must be one of 'k-means\\+\\+', got 'random'"),
    ({"init": None}, TypeError, "init must be .*got None"),
    ({"init": torch.ones(3, 3)}, ValueError, r"init must be \[k, D\] = \[2, 3\] for x, got .*\[3, 3\]"),
    ({"init": torch.ones(2, 3).long()}, TypeError, "init must be .*int64"),
    ({"init": torch.full((2, 3), math.nan)}, ValueError, "init must be finite"),
    ({"n_init": 0}, ValueError, "n_init must be an int >= 1, got 0"),
    ({"seed": -1}, ValueError, "seed must be an int in 0..*got -1"),
    ({"seed": 0.5}, TypeError, "seed must be .*got 0.5"),
]


@pytest.mark.parametrize("bad, error, message", BAD)
def test_refusals(bad, error, message):
    with pytest.raises(error, match=message):
        wk.kmeans(**GOOD | bad)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_rows_must_be_finite(wk, poison):
    x = blobs(30, 20)
    x[17, 3] = poison
    with pytest.raises(ValueError, match="x must be finite"):
        wk.kmeans(x, 3)
    with pytest.raises(ValueError, match=r"x\[1\] must be finite"):
        wk.kmeans([blobs(30, 20), x], 3)
    if not math.isfinite(poison):
        with pytest.raises(ValueError, match="x must be finite"):
            wk.kmeans(x.double(), 3)
