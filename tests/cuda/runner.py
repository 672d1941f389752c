"""Runs CUDA sources on the CPU with every memory access checked.

g++ compiles the sources against the headers in include/, which stand in for CUDA's; the engine runs each CUDA thread
as a fiber. A shim says what Python may call (include/cuda_on_cpu/shim.h):

    #include "cuda_on_cpu/shim.h"
    #include "random_walk.h"
    EXPORTED walk_workspace(int64_t height, int64_t width, int64_t* bytes) {
      return cuda_on_cpu::message_of([&] { *bytes = ...; });
    }
    EXPORTED walk(const float* maps, float* out, int64_t height, int64_t width, double beta, void* workspace) {
      return cuda_on_cpu::message_of([&] { wsss::random_walk_cuda(...); });
    }

A test takes its memory from the device that it describes:

    from tests.cuda import runner

    pytestmark = pytest.mark.skipif(runner.absence is not None, reason=str(runner.absence))

    @pytest.fixture(scope="module")
    def library():
        return runner.build("csrc/random_walk.cu", ..., "tests/cuda/random_walk_shim.cpp")

    @pytest.mark.parametrize("order", runner.ORDERS)
    def test_walk(library, order):
        with library.run(sm_count=4, clusters=False, order=order) as gpu:
            maps = gpu.input("maps", torch.rand(1, 3, 9, 11))     # kernels may only read it
            out = gpu.output("out", (1, 3, 9, 11))                # holds garbage; every element must be written
            workspace = gpu.workspace(gpu.ask("walk_workspace", 9, 11))
            gpu.call("walk", maps, out, 9, 11, 8.0, workspace)    # ints are int64_t, floats double, None a null pointer
            assert_close(out.tensor(), expected)
            assert len(gpu.launches) == 1 and gpu.launches[0].cooperative

`call` raises Fault with what was found, a line each: out of bounds, uninitialised, race (two threads at a word, one of
them writing, and no barrier of both in between; a shuffle is none), misaligned, a write to an input, divergent barrier
(threads that have exited count as absent), lifetime (shared memory of a block of the cluster that may not have started
or may have exited), undefined arithmetic. What would be an illegal address ends the launch there. CudaError is an
exception of the host's code, such as a launch that the device refuses.

Threads can wait for each other by atomics and volatile memory, but only barriers order other accesses: what such
threads hand over is reported as a race. Registers, caches and time are not modelled, and the last bits of a float may
differ from a GPU's.

The device is an H100 unless told otherwise: see SETTINGS. build(..., arch=800) compiles for an older one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
INCLUDE = HERE / "include"
ENGINE = tuple(sorted((HERE / "engine").glob("*.cpp")))

# In which the threads run between two barriers, and blocks that need not meet.
ORDERS = ("forward", "reversed", "random")
SETTINGS = (
    "sm_count",
    "shared_per_block",  # bytes, with the opt-in
    "shared_per_sm",
    "threads_per_sm",
    "blocks_per_sm",
    "max_threads",  # of a block
    "registers",  # of a thread, of every kernel
    "capability",  # 90 for 9.0
    "clusters",  # whether there are any
    "max_cluster",  # blocks; more than 8 with the non-portable attribute only
    "cooperative",  # whether there are cooperative launches
    "seed",  # of the random order
)

_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer", "-pthread", "-ffp-contract=off")
_ENGINE_FLAGS = ("-O2", "-Wall", "-Wextra")
# Only the calls that these make the compiler insert; the engine answers them, and no sanitizer's library is linked.
_SOURCE_FLAGS = (
    "-O1", "-g1", "-w",
    "-fsanitize=thread", "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1",
)  # fmt: skip
_LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs")
# Calls that the compiler leaves alone go to the engine too.
_RENAMED = [f"--redefine-sym={name}=cuda_on_cpu_{name}" for name in ("memcpy", "memmove", "memset")]
_KEPT_DAYS = 3


class CudaError(RuntimeError):
    """An exception of the host's code; its text."""


class Fault(AssertionError):
    """What the engine found wrong with a launch, a line each."""


def _find_compiler() -> tuple[str, str | None]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "", "CUDA sources run on the CPU on x86-64 Linux only"
    for compiler in filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++"))):
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        if "Free Software Foundation" in version and shutil.which("objcopy"):
            return compiler, None
    return "", "no g++ with objcopy (looked for CXX, g++): CUDA sources run on the CPU with their help"


