"""MCIC from the command line: resumption, saliency maps, a whole run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
from PIL import Image
from wsss_models import mcic
from wsss_models.cli.main import main
from wsss_models.data.dataset import open_dataset
from wsss_models.data.files import fingerprint
from wsss_models.data.synth import Settings, write_set
from wsss_models.systems import system
from wsss_models.train import read_checkpoint, train
from wsss_models.training_data import samples_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_resumed_training_has_the_same_memory(colours, tmp_path):
    settings = {"num_classes": 3, "width": 4, "capacity": 6, "attention_dropout": 0.3}

    def make():
        torch.manual_seed(0)
        config = replace(mcic.PRESETS["tiny"], **settings)
        return mcic.Model(replace(config, recipe=replace(config.recipe, epochs=3, batch_size=4, crop=32, lr=0.02)))

    whole = train(make(), colours, tmp_path / "a", accelerator="cpu")
    first = train(make(), colours, tmp_path / "b", accelerator="cpu", stop_after=4)
    second = train(make(), colours, tmp_path / "b", accelerator="cpu", resume=True)
    assert first + second == whole
    one, two = (read_checkpoint(tmp_path / name)["model"] for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["bank.lengths"].sum() > 0
    terms = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {"classification", "segmentation", "attention"} <= terms[0].keys()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_set(root, Settings(16, 3, 1, 48, 56, 0.25))
    return root


def words(command, system, scenes, out, *more):
    settings = [f"--set={s}" for s in ("epochs=2", "batch_size=6", "crop=48", "width=4")]
    shared = [f"--data={scenes}", f"--out={out}", "--preset=tiny", "--device=cpu", "--workers=0"]
    return [command, system, *shared, *settings, *more]


def saliency_maps(scenes, folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for path in sorted((scenes / "JPEGImages").iterdir()):
        Image.fromarray(rng.integers(0, 256, (48, 56), dtype=np.uint8)).save(folder / f"{path.stem}.png")


def test_a_run_with_saliency_maps(scenes, tmp_path, capsys):
    maps, out = tmp_path / "saliency", tmp_path / "out"
    saliency_maps(scenes, maps)
    arguments = words("run", "mcic", scenes, out, f"--saliency={maps}", "--scales=1")
    assert main(arguments) == 0
    capsys.readouterr()
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = ["CAM best", "CAM free", "labels", "mcic", "mcic+CRF", "deeplab", "deeplab+CRF"]
    assert [(row["stage"], row["split"]) for row in rows] == list(zip(names, ["train"] * 3 + ["val"] * 4, strict=True))
    assert all(0 <= row["miou"] <= 1 for row in rows)
    pictures = open_dataset(scenes, "train")
    for i, name in enumerate(pictures.ids):
        label = np.array(Image.open(out / "labels" / f"{name}.png"))
        assert label.shape == (48, 56) and set(np.unique(label)) <= {0, *pictures.class_ids(i)}
    before = {p: fingerprint(p) for p in (out / "labels").iterdir()}
    assert main(arguments) == 0  # nothing is done twice
    assert "12 already done" in capsys.readouterr().out
    assert before == {p: fingerprint(p) for p in (out / "labels").iterdir()}
    assert main(["report", f"{out}"]) == 0
    page = (out / "report.html").read_text()
    assert "segmentation, one stage" in page and "attention" in page
    capsys.readouterr()
    assert main(words("run", "mcic", scenes, out, "--scales=1")) == 2
    assert "another saliency" in capsys.readouterr().err


def test_saliency_of_samples(scenes, tmp_path, capsys):
    maps = tmp_path / "saliency"
    saliency_maps(scenes, maps)
    pictures = open_dataset(scenes, "train")
    config = replace(mcic.PRESETS["tiny"], num_classes=3)
    config = replace(config, recipe=replace(config.recipe, crop=64, scale=None, flip=False))
    sample = samples_of(system("mcic"), config, pictures, saliency=maps)[0]
    assert sample["saliency"].shape == (1, 64, 64) and sample["saliency"].dtype == torch.float32
    original = np.array(Image.open(maps / f"{pictures.ids[0]}.png")) / 255
    assert sample["saliency"].sum().item() == pytest.approx(original.sum(), rel=1e-5)  # padded with 0
    assert "saliency" not in samples_of(system("mcic"), config, pictures)[0]
    Image.new("RGB", (56, 48)).save(maps / f"{pictures.ids[0]}.png")
    with pytest.raises(ValueError, match="grey PNG of 8 bits"):
        samples_of(system("mcic"), config, pictures, saliency=maps)[0]
    for system_name, message in (("classifier", "which classifier does not"), ("mcic", "grey PNG")):
        assert main(words("train", system_name, scenes, tmp_path / system_name, f"--saliency={maps}")) == 2
        assert message in capsys.readouterr().err
    (maps / f"{pictures.ids[1]}.png").unlink()
    assert main(words("train", "mcic", scenes, tmp_path / "x", f"--saliency={maps}")) == 2
    assert "No such file" in capsys.readouterr().err


def test_refusals(scenes, tmp_path, capsys):
    for more, message in (
        (["--refiner", "mcic"], "--refiner mcic is for the system mcic"),
        (["--refiner", "mcic,crf"], "stand alone"),
        (["--saliency", "x"], "--saliency is for systems"),
    ):
        assert main([*words("run", "classifier", scenes, tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
