"""Which kernel runs: the compiled module where there is one, else the reference, never silently."""

from __future__ import annotations

import importlib
import os
import types
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY: torch.library.Library = torch.library.Library("wsss_kernels", "DEF")
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

native: types.ModuleType | None = None
native_absence = ""  # why `native` is None
if os.environ.get("WSSS_DISABLE_NATIVE") == "1":
    native_absence = "switched off by WSSS_DISABLE_NATIVE=1"
else:
    try:
        native = importlib.import_module("wsss_kernels._C")
    except ImportError as error:
        native_absence = f"the compiled module could not be imported ({error}); reinstall wsss-kernels"

_warned: set[tuple[str, str]] = set()


def why_not_native(device_type: str) -> str:
    """Empty where a native kernel runs on this device, else the reason it does not."""
    if native is None:
        return native_absence
    return "" if device_type == "cpu" else f"this version has no {device_type} kernel yet"


def runs_native(op: str, tensor: Tensor) -> bool:
    """Whether the native kernel takes this tensor; says so once, or raises, where only the reference is left."""
    if tensor.dtype not in NATIVE_DTYPES:
        return False  # float64 is the reference's, by contract
    device_type = tensor.device.type
    reason = why_not_native(device_type)
    if forward_ad._current_level >= 0:
        reason = "the kernels have no forward-mode derivative"
    if not reason:
        return True
    message = f"{op} on {device_type} runs the slow reference implementation: {reason}"
    if os.environ.get("WSSS_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"WSSS_REQUIRE_NATIVE=1, but {message}")
    if (op, device_type) not in _warned and not torch.compiler.is_compiling():
        _warned.add((op, device_type))
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return False


def calls_directly(*tensors: Tensor) -> bool:
    """Whether nothing watches these tensors (autograd, tracing, vmap, a mode): torch's dispatcher can be skipped."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    return True


def refuse_second_derivative(op: str) -> None:
    def backward(ctx: object, *grads: object) -> None:
        raise RuntimeError(f"the kernel of {op} has no second derivative; float64 tensors run the reference, which has")

    torch.library.register_autograd(f"wsss_kernels::{op}_backward", backward, lib=LIBRARY)


def as_kernel_input(tensor: Tensor) -> Tensor:
    """float32, contiguous, no copy where it is so already."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().to(torch.float32).contiguous()


def as_output(result: Tensor, dtype: torch.dtype) -> Tensor:
    return result if dtype is torch.float32 else result.to(dtype)
