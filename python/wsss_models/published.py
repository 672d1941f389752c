"""Files of the published code: CAMs pickled by np.save, read without running any code they hold."""

from __future__ import annotations

import io
import pickle
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsss_models.data.artefacts import FileError
from wsss_models.data.files import MAX_CLASS_ID

_MAX_BYTES = 2 << 30  # of a file
_MAX_VALUES = 1 << 30  # of an array
_KINDS = frozenset("?bhilqBHILQefd")
_MAPS = ("high_res", "hr_cam", "rw", "attn_highres", "cam")  # the finest first


@dataclass
class PublishedCams:
    """What a file held: `class_ids` [k] from 1 on, `cams` [k, h, w] float32, and what to tell about them."""

    class_ids: np.ndarray
    cams: np.ndarray
    warning: str = ""


def read_published_cams(path: Path | str, *, maps: str | None = None) -> PublishedCams:
    """CAMs of AffinityNet, SC-CAM, IRNet, Puzzle-CAM, VWE or CLIP-ES from their `.npy`.

    Layouts: a dictionary {class from 0 on: map} (AffinityNet, SC-CAM); "keys" from 0 on with maps (IRNet, VWE,
    CLIP-ES); "keys" that begin with the background's 0 and go on with classes from 1 on (Puzzle-CAM).
    AffinityNet's CRF scores cannot be told from its CAMs by their form; import CAMs.

    Args:
        path: the file.
        maps: name of the maps to take ("cam", "high_res", "hr_cam", "rw", "attn_highres"); None = the finest there are.

    Raises:
        FileError: missing, damaged, another layout, or one that holds anything but numbers, texts, lists, dictionaries
            and arrays; no code of the file runs.
    """
    path = Path(path)
    content = _content(path)
    if not isinstance(content, dict):
        raise FileError(path, f"must hold a dictionary, got {type(content).__name__}")
    keys = content.get("keys")
    if keys is None:
        if not content or not all(isinstance(k, (int, np.integer)) for k in content):
            names = ", ".join(map(str, list(content)[:5])) or "nothing"
            raise FileError(path, f'must hold "keys" or maps by class number, got {names}')
        class_ids = np.array([int(k) for k in content], dtype=np.int64) + 1
        planes = [np.asarray(plane) for plane in content.values()]
        if len({p.shape for p in planes}) > 1:
            raise FileError(path, "maps must be of one size")
        stack = np.stack(planes)
    else:
        chosen = [name for name in (_MAPS if maps is None else (maps,)) if name in content]
        if not chosen:
            raise FileError(path, f"must hold {maps or ' or '.join(_MAPS)}, got {', '.join(map(str, content))}")
        stack = np.asarray(content[chosen[0]])
        class_ids = np.asarray(keys).reshape(-1)
        if class_ids.size and class_ids.dtype.kind not in "iu":
            raise FileError(path, f"keys must be whole numbers, got {class_ids.dtype}")
        class_ids = class_ids.astype(np.int64)
        if len(class_ids) == len(stack) + 1 and class_ids[0] == 0:
            class_ids = class_ids[1:]  # Puzzle-CAM: the background first, classes from 1 on
        else:
            class_ids = class_ids + 1
    if stack.dtype.kind not in "fiu" or stack.ndim != 3 or len(stack) != len(class_ids):
        raise FileError(path, f"maps must be numbers [{len(class_ids)}, h, w], got {stack.dtype} {stack.shape}")
    outside = class_ids[(class_ids < 1) | (class_ids > MAX_CLASS_ID)]
    if len(outside) or len(set(class_ids.tolist())) < len(class_ids):
        raise FileError(path, f"classes must be in 0..{MAX_CLASS_ID - 1}, each once, got {(class_ids - 1).tolist()}")
    cams = np.ascontiguousarray(stack, dtype=np.float32)
    if not np.isfinite(cams).all():
        raise FileError(path, "maps must be finite")
    values = np.unique(cams)
    warning = ""
    if len(values) and set(values.tolist()) <= {0.0, 255.0}:
        warning = "only 0 and 255: SC-CAM's code saves thresholded maps; they carry no scores"
    if len(values) and float(values[-1]) > 1.001:
        cams = cams / cams.max()
    return PublishedCams(class_ids, cams, warning)


