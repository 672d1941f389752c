"""The limit of a walk on a GPU: its steps wait for each other, and each takes time without any work."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cu")
KINDS = ("launches", "grid barriers", "cluster barriers")
THREADS = 256  # of a block, as the walk's


@functools.cache
def _library() -> ctypes.CDLL:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc (looked at CUDACXX, PATH, /usr/local/cuda/bin)")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step_chain.so"
        options = ["-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra,-fPIC", "-shared", f"-arch=sm_{major}{minor}"]
        command = [nvcc, *options, "-o", str(out), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        library = ctypes.CDLL(str(out))  # stays mapped when its file is gone
    library.step_chain.argtypes = [ctypes.c_int] * 4 + [ctypes.c_void_p]
    return library


def step_chain(kind: str, steps: int, blocks: int) -> Callable[[], None]:
    """A call that makes `steps` steps of a kind on the current stream, `blocks` blocks each.

    Raises:
        RuntimeError: no nvcc, or one that fails, or CUDA refuses, as it does clusters before compute capability 9.0.
    """
    library = _library()

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        error = library.step_chain(KINDS.index(kind), steps, blocks, THREADS, stream)
        if error:
            raise RuntimeError(f"{kind} of {blocks} blocks: CUDA error {error}")

    return run
