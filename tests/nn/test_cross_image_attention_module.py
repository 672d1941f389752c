"""CrossImageAttention: the published module in float64, folded and not."""

import pytest
import torch

import wsss_kernels as wk


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
