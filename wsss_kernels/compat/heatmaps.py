"""NumPy heat maps in, NumPy heat maps out: for users of Grad-CAM packages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from wsss_kernels.refine import refine_cams


def refine_numpy(grayscale_cam: np.ndarray, rgb: np.ndarray, **options: Any) -> np.ndarray:
    """Sharpen explanation heat maps to the edges of the picture; each on its own, by method="image".

        out[b] = refined cam[b] / max(refined cam[b]), 0 where a map has no positive value

    Args:
        grayscale_cam: [B, H, W] or [H, W] real numbers, any scale, finite; negative values count as 0. What a
            `GradCAM` object of pytorch-grad-cam returns.
        rgb: [B, h, w, 3] or [h, w, 3] picture, of any size: uint8 0..255; or floating point, 0..1 (largest value
            <= 1; what `show_cam_on_image` takes) or 0..255 (largest value above 1). Not the normalised network input.
            One picture [h, w, 3] with several maps [B, H, W]: all belong to it.
        **options: of `refine_cams` with method="image": size, grid, radius, scale, border, beta, steps, solver, tol.

    Returns:
        np.ndarray: float32 in 0..1, of the shape of grayscale_cam ([.., height, width] with size=(height, width),
        [.., h, w] with size="feats").

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Example:
        >>> import numpy as np
        >>> cam, rgb = np.random.rand(1, 24, 32).astype(np.float32), np.random.rand(48, 64, 3).astype(np.float32)
        >>> refine_numpy(cam, rgb).shape
        (1, 24, 32)
    """
    cams = _array("grayscale_cam", grayscale_cam)
    if cams.ndim not in (2, 3):
        raise ValueError(f"grayscale_cam must be [B, H, W] or [H, W], got shape {cams.shape}")
    if not np.isfinite(cams).all():
        wrong = np.count_nonzero(~np.isfinite(cams))
        raise ValueError(f"grayscale_cam must be finite, got {wrong} NaN or infinite values")
    picture = _picture(rgb)
    batch = cams if cams.ndim == 3 else cams[None]
    if picture.shape[0] not in (1, len(batch)):
        raise ValueError(f"rgb must be one picture or {len(batch)}, one for each map, got {picture.shape[0]}")
    maps = torch.from_numpy(np.clip(batch, 0, None).astype(np.float32))
    # Maps of one picture share its affinity: they are classes of one image. Otherwise one image each.
    maps = maps[None] if picture.shape[0] == 1 else maps[:, None]
    refined = refine_cams(maps, picture, **{"method": "image", "normalize": "class", **options})
    assert isinstance(refined, torch.Tensor)
    return refined.reshape(*cams.shape[:-2], *refined.shape[-2:]).numpy().clip(0, 1)


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a NumPy array of real numbers, got {got}")
    return value


def _picture(rgb: object) -> torch.Tensor:
    """[B, 3, h, w], uint8 or float32 0..255."""
    array = _array("rgb", rgb)
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(f"rgb must be [B, h, w, 3] or [h, w, 3], got shape {array.shape}")
    if array.dtype != np.uint8:
        if array.dtype.kind != "f":
            raise TypeError(f"rgb must be uint8 or floating point, got {array.dtype}")
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not (low >= 0 and high <= 255):
            raise ValueError(
                f"rgb must be in 0..1 or 0..255, got {low:g}..{high:g} (the picture before its normalisation)"
            )
        array = array.astype(np.float32) * (255 if high <= 1 else 1)
    pictures = array if array.ndim == 4 else array[None]
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
