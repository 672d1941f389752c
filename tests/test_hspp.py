"""hspp against loops over windows in float64."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import wsss_kernels
from wsss_kernels import reference

CASES = [((2, 3, 8, 8), (1, 2, 4)), ((1, 4, 28, 28), (1, 2, 4)), ((2, 2, 7, 9), (4, 3, 1, 2)), ((1, 1, 1, 1), (1,)),
         ((1, 3, 37, 53), (1, 5, 2, 2, 37)), ((2, 2, 63, 47), (1, 2, 4)), ((1, 2, 1, 40), (1,))]  # fmt: skip


def ties(*shape: int, seed: int = 0) -> Tensor:
    """Few different values, negative ones too."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 9).round() / 4 - 1


def oracle(feats: Tensor, levels, gamma: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Result and gradient; a window's gradient to the first of its maxima."""
    x = feats.detach().double().cpu()
    height, width = x.shape[2:]
    out, slope = gamma * x.mean((2, 3)), torch.full_like(x, gamma / (height * width))
    for level in levels:
        tall, wide = height // level, width // level
        corners = [(y, c) for y in range(0, height - tall + 1, tall) for c in range(0, width - wide + 1, wide)]
        for y, c in corners:
            window = x[:, :, y : y + tall, c : c + wide].flatten(2)
            peak = window.amax(2, keepdim=True)
            out = out + peak[..., 0] / len(corners)
            first = (window == peak) & (window == peak).cumsum(2).eq(1)
            slope[:, :, y : y + tall, c : c + wide] += first.double().view(*x.shape[:2], tall, wide) / len(corners)
    parts = gamma + len(levels)
    return out / parts, slope / parts * grad.double().cpu()[:, :, None, None]


@pytest.mark.parametrize(("shape", "levels"), CASES)
@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_both_directions(wk, nan_filled, assert_close, dtype, shape, levels, gamma):
    feats = ties(*shape).to(dtype).requires_grad_()
    grad = torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, slope = oracle(feats, levels, gamma, grad)
    out = wk.hspp(feats, levels=levels, gamma=gamma)
    assert out.dtype == dtype and out.shape == shape[:2]
    assert_close(out, expected)
    assert_close(torch.autograd.grad(out, feats, grad)[0], slope)
    assert torch.equal(wk.hspp(feats.detach(), levels=list(levels), gamma=gamma), out)
    leaf = feats.detach().double().requires_grad_()
    again = reference.hspp(leaf, levels=levels, gamma=gamma)
    assert_close(again, expected)
    assert_close(torch.autograd.grad(again, leaf, grad.double())[0], slope)


def test_by_hand(wk):
    feats = torch.tensor([[[[0.0, 4.0, 9.0], [2.0, 2.0, 9.0]]]])
    # mean 26/6; level 1: 9; level 2 has windows of 1 x 1 pixel, six of them: their mean is the mean
    assert wk.hspp(feats, levels=(1, 2), gamma=2.0).item() == pytest.approx((3 * 26 / 6 + 9) / 4)
    feats = torch.tensor([[[[1.0, 2.0, 0.0, 0.0, 50.0], [0.0, 0.0, 4.0, 3.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]]]])
    # level 2: windows 1 x 2, three rows of two; the last column fills none: maxima 2 0, 0 4, 9 0
    assert wk.hspp(feats, levels=(2,), gamma=0.0).item() == pytest.approx(15 / 6)


@pytest.mark.native
def test_the_number_of_threads_does_not_change_a_bit():
    feats, before, results = ties(3, 40, 29, 31).requires_grad_(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = wsss_kernels.hspp(feats)
            results.append((out.detach(), torch.autograd.grad(out.sum(), feats)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    order = ["baseline", "avx2", "avx512"]
    if order.index(request.param) > order.index(wsss_kernels.info()["cpu"]["isa"]):
        pytest.skip(f"this processor or build has no {request.param}")
    return request.param


@pytest.mark.native
def test_instruction_sets(isa, tmp_path, assert_close):
    feats = ties(2, 3, 37, 41)
    torch.save(feats, tmp_path / "feats.pt")
    script = f"""
import torch, wsss_kernels as wk
assert wk.info()["cpu"]["isa"] == {isa!r}
feats = torch.load({str(tmp_path / "feats.pt")!r}).requires_grad_()
out = wk.hspp(feats, levels=(1, 2, 3, 4))
torch.save([out.detach(), torch.autograd.grad(out.sum(), feats)[0]], {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"WSSS_CPU_ISA": isa}, check=True)
    for got, expected in zip(
        torch.load(tmp_path / "out.pt"), oracle(feats, (1, 2, 3, 4), 2.0, torch.ones(2, 3)), strict=True
    ):
        assert_close(got, expected)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="protects a page by Linux's mprotect")
def test_reads_nothing_behind_the_features(isa):
    """They end where a page begins that nobody may read."""
    script = """
import ctypes, mmap, os, torch, wsss_kernels as wk
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
memory, end = mmap.mmap(-1, 5 * mmap.PAGESIZE), 4 * mmap.PAGESIZE
assert libc.mprotect(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end, mmap.PAGESIZE, 0) == 0
for height in range(1, 10):
    for width in (*range(1, 20), 31, 33, 40):
        count = 3 * height * width
        feats = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=end - 4 * count)
        feats = feats.view(1, 3, height, width)
        for level in range(1, min(height, width, 5) + 1):
            wk.hspp(feats, levels=(level, 1))
            wk.hspp(feats.detach().requires_grad_(), levels=(1, level))
print("done", flush=True)
os._exit(0)
"""
    environment = os.environ | {"WSSS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_layouts(wk, layout):
    feats = layout(ties(2, 3, 6, 9))
    assert torch.equal(wk.hspp(feats), wk.hspp(feats.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_stay_in_their_channel(wk, bad):
    feats = ties(2, 3, 9, 11)
    clean = wk.hspp(feats)
    feats[0, 1, 4, 4] = bad
    out = wk.hspp(feats.requires_grad_()).detach()
    assert not out[0, 1].isfinite()
    out[0, 1] = clean[0, 1]
    assert torch.equal(out, clean)
    (grad,) = torch.autograd.grad(wk.hspp(feats).sum(), feats)
    assert grad.isfinite().all()


def test_empty_batch(wk):
    feats = torch.rand(0, 3, 4, 4, requires_grad=True)
    out = wk.hspp(feats)
    assert out.shape == (0, 3) and torch.autograd.grad(out.sum(), feats)[0].shape == feats.shape


@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 5, 4), (1, 2, 4)), ((2, 1, 3, 3), (3,)), ((1, 1, 1, 1), (1,)),
                                               ((1, 2, 7, 1), (1,)), ((2, 2, 4, 4), (1, 2))])  # fmt: skip
def test_reference_gradcheck(shape, levels):
    feats = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.hspp(x, levels=levels), feats)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(device, dtype, keep):
    feats = ties(2, 3, 5, 7).to(device, dtype).requires_grad_(keep)
    torch.library.opcheck(torch.ops.wsss_kernels.hspp.default, (feats, [1, 2, 4], 2.0, keep))


@pytest.mark.native
def test_compiles_as_one_graph(device):
    torch._dynamo.reset()

    def op(feats):
        return wsss_kernels.hspp(feats * 2, levels=(1, 2, 3)) + 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((1, 2, 5, 7), (2, 3, 4, 6), (3, 2, 8, 8)):
        feats = ties(*shape).to(device).requires_grad_()
        got, expected = compiled(feats), op(feats)
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), feats)[0] for out in (got, expected)))


FEATS = torch.ones(1, 2, 5, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feats": FEATS[0]}, ValueError, "feats must be a floating point tensor"),
        ({"feats": FEATS.long()}, TypeError, "feats must be a floating point tensor"),
        ({"feats": FEATS[:, :0]}, ValueError, "feats must have at least one channel"),
        ({"feats": FEATS}, ValueError, "feats must have at least 4 rows and columns for level 4"),
        ({"feats": FEATS[:, :, :0], "levels": (1,)}, ValueError, "feats must have at least 1 rows and columns"),
        ({"levels": ()}, ValueError, "levels must be one whole number >= 1 or more, got none"),
        ({"levels": (0,)}, ValueError, "levels must be whole numbers >= 1, got 0"),
        ({"levels": (1.0,)}, TypeError, "levels must be whole numbers >= 1, got 1.0"),
        ({"levels": 2}, TypeError, "levels must be a tuple or list"),
        ({"levels": (1,), "gamma": -1}, ValueError, "gamma must be a number >= 0, got -1"),
        ({"levels": (1,), "gamma": float("nan")}, ValueError, "gamma must be a number >= 0"),
        ({"levels": (1,), "gamma": "2"}, TypeError, "gamma must be a number >= 0"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"feats": FEATS, **change}
    with pytest.raises(error, match=message):
        wsss_kernels.hspp(arguments.pop("feats"), **arguments)
