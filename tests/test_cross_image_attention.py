"""cross_image_attention: against the float64 reference, by hand, and their contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import wsss_kernels as wk
from wsss_kernels import reference

SHAPES = (  # batch, heads, queries, entries, channels, shared
    (2, 2, 50, 37, 20, True),
    (2, 1, 81, 100, 64, False),
    (3, 2, 19, 130, 33, True),
    (1, 3, 200, 70, 7, False),
    (2, 1, 1, 1, 1, True),
    (2, 2, 73, 65, 129, True),
)
OPTIONS = ({}, {"top_k": 3}, {"threshold": 0.03}, {"top_k": 6, "threshold": 0.04, "scale": 0.7})


def scene(batch, heads, queries, entries, dim, shared, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + queries + entries)
    query = torch.randn(batch, heads, queries, dim, generator=generator, dtype=torch.float64)
    own = (heads, entries, dim) if shared else (batch, heads, entries, dim)
    keys = torch.randn(own, generator=generator, dtype=torch.float64)
    values = torch.randn(own, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, entries, generator=generator) < 0.6
    return *(x.to(dtype) for x in (query, keys, values)), mask


def error(found, right):
    return (found.double() - right).abs().max().item() / max(right.abs().max().item(), 1e-30)


def by_rows(query, keys, values, mask, scale, top_k, threshold):
    """Query by query, without the reference's masks: only the entries kept exist."""
    out = torch.zeros_like(query)
    for b, h, s in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        entries = mask[b].nonzero()[:, 0]
        if len(entries) == 0:
            continue
        own = keys[h] if keys.dim() == 3 else keys[b, h]
        weights = (own[entries] @ query[b, h, s] * scale).softmax(0)
        order = weights.argsort(descending=True)[:top_k]
        order = order[weights[order] >= threshold]
        content = values[h] if values.dim() == 3 else values[b, h]
        if len(order):
            out[b, h, s] = weights[order] / weights[order].sum() @ content[entries[order]]
    return out


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("top_k, threshold", [(100, 0.0), (3, 0.0), (100, 0.1), (4, 0.15)])
def test_reference_row_by_row(top_k, threshold, shared):
    query, keys, values, mask = scene(3, 2, 9, 14, 5, shared, torch.float64)
    mask[1] = False
    found = reference.cross_image_attention(query, keys, values, mask=mask, scale=0.8, top_k=top_k, threshold=threshold)
    assert_close(found, by_rows(query, keys, values, mask, 0.8, top_k, threshold))


def test_reference_is_torchs_attention():
    query, keys, values, _ = scene(2, 2, 9, 14, 5, False, torch.float64)
    assert_close(wk.cross_image_attention(query, keys, values), F.scaled_dot_product_attention(query, keys, values))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_against_float64(shape, options):
    tensors = scene(*shape)
    mask = tensors[3]
    ours = [x.clone().requires_grad_() for x in tensors[:3]]
    right = [x.double().requires_grad_() for x in tensors[:3]]
    out, entropy = wk.cross_image_attention(*ours, mask=mask, return_entropy=True, **options)
    expected, expected_entropy = reference.cross_image_attention(*right, mask=mask, return_entropy=True, **options)
    assert error(out, expected.detach()) < 1e-5 and error(entropy, expected_entropy.detach()) < 1e-5
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    ((out * grad).sum() + 20 * entropy).backward()
    ((expected * grad.double()).sum() + 20 * expected_entropy).backward()
    for x, y in zip(ours, right, strict=True):
        assert error(x.grad, y.grad) < 1e-5


