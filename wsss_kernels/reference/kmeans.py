"""What `wsss_kernels.kmeans` means, written for reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KMeansResult(NamedTuple):
    labels: Tensor  # [N] int64, of the final centers
    centers: Tensor  # [k, D]
    inertia: float  # sum of squared distances to the own center
    n_iter: int


def trials(k: int) -> int:
    """Candidates for each center after the first."""
    return 2 + int(math.log(k))


def random_draws(k: int, runs: int, seed: int) -> Tensor:
    """[runs, 1 + (k - 1) trials] float64 in [0, 1): in each run one for the first center, then for the candidates."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(runs, 1 + (k - 1) * trials(k), generator=generator, dtype=torch.float64)


def distances(x: Tensor, centers: Tensor) -> Tensor:
    """[N, k] squares."""
    squares = x.square().sum(1)[:, None] - 2 * x @ centers.T + centers.square().sum(1)
    return squares.clamp(min=0)


def seed_centers(x: Tensor, k: int, draws: Tensor) -> Tensor:
    """Greedy k-means++: of a few candidates drawn by squared distance, the one that leaves the least."""
    chosen = [min(int(draws[0] * len(x)), len(x) - 1)]
    nearest = distances(x, x[chosen])[:, 0]
    for several in draws[1:].view(k - 1, trials(k)):
        total = nearest.double().cumsum(0)
        candidates = torch.searchsorted(total, several.to(x.device) * total[-1]).clamp(max=len(x) - 1)
        left = torch.minimum(nearest[:, None], distances(x, x[candidates]))  # [N, trials]
        best = int(left.double().sum(0).argmin())
        chosen.append(int(candidates[best]))
        nearest = left[:, best]
    return x[chosen]


def mean_centers(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The mean of each label's rows; a center without rows takes the row farthest from its own, away from that one."""
    k = len(centers)
    counts = torch.bincount(labels, minlength=k)
    sums = x.new_zeros(k, x.shape[1], dtype=torch.float64).index_add_(0, labels, x.double())
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        apart = (x - centers[labels]).square().sum(1)
        far = apart.sort(descending=True, stable=True).indices.tolist()
        if apart[far[0]] > 0:
            for j, i in zip(empty, far, strict=False):
                sums[labels[i]] -= x[i]
                counts[labels[i]] -= 1
                sums[j] = x[i]
                counts[j] = 1
        heaviest = int(counts.argmax())
        for j in (counts == 0).nonzero().flatten().tolist():
            sums[j], counts[j] = sums[heaviest], counts[heaviest]
    return (sums / counts[:, None]).to(x.dtype)


def cluster(x: Tensor, k: int, *, iterations: int, tol: float, start: Tensor | None, draws: Tensor) -> KMeansResult:
    """One problem. start [k, D], or None: a run for each row of draws, and the best of them."""
    y = x if x.dtype == torch.float64 else x.float()
    mean = y.mean(0)
    y = y - mean
    if not bool(y.square().sum(1).isfinite().all()):
        raise ValueError("x must be finite, its squares too")
    enough = tol * y.double().square().mean().item()
    best: KMeansResult | None = None
    for run in draws:
        centers = seed_centers(y, k, run) if start is None else start.to(y.dtype) - mean
        before, settled, done = None, False, 0
        while done < iterations and not settled:
            done += 1
            labels = distances(y, centers).argmin(1)
            moved = mean_centers(y, labels, centers)
            shift = (moved - centers).double().square().sum().item()
            centers = moved
            settled = before is not None and torch.equal(labels, before)
            before = labels
            if not settled and shift <= enough:
                break
        if not settled:
            labels = distances(y, centers).argmin(1)
        inertia = (y - centers[labels]).double().square().sum().item()
        if best is None or inertia < best.inertia:
            best = KMeansResult(labels, (centers + mean).to(x.dtype), inertia, done)
    assert best is not None
    return best


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
    """Meaning of `wsss_kernels.kmeans` in plain PyTorch: any device, any floating point dtype."""
    problems = [x] if isinstance(x, Tensor) else list(x)
    ks = [k] * len(problems) if isinstance(k, int) else list(k)
    inits = [init] * len(problems) if isinstance(init, (str, Tensor)) else list(init)
    results = []
    for rows, clusters, first in zip(problems, ks, inits, strict=True):
        start = first if isinstance(first, Tensor) else None
        draws = random_draws(clusters, 1 if start is not None else n_init, seed)
        results.append(cluster(rows, clusters, iterations=iterations, tol=tol, start=start, draws=draws))
    return results[0] if isinstance(x, Tensor) else results
