"""What some methods take beside a picture: features, boundaries, a transformer's attention, segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from wsss_models.data import files
from wsss_models.data.artefacts import FileError

FEATURE_SUFFIXES = (".npy", ".npz")
SEGMENT_SUFFIXES = (".npy", ".png")


def read_boundary(path: Path) -> np.ndarray:
    """[h, w] or [1, h, w] probabilities in 0..1, .npy or .npz as `files.read_features` takes it: [1, h, w] float32."""
    boundary = files.read_array(path, "boundary")
    boundary = boundary[None] if boundary.ndim == 2 else boundary
    if boundary.ndim != 3 or len(boundary) != 1 or 0 in boundary.shape:
        raise FileError(path, f"a boundary must be [h, w] or [1, h, w], got shape {boundary.shape}")
    return files.finite_float32(path, "boundary", boundary)


def read_attention(path: Path) -> np.ndarray:
    """[n, n] attention between patch tokens; of [heads, n, n] or [layers, heads, n, n] the mean. [n, n] float32."""
    attention = files.read_array(path, "attention")
    if not 2 <= attention.ndim <= 4 or attention.shape[-1] != attention.shape[-2] or 0 in attention.shape:
        raise FileError(
            path, f"attention must be [n, n], [heads, n, n] or [layers, heads, n, n], got shape {attention.shape}"
        )
    return files.finite_float32(path, "attention", attention).mean(axis=tuple(range(attention.ndim - 2)))


def read_segments(path: Path) -> np.ndarray:
    """Superpixels or masks of one picture.

    Args:
        path: .npy, integers [H, W] (a number a segment, negative: no segment) or bool [m, H, W] (masks that may
            overlap); or .png, grey or palette, whose values are the segments' numbers.

    Returns:
        np.ndarray: [H, W] int64 or [m, H, W] bool.

    Raises:
        FileError: missing, damaged, or outside this contract.
    """
    if path.suffix == ".png":
        try:
            with Image.open(path, formats=("PNG",)) as image:
                if image.mode not in ("1", "L", "P", "I", "I;16"):
                    raise FileError(path, f"a PNG of segments must be grey or palette, got mode {image.mode}")
                return np.array(image).astype(np.int64)
        except FileError:
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise FileError(path, f"damaged or missing PNG ({error})") from None
    segments = files.read_array(path, "segments")
    if segments.dtype == bool and segments.ndim == 3 and 0 not in segments.shape[1:]:
        return segments
    if segments.dtype.kind in "iu" and segments.ndim == 2 and 0 not in segments.shape:
        return segments.astype(np.int64)
    raise FileError(
        path, f"segments must be integers [H, W] or bool masks [m, H, W], got {segments.dtype} {segments.shape}"
    )
