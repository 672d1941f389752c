"""What holds for every op: instruction sets, repetition, threads, memory."""

import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import wsss_kernels as wk

SCRIPT = Path(__file__).with_name("samples.py")
MODULE = runpy.run_path(str(SCRIPT))
SAMPLES, SHAPES = MODULE["SAMPLES"], MODULE["SHAPES"]
# Of the largest value, where more is documented than 1e-5: the filters are the float32 peer's, and the walk keeps tol.
TOLERANCES = {"dense_crf": 1e-4, "dense_energy_loss": 1e-4, "pixel_adaptive": 5e-5, "random_walk": 1e-4}

pytestmark = pytest.mark.native


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture(scope="module")
def expected():
    """In float64, which is the references' own."""
    return MODULE["results"](torch.float64)


def test_samples_are_complete():
    assert set(SAMPLES) == set(wk.info()["ops"])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa, tmp_path, expected, assert_close):
    order = ["baseline", "avx2", "avx512"]
    show = "from wsss_kernels import _C; print(_C.cpu_isa)"
    best = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    if order.index(isa) > order.index(best):
        pytest.skip(f"this processor or build has no {isa}")
    file = tmp_path / "results.pt"
    subprocess.run([sys.executable, SCRIPT, file], env=os.environ | {"WSSS_CPU_ISA": isa}, check=True, timeout=120)
    results = torch.load(file)
    for name, wanted in expected.items():
        assert len(results[name]) == len(wanted)
        for got, exact in zip(results[name], wanted, strict=True):
            if exact.is_floating_point():
                assert_close(got, exact, TOLERANCES.get(name, 1e-5))
            else:
                assert torch.equal(got, exact), name


@pytest.mark.parametrize("name", SAMPLES)
def test_the_same_bits_again_and_for_any_number_of_threads(name, assert_close):
    before = torch.get_num_threads()
    try:
        for shape in ((2, 20, 50), *SHAPES):
            first = SAMPLES[name](*shape, torch.float32)
            for threads in (1, 2, 3, 7, before, before):
                torch.set_num_threads(threads)
                again = SAMPLES[name](*shape, torch.float32)
                if name == "attention_walk" and threads != before:  # torch's own matrix product
                    for got, wanted in zip(again, first, strict=True):
                        assert_close(got, wanted.double())
                else:
                    assert equal(again, first), f"{shape} with {threads} threads"
    finally:
        torch.set_num_threads(before)


def test_called_from_several_threads_at_once():
    shape, failures = SHAPES[-1], []
    expected = {name: sample(*shape, torch.float32) for name, sample in SAMPLES.items()}

    def work():
        for _ in range(3):
            failures.extend(
                name for name, sample in SAMPLES.items() if not equal(sample(*shape, torch.float32), expected[name])
            )

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


LEAKS = """
import ctypes, runpy, sys
import torch

torch.set_num_threads(1)

def now():  # KB
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

for name, sample in runpy.run_path(sys.argv[1])["SAMPLES"].items():
    growth = []
    for _ in range(6):
        before = now()
        for _ in range(60):
            sample(1, 8, 9, torch.float32)
        growth.append(now() - before)
    print(name, min(growth[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_leaks():
    done = subprocess.run(
        [sys.executable, "-c", LEAKS, SCRIPT], capture_output=True, text=True, check=True, timeout=300
    )
    grown = {name: int(by) for name, by in map(str.split, done.stdout.splitlines())}
    assert set(grown) == set(SAMPLES)
    # KB in 60 calls: a leak grows in every round, the allocator in some.
    assert not {name: by for name, by in grown.items() if by >= 64}
