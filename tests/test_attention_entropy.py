"""attention_entropy: against the float64 reference, by hand, and its contract."""

import math

import pytest
import torch
from torch.testing import assert_close

import wsss_kernels as wk
from tests.test_cross_image_attention import SHAPES, error, scene
from wsss_kernels import reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape):
    query, keys, _, mask = scene(*shape)
    ours = [x.clone().requires_grad_() for x in (query, keys)]
    right = [x.double().requires_grad_() for x in (query, keys)]
    found = wk.attention_entropy(*ours, mask=mask, scale=0.4)
    expected = reference.attention_entropy(*right, mask=mask, scale=0.4)
    assert error(found, expected.detach()) < 1e-5
    found.backward()
    expected.backward()
    for x, y in zip(ours, right, strict=True):
        assert (x.grad - y.grad).abs().max() <= 1e-5 * y.grad.abs().max() + 1e-9
    with_values = wk.cross_image_attention(query, keys, keys, mask=mask, scale=0.4, return_entropy=True)[1]
    assert torch.equal(with_values, found.detach())


def test_by_hand(device):
    query = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], device=device)
    keys = torch.tensor([[[math.log(2.0), 5.0], [0.0, -3.0], [math.log(5.0), 9.0]]], device=device)
    only = torch.tensor([[True, True, False]], device=device)
    found = wk.attention_entropy(query, keys, mask=only, scale=1.0).cpu()  # weights 2/3 and 1/3, then 1/2 and 1/2
    right = torch.tensor((math.log(3) - 2 / 3 * math.log(2) + math.log(2)) / 2)
    assert_close(found, right, atol=3e-5, rtol=0)


def test_rows_with_nothing_allowed_count_zero():
    query, keys, _, mask = scene(2, 1, 9, 11, 6, True)
    mask[0], mask[1] = False, True
    query.requires_grad_()
    found = wk.attention_entropy(query, keys, mask=mask)
    assert_close(found, wk.attention_entropy(query[1:], keys) / 2)
    found.backward()
    assert query.grad[0].abs().max() == 0 and query.grad[1].abs().max() > 0


def test_gradcheck_of_the_reference():
    query, keys, _, mask = scene(2, 2, 3, 5, 4, True, torch.float64)
    tensors = [x.requires_grad_() for x in (query, keys)]
    assert torch.autograd.gradcheck(lambda q, k: wk.attention_entropy(q, k, mask=mask), tensors)
    assert torch.autograd.gradgradcheck(lambda q, k: wk.attention_entropy(q, k, mask=mask), tensors)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision(dtype, tolerance):
    query, keys, _, mask = scene(2, 1, 20, 30, 8, True, dtype)
    found = wk.attention_entropy(query, keys, mask=mask)
    assert found.dtype == dtype
    assert error(found, reference.attention_entropy(query.double(), keys.double(), mask=mask)) < tolerance


@pytest.mark.native
def test_opcheck_and_compile():
    query, keys, _, mask = scene(2, 1, 9, 11, 6, True)
    tensors = [x.requires_grad_() for x in (query, keys)]
    torch.library.opcheck(torch.ops.wsss_kernels.attention_entropy, (*tensors, mask, 0.3))
    compiled = torch.compile(lambda q, k, m: wk.attention_entropy(q, k, mask=m), fullgraph=True, dynamic=True)
    for size in (9, 13, 20):
        query, keys, _, mask = scene(2, 1, size, size + 3, 6, True)
        assert_close(compiled(query, keys, mask), wk.attention_entropy(query, keys, mask=mask))


@pytest.mark.parametrize(
    "change, failure, words",
    [
        ({"query": torch.zeros(1, 4, 3)}, ValueError, "query must be a floating point tensor"),
        ({"keys": torch.zeros(2, 5, 4)}, ValueError, "keys must be a floating point tensor"),
        ({"mask": torch.ones(1, 5)}, TypeError, "mask must be a bool tensor"),
        ({"scale": 0.0}, ValueError, "scale must be a number > 0"),
    ],
)
def test_bad_arguments(change, failure, words):
    arguments = {"query": torch.zeros(1, 2, 4, 3), "keys": torch.zeros(2, 5, 3), **change}
    with pytest.raises(failure, match=words):
        wk.attention_entropy(arguments.pop("query"), arguments.pop("keys"), **arguments)
