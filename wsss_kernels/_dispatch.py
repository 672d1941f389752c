"""Which kernel runs: the compiled module, on a GPU else Triton, else the reference, never silently."""

from __future__ import annotations

import functools
import importlib
import importlib.util
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

GPU_KERNELS = os.environ.get("WSSS_GPU_KERNELS", "")
if GPU_KERNELS not in ("", "cuda", "triton"):
    raise ValueError(f"WSSS_GPU_KERNELS must be cuda or triton, got {GPU_KERNELS}")

NO_TRITON_KERNEL: set[str] = set()  # ops with a compiled CUDA kernel alone
GRADIENT_WITH_FORWARD: set[str] = set()  # backwards that only multiply: the forward's kernel has found the gradient
_warned: set[tuple[str, str]] = set()


def gpu_kernel(name: str, device_index: int | None = None) -> tuple[str, str]:
    """What runs `name` on a GPU (None: on one this build fits): "cuda", "triton" or "reference", and why the last.

    The compiled CUDA kernel first, then the Triton one; WSSS_GPU_KERNELS=cuda or triton allows one of them only, for an
    op that has both.
    """
    if native is None:  # the Triton kernels take the choice of solver from it too
        return "reference", native_absence
    if name in GRADIENT_WITH_FORWARD:
        name = name.removesuffix("_backward")
    reasons = []
    if GPU_KERNELS != "triton" or name in NO_TRITON_KERNEL:
        reason = _why_no_cuda(name, device_index)
        if not reason:
            return "cuda", ""
        reasons.append(reason)
    if name in NO_TRITON_KERNEL:
        return "reference", "; ".join([*reasons, f"{name} has no Triton kernel"])
    if GPU_KERNELS != "cuda" or (native.cuda_archs and not hasattr(native, f"{name}_cuda")):
        if importlib.util.find_spec("triton") is not None:
            return "triton", ""
        reasons.append("the package triton is not installed")
    if GPU_KERNELS:
        reasons.append(f"WSSS_GPU_KERNELS={GPU_KERNELS}")
    return "reference", "; ".join(reasons)


@functools.cache
def _why_no_cuda(name: str, device_index: int | None) -> str:
    assert native is not None
    if torch.version.hip is not None:
        return "the compiled kernels are CUDA's, this torch is ROCm's"
    if not hasattr(native, f"{name}_cuda"):
        return f"{name} has no compiled CUDA kernel" if native.cuda_archs else "the module was compiled without CUDA"
    if device_index is not None and not native.cuda_runs_on(device_index):
        return f"the module was compiled for the CUDA architectures {native.cuda_archs}, which this GPU does not run"
    return ""


def which_kernel(name: str, device_type: str, device_index: int | None = None) -> tuple[str, str]:
    """What runs `name` on such a device: "native" (CPU), "cuda", "triton" or "reference", and why the last."""
    if device_type == "cuda":
        return gpu_kernel(name, device_index)
    if native is None:
        return "reference", native_absence
    return ("native", "") if device_type == "cpu" else ("reference", f"there is no {device_type} kernel")


def runs_native(op: str, tensor: Tensor) -> bool:
    """Whether a kernel takes this tensor; says so once, or raises, where only the reference is left."""
    if tensor.dtype not in NATIVE_DTYPES:
        return False  # float64 is the reference's, by contract
    device_type = tensor.device.type
    _, reason = which_kernel(op, device_type, tensor.device.index)
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


class CudaCall:
    """Where a compiled CUDA kernel runs: the tensor's device, torch's current stream there, and memory for its work."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.index: int = tensor.device.index
        self.stream: int = torch.cuda.current_stream(tensor.device).cuda_stream

    def workspace(self, size: int) -> Tensor:
        """size bytes; keep the result until the kernel is launched."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


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
