# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of cross_image_attention in Triton. Every sum has one order; nothing waits for the host.

Allowed entries of an image are packed side by side first, and programs stop after as many as there are. Scores are
computed again wherever they are needed, except to find the strongest of each query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel

LEAST = tl.constexpr(1e-5)  # inside the entropy's logarithm


@triton.jit
def products(
    a, b, first_a, first_b, rows_a, rows_b, dim,
    A: tl.constexpr, B: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[A, B] of <a[first_a + i], b[first_b + j]>, 0 past the last row; both [rows, dim]."""
    i = first_a + tl.arange(0, A)[:, None]
    j = first_b + tl.arange(0, B)[None, :]
    sums = tl.zeros([A, B], tl.float32)
    for d in range(0, dim, CHANNELS):
        across = d + tl.arange(0, CHANNELS)[None, :]
        down = d + tl.arange(0, CHANNELS)[:, None]
        left = tl.load(a + (i.to(tl.int64) * dim + across), mask=(i < rows_a) & (across < dim), other=0.0)
        right = tl.load(b + (j.to(tl.int64) * dim + down), mask=(j < rows_b) & (down < dim), other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def rows_of(stats, number, first, queries, place: tl.constexpr, QUERIES: tl.constexpr):
    """One of the five statistics for a block of queries."""
    q = first + tl.arange(0, QUERIES)
    at = (number * queries + q.to(tl.int64)) * 5 + place
    return tl.load(stats + at, mask=q < queries, other=0.0)


@kernel
def statistics_of_queries(
    query, keys, counts, stats, entropy, scores, heads, queries, entries, dim, scale,
    ENTROPY: tl.constexpr, SCORES: tl.constexpr,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum and 1 / sum of each query, its entropy and slope if ENTROPY, the scores themselves if SCORES."""
    blocks = tl.cdiv(queries, QUERIES)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * QUERIES
    count = tl.load(counts + number // heads)
    query += number * queries * dim
    keys += number * entries * dim
    q = first + tl.arange(0, QUERIES)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for m in range(0, count, ENTRIES):
        column = m + tl.arange(0, ENTRIES)[None, :]
        s = products(query, keys, first, m, queries, count, dim, QUERIES, ENTRIES, CHANNELS, PRECISION) * scale
        s = tl.where(column < count, s, float("-inf"))
        if SCORES:
            at = (number * queries + q.to(tl.int64)[:, None]) * entries + column
            tl.store(scores + at, s, mask=(q[:, None] < queries) & (column < count))
        larger = tl.maximum(most, tl.max(s, axis=1), propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(s - larger[:, None]), axis=1)
        most = larger
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    most = tl.where(total == 0.0, 0.0, most)
    slope = tl.zeros([QUERIES], tl.float32)
    if ENTROPY:
        sums = tl.zeros([QUERIES], tl.float32)
        for m in range(0, count, ENTRIES):
            column = m + tl.arange(0, ENTRIES)[None, :]
            s = products(query, keys, first, m, queries, count, dim, QUERIES, ENTRIES, CHANNELS, PRECISION) * scale
            a = tl.where(column < count, tl.exp(s - most[:, None]) * inverse[:, None], 0.0)
            logarithm = tl.log(a + LEAST)
            sums -= tl.sum(a * logarithm, axis=1)
            slope -= tl.sum(a * (logarithm + a / (a + LEAST)), axis=1)
        tl.store(entropy + (number * queries + q), sums, mask=q < queries)
    at = (number * queries + q.to(tl.int64)) * 5
    tl.store(stats + at, most, mask=q < queries)
    tl.store(stats + (at + 1), inverse, mask=q < queries)
    tl.store(stats + (at + 4), slope, mask=q < queries)


@kernel
def attend(
    query, keys, values, counts, stats, out, heads, queries, entries, dim, scale,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT channels of the result for a block of queries; the first program of a block notes 1 / sum of those kept."""
    parts = tl.cdiv(dim, OUT)
    part = tl.program_id(0) % parts
    blocks = tl.cdiv(queries, QUERIES)
    number = (tl.program_id(0) // parts // blocks).to(tl.int64)
    first = tl.program_id(0) // parts % blocks * QUERIES
    count = tl.load(counts + number // heads)
    query += number * queries * dim
    keys += number * entries * dim
    values += number * entries * dim
    most = rows_of(stats, number, first, queries, 0, QUERIES)
    cut = rows_of(stats, number, first, queries, 2, QUERIES)
    q = first + tl.arange(0, QUERIES)
    channel = part * OUT + tl.arange(0, OUT)[None, :]
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, OUT], tl.float32)
    for m in range(0, count, ENTRIES):
        column = m + tl.arange(0, ENTRIES)
        s = products(query, keys, first, m, queries, count, dim, QUERIES, ENTRIES, CHANNELS, PRECISION) * scale
        left_out = (s < cut[:, None]) | (column[None, :] >= count)
        p = tl.where(left_out, 0.0, tl.exp(s - most[:, None]))
        total += tl.sum(p, axis=1)
        at = column.to(tl.int64)[:, None] * dim + channel
        v = tl.load(values + at, mask=(column[:, None] < count) & (channel < dim), other=0.0)
        sums = tl.dot(p, v, sums, input_precision=PRECISION)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    at = (number * queries + q.to(tl.int64)[:, None]) * dim + channel
    tl.store(out + at, sums * inverse[:, None], mask=(q[:, None] < queries) & (channel < dim))
    tl.store(stats + ((number * queries + q.to(tl.int64)) * 5 + 3), inverse, mask=(q < queries) & (part == 0))


@triton.jit
def change_of_scores(s, w, delta, most, inverse, cut, inverse_kept, slope, of_entropy, inside, ATTENDED: tl.constexpr,
                     ENTROPY: tl.constexpr):  # fmt: skip
    """Weights, and the gradient of the loss in the scores."""
    power = tl.exp(s - most)
    p = tl.where((s < cut) | (inside == 0), 0.0, power * inverse_kept)
    change = tl.zeros_like(s)
    if ATTENDED:
        change = p * (w - delta)
    if ENTROPY:
        a = tl.where(inside, power * inverse, 0.0)
        change -= of_entropy * a * (tl.log(a + LEAST) + a / (a + LEAST) + slope)
    return p, change


@kernel
def gradient_of_queries(
    grad, grad_entropy, delta, query, keys, values, counts, stats, grad_query, heads, queries, entries, dim,
    scale, ATTENDED: tl.constexpr, ENTROPY: tl.constexpr,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT channels of the queries' gradient."""
    parts = tl.cdiv(dim, OUT)
    blocks = tl.cdiv(queries, QUERIES)
    number = (tl.program_id(0) // parts // blocks).to(tl.int64)
    first = tl.program_id(0) // parts % blocks * QUERIES
    count = tl.load(counts + number // heads)
    q = first + tl.arange(0, QUERIES)
    row = number * queries + q.to(tl.int64)
    mean = tl.load(delta + row, mask=(q < queries) & ATTENDED, other=0.0)[:, None]
    of_entropy = tl.load(grad_entropy + row, mask=(q < queries) & ENTROPY, other=0.0)[:, None]
    channel = tl.program_id(0) % parts * OUT + tl.arange(0, OUT)[None, :]
    grad += number * queries * dim
    query += number * queries * dim
    keys += number * entries * dim
    values += number * entries * dim
    most = rows_of(stats, number, first, queries, 0, QUERIES)[:, None]
    inverse = rows_of(stats, number, first, queries, 1, QUERIES)[:, None]
    cut = rows_of(stats, number, first, queries, 2, QUERIES)[:, None]
    inverse_kept = rows_of(stats, number, first, queries, 3, QUERIES)[:, None]
    slope = rows_of(stats, number, first, queries, 4, QUERIES)[:, None]
    sums = tl.zeros([QUERIES, OUT], tl.float32)
    for m in range(0, count, ENTRIES):
        column = m + tl.arange(0, ENTRIES)
        s = products(query, keys, first, m, queries, count, dim, QUERIES, ENTRIES, CHANNELS, PRECISION) * scale
        w = tl.zeros_like(s)
        if ATTENDED:
            w = products(grad, values, first, m, queries, count, dim, QUERIES, ENTRIES, CHANNELS, PRECISION)
        inside = column[None, :] < count
        change = change_of_scores(s, w, mean, most, inverse, cut, inverse_kept, slope, of_entropy, inside,
                                  ATTENDED, ENTROPY)[1]  # fmt: skip
        at = column.to(tl.int64)[:, None] * dim + channel
        k = tl.load(keys + at, mask=(column[:, None] < count) & (channel < dim), other=0.0)
        sums = tl.dot(change * scale, k, sums, input_precision=PRECISION)
    tl.store(grad_query + (row[:, None] * dim + channel), sums, mask=(q[:, None] < queries) & (channel < dim))


@kernel
def gradient_of_memory(
    grad, grad_entropy, delta, query, keys, values, counts, stats, grad_keys, grad_values, heads, queries, entries, dim,
    scale, ATTENDED: tl.constexpr, ENTROPY: tl.constexpr,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT channels of the gradients of a block of packed entries; zeros past the last."""
    parts = tl.cdiv(dim, OUT)
    blocks = tl.cdiv(entries, ENTRIES)
    number = (tl.program_id(0) // parts // blocks).to(tl.int64)
    m = tl.program_id(0) // parts % blocks * ENTRIES
    count = tl.load(counts + number // heads)
    column = m + tl.arange(0, ENTRIES)
    channel = tl.program_id(0) % parts * OUT + tl.arange(0, OUT)[None, :]
    grad += number * queries * dim
    query += number * queries * dim
    keys += number * entries * dim
    values += number * entries * dim
    of_keys = tl.zeros([ENTRIES, OUT], tl.float32)
    of_values = tl.zeros([ENTRIES, OUT], tl.float32)
    for first in range(0, tl.where(m < count, queries, 0), QUERIES):
        q = first + tl.arange(0, QUERIES)
        row = number * queries + q.to(tl.int64)
        mean = tl.load(delta + row, mask=(q < queries) & ATTENDED, other=0.0)[None, :]
        of_entropy = tl.load(grad_entropy + row, mask=(q < queries) & ENTROPY, other=0.0)[None, :]
        s = products(keys, query, m, first, count, queries, dim, ENTRIES, QUERIES, CHANNELS, PRECISION) * scale
        w = tl.zeros_like(s)
        if ATTENDED:
            w = products(values, grad, m, first, count, queries, dim, ENTRIES, QUERIES, CHANNELS, PRECISION)
        most = rows_of(stats, number, first, queries, 0, QUERIES)[None, :]
        inverse = rows_of(stats, number, first, queries, 1, QUERIES)[None, :]
        cut = rows_of(stats, number, first, queries, 2, QUERIES)[None, :]
        inverse_kept = rows_of(stats, number, first, queries, 3, QUERIES)[None, :]
        slope = rows_of(stats, number, first, queries, 4, QUERIES)[None, :]
        inside = (column[:, None] < count) & (q[None, :] < queries)
        p, change = change_of_scores(s, w, mean, most, inverse, cut, inverse_kept, slope, of_entropy, inside,
                                     ATTENDED, ENTROPY)  # fmt: skip
        at = q.to(tl.int64)[:, None] * dim + channel
        there = (q[:, None] < queries) & (channel < dim)
        of_keys = tl.dot(change * scale, tl.load(query + at, mask=there, other=0.0), of_keys, input_precision=PRECISION)
        if ATTENDED:
            of_values = tl.dot(p, tl.load(grad + at, mask=there, other=0.0), of_values, input_precision=PRECISION)
    at = (number * entries + column.to(tl.int64)[:, None]) * dim + channel
    there = (column[:, None] < entries) & (channel < dim)
    tl.store(grad_keys + at, of_keys, mask=there)
    if ATTENDED:
        tl.store(grad_values + at, of_values, mask=there)


def _packed(memory: Tensor, order: Tensor | None, batch: int) -> Tensor:
    """[B, heads, M, d] float32, allowed entries first."""
    memory = memory.resolve_neg().to(torch.float32)
    memory = memory.expand(batch, *memory.shape[-3:])
    if order is not None:
        memory = memory.gather(2, order[:, None, :, None].expand(memory.shape))
    return memory.contiguous()


def _order(mask: Tensor | None, batch: int, entries: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The entries of each image, allowed ones first, and their number."""
    if mask is None:
        return None, torch.full((batch,), entries, dtype=torch.int32, device=device)
    order = torch.sort(~mask, dim=1, stable=True).indices
    return order, mask.sum(1, dtype=torch.int32)


def cross_image_attention(
    query: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, scale: float, top_k: int,
    threshold: float, wants_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, dim = query.shape
    entries = keys.shape[-2]
    sizes = (heads, queries, entries, dim, scale or dim**-0.5)
    with torch.cuda.device_of(query):
        q = query.resolve_neg().to(torch.float32).contiguous()
        out = torch.empty_like(q) if values is not None else q.new_empty(0)
        entropy = q.new_empty(query.shape[:3] if wants_entropy else 0)
        stats = q.new_zeros(*query.shape[:3], 5)
        if q.numel() == 0:
            return out.to(query.dtype), entropy, stats
        order, counts = _order(mask, batch, entries, q.device)
        k = _packed(keys, order, batch)
        blocks = launch.ATTENTION.blocks
        programs = batch * heads * triton.cdiv(queries, launch.ATTENTION_STATISTICS.blocks["QUERIES"])
        selects = 0 < top_k < entries
        scores = q.new_full((*query.shape[:3], entries), -torch.inf) if selects else q.new_empty(0)
        launch.launch(
            statistics_of_queries, programs, launch.ATTENTION_STATISTICS,
            q, k, counts, stats, entropy, scores, *sizes, ENTROPY=wants_entropy, SCORES=selects,
        )  # fmt: skip
        if values is None:
            return out.to(query.dtype), entropy, stats
        cut = torch.full_like(stats[..., 0], -torch.inf)
        if selects:
            strongest = scores.topk(top_k, dim=-1).values[..., -1]
            # A little below the last of them: a score found again may differ in its last bit.
            cut = strongest - strongest.abs() * 2e-7
        if threshold > 0:
            # Not math.log: it would turn a threshold held as a symbol into a constant.
            cut = torch.maximum(cut, stats[..., 0] - stats[..., 1].log() + torch.full_like(cut, threshold).log())
        stats[..., 2] = cut
        programs = batch * heads * triton.cdiv(queries, blocks["QUERIES"]) * triton.cdiv(dim, blocks["OUT"])
        launch.launch(
            attend, programs, launch.ATTENTION, q, k, _packed(values, order, batch), counts, stats, out, *sizes
        )
        return out.to(query.dtype), entropy, stats


def cross_image_attention_backward(
    grad: Tensor, grad_entropy: Tensor | None, query: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None,
    out: Tensor, stats: Tensor, scale: float, wants_query: bool, wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, dim = query.shape
    entries = keys.shape[-2]
    sizes = (heads, queries, entries, dim, scale or dim**-0.5)
    attended = values is not None
    constants = {"ATTENDED": attended, "ENTROPY": grad_entropy is not None}
    with torch.cuda.device_of(query):
        q = query.resolve_neg().to(torch.float32).contiguous()
        g = grad.resolve_neg().to(torch.float32).contiguous() if attended else q
        delta = (g * out).sum(-1) if attended else stats
        e = stats if grad_entropy is None else grad_entropy.to(torch.float32).contiguous()
        order, counts = _order(mask, batch, entries, q.device)
        k = _packed(keys, order, batch)
        v = k if values is None else _packed(values, order, batch)
        stats = stats.contiguous()
        grad_query = torch.empty_like(q) if wants_query else q.new_empty(0)
        blocks = launch.ATTENTION_GRADIENT.blocks
        parts = triton.cdiv(dim, blocks["OUT"])
        if wants_query and q.numel():
            programs = batch * heads * triton.cdiv(queries, blocks["QUERIES"]) * parts
            launch.launch(
                gradient_of_queries, programs, launch.ATTENTION_GRADIENT,
                g, e, delta, q, k, v, counts, stats, grad_query, *sizes, **constants,
            )  # fmt: skip
        of_keys = torch.empty_like(k) if wants_memory else k.new_empty(0)
        of_values = torch.empty_like(k) if wants_memory and attended else k.new_empty(0)
        if wants_memory and k.numel():
            programs = batch * heads * triton.cdiv(entries, blocks["ENTRIES"]) * parts
            launch.launch(
                gradient_of_memory, programs, launch.ATTENTION_GRADIENT,
                g, e, delta, q, k, v, counts, stats, of_keys, of_values, *sizes, **constants,
            )  # fmt: skip
        like_values = keys if values is None else values
        return (
            grad_query.to(query.dtype),
            _unpacked(of_keys, order, keys) if wants_memory else of_keys.to(keys.dtype),
            _unpacked(of_values, order, like_values) if of_values.dim() > 1 else of_values.to(like_values.dtype),
        )


def _unpacked(found: Tensor, order: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of packed entries, [B, heads, M, d], for `like`, [B, heads, M, d] or [heads, M, d]."""
    if order is not None:
        found = found.gather(2, order.argsort(dim=1)[:, None, :, None].expand(found.shape))
    return (found.sum(0) if like.dim() == 3 else found).to(like.dtype)
