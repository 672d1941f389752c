"""Under torch's machinery: compile, opcheck, fake tensors, functorch, autocast, grad modes."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import wsss_kernels as wk

OPS = torch.ops.wsss_kernels
SIZES = [
    (1, 4, 9, 11),
    (2, 4, 9, 11),
    (1, 4, 20, 13),
    (3, 4, 7, 7),
    (2, 4, 16, 30),
    (1, 4, 31, 8),
    (4, 4, 12, 12),
    (2, 4, 5, 6),
]


def rand(*shape, seed=0, device="cpu"):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def refine(feats, maps):
    affinity = wk.local_affinity(feats * 2, scale="auto", border="cropped")
    return wk.random_walk(maps, affinity, steps=17).relu() + 1


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Compile


@pytest.mark.native
@pytest.mark.parametrize("solver, metric", [("auto", "l1"), ("power", "cosine")])
def test_compiled_equals_eager(device, solver, metric):
    """No graph break, and the second shape (dynamic) serves all that follow."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def op(feats, maps):
        affinity = wk.local_affinity(feats * 2, metric=metric, scale="auto")
        return wk.random_walk(maps, affinity, steps=17, solver=solver) + 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    for size in SIZES:
        inputs = [rand(*size, device=device), rand(size[0], 3, *size[2:], seed=1, device=device)]
        inputs = [x.requires_grad_() for x in inputs]
        expected, out = op(*inputs), compiled(*inputs)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        got = torch.autograd.grad(out.square().sum(), inputs)
        assert all(map(torch.equal, got, wanted))
    assert counter.frame_count <= 1 + 2


@pytest.mark.native
def test_static_shapes_recompile_to_dynamic_ones(device):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(refine, fullgraph=True, backend=counter)
    for size in SIZES:
        batch = size[0] + 1  # torch compiles a batch of 1 apart
        feats, maps = rand(batch, *size[1:], device=device), rand(batch, 3, *size[2:], seed=1, device=device)
        assert torch.equal(compiled(feats, maps), refine(feats, maps))
    assert counter.frame_count <= 1 + 2


@pytest.mark.native
def test_options_of_a_compiled_call(device):
    def op(feats, maps, radius, beta, steps, scale):
        affinity = wk.local_affinity(feats, radius, scale=scale)
        return wk.random_walk(maps, affinity, radius=radius, beta=beta, steps=steps)

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    feats, maps = rand(1, 4, 9, 11, device=device), rand(1, 3, 9, 11, seed=1, device=device)
    for options in ((5, 8.0, 16, 1.0), (3, 8.0, 16, "auto"), (3, 10, 20, 0.5), (5, 2.5, 0, 2)):
        assert torch.equal(compiled(feats, maps, *options), op(feats, maps, *options))


def test_refusals_of_a_compiled_call():
    compiled = torch.compile(wk.local_affinity, dynamic=True, backend="eager")
    with pytest.raises(Exception, match="feats must be"):
        compiled(rand(1, 4, 9))


