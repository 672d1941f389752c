"""`cross_image_attention` and its module beside torch's attention over all and over compacted entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk
from benchmarks import sizes
from benchmarks.cases import Aim, Case, Inputs, Way, on_gpu
from benchmarks.device import Work
from benchmarks.measure import with_pytest
from benchmarks.sizes import Size

CAPACITY = 64
CLASSES = 21


def crops(batch: int, dim: int) -> Size:
    """MCIC's crops of 321 at stride 8."""
    return Size(f"41x41 batch {batch} d {dim}", 41, 41, batch=batch, dim=dim)


VGG, RESNET = crops(4, 512), crops(4, 2048)


def whole_memory(batch: int) -> Tensor:
    """[B, CLASSES] bool: the background and two classes of each image."""
    present = torch.zeros(batch, CLASSES, dtype=torch.bool)
    for b in range(batch):
        present[b, [0, 1 + b % 10, 11 + b % 10]] = True
    return present


def _pulled(batch: int) -> Tensor:
    """[B, 3] bool: the background and the one class of each image, of two in the batch."""
    return torch.tensor([[True, b % 2 == 0, b % 2 == 1] for b in range(batch)])


def memory_inputs(size: Size, entries: int, present: Callable[[int], Tensor] | None = None) -> Inputs:
    """present: the classes of each image, CAPACITY entries a class; without it all entries are allowed."""
    generator = torch.Generator().manual_seed(0)
    feats = sizes.features(size)
    memory = torch.randn(entries, size.dim, generator=generator) * 0.3
    mask = None if present is None else present(size.batch).repeat_interleave(CAPACITY, 1)
    grad = torch.randn(size.batch, 1, size.height * size.width, size.dim, generator=generator)
    return {"query": feats.flatten(2).transpose(1, 2)[:, None].contiguous(), "memory": memory, "mask": mask,
            "grad": grad, "feats": feats}  # fmt: skip


