"""What this installation runs, and why not something faster."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from wsss_kernels import _dispatch, ops, reference

DEVICES = ("cpu", "cuda")
DIRECTIONS = ("forward", "backward")
# The names under which Triton is distributed.
_TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")


def info() -> dict[str, Any]:
    """What this installation runs: versions, instruction set, CUDA, Triton, and the kernel behind every op.

    Returns:
        A dictionary of plain values:

        * "version", "python", "torch": version strings
        * "compiled": whether the compiled module is in use; "not_compiled_because": empty if so, else the reason
        * "cpu": "isa" (the instruction set chosen for this processor, None without the compiled module), "openmp",
          "threads" (torch's, which the kernels use)
        * "cuda": "archs" (what the CUDA part was compiled for, empty without one), "runtime" (its toolkit's version or
          None), "torch" (the CUDA version of torch or None), "devices" (how many the driver offers), "because" (why
          there is none; empty where there is one)
        * "triton": version or None; "no_triton_because"
        * "ops": op -> device ("cpu", "cuda") -> direction ("forward", "backward") -> {"kernel", "because"}: kernel is
          "native" (compiled, CPU), "cuda" (compiled, GPU), "triton" or "reference", because says why it is not the
          fastest (empty where it is). kernel is None where an op has no kernel for a direction by design. "cuda" is
          the current CUDA device, or without one what this build would run on a GPU.

        float64 tensors run the reference whatever this says.

    Asks the CUDA driver how many devices there are, which importing the package never does.

    Example:
        >>> import wsss_kernels as wk
        >>> wk.info()["ops"]["random_walk"]["cpu"]["forward"]["kernel"] in ("native", "reference")
        True
    """
    from wsss_kernels import __version__

    native = _dispatch.native
    triton = _triton_version()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled": native is not None,
        "not_compiled_because": _dispatch.native_absence if native is None else "",
        "cpu": {
            "isa": None if native is None else native.cpu_isa,
            "openmp": native is not None and native.openmp,
            "threads": torch.get_num_threads(),
        },
        "cuda": _cuda(),
        "triton": triton,
        "no_triton_because": "" if triton else "the package triton is not installed",
        "ops": {
            op: {device: {direction: _kernel(op, device, direction) for direction in DIRECTIONS} for device in DEVICES}
            for op in op_names()
        },
    }


def op_names() -> list[str]:
    """Every op: what `ops` exports and `reference` defines."""
    return [name for name in ops.__all__ if name in reference.__all__]


def _kernel(op: str, device: str, direction: str) -> dict[str, str | None]:
    name = op if direction == "forward" else f"{op}_backward"
    if not hasattr(torch.ops.wsss_kernels, name):
        return {"kernel": None, "because": f"{op} has no {direction} kernel on any device"}
    index = torch.cuda.current_device() if device == "cuda" and torch.cuda.is_available() else None
    kernel, because = _dispatch.which_kernel(name, device, index)
    return {"kernel": kernel, "because": because}


def _cuda() -> dict[str, Any]:
    native = _dispatch.native
    archs = [] if native is None or not native.cuda_archs else native.cuda_archs.split(",")
    if archs:
        assert native is not None
        version = native.cuda_runtime_version()
        runtime = f"{version // 1000}.{version % 1000 // 10}"
        devices, because = native.cuda_device_count()
    else:
        runtime = None
        devices = torch.cuda.device_count()
        because = "" if devices else "torch finds no CUDA device"
    return {
        "archs": archs,
        "runtime": runtime,
        "torch": torch.version.cuda,
        "devices": devices,
        "because": because,
    }


def _triton_version() -> str | None:
    for name in _TRITON:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def describe() -> str:
    """`info()` as text for people."""
    found = info()
    cpu, cuda = found["cpu"], found["cuda"]
    cuda_build = f"{', '.join(cuda['archs'])} (runtime {cuda['runtime']})" if cuda["archs"] else "none in this build"
    lines = [
        f"wsss-kernels {found['version']}, Python {found['python']}, torch {found['torch']}",
        f"compiled module  {'yes' if found['compiled'] else 'no: ' + found['not_compiled_because']}",
    ]
    if found["compiled"]:
        openmp = f"{cpu['threads']} threads" if cpu["openmp"] else "built without OpenMP: one thread"
        lines.append(f"CPU              {cpu['isa']}, {openmp}")
    lines += [
        f"CUDA build       {cuda_build}",
        f"CUDA devices     {cuda['devices']}{' (' + cuda['because'] + ')' if cuda['because'] else ''}",
        f"Triton           {found['triton'] or 'no: ' + found['no_triton_because']}",
        "",
        "op                    device  forward    backward",
    ]
    reasons: dict[str, None] = {}  # in the order they come up
    for op, devices in found["ops"].items():
        for device, directions in devices.items():
            kernels = [directions[direction] for direction in DIRECTIONS]
            lines.append(f"{op:<21} {device:<7} " + " ".join(f"{kernel['kernel'] or '-':<10}" for kernel in kernels))
            reasons.update({f"{device}: {kernel['because']}": None for kernel in kernels if kernel["because"]})
    lines += ["", *reasons] if reasons else []
    return "\n".join(line.rstrip() for line in lines)
