"""Pictures that are arrays: grey or multi-band .npy files, and what of them is shown as RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsss_models.data.artefacts import FileError

_LOW, _HIGH = 2.0, 98.0  # percentiles that become black and white, as viewers of satellite images do
_SAMPLE = 1_000_000  # values a percentile is taken from


def arrange(path: Path, values: np.ndarray) -> np.ndarray:
    """Any [H, W], [H, W, bands] or [bands, H, W] array as [H, W, bands].

    Of three axes the shortest is the bands, the last one where several are equally short.

    Raises:
        FileError: other dimensions, a size of 0, no real numbers, NaN or infinity.
    """
    if values.dtype.kind not in "fiu":
        raise FileError(path, f"picture must be real numbers, got {values.dtype}")
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or 0 in values.shape:
        raise FileError(path, f"picture must be [H, W], [H, W, bands] or [bands, H, W], got shape {values.shape}")
    if values.shape[0] < min(values.shape[1:]):
        values = np.moveaxis(values, 0, -1)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(np.count_nonzero(~np.isfinite(values)))
        raise FileError(path, f"picture must be finite, got {count} NaN or infinite of {values.size} values")
    return values


def as_rgb(values: np.ndarray) -> np.ndarray:
    """[H, W, bands] as a picture [H, W, 3] uint8: one band (or two) as grey, else the first three.

    8 bits as they are, unsigned 16 bits by `to_8_bits`; anything else from its 2nd to its 98th percentile, a band at
    a time.
    """
    chosen = values[..., :3] if values.shape[2] >= 3 else values[..., :1]
    if values.dtype == np.uint16:
        chosen = to_8_bits(chosen)
    elif values.dtype != np.uint8:
        chosen = np.stack([_stretched(chosen[..., band]) for band in range(chosen.shape[2])], axis=-1)
    return np.repeat(chosen, 3, axis=2) if chosen.shape[2] == 1 else np.array(chosen)


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Whole numbers 0..65535 as uint8; white is the full scale of the fewest of 8, 10, 12, 14 or 16 bits they fit in.

    Cameras, scanners and satellites store 10 to 14 bits in files of 16; divided by 257 they would all be black.
    """
    most = int(values.max()) if values.size else 0
    full = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if most < 2**bits)
    return ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)


def _stretched(band: np.ndarray) -> np.ndarray:
    sample = band.reshape(-1)[:: max(1, band.size // _SAMPLE)].astype(np.float64)
    low, high = np.percentile(sample, (_LOW, _HIGH))
    if high <= low:
        low, high = float(sample.min()), max(float(sample.max()), float(sample.min()) + 1)
    return np.rint(np.clip((band - low) * (255 / (high - low)), 0, 255)).astype(np.uint8)
