"""Reading label pictures: one class id a pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsss_models.data.artefacts import FileError
from wsss_models.data.files import MAX_CLASS_ID, MAX_PIXELS
from wsss_models.data.palette import voc_palette

IGNORE = 255
_FORMATS = ("PNG", "BMP", "TIFF", "GIF")  # lossless: JPEG changes the ids


def read_mask(path: Path | str, *, num_classes: int = MAX_CLASS_ID) -> np.ndarray:
    """A label picture as class ids.

    Index pictures (with a palette or grey) hold the ids themselves. One stored in colours is translated back where all
    its colours are those of the VOC palette.

    Args:
        path: PNG, BMP, TIFF or GIF, which its content decides.
        num_classes: largest id allowed beside 255.

    Returns:
        np.ndarray: [H, W] uint8: 0 background, 1..num_classes, 255 ignore.

    Raises:
        FileError: missing, damaged, lossy, or with an id or colour that means nothing.

    Example:
        >>> read_mask("SegmentationClass/2007_000032.png", num_classes=20).shape  # doctest: +SKIP
        (281, 500)
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise FileError(path, "the file is empty (0 bytes)")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise FileError(
                    path, f"mask must have at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}"
                )
            image.load()
            ids = _ids(image, path)
    except FileError:
        raise
    except UnidentifiedImageError:
        raise FileError(path, f"no mask of a known lossless format ({', '.join(_FORMATS)})") from None
    except OSError as error:
        raise FileError(path, (error.strerror or str(error)).rstrip(".")) from error
    except (ValueError, SyntaxError, IndexError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise FileError(path, f"damaged mask ({error})") from error
    known = np.zeros(256, dtype=bool)
    known[: num_classes + 1] = known[IGNORE] = True
    present = np.bincount(ids.reshape(-1), minlength=256) > 0
    unknown = np.flatnonzero(present & ~known)
    if len(unknown):
        raise FileError(path, f"mask must hold 0..{num_classes} and 255, got {unknown[0]}")
    return ids


def read_grey(path: Path | str) -> np.ndarray:
    """A grey PNG of 8 bits, such as a saliency map: [H, W] uint8.

    Raises:
        FileError: missing, damaged, or of another kind.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise FileError(
                    path, f"map must have at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}"
                )
            if image.mode != "L":
                raise FileError(path, f"map must be a grey PNG of 8 bits (0..255), got one of mode {image.mode}")
            return np.array(image)
    except FileError:
        raise
    except UnidentifiedImageError:
        raise FileError(path, "map must be a PNG") from None
    except OSError as error:
        raise FileError(path, (error.strerror or str(error)).rstrip(".")) from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(path, f"damaged map ({error})") from error


def _ids(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode in ("P", "L", "1"):
        return np.array(image, dtype=np.uint8)
    if image.mode in ("RGB", "RGBA"):
        return _from_colours(np.asarray(image.convert("RGB")), path)
    values = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise FileError(path, f"mask must hold one id in 0..255 a pixel, got a picture of mode {image.mode}")
    return values.astype(np.uint8)


def _from_colours(rgb: np.ndarray, path: Path) -> np.ndarray:
    code = (rgb.astype(np.int64) * (1 << 16, 1 << 8, 1)).sum(-1)
    palette = (voc_palette().astype(np.int64) * (1 << 16, 1 << 8, 1)).sum(-1)
    order = np.argsort(palette)
    found = order[np.searchsorted(palette[order], code).clip(0, 255)]
    wrong = palette[found] != code
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        colour = tuple(rgb[y, x].tolist())
        raise FileError(
            path, f"mask must be an index picture, or in colours of the VOC palette, got {colour} at ({y}, {x})"
        )
    return found.astype(np.uint8)
