"""The GPU as the benchmarks see it: what it is, how work on it is timed, recorded and counted."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

COPIED = 2**30  # bytes, many times any cache
MULTIPLIED = 8192  # rows and columns of a product that fills any GPU
FP32_LANES = {(7, 5): 64, (8, 0): 64}  # of a multiprocessor; 128 in every other generation since


@dataclass(frozen=True)
class Work:
    """The least a way must do: operations in float32, bytes read and written, each operand once, and those operations
    that are matrix products, which tensor cores may do.
    """

    flop: float
    bytes: float
    products: float = 0.0


def moved(data: Any, device: torch.device) -> Any:
    """Every tensor of a nest of dictionaries and lists on the device."""
    return tree_map_only(Tensor, lambda x: x.to(device), data)


def repeated(data: Any, images: int, batch: int) -> Any:
    """Every tensor whose first size is `images` grown to `batch` (a multiple) by repetition: image i is i % images."""
    if batch == images:
        return data
    assert batch % images == 0, (images, batch)

    def grown(x: Tensor) -> Tensor:
        return x.repeat(batch // images, *[1] * (x.dim() - 1)) if x.dim() and x.shape[0] == images else x

    return tree_map_only(Tensor, grown, data)


def clone(data: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, data)


def bytes_of(data: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(data) if isinstance(x, Tensor))


def _asked(*names: str) -> list[str | None]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return [None] * len(names)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return [*values] if len(values) == len(names) else [None] * len(names)


def kernel_names(function: Callable[[], object]) -> list[str]:
    """The kernels that a call launches, copies and fills apart; empty where the profiler sees no GPU."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not re.match(r"Mem(cpy|set)\b", name)]


class Gpu:
    """The first CUDA device. The tests put a stand-in of the same methods in its place."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        driver, clock = _asked("driver_version", "clocks.max.sm")
        lanes = FP32_LANES.get((properties.major, properties.minor), 128)
        self.l2_bytes: int = properties.L2_cache_size
        self.flops = 2e6 * float(clock) * lanes * properties.multi_processor_count if clock else None
        self.bytes_per_second = self._copy_rate()
        self.products_per_second = self._product_rate()
        self.about = {
            "device": "cuda",
            "machine": properties.name,
            "driver": driver,
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
            "peak_tflops": None if self.flops is None else self.flops / 1e12,
            "copy_tbs": self.bytes_per_second / 1e12,
            "product_tflops": self.products_per_second / 1e12,
        }

    def _copy_rate(self) -> float:
        """Bytes read and written a second by a large copy."""
        source = torch.empty(COPIED, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * COPIED / min(self.seconds(lambda: target.copy_(source), 5) for _ in range(3))

    def _product_rate(self) -> float:
        """Operations a second of a large matrix product in tf32, or what the GPU has in its place."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            left, right = (torch.randn(MULTIPLIED, MULTIPLIED, device=self.device) for _ in range(2))
            left @ right
            return 2 * MULTIPLIED**3 / min(self.seconds(lambda: left @ right, 5) for _ in range(3))
        finally:
            torch.set_float32_matmul_precision(before)

    def free_gigabytes(self) -> float:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0] / 1e9

    def seconds(self, function: Callable[[], object], calls: int = 1) -> float:
        """Of a call, between two events on the stream."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def record(self, functions: Sequence[Callable[[], Any]]) -> tuple[Callable[[], None], Any] | None:
        """A graph of all the functions in turn and what the last one gives; None where one cannot be recorded."""
        before = torch.cuda.current_stream()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(before)
            with torch.cuda.stream(side):
                functions[0]()
            before.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for function in functions:
                    result = function()
        except RuntimeError:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own stream current
            torch.cuda.synchronize()
            return None
        return graph.replay, result

    def launches(self, function: Callable[[], object]) -> int | None:
        return len(kernel_names(function)) or None

    def peak_mb(self, function: Callable[[], object]) -> float:
        """MiB above what is there, at the highest point of a call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def limit_ms(self, work: Work) -> float | None:
        """What the arithmetic, the products or the memory traffic alone take, whichever is most."""
        if self.flops is None:
            return None
        products = work.products / self.products_per_second
        return 1e3 * max(work.flop / self.flops, products, work.bytes / self.bytes_per_second)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version
