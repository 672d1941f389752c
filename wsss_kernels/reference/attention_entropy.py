from __future__ import annotations

from torch import Tensor

from wsss_kernels.reference.cross_image_attention import mean_entropy, scores_and_softmax


def attention_entropy(query: Tensor, keys: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Meaning of `wsss_kernels.attention_entropy`, written for reading, not for speed."""
    return mean_entropy(scores_and_softmax(query, keys, mask, scale)[1]).to(query.dtype)
