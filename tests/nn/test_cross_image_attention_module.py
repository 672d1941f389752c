"""CrossImageAttention: the published module in float64, folded and not."""

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels.ops.map_attention import map_attention


def published(module, feats, memory, mask):
    """The published module: the memory is copied for each image and everything is projected. In float64."""
    batch, dim, height, width = feats.shape
    heads, own = module.num_heads, dim // module.num_heads

    def projected(linear, x):
        return x @ linear.weight.double().t() + linear.bias.double()

    query = projected(module.q_proj, feats.flatten(2).transpose(1, 2)) * own**-0.5
    copies = memory.expand(batch, -1, -1)
    query, keys, values = (
        x.unflatten(-1, (heads, own)).transpose(1, 2)
        for x in (query, projected(module.k_proj, copies), projected(module.v_proj, copies))
    )
    scores = (query @ keys.transpose(-2, -1)).masked_fill(~mask[:, None, None], -torch.inf)
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    return projected(module.out_proj, mixed).transpose(1, 2).reshape(batch, dim, height, width)


def error(found, right):
    return (found.double() - right).abs().max().item() / right.abs().max().item()


@pytest.mark.parametrize("heads, entries", [(1, 10), (1, 300), (2, 6), (4, 40)])
def test_published_module(heads, entries):
    torch.manual_seed(entries)
    module = wk.CrossImageAttention(16, heads)
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        torch.nn.init.normal_(linear.bias)
    feats = torch.randn(2, 16, 7, 9, requires_grad=True)
    memory = torch.randn(entries, 16, requires_grad=True)
    mask = torch.rand(2, entries) < 0.7
    right_feats, right_memory = (x.detach().double().requires_grad_() for x in (feats, memory))
    grad = torch.randn(2, 16, 7, 9)
    out = module(feats, memory, mask)
    parameters = list(module.parameters())
    found = torch.autograd.grad(out, [feats, memory, *parameters], grad)
    expected = published(module, right_feats, right_memory, mask)
    right = torch.autograd.grad(expected, [right_feats, right_memory, *parameters], grad.double())
    assert error(out.detach(), expected.detach()) < 1e-5
    largest = max(x.abs().max().item() for x in right)
    for (name, _), x, y in zip([("feats", 0), ("memory", 0), *module.named_parameters()], found, right, strict=True):
        # The keys' bias shifts all scores of a query alike: its gradient is 0 but for rounding.
        bound = 1e-5 * largest if name == "k_proj.bias" else 2e-5 * y.abs().max().item()
        assert (x - y).abs().max().item() <= bound, name


@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("feats_last", [False, True])
@pytest.mark.parametrize("dim, entries", [(70, 67), (9, 130), (130, 1)])  # weights kept, found again, a single one
def test_maps_as_they_lie(dim, entries, feats_last, grad_last):
    """Channels first or last in memory, more than one panel of pixels, channels and entries."""
    torch.manual_seed(dim)
    module = wk.CrossImageAttention(dim)
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        torch.nn.init.normal_(linear.bias)
    feats, grad = torch.randn(2, dim, 7, 19), torch.randn(2, dim, 7, 19)
    feats = feats.to(memory_format=torch.channels_last) if feats_last else feats
    grad = grad.to(memory_format=torch.channels_last) if grad_last else grad
    feats.requires_grad_()
    memory = torch.randn(entries, dim)
    mask = torch.rand(2, entries) < 0.8
    mask[:, 0] = True
    wanted = [p for name, p in module.named_parameters() if name != "k_proj.bias"]
    out = module(feats, memory, mask)
    found = torch.autograd.grad(out, [feats, *wanted], grad)
    right_feats = feats.detach().double().requires_grad_()
    expected = published(module, right_feats, memory.double(), mask)
    right = torch.autograd.grad(expected, [right_feats, *wanted], grad.double())
    assert error(out.detach(), expected.detach()) < 1e-5
    for x, y in zip(found, right, strict=True):
        if entries == 1:  # softmax of one score: nothing but the values and their biases has a gradient
            assert (x - y).abs().max() <= 1e-5 * max(y.abs().max().item(), grad.abs().max().item())
        else:
            assert error(x, y) < 2e-5
    some = torch.autograd.grad(module(feats.detach(), memory, mask), wanted, grad)
    assert all(torch.equal(x, y) for x, y in zip(some, found[1:], strict=True))


