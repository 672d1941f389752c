# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""How the Triton kernels are compiled and launched: every configuration there is, and the choice between them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Block sizes (the kernel's constexpr arguments) and threads of a program."""

    threads: int
    blocks: dict[str, int]
    registers: int | None = None  # a thread's at most; NVIDIA's assembler else spills some for the sake of occupancy


# Registers hold ROWS x BAND sums a thread, so that a loaded row serves BAND pairs; channels lie side by side in a
# program because a map alone (47 x 63 pixels) would leave most of the machine without work.
AFFINITY = {
    band: Configuration(128, {"ROWS": 4, "BAND": band, "COLUMNS": 32, "CHANNELS": 4})
    for band in (3, 5)  # rows of the half-disc: all of them up to radius 3 and 5; radius 10 in two bands
}
AFFINITY_GRADIENT = Configuration(128, {"ROWS": 4, "COLUMNS": 32, "CHANNELS": 4})  # 8 channels spill
NORM = Configuration(256, {"CHANNELS": 8, "PIXELS": 32})
REDUCTION = Configuration(128, {"BLOCK": 1024})
ELEMENTWISE = Configuration(128, {"BLOCK": 1024})
# A small map takes its neighbours side by side too, eight a program: its steps wait for memory, not for arithmetic.
WALK = {
    (maps, small): Configuration(256, {"LINKS": 8, "MAPS": maps, "PIXELS": 32})
    if small
    else Configuration(128, {"LINKS": 1, "MAPS": maps, "PIXELS": 128})
    for maps in (1, 2, 4)
    for small in (True, False)
}
DEGREE = Configuration(256, {"LINKS": 8, "PIXELS": 32})
PATHS = Configuration(128, {"PIXELS": 256})
PATH_GRADIENT = Configuration(128, {"PIXELS": 128})
WALK_GRADIENT = Configuration(128, {"LINKS": 8, "PIXELS": 64})
REGIONS = Configuration(256, {"BLOCK": 1024})  # one program a map: as many threads as its barriers allow
VOTE_SEGMENTS = Configuration(128, {"CHANNELS": 4, "BLOCK": 256})
VOTE_MASKS = Configuration(128, {"CHANNELS": 4, "BLOCK": 256})
LOSS = Configuration(128, {"BLOCK": 256})
ROW_PRODUCTS = Configuration(128, {"ROWS": 32, "CENTERS": 16, "DEPTH": 32})
LABELS = Configuration(128, {"ROWS": 32, "CENTERS": 16})
ROW_SUMS = Configuration(128, {"CHUNK": 256, "ROWS": 32, "CENTERS": 16, "COLUMNS": 64})

ADAPTIVE_WEIGHTS = Configuration(128, {"PIXELS": 128})
# Channels share the weights of a pixel.
ADAPTIVE = {maps: Configuration(128, {"CHANNELS": maps, "PIXELS": 128}) for maps in (1, 4)}
ADAPTIVE_GRADIENT = {maps: Configuration(128, {"CHANNELS": maps, "PIXELS": 128}, registers=128) for maps in (1, 4)}
ATTENTION_STATISTICS = Configuration(128, {"QUERIES": 32, "ENTRIES": 32, "CHANNELS": 16})
ATTENTION = Configuration(256, {"QUERIES": 32, "ENTRIES": 32, "CHANNELS": 16, "OUT": 128})  # 128 threads spill
ATTENTION_GRADIENT = Configuration(128, {"QUERIES": 32, "ENTRIES": 32, "CHANNELS": 16, "OUT": 64}, registers=255)
CONTEXT = Configuration(128, {"CHANNELS": 16, "PIXELS": 64})
CONTEXT_GRADIENT = Configuration(128, {"CHANNELS": 16, "PIXELS": 64})
HISTOGRAM = {  # by words at once; more spills on sm_90
    words: Configuration(256, {"WORDS": words, "PIXELS": pixels, "DEPTH": depth}, registers=255)
    for words, pixels, depth in ((64, 64, 16), (128, 32, 32), (256, 32, 16))
}
PYRAMID = Configuration(32, {"BLOCK": 64})  # windows of 7 x 7 pixels are common
PYRAMID_GRADIENT = Configuration(128, {"BLOCK": 256})

# Fewer programs than this, a few for each multiprocessor, leave the large blocks' machine partly idle.
_FEW_PROGRAMS = 512


def affinity(radius: int) -> Configuration:
    return AFFINITY[3 if radius <= 3 else 5]


def histogram(words: int) -> Configuration:
    return HISTOGRAM[next((size for size in HISTOGRAM if words <= size), max(HISTOGRAM))]


def walk(batch: int, channels: int, plane: int) -> Configuration:
    maps = channels if channels <= 2 else 4
    large = WALK[maps, False]
    programs = batch * -(-channels // maps) * -(-plane // large.blocks["PIXELS"])
    return WALK[maps, True] if programs < _FEW_PROGRAMS else large


def adaptive(channels: int, *, gradient: bool) -> Configuration:
    return (ADAPTIVE_GRADIENT if gradient else ADAPTIVE)[1 if channels == 1 else 4]


def kernel(function):
    """triton.jit without variants for special values of an argument: each configuration is one program."""
    arguments = inspect.signature(function).parameters.values()
    names = [argument.name for argument in arguments if argument.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


def launch(function, programs: int, configuration: Configuration, *arguments: Any, **constants: Any) -> None:
    """On the current device and stream."""
    if programs > 0:
        hip = torch.version.hip is not None
        options = compiler_options(configuration.threads, configuration.registers, _warp_size(), hip=hip)
        if multiplies(function):
            constants["PRECISION"] = precision(hip=hip, capability=_capability())
        function[(programs,)](*arguments, **configuration.blocks, **constants, **options)


def multiplies(function) -> bool:
    """Whether a kernel has products of matrices, and takes how they are made of float32."""
    return "PRECISION" in function.arg_names


def precision(*, hip: bool, capability: int) -> str:
    """How float32 is multiplied. Tensor cores make three products of TF32 of it, 22 bits of each factor's 24; AMD's
    matrix cores take float32 as it is, and before capability 8.0 there is no TF32."""
    return "ieee" if hip or capability < 80 else "tf32x3"


def compiler_options(threads: int, registers: int | None, warp_size: int, *, hip: bool) -> dict[str, int]:
    options = {"num_warps": max(1, threads // warp_size), "num_stages": 1}
    if registers is not None and not hip:
        options["maxnreg"] = registers
    return options


def _capability() -> int:
    if not torch.cuda.is_initialized():  # the interpreter
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _warp_size() -> int:
    if torch.version.hip is None:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)