def test_by_hand(device):
    query = torch.tensor([[[[1.0, 0.0]]]], device=device)
    keys = torch.tensor([[[math.log(2.0), 5.0], [0.0, -3.0], [math.log(5.0), 9.0]]], device=device)
    values = torch.tensor([[[3.0, 0.0], [0.0, 6.0], [80.0, 80.0]]], device=device)
    only = torch.tensor([[True, True, False]], device=device)
    out, entropy = wk.cross_image_attention(query, keys, values, mask=only, scale=1.0, return_entropy=True)
    assert_close(out.flatten().cpu(), torch.tensor([2.0, 2.0]))  # weights 2/3, 1/3
    assert_close(entropy.cpu(), torch.tensor(math.log(3) - 2 / 3 * math.log(2)), atol=3e-5, rtol=0)
    kept = wk.cross_image_attention(query, keys, values, scale=1.0, threshold=0.2)  # 2/8, 1/8, 5/8: 2/7 and 5/7
    assert_close(kept.flatten().cpu(), torch.tensor([406 / 7, 400 / 7]))
    assert_close(wk.cross_image_attention(query, keys, values, scale=1.0, top_k=1).cpu(), values[None, :, 2:].cpu())
    nothing = wk.cross_image_attention(query, keys, values, scale=1.0, threshold=0.7)
    assert nothing.abs().max() == 0


def test_ties_with_the_last_of_the_strongest_stay():
    keys = torch.tensor([[[1.0], [2.0], [1.0], [0.0]]])
    out = wk.cross_image_attention(torch.zeros(1, 1, 1, 1), keys, keys, top_k=2)
    assert out.item() == 1.0
    query = torch.ones(1, 1, 1, 1)
    out = wk.cross_image_attention(query, keys, keys, top_k=2)
    weights = torch.tensor([1.0, 2.0, 1.0]).softmax(0)
    assert_close(out.item(), float(weights @ torch.tensor([1.0, 2.0, 1.0])))


def test_gradcheck_of_the_reference():
    query, keys, values, mask = scene(2, 2, 3, 5, 4, True, torch.float64)
    tensors = [x.requires_grad_() for x in (query, keys, values)]

    def attend(*tensors):
        return wk.cross_image_attention(*tensors, mask=mask, top_k=3, threshold=0.05, return_entropy=True)

    assert torch.autograd.gradcheck(attend, tensors)


def test_nothing_allowed_gives_zeros_and_no_gradient():
    query, keys, values, mask = scene(2, 1, 9, 11, 6, True)
    mask[0], mask[1] = False, True
    tensors = [x.requires_grad_() for x in (query, keys, values)]
    out, entropy = wk.cross_image_attention(*tensors, mask=mask, return_entropy=True)
    (out.sum() + entropy).backward()
    assert out[0].abs().max() == 0 and query.grad[0].abs().max() == 0 and out[1].abs().max() > 0
    assert all(x.grad.isfinite().all() for x in tensors)
    alone = wk.attention_entropy(query[1:], keys)
    assert_close(entropy, alone / 2)


def test_forbidden_entries_are_never_read():
    query, keys, values, mask = scene(2, 2, 30, 40, 16, True)
    mask[:, 7], mask[:, 39] = False, False
    clean = [x.clone().requires_grad_() for x in (query, keys, values)]
    spoilt = [x.clone() for x in (query, keys, values)]
    for tensor in spoilt[1:]:
        tensor[:, 7], tensor[:, 39] = float("nan"), float("inf")
    spoilt = [x.requires_grad_() for x in spoilt]
    outs = [wk.cross_image_attention(*x, mask=mask) for x in (clean, spoilt)]
    assert torch.equal(*outs)
    for out in outs:
        (out * out).sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(clean, spoilt, strict=True))
    assert clean[1].grad[:, 7].abs().max() == 0


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_nan_stays_where_it_belongs(options):
    query, keys, values, _ = scene(2, 1, 20, 30, 8, True)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 4] = False
    clean = wk.cross_image_attention(query, keys, values, mask=mask, **options)
    query = query.clone()
    query[0, 0, 3, 2] = float("nan")
    out = wk.cross_image_attention(query, keys, values, mask=mask, **options)
    assert out[0, 0, 3].isnan().all()
    assert torch.equal(out[0, 0, 4:], clean[0, 0, 4:]) and torch.equal(out[1], clean[1])
    keys = keys.clone()
    keys[0, 4, 1] = float("nan")
    out = wk.cross_image_attention(query, keys, values, mask=mask, **options)
    assert out[0].isnan().all() and torch.equal(out[1], clean[1])


