"""Files that are read: odd pictures, odd maps, odd features."""

import contextlib
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.data import artefacts, files
from wsss_models.data.artefacts import FileError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def png_claiming(width: int, height: int) -> bytes:
    """A tiny file that would unpack to width x height."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


# --- pictures that are read -------------------------------------------------------------------------------------------


def test_rgb_png_is_read_as_it_is(tmp_path):
    picture = files.read_picture(saved(tmp_path / "a.png", Image.fromarray(RGB)))
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, RGB)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    suffix = ".tif" if mode in ("CMYK", "YCbCr") else ".png"
    picture = files.read_picture(saved(tmp_path / f"a{suffix}", image))
    assert np.array_equal(picture, np.array(image.convert("RGB")))


def test_cmyk_jpeg(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    picture = files.read_picture(saved(tmp_path / "a.jpg", image))
    assert picture.shape == (8, 8, 3)
    assert picture[4, 4, 0] > 200
    assert picture[4, 4, 1:].max() < 60


def test_alpha_is_dropped_and_the_colour_stays(tmp_path):
    rgba = np.dstack([RGB, np.zeros((6, 9), dtype=np.uint8)])  # fully transparent
    assert np.array_equal(files.read_picture(saved(tmp_path / "a.png", Image.fromarray(rgba))), RGB)


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(RGB).quantize(8)
    expected = np.array(image.convert("RGB"))
    path = saved(tmp_path / "a.png", image, transparency=bytes([0, 128] + [255] * 6))
    assert np.array_equal(files.read_picture(path), expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_by_hand(tmp_path, suffix):
    values = np.array([[0, 257, 65535, 128, 129]], dtype=np.uint16)  # 128 / 257 rounds down, 129 / 257 up
    picture = files.read_picture(saved(tmp_path / f"a{suffix}", Image.fromarray(values)))
    assert picture.tolist() == [[[v] * 3 for v in (0, 1, 255, 0, 1)]]


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_a_file_of_16(tmp_path, bits):
    values = np.array([[0, (2**bits - 1) // 2, 2**bits - 1]], dtype=np.uint16)
    picture = files.read_picture(saved(tmp_path / "a.png", Image.fromarray(values)))
    assert picture[0, :, 0].tolist() in ([0, 127, 255], [0, 128, 255])


def test_arrays_as_pictures(tmp_path):
    def read(values):
        np.save(tmp_path / "a.npy", values)
        return files.read_picture(tmp_path / "a.npy")

    assert np.array_equal(read(RGB), RGB)
    assert np.array_equal(read(RGB.transpose(2, 0, 1)), RGB)  # bands first
    assert np.array_equal(read(np.concatenate([RGB, RGB], axis=2)), RGB)  # six bands: the first three
    assert np.array_equal(read(RGB[..., 0]), RGB[..., :1].repeat(3, axis=2))
    assert np.array_equal(read(RGB.astype(np.uint16) * 257), RGB)
    ramp = np.linspace(-3, 5, 101, dtype=np.float32).reshape(1, 101, 1).repeat(4, axis=0)
    shown = read(ramp)[0, :, 0]
    assert shown[:3].tolist() == [0, 0, 0] and shown[-3:].tolist() == [255, 255, 255] and shown[50] in (127, 128)
    assert read(np.full((4, 5), 7.0)).shape == (4, 5, 3)  # flat
    assert files.read_bands(tmp_path / "a.npy").shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((2, 3, 4, 5)), "got shape"),
        (np.zeros((0, 3, 4)), "got shape"),
        (np.full((3, 4), np.nan), "12 NaN or infinite of 12"),
        (np.zeros((3, 4), dtype=complex), "real numbers"),
        (np.array([{}]), "pickle"),
        (np.zeros((10_000, 9_500), dtype=np.uint8), "at most 89,000,000 pixels, got 9500 x 10000"),
    ],
)
def test_refused_arrays(tmp_path, values, reason):
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(FileError, match=rf"a\.npy: .*{reason}"):
        files.read_picture(tmp_path / "a.npy")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # the top left corner is white, whatever way the camera was held
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(files.read_picture(path), upright)


def test_1x1_animation_and_wrong_suffix(tmp_path):
    assert files.read_picture(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert files.read_picture(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]
    saved(tmp_path / "b.png", Image.fromarray(RGB)).rename(tmp_path / "b.jpg")
    assert np.array_equal(files.read_picture(tmp_path / "b.jpg"), RGB)


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01\x12")
    assert files.read_picture(path).shape == RGB.shape


# --- pictures that are refused ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Pillow's own warning about the size
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "no picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a known format"),
        (png_claiming(20_000, 20_000), "at most 89,000,000 pixels"),
        (png_claiming(10_000, 9_500), "at most 89,000,000 pixels, got 10000 x 9500"),
        (png_claiming(300, 300), ""),  # ends too early
        (png_claiming(0, 5), ""),
    ],
)
def test_refused_pictures_name_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"bad\.png: .+") as caught:
        files.read_picture(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF"])
def test_files_cut_short_are_refused(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    for share in (0.3, 0.6, 0.9):
        path = tmp_path / f"{share}.img"
        path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
        with pytest.raises(FileError, match=r"\.img: "):
            files.read_picture(path)


def test_flipped_bytes_give_a_picture_or_a_file_error(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    for at in range(len(buffer.getvalue())):
        data = bytearray(buffer.getvalue())
        data[at] ^= 0xFF
        (tmp_path / "a.png").write_bytes(data)
        with contextlib.suppress(FileError):
            assert files.read_picture(tmp_path / "a.png").dtype == np.uint8


def test_float_tiff_missing_file_and_folder(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)))
    with pytest.raises(FileError, match="8 or 16 bits"):
        files.read_picture(path)
    with pytest.raises(FileError, match="No such file"):
        files.read_picture(tmp_path / "none.png")
    with pytest.raises(FileError, match="directory"):
        files.read_picture(tmp_path)


# --- maps and features ------------------------------------------------------------------------------------------------


def test_maps_come_back(tmp_path):
    cams = RNG.random((2, 5, 7)).astype(np.float32)
    np.savez(tmp_path / "a.npz", class_ids=np.array([20, 3], dtype=np.uint8), cams=cams.astype(np.float64))
    class_ids, read = files.read_maps(tmp_path / "a.npz")
    assert class_ids.dtype == np.int64
    assert class_ids.tolist() == [20, 3]
    assert read.dtype == np.float32
    assert np.array_equal(read, cams)
    files.write_maps(tmp_path / "b.npz", class_ids, read, settings="s")
    assert np.array_equal(files.read_maps(tmp_path / "b.npz")[1], cams.astype(np.float16))
    assert artefacts.npz_settings(tmp_path / "b.npz") == "s"


@pytest.mark.parametrize("cams", [np.zeros((0, 5, 7)), np.zeros(0), np.zeros((0, 0, 0), dtype=np.float16)])
def test_no_class_is_valid(tmp_path, cams):
    np.savez(tmp_path / "a.npz", class_ids=np.array([]), cams=cams)
    class_ids, read = files.read_maps(tmp_path / "a.npz")
    assert class_ids.shape == (0,)
    assert read.shape[0] == 0
    assert read.ndim == 3


BAD_MAPS = {
    "0-based": ({"class_ids": [0, 3], "cams": np.ones((2, 4, 4))}, "got 0 .*add 1"),
    "ignore": ({"class_ids": [255], "cams": np.ones((1, 4, 4))}, "1..254, got 255"),
    "above 255": ({"class_ids": [300], "cams": np.ones((1, 4, 4))}, "got 300"),
    "negative": ({"class_ids": [-1], "cams": np.ones((1, 4, 4))}, "got -1"),
    "twice": ({"class_ids": [3, 7, 3], "cams": np.ones((3, 4, 4))}, "got 3 twice"),
    "float ids": ({"class_ids": [1.0], "cams": np.ones((1, 4, 4))}, "integers"),
    "2-d": ({"class_ids": [1], "cams": np.ones((4, 4))}, r"k = 1 .*\(4, 4\)"),
    "too many maps": ({"class_ids": [1], "cams": np.ones((2, 4, 4))}, r"k = 1"),
    "empty maps": ({"class_ids": [1], "cams": np.ones((1, 0, 4))}, r"\(1, 0, 4\)"),
    "nan": ({"class_ids": [1], "cams": np.full((1, 4, 4), np.nan)}, "16 NaN or infinite"),
    "infinite in float32": ({"class_ids": [1], "cams": np.full((1, 1, 1), 1e300)}, "infinite"),
    "complex": ({"class_ids": [1], "cams": np.ones((1, 4, 4), dtype=complex)}, "floating point"),
    "no ids": ({"cams": np.ones((1, 4, 4))}, "must hold class_ids and cams, got cams"),
    "nothing": ({}, "got nothing"),
    "objects": ({"class_ids": [1], "cams": np.array([{"a": 1}], dtype=object)}, "Python objects"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_maps_name_file_and_reason(tmp_path, case):
    arrays, reason = BAD_MAPS[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(FileError, match=rf"bad\.npz: .*{reason}"):
        files.read_maps(tmp_path / "bad.npz")


def test_class_count(tmp_path):
    np.savez(tmp_path / "a.npz", class_ids=[21], cams=np.ones((1, 4, 4)))
    with pytest.raises(FileError, match=r"1\.\.20, got 21"):
        files.read_maps(tmp_path / "a.npz", num_classes=20)


def test_missing_empty_cut_and_pickled_archives(tmp_path):
    np.savez(tmp_path / "a.npz", class_ids=[1], cams=RNG.random((1, 20, 20)))
    whole = (tmp_path / "a.npz").read_bytes()
    cases = {"": "empty", b"\x80\x04]q.": "no npz", whole[:50]: "damaged", whole[:-30]: "damaged"}
    for content, reason in cases.items():
        (tmp_path / "b.npz").write_bytes(content or b"")
        with pytest.raises(FileError, match=rf"b\.npz: .*{reason}"):
            files.read_maps(tmp_path / "b.npz")
    with pytest.raises(FileError, match=r"none\.npz: no such file"):
        files.read_maps(tmp_path / "none.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("class_ids.npy", b"\x80\x04]q.")
        archive.writestr("cams.npy", b"\x80\x04]q.")
    with pytest.raises(FileError, match="pickle"):
        files.read_maps(tmp_path / "c.npz")


def test_flipped_bytes_in_maps(tmp_path):
    np.savez(tmp_path / "a.npz", class_ids=[1], cams=np.ones((1, 2, 2), dtype=np.float32))
    whole = (tmp_path / "a.npz").read_bytes()
    for at in range(len(whole)):
        (tmp_path / "b.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(FileError):
            files.read_maps(tmp_path / "b.npz")


def test_features(tmp_path):
    feats = RNG.random((6, 3, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", feats)
    np.save(tmp_path / "b.npy", feats[None].astype(np.float16))
    np.savez(tmp_path / "c.npz", anything=feats)
    np.savez(tmp_path / "d.npz", feats=feats, other=np.ones(3))
    for name in ("a.npy", "c.npz", "d.npz"):
        assert np.array_equal(files.read_features(tmp_path / name), feats)
    assert files.read_features(tmp_path / "b.npy").shape == (6, 3, 4)
    np.savez(tmp_path / "e.npz", one=feats, two=feats)
    np.save(tmp_path / "f.npy", np.array([None]))
    np.save(tmp_path / "g.npy", feats[0])
    for name, reason in (
        ("e.npz", "one array only"),
        ("f.npy", "Python objects"),
        ("g.npy", r"\[D, h, w\]"),
        ("h.npy", "no such"),
    ):
        with pytest.raises(FileError, match=reason):
            files.read_features(tmp_path / name)
