"""soft_histogram against NumPy in float64."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import wsss_kernels
from wsss_kernels import reference

# B, D, H, W, M: single values, odd sizes, several tiles and depths, more words than a block
SHAPES = [(2, 5, 3, 7, 4), (1, 300, 13, 17, 37), (1, 1030, 10, 10, 256), (3, 129, 9, 31, 65), (2, 40, 1, 1, 3),
          (1, 2, 20, 21, 300)]  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(feats: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Histogram and cosines [B, M, N]."""
    f, c = feats.detach().double().flatten(2).numpy(), codebook.detach().double().numpy()
    lengths = np.linalg.norm(c, axis=1)[None, :, None] * np.linalg.norm(f, axis=1)[:, None]
    cosine = np.divide(np.einsum("md,bdn->bmn", c, f), lengths, out=np.zeros_like(lengths), where=lengths > 1e-12)
    weight = np.exp(temperature * (cosine - cosine.max(1, keepdims=True)))
    return torch.from_numpy((weight / weight.sum(1, keepdims=True)).sum(2)), torch.from_numpy(cosine)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_forward(wk, nan_filled, assert_close, shape, temperature):
    batch, dim, height, width, count = shape
    feats, codebook = randn(batch, dim, height, width), randn(count, dim, seed=1)
    feats[0, :, 0, 0] = 0
    expected, cosine = oracle(feats, codebook, temperature)
    for f, c in ((feats, codebook), (feats.double(), codebook.double())):
        histogram, words, assignment = wk.soft_histogram(f, c, temperature=temperature)
        assert (histogram.dtype, words.dtype, assignment.dtype) == (f.dtype, torch.bool, torch.int64)
        assert histogram.shape == words.shape == (batch, count) and assignment.shape == (batch, height, width)
        assert_close(histogram, expected)
        chosen = cosine.gather(1, assignment.flatten(1)[:, None])[:, 0]
        assert (cosine.amax(1) - chosen).abs().max() < 1e-6  # which of two that float32 cannot tell apart is open
        held = torch.zeros(batch, count, dtype=torch.bool).scatter(1, assignment.flatten(1), True)
        assert torch.equal(words, held)
        assert assignment[0, 0, 0] == 0  # a zero vector: every cosine 0, the lowest index


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_gradients(wk, nan_filled, assert_close, shape, temperature):
    batch, dim, height, width, count = shape
    feats, codebook, upstream = randn(batch, dim, height, width), randn(count, dim, seed=1), randn(batch, count, seed=2)
    feats[0, :, 0, 0] = 0
    exact = [x.double().requires_grad_() for x in (feats, codebook)]
    expected = torch.autograd.grad(
        reference.soft_histogram(*exact, temperature=temperature)[0], exact, upstream.double()
    )
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [x.clone().requires_grad_(w) for x, w in zip((feats, codebook), wanted, strict=True)]
        histogram = wk.soft_histogram(*leaves, temperature=temperature)[0]
        chosen = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(histogram, chosen, upstream.to(histogram.device))
        for grad, want in zip(grads, [e for e, w in zip(expected, wanted, strict=True) if w], strict=True):
            assert_close(grad, want)