COMPILER, absence = _find_compiler()


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _folder() -> Path:
    """Where built files are kept by a hash of all that went into them: only this user may write there."""
    folder = Path(tempfile.gettempdir()) / f"wsss-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="wsss-cuda-on-cpu-"))
    newest = max((path.stat().st_mtime for path in folder.iterdir()), default=0)
    for path in folder.iterdir():
        if path.stat().st_mtime < newest - _KEPT_DAYS * 86400:
            path.unlink(missing_ok=True)
    return folder


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def _headers() -> bytes:
    files = [path for folder in (CSRC, INCLUDE, HERE) for path in folder.rglob("*") if path.suffix in (".h", ".cuh")]
    return b"\0".join(str(path).encode() + path.read_bytes() for path in sorted(set(files)))


def _made(name: str, *commands: Sequence[str]) -> Path:
    """The file of that name, by the commands if it is not there yet; the path of the result is added to each."""
    target = _folder() / name
    if target.exists():
        target.touch()
        return target
    handle, scratch = tempfile.mkstemp(dir=_folder())
    os.close(handle)
    for command in commands:
        done = subprocess.run([*command, scratch], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            os.unlink(scratch)
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    os.replace(scratch, target)
    return target


def _commands(source: Path, arch: int, defines: Sequence[str]) -> list[list[str]]:
    """What makes an object file, whose path is to be added."""
    compiler = [COMPILER, *_FLAGS, f"-I{INCLUDE}"]
    if source in ENGINE:
        return [[*compiler, *_ENGINE_FLAGS, "-c", str(source), "-o"]]
    chosen = [f"-D__CUDA_ARCH__={arch}", *(f"-D{define}" for define in defines)]
    compile_ = [*compiler, f"-I{CSRC}", *_SOURCE_FLAGS, *chosen, "-x", "c++", "-c", str(source), "-o"]
    return [compile_, ["objcopy", *_RENAMED]]


@functools.cache
def build(*sources: str | Path, arch: int = 900, defines: tuple[str, ...] = ()) -> Library:
    """The sources (CUDA or C++, relative to the checkout) and the engine as one library, for __CUDA_ARCH__ `arch`."""
    if absence:
        raise RuntimeError(absence)
    headers = _headers()

    def compiled(source: Path) -> Path:
        commands = _commands(source, arch, defines)
        return _made(_hash(_compiler_version(), repr(commands), headers, source.read_bytes()) + ".o", *commands)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*(ROOT / source for source in sources), *ENGINE]))
    names = [str(path) for path in objects]
    return Library(_made(_hash("link", *names) + ".so", [COMPILER, *_LINK_FLAGS, *names, "-o"]))


