"""Several runs beside each other: `wsss ablate`, and what `wsss run` shares, leaves out and adds for it."""

import json
import math
import re

import pytest

pytest.importorskip("lightning_fabric")
from wsss_models.cli import ablate, sweep
from wsss_models.cli.main import main
from wsss_models.cli.run_plan import STAGES, SYSTEMS
from wsss_models.data.synth import Settings, write_set
from wsss_models.systems import system, with_settings

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [f"--set={s}" for s in ("epochs=1", "batch_size=8", "crop=48", "width=8")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_set(root, Settings(12, 3, 1, 48, 52, 0.25))
    return root


def stages(out):
    return {row["stage"]: row["miou"] for row in json.loads((out / "results.json").read_text())["rows"]}


def test_a_table_of_variants(scenes, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["ablate", "affinitynet", f"--data={scenes}", f"--out={out}", "--preset=tiny", *SMALL, "--device=cpu"]
    words += ["--workers=0", "--seeds", "0", "1", "--only", "as it is"]
    words += ["--variant", "two: affinity.steps=2 affinity.low=2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("mean IoU %") :].splitlines()
    assert lines[0].split("  ")[0] == "mean IoU %" and lines[0].endswith("change of labels")
    assert [line.split("  ")[0].strip() for line in lines[1:3]] == ["as it is", "two"]
    assert lines[3:] == [
        "2 seeds, mean ± standard error; changes are paired seed by seed",
        "two: affinity.steps=2 affinity.low=2",
    ]
    labels = {name: [100 * stages(out / f"{name}-seed{s}")["labels"] for s in (0, 1)] for name in ("as-it-is", "two")}
    changes = [b - a for a, b in zip(*labels.values(), strict=True)]
    mean, half = sum(changes) / 2, abs(changes[0] - changes[1]) / 2  # the standard error of two
    assert lines[2].endswith(f"{mean:+.1f} ± {half:.1f}")
    for seed in (0, 1):
        made, taken = (out / f"{name}-seed{seed}" / "classifier" for name in ("as-it-is", "two"))
        for name in ("checkpoint.pt", "log.jsonl"):  # trained once: times are in the log
            assert (made / name).read_bytes() == (taken / name).read_bytes()
        manifest = json.loads((out / f"two-seed{seed}" / "affinity" / "manifest.json").read_text())
        assert (manifest["config"]["steps"], manifest["config"]["low"]) == (2, 2.0)
        assert not (out / f"two-seed{seed}" / "deeplab").exists()
    assert main(words) == 0
    again = capsys.readouterr().out
    assert again[again.index("mean IoU %") :] == printed[printed.index("mean IoU %") :]
    assert re.findall(r"^(\d+) steps", again, re.MULTILINE) == ["0"] * 8  # nothing was trained again


def test_runs_that_share_stop_early_or_show_the_ceiling(scenes, tmp_path, capsys):
    def words(system, out, *more):
        shared = [f"--data={scenes}", f"--out={tmp_path / out}", "--preset=tiny", "--device=cpu", "--workers=0"]
        return ["run", system, *shared, "--scales=1", *SMALL, *more]

    assert main(words("classifier", "a", "--until=labels")) == 0
    early = stages(tmp_path / "a")
    assert list(early) == ["CAM best", "CAM free", "refined best", "refined free", "labels"]
    assert main(words("classifier", "a", "--ceiling")) == 0
    full = stages(tmp_path / "a")
    assert list(full) == [*early, "deeplab", "deeplab+CRF", "ceiling"] and early.items() <= full.items()
    manifest = json.loads((tmp_path / "a" / "ceiling" / "manifest.json").read_text())
    assert (manifest["labels"], manifest["system"]) == ("masks", "deeplab")
    taken = f"--classifier={tmp_path / 'a'}"
    assert main(words("irnet", "b", "--until=labels", taken)) == 0
    assert {name: stages(tmp_path / "b")[name] for name in ("CAM best", "CAM free")} == {
        name: early[name] for name in ("CAM best", "CAM free")
    }
    capsys.readouterr()
    for more, message in (
        (["--seed=1", taken], "has another seed"),
        (["--set", "classifier.lr=0.01", taken], "has another settings"),
        (["--classifier", f"{tmp_path / 'none'}"], "holds no run"),
    ):
        assert main(words("irnet", "c", *more)) == 2
        assert message in capsys.readouterr().err
    assert main(words("affinitynet", "d", taken)) == 2
    assert "has another classifier" in capsys.readouterr().err


def test_refusals(scenes, tmp_path, capsys):
    words = ["ablate", "irnet", f"--data={scenes}", f"--out={tmp_path / 'out'}", "--preset=tiny"]
    for more, message in (
        (["--only", "nothing"], "--only must name variants of as it is, "),
        (["--variant", "affinity.steps=4"], "--variant must be NAME:SETTING"),
        (["--variant", "as it is:affinity.steps=4"], "is there already"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    for more, message in (
        (["--variant", "typo:affinity.stepz=4"], "stepz"),
        (
            ["--only", "256 steps", "--set", "affinity.steps=256"],
            "nothing to compare: 256 steps changes nothing of these settings",
        ),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["ablate", "classifier", *words[2:]]) == 2
    assert "classifier names no variants" in capsys.readouterr().err
    assert main(["ablate", "deeplab", *words[2:]]) == 2
    assert "system must be one of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_preset_is_already_is_not_trained_again(scenes, tmp_path, capsys):
    words = ["ablate", "vwe", f"--data={scenes}", f"--out={tmp_path / 'out'}", "--preset=tiny", *SMALL, "--device=cpu"]
    assert main([*words, "--workers=0", "--only", "GAP", "CAMs of the words"]) == 0
    printed = capsys.readouterr().out
    assert "=== GAP: changes nothing of these settings" in printed
    table = printed[printed.index("mean IoU %") :].splitlines()
    assert [line.split("  ")[0].strip() for line in table[1:3]] == ["as it is", "CAMs of the words"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["as-it-is-seed0", "cams-of-the-words-seed0"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_variants_are_settings_that_change_something(name):
    for variant, settings in getattr(system(name), "ABLATIONS", {}).items():
        assert variant != ablate.WHOLE and settings
        parts = [setting.partition(".") for setting in settings]
        own = [rest if stage in STAGES else stage + dot + rest for stage, dot, rest in parts if stage != "deeplab"]
        presets = system(name).PRESETS.values()
        assert not own or any(with_settings(config, own) != config for config in presets), variant


def test_means_by_hand():
    assert sweep.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    mean, error = sweep.mean_and_error([5.0])
    assert mean == 5 and math.isnan(error)
    assert sweep.paired({0: {"x": 3.0}, 1: {"x": 5.0}, 2: {}}, {1: {"x": 1.0}, 0: {"x": 2.0}}, "x") == [1.0, 4.0]
    assert [sweep.shown(2.04, 0.5), sweep.shown(2.0, math.nan, sign=True), sweep.shown(math.nan, math.nan)] == [
        "2.0 ± 0.5",
        "+2.0",
        "-",
    ]