def test_by_hand(wk):
    feats = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # two pixels: along x, along y
    codebook = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, -1.0]])
    histogram, words, assignment = wk.soft_histogram(feats, codebook, temperature=2.0)
    e = math.exp(2)
    first, second = e + 2, 1 + e + 1 / e
    expected = [1 / first + e / second, e / first + 1 / second, 1 / first + 1 / e / second]
    assert histogram[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert words.tolist() == [[True, True, False]] and assignment.tolist() == [[[1, 0]]]


def test_scale_of_features_and_words_does_not_matter(wk, assert_close):
    feats, codebook = randn(1, 30, 5, 6), randn(7, 30, seed=1)
    expected = wk.soft_histogram(feats, codebook)[0]
    for scale in (1e-6, 1e3):
        assert_close(wk.soft_histogram(feats * scale, codebook / scale)[0], expected)


def test_ties_go_to_the_lowest_word(wk):
    feats, codebook = randn(1, 33, 9, 10), randn(20, 33, seed=1)
    codebook = torch.cat([codebook, codebook, codebook])
    _, words, assignment = wk.soft_histogram(feats, codebook)
    assert assignment.max() < 20 and not words[:, 20:].any()


def test_bins_add_up_to_the_pixels(wk):
    histogram, *_ = wk.soft_histogram(randn(3, 20, 11, 13), randn(50, 20, seed=1), temperature=7.0)
    torch.testing.assert_close(histogram.sum(1), torch.full((3,), 143.0), rtol=1e-5, atol=0)


@pytest.mark.native
def test_the_number_of_threads_and_the_batch_do_not_change_a_bit():
    feats, codebook, upstream = randn(3, 130, 17, 19), randn(70, 130, seed=1), randn(3, 70, seed=2)

    def run(f: Tensor, g: Tensor) -> list[Tensor]:
        leaves = [f.clone().requires_grad_(), codebook.clone().requires_grad_()]
        out = wsss_kernels.soft_histogram(*leaves, temperature=3.0)
        return [*out, *torch.autograd.grad(out[0], leaves, g)]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(feats, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, result, results[0])) for result in results)
    for b in range(3):
        alone = run(feats[b : b + 1], upstream[b : b + 1])
        assert all(torch.equal(alone[i][0], results[0][i][b]) for i in range(4))


