"""Dense CRF and its loss: opcheck, compile, which kernel runs, instruction sets, processes, memory."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import wsss_kernels as wk
from tests.samples import smooth_picture as picture
from tests.test_dense_crf import IMAGE, UNARY, energies, native_tolerance
from wsss_kernels import _dispatch, reference

pytestmark = pytest.mark.usefixtures("seeded")


# Torch's machinery


@pytest.mark.native
@pytest.mark.parametrize("shape, dtype", [((2, 3, 6, 9), torch.float32), ((1, 5, 4, 1), torch.float16),
                                          ((1, 0, 3, 3), torch.float32), ((1, 21, 5, 7), torch.bfloat16)])  # fmt: skip
def test_opcheck(shape, dtype):
    ops = torch.ops.wsss_kernels
    image, maps = picture(shape[0], *shape[2:]), torch.rand(shape).to(dtype)
    arguments = (2, [3.0, 3.0, 3.0], [80.0, 80.0, 13.0, 13.0, 13.0, 10.0])
    torch.library.opcheck(ops.dense_crf.default, (image, maps, *arguments))
    torch.library.opcheck(ops.dense_crf.default, (image.float().mT.contiguous().mT, maps, *arguments))
    for roi in (None, torch.rand(shape[0], *shape[2:]) > 0.2):
        leaf = maps.clone().requires_grad_()
        torch.library.opcheck(ops.dense_energy_loss.default, (image, leaf, roi, 15.0, 100.0, True))
        loss, slope = ops.dense_energy_loss(image, maps, roi, 15.0, 100.0, True)
        torch.library.opcheck(ops.dense_energy_loss_backward.default, (torch.ones_like(loss), slope, maps))
    torch.library.opcheck(ops.dense_energy_loss.default, (image, maps, None, 15.0, 100.0, False))


@pytest.mark.native
def test_compiled():
    torch._dynamo.reset()

    def op(image, maps):
        marginals = wk.dense_crf(image, maps.detach() * 2, iterations=2) + 1
        return marginals, wk.dense_energy_loss(image, maps.softmax(1)) * 3

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height, width in ((1, 9, 11), (2, 20, 13), (3, 7, 40)):
        image = picture(batch, height, width)
        one, other = (energies(batch, 4, height, width).requires_grad_() for _ in range(2))
        expected, out = op(image, one), compiled(image, other)
        assert all(map(torch.equal, out, expected))
        expected[1].backward(), out[1].backward()
        torch.testing.assert_close(one.grad, other.grad)
    torch._dynamo.reset()


# Kernels


@pytest.mark.native
def test_info_says_what_runs_on_a_gpu():
    rows, built = wk.info()["ops"], bool(_dispatch.native.cuda_archs)
    why_not = "" if built else "the module was compiled without CUDA; {} has no Triton kernel"
    kernels = [("dense_crf", "forward"), ("dense_energy_loss", "forward"), ("dense_energy_loss", "backward")]
    for op, direction in kernels:
        assert rows[op]["cpu"][direction]["kernel"] == "native"
        if not torch.cuda.is_available():
            kernel = {"kernel": "cuda" if built else "reference", "because": why_not.format(op)}
            assert rows[op]["cuda"][direction] == kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wk.dense_crf(IMAGE, UNARY)


@pytest.mark.native
@pytest.mark.parametrize("choice", ["", "cuda", "triton"])
def test_the_choice_of_gpu_kernels_is_for_ops_that_have_both(choice, monkeypatch):
    monkeypatch.setattr(_dispatch, "GPU_KERNELS", choice)
    for op in ("dense_crf", "dense_energy_loss", "dense_energy_loss_backward"):
        assert _dispatch.gpu_kernel(op)[0] == ("cuda" if _dispatch.native.cuda_archs else "reference")


@pytest.mark.native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets(isa, tmp_path):
    if _dispatch.native.cpu_isa == "baseline":
        pytest.skip("this processor or build has the baseline only")
    shapes = [(1, 3, 40, 70), (2, 7, 20, 31), (1, 12, 33, 17), (1, 21, 9, 80), (1, 50, 12, 13)]
    cases = [(picture(s[0], *s[2:]), energies(*s)) for s in shapes]
    torch.save(cases, tmp_path / "cases.pt")
    script = f"""
import torch, wsss_kernels as wk
from wsss_kernels import _C
assert _C.cpu_isa == {isa!r}
results = []
for image, unary in torch.load({str(tmp_path / "cases.pt")!r}):
    leaf = torch.softmax(-unary, 1).requires_grad_()
    wk.dense_energy_loss(image, leaf).backward()
    results.append((wk.dense_crf(image, unary), leaf.grad))
torch.save(results, {str(tmp_path / "results.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"WSSS_CPU_ISA": isa})
    for (image, unary), (out, grad) in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        assert (out - reference.dense_crf(image, unary.double())).abs().max() < native_tolerance
        exact = torch.softmax(-unary, 1).double().requires_grad_()
        reference.dense_energy_loss(image, exact).backward()
        assert (grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


# Processes, memory


def run(script, *arguments, timeout=200):
    """The script must end by itself and well."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.native
def test_fork_after_threads():
    run("""
        import os, signal, torch, wsss_kernels as wk
        torch.set_num_threads(2)
        image, unary = torch.zeros(1, 3, 70, 80, dtype=torch.uint8), torch.rand(1, 3, 70, 80)
        expected = wk.dense_crf(image, unary)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(2)
            os._exit(0 if torch.equal(wk.dense_crf(image, unary), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        """)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory():
    """Of 21 labels on 375 x 500: rows of 24 floats a pixel, 45 values a pixel for the lattices, and their points."""
    peak, leak = map(float, run("""
        import resource, torch, wsss_kernels as wk
        torch.set_num_threads(2)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def now():
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * resource.getpagesize() / 2**20
        y, x = torch.meshgrid(torch.arange(375), torch.arange(500), indexing="ij")
        image = torch.stack([x / 2, y / 2, (x + y) / 4])[None].byte()
        unary = torch.rand(1, 21, 375, 500)
        wk.dense_crf(image[..., :40, :40], unary[..., :40, :40])
        before = peak()
        wk.dense_crf(image, unary)
        print(peak() - before)
        image, unary = image[..., :40, :70].contiguous(), unary[:, :3, :40, :70].contiguous().requires_grad_()
        def call():
            wk.dense_crf(image, unary.detach(), iterations=1)
            wk.dense_energy_loss(image, unary).backward()
        for _ in range(200):
            call()
        before = now()
        for _ in range(1000):
            call()
        print(now() - before)
        """).split())  # fmt: skip
    plane = 375 * 500 * 4 / 2**20
    assert peak < (21 + 24 + 45 + 24) * plane * 1.1
    assert leak < 1
