"""Compile every Triton kernel in every configuration the launcher can choose, for GPUs that are not here.

    python tests/triton/compile_all.py

The entry points run on tensors without data while the launches are written down instead of made: what is compiled is
what they ask for. One line a kernel and target: registers, spills and shared memory. A spill on sm_80 or sm_90 is an
error; so is a configuration of the table that no call reached.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsss_kernels import neighbours
from wsss_kernels.triton import (
    affinity_loss,
    boundary_affinity,
    class_context,
    cross_image_attention,
    hspp,
    kmeans,
    launch,
    local_affinity,
    mask_vote,
    pixel_adaptive,
    random_walk,
    region_boxes,
    soft_histogram,
)

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)
NO_SPILLS = TARGETS[:2]
HALVES = ("fp16", "bf16")  # each on every other target: what is made of them differs by a few conversions
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
         torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}  # fmt: skip
# Of values, that is; the lists of integers are short.
NARROW_OFFSET = re.compile(r"tt\.addptr .*!tt\.ptr<b?f\d+>>?, (?:tensor<[\dx]*)?i(?!64)\d+")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Program(NamedTuple):
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | tuple[float, ...] | None], ...]
    threads: int
    registers: int | None

    def __str__(self) -> str:
        types = dict.fromkeys(kind[1:] for _, kind in self.signature if kind.startswith("*") and kind != "*i32")
        constants = (f"{name.lower()}={value:n}" for name, value in self.constants if isinstance(value, int | float))
        return " ".join([self.kernel, "/".join(types), *constants])


class Use(NamedTuple):
    registers: int
    spills: int  # bytes a thread; AMD: registers
    shared: int  # bytes a program


def argument_type(argument: object, annotated: str) -> str:
    if isinstance(argument, torch.Tensor):
        return "*" + TYPES[argument.dtype]
    return annotated or {int: "i32", float: "fp32"}[type(argument)]


def recorded_programs() -> list[Program]:
    programs: dict[Program, None] = {}
    reached: list[launch.Configuration] = []

    def record(function, count, configuration, *arguments, **constants) -> None:
        constants = {**configuration.blocks, **constants}
        if launch.multiplies(function):
            constants["PRECISION"] = None  # the target's
        parameters = [p for p in function.params if not p.is_constexpr]
        assert len(parameters) == len(arguments), function
        signature = tuple((p.name, argument_type(a, p.annotation_type))
                          for p, a in zip(parameters, arguments, strict=True))  # fmt: skip
        constants_in_order = tuple((p.name, constants.pop(p.name)) for p in function.params if p.is_constexpr)
        assert not constants, f"{function} has no {constants}"
        compiled = (configuration.threads, configuration.registers)
        program = Program(function.__module__, function.__name__, signature, constants_in_order, *compiled)
        programs[program] = None
        reached.append(configuration)

    launch.launch = record
    for dtype, radius, cosine, scale in itertools.product(DTYPES, (2, 5), (False, True), (0.0, 1.0)):
        feats = torch.empty(1, 8, 6, 7, dtype=dtype, device="meta")
        affinity, scales = local_affinity.local_affinity(feats, radius, cosine, scale, False)
        local_affinity.local_affinity_backward(affinity, feats, affinity, scales, radius, cosine, scale, False)
    for dtype in DTYPES:
        boundary = torch.empty(1, 1, 6, 7, dtype=dtype, device="meta")
        affinity = boundary_affinity.boundary_affinity(boundary, 5)
        boundary_affinity.boundary_affinity_backward(affinity, boundary, 5)
    walks = itertools.product(DTYPES, (1, 2, 3), (6, 512), (1e-4, 1e-9))
    for dtype, channels, size, tol in walks:
        maps = torch.empty(1, channels, size, size, dtype=dtype, device="meta")
        affinity = torch.empty(1, neighbours.neighbour_count(5), size, size, dtype=dtype, device="meta")
        random_walk.random_walk(maps, affinity, 5, 8.0, 2, "auto", tol)
        random_walk.random_walk_backward(maps, maps, affinity, 5, 8.0, 2, "auto", tol, True, True)
    for par, channels in itertools.product((False, True), (1, 3, 21)):
        image, maps = (torch.empty(1, c, 6, 7, device="meta") for c in (3, channels))
        pixel_adaptive.pixel_adaptive(image, maps, par, [1, 2, 4, 8, 12, 24], 1)
        pixel_adaptive.pixel_adaptive_backward(maps, image, par, [1, 2, 4, 8, 12, 24], 1)
    maps = torch.empty(1, 5, 6, 7, device="meta")
    region_boxes.region_boxes(maps, 0.4)
    for maximum, ids in itertools.product((False, True), (torch.int32, torch.int64)):
        mask_vote.segment_vote(maps, torch.empty(1, 6, 7, dtype=ids, device="meta"), maximum)
        mask_vote.mask_vote(maps, [torch.empty(3, 6, 7, dtype=torch.bool, device="meta")], maximum)
    for dtype in DTYPES:
        affinity = torch.empty(1, neighbours.neighbour_count(5), 6, 7, dtype=dtype, device="meta")
        labels = torch.empty(1, 6, 7, dtype=torch.int64, device="meta")
        loss, counts = affinity_loss.affinity_loss(affinity, labels, 5, True, 255)
        affinity_loss.affinity_loss_backward(loss, affinity, labels, counts, 5, True, 255)
    rows = torch.empty(50, 20, device="meta")
    kmeans.sums_by_label(rows, kmeans.assign(rows, rows[:7]), 7)

    query, memory = torch.empty(1, 2, 6, 7, device="meta"), torch.empty(2, 5, 7, device="meta")
    mask = torch.empty(1, 5, dtype=torch.bool, device="meta")
    for values, top_k, entropy in itertools.product((memory, None), (0, 3), (False, True)):
        found = cross_image_attention.cross_image_attention(query, memory, values, mask, 0.5, top_k, 0.1, entropy)
        if values is None and not entropy:
            continue
        cross_image_attention.cross_image_attention_backward(
            query, found[1] if entropy else None, query, memory, values, mask, found[0], found[2], 0.5, True, True
        )
    for dtype in DTYPES:
        chosen = torch.empty(1, 6, 7, dtype=torch.int32, device="meta")
        maps = torch.empty(1, 5, 6, 7, dtype=dtype, device="meta")
        prototypes, sums = class_context.class_context(maps, chosen.float(), chosen, 3)
        class_context.class_context_backward(prototypes, chosen.float(), chosen, sums)

    for dtype, words in itertools.product(DTYPES, (64, 128, 256, 300)):
        feats, codebook = (torch.empty(*s, dtype=dtype, device="meta") for s in ((2, 64, 6, 7), (words, 64)))
        _, _, _, *kept = soft_histogram.soft_histogram(feats, codebook, 1.0)
        grad = torch.empty(2, words, dtype=dtype, device="meta")
        soft_histogram.soft_histogram_backward(grad, feats, codebook, *kept, 1.0, True, True)
    for dtype, keep in itertools.product(DTYPES, (False, True)):
        pooled, places = hspp.hspp(torch.empty(2, 3, 28, 28, dtype=dtype, device="meta"), [1, 2, 4], 2.0, keep)
        if keep:
            hspp.hspp_backward(pooled, places, 28, 28, [1, 2, 4], 2.0)
    table = [value for name, value in vars(launch).items() if name.isupper()]
    listed = [c for value in table for c in (value.values() if isinstance(value, dict) else [value])]
    unreached = [c for c in listed if isinstance(c, launch.Configuration) and c not in reached]
    assert not unreached, f"no call chose {unreached}"
    return list(programs)


def compile_for(program: Program, target: GPUTarget) -> Use:
    function = getattr(importlib.import_module(program.module), program.kernel)
    signature = {**dict(program.signature), **{name: "constexpr" for name, _ in program.constants}}
    constants, hip = dict(program.constants), target.backend == "hip"
    if launch.multiplies(function):
        constants["PRECISION"] = launch.precision(hip=hip, capability=0 if hip else target.arch)
    ordered = {parameter.name: signature[parameter.name] for parameter in function.params}
    compiled = triton.compile(
        ASTSource(function, ordered, constexprs=constants),
        target=target,
        options=launch.compiler_options(program.threads, program.registers, target.warp_size, hip=hip),
    )
    narrow = NARROW_OFFSET.search(compiled.asm["ttir"])
    if narrow:
        raise ValueError(f"{program} moves a pointer by less than 64 bits: {narrow[0]}")
    instructions = compiled.asm["amdgcn" if hip else "ptx"]
    if launch.multiplies(function) and "mma" not in instructions and "mfma" not in instructions:
        raise ValueError(f"{program} leaves the tensor cores of {name_of(target)} unused")
    shared = compiled.metadata.shared
    if hip:

        def value(name: str) -> int:
            return int(re.search(rf"\.{name}:\s*(\d+)", instructions)[1])

        return Use(value("vgpr_count"), value("vgpr_spill_count") + value("sgpr_spill_count"), shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    resources = dict(re.findall(r"(\w+):(\d+)", usage))
    return Use(int(resources["REG"]), int(resources["STACK"]) + int(resources["LOCAL"]), shared)


def name_of(target: GPUTarget) -> str:
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET must not be 1: interpreted kernels cannot be compiled")
    pairs = [
        (program, target)
        for program, (number, target) in itertools.product(recorded_programs(), enumerate(TARGETS))
        if f"*{HALVES[1 - number % 2]}" not in dict(program.signature).values()
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with concurrent.futures.ProcessPoolExecutor() as pool:
            uses = list(pool.map(compile_for, *zip(*pairs, strict=True), chunksize=4))
    print(f"{'registers':>9} {'spills':>7} {'shared':>7}  target  kernel")
    faults = 0
    for (program, target), use in zip(pairs, uses, strict=True):
        fault = use.spills > 0 and target in NO_SPILLS
        faults += fault
        print(f"{use.registers:9} {use.spills:7} {use.shared:7}  {name_of(target):7} {program}{'  SPILLS' * fault}")
    print(f"{len(pairs)} compiled, {faults} spilling on {' or '.join(map(name_of, NO_SPILLS))}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
