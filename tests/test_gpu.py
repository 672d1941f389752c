"""What only a GPU can show: streams, graphs, silence towards the host, determinism, launches, sizes past 2^31."""

import os

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels.info import info

pytestmark = pytest.mark.gpu

OPS = ("boundary_affinity", "local_affinity", "pixel_adaptive", "random_walk")
CUDA_ONLY = ("dense_crf", "dense_energy_loss")  # no Triton kernels
BOTH_WAYS = ("forward", "backward")
TRITON_ONLY = {
    "attention_walk": BOTH_WAYS,
    "affinity_loss": BOTH_WAYS,
    "class_context": BOTH_WAYS,
    "cross_image_attention": BOTH_WAYS,
    "hspp": BOTH_WAYS,
    "kmeans": ("forward",),
    "mask_vote": ("forward",),
    "soft_histogram": BOTH_WAYS,
}


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def affinity_of(feats):
    return wk.local_affinity(feats, scale="auto")


def cosine_of(feats):
    return wk.local_affinity(feats, radius=3, metric="cosine", border="cropped")


def boundary_of(radius):
    return lambda x: wk.boundary_affinity(x[:, :1].sigmoid(), radius)


def walk(solver, tol=1e-4, radius=5):
    links = len(wk.neighbour_offsets(radius))

    def call(maps):
        batch, _, height, width = maps.shape
        affinity = maps.mean(1, keepdim=True).expand(batch, links, height, width)
        return wk.random_walk(maps, affinity, radius=radius, steps=48, solver=solver, tol=tol)

    return call


def adaptive(variant):
    return lambda x: wk.pixel_adaptive(255 * x[:, :3].detach(), x, variant=variant, iterations=3)


def crf_of(x):
    return wk.dense_crf(255 * x[:, :3], 3 * x, iterations=3)


def crf_energy_of(x):
    return wk.dense_energy_loss(255 * x[:, :3].detach(), x)


def attention_of(maps):
    batch, _, height, width = maps.shape
    attention = maps.detach().flatten(2)[:, :1].mT.expand(batch, height * width, height * width)
    return wk.attention_walk(maps, attention)


def vote_of(maps):
    return wk.mask_vote(maps, (20 * maps.detach()[:, 0]).long())


def loss_of(feats):
    return wk.affinity_loss_from_features(feats, (4 * feats.detach()[:, 0]).long())


def histogram_of(feats):
    return wk.soft_histogram(feats, feats[0, :, :3, :2].flatten(1).mT)[0]


def memory_attention_of(x):
    tokens = x.flatten(2).mT  # [B, S, d]
    return wk.cross_image_attention(tokens.unsqueeze(1), tokens[:1, :20], tokens[:1, 20:40])


def context_of(x):
    return wk.class_context(x, x.detach().softmax(1), threshold=0.1)[0]


def with_gradients(op):
    def call(x):
        leaf = x.detach().requires_grad_()
        out = op(leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        return torch.cat([out.detach().flatten(), grad.flatten()])

    return call


# name -> function of one [B, C, H, W] tensor; the small map fits a block, the large one needs many
FORWARD = {
    "affinity": affinity_of,
    "cosine affinity": cosine_of,
    "boundary affinity": boundary_of(5),
    "boundary affinity of radius 10": boundary_of(10),
    "pixel-adaptive by PAMR": adaptive("pamr"),
    "pixel-adaptive by PAR": adaptive("par"),
    "attention walk": attention_of,
    "loss of features": loss_of,
    "histogram": histogram_of,
    "pyramid": wk.hspp,
    "memory-attention": memory_attention_of,
    "memory-attention's context": context_of,
    "walk by power": walk("power"),
    "walk by series": walk("chebyshev"),
    "walk of radius 3": walk("auto", radius=3),
    "walk in float64": walk("auto", tol=1e-7),
}
CALLS = FORWARD | {f"{name}, and backward": with_gradients(op) for name, op in FORWARD.items()}
OF_CRF = {"crf": crf_of, "energy of the crf, and backward": with_gradients(crf_energy_of)}
CALLS |= OF_CRF | {"vote": vote_of}
SHAPES = [(2, 3, 9, 13), (3, 4, 61, 70)]


@pytest.fixture(params=CALLS)
def call(request):
    if request.param in OF_CRF and not info()["cuda"]["archs"]:
        pytest.skip("the module was compiled without CUDA")
    return CALLS[request.param]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def test_no_op_runs_the_reference():
    kernels = info()["ops"]
    wanted = {os.environ["WSSS_GPU_KERNELS"]} if os.environ.get("WSSS_GPU_KERNELS") else {"cuda", "triton"}
    for op, directions in TRITON_ONLY.items():
        for direction in directions:
            assert kernels[op]["cuda"][direction]["kernel"] == "triton"
    for op in CUDA_ONLY if info()["cuda"]["archs"] else ():
        assert kernels[op]["cuda"]["forward"]["kernel"] == "cuda"
    for op in OPS:
        for direction in ("forward", "backward"):
            assert kernels[op]["cuda"][direction]["kernel"] in wanted, kernels[op]["cuda"][direction]


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="affinity must be on the device of maps"):
        wk.random_walk(rand(1, 2, 4, 5), torch.rand(1, 34, 4, 5))


# Streams


