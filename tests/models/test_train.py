"""The training loop: it learns, resumes with the same bits, and does in two processes what it does in one."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning_fabric")
from wsss_models import train as module
from wsss_models.data.artefacts import FileError
from wsss_models.data.augment import Augment
from wsss_models.data.dataset import open_dataset
from wsss_models.data.samples import Samples
from wsss_models.infer import load_run
from wsss_models.train import Order, collate, data_hash, read_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")

ABOUT = {"system": "classifier"}


def run(model, samples, out, **options):
    return train(model, samples, out, accelerator="cpu", about=ABOUT, **options)


def equal(first, second):
    return all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_thirty_steps_lower_the_loss(colours, small_classifier, tmp_path):
    losses = run(small_classifier("epochs=10"), colours, tmp_path)
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["total"] for line in lines] == losses
    rates = [0.02 * (1 - t / 30) ** 0.9 for t in range(30)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)


@pytest.mark.parametrize("stop", [3, 4])  # at the end of an epoch, and inside one
def test_resumption_gives_the_same_bits(colours, small_classifier, tmp_path, stop):
    whole = small_classifier("dropout=0.3")
    losses = run(whole, colours, tmp_path / "whole")
    part = small_classifier("dropout=0.3")
    first = run(part, colours, tmp_path / "part", stop_after=stop)
    torch.rand(7)  # what else draws random numbers must not matter
    other = small_classifier("dropout=0.3", seed=5)
    second = run(other, colours, tmp_path / "part", resume=True)
    assert first + second == losses
    assert equal(whole, other)
    states = [read_checkpoint(tmp_path / name) for name in ("whole", "part")]
    assert states[0]["step"] == states[1]["step"] == 9
    momenta = [[s["momentum_buffer"] for s in state["optimiser"]["state"].values()] for state in states]
    assert len(momenta[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert [line["total"] for line in log_of(tmp_path / "part")] == losses
    assert run(other, colours, tmp_path / "part", resume=True) == []  # nothing left to do


def test_a_training_that_ends_before_its_schedule(colours, small_classifier, tmp_path):
    """The rate is that of the whole schedule; resumed to the same step nothing is left to do, also inside an epoch."""
    losses = run(small_classifier(), colours, tmp_path / "whole")
    assert run(small_classifier(), colours, tmp_path / "part", stop_after=5) == losses[:5]
    assert run(small_classifier(seed=5), colours, tmp_path / "part", resume=True, stop_after=5) == []
    assert read_checkpoint(tmp_path / "part")["step"] == 5
    assert run(small_classifier(seed=5), colours, tmp_path / "part", resume=True, stop_after=100) == losses[5:]


def test_a_crash_between_checkpoints_costs_those_steps_only(colours, small_classifier, tmp_path, monkeypatch):
    losses = run(small_classifier(), colours, tmp_path / "whole")

    class Crash(Exception):
        pass

    def crash(optimiser, recipe, progress, before=module.set_rate):
        before(optimiser, recipe, progress)
        if progress == 5 / 9:
            raise Crash

    monkeypatch.setattr(module, "set_rate", crash)
    with pytest.raises(Crash):
        run(small_classifier(), colours, tmp_path / "part", checkpoint_steps=2)
    monkeypatch.undo()
    with (tmp_path / "part" / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "to')  # a line cut short
    assert read_checkpoint(tmp_path / "part")["step"] == 4
    assert run(small_classifier(seed=9), colours, tmp_path / "part", resume=True) == losses[4:]
    assert [line["total"] for line in log_of(tmp_path / "part")] == losses


def test_what_cannot_be_resumed(colours, small_classifier, tmp_path):
    run(small_classifier(), colours, tmp_path, stop_after=1)
    with pytest.raises(FileError, match="holds a training already"):
        run(small_classifier(), colours, tmp_path)
    with pytest.raises(FileError, match="another config"):
        run(small_classifier("lr=0.5"), colours, tmp_path, resume=True)
    with pytest.raises(FileError, match="another seed"):
        run(small_classifier(), colours, tmp_path, resume=True, seed=3)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(FileError, match="damaged checkpoint"):
        run(small_classifier(), colours, tmp_path, resume=True)


def test_manifest(colours, small_classifier, tmp_path):
    model = small_classifier()
    run(model, colours, tmp_path, stop_after=2, seed=4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seed"] == 4
    assert manifest["config"]["recipe"]["batch_size"] == 4
    assert manifest["versions"]["torch"] == torch.__version__
    loaded, _ = load_run(tmp_path)
    assert loaded.config == model.config
    assert equal(loaded, model)
    assert list((tmp_path / "tensorboard").glob("events*")) or "tensorboard" not in sys.modules


def test_a_loss_that_is_no_number_stops(colours, small_classifier, tmp_path):
    model = small_classifier()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss must be finite, got .* at step 1"):
        run(model, colours, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_bf16(colours, small_classifier, tmp_path):
    losses = run(small_classifier("epochs=4"), colours, tmp_path, precision="bf16-mixed")
    assert np.isfinite(losses).all()
    with pytest.raises(ValueError, match="precision must be one of"):
        run(small_classifier(), colours, tmp_path / "b", precision="8-bit")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_order_is_the_same_batch_for_any_number_of_processes(processes):
    orders = [Order(21, 8, seed=1, rank=r, processes=processes) for r in range(processes)]
    for order in orders:
        order.start(3)
    steps = [list(chain(*parts)) for parts in zip(*orders, strict=True)]
    assert len(steps) == 2
    expected = np.random.default_rng([1, 3]).permutation(21)
    assert steps == [expected[:8].tolist(), expected[8:16].tolist()]
    orders[0].start(3, 1)
    assert len(orders[0]) == len(list(orders[0])) == 1


def test_order_refuses():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 8"):
        Order(20, 8, seed=0, processes=3)
    with pytest.raises(ValueError, match=r"batch_size must be at most the number of pictures \(7\), got 8"):
        Order(7, 8, seed=0)


def test_collate_and_hash(colours):
    batch = next(iter(DataLoader(colours, batch_size=2, collate_fn=collate)))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["id"] == ["0", "1"]
    labels = np.eye(3, dtype=np.float32)
    assert data_hash(["a", "b", "c"], labels) == data_hash(["a", "b", "c"], labels)
    assert data_hash(["a", "b", "c"], labels) != data_hash(["a", "b", "d"], labels)
    assert data_hash(["a", "b", "c"], labels) != data_hash(["a", "b", "c"], labels[::-1])


WORKER = """
import os
import sys
import torch
torch.set_num_threads(1)
from conftest import Colours
from wsss_models import classifier
from wsss_models.systems import preset, with_settings
from wsss_models.train import train
torch.manual_seed(0)
settings = ["num_classes=3", "width=8", "batch_size=4", "epochs=3", "lr=0.02", "norm=fixed"]
model = classifier.Model(with_settings(preset("classifier", "tiny"), settings))
train(model, Colours(), sys.argv[1], accelerator="cpu", about={"system": "classifier"})
os._exit(0)  # gloo's threads, which the wrapped model keeps, may abort a process that ends by itself
"""


def test_two_processes_do_what_one_does(colours, small_classifier, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run(small_classifier("norm=fixed"), colours, tmp_path / "one")
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 9  # one process alone writes
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    assert [line["total"] for line in two] == pytest.approx([line["total"] for line in one], rel=2e-5)
    weights = [read_checkpoint(tmp_path / name)["model"] for name in ("one", "two")]
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named(folder, small_classifier, tmp_path, workers):
    (folder / "p2.png").write_bytes(b"no picture")
    samples = Samples(open_dataset(folder), Augment(crop=32))
    with pytest.raises(FileError, match=r"p2\.png: no picture"):
        run(small_classifier("batch_size=6"), samples, tmp_path / "run", workers=workers)
