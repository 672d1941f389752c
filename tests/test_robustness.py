"""What a kernel library must survive: garbage, forks, threads, repetition, small memory, older processors."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import wsss_kernels as wk
from wsss_kernels import _dispatch, reference


def run(script: str, timeout: float = 120, **environment: str) -> str:
    """The script's output; it must end by itself and well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def everything(shapes=(((1, 6, 25, 50), 5), ((4, 3, 12, 21), 3))) -> list[torch.Tensor]:
    """Every op and its gradients, in both precisions of the walk."""
    out = []
    for shape, radius in shapes:
        batch, _, height, width = shape
        for metric, solver, tol in (("l1", "auto", 1e-4), ("cosine", "power", 1e-4), ("l1", "chebyshev", 1e-7)):
            feats, maps = rand(batch, 20, height, width).requires_grad_(), rand(*shape, seed=1).requires_grad_()
            affinity = wk.local_affinity(feats, radius, metric=metric, scale="auto")
            walked = wk.random_walk(maps, affinity, radius=radius, steps=20, solver=solver, tol=tol)
            near = wk.boundary_affinity(feats[:, :1], radius)
            out += [near, *torch.autograd.grad(near.square().sum(), feats)]
            out += [affinity, walked, *torch.autograd.grad(walked.square().sum(), (maps, feats))]
        segments = (9 * rand(batch, height, width, seed=2)).long()
        out += [wk.mask_vote(maps, segments), wk.mask_vote(maps, [segments[:1] < 4] * batch, reduce="max")]
    return [tensor.detach() for tensor in out]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# Determinism


def test_fifty_repeats_are_bit_equal():
    first = everything()
    for _ in range(50 if _dispatch.native else 1):
        assert equal(everything(), first)


@pytest.mark.native
def test_the_number_of_threads_does_not_change_a_bit():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                everything((((1, 2, 96, 130), 5), ((5, 7, 30, 31), 5), ((1, 3, 7, 150), 7), ((1, 1, 150, 1), 3)))
            )
    finally:
        torch.set_num_threads(before)
    assert all(equal(result, results[0]) for result in results)


@pytest.mark.native
def test_python_threads():
    expected = everything_small()
    failures = []

    def work():
        for _ in range(100):
            if not equal(everything_small(), expected):
                failures.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def everything_small() -> list[torch.Tensor]:
    feats, maps = rand(1, 8, 16, 17).requires_grad_(), rand(1, 3, 16, 17, seed=1).requires_grad_()
    affinity = wk.local_affinity(feats, scale="auto")
    walked = wk.random_walk(maps, affinity, steps=16)
    return [affinity.detach(), walked.detach(), *torch.autograd.grad(walked.square().sum(), (maps, feats))]


# Processes


