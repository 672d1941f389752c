"""Every CUDA source compiled for every architecture of a release: registers, spills and the loops that take the time.

No GPU is needed. `python -m tests.test_cuda_compile` prints the table.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda import disassembly

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ARCHS = (75, 80, 86, 89, 90, 100, 120)
NO_SPILLS = (80, 90)  # the architectures the kernels are shaped for; elsewhere a spill is reported
SOURCES = [*sorted(CSRC.glob("*.cu")), *sorted((ROOT / "benchmarks").glob("*.cu"))]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc (looked at CUDACXX, PATH, /usr/local/cuda/bin)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    arch: int
    registers: int
    stack: int  # bytes, as are the spills
    spill_stores: int
    spill_loads: int

    def __str__(self) -> str:
        return (f"sm_{self.arch:<4} {self.registers:>9} {self.stack:>6} {self.spill_stores:>7} {self.spill_loads:>6}  "
                f"{self.name}")  # fmt: skip


HEADER = "arch    registers  stack  stores  loads  kernel"


def cubin_of(source: str, arch: int, folder: Path) -> Path:
    return folder / f"{source}.sm_{arch}.cubin"


def compiled(source: Path, arch: int, folder: Path) -> list[Kernel]:
    """The kernels of one file for one architecture, as ptxas reports them; warnings are errors."""
    command = [
        NVCC, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=sm_{arch}", "-cubin", "-o", cubin_of(source.name, arch, folder),
        "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", "-Werror=cross-execution-space-call", str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source.name}, sm_{arch}:\n{done.stderr}"
    warnings = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert not warnings, f"{source.name}, sm_{arch}: {warnings}"
    return parsed(done.stderr, arch)


def parsed(report: str, arch: int) -> list[Kernel]:
    kernels = []
    entry = ""
    properties = (0, 0, 0)
    current = ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = match[1]
        elif match := re.search(r"Function properties for (\w+)", line):
            current = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if current == entry:
                properties = (int(match[1]), int(match[2]), int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            kernels.append(Kernel(readable(entry), arch, int(match[1]), *properties))
    return kernels


def readable(symbol: str) -> str:
    demangle = shutil.which("c++filt")
    if demangle is None:
        return symbol
    name = subprocess.run([demangle, symbol], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|wsss::|^void |\(.*$|_GLOBAL__N__\w+::", "", name)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def table(cubins) -> dict[tuple[str, int], list[Kernel]]:
    return compile_all(cubins)


def compile_all(folder: Path) -> dict[tuple[str, int], list[Kernel]]:
    jobs = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {
            (source.name, arch): kernels
            for (source, arch), kernels in zip(jobs, pool.map(lambda job: compiled(*job, folder), jobs), strict=True)
        }


@pytest.mark.parametrize("arch", NO_SPILLS)
def test_nothing_spills(table, arch):
    spilled = [str(kernel) for (_, of), kernels in table.items() if of == arch for kernel in kernels
               if kernel.spill_stores or kernel.spill_loads or kernel.stack]  # fmt: skip
    assert not spilled, "\n".join([HEADER, *spilled])


def test_every_kernel_is_in_the_table(table):
    for source in SOURCES:
        kernels = len(re.findall(r"\b__global__\b", source.read_text()))
        for arch in ARCHS:
            assert len(table[source.name, arch]) >= kernels, f"{source.name}, sm_{arch}: {table[source.name, arch]}"


# What a loop is for, by the instructions it cannot do without, and the most it may have in all; see docs/gpu.md.
@pytest.mark.skipif(disassembly.nvdisasm() is None, reason="no nvdisasm, neither CUDA's nor Triton's")
@pytest.mark.parametrize(
    ("source", "kernel", "needed", "most"),
    [
        # a product of the walk: a subtraction and a multiply-add for each of 68 links of three pixels
        ("random_walk_resident.cu", "resident_walk_kernelIfLb1E", {"FFMA": 204, "FADD": 204}, 670),
        ("random_walk_resident.cu", "resident_walk_kernelIfLb0E", {"FFMA": 204, "FADD": 204}, 640),
        # a stencil row of nine links, eight pixels: two additions each, or a multiply-add
        ("local_affinity.cu", "7radius5.*sums_kernelIfLb0E", {"FADD": 144}, 160),
        ("local_affinity.cu", "7radius5.*sums_kernelIfLb1E", {"FFMA": 72}, 88),
        # the same of four channels: a subtraction, its sign by a multiply-add, a multiply-add
        ("local_affinity_backward.cu", "7radius5.*gather_kernelIfLb0E", {"FFMA": 288, "FADD": 144}, 500),
    ],
)
def test_loops_are_arithmetic(table, cubins, source, kernel, needed, most):
    by_kernel = disassembly.loops(disassembly.listing(cubin_of(source, 90, cubins)))
    (found,) = (loops for name, loops in by_kernel.items() if re.search(kernel, name))
    loop = min((each for each in found if each.counts >= collections.Counter(needed)), key=len)
    assert len(loop) <= most, loop
    assert not {"LDG", "LDL", "STL", "LD"} & {*loop.counts}, loop  # what is not in registers is in shared memory


def test_a_loop_is_read_with_those_inside():
    text = """	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_0:
        /*0020*/              @!P0 FFMA.FTZ R2, R2, R3, R4 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0060*/                   EXIT ;
	.section	.nv.info,"",@"SHT_CUDA_INFO"
"""
    (found,) = disassembly.loops(text).values()
    assert [dict(loop.counts) for loop in found] == [{"FFMA": 1, "BRA": 1}, {"FADD": 1, "FFMA": 1, "BRA": 2}]


def test_a_spill_would_be_seen():
    report = """ptxas info    : Compiling entry function 'kernel' for 'sm_90'
ptxas info    : Function properties for kernel
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size"""
    assert parsed(report, 90) == [Kernel("kernel", 90, 80, 8, 12, 16)]


if __name__ == "__main__":
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        for kernels in compile_all(Path(scratch)).values():
            for kernel in kernels:
                print(kernel)