def test_large_scores_do_not_overflow():
    query, keys, values, mask = scene(1, 1, 20, 30, 8, True)
    out = wk.cross_image_attention(query * 1e4, keys * 1e3, values, mask=mask)
    expected = reference.cross_image_attention(
        (query * 1e4).double(), (keys * 1e3).double(), values.double(), mask=mask
    )
    assert error(out, expected) < 1e-5


def test_same_bits_for_any_number_of_threads():
    query, keys, values, mask = scene(3, 2, 150, 90, 100, True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = [x.clone().requires_grad_() for x in (query, keys, values)]
            out, entropy = wk.cross_image_attention(*tensors, mask=mask, top_k=20, return_entropy=True)
            ((out * out).sum() + entropy).backward()
            found.append([out.detach(), entropy.detach(), *(x.grad for x in tensors)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_shared_memory_is_every_images_own():
    query, keys, values, mask = scene(3, 2, 17, 22, 12, True)
    shared = wk.cross_image_attention(query, keys, values, mask=mask)
    own = wk.cross_image_attention(query, keys.expand(3, -1, -1, -1), values.expand(3, -1, -1, -1), mask=mask)
    assert torch.equal(shared, own)
    for b in range(3):
        chosen = mask[b].nonzero()[:, 0]
        alone = wk.cross_image_attention(query[b : b + 1], keys[:, chosen], values[:, chosen])
        assert torch.equal(shared[b : b + 1], alone)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision(dtype, tolerance):
    query, keys, values, mask = scene(2, 1, 20, 30, 8, True, dtype)
    tensors = [x.requires_grad_() for x in (query, keys, values)]
    right = [x.detach().double().requires_grad_() for x in tensors]
    out, entropy = wk.cross_image_attention(*tensors, mask=mask, return_entropy=True)
    expected, _ = reference.cross_image_attention(*right, mask=mask, return_entropy=True)
    assert out.dtype == entropy.dtype == dtype and error(out, expected.detach()) < tolerance
    out.sum().backward()
    expected.sum().backward()
    for x, y in zip(tensors, right, strict=True):
        assert x.grad.dtype == dtype and error(x.grad, y.grad) < tolerance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (x.detach().float() for x in (query, keys, values))
        assert torch.equal(wk.cross_image_attention(q, k, v), wk.cross_image_attention(q, k, v))
        assert wk.cross_image_attention(q, k, v).dtype == torch.float32


def test_views_and_empty():
    query, keys, values, mask = scene(2, 2, 15, 12, 8, True)
    out = wk.cross_image_attention(query, keys, values, mask=mask)
    views = [x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in (query, keys, values)]
    assert torch.equal(wk.cross_image_attention(*views, mask=mask.t().contiguous().t()), out)
    for shape in ((0, 2, 5, 3, 4), (2, 0, 5, 3, 4), (2, 2, 0, 3, 4), (2, 2, 5, 0, 4)):
        batch, heads, queries, entries, dim = shape
        query = torch.zeros(batch, heads, queries, dim, requires_grad=True)
        memory = torch.zeros(heads, entries, dim, requires_grad=True)
        out, entropy = wk.cross_image_attention(query, memory, memory, return_entropy=True)
        (out.sum() + entropy).backward()
        assert out.shape == query.shape and entropy.item() == 0
        assert out.abs().sum() == 0 and query.grad.abs().sum() == 0 and memory.grad.shape == memory.shape
        expected = wk.cross_image_attention(query.double(), memory.double(), memory.double(), return_entropy=True)
        assert torch.equal(expected[0].float(), out) and expected[1].item() == 0


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some(wanted):
    query, keys, values, mask = scene(2, 1, 15, 12, 8, True)
    every = [x.clone().requires_grad_() for x in (query, keys, values)]
    some = [x.clone().requires_grad_(wants) for x, wants in zip((query, keys, values), wanted, strict=True)]
    for tensors in (every, some):
        wk.cross_image_attention(*tensors, mask=mask).square().sum().backward()
    for x, y, wants in zip(every, some, wanted, strict=True):
        assert torch.equal(x.grad, y.grad) if wants else y.grad is None


@pytest.mark.native
def test_opcheck_and_compile():
    query, keys, values, mask = scene(2, 1, 9, 11, 6, True)
    tensors = [x.requires_grad_() for x in (query, keys, values)]
    op = torch.ops.wsss_kernels.cross_image_attention
    torch.library.opcheck(op, (*tensors, mask, 0.0, 0, 0.0, True))
    torch.library.opcheck(op, (*tensors, None, 0.0, 3, 0.1, False))

    def attend(q, k, v, m):
        out, entropy = wk.cross_image_attention(q, k, v, mask=m, top_k=5, return_entropy=True)
        return out, entropy

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for size in (9, 13, 20):
        query, keys, values, mask = scene(2, 1, size, size + 3, 6, True)
        for found, right in zip(compiled(query, keys, values, mask), attend(query, keys, values, mask), strict=True):
            assert_close(found, right)


@pytest.mark.native
def test_no_second_derivative_but_in_float64():
    query, keys, values, _ = scene(1, 1, 3, 4, 5, True)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(
        wk.cross_image_attention(query, keys, values).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, failure, words",
    [
        ({"query": torch.zeros(1, 4, 3)}, ValueError, "query must be a floating point tensor"),
        ({"query": torch.zeros(1, 2, 4, 3, dtype=torch.int64)}, TypeError, "query must be a floating point tensor"),
        ({"query": torch.zeros(1, 2, 4, 0)}, ValueError, "query must have d >= 1"),
        ({"keys": torch.zeros(2, 5, 4)}, ValueError, "keys must be a floating point tensor"),
        ({"keys": torch.zeros(3, 5, 3)}, ValueError, "keys must be a floating point tensor"),
        ({"keys": torch.zeros(2, 2, 5, 3)}, ValueError, "keys must be a floating point tensor"),
        ({"keys": torch.zeros(5, 3)}, ValueError, "keys must be a floating point tensor"),
        ({"keys": [1.0]}, TypeError, "keys must be a floating point tensor"),
        ({"values": torch.zeros(2, 6, 3)}, ValueError, "values must have the shape of keys"),
        ({"values": None}, TypeError, "values must be a floating point tensor"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, r"mask must be \[B, M\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must be \[B, M\]"),
        ({"mask": torch.ones(1, 5)}, TypeError, "mask must be a bool tensor"),
        ({"scale": 0.0}, ValueError, "scale must be a number > 0"),
        ({"scale": float("nan")}, ValueError, "scale must be a number > 0"),
        ({"scale": "1"}, TypeError, "scale must be a number > 0"),
        ({"top_k": 0}, ValueError, "top_k must be a whole number >= 1"),
        ({"top_k": 2.0}, TypeError, "top_k must be a whole number >= 1"),
        ({"threshold": -0.1}, ValueError, "threshold must be a number from 0 to 1"),
        ({"threshold": 1.5}, ValueError, "threshold must be a number from 0 to 1"),
        ({"threshold": True}, TypeError, "threshold must be a number from 0 to 1"),
        ({"return_entropy": 1}, TypeError, "return_entropy must be a bool"),
    ],
)
def test_bad_arguments(change, failure, words):
    arguments = {"query": torch.zeros(1, 2, 4, 3), "keys": torch.zeros(2, 5, 3), "values": torch.zeros(2, 5, 3)}
    arguments.update(change)
    with pytest.raises(failure, match=words):
        wk.cross_image_attention(*[arguments.pop(name) for name in ("query", "keys", "values")], **arguments)


def test_more_than_there_are_keeps_all():
    query, keys, values, mask = scene(2, 1, 15, 12, 8, True)
    right = wk.cross_image_attention(query, keys, values, mask=mask)
    assert torch.equal(wk.cross_image_attention(query, keys, values, mask=mask, top_k=1000), right)
    assert torch.equal(wk.cross_image_attention(query, keys, values, mask=mask, threshold=0), right)
