"""`wsss train` and `wsss cams`, from a folder of pictures to maps of every picture."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
from wsss_models.cli.main import main
from wsss_models.data.augment import IMAGENET
from wsss_models.data.files import read_maps, read_picture
from wsss_models.data.masks import read_mask
from wsss_models.infer import load_run
from wsss_models.systems import preset

import wsss_kernels as wk

SMALL = ["--preset", "tiny", "--set", "width=8", "--set", "batch_size=2", "--set", "crop=48", "--workers", "0"]


def train(system, folder, out, *more):
    return main(["train", system, "--data", f"{folder}", "--out", f"{out}", "--device", "cpu", *SMALL, *more])


def test_train_and_cams(folder, tmp_path, capsys):
    assert train("classifier", folder, tmp_path / "run", "--set", "epochs=2") == 0
    assert "6 steps" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["classes"] == ["ant", "bee", "cat"]
    assert manifest["config"]["num_classes"] == 3
    assert manifest["data"]["pictures"] == 6
    assert train("classifier", folder, tmp_path / "run", "--set", "epochs=2", "--resume") == 0
    assert "0 steps" in capsys.readouterr().out
    arguments = ["cams", "--run", f"{tmp_path}/run", "--data", f"{folder}", "--out", f"{tmp_path}/cams"]
    arguments += ["--scales", "1,0.5", "--device", "cpu", "--workers", "0"]
    assert main(arguments) == 0
    assert "6 written, 0 failed" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "0 written, 6 already done" in capsys.readouterr().out
    class_ids, cams = read_maps(tmp_path / "cams" / "p0.npz")
    assert class_ids.tolist() == [1, 2]
    assert cams.shape == (2, 10, 12)


@pytest.mark.parametrize("system", ["affinitynet", "irnet"])
def test_stages_that_train_on_cams(folder, tmp_path, capsys, system):
    for i in range(6):
        count = 0 if i == 5 else min(2, 3 - i % 3)
        ids = np.arange(i % 3 + 1, i % 3 + 1 + count)
        cams = np.zeros((count, 10, 12), dtype=np.float32)
        cams[:, 2:6, 2:6] = 1
        np.savez(tmp_path / f"p{i}.npz", class_ids=ids, cams=cams)
    assert train(system, folder, tmp_path / "run", "--cams", f"{tmp_path}", "--set", "epochs=1") == 0
    assert "3 steps" in capsys.readouterr().out
    labels = [read_mask(tmp_path / "run" / "labels" / f"p{i}.png") for i in range(6)]
    assert labels[0].shape == (40, 48)
    assert set(np.unique(labels[1])) <= {0, 2, 3, 255}
    assert not labels[5].any()  # no class: all background
    image = torch.from_numpy(read_picture(folder / "p1.png")).permute(2, 0, 1)
    cams = torch.zeros(3, 10, 12)
    cams[1:, 2:6, 2:6] = 1
    make = {"affinitynet": wk.affinity_labels, "irnet": wk.confident_labels}[system]
    options = preset(system, "tiny").label_options()
    assert np.array_equal(
        labels[1], make(image, cams, **options)
    )  # of all classes, where only the present ones cost anything
    again = ["--labels", f"{tmp_path}/run/labels", "--set", "epochs=1"]
    assert train(system, folder, tmp_path / "other", *again, "--weights", f"{tmp_path}/run/checkpoint.pt") == 0
    assert "new tensors: none" in capsys.readouterr().out
    spread = ["spread", "--run", f"{tmp_path}/run", "--data", f"{folder}", "--out", f"{tmp_path}/spread"]
    spread += ["--cams", f"{tmp_path}", "--device", "cpu"]
    assert main(spread) == 0
    assert "6 written, 0 failed" in capsys.readouterr().out
    model, _ = load_run(tmp_path / "run")
    image = IMAGENET(read_picture(folder / "p1.png"))[None]
    expected = model.eval().labels(image, cams[None, 1:], class_ids=[2, 3])[0]
    assert np.array_equal(read_mask(tmp_path / "spread" / "p1.png"), expected)
    assert not read_mask(tmp_path / "spread" / "p5.png").any()
    (tmp_path / "p2.npz").unlink()
    assert main(spread) == 1
    printed = capsys.readouterr()
    assert "0 written, 5 already done, 1 failed" in printed.out
    assert "p2" in printed.err


def test_refusals(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for arguments, message in (
        (["classifer"], "did you mean classifier"),
        (["classifier", "--preset", "huge"], "preset must be one of"),
        (["classifier", "--set", "epoch=3"], "did you mean epochs"),
        (["classifier", "--weights", f"{tmp_path}/none.pth"], "no such file"),
        (["classifier", "--seed", "-1"], "at least 0"),
        (["irnet"], "give --cams DIR"),
        (["classifier", "--set", "backbone=timm/resnest50d", "--set", "cut=None"], "needs timm"),
    ):
        assert main(["train", "--data", f"{folder}", "--out", f"{tmp_path}/run", "--preset", "tiny", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["cams", "--run", f"{tmp_path}/run", "--data", f"{folder}", "--out", f"{tmp_path}/c"]) == 2
    assert "no training" in capsys.readouterr().err
