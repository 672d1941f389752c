"""k-means: contract, checks, registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch
from wsss_kernels.reference.kmeans import KMeansResult, cluster, random_draws


@overload
def kmeans(
    x: Tensor,
    k: int,
    *,
    iterations: int = 300,
    tol: float = 1e-4,
    init: str | Tensor = "k-means++",
    n_init: int = 1,
    seed: int = 0,
) -> KMeansResult: ...
@overload
def kmeans(
    x: Sequence[Tensor],
    k: int | Sequence[int],
    *,
    iterations: int = 300,
    tol: float = 1e-4,
    init: str | Tensor | Sequence[str | Tensor] = "k-means++",
    n_init: int = 1,
    seed: int = 0,
) -> list[KMeansResult]: ...
def kmeans(
    x: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    *,
    iterations: int = 300,
    tol: float = 1e-4,
    init: str | Tensor | Sequence[str | Tensor] = "k-means++",
    n_init: int = 1,
    seed: int = 0,
) -> KMeansResult | list[KMeansResult]:
    """Clusters of the rows of x by Lloyd's iterations: scikit-learn's `KMeans`, several problems at a time.

        labels[i] = argmin_j |x_i - c_j|, ties to the lowest j;   c_j = mean of the rows labelled j

    until no label changes, or sum_j |c_j - its last place|^2 <= tol * the mean variance of x's columns. A center
    without rows takes the row farthest from its own center away from it. From the same start labels and centers are
    scikit-learn's. Rows are taken relative to their mean; sums are double, in one order: the same bits for any number
    of threads, whatever else is in the list.

    On the CPU distances are left out where the triangle inequality shows that a label stays. On a GPU the host waits
    for one number an iteration: whether it was the last.

    Args:
        x: [N, D] of one problem, or a list of such, solved together; D >= 1, finite; float16, bfloat16, float32
            (float32 arithmetic), or float64 (the reference).
        k: number of clusters, 1..N; one for all problems or a list.
        iterations: at most so many, >= 1; 300 as scikit-learn.
        tol: >= 0, of the mean variance; 0 goes on until no label changes. 1e-4 as scikit-learn.
        init: "k-means++" (greedy, with 2 + log(k) candidates a center, as scikit-learn), or the first centers [k, D];
            one for all problems or a list.
        n_init: runs of k-means++, of which the one of least inertia is kept; with given centers there is one.
        seed: of k-means++, 0..2^63 - 1. Every problem draws from a generator of its own.

    Returns:
        KMeansResult(labels [N] int64, centers [k, D] in the dtype of x, inertia: sum of squared distances, n_iter), or
        a list of them. Constants for the gradient.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Source: Lloyd 1982; Arthur and Vassilvitskii, SODA 2007; scikit-learn's choices of stop, candidates and empty
    clusters. SC-CAM (Chang et al., CVPR 2020) clusters each class's image features, k = 10.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
        >>> labels, centers, inertia, _ = wk.kmeans(rows, 2)
        >>> bool(labels[0] == labels[1]) and bool(labels[2] == labels[3]), inertia
        (True, 1.0)
    """
    listed = not isinstance(x, Tensor)
    if listed and (not isinstance(x, Sequence) or isinstance(x, (str, bytes))):
        raise TypeError(f"x must be a floating point tensor [N, D] or a list of them, got {_check.describe(x)}")
    problems: list[Tensor] = [x] if isinstance(x, Tensor) else list(x)
    names = [f"x[{i}]" for i in range(len(problems))] if listed else ["x"]
    for name, rows in zip(names, problems, strict=True):
        _check.tensor(name, rows, "N D")
        if rows.shape[1] == 0:
            raise ValueError(f"{name} must have at least one column (D >= 1), got {_check.describe(rows)}")
        _check.same_device(names[0], problems[0], name, rows)
    ks = _each("k", k, (int,), len(problems), listed)
    for name, rows, clusters in zip(names, problems, ks, strict=True):
        _check.whole("k", clusters, f"an int in 1..N = {len(rows)}, the rows of {name}", least=1, most=len(rows))
    starts: list[Tensor | None] = []
    for name, rows, clusters, first in zip(
        names, problems, ks, _each("init", init, (str, Tensor), len(problems), listed), strict=True
    ):
        starts.append(_checked_start(first, name, rows, clusters))
    _check.whole("iterations", iterations, "an int >= 1", least=1)
    tol = _check.number("tol", tol, "a number >= 0 (of the mean variance)", least=0)
    _check.whole("n_init", n_init, "an int >= 1", least=1)
    _check.whole("seed", seed, "an int in 0..2^63 - 1", least=0, most=2**63 - 1)

    problems = [rows.detach() for rows in problems]
    draws = [random_draws(c, n_init if s is None else 1, seed) for c, s in zip(ks, starts, strict=True)]
    native = [i for i, rows in enumerate(problems) if _dispatch.runs_native("kmeans", rows)]
    results: list[KMeansResult | None] = [None] * len(problems)
    if native:
        none = problems[native[0]].new_empty(0)
        found = torch.ops.wsss_kernels.kmeans(
            [problems[i] for i in native],
            [ks[i] for i in native],
            [none if (start := starts[i]) is None else start for i in native],
            [draws[i] for i in native],
            iterations,
            tol,
        )
        every = zip(native, *(found[:2]), found[2].tolist(), found[3].tolist(), strict=True)
        for i, labels, centers, inertia, n_iter in every:
            if n_iter == 0:
                raise _not_finite(names[i])
            results[i] = KMeansResult(labels, centers, inertia, n_iter)
    for i, rows in enumerate(problems):
        if results[i] is None:
            if not bool(rows.isfinite().all()):
                raise _not_finite(names[i])
            results[i] = cluster(rows, ks[i], iterations=iterations, tol=tol, start=starts[i], draws=draws[i])
    complete = [result for result in results if result is not None]
    return complete if listed else complete[0]


def _not_finite(name: str) -> ValueError:
    return ValueError(f"{name} must be finite, and the squares of its rows in float32 too, got NaN, infinity or more")


def _each(name: str, value: object, kinds: tuple[type, ...], count: int, listed: bool) -> list:  # type: ignore[type-arg]
    """One for all, or a list of as many as there are problems."""
    if not listed or isinstance(value, (*kinds, str, bytes)) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one for all or a list of {count}, one for each of x, got {len(value)}")
    return list(value)


def _checked_start(init: object, name: str, rows: Tensor, k: int) -> Tensor | None:
    if not isinstance(init, Tensor):
        _check.choice("init", init, ("k-means++",))
        return None
    _check.tensor("init", init, "k D")
    if tuple(init.shape) != (k, rows.shape[1]):
        raise ValueError(f"init must be [k, D] = {[k, rows.shape[1]]} for {name}, got {_check.describe(init)}")
    _check.same_device(name, rows, "init", init)
    if not bool(init.isfinite().all()):
        raise ValueError(f"init must be finite, got {_check.describe(init)} with NaN or infinity")
    return init.detach()


# start: [k, D] or empty. A problem that is not finite comes back with n_iter 0.
_dispatch.LIBRARY.define(
    "kmeans(Tensor[] x, int[] k, Tensor[] start, Tensor[] draws, int iterations, float tol) -> "
    "(Tensor[] labels, Tensor[] centers, Tensor inertia, Tensor n_iter)"
)


def _kmeans_cpu(
    x: list[Tensor], k: list[int], start: list[Tensor], draws: list[Tensor], iterations: int, tol: float
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    assert _dispatch.native is not None
    rows = [_dispatch.as_kernel_input(tensor) for tensor in x]
    starts = [_dispatch.as_kernel_input(tensor) for tensor in start]
    draws = [tensor.contiguous() for tensor in draws]
    labels = [torch.zeros(len(tensor), dtype=torch.int64) for tensor in x]
    centers = [torch.zeros(clusters, tensor.shape[1]) for tensor, clusters in zip(x, k, strict=True)]
    inertia, n_iter = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.int64)
    _dispatch.native.kmeans(
        [
            (
                rows[i].data_ptr(), *rows[i].shape, k[i], starts[i].data_ptr() if starts[i].numel() else 0,
                draws[i].data_ptr(), len(draws[i]), labels[i].data_ptr(), centers[i].data_ptr(),
                inertia[i].data_ptr(), n_iter[i].data_ptr(),
            )
            for i in range(len(x))
        ],
        iterations, tol, torch.get_num_threads(),
    )  # fmt: skip
    return labels, [_dispatch.as_output(c, t.dtype) for c, t in zip(centers, x, strict=True)], inertia, n_iter


def _kmeans_cuda(
    x: list[Tensor], k: list[int], start: list[Tensor], draws: list[Tensor], iterations: int, tol: float
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    from wsss_kernels.triton.kmeans import kmeans

    found = [kmeans(*problem, iterations, tol) for problem in zip(x, k, start, draws, strict=True)]
    inertia = torch.tensor([result[2] for result in found], dtype=torch.float64)
    n_iter = torch.tensor([result[3] for result in found], dtype=torch.int64)
    return [result[0] for result in found], [result[1] for result in found], inertia, n_iter


def _kmeans_fake(
    x: list[Tensor], k: list[int], start: list[Tensor], draws: list[Tensor], iterations: int, tol: float
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    labels = [tensor.new_empty(tensor.shape[0], dtype=torch.int64) for tensor in x]
    centers = [tensor.new_empty(clusters, tensor.shape[1]) for tensor, clusters in zip(x, k, strict=True)]
    inertia = torch.empty(len(x), dtype=torch.float64, device="cpu")
    return labels, centers, inertia, torch.empty(len(x), dtype=torch.int64, device="cpu")


_dispatch.LIBRARY.impl("kmeans", _kmeans_cpu, "CPU")
_dispatch.LIBRARY.impl("kmeans", _kmeans_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::kmeans", _kmeans_fake, lib=_dispatch.LIBRARY)