def test_runs_on_the_current_stream(call, shape):
    """Behind work that takes its time: a kernel on any other stream would read what was there before."""
    before, after = rand(*shape), rand(*shape, seed=1)
    expected = call(after)
    x = before.clone()
    call(x)  # loads and compiles what there is to load and compile
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # clock cycles, about 10 ms
        x.copy_(after)
        out = call(x)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_four_streams_at_once(call, shape):
    inputs = [rand(*shape, seed=i) for i in range(4)]
    expected = [call(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results = [[] for _ in inputs]
    for _ in range(5):
        for x, stream, out in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(call(x))
    torch.cuda.synchronize()
    for wanted, out in zip(expected, results, strict=True):
        assert all(torch.equal(result, wanted) for result in out)


@pytest.fixture
def no_synchronisation():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_does_not_wait_for_the_gpu(call, shape, no_synchronisation):
    x = rand(*shape)
    call(x)
    torch.cuda.synchronize()
    no_synchronisation()
    call(x)


# Graphs


def captured(function):
    """A graph of one call, and the tensor it writes. The warm-up on another stream is what torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


def test_graph_replays_equal_eager(call, shape):
    inputs = [rand(*shape, seed=i) for i in range(4)]
    expected = [call(x) for x in inputs]
    x = inputs[0].clone()
    graph, out = captured(lambda: call(x))
    for replay in range(100):
        x.copy_(inputs[replay % 4])
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected[replay % 4]), replay


def test_refine_cams_in_a_graph():
    cams, feats = rand(2, 3, 47, 63), rand(2, 32, 47, 63, seed=1)

    def refine():
        return wk.refine_cams(cams, feats, background=16)

    expected = refine()
    graph, out = captured(refine)
    for _ in range(10):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


# Repetition


def test_fifty_repeats_are_bit_equal(call, shape):
    x = rand(*shape)
    first = call(x)
    for _ in range(50):
        assert torch.equal(call(x), first)


def test_nothing_leaks(call):
    x = rand(*SHAPES[0])
    for _ in range(3):
        call(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        call(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


# Launches


@pytest.mark.parametrize("height, width", [(47, 63), (94, 125)])
def test_a_walk_is_one_launch(height, width):
    if info()["ops"]["random_walk"]["cuda"]["forward"]["kernel"] != "cuda":
        pytest.skip("the CUDA kernel's promise")
    kernel_names = pytest.importorskip("benchmarks.device").kernel_names
    maps, affinity = rand(1, 3, height, width), wk.local_affinity(rand(1, 8, height, width))
    names = kernel_names(lambda: wk.random_walk(maps, affinity))
    if not names:
        pytest.skip("the profiler sees no kernel here")
    assert len(names) == 1, names


# The CRF at the size of a photograph, which is too much for the CPU to run it as the GPU does


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "noise"])
def test_crf_of_photographs(smooth):
    if not info()["cuda"]["archs"]:
        pytest.skip("the module was compiled without CUDA")
    pictures, unary = 255 * rand(4, 3, 375, 500), 3 * rand(4, 21, 375, 500, seed=1)
    if smooth:
        pictures = torch.nn.functional.avg_pool2d(pictures, 31, stride=1, padding=15)
    pictures = pictures.round()
    together = wk.dense_crf(pictures, unary, iterations=1)
    expected = wk.dense_crf(pictures.cpu(), unary.cpu(), iterations=1)
    torch.testing.assert_close(together.cpu(), expected, atol=1e-5, rtol=0)
    for b in range(4):
        assert torch.equal(wk.dense_crf(pictures[b : b + 1], unary[b : b + 1], iterations=1), together[b : b + 1])


# Several GPUs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_on_the_device_of_its_tensors(call, shape):
    x = rand(*shape)
    expected = call(x)
    assert torch.cuda.current_device() == 0
    out = call(x.to("cuda:1"))
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(out.to("cuda:0"), expected)


# Sizes


@pytest.mark.release
@pytest.mark.parametrize("batch, side", [(1, 8000), (64, 1000)])
def test_more_than_2_31_elements(batch, side):
    """The last corner of the last image, beside the same corner alone."""
    assert batch * 34 * side**2 > 2**31
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free GPU memory")
    feats = torch.rand(batch, 1, side, side, device="cuda")
    maps = torch.rand(batch, 1, side, side, device="cuda")
    corner = (slice(-1, None), slice(None), slice(-64, None), slice(-64, None))
    kept = (..., slice(-40, None), slice(-40, None))  # further from the cut than anything reaches
    affinity = wk.local_affinity(feats)
    part = wk.local_affinity(feats[corner].contiguous())
    torch.testing.assert_close(affinity[-1:][kept], part[kept], atol=1e-6, rtol=0)
    walked = wk.random_walk(maps, affinity, steps=3, solver="power")
    expected = wk.random_walk(maps[corner].contiguous(), part, steps=3, solver="power")
    torch.testing.assert_close(walked[-1:][kept], expected[kept], atol=1e-4, rtol=0)
    del walked
    leaf = maps.requires_grad_()
    (grad,) = torch.autograd.grad(wk.random_walk(leaf, affinity, steps=3, solver="power").sum(), leaf)
    assert grad.isfinite().all() and abs(grad.sum().item() / maps.numel() - 1) < 1e-3