def _content(path: Path) -> Any:
    """The dictionary of an `.npy` with a pickled one in it."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FileError(path, "must be under 2 GB")
        file = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise FileError(path, "no such file") from None
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except (ValueError, SyntaxError, EOFError, tokenize.TokenError) as error:
        raise FileError(path, f"no NumPy file ({error})") from None
    if dtype.kind != "O" or shape != ():
        raise FileError(path, f"must hold a pickled dictionary, got an array {dtype} {shape}")
    try:
        loaded = _Restricted(file).load()
        value = loaded.value() if isinstance(loaded, _Array) else loaded
        return _plain(value.item() if isinstance(value, np.ndarray) and value.shape == () else value, 0)
    except (
        pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError, KeyError, OverflowError,
        MemoryError, RecursionError, RuntimeError,
    ) as error:  # fmt: skip
        raise FileError(path, f"refused: {error or type(error).__name__}") from None


def _plain(value: Any, depth: int) -> Any:
    """Stand-ins replaced by what they stand for; anything but plain values is refused."""
    if depth > 4:
        raise ValueError("nested more than 4 deep")
    if isinstance(value, (_Array, _Tensor)):
        return value.value()
    if isinstance(value, dict):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if value is None or isinstance(value, (str, int, float, bool, np.generic)):
        return value
    raise ValueError(f"holds a {type(value).__name__}")


class _Restricted(pickle.Unpickler):
    """Finds the few names that arrays, scalars and tensors need, and hands out stand-ins for each."""

    def find_class(self, module: str, name: str) -> Any:
        found = _FOUND.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which CAMs do not need")
        return found

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("the file refers to objects outside it")


class _Dtype:
    """Stands for numpy.dtype: plain numbers, or "O" for the outermost array."""

    def __init__(self, name: object, *_: object) -> None:
        if not isinstance(name, str) or not (name == "O8" or np.dtype(name).char in _KINDS):
            raise pickle.UnpicklingError(f"an array of {name!r}")
        self.name, self.order = name, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if self.name == "O8":
            raise pickle.UnpicklingError("an array of objects inside")
        dtype = np.dtype(self.name)
        return dtype if self.order == "|" else dtype.newbyteorder(self.order)


class _Array:
    """Stands for numpy.ndarray; the bytes become numbers in `value`."""

    shape: tuple[int, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state
        if not isinstance(self.dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")

    def value(self) -> Any:
        shape, data = self.shape, self.data
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n <= _MAX_VALUES for n in shape):
            raise ValueError(f"an array of shape {shape}")
        if self.dtype.name == "O8":
            if shape != () or not isinstance(data, list) or len(data) != 1:
                raise ValueError("an array of objects inside")
            return data[0]
        if not isinstance(data, bytes):
            raise ValueError("an array without its bytes")
        values = np.frombuffer(data, dtype=self.dtype.numpy())
        return values.reshape(shape, order="F" if self.fortran else "C").copy()


class _Tensor:
    """Stands for torch.Tensor: a view into a storage."""

    def __init__(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> None:
        if not isinstance(storage, torch.Tensor):
            raise pickle.UnpicklingError("a tensor without its storage")
        if not all(isinstance(n, int) and 0 <= n <= _MAX_VALUES for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor of an impossible shape")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise pickle.UnpicklingError("a tensor larger than its storage")
        elements = 1
        for n in size:
            elements *= n
        if elements > _MAX_VALUES:
            raise pickle.UnpicklingError("a tensor of an impossible shape")
        self._tensor = torch.as_strided(storage, size, stride, offset)

    def value(self) -> np.ndarray:
        return self._tensor.contiguous().numpy().copy()


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("no plain array")
    return _Array()


def _scalar(dtype: object, data: object = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("no plain number")
    return np.frombuffer(data, dtype=dtype.numpy(), count=1)[0]


def _storage(data: object) -> torch.Tensor:
    """What torch pickles of a storage is a torch file of its own."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a storage without its bytes")
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=loaded.dtype).set_(loaded)  # the whole storage, flat


_FOUND: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): dict,
}
