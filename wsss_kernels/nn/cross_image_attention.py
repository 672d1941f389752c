"""Attention of an image's features to the memory of other images, with projections."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_kernels import _check
from wsss_kernels.ops.cross_image_attention import cross_image_attention
from wsss_kernels.ops.map_attention import map_attention


class CrossImageAttention(torch.nn.Module):
    """Multi-head attention whose keys and values come from a memory shared by the batch.

        out = softmax((f W_q^T + b_q)(m W_k^T + b_k)^T / sqrt(dim / heads)) (m W_v^T + b_v) W_o^T + b_o

    over the entries the mask allows; a query without any gives b_o. The memory is far smaller than the queries, so the
    projections of these are moved to it, which changes nothing but the rounding:

        (f W_q^T + b_q) . (W_k m + b_k) = f . (W_q^T (W_k m + b_k)) + b_q . W_k m + a part that is the same for all m

    and the values take W_o before they are summed. With more than one head each has its own keys and values of all
    channels; the projections are folded where that is less work, else applied to the queries as written. Weights have
    the names, shapes and meaning of the published module (`q_proj`, `k_proj`, `v_proj`, `out_proj`).

    Args:
        dim: channels of features and memory.
        num_heads: divides dim.
        top_k, threshold: as of `cross_image_attention`.

    Source: Fan and Zhang, Memory-based Cross-image Contexts, TPAMI 2022; the folding is ours.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> attention, bank = wk.CrossImageAttention(8), wk.MemoryBank(3, 8, capacity=4)
        >>> bank.push(torch.randn(5, 8), torch.tensor([0, 0, 1, 2, 2]))
        >>> memory, _, mask = bank.pull(torch.tensor([[1, 1, 0], [1, 0, 1]]))
        >>> attention(torch.randn(2, 8, 6, 7), memory, mask).shape
        torch.Size([2, 8, 6, 7])
    """

    def __init__(
        self, dim: int, num_heads: int = 1, *, top_k: int | None = None, threshold: float | None = None
    ) -> None:
        super().__init__()
        self.dim = _check.whole("dim", dim, "a whole number >= 1 (channels)", least=1)
        self.num_heads = _check.whole("num_heads", num_heads, "a whole number >= 1 that divides dim", least=1)
        if dim % num_heads:
            raise ValueError(f"num_heads must be a whole number >= 1 that divides dim ({dim}), got {num_heads}")
        self.top_k, self.threshold = top_k, threshold
        self.q_proj, self.k_proj = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
        self.v_proj, self.out_proj = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            torch.nn.init.xavier_normal_(linear.weight)
            torch.nn.init.zeros_(linear.bias)

    def forward(
        self, feats: Tensor, memory: Tensor, mask: Tensor | None = None, *, return_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The context of every pixel.

        Args:
            feats: [B, dim, H, W] floating point.
            memory: [M, dim], such as `MemoryBank.pull` gives.
            mask: [B, M] bool, True: may be used. None: all.
            return_entropy: also the entropy of the attention, a number.

        Returns:
            [B, dim, H, W], in the dtype of feats.

        Raises:
            TypeError, ValueError: an argument outside this contract, named.
        """
        _check.tensor("feats", feats, "B dim H W")
        _check.tensor("memory", memory, "M dim")
        for name, tensor in (("feats", feats), ("memory", memory)):
            if tensor.shape[1] != self.dim:
                raise ValueError(f"{name} must have {self.dim} channels, got {_check.describe(tensor)}")
        batch, dim, height, width = feats.shape
        # A folding costs heads M dim^2 and makes the attention's products heads times as long; a projection of the
        # queries costs B H W dim^2. There are two of each.
        entries, pixels, heads = memory.shape[0], batch * height * width, self.num_heads
        folded = heads * entries * dim + (heads - 1) * pixels * entries <= pixels * dim
        attend = self._fold if folded else self._project
        out, entropy = attend(feats.flatten(2), memory.to(self.k_proj.weight.dtype), mask, return_entropy)
        out = out.reshape(batch, dim, height, width).to(feats.dtype)
        return out if entropy is None else (out, entropy)

    def _fold(
        self, feats: Tensor, memory: Tensor, mask: Tensor | None, return_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        heads, own = self.num_heads, self.dim // self.num_heads
        keys = self.k_proj(memory).view(-1, heads, own).transpose(0, 1)  # [heads, M, own]
        values = self.v_proj(memory).view(-1, heads, own).transpose(0, 1)
        return map_attention(
            feats,
            keys @ self.q_proj.weight.view(heads, own, self.dim),  # [heads, M, dim]
            values @ self.out_proj.weight.view(self.dim, heads, own).permute(1, 2, 0),
            (keys @ self.q_proj.bias.view(heads, own, 1))[..., 0],
            self.out_proj.bias, mask=mask, scale=own**-0.5, top_k=self.top_k, threshold=self.threshold,
            return_entropy=return_entropy,
        )  # fmt: skip

    def _project(
        self, feats: Tensor, memory: Tensor, mask: Tensor | None, return_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        def by_heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

        query = self.q_proj(feats.transpose(1, 2).to(self.q_proj.weight.dtype))
        found = cross_image_attention(
            by_heads(query), by_heads(self.k_proj(memory)), by_heads(self.v_proj(memory)), mask=mask,
            scale=(self.dim // self.num_heads) ** -0.5, top_k=self.top_k, threshold=self.threshold,
            return_entropy=return_entropy,
        )  # fmt: skip
        out, entropy = found if isinstance(found, tuple) else (found, None)
        out = self.out_proj(out.transpose(1, 2).flatten(2).to(self.out_proj.weight.dtype))
        return out.transpose(1, 2), entropy

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, top_k={self.top_k}, threshold={self.threshold}"
