"""Under torch's transforms and modes: fake and meta tensors, functorch, autocast, grad modes, saved tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import wsss_kernels as wk
from tests.test_compile import rand


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake_tensors_tell_the_truth(device, layout, dtype):
    place = {
        "contiguous": lambda x: x,
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.mT.contiguous().mT,
    }[layout]
    feats = place(rand(2, 5, 6, 7, device=device).to(dtype))
    maps = place(rand(2, 3, 6, 7, seed=1, device=device).to(dtype))

    def everything(feats, maps):
        feats, maps = feats.detach().requires_grad_(), maps.detach().requires_grad_()
        affinity = wk.local_affinity(feats)
        out = wk.random_walk(maps, affinity, steps=3)
        return affinity, out, *torch.autograd.grad(out.sum(), (feats, maps))

    real = everything(feats, maps)
    with FakeTensorMode() as mode:
        fake = everything(mode.from_tensor(feats), mode.from_tensor(maps))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_meta_tensors_have_shapes_or_are_refused():
    feats, maps = torch.empty(2, 5, 6, 7, device="meta"), torch.empty(2, 3, 6, 7, device="meta")
    try:
        affinity = wk.local_affinity(feats)
        out = wk.random_walk(maps, affinity, steps=2)
    except RuntimeError:
        return
    assert affinity.device.type == out.device.type == "meta"
    assert affinity.shape == (2, 34, 6, 7) and out.shape == maps.shape


def refused_or(call, expected) -> bool:
    """A transform the op does not know must raise; where it gives numbers, they are right."""
    try:
        out = call()
    except RuntimeError:
        return True
    return out is not None and torch.allclose(out, expected, rtol=1e-4, atol=1e-6)


FEATS, MAPS = rand(3, 1, 4, 6, 7), rand(3, 1, 2, 6, 7, seed=1)
AFFINITY = wk.local_affinity(FEATS[0])


def walk(x):
    return wk.random_walk(x, AFFINITY, steps=3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    assert refused_or(lambda: torch.vmap(wk.local_affinity)(FEATS), torch.stack([wk.local_affinity(f) for f in FEATS]))
    assert refused_or(lambda: torch.vmap(walk)(MAPS), torch.stack([walk(m) for m in MAPS]))
    affinities = torch.stack([wk.local_affinity(f) for f in FEATS])
    both = torch.vmap(lambda m, a: wk.random_walk(m, a, steps=3))
    expected = torch.stack([wk.random_walk(m, a, steps=3) for m, a in zip(MAPS, affinities, strict=True)])
    assert refused_or(lambda: both(MAPS, affinities), expected)


def test_functional_gradient():
    for op, x in ((wk.local_affinity, FEATS[0]), (walk, MAPS[0])):
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(op(leaf).square().sum(), leaf)[0]
        assert refused_or(lambda op=op, x=x: torch.func.grad(lambda y: op(y).square().sum())(x), expected)


def tangents(op, x):
    direction = rand(*x.shape, seed=3)
    exact = torch.func.jvp(op, (x.double(),), (direction.double(),))[1].float()
    return direction, exact


@pytest.mark.native
@pytest.mark.parametrize("way", ["jvp", "dual"])
@pytest.mark.parametrize("name", ["boundary_affinity", "local_affinity", "random_walk"])
def test_forward_derivatives_are_right_or_refused(name, way):
    op, x = {
        "boundary_affinity": (wk.boundary_affinity, FEATS[0][:, :1]),
        "local_affinity": (wk.local_affinity, FEATS[0]),
        "random_walk": (walk_in_dtype, MAPS[0]),
    }[name]
    direction, expected = tangents(op, x)

    def dual():
        with torch.autograd.forward_ad.dual_level():
            out = op(torch.autograd.forward_ad.make_dual(x, direction))
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    assert refused_or(dual if way == "dual" else lambda: torch.func.jvp(op, (x,), (direction,))[1], expected)


def walk_in_dtype(x):
    return wk.random_walk(x, AFFINITY.to(x.dtype), steps=3)


@pytest.mark.native
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivatives_are_right_or_refused():
    maps, affinity = MAPS[0].clone().requires_grad_(), AFFINITY.clone().requires_grad_()

    def second(maps, affinity):
        first = torch.autograd.grad(
            wk.random_walk(maps, affinity, steps=3).square().sum(), affinity, create_graph=True
        )[0]
        return torch.autograd.grad(first.square().sum(), maps)[0]

    exact = [t.detach().double().requires_grad_() for t in (maps, affinity)]
    assert refused_or(lambda: second(maps, affinity), second(*exact).float())


def leaves(device):
    return FEATS[0].to(device, copy=True).requires_grad_(), MAPS[0].to(device, copy=True).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    feats, maps = leaves(device)
    expected = wk.random_walk(maps, wk.local_affinity(feats), steps=9)
    with torch.autocast(device.type, dtype):
        low = feats.flatten(2).mT @ torch.eye(4, device=device)  # what autocast makes of a product
        out = wk.random_walk(maps, wk.local_affinity(feats), steps=9)
        mixed = wk.random_walk(maps, wk.local_affinity(low.mT.unflatten(2, (6, 7))), steps=9)
    assert low.dtype == dtype and out.dtype == mixed.dtype == torch.float32
    assert torch.equal(out, expected)
    assert (mixed - expected).abs().max() < 2e-2
    mixed.sum().backward()
    assert feats.grad.isfinite().all() and feats.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boundary_affinity_under_autocast(device, dtype):
    logits = rand(1, 1, 6, 7, device=device).requires_grad_()
    with torch.autocast(device.type, dtype):
        low = (torch.eye(6, device=device) @ logits.flatten(1).view(6, 7)).view(1, 1, 6, 7)
        out = wk.boundary_affinity(low)
    assert out.dtype == low.dtype == dtype
    assert (out.float() - wk.boundary_affinity(logits)).abs().max() < 2e-2
    out.float().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.dtype == torch.float32


def test_grad_modes(device):
    feats, maps = leaves(device)

    def call():
        return wk.random_walk(maps, wk.local_affinity(feats), steps=9)

    expected = call()
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = call()
            assert not out.requires_grad and torch.equal(out, expected)
    with torch.inference_mode():
        made_inside = feats * 1
    assert torch.equal(wk.local_affinity(made_inside), wk.local_affinity(feats))
    with torch.enable_grad():
        assert call().requires_grad
    assert not wk.random_walk(maps.detach(), AFFINITY.to(device), steps=1).requires_grad


def test_parameters_and_subclasses():
    class Tagged(torch.Tensor):
        pass

    expected = wk.local_affinity(FEATS[0])
    assert torch.equal(wk.local_affinity(torch.nn.Parameter(FEATS[0])), expected)
    tagged = wk.local_affinity(FEATS[0].as_subclass(Tagged))
    assert torch.equal(tagged.as_subclass(torch.Tensor), expected)


def test_saved_tensors_may_be_moved(device):
    """Activation offloading and checkpointing replay or replace what the op saved."""
    feats, maps = leaves(device)

    def call(feats, maps):
        return wk.random_walk(maps, wk.local_affinity(feats), steps=9)

    expected = torch.autograd.grad(call(feats, maps).square().sum(), (feats, maps))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = call(feats, maps)
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), (feats, maps)), expected))
    out = torch.utils.checkpoint.checkpoint(call, feats, maps, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), (feats, maps)), expected))


@pytest.mark.native
def test_changing_a_saved_tensor_is_noticed():
    maps, affinity = MAPS[0].clone().requires_grad_(), AFFINITY.clone()
    out = wk.random_walk(maps, affinity, steps=3)
    affinity.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