def _both_ways(attend: Callable[..., Tensor]) -> Callable[[Inputs], Callable[[], Sequence[Tensor]]]:
    """Result and gradients of query, keys and values."""

    def prepare(inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
        query = inputs["query"].detach().clone().requires_grad_()
        keys, values = (inputs["memory"][None].detach().clone().requires_grad_() for _ in range(2))

        def run() -> Sequence[Tensor]:
            out = attend(query, keys, values, inputs["mask"])
            return [out.detach(), *torch.autograd.grad(out, [query, keys, values], inputs["grad"].to(out.dtype))]

        return run

    return prepare


def masked(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    batch, _, queries, _ = query.shape
    allowed = None if mask is None else mask[:, None, None].expand(batch, 1, queries, -1)
    copies = (x.expand(batch, -1, -1, -1) for x in (keys, values))
    return F.scaled_dot_product_attention(query, *copies, attn_mask=allowed)


def compacted(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """As many entries an image here, so that they fit one tensor."""
    if mask is None:
        return masked(query, keys, values, None)
    chosen = torch.stack([row.nonzero()[:, 0] for row in mask])
    return F.scaled_dot_product_attention(query, keys[0][chosen][:, None], values[0][chosen][:, None])


def eager(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return wk.reference.cross_image_attention(query, keys, values, mask=mask)  # type: ignore[return-value]


def _ours(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return wk.cross_image_attention(query, keys, values, mask=mask)  # type: ignore[return-value]


def _expected(inputs: Inputs) -> Sequence[Tensor]:
    return _both_ways(eager)({**inputs, "query": inputs["query"].double(), "memory": inputs["memory"].double()})()


def _op_case(size: Size, entries: int, aims: tuple[Aim, ...] = (), *, quick: bool = False) -> Case:
    present = whole_memory if entries == CLASSES * CAPACITY else None
    return Case(
        name=f"attention {size.name}, {entries} entries, forward and backward",
        op="cross_image_attention",
        groups=("memory-attention",),
        size=size,
        channels=1,
        inputs=lambda size: memory_inputs(size, entries, present),
        expected=_expected,
        ways=(
            Way("ours", "ours", _both_ways(_ours)),
            Way("SDPA, mask", "library", _both_ways(masked)),
            Way("SDPA, compacted", "library", _both_ways(compacted)),
            Way("torch eager", "library", _both_ways(eager)),
            Way("torch.compile", "library", _both_ways(torch.compile(eager))),
        ),
        aims=aims,
        quick=quick,
        by_image=False,
    )


# The module -----------------------------------------------------------------------------------------------------------


def _among(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)


def published(module: wk.CrossImageAttention, feats: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """The published module: a copy of the memory for each image, everything projected."""
    batch, dim, height, width = feats.shape
    copies = memory.expand(batch, -1, -1)
    query = module.q_proj(feats.flatten(2).transpose(1, 2)) * dim**-0.5
    scores = query @ module.k_proj(copies).transpose(1, 2)
    out = module.out_proj(_among(scores, mask).softmax(-1) @ module.v_proj(copies))
    return out.transpose(1, 2).reshape(batch, dim, height, width)


def folded(module: wk.CrossImageAttention, feats: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """The projections moved to the memory, in plain PyTorch."""
    batch, dim, height, width = feats.shape
    keys = module.k_proj(memory)
    queries = feats.flatten(2).transpose(1, 2)
    scores = (queries @ (keys @ module.q_proj.weight).t() + keys @ module.q_proj.bias) * dim**-0.5
    out = _among(scores, mask).softmax(-1) @ (module.v_proj(memory) @ module.out_proj.weight.t()) + module.out_proj.bias
    return out.transpose(1, 2).reshape(batch, dim, height, width)


def _module_way(attend: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    def prepare(inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
        torch.manual_seed(0)
        module = wk.CrossImageAttention(inputs["feats"].shape[1]).to(inputs["feats"].device, dtype)
        feats = inputs["feats"].to(dtype).requires_grad_()
        memory = inputs["memory"].to(dtype)
        grad = inputs["grad"][:, 0].transpose(1, 2).reshape(feats.shape).to(dtype)
        # The keys' bias has no gradient but rounding.
        wanted = [p for name, p in module.named_parameters() if name != "k_proj.bias"]

        def run() -> Sequence[Tensor]:
            out = attend(module, feats, memory, inputs["mask"])
            return [out.detach(), *torch.autograd.grad(out, [feats, *wanted], grad)]

        return run

    return prepare


def _call(module: wk.CrossImageAttention, feats: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    return module(feats, memory, mask)


def _module_case(
    size: Size,
    entries: int,
    aims: tuple[Aim, ...] = (),
    present: Callable[[int], Tensor] | None = None,
    *,
    only_full: bool = False,
) -> Case:
    allowed = "" if present is None else ", each image's classes"
    return Case(
        name=f"module {size.name}, {entries} entries{allowed}, forward and backward",
        op="cross_image_attention",
        groups=("memory-attention",),
        size=size,
        channels=1,
        inputs=lambda size: memory_inputs(size, entries, present),
        expected=lambda inputs: _module_way(published, torch.float64)(inputs)(),
        ways=(
            Way("ours", "ours", _module_way(_call), tolerance=3e-5),
            Way("module, published", "published", _module_way(published), tolerance=1e-4),
            Way("torch, folded", "library", _module_way(folded), tolerance=1e-4),
        ),
        aims=aims,
        only_full=only_full,
        by_image=False,
    )


def attention_work(size: Size, entries: int, products: int, vectors: int) -> Work:
    """Of products between each query and the entries of its image; of vectors a query read and written."""
    values = sizes.pixels(size) * size.dim
    return Work(flop=0, bytes=4 * vectors * values, products=2 * products * entries * values)


def _faster(published: float) -> tuple[Aim, ...]:
    return Aim("module, published", "ratio", least=published), Aim("torch, folded", "ratio", least=1.0)


CASES: list[Case] = [
    _op_case(
        VGG, CLASSES * CAPACITY, (Aim("SDPA, mask", "ratio", least=6), Aim("SDPA, compacted", "ratio", least=1.2))
    ),
    _op_case(VGG, 192, quick=True),
    _module_case(VGG, 192, _faster(5)),
    _module_case(VGG, 192, _faster(5), _pulled),  # as MCIC trains
    _module_case(RESNET, 192, _faster(7), only_full=True),
]
GPU_CASES: list[Case] = [
    on_gpu(_op_case(VGG, CLASSES * CAPACITY), attention_work(VGG, 192, 6, 4)),
    *(
        on_gpu(
            _op_case(crops(batch, 512), CLASSES * CAPACITY),
            attention_work(crops(batch, 512), 192, 6, 4),
            without=("torch.compile",),
        )
        for batch in (1, 32)
    ),
    *(on_gpu(_module_case(size, 192), attention_work(size, 192, 6, 4)) for size in (VGG, RESNET)),
]


def test_cross_image_attention(benchmark: Any, case: Case, way: Way) -> None:
    with_pytest(benchmark, case, way)
