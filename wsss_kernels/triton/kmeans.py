# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""k-means with Triton. Sums are taken in one order; the host waits once an iteration, for whether it was the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.reference.kmeans import trials
from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel


@kernel
def products(x, others, out, rows, dim, count, ROWS: tl.constexpr, CENTERS: tl.constexpr, DEPTH: tl.constexpr):
    """out [N, count] = x . others; one program a block of rows and of others."""
    groups = tl.cdiv(count, CENTERS)
    i = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) % groups * CENTERS + tl.arange(0, CENTERS)[None, :]
    total = tl.zeros([ROWS, CENTERS], tl.float32)
    for first in range(0, dim, DEPTH):
        d = first + tl.arange(0, DEPTH)
        here = tl.load(x + (i * dim + d[None, :]), mask=(i < rows) & (d < dim)[None, :], other=0.0)
        there = tl.load(others + (j.to(tl.int64) * dim + d[:, None]), mask=(j < count) & (d < dim)[:, None], other=0.0)
        total += tl.dot(here, there, input_precision="ieee")
    tl.store(out + (i * count + j), total, mask=(i < rows) & (j < count))


@kernel
def label_rows(values, norms, labels, rows, count, ROWS: tl.constexpr, CENTERS: tl.constexpr):
    """labels [N] int32 = argmin_j norms[j] - 2 values[i, j], ties to the lowest."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    nearest = tl.full([ROWS], float("inf"), tl.float32)
    label = tl.zeros([ROWS], tl.int32)
    for first in range(0, count, CENTERS):
        j = first + tl.arange(0, CENTERS)[None, :]
        used = (i < rows)[:, None] & (j < count)
        value = tl.load(values + (i[:, None] * count + j), mask=used, other=0.0)
        norm = tl.load(norms + j.to(tl.int64), mask=j < count, other=float("inf"))
        square = norm - 2.0 * value
        least = tl.min(square, axis=1)
        place = tl.min(tl.where(square == least[:, None], j, count), axis=1)
        label = tl.where(least < nearest, place, label)
        nearest = tl.minimum(nearest, least)
    tl.store(labels + i, label, mask=i < rows)


@kernel
def sum_rows(
    x, labels, partial, rows, dim, count,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, CENTERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [chunks, count, D]: sums of a chunk's rows by label; one program a chunk, some centers and columns."""
    blocks = tl.cdiv(dim, COLUMNS)
    groups = tl.cdiv(count, CENTERS)
    d = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    j = tl.program_id(0) // blocks % groups * CENTERS + tl.arange(0, CENTERS)[:, None]
    chunk = (tl.program_id(0) // blocks // groups).to(tl.int64)
    total = tl.zeros([CENTERS, COLUMNS], tl.float32)
    for first in range(0, CHUNK, ROWS):
        i = chunk * CHUNK + first + tl.arange(0, ROWS)
        label = tl.load(labels + i, mask=i < rows, other=-1)
        own = (label[None, :] == j).to(tl.float32)
        here = tl.load(x + (i[:, None] * dim + d), mask=(i < rows)[:, None] & (d < dim), other=0.0)
        total += tl.dot(own, here, input_precision="ieee")
    tl.store(partial + ((chunk * count + j) * dim + d), total, mask=(j < count) & (d < dim))


def row_products(x: Tensor, others: Tensor) -> Tensor:
    rows, dim = x.shape
    count = len(others)
    out = x.new_empty(rows, count)
    blocks = launch.ROW_PRODUCTS.blocks
    programs = triton.cdiv(rows, blocks["ROWS"]) * triton.cdiv(count, blocks["CENTERS"])
    launch.launch(products, programs, launch.ROW_PRODUCTS, x, others.contiguous(), out, rows, dim, count)
    return out


def assign(x: Tensor, centers: Tensor) -> Tensor:
    """[N] int32."""
    labels = torch.empty(len(x), dtype=torch.int32, device=x.device)
    norms = centers.square().sum(1)
    programs = triton.cdiv(len(x), launch.LABELS.blocks["ROWS"])
    launch.launch(
        label_rows, programs, launch.LABELS, row_products(x, centers), norms, labels, len(x), len(centers)
    )  # fmt: skip
    return labels


def sums_by_label(x: Tensor, labels: Tensor, count: int) -> Tensor:
    """[count, D] float64."""
    rows, dim = x.shape
    blocks = launch.ROW_SUMS.blocks
    chunks = triton.cdiv(rows, blocks["CHUNK"])
    partial = x.new_empty(chunks, count, dim)
    programs = chunks * triton.cdiv(count, blocks["CENTERS"]) * triton.cdiv(dim, blocks["COLUMNS"])
    launch.launch(sum_rows, programs, launch.ROW_SUMS, x, labels, partial, rows, dim, count)
    return partial.sum(0, dtype=torch.float64)


def seed_centers(x: Tensor, count: int, draws: Tensor) -> Tensor:
    """Greedy k-means++, as reference.kmeans.seed_centers; the host waits for nothing."""
    norms = x.square().sum(1)

    def squares(chosen: Tensor) -> Tensor:  # [N, chosen]
        return (norms[:, None] - 2 * row_products(x, x[chosen]) + norms[chosen]).clamp(min=0)

    chosen = [(draws[:1] * len(x)).long().clamp(max=len(x) - 1)]
    nearest = squares(chosen[0])[:, 0]
    for several in draws[1:].view(count - 1, trials(count)):
        total = nearest.double().cumsum(0)
        candidates = torch.searchsorted(total, several * total[-1]).clamp(max=len(x) - 1)
        left = torch.minimum(nearest[:, None], squares(candidates))
        best = left.double().sum(0).argmin().view(1)
        chosen.append(candidates[best])
        nearest = left.index_select(1, best)[:, 0]
    return x[torch.cat(chosen)]


def fill_empty(x: Tensor, labels: Tensor, centers: Tensor, sums: Tensor, sizes: Tensor) -> None:
    """Each center without rows takes the row farthest from its own center away from it; sums and sizes are changed."""
    apart = (x - centers[labels]).square().sum(1)
    far = apart.sort(descending=True, stable=True).indices
    if bool(apart[far[0]] > 0):
        for j, i in zip((sizes == 0).nonzero().flatten(), far, strict=False):
            own = labels[i].long()
            sums[own] -= x[i]
            sizes[own] -= 1
            sums[j] = x[i].double()
            sizes[j] = 1
    heaviest = sizes.argmax()
    empty = sizes == 0
    sums[empty], sizes[empty] = sums[heaviest].clone(), sizes[heaviest].clone()


def kmeans(
    x: Tensor, count: int, start: Tensor, draws: Tensor, iterations: int, tol: float
) -> tuple[Tensor, Tensor, float, int]:
    """Labels, centers, inertia, iterations; the last is 0 where a row is not finite."""
    with torch.cuda.device_of(x):
        y = x.resolve_neg().float()
        mean = y.mean(0)
        y = (y - mean).contiguous()
        squares = y.square().sum(1).double()
        enough, finite = torch.stack([tol * squares.mean() / x.shape[1], squares.isfinite().all().double()]).tolist()
        if not finite:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device), x.new_zeros(count, x.shape[1]), 0.0, 0
        best: tuple[Tensor, Tensor, float, int] | None = None
        for run in draws.to(x.device):
            centers = start.float() - mean if start.numel() else seed_centers(y, count, run)
            before = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
            settled, done = False, 0
            while done < iterations and not settled:
                done += 1
                labels = assign(y, centers)
                sums = sums_by_label(y, labels, count)
                sizes = (labels[:, None] == torch.arange(count, device=x.device)).sum(0)
                moved = (sums / sizes.clamp(min=1)[:, None]).float()
                shift = (moved - centers).double().square().sum()
                told = [(labels == before).all().double(), shift, (sizes == 0).any().double()]
                same, moves, empty = torch.stack(told).tolist()
                if empty:
                    fill_empty(y, labels, centers, sums, sizes)
                    moved = (sums / sizes[:, None]).float()
                    moves = (moved - centers).double().square().sum().item()
                centers, before, settled = moved, labels, bool(same)
                if not settled and moves <= enough:
                    break
            if not settled:
                labels = assign(y, centers)
            inertia = (y - centers[labels]).double().square().sum().item()
            if best is None or inertia < best[2]:
                best = labels.long(), (centers + mean).to(x.dtype), inertia, done
        assert best is not None
        return best