@pytest.mark.native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa, tmp_path, assert_close):
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(wsss_kernels.info()["cpu"]["isa"]):
        pytest.skip(f"this processor or build has no {isa}")
    feats, codebook, upstream = randn(2, 135, 11, 13), randn(53, 135, seed=1), randn(2, 53, seed=2)
    torch.save([feats, codebook, upstream], tmp_path / "inputs.pt")
    script = f"""
import torch, wsss_kernels as wk
assert wk.info()["cpu"]["isa"] == {isa!r}
feats, codebook, upstream = torch.load({str(tmp_path / "inputs.pt")!r})
leaves = [feats.requires_grad_(), codebook.requires_grad_()]
histogram, words, assignment = wk.soft_histogram(*leaves, temperature=5.0)
grads = torch.autograd.grad(histogram, leaves, upstream)
torch.save([histogram.detach(), words, assignment, *grads], {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"WSSS_CPU_ISA": isa}, check=True)
    histogram, words, assignment, *grads = torch.load(tmp_path / "out.pt")
    exact = [x.double().requires_grad_() for x in (feats, codebook)]
    expected = reference.soft_histogram(*exact, temperature=5.0)
    assert_close(histogram, expected[0])
    assert torch.equal(words, expected[1]) and torch.equal(assignment, expected[2])
    for grad, wanted in zip(grads, torch.autograd.grad(expected[0], exact, upstream.double()), strict=True):
        assert_close(grad, wanted)


def test_dtypes(wk, assert_close, dtype):
    feats, codebook = randn(1, 24, 6, 7).to(dtype), randn(9, 24, seed=1)
    for words in (codebook.to(dtype), codebook):
        histogram = wk.soft_histogram(feats, words, temperature=3.0)[0]
        assert histogram.dtype == dtype
        assert_close(histogram, oracle(feats, words, 3.0)[0], tol=1e-5 if dtype == torch.float64 else None)


def test_layouts(wk, layout):
    feats, codebook = layout(randn(2, 24, 6, 8)), randn(9, 24, seed=1)
    expected = wk.soft_histogram(feats.clone(memory_format=torch.contiguous_format), codebook)
    got = wk.soft_histogram(feats, codebook.mT.contiguous().mT)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_image(wk, bad):
    feats, codebook = randn(2, 24, 6, 7), randn(9, 24, seed=1)
    clean = wk.soft_histogram(feats, codebook)
    feats[0, 3, 2, 2] = bad
    histogram, words, assignment = wk.soft_histogram(feats, codebook)
    assert histogram[0].isnan().all() and assignment[0, 2, 2] == 0
    assert torch.equal(histogram[1], clean[0][1]) and torch.equal(words[1], clean[1][1])
    clean[2][0, 2, 2] = 0
    assert torch.equal(assignment, clean[2])
    codebook[4, 1] = bad
    histogram, words, assignment = wk.soft_histogram(feats, codebook)
    assert histogram.isnan().all() and (assignment[1] == 4).all() and words[1].nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(wk, shape):
    feats, codebook = torch.rand(shape, requires_grad=True), torch.rand(6, 3, requires_grad=True)
    histogram, words, assignment = wk.soft_histogram(feats, codebook)
    assert histogram.shape == words.shape == (shape[0], 6) and assignment.shape == (shape[0], *shape[2:])
    assert (histogram == 0).all() and not words.any()
    grads = torch.autograd.grad(histogram.sum(), (feats, codebook))
    assert grads[0].shape == shape and (grads[1] == 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 4), (2, 2, 1, 3, 2), (1, 1, 1, 1, 1), (1, 4, 3, 1, 1), (2, 3, 1, 1, 5)])
def test_reference_gradcheck(shape):
    batch, dim, height, width, count = shape
    leaves = [x.double().requires_grad_() for x in (randn(batch, dim, height, width), randn(count, dim, seed=1))]
    assert torch.autograd.gradcheck(lambda f, c: reference.soft_histogram(f, c, temperature=2.0)[0], leaves)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wants", [(True, True), (False, True), (True, False)])
def test_opcheck(device, dtype, wants):
    feats, codebook = randn(2, 5, 3, 4).to(device, dtype), randn(6, 5, seed=1).to(device, dtype)
    arguments = (feats.requires_grad_(wants[0]), codebook.requires_grad_(wants[1]), 2.0)
    torch.library.opcheck(torch.ops.wsss_kernels.soft_histogram.default, arguments, atol=1e-2, rtol=1e-2)


@pytest.mark.native
def test_compiles_as_one_graph(device):
    torch._dynamo.reset()

    def op(feats, codebook):
        histogram, words, assignment = wsss_kernels.soft_histogram(feats * 2, codebook, temperature=2.0)
        return histogram + 1, words, assignment

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, dim, height, width, count in ((1, 5, 3, 4, 6), (2, 7, 5, 3, 9), (3, 4, 6, 6, 5)):
        feats, codebook = randn(batch, dim, height, width).to(device), randn(count, dim, seed=1).to(device)
        codebook.requires_grad_()
        got, expected = compiled(feats, codebook), op(feats, codebook)
        assert all(map(torch.equal, got, expected))
        grads = [torch.autograd.grad(out[0].square().sum(), codebook)[0] for out in (got, expected)]
        assert torch.equal(*grads)


@pytest.mark.native
def test_no_second_derivative():
    codebook = randn(4, 3, seed=1).requires_grad_()
    histogram = wsss_kernels.soft_histogram(randn(1, 3, 2, 2), codebook)[0]
    (grad,) = torch.autograd.grad(histogram.square().sum(), codebook, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), codebook)


FEATS, CODEBOOK = torch.ones(1, 3, 2, 2), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feats": FEATS[0]}, ValueError, "feats must be a floating point tensor"),
        ({"feats": FEATS.long()}, TypeError, "feats must be a floating point tensor"),
        ({"feats": FEATS[:, :0]}, ValueError, "feats must have at least one channel"),
        ({"codebook": CODEBOOK[0]}, ValueError, "codebook must be a floating point tensor"),
        ({"codebook": None}, TypeError, "codebook must be a floating point tensor"),
        ({"codebook": CODEBOOK[:0]}, ValueError, "codebook must hold at least one word of 3 channels"),
        ({"codebook": CODEBOOK[:, 1:]}, ValueError, "codebook must hold at least one word of 3 channels"),
        ({"codebook": CODEBOOK.to("meta")}, ValueError, "codebook must be on the device of feats"),
        ({"temperature": 0}, ValueError, "temperature must be a number > 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be a number > 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a number > 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number > 0"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"feats": FEATS, "codebook": CODEBOOK, **change}
    with pytest.raises(error, match=message):
        wsss_kernels.soft_histogram(arguments.pop("feats"), arguments.pop("codebook"), **arguments)