@pytest.mark.native
def test_inductor(device, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(refine, fullgraph=True, dynamic=True)
    for size in SIZES[2:3]:
        inputs = [rand(*size, device=device), rand(size[0], 3, *size[2:], seed=1, device=device)]
        inputs = [x.requires_grad_() for x in inputs]
        expected, out = refine(*inputs), compiled(*inputs)
        torch.testing.assert_close(out, expected)
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        for got, want in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.native
def test_export():
    class Refine(torch.nn.Module):
        def forward(self, feats, maps):
            return refine(feats, maps)

    inputs = rand(2, 4, 9, 11), rand(2, 3, 9, 11, seed=1)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(Refine(), inputs, dynamic_shapes=({2: height, 3: width},) * 2, strict=False)
    for size in ((9, 11), (20, 7)):
        inputs = rand(2, 4, *size), rand(2, 3, *size, seed=1)
        assert torch.equal(program.module()(*inputs), refine(*inputs))


# opcheck


def walk_arguments(
    device, batch, channels, height, width, radius, steps=9, dtype=torch.float32, grad=False, strided=False
):
    maps = rand(batch, channels, height, width, device=device).to(dtype)
    affinity = rand(batch, len(wk.neighbour_offsets(radius)), height, width, seed=1, device=device).to(dtype)
    if strided:
        maps, affinity = maps.contiguous(memory_format=torch.channels_last), affinity.mT.contiguous().mT
    return maps.requires_grad_(grad), affinity.requires_grad_(grad), radius, 8.0, steps, "auto", 1e-4


WALKS = [
    {"batch": 2, "channels": 3, "height": 6, "width": 9, "radius": 5, "grad": True},
    {"batch": 1, "channels": 7, "height": 4, "width": 3, "radius": 3, "dtype": torch.float16},
    {"batch": 2, "channels": 1, "height": 7, "width": 5, "radius": 2, "grad": True, "strided": True, "steps": 40},
    {"batch": 1, "channels": 2, "height": 1, "width": 5, "radius": 5, "dtype": torch.bfloat16, "grad": True},
    {"batch": 1, "channels": 2, "height": 4, "width": 5, "radius": 1, "steps": 0},
]  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("sample", WALKS)
def test_opcheck_of_the_walk(device, sample):
    torch.library.opcheck(OPS.random_walk.default, walk_arguments(device, **sample))


@pytest.mark.native
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sample", WALKS)
def test_opcheck_of_the_backward_walk(device, sample, wants):
    arguments = walk_arguments(device, **sample | {"grad": False})
    grad = rand(*arguments[0].shape, seed=2, device=device).to(arguments[0].dtype)
    torch.library.opcheck(OPS.random_walk_backward.default, (grad, *arguments, *wants))


AFFINITIES = [
    ((2, 3, 6, 9), torch.float32, True, (5, False, 1.0, False)),
    ((1, 8, 4, 3), torch.float32, True, (3, True, 0.0, True)),
    ((2, 5, 7, 5), torch.float16, False, (2, False, 0.0, False)),
    ((1, 2, 1, 5), torch.bfloat16, True, (5, True, 1.0, False)),
    ((1, 4, 8, 6), torch.float32, False, (1, False, 0.5, True)),
]


@pytest.mark.native
@pytest.mark.parametrize("shape, dtype, grad, options", AFFINITIES)
def test_opcheck_of_the_affinity(device, shape, dtype, grad, options):
    feats = rand(*shape, device=device).to(dtype)
    torch.library.opcheck(OPS.local_affinity.default, (feats.requires_grad_(grad), *options))
    strided = feats.detach().contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OPS.local_affinity.default, (strided, *options))


@pytest.mark.native
@pytest.mark.parametrize("shape, dtype, grad, options", AFFINITIES)
def test_opcheck_of_the_backward_affinity(device, shape, dtype, grad, options):
    feats = rand(*shape, device=device).to(dtype)
    affinity, scales = OPS.local_affinity(feats, *options)
    upstream = rand(*affinity.shape, seed=2, device=device).to(dtype)
    torch.library.opcheck(OPS.local_affinity_backward.default, (upstream, feats, affinity, scales, *options))


BOUNDARIES = [
    ((2, 1, 6, 9), torch.float32, True, 5),
    ((1, 1, 4, 3), torch.float16, False, 3),
    ((1, 1, 1, 5), torch.bfloat16, True, 10),
    ((1, 1, 8, 6), torch.float32, False, 1),
]


@pytest.mark.native
@pytest.mark.parametrize("shape, dtype, grad, radius", BOUNDARIES)
def test_opcheck_of_the_boundary_affinity(device, shape, dtype, grad, radius):
    boundary = rand(*shape, device=device).to(dtype)
    torch.library.opcheck(OPS.boundary_affinity.default, (boundary.requires_grad_(grad), radius))
    torch.library.opcheck(OPS.boundary_affinity.default, (boundary.detach().mT.contiguous().mT, radius))
    upstream = rand(shape[0], len(wk.neighbour_offsets(radius)), *shape[2:], seed=2, device=device).to(dtype)
    torch.library.opcheck(OPS.boundary_affinity_backward.default, (upstream, boundary.detach(), radius))


@pytest.mark.native
def test_compiled_boundary_affinity(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def op(boundary, maps):
        affinity = wk.boundary_affinity(boundary.sigmoid())
        return wk.random_walk(maps, affinity, beta=10, steps=17) + 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    for batch, _, *size in SIZES:
        inputs = [rand(batch, 1, *size, device=device), rand(batch, 3, *size, seed=1, device=device)]
        inputs = [x.requires_grad_() for x in inputs]
        expected, out = op(*inputs), compiled(*inputs)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), inputs), wanted))
    assert counter.frame_count <= 1 + 2


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


# Fake, meta, functorch, autocast, grad modes


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
