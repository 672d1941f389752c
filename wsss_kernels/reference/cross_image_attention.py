from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5  # inside the entropy's logarithm


def cross_image_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Meaning of `wsss_kernels.cross_image_attention`, written for reading, not for speed."""
    scores, weights = scores_and_softmax(query, keys, mask, scale)
    kept = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[:, None, None].expand_as(scores)
    if top_k is not None and top_k < scores.shape[-1]:
        kept = kept & ~(scores < scores.topk(top_k, dim=-1).values[..., -1:])
    if threshold is not None:
        kept = kept & ~(weights < threshold)
    out = masked_softmax(scores.masked_fill(~kept, -torch.inf), kept) @ memory(values, scores)
    out = out.to(query.dtype)
    if not return_entropy:
        return out
    return out, mean_entropy(weights).to(query.dtype)


def scores_and_softmax(query: Tensor, keys: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """[B, heads, S, M] each; scores are -infinity, weights 0 where the mask forbids."""
    query = query.float() if query.dtype.itemsize < 4 else query
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ memory(keys, query).transpose(-2, -1)
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[:, None, None].expand_as(scores)
    scores = scores.masked_fill(~allowed, -torch.inf)
    return scores, masked_softmax(scores, allowed)


def masked_softmax(scores: Tensor, kept: Tensor) -> Tensor:
    """Softmax over the last axis; 0 where kept is not, in rows without any too."""
    some = kept.any(-1, keepdim=True)
    return scores.masked_fill(~some, 0.0).softmax(-1).masked_fill(~kept, 0.0)


def mean_entropy(weights: Tensor) -> Tensor:
    if weights.numel() == 0:  # no queries or no entries
        return weights.sum()
    return -(weights * (weights + LEAST).log()).sum(-1).mean()


def memory(entries: Tensor, like: Tensor) -> Tensor:
    return entries.to(like.dtype)
