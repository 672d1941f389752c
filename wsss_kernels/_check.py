"""Argument checks with one form of message: `<argument> must be <contract>, got <value>`."""

from __future__ import annotations

import sys

from torch import Tensor

_LARGEST = sys.float_info.max


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return repr(value)


def tensor(name: str, value: object, layout: str) -> None:
    """A floating point tensor with one axis a letter of layout, such as "B D H W"."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1:
        if value.dim() == len(layout.split()):
            return
        error: type[Exception] = ValueError
    else:
        error = TypeError
    raise error(
        f"{name} must be a floating point tensor [{', '.join(layout.split())}] "
        f"(float16, bfloat16, float32 or float64), got {describe(value)}"
    )


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if isinstance(value, str) and value in choices:
        return
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be one of {', '.join(map(repr, choices))}, got {describe(value)}")


def number(name: str, value: object, contract: str, *, above: float | None = None, least: float | None = None) -> float:
    """A finite int or float, > above, >= least."""
    error: type[Exception] = TypeError
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        error = ValueError
        # Comparisons alone: torch.compile may hold a symbol here. NaN fails them all.
        finite = -_LARGEST <= value <= _LARGEST
        if finite and (above is None or value > above) and (least is None or value >= least):
            return float(value)
    raise error(f"{name} must be {contract}, got {describe(value)}")


def whole(name: str, value: object, contract: str, *, least: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if least <= value <= most:
            return value
        raise ValueError(f"{name} must be {contract}, got {describe(value)}")
    raise TypeError(f"{name} must be {contract}, got {describe(value)}")


def same_device(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    if value.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {describe(value)}")