class Walks(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        torch.set_num_threads(2)  # a worker's default is 1
        return wk.random_walk(
            rand(1, 2, 20, 21, seed=index), wk.local_affinity(rand(1, 4, 20, 21, seed=index)), steps=16
        )[0]


@pytest.mark.native
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.release), "forkserver"])
def test_data_loader_workers(context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    wk.random_walk(rand(1, 2, 60, 60), wk.local_affinity(rand(1, 4, 60, 60)))  # the parent's thread pool exists
    workers = 4 if context == "fork" else 1
    loader = DataLoader(Walks(), batch_size=1, num_workers=workers, multiprocessing_context=context, timeout=60)
    for index, batch in enumerate(loader):
        if index % 97 == 0:
            assert torch.equal(batch[0], Walks()[index])
        if context != "fork" and index == 20:
            break


@pytest.mark.native
def test_fork_after_threads():
    run(
        """
        import os, signal, torch, wsss_kernels as wk
        torch.set_num_threads(2)
        # Torch's own threads hang in a forked child: tensors of under 32768 elements do without them.
        feats, maps = torch.rand(2, 2, 75, 76, requires_grad=True), torch.rand(2, 2, 75, 76)
        expected = wk.random_walk(maps, wk.local_affinity(feats))
        expected.backward(maps)
        grad, feats.grad = feats.grad, None
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                torch.set_num_threads(2)
                out = wk.random_walk(maps, wk.local_affinity(feats))
                out.backward(maps)
                os._exit(0 if torch.equal(out, expected) and torch.equal(feats.grad, grad) else 1)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(wk.random_walk(maps, wk.local_affinity(feats)), expected)
        """
    )


def test_import_starts_nothing():
    run(
        """
        import threading, torch, wsss_kernels
        assert not torch.cuda.is_initialized()
        assert threading.active_count() == 1
        """
    )


@pytest.mark.native
def test_calls_from_a_thread_that_ends(oracle):
    """A pool that belongs to a thread goes with it."""
    maps, affinity = rand(1, 3, 50, 50), wk.local_affinity(rand(1, 4, 50, 50))
    expected = wk.random_walk(maps, affinity)
    for _ in range(20):
        results = []
        thread = threading.Thread(target=lambda results=results: results.append(wk.random_walk(maps, affinity)))
        thread.start()
        thread.join(timeout=60)
        assert torch.equal(results[0], expected)


# Memory

MEASURE = """
import resource, sys, torch, wsss_kernels as wk
torch.set_num_threads(2)
def peak():  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
def now():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20
"""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.native
@needs_linux
def test_memory_of_a_large_walk():
    """W packed is 1.3 K H W floats (45 MiB at 512x512, K = 34), states 3 x 5 maps: the affinity alone is 34 MiB."""
    grown = float(run(MEASURE + """
maps, affinity = torch.rand(1, 21, 512, 512), torch.rand(1, 34, 512, 512)
wk.random_walk(maps[..., :8, :8], affinity[..., :8, :8])
before = peak()
wk.random_walk(maps, affinity, steps=32)
print(peak() - before)
"""))  # fmt: skip
    weights, states, out = 1.35 * 34, 3.3 * 5, 21  # MiB: one 512x512 float plane is 1 MiB
    assert grown < 1.1 * (weights + states + out)


@pytest.mark.native
@needs_linux
def test_memory_of_the_affinity_of_a_training_batch():
    """Gathering pairs of [8, 448, 56, 56] takes 1.2 GB a copy; the kernel keeps one image's [K, H, W]."""
    grown = float(run(MEASURE + """
feats = torch.rand(8, 448, 56, 56, requires_grad=True)
wk.local_affinity(feats[:1, :, :9, :9]).sum().backward()
feats.grad = None
before = peak()
wk.local_affinity(feats).sum().backward()
print(peak() - before)
"""))  # fmt: skip
    assert grown < 150


@pytest.mark.native
@needs_linux
def test_memory_of_the_boundary_affinity():
    """Gathering the paths of [8, 1, 128, 128] for radius 10 takes 900 MB a copy, the result 76 MiB."""
    grown = float(run(MEASURE + """
boundary = torch.rand(8, 1, 128, 128, requires_grad=True)
grad = torch.rand(8, 152, 128, 128)
wk.boundary_affinity(boundary[..., :9, :9], 10).sum().backward()
before = peak()
wk.boundary_affinity(boundary, 10).backward(grad)
print(peak() - before)
"""))  # fmt: skip
    assert grown < 150


@pytest.mark.native
@needs_linux
def test_memory_of_irnets_propagation():
    """Its dense matrix is 681 MB at 94x125."""
    grown = float(run(MEASURE + """
cams, boundary = torch.rand(1, 2, 94, 125), torch.rand(1, 1, 94, 125)
wk.refine_cams(cams[..., :9, :9], boundary[..., :9, :9], preset="irn")
before = peak()
wk.refine_cams(cams, boundary, preset="irn")
print(peak() - before)
"""))  # fmt: skip
    assert grown < 20


@pytest.mark.native
@needs_linux
def test_nothing_leaks():
    grown = float(run(MEASURE + """
feats, maps = torch.rand(1, 4, 16, 17, requires_grad=True), torch.rand(1, 3, 16, 17, requires_grad=True)
def call():
    wk.random_walk(maps, wk.local_affinity(feats, scale="auto"), steps=9).sum().backward()
    try:
        wk.random_walk(maps, maps)
    except ValueError:
        pass
growth = []
for _ in range(5):
    before = now()
    for _ in range(700):
        call()
    growth.append(now() - before)
print(min(growth))
"""))  # fmt: skip
    assert grown < 0.1  # MB in 700 calls, 150 bytes a call: a leak grows in every round, the allocator in some


# Instruction sets


@pytest.mark.native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa, tmp_path, oracle, assert_close):
    order = ["baseline", "avx2", "avx512"]
    from wsss_kernels import _C

    best = run("from wsss_kernels import _C; print(_C.cpu_isa)", WSSS_CPU_ISA="").strip()
    assert _C.cpu_isa in order
    if order.index(isa) > order.index(best):
        pytest.skip(f"this processor or build has no {isa}")
    script = f"""
    import torch, wsss_kernels as wk
    from wsss_kernels import _C
    assert _C.cpu_isa == {isa!r}
    torch.set_num_threads(2)
    results = []
    for i, (batch, channels, height, width, radius, steps) in enumerate([
        (1, 3, 9, 17, 5, 20), (2, 7, 5, 3, 2, 9), (1, 5, 17, 20, 5, 256), (1, 4, 11, 70, 10, 12), (3, 2, 1, 9, 3, 4),
        (1, 1, 40, 140, 5, 6),
    ]):
        torch.manual_seed(i)
        for metric, scale in (("l1", 0.5), ("l1", "auto"), ("cosine", 1.0), ("cosine", "auto")):
            feats, maps = torch.randn(batch, 9, height, width), torch.rand(batch, channels, height, width)
            feats.requires_grad_(), maps.requires_grad_()
            affinity = wk.local_affinity(feats, radius, metric=metric, scale=scale)
            affinity.retain_grad()
            tol = 1e-7 if i % 2 else 1e-5
            out = wk.random_walk(maps, affinity, radius=radius, beta=2.5 if i % 2 else 3, steps=steps, tol=tol)
            out.square().sum().backward()
            near = wk.boundary_affinity(maps[:, :1], radius)
            near_grad = torch.autograd.grad(near.square().sum(), maps)[0][:, :1]
            results.append((near.detach(), near_grad, radius, metric, scale, steps, 2.5 if i % 2 else 3,
                            [t.detach() for t in (feats, maps, affinity, out)],
                            maps.grad, affinity.grad, feats.grad))
    torch.save(results, {str(tmp_path / "results.pt")!r})
    """
    run(script, WSSS_CPU_ISA=isa)
    for (
        near,
        near_grad,
        radius,
        metric,
        scale,
        steps,
        beta,
        tensors,
        grad_maps,
        grad_affinity,
        grad_feats,
    ) in torch.load(tmp_path / "results.pt"):
        feats, maps, affinity, out = tensors
        edge = maps[:, :1].double().requires_grad_()
        expected = reference.boundary_affinity(edge, radius)
        assert_close(near, expected)
        assert_close(near_grad, torch.autograd.grad(expected.square().sum(), edge)[0])
        exact = feats.double().requires_grad_()
        expected = oracle.affinity(exact, radius, metric, scale)
        assert_close(affinity, expected)
        x, a = maps.double().requires_grad_(), affinity.double().requires_grad_()
        if x[0, 0].numel() <= 700:
            walked = oracle.dense_walk(x, a, radius, beta, steps)
            assert_close(out, walked)
            walked.square().sum().backward()
            assert_close(grad_maps, x.grad)
            assert_close(grad_affinity, a.grad, 5e-5)
        else:
            assert_close(out, oracle.walk(maps, affinity, radius, beta, steps))
        expected.backward(grad_affinity.double())
        assert_close(grad_feats, exact.grad)


@pytest.mark.native
@pytest.mark.parametrize("name", ["avx1024", " "])
def test_unknown_instruction_set_is_refused(name):
    script = """
    try:
        from wsss_kernels import _dispatch
    except (ImportError, RuntimeError, ValueError) as error:
        assert "WSSS_CPU_ISA" in str(error), error
    else:
        assert _dispatch.native is None and "WSSS_CPU_ISA" in _dispatch.native_absence
    """
    run(script, WSSS_CPU_ISA=name)


# Garbage


@pytest.mark.native
@pytest.mark.parametrize("seed", range(2))
def test_garbage(seed):
    """10,000 calls: only TypeError, ValueError and RuntimeError come out, and the process lives."""
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, script, str(seed), "5000"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
