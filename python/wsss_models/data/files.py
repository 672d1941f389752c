"""Reading pictures, maps and features; writing labels and maps. No pickles, ever."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from wsss_models.data.artefacts import SETTINGS_KEY, FileError, write_atomically
from wsss_models.data.bands import arrange, as_rgb, to_8_bits
from wsss_models.data.palette import voc_palette

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".npy")
MAX_PIXELS = 89_000_000  # 9,400 x 9,400, 270 MB as RGB; just under where Pillow itself starts to warn
MAX_CLASS_ID = 254  # labels are 8 bit; 255 means "ignore"
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")  # none that runs another program or opens other files
_MAX_ARRAY_BYTES = 8 << 30  # of one array in an npz, unpacked
_EXIF_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as RGB, upright.

    Grey becomes three equal channels, CMYK and palettes are converted, alpha is dropped (as training code does, so the
    colours are those the network saw). 16-bit grey is scaled by its bit depth (`bands.to_8_bits`). The EXIF rotation is
    applied: maps belong to the picture as it is looked at. Of an animation the first frame. An array is shown as
    `bands.as_rgb` says; `read_bands` gives all of it.

    Args:
        path: JPEG, PNG, BMP, TIFF, WebP, GIF or PPM, which its content decides, not its name; or .npy.
        max_pixels: width x height above which it is refused before it is unpacked.

    Returns:
        np.ndarray: [H, W, 3] uint8.

    Raises:
        FileError: empty, damaged, cut short, too large, or no picture; names the file and the reason.

    Example:
        >>> read_picture("cat.jpg").shape  # doctest: +SKIP
        (375, 500, 3)
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return as_rgb(read_bands(path, max_pixels=max_pixels))
    try:
        if path.stat().st_size == 0:
            raise FileError(path, "the file is empty (0 bytes)")
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise FileError(path, f"picture must have at most {max_pixels:,} pixels, got {width} x {height}")
            image.load()
            image = _upright(image)
            return np.array(_as_rgb(image, path))
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        raise FileError(path, f"picture must have at most {max_pixels:,} pixels ({error})") from None
    except UnidentifiedImageError:
        raise FileError(path, f"no picture of a known format ({', '.join(_FORMATS)})") from None
    except OSError as error:
        raise FileError(path, _reason(error)) from error
    except MemoryError:
        raise FileError(path, "not enough memory to unpack the picture") from None
    except (ValueError, SyntaxError, IndexError, TypeError, KeyError, zlib.error, ArithmeticError) as error:
        raise FileError(path, f"damaged picture ({error})") from error


def read_bands(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture with any number of bands.

    Args:
        path: .npy of real numbers, [H, W], [H, W, bands] or [bands, H, W]: of three axes the shortest is the bands.
        max_pixels: height x width above which it is refused.

    Returns:
        np.ndarray: [H, W, bands] of the file's dtype.

    Raises:
        FileError: missing, damaged, too large, or outside this contract.
    """
    path = Path(path)
    values = arrange(path, _from_npy(path, "picture", _read_bytes(path)))
    height, width = values.shape[:2]
    if height * width > max_pixels:
        raise FileError(path, f"picture must have at most {max_pixels:,} pixels, got {width} x {height}")
    return values


def read_maps(path: Path | str, *, num_classes: int = MAX_CLASS_ID) -> tuple[np.ndarray, np.ndarray]:
    """Class activation maps of one picture.

    Args:
        path: .npz with `class_ids` int [k], each in 1..num_classes as in the label PNG, none twice, and `cams` float
            [k, h, w] of any stride. k = 0 (no class) is valid.
        num_classes: largest id allowed.

    Returns:
        (class_ids [k] int64, cams [k, h, w] float32).

    Raises:
        FileError: missing, damaged, or outside this contract; names the file and what it holds.
    """
    path = Path(path)
    arrays = _read_npz(path)
    for name in ("class_ids", "cams"):
        if name not in arrays:
            raise FileError(path, f"the npz must hold class_ids and cams, got {', '.join(arrays) or 'nothing'}")
    class_ids, cams = _array(path, "class_ids", arrays), _array(path, "cams", arrays)
    if class_ids.size == 0:
        class_ids = class_ids.astype(np.int64)
    if class_ids.ndim != 1 or class_ids.dtype.kind not in "iu":
        raise FileError(path, f"class_ids must be integers [k], got {class_ids.dtype} of shape {class_ids.shape}")
    _check_class_ids(path, class_ids, num_classes)
    if cams.shape[:1] != class_ids.shape or (len(class_ids) and (cams.ndim != 3 or 0 in cams.shape)):
        raise FileError(path, f"cams must be [k, h, w] with k = {len(class_ids)} class_ids, got shape {cams.shape}")
    if not len(class_ids):
        cams = np.zeros((0, *(cams.shape[1:] if cams.ndim == 3 else (0, 0))))
    return class_ids.astype(np.int64), finite_float32(path, "cams", cams)


