# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of soft_histogram in Triton: scores of words and pixels live in registers alone.

Products of half precision inputs are exact; those of float32 keep its precision on tensor cores too (launch.precision),
since the assignment is decided by them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_kernels.reference.soft_histogram import ZERO
from wsss_kernels.triton import launch
from wsss_kernels.triton.launch import kernel

# Bytes of the gradient of the scores that exist at once, for a few images; they stay in a large GPU's cache.
_SLOPE_BYTES = 32 << 20


@triton.jit
def products(
    feats, codebook, word, pixel, dim, pixels, words,
    WORDS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[WORDS, PIXELS] inner products of words and pixels of one image, and the pixels' squares."""
    scores = tl.zeros([WORDS, PIXELS], tl.float32)
    squares = tl.zeros([PIXELS], tl.float32)
    for first in range(0, dim, DEPTH):
        channel = first + tl.arange(0, DEPTH)
        held = (channel[:, None] < dim) & (pixel[None, :] < pixels)
        f = tl.load(feats + (channel.to(tl.int64)[:, None] * pixels + pixel[None, :]), mask=held, other=0.0)
        known = (word[:, None] < words) & (channel[None, :] < dim)
        c = tl.load(codebook + (word.to(tl.int64)[:, None] * dim + channel[None, :]), mask=known, other=0.0)
        scores = tl.dot(c, f, scores, input_precision=PRECISION)
        wide = f.to(tl.float32)
        squares += tl.sum(wide * wide, axis=0)
    return scores, squares


@triton.jit
def shares(
    feats, codebook, word_norms, word, pixel, norm, log_sum, temperature, dim, pixels, words,
    WORDS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosines and softmax [WORDS, PIXELS] from what the forward kept of each pixel; shares of words not there are 0."""
    scores, _ = products(feats, codebook, word, pixel, dim, pixels, words, WORDS, PIXELS, DEPTH, PRECISION)
    known = word < words
    cosine = scores * tl.load(word_norms + word.to(tl.int64), mask=known, other=0.0)[:, None] * norm[None, :]
    share = tl.exp(cosine * temperature - log_sum[None, :])
    return cosine, tl.where(known[:, None] & (pixel < pixels)[None, :], share, 0.0)


@kernel
def assign_pixels(
    feats, codebook, word_norms, assignment, inverse_norm, log_sum, bins, temperature, dim, pixels, words,
    ONE: tl.constexpr,
    WORDS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of pixels, all words in turn; with ONE block of words their bins too: [programs, M]."""
    blocks = tl.cdiv(pixels, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    inside = pixel < pixels
    feats += image * dim * pixels
    best = tl.full([PIXELS], float("-inf"), tl.float32)
    place = tl.zeros([PIXELS], tl.int32)
    total = tl.zeros([PIXELS], tl.float32)
    norm = tl.zeros([PIXELS], tl.float32)
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS)
        known = (word < words)[:, None]
        scores, squares = products(feats, codebook, word, pixel, dim, pixels, words, WORDS, PIXELS, DEPTH, PRECISION)
        length = tl.sqrt(squares)
        norm = tl.where(length <= 1e-12, 0.0, 1.0 / length)
        scores = scores * tl.load(word_norms + word.to(tl.int64), mask=word < words, other=0.0)[:, None] * norm[None, :]
        scores = tl.where(known, scores, float("-inf"))
        # NaN above all, as in torch; the lowest word among equals.
        broken = scores != scores
        any_broken = tl.max(broken.to(tl.int32), axis=0) > 0
        peak = tl.max(tl.where(broken, float("-inf"), scores), axis=0)
        at_peak = tl.where(any_broken[None, :], broken, scores == peak[None, :])
        chosen = tl.min(tl.where(at_peak, word[:, None], 2147483647), axis=0)
        peak = tl.where(any_broken, float("nan"), peak)
        larger = (peak > best) | (any_broken & (best == best))
        now = tl.where(larger, peak, best)
        earlier = tl.where(best == float("-inf"), 0.0, total * tl.exp((best - now) * temperature))
        parts = tl.where(known, tl.exp((scores - now[None, :]) * temperature), 0.0)
        total = earlier + tl.sum(parts, axis=0)
        place = tl.where(larger, chosen, place)
        best = now
        if ONE:
            share = tl.where(inside[None, :], parts / total[None, :], 0.0)
            at = tl.program_id(0).to(tl.int64) * words + word
            tl.store(bins + at, tl.sum(share, axis=1), mask=word < words)
    at = image * pixels + pixel
    tl.store(assignment + at, place.to(tl.int64), mask=inside)
    tl.store(inverse_norm + at, norm, mask=inside)
    tl.store(log_sum + at, best * temperature + tl.log(total), mask=inside)


@kernel
def sum_bins(
    feats, codebook, word_norms, inverse_norm, log_sum, bins, temperature, dim, pixels, words,
    WORDS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of pixels and a block of words: bins [pixel blocks, M]."""
    columns = tl.cdiv(words, WORDS)
    row = tl.program_id(0) // columns
    blocks = tl.cdiv(pixels, PIXELS)
    image = (row // blocks).to(tl.int64)
    pixel = (row % blocks * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    word = tl.program_id(0) % columns * WORDS + tl.arange(0, WORDS)
    at = image * pixels + pixel
    norm = tl.load(inverse_norm + at, mask=pixel < pixels, other=0.0)
    log = tl.load(log_sum + at, mask=pixel < pixels, other=0.0)
    _, share = shares(
        feats + image * dim * pixels, codebook, word_norms, word, pixel, norm, log, temperature, dim, pixels, words,
        WORDS, PIXELS, DEPTH, PRECISION,
    )  # fmt: skip
    tl.store(bins + (row.to(tl.int64) * words + word), tl.sum(share, axis=1), mask=word < words)


@kernel
def mean_gradients(
    feats, codebook, word_norms, grad, inverse_norm, log_sum, means, along, temperature, dim, pixels, words,
    WORDS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of pixels: the mean of grad by shares, and the sum of slope * cosine, of each pixel."""
    blocks = tl.cdiv(pixels, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    inside = pixel < pixels
    at = image * pixels + pixel
    norm = tl.load(inverse_norm + at, mask=inside, other=0.0)
    log = tl.load(log_sum + at, mask=inside, other=0.0)
    mean = tl.zeros([PIXELS], tl.float32)
    weighted = tl.zeros([PIXELS], tl.float32)
    cosines = tl.zeros([PIXELS], tl.float32)
    for first in range(0, words, WORDS):
        word = first + tl.arange(0, WORDS)
        cosine, share = shares(
            feats + image * dim * pixels, codebook, word_norms, word, pixel, norm, log, temperature, dim, pixels,
            words, WORDS, PIXELS, DEPTH, PRECISION,
        )  # fmt: skip
        g = tl.load(grad + (image * words + word), mask=word < words, other=0.0)[:, None]
        mean += tl.sum(share * g, axis=0)
        weighted += tl.sum(share * g * cosine, axis=0)
        cosines += tl.sum(share * cosine, axis=0)
    tl.store(means + at, mean, mask=inside)
    tl.store(along + at, temperature * (weighted - mean * cosines), mask=inside)


@kernel
def slopes_of_scores(
    feats, codebook, word_norms, grad, inverse_norm, log_sum, means, slopes, temperature, dim, pixels, words,
    WORDS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a block of pixels and a block of words: slopes [images, M, N] of the cosines, times 1 / |f|."""
    columns = tl.cdiv(words, WORDS)
    row = tl.program_id(0) // columns
    blocks = tl.cdiv(pixels, PIXELS)
    image = (row // blocks).to(tl.int64)
    pixel = (row % blocks * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    word = tl.program_id(0) % columns * WORDS + tl.arange(0, WORDS)
    inside = pixel < pixels
    at = image * pixels + pixel
    norm = tl.load(inverse_norm + at, mask=inside, other=0.0)
    log = tl.load(log_sum + at, mask=inside, other=0.0)
    mean = tl.load(means + at, mask=inside, other=0.0)
    _, share = shares(
        feats + image * dim * pixels, codebook, word_norms, word, pixel, norm, log, temperature, dim, pixels, words,
        WORDS, PIXELS, DEPTH, PRECISION,
    )  # fmt: skip
    g = tl.load(grad + (image * words + word), mask=word < words, other=0.0)
    slope = temperature * share * (g[:, None] - mean[None, :]) * norm[None, :]
    place = (image * words + word)[:, None] * pixels + pixel[None, :]
    tl.store(slopes + place, slope, mask=(word < words)[:, None] & inside[None, :])


def _operands(feats: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """feats [B, D, N] and codebook of one type, half precision where both are, and 1 / |word|."""
    dtype = feats.dtype if feats.dtype == codebook.dtype else torch.float32
    x, c = (tensor.resolve_neg().to(dtype).contiguous() for tensor in (feats, codebook))
    length = c.to(torch.float32).norm(dim=1)
    return x.flatten(2), c, torch.where(length <= ZERO, 0.0, 1 / length)


def soft_histogram(
    feats: Tensor, codebook: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = feats.shape
    with torch.cuda.device_of(feats):
        x, c, norms = _operands(feats, codebook)
        dim, pixels, count = x.shape[1], x.shape[2], c.shape[0]
        assignment = x.new_empty(batch, height, width, dtype=torch.int64)
        inverse_norm, log_sum = (x.new_empty(batch, height, width, dtype=torch.float32) for _ in range(2))
        configuration = launch.histogram(count)
        blocks = triton.cdiv(pixels, configuration.blocks["PIXELS"])
        bins = x.new_empty(batch, blocks, count, dtype=torch.float32)
        one = count <= configuration.blocks["WORDS"]
        launch.launch(
            assign_pixels, batch * blocks, configuration, x, c, norms, assignment, inverse_norm, log_sum, bins,
            float(temperature), dim, pixels, count, ONE=one,
        )  # fmt: skip
        if not one:
            columns = triton.cdiv(count, configuration.blocks["WORDS"])
            launch.launch(
                sum_bins, batch * blocks * columns, configuration, x, c, norms, inverse_norm, log_sum, bins,
                float(temperature), dim, pixels, count,
            )  # fmt: skip
        words = torch.zeros(batch, count, dtype=torch.bool, device=x.device)
        words = words.scatter(1, assignment.flatten(1), True)
        return bins.sum(1).to(feats.dtype), words, assignment, inverse_norm, log_sum


def soft_histogram_backward(
    grad: Tensor,
    feats: Tensor,
    codebook: Tensor,
    inverse_norm: Tensor,
    log_sum: Tensor,
    temperature: float,
    wants_feats: bool,
    wants_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Slopes of a few images at a time, and from them both gradients by torch's products."""
    with torch.cuda.device_of(feats):
        x, c, norms = _operands(feats, codebook)
        batch, dim, pixels = x.shape
        count = c.shape[0]
        g = grad.to(torch.float32).contiguous()
        inverse_norm, log_sum = inverse_norm.contiguous(), log_sum.contiguous()
        means, along = (x.new_empty(batch, pixels, dtype=torch.float32) for _ in range(2))
        configuration = launch.histogram(count)
        blocks = triton.cdiv(pixels, configuration.blocks["PIXELS"])
        columns = triton.cdiv(count, configuration.blocks["WORDS"])
        launch.launch(
            mean_gradients, batch * blocks, configuration, x, c, norms, g, inverse_norm, log_sum, means, along,
            float(temperature), dim, pixels, count,
        )  # fmt: skip
        unit = c.to(torch.float32) * norms[:, None]
        grad_feats = torch.empty_like(x) if wants_feats else x.new_empty(0)
        grad_unit = unit.new_zeros(count, dim)
        images = max(1, _SLOPE_BYTES // max(4 * count * pixels, 1))
        for first in range(0, batch, images):
            part = slice(first, first + images)
            held = x[part]
            slopes = x.new_empty(len(held), count, pixels, dtype=torch.float32)
            launch.launch(
                slopes_of_scores, len(held) * blocks * columns, configuration, held, c, norms, g[part],
                inverse_norm[part], log_sum[part], means[part], slopes, float(temperature), dim, pixels, count,
            )  # fmt: skip
            if wants_codebook:
                for slope, image in zip(slopes, held, strict=True):
                    grad_unit.addmm_(slope, image.to(torch.float32).mT)
            if wants_feats:
                pull = (inverse_norm[part].flatten(1).square() * along[part])[:, None]
                grad_feats[part] = (unit.mT @ slopes - pull * held).to(x.dtype)
        if not wants_codebook:
            return grad_feats.view(feats.shape).to(feats.dtype), c.new_empty(0, dtype=codebook.dtype)
        grad_codebook = norms[:, None] * (grad_unit - unit * (unit * grad_unit).sum(1, keepdim=True))
        grad_feats = grad_feats.view(feats.shape) if wants_feats else grad_feats
        return grad_feats.to(feats.dtype), grad_codebook.to(codebook.dtype)
