"""CAMs over scales and flips by other means; files; what an interruption leaves."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.data.artefacts import FileError, npz_settings
from wsss_models.data.dataset import open_dataset
from wsss_models.data.files import read_maps
from wsss_models.infer import Scales, load_run, merged_cams, write_cams
from wsss_models.train import MANIFEST


class Means(nn.Module):
    """A "network" of 3 maps, one a channel, by means of 8 x 8 blocks; remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def cams(self, images):
        self.shapes.append(tuple(images.shape))
        ramp = torch.linspace(0, 1, images.shape[-1])  # not symmetric: a wrong flip shows
        return F.relu(F.avg_pool2d(images * ramp, 8, ceil_mode=True))


@pytest.mark.parametrize("flip", ["sum", "max", "none"])
def test_merge_by_other_means(flip):
    pyramid = [torch.rand(2, 3, 40, 48), torch.rand(2, 3, 20, 24)]
    found = merged_cams(Means().cams, pyramid, (40, 48), Scales((1.0, 0.5), flip, 4))
    assert found.shape == (2, 3, 10, 12)
    for b in range(2):
        for c in range(3):
            total = np.zeros((10, 12))
            for level in pyramid:
                plain = Means().cams(level[b : b + 1])
                other = torch.from_numpy(
                    Means().cams(torch.from_numpy(level[b : b + 1].numpy()[..., ::-1].copy())).numpy()[..., ::-1].copy()
                )
                merged = {"sum": plain + other, "max": torch.maximum(plain, other), "none": plain}[flip]
                total += F.interpolate(merged.double(), (10, 12), mode="bilinear", align_corners=False)[0, c].numpy()
            np.testing.assert_allclose(found[b, c], total / (total.max() + 1e-5), rtol=1e-4, atol=1e-5)


def test_an_empty_map_stays_zero():
    found = merged_cams(lambda x: torch.zeros(len(x), 2, 3, 3), [torch.rand(1, 3, 24, 24)], (24, 24))
    assert torch.equal(found, torch.zeros(1, 2, 6, 6))


def test_refused_scales():
    for options, message in (
        ({"scales": ()}, "scales must be"),
        ({"scales": (0.0,)}, "scales must be"),
        ({"flip": "mean"}, "flip must be one of sum, max, none"),
        ({"stride": 0}, "stride must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Scales(**options)


@pytest.mark.parametrize("workers", [0, 2])
def test_files(folder, tmp_path, workers):
    pictures, model = open_dataset(folder), Means()
    counts = write_cams(model, pictures, tmp_path / "out", workers=workers, batch_size=2)
    assert counts == (6, 0)
    assert max(shape[0] for shape in model.shapes) == 4  # two pictures of one size and their flips
    assert (2, 3, 96, 80) in model.shapes  # a size that comes alone, at scale 2
    for i, name in enumerate(pictures.ids):
        class_ids, cams = read_maps(tmp_path / "out" / f"{name}.npz")
        height, width = pictures.image(i).shape[:2]
        assert class_ids.tolist() == pictures.class_ids(i)
        if len(class_ids):
            assert cams.shape == (len(class_ids), -(-height // 4), -(-width // 4))
            assert cams.max(axis=(1, 2)) == pytest.approx(1, abs=2e-3)
    level = torch.from_numpy(pictures.image(0)).permute(2, 0, 1)[None] / 255
    level = (level - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    write_cams(Means(), pictures.subset([0]), tmp_path / "one", scales=Scales((1.0,), "none", 1), workers=0)
    class_ids, cams = read_maps(tmp_path / "one" / f"{pictures.ids[0]}.npz")
    expected = F.interpolate(Means().cams(level), (40, 48), mode="bilinear")[0, class_ids - 1]
    expected = expected / (expected.amax(dim=(1, 2), keepdim=True) + 1e-5)
    np.testing.assert_allclose(cams, expected, atol=1e-3)


def test_batches_do_not_change_the_maps(folder, tmp_path):
    pictures = open_dataset(folder)
    write_cams(Means(), pictures, tmp_path / "a", workers=0, batch_size=1)
    write_cams(Means(), pictures, tmp_path / "b", workers=0, batch_size=4)
    for name in pictures.ids:
        first, second = (read_maps(tmp_path / run / f"{name}.npz")[1] for run in "ab")
        np.testing.assert_allclose(first, second, atol=1e-3)


def test_resumption(folder, tmp_path):
    pictures, out = open_dataset(folder), tmp_path / "out"
    write_cams(Means(), pictures, out, workers=0, source="w1")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / f"{pictures.ids[1]}.npz").unlink()
    damaged = out / f"{pictures.ids[2]}.npz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert write_cams(Means(), pictures, out, workers=0, source="w1") == (2, 4)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert write_cams(Means(), pictures, out, workers=0, source="w2") == (6, 0)  # other weights
    Image.new("RGB", (30, 30)).save(folder / "p0.png")
    assert write_cams(Means(), pictures, out, workers=0, source="w2") == (1, 5)  # another picture
    assert npz_settings(out / f"{pictures.ids[0]}.npz") is not None


def test_shards_cover_the_set_once(folder, tmp_path):
    pictures = open_dataset(folder)
    counts = [write_cams(Means(), pictures, tmp_path / "out", workers=0, shard=(i, 4)) for i in range(4)]
    assert counts == [(2, 0), (2, 0), (1, 0), (1, 0)]
    assert len(list((tmp_path / "out").glob("*.npz"))) == 6


def test_a_damaged_picture(folder, tmp_path):
    (folder / "p2.png").write_bytes(b"no picture")
    pictures, failed = open_dataset(folder), []
    counts = write_cams(Means(), pictures, tmp_path, workers=0, failed=lambda name, why: failed.append((name, why)))
    assert counts == (5, 0)
    assert [name for name, _ in failed] == ["p2"]
    with pytest.raises(FileError, match="p2"):
        write_cams(Means(), pictures, tmp_path / "b", workers=0)


def test_ids_stay_inside(folder, tmp_path):
    pictures, failed = open_dataset(folder), []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    pictures.ids = ("../../x", "/tmp/x", "a\0b", "link/x", "", "p5")
    counts = write_cams(Means(), pictures, tmp_path / "out", workers=0, failed=lambda n, why: failed.append(n))
    assert counts[0] == 1
    assert len(failed) == 5
    assert not list(tmp_path.glob("*.npz"))


def test_damaged_runs(tmp_path):
    with pytest.raises(FileError, match="no training"):
        load_run(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"system": "classifier", "config": {"num_clases": 3}}))
    with pytest.raises(FileError, match="did you mean num_classes"):
        load_run(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(FileError, match="damaged"):
        load_run(tmp_path)