def read_features(path: Path | str) -> np.ndarray:
    """Network features of one picture.

    Args:
        path: .npy, or .npz with one array or one called `feats`: float [D, h, w], any D >= 1 and stride.

    Returns:
        np.ndarray: [D, h, w] float32.

    Raises:
        FileError: missing, damaged, or outside this contract.
    """
    path = Path(path)
    feats = read_array(path, "feats")
    if feats.ndim == 4 and feats.shape[0] == 1:
        feats = feats[0]
    if feats.ndim != 3 or 0 in feats.shape:
        raise FileError(path, f"features must be [D, h, w], got shape {feats.shape}")
    return finite_float32(path, "features", feats)


def read_array(path: Path, name: str) -> np.ndarray:
    """The array of a .npy, or of a .npz the one called `name` or the only one.

    Raises:
        FileError: missing, damaged, a pickle, or several arrays of other names.
    """
    if path.suffix == ".npy":
        return _from_npy(path, name, _read_bytes(path))
    arrays = _read_npz(path)
    member = name if name in arrays else next(iter(arrays), name)
    if member not in arrays or (member != name and len(arrays) > 1):
        raise FileError(path, f"the npz must hold {name}, or one array only, got {', '.join(arrays) or 'nothing'}")
    return _array(path, member, arrays)


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """All arrays of an .npz.

    Raises:
        FileError: missing, damaged, or with a pickle in it.
    """
    path = Path(path)
    members = _read_npz(path)
    return {name: _array(path, name, members) for name in members}


def write_label(path: Path | str, label: np.ndarray, *, settings: str = "") -> None:
    """Write a label picture: an index PNG with the VOC palette, complete or not at all.

    Args:
        path: of the PNG; its folder is made where missing.
        label: [H, W] integers 0..255, 0 = background, 255 = ignore; H, W >= 1.
        settings: text kept in the PNG, for `png_settings`; Latin-1.

    Raises:
        ValueError: label outside this contract.
        OSError: of the file layer.
    """
    label = np.asarray(label)
    if label.ndim != 2 or 0 in label.shape or label.dtype.kind not in "iu":
        raise ValueError(f"label must be integers [H, W] of at least one pixel, got {label.dtype} {label.shape}")
    if label.min() < 0 or label.max() > 255:
        raise ValueError(f"label must be in 0..255, got {label.min()}..{label.max()}")
    image = Image.fromarray(np.ascontiguousarray(label, dtype=np.uint8)).convert("P")
    image.putpalette(voc_palette().tobytes())
    text = PngImagePlugin.PngInfo()
    if settings:
        text.add_text(SETTINGS_KEY, settings)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    write_atomically(Path(path), buffer.getvalue())


def write_maps(path: Path | str, class_ids: np.ndarray, cams: np.ndarray, *, settings: str = "") -> None:
    """Write maps in the format of `read_maps`: half precision, compressed, complete or not at all.

    The same input gives the same bytes, whenever it is written.

    Args:
        path: of the .npz; its folder is made where missing.
        class_ids: [k] integers, 1..254, none twice.
        cams: [k, h, w] floating point; finite, |value| < 65,504 (the range of half precision).
        settings: text kept in the file, for `npz_settings`; Latin-1, under 64 KB.

    Raises:
        ValueError: an argument outside this contract.
        OSError: of the file layer.
    """
    class_ids, cams = np.asarray(class_ids, dtype=np.int64), np.asarray(cams)
    if class_ids.ndim != 1 or cams.ndim != 3 or len(class_ids) != len(cams):
        raise ValueError(f"cams must be [k, h, w] with class_ids [k], got {cams.shape} with {class_ids.shape}")
    _check_class_ids(path, class_ids, MAX_CLASS_ID)
    if cams.size and not np.abs(cams).max() < np.finfo(np.float16).max:
        raise ValueError(f"cams must be finite and below 65,504, got a largest value of {np.abs(cams).max()}")
    write_arrays(path, {"class_ids": class_ids, "cams": cams.astype(np.float16)}, settings=settings)