def scene(dim=12, entries=20):
    generator = torch.Generator().manual_seed(dim)
    shapes = ((2, dim, 75), (1, entries, dim), (1, entries, dim), (1, entries), (dim,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes], torch.rand(
        2, entries, generator=generator
    ) < 0.6


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"threshold": 0.1}], ids=str)
@pytest.mark.parametrize("entries", [20, 5])
def test_map_attention_is_the_padded_op_in_float64(entries, options):
    """With the entropy's gradient too."""
    tensors, mask = scene(entries=entries)
    right = [x.detach().double().requires_grad_() for x in tensors]
    options = {"top_k": None, "threshold": None, "mask": mask, "scale": 0.3, "return_entropy": True, **options}
    (out, entropy), (expected, right_entropy) = (map_attention(*x, **options) for x in (tensors, right))
    assert error(out.detach(), expected.detach()) < 1e-5 and abs(entropy.item() - right_entropy.item()) < 1e-5
    grad = torch.randn(out.shape)
    ((out * grad).sum() + 20 * entropy).backward()
    ((expected * grad.double()).sum() + 20 * right_entropy).backward()
    for x, y in zip(tensors, right, strict=True):
        assert error(x.grad, y.grad) < 1e-5


def test_same_bits_for_any_number_of_threads():
    tensors, mask = scene(dim=150, entries=90)
    found, before = [], torch.get_num_threads()
    tensors[0] = torch.randn(3, 150, 700, requires_grad=True)
    mask = torch.rand(3, 90) < 0.6
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, _ = map_attention(
                *tensors, mask=mask, scale=0.1, top_k=None, threshold=None, return_entropy=False
            )  # fmt: skip
            found.append([out.detach(), *torch.autograd.grad(out, tensors[:4], out.detach())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.native
def test_opcheck_and_compile():
    tensors, mask = scene(dim=6, entries=11)
    flat = [tensors[0], *(x[0] for x in tensors[1:4]), tensors[4]]
    flat = [x.detach().requires_grad_() for x in flat]
    op = torch.ops.wsss_kernels.map_attention
    torch.library.opcheck(op, (*flat, mask, 0.3, 0, 0.0, True))
    torch.library.opcheck(op, (*flat, None, 0.3, 3, 0.1, False))
    module = wk.CrossImageAttention(8)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 9):
        feats, memory = torch.randn(2, 8, size, 6), torch.randn(size, 8)
        torch.testing.assert_close(compiled(feats, memory), module(feats, memory))


def test_entropy_and_options_pass_through():
    torch.manual_seed(0)
    module = wk.CrossImageAttention(8)
    feats, memory = torch.randn(1, 8, 4, 5), torch.randn(6, 8)
    out, entropy = module(feats, memory, return_entropy=True)
    query = module.q_proj(feats.flatten(2).transpose(1, 2))[:, None]
    right = wk.attention_entropy(query, module.k_proj(memory)[None])
    assert torch.equal(out, module(feats, memory)) and abs(entropy.item() - right.item()) < 1e-5
    one = wk.CrossImageAttention(8, top_k=1)
    one.load_state_dict(module.state_dict())
    best = (query[0, 0] @ module.k_proj(memory).t()).argmax(1)
    expected = module.out_proj(module.v_proj(memory))[best].t().view(8, 4, 5)
    assert (one(feats, memory)[0] - expected).abs().max() < 1e-5


def test_nothing_allowed_gives_the_bias():
    module = wk.CrossImageAttention(4)
    torch.nn.init.constant_(module.out_proj.bias, 3.0)
    out = module(torch.randn(1, 4, 2, 2), torch.randn(5, 4), torch.zeros(1, 5, dtype=torch.bool))
    assert torch.equal(out, torch.full((1, 4, 2, 2), 3.0))


def test_bad_arguments():
    for arguments in ((0,), (8, 0), (8, 3)):
        with pytest.raises(ValueError, match="must be a whole number >= 1"):
            wk.CrossImageAttention(*arguments)
    module = wk.CrossImageAttention(4)
    with pytest.raises(ValueError, match="feats must have 4 channels"):
        module(torch.zeros(1, 5, 2, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="memory must have 4 channels"):
        module(torch.zeros(1, 4, 2, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"mask must be \[B, M\]"):
        module(torch.zeros(1, 4, 2, 2), torch.zeros(3, 4), torch.ones(1, 4, dtype=torch.bool))