class Library:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.native = ctypes.CDLL(str(path))
        self.native.cuda_on_cpu_allocate.restype = ctypes.c_void_p
        self.native.cuda_on_cpu_reports.restype = ctypes.c_char_p
        self.native.cuda_on_cpu_launches.restype = ctypes.c_char_p
        self.native.cuda_on_cpu_unwritten.restype = ctypes.c_size_t
        self.in_use = False

    def run(self, *, order: str = "forward", **settings: int) -> Gpu:
        """A device with these SETTINGS, for a `with` statement; one at a time."""
        return Gpu(self, order, settings)

    @functools.cache  # noqa: B019
    def frames(self, address: int) -> list[tuple[str, str]]:
        """(function, file:line) at a code address, an inlined function before its caller."""
        tool = shutil.which("addr2line")
        if tool is None:
            return []
        command = [tool, "-e", str(self.path), "-f", "-C", "-i", f"{address:x}"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return list(zip(lines[::2], lines[1::2], strict=False))

    def kernel_name(self, address: int) -> str:
        frames = self.frames(address)
        if not frames:
            return f"{address:#x}"
        name = re.sub(r"\(anonymous namespace\)::|\bwsss::", "", frames[0][0])
        return re.sub(r"^void |\(.*$", "", name)

    def source_line(self, address: int) -> str:
        """Of a return address."""
        places = [place for _, place in self.frames(address - 1)]
        own = [place for place in places if not place.startswith(str(INCLUDE))]
        places = [Path(place.split(" ")[0]).name for place in own or places]
        return " called from ".join(dict.fromkeys(places[:3])) or f"{address:#x}"


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int  # blocks
    cooperative: bool
    shared: int  # bytes a block
    block_barriers: int  # how often a block, a cluster, the grid met; of blocks and clusters the most
    cluster_barriers: int
    grid_barriers: int
    stream: int


@dataclasses.dataclass(frozen=True)
class Array:
    """Memory of the device."""

    gpu: Gpu
    name: str
    address: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return _size(self.shape, self.dtype)

    def tensor(self) -> Tensor:
        """A copy; every element must have been written."""
        first = ctypes.c_size_t()
        native = self.gpu.library.native
        address, bytes_ = ctypes.c_void_p(self.address), ctypes.c_size_t(self.bytes)
        missing = native.cuda_on_cpu_unwritten(address, bytes_, ctypes.byref(first))
        if missing:
            element = first.value // self.dtype.itemsize
            raise Fault(f"unwritten: {missing} of {self.bytes} bytes of '{self.name}', the first in element {element}")
        result = torch.empty(self.shape, dtype=self.dtype)
        ctypes.memmove(result.data_ptr(), self.address, self.bytes)
        return result


class Gpu:
    def __init__(self, library: Library, order: str, settings: dict[str, int]) -> None:
        self.library = library
        self._order, self._settings = order, settings

    def __enter__(self) -> Gpu:
        assert not self.library.in_use, "one device at a time"
        self.library.in_use = True
        self.library.native.cuda_on_cpu_reset()
        for name, value in {"order": ORDERS.index(self._order), **self._settings}.items():
            if not self.library.native.cuda_on_cpu_set(name.encode(), ctypes.c_int64(value)):
                raise ValueError(f"a device's settings are {SETTINGS}, not {name}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.library.in_use = False
        if kind is None:
            self.check()
        self.library.native.cuda_on_cpu_reset()

    def input(self, name: str, values: Tensor, misaligned_by: int = 0) -> Array:
        """A copy of `values` that kernels may only read, 256-byte aligned but for that many bytes."""
        return self._copied(name, values, misaligned_by, writable=False)

    def inout(self, name: str, values: Tensor, misaligned_by: int = 0) -> Array:
        """A copy of `values` that kernels may write too."""
        return self._copied(name, values, misaligned_by, writable=True)

    def output(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, misaligned_by: int = 0
    ) -> Array:
        """Garbage, until kernels write it."""
        bytes_ = ctypes.c_size_t(_size(shape, dtype))
        address = self.library.native.cuda_on_cpu_allocate(name.encode(), bytes_, ctypes.c_size_t(misaligned_by))
        if not address:
            raise MemoryError(name)
        return Array(self, name, address, tuple(shape), dtype)

    def workspace(self, bytes_: int, name: str = "workspace") -> Array:
        return self.output(name, (bytes_,), torch.uint8)

    def call(self, name: str, *arguments: object) -> None:
        """A function of a shim. Raises Fault for what launches did wrong, else CudaError for an exception."""
        function = getattr(self.library.native, name)
        function.restype = ctypes.c_char_p
        message = function(*(_native(argument) for argument in arguments))
        self.check()
        if message is not None:
            raise CudaError(message.decode())

    def ask(self, name: str, *arguments: object) -> int:
        """Calls a function whose last parameter is an int64_t* for its answer."""
        answer = ctypes.c_int64()
        self.call(name, *arguments, ctypes.byref(answer))
        return answer.value

    def check(self) -> None:
        """Raises Fault if a launch did something wrong that was not told yet."""
        reports = self.library.native.cuda_on_cpu_reports().decode()
        if not reports:
            return
        self.library.native.cuda_on_cpu_forget_reports()
        reports = re.sub(r"\{function (\w+)\}", lambda m: self.library.kernel_name(int(m[1], 16)), reports)
        raise Fault(
            re.sub(r"\{at (\w+)\}", lambda m: "at " + self.library.source_line(int(m[1], 16)), reports).rstrip()
        )

    @property
    def launches(self) -> list[Launch]:
        """Since the start, or the last `forget_launches`."""
        return list(self._launches())

    def forget_launches(self) -> None:
        self.library.native.cuda_on_cpu_forget_launches()

    def _launches(self) -> Iterator[Launch]:
        for line in self.library.native.cuda_on_cpu_launches().decode().splitlines():
            address, *rest = line.split()
            n = [int(number) for number in rest]
            yield Launch(
                self.library.kernel_name(int(address, 16)), (n[0], n[1], n[2]), (n[3], n[4], n[5]), n[6],
                bool(n[7]), *n[8:13],
            )  # fmt: skip

    def _copied(self, name: str, values: Tensor, misaligned_by: int, *, writable: bool) -> Array:
        array = self.output(name, values.shape, values.dtype, misaligned_by)
        source = values.detach().contiguous()
        address, bytes_ = ctypes.c_void_p(array.address), ctypes.c_size_t(array.bytes)
        self.library.native.cuda_on_cpu_fill(address, ctypes.c_void_p(source.data_ptr()), bytes_, int(writable))
        return array


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return functools.reduce(lambda size, length: size * length, shape, dtype.itemsize)


def _native(argument: object) -> object:
    if argument is None or isinstance(argument, Array):
        return ctypes.c_void_p(argument.address if argument else None)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return argument


def warnings_of(source: Path) -> str:
    """What the compiler says about a file of the engine, or about what else can be built."""
    command = _commands(source, 900, ())[0]
    flags = [flag for flag in command if flag != "-w"]
    flags += [os.devnull, "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    return subprocess.run(flags, capture_output=True, text=True, check=True).stderr