def write_arrays(path: Path | str, arrays: Mapping[str, np.ndarray], *, settings: str = "") -> None:
    """Write an .npz, compressed, complete or not at all; the same input gives the same bytes.

    Raises:
        ValueError: an array of Python objects.
        OSError: of the file layer.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, not now
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member.getvalue(), compresslevel=1)  # fast; higher levels gain little
        archive.comment = settings.encode("latin-1")
    write_atomically(Path(path), buffer.getvalue())


def fingerprint(path: Path | str) -> str:
    """What tells two versions of an input apart without reading it whole: its size, of an npz the checksums it keeps.

    "" where the file is missing or unreadable.
    """
    try:
        size = os.stat(path).st_size
        if not zipfile.is_zipfile(path):
            return str(size)
        with zipfile.ZipFile(path) as archive:
            return " ".join([str(size), *(f"{info.CRC:08x}" for info in archive.infolist())])
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return ""


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data says nothing about the pixels
        return image
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 65535:
            got = f"values {values.min()}..{values.max()} (mode {image.mode})"
            raise FileError(path, f"picture must have 8 or 16 bits a channel, got {got}")
        return Image.fromarray(to_8_bits(values)).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileError(path, "no such file") from None
    except OSError as error:
        raise FileError(path, _reason(error)) from error
    except MemoryError:
        raise FileError(path, "not enough memory to read the file") from None
    if not data:
        raise FileError(path, "the file is empty (0 bytes)")
    return data


def _read_npz(path: Path) -> Mapping[str, bytes]:
    """The members of an archive, checksums verified, not yet arrays."""
    data = _read_bytes(path)
    if not data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise FileError(path, "no npz file (np.savez(path, class_ids=..., cams=...) writes one)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if info.file_size > _MAX_ARRAY_BYTES:
                    raise FileError(path, f"{info.filename} must be under 8 GB, got {info.file_size:,} bytes")
            return {i.filename.removesuffix(".npy"): archive.read(i) for i in archive.infolist()}
    except MemoryError:
        raise FileError(path, "not enough memory to unpack the npz") from None
    except FileError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        raise FileError(path, f"damaged npz ({error})") from error


def _array(path: Path, name: str, members: Mapping[str, bytes]) -> np.ndarray:
    return _from_npy(path, name, members[name])


def _from_npy(path: Path, name: str, data: bytes) -> np.ndarray:
    if not data.startswith(b"\x93NUMPY"):
        raise FileError(path, f"{name} is no NumPy array" + (" but a pickle" if data.startswith(b"\x80") else ""))
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except MemoryError:
        raise FileError(path, f"not enough memory for {name}") from None
    except (ValueError, EOFError, OSError, TypeError, SyntaxError) as error:
        if "allow_pickle" in str(error):
            raise FileError(path, f"{name} holds Python objects (a pickle); save plain numbers") from None
        raise FileError(path, f"{name} is damaged ({error})") from error


def _check_class_ids(path: Path | str, class_ids: np.ndarray, num_classes: int) -> None:
    wrong = class_ids[(class_ids < 1) | (class_ids > num_classes)]
    if len(wrong):
        hint = " (0 is the background: add 1 to 0-based ids)" if (wrong == 0).any() else ""
        raise FileError(path, f"class_ids must be in 1..{num_classes}, got {wrong[0]}{hint}")
    ids, counts = np.unique(class_ids, return_counts=True)
    if (counts > 1).any():
        raise FileError(path, f"class_ids must name each class once, got {ids[counts > 1][0]} twice")


def finite_float32(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise FileError(path, f"{name} must be floating point, got {values.dtype}")
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        count = int(np.count_nonzero(~np.isfinite(values)))
        raise FileError(path, f"{name} must be finite, got {count} NaN or infinite of {values.size} values")
    return values


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).rstrip(".")
