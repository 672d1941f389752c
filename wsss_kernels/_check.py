"""Argument checks with one form of message: `<argument> must be <contract>, got <value>`."""

from __future__ import annotations

import math

from torch import Tensor


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return repr(value)


def tensor(name: str, value: object, layout: str) -> None:
    """A floating point tensor with one axis a letter of layout, such as "B D H W"."""
    contract = f"{name} must be a floating point tensor [{', '.join(layout.split())}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{contract}, got {describe(value)}")
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise TypeError(f"{contract} (float16, bfloat16, float32 or float64), got {describe(value)}")
    if value.dim() != len(layout.split()):
        raise ValueError(f"{contract}, got {describe(value)}")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    contract = f"{name} must be one of {', '.join(map(repr, choices))}, got {describe(value)}"
    if not isinstance(value, str):
        raise TypeError(contract)
    if value not in choices:
        raise ValueError(contract)


def number(name: str, value: object, contract: str, *, above: float | None = None, least: float | None = None) -> float:
    """A finite int or float, > above, >= least."""
    message = f"{name} must be {contract}, got {describe(value)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    try:
        checked = float(value)
    except OverflowError:
        raise ValueError(message) from None
    if not math.isfinite(checked) or (above is not None and checked <= above) or (least is not None and checked < least):
        raise ValueError(message)
    return checked


def whole(name: str, value: object, contract: str, *, least: int, most: int = 2**31 - 1) -> int:
    message = f"{name} must be {contract}, got {describe(value)}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if not least <= value <= most:
        raise ValueError(message)
    return value


def same_device(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    if value.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {describe(value)}")
