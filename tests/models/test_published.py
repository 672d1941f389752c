"""Pickled CAMs of the published code: read as they were meant, and nothing in them runs."""

import contextlib
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from wsss_models.cli.main import main
from wsss_models.data.artefacts import FileError
from wsss_models.data.files import read_maps
from wsss_models.published import read_published_cams


@pytest.fixture
def maps():
    return np.random.default_rng(0).random((2, 5, 7), dtype=np.float32)


def saved(tmp_path, content, name="p0.npy"):
    np.save(tmp_path / name, content, allow_pickle=True)
    return tmp_path / name


def test_affinitynet(tmp_path, maps):
    found = read_published_cams(saved(tmp_path, {14: maps[0], 3: maps[1]}))
    assert found.class_ids.tolist() == [15, 4]
    assert np.array_equal(found.cams, maps)
    assert not found.warning


def test_irnet_with_tensors(tmp_path, maps):
    high = np.asfortranarray(np.random.default_rng(1).random((2, 20, 28)))
    whole = torch.rand(4, 5, 7)
    content = {"keys": torch.tensor([0, 19]), "cam": whole[1:3], "high_res": high}  # a view into a larger storage
    path = saved(tmp_path, content)
    found = read_published_cams(path, maps="cam")
    assert found.class_ids.tolist() == [1, 20]
    assert np.array_equal(found.cams, whole[1:3].numpy())
    assert np.array_equal(read_published_cams(path).cams, high.astype(np.float32))
    strided = saved(tmp_path, {"keys": np.array([1, 2]), "cam": torch.rand(5, 7, 2).permute(2, 0, 1)}, "v.npy")
    assert read_published_cams(strided).cams.shape == (2, 5, 7)


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2", "|u1"])
def test_puzzlecam_and_dtypes(tmp_path, maps, dtype):
    values = (maps * 200).astype(dtype)
    found = read_published_cams(saved(tmp_path, {"keys": np.array([0, 5, 20]), "hr_cam": values, "cam": maps[:, ::2]}))
    assert found.class_ids.tolist() == [5, 20]
    expected = values.astype(np.float32)
    np.testing.assert_array_equal(found.cams, expected / expected.max())


def test_thresholded_maps_are_told(tmp_path, maps):
    found = read_published_cams(saved(tmp_path, {2: np.where(maps[0] > 0.5, 255.0, 0.0)}))
    assert "thresholded" in found.warning
    assert found.cams.max() == 1


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "popen": lambda mark: Call(subprocess.Popen, ["touch", str(mark)]),
    "open": lambda mark: Call(open, str(mark), "w"),
    "getattr": lambda mark: Call(getattr, mark, "name"),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "storage": lambda mark: Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {mark}"))),
    "object array": lambda mark: np.array([Call(os.system, f"touch {mark}"), 1], dtype=object),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_runs(tmp_path, maps, name):
    mark = tmp_path / "mark"
    for content in ({0: PAYLOADS[name](mark)}, {"keys": np.array([0]), "cam": [PAYLOADS[name](mark)]}):
        path = saved(tmp_path, content)
        mark.unlink(missing_ok=True)
        with pytest.raises(FileError, match=r"p0\.npy: refused"):
            read_published_cams(path)
        assert not mark.exists()


def _crafted(tmp_path, reduce):
    class Crafted:
        def __reduce__(self):
            return reduce

    return saved(tmp_path, {0: Crafted()})


@pytest.mark.parametrize(
    "reduce",
    [
        (np._core.multiarray._reconstruct, (np.ndarray, (1 << 40,), b"f")),
        (np.dtype, ("V8",)),
        (np.ndarray, ((1 << 40,),)),
        (torch._utils._rebuild_tensor_v2, (torch.rand(2).untyped_storage(), 0, (9, 9), (0, 0), False, {})),
        (torch._utils._rebuild_tensor_v2, (torch.rand(2).untyped_storage(), 0, (1 << 29, 1 << 29), (0, 0), False, {})),
        (torch._utils._rebuild_tensor_v2, (torch.rand(2).untyped_storage(), 5, (1,), (1,), False, {})),
    ],
)
def test_crafted_arrays(tmp_path, reduce):
    with pytest.raises(FileError):
        read_published_cams(_crafted(tmp_path, reduce))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold"),
        ([1, 2], "must hold a pickled dictionary, got an array"),
        ({"cam": np.zeros((1, 2, 2))}, 'must hold "keys"'),
        ({"keys": np.array([0])}, "must hold high_res"),
        ({"keys": np.array([0, 0]), "cam": np.zeros((2, 2, 2))}, "each once"),
        ({"keys": np.array([-3]), "cam": np.zeros((1, 2, 2))}, "classes must be in"),
        ({"keys": np.array([1.5]), "cam": np.zeros((1, 2, 2))}, "keys must be whole numbers"),
        ({"keys": np.array([1]), "cam": np.zeros((3, 2, 2))}, "maps must be numbers"),
        ({0: np.array([[np.nan]])}, "finite"),
        ({0: np.zeros((2, 2)), 1: np.zeros((3, 2))}, "one size"),
        ({0: "text"}, "maps must be numbers"),
    ],
)
def test_other_contents(tmp_path, content, message):
    with pytest.raises(FileError, match=message):
        read_published_cams(saved(tmp_path, content))


def test_damaged_files(tmp_path, maps):
    path = saved(tmp_path, {0: maps[0]})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"p0\.npy"):
            read_published_cams(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(bytes(data))
        with contextlib.suppress(FileError):
            read_published_cams(path)
    np.save(path, maps)
    with pytest.raises(FileError, match="must hold a pickled dictionary, got an array"):
        read_published_cams(path)
    with pytest.raises(FileError, match="no such file"):
        read_published_cams(tmp_path / "absent.npy")


def test_command(tmp_path, maps, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    saved(tmp_path / "in", {3: maps[0]}, "a.npy")
    saved(tmp_path / "in" / "sub", {"keys": np.array([1, 2]), "cam": maps}, "b.npy")
    arguments = ["import", "--cams", f"{tmp_path}/in", "--out", f"{tmp_path}/out"]
    assert main(arguments) == 0
    class_ids, cams = read_maps(tmp_path / "out" / "sub" / "b.npz")
    assert class_ids.tolist() == [2, 3]
    np.testing.assert_allclose(cams, maps, atol=1e-3)
    assert main(arguments) == 0
    assert "0 written, 2 already done, 0 failed" in capsys.readouterr().out
    saved(tmp_path / "in", {0: Call(os.system, "true")}, "c.npy")
    assert main(arguments) == 1
    assert "posix.system" in capsys.readouterr().err
    assert main([*arguments[:2], str(tmp_path / "none"), *arguments[3:]]) == 2
