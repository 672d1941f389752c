"""The Triton kernels of cross_image_attention, interpreted on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set before triton is imported: TRITON_INTERPRET=1 pytest tests/triton", allow_module_level=True)

from wsss_kernels import reference
from wsss_kernels.triton import cross_image_attention as kernels
from wsss_kernels.triton import launch

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small sizes take several."""
    blocks = {"QUERIES": 16, "ENTRIES": 16, "CHANNELS": 16}
    monkeypatch.setattr(launch, "ATTENTION_STATISTICS", launch.Configuration(32, blocks))
    for name in ("ATTENTION", "ATTENTION_GRADIENT"):
        monkeypatch.setattr(launch, name, launch.Configuration(32, {**blocks, "OUT": 16}))


def scene(batch, heads, queries, entries, dim, shared):
    generator = torch.Generator().manual_seed(queries + entries)
    own = (heads, entries, dim) if shared else (batch, heads, entries, dim)
    tensors = [torch.randn(size, generator=generator) for size in ((batch, heads, queries, dim), own, own)]
    mask = torch.rand(batch, entries, generator=generator) < 0.7
    mask[-1] = False
    return tensors, mask


def error(found, right):
    return (found.double() - right).abs().max().item() / max(right.abs().max().item(), 1e-30)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("top_k, threshold", [(0, 0.0), (5, 0.0), (0, 0.06), (7, 0.09)])
@pytest.mark.parametrize("shape", [(2, 2, 19, 21, 18, True), (2, 1, 33, 5, 3, False)], ids=str)
def test_forward_and_gradients(shape, top_k, threshold, masked):
    tensors, mask = scene(*shape)
    mask = mask if masked else None
    right = [x.double().requires_grad_() for x in tensors]
    expected, expected_entropy = reference.cross_image_attention(
        *right, mask=mask, scale=0.4, top_k=top_k or None, threshold=threshold, return_entropy=True
    )
    out, entropy, stats = kernels.cross_image_attention(*tensors, mask, 0.4, top_k, threshold, True)
    assert error(out, expected.detach()) < 1e-5 and error(entropy.mean(), expected_entropy.detach()) < 1e-5
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ((expected * grad.double()).sum() + 5 * expected_entropy).backward()
    of_entropy = torch.full_like(entropy, 5 / entropy.numel())
    found = kernels.cross_image_attention_backward(grad, of_entropy, *tensors, mask, out, stats, 0.4, True, True)
    for x, y in zip(found, right, strict=True):
        assert x.shape == y.shape and error(x, y.grad) < 2e-5


def test_entropy_alone_and_what_is_not_wanted():
    (query, keys, _), mask = scene(2, 1, 18, 20, 7, True)
    right = [x.double().requires_grad_() for x in (query, keys)]
    expected = reference.attention_entropy(*right, mask=mask)
    expected.backward()
    out, entropy, stats = kernels.cross_image_attention(query, keys, None, mask, 0.0, 0, 0.0, True)
    assert out.numel() == 0 and error(entropy.mean(), expected.detach()) < 1e-5
    of_entropy = torch.full_like(entropy, 1 / entropy.numel())
    arguments = (out, of_entropy, query, keys, None, mask, out, stats, 0.0)
    found = kernels.cross_image_attention_backward(*arguments, True, True)
    assert error(found[0], right[0].grad) < 2e-5 and error(found[1], right[1].grad) < 2e-5 and found[2].numel() == 0
    assert torch.equal(kernels.cross_image_attention_backward(*arguments, True, False)[0], found[0])
    assert torch.equal(kernels.cross_image_attention_backward(*arguments, False, True)[1], found[1])


def test_forbidden_nan_and_half():
    tensors, mask = scene(2, 1, 17, 20, 5, True)
    mask[:, 3] = False
    clean = kernels.cross_image_attention(*tensors, mask, 0.0, 4, 0.0, False)[0]
    for tensor in tensors[1:]:
        tensor[:, 3] = float("nan")
    assert torch.equal(kernels.cross_image_attention(*tensors, mask, 0.0, 4, 0.0, False)[0], clean)
    tensors[0][0, 0, 2, 1] = float("nan")
    out = kernels.cross_image_attention(*tensors, mask, 0.0, 4, 0.0, False)[0]
    assert out[0, 0, 2].isnan().all() and torch.equal(out[0, 0, 3:], clean[0, 0, 3:])
    halves = [x.half() for x in tensors]
    assert kernels.cross_image_attention(*halves, mask, 0.0, 0, 0.0, False)[0].dtype == torch.float16
