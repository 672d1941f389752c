"""Small sets of pictures that a network can learn."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("PIL")
from PIL import Image
from wsss_models import classifier
from wsss_models.systems import preset, with_settings


@pytest.fixture
def one_thread():
    """torch computes in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Colours(Dataset):
    """Pictures in memory, 3 classes, each a colour; no file, no augmentation."""

    def __init__(self, count=12, size=32):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        noise = 0.3 * torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(i))
        label = torch.zeros(3)
        label[i % 3] = 1
        return {"image": noise + label.view(3, 1, 1), "label": label, "id": str(i)}


@pytest.fixture
def colours():
    return Colours()


@pytest.fixture
def small_classifier():
    """Makes a classifier of 3 classes whose random weights are those of a seed."""

    def make(*settings, seed=0):
        torch.manual_seed(seed)
        small = ("num_classes=3", "width=8", "batch_size=4", "epochs=3", "lr=0.02")
        return classifier.Model(with_settings(preset("classifier", "tiny"), [*small, *settings]))

    return make


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures with a labels.csv; classes ant, bee, cat; the last picture has none."""
    root = tmp_path / "data"
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file,classes"]
    for i, (height, width) in enumerate([(40, 48), (33, 41), (40, 48), (48, 40), (40, 48), (33, 41)]):
        image = rng.integers(0, 60, (height, width, 3))
        names = [] if i == 5 else ["ant", "bee", "cat"][i % 3 : i % 3 + 2]
        for name in names:
            channel = ["ant", "bee", "cat"].index(name)
            image[8:24, 10 * channel : 10 * channel + 14, channel] += 180
        Image.fromarray(image.astype(np.uint8)).save(root / f"p{i}.png")
        rows.append(f"p{i},{';'.join(names)}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    return root
