"""Under torch's machinery: compile and opcheck."""

import pytest
import torch
import torch._dynamo.testing

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
