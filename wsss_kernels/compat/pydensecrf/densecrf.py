"""pydensecrf.densecrf: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

from wsss_kernels import _check
from wsss_kernels.ops.dense_crf import check_lattice, run_crf

CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = 0, 1, 2
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = 0, 1, 2, 3

_NOT_OFFERED = ("DenseCRF", "Unary", "ConstUnary", "LogisticUnary", "KernelType", "NormalizationType")


def __getattr__(name: str) -> NoReturn:
    if name in _NOT_OFFERED:
        raise AttributeError(f"wsss_kernels.compat.pydensecrf does not offer pydensecrf's {name}: only DenseCRF2D")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class DenseCRF2D:
    """A fully connected CRF over an image, of Potts terms; see `wsss_kernels.dense_crf` for what it computes.

    Args:
        w, h: of the image, in pixels (the width first).
        nlabels: number of labels.

    Example:
        >>> import numpy as np
        >>> crf = DenseCRF2D(32, 24, 2)
        >>> crf.setUnaryEnergy(np.random.rand(2, 24 * 32).astype(np.float32))
        >>> crf.addPairwiseGaussian(sxy=3, compat=3)
        >>> np.argmax(crf.inference(5), axis=0).reshape(24, 32).shape
        (24, 32)
    """

    def __init__(self, w: int, h: int, nlabels: int) -> None:
        for name, value in (("w", w), ("h", h), ("nlabels", nlabels)):
            _check.whole(name, _number(value), "a whole number >= 1", least=1)
        self._width, self._height, self._labels = int(w), int(h), int(nlabels)
        self._unary = torch.zeros(1, self._labels, self._height, self._width)
        self._image = torch.zeros(1, 3, self._height, self._width, dtype=torch.uint8)
        self._gaussian: tuple[float, ...] | None = None
        self._bilateral: tuple[float, ...] | None = None

    def setUnaryEnergy(self, u: np.ndarray) -> None:  # noqa: N802
        """Energies [nlabels, w * h] (or any array of as many values in that order): negative log probabilities."""
        array = np.asarray(u)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"u must be an array of real numbers, got {array.dtype}")
        pixels = self._width * self._height
        if array.shape[:1] != (self._labels,) or array.size != self._labels * pixels:
            raise ValueError(f"u must be [nlabels, w * h] = {[self._labels, pixels]}, got shape {list(array.shape)}")
        self._unary = torch.from_numpy(array.astype(np.float32)).reshape(self._unary.shape)

    def addPairwiseGaussian(  # noqa: N802
        self, sxy: Any, compat: Any, kernel: int = DIAG_KERNEL, normalization: int = NORMALIZE_SYMMETRIC
    ) -> None:
        """A term in which only the distance counts. sxy: sigma in pixels, one number or (x, y)."""
        _check_kind(kernel, normalization)
        if self._gaussian is not None:
            raise NotImplementedError("this DenseCRF2D holds one Gaussian term at most")
        sigmas = _sigmas("sxy", sxy, 2)
        check_lattice("sxy", self._height, self._width, sigmas)
        self._gaussian = (*sigmas, _compat(compat))

    def addPairwiseBilateral(  # noqa: N802
        self,
        sxy: Any,
        srgb: Any,
        rgbim: np.ndarray,
        compat: Any,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """A term of distance and colour. srgb: grey levels, one number or (r, g, b); rgbim: uint8, [h, w, 3]."""
        _check_kind(kernel, normalization)
        if self._bilateral is not None:
            raise NotImplementedError("this DenseCRF2D holds one bilateral term at most")
        array = np.asarray(rgbim)
        if array.dtype != np.uint8:
            raise TypeError(f"rgbim must be uint8, got {array.dtype}")
        if array.shape != (self._height, self._width, 3):
            raise ValueError(f"rgbim must be [h, w, 3] = {[self._height, self._width, 3]}, got {list(array.shape)}")
        sigmas = _sigmas("sxy", sxy, 2) + _sigmas("srgb", srgb, 3)
        check_lattice("sxy, srgb", self._height, self._width, sigmas)
        self._bilateral = (*sigmas, _compat(compat))
        self._image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))[None]

    def inference(self, niter: int) -> np.ndarray:
        """Marginals [nlabels, w * h] float32 after niter iterations of mean field."""
        niter = _check.whole("niter", _number(niter), "a whole number >= 0", least=0)
        gaussian, bilateral = self._gaussian or (1.0, 1.0, 0.0), self._bilateral or (1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
        with torch.no_grad():
            marginals = run_crf(self._image, self._unary, niter, gaussian, bilateral)
        return marginals.reshape(self._labels, -1).numpy()

    def _not_offered(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "wsss_kernels.compat.pydensecrf offers setUnaryEnergy, addPairwiseGaussian, addPairwiseBilateral and "
            "inference of DenseCRF2D, nothing else"
        )

    setUnary = addPairwiseEnergy = startInference = stepInference = klDivergence = _not_offered  # noqa: N815


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.size == 1 else value


def _sigmas(name: str, value: Any, count: int) -> tuple[float, ...]:
    contract = f"one number > 0 or {count} of them"
    values = value if isinstance(value, (tuple, list, np.ndarray)) and np.ndim(value) == 1 else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} must be {contract}, got {len(values)}")
    return tuple(_check.number(name, _number(v), contract, above=0) for v in values)


def _compat(value: Any) -> float:
    if isinstance(value, (np.ndarray, tuple, list)) and np.ndim(value):
        raise NotImplementedError("compat must be one number (Potts); arrays and matrices are not offered")
    return _check.number("compat", _number(value), "a finite number")


def _check_kind(kernel: int, normalization: int) -> None:
    # The kinds of kernel differ in what pydensecrf can learn of them, not in the filter they start with.
    if kernel not in (CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL):
        raise ValueError(f"kernel must be CONST_KERNEL, DIAG_KERNEL or FULL_KERNEL, got {kernel!r}")
    if normalization != NORMALIZE_SYMMETRIC:
        raise NotImplementedError("normalization must be NORMALIZE_SYMMETRIC; the others are not offered")
