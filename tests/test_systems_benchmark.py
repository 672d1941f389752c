"""`python -m benchmarks systems`: rows and paired differences, as they follow from the runs' own results."""

import json
import statistics

import pytest
import torch

pytest.importorskip("scipy", reason="the benchmarks' opponents need scipy")
pytest.importorskip("lightning_fabric")
pytest.importorskip("benchmarks", reason="not part of the package: python -m pytest from the checkout")

from benchmarks import systems

SMALL = [f"--set={s}" for s in ("epochs=1", "batch_size=8", "crop=48", "width=8")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rows_and_differences(tmp_path, capsys):
    words = [
        "--out",
        f"{tmp_path / 'out'}",
        "--systems",
        "irnet",
        "classifier:image",
        "--seeds",
        "3",
        "4",
        *SMALL,
        "--workers=0",
        "--write",
    ]
    words += ["--data-args", "--images 12 --classes 3 --size 48 52 --val 0.25", "--until=labels", "--device=cpu"]
    assert systems.main([*words, "--folder", f"{tmp_path / 'rows'}"]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "rows").iterdir()
    assert path.name.startswith("systems--")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = {}
    minutes = {}
    for name, refiner in (("classifier:none", "none"), ("irnet", "irnet"), ("classifier:image", "image")):
        for seed in (3, 4):
            folder = tmp_path / "out" / f"{name.replace(':', '-')}-seed{seed}"
            record = json.loads((folder / "results.json").read_text())
            assert (record["seed"], record["refiner"]) == (seed, refiner)
            minutes[name, seed] = sum(record["stages"].values()) / 60
            scores[name, seed] = {row["stage"]: 100 * row["miou"] for row in record["rows"]}
    for row in rows:
        assert row["miou"] == scores[row["system"], row["seed"]][row["stage"]]
        assert row["baseline"] == scores["classifier:none", row["seed"]].get(row["stage"])
        assert row["minutes"] == minutes[row["system"], row["seed"]] > 0
        assert row["op"] == "systems" and row["preset"] == "tiny" and "epochs=1" in row["settings"]
    assert len(rows) == sum(map(len, scores.values())) == 2 * (3 + 4 + 5)
    lines = printed[printed.index("mean IoU %") :].splitlines()
    for name in ("irnet", "classifier:image"):
        changes = [scores[name, seed]["labels"] - scores["classifier:none", seed]["labels"] for seed in (3, 4)]
        expected = f"{statistics.fmean(changes):+.1f} ± {statistics.stdev(changes) / 2**0.5:.1f}"
        (last,) = (line for line in lines if line.startswith(f"{name} - classifier:none"))
        assert last.rstrip().endswith(expected) and "+0.0 ± 0.0" in last  # the CAMs are shared
    first = [f"{name}, seed {seed}" for name in ("classifier:none", "irnet", "classifier:image") for seed in (3, 4)]
    assert [line.split("  ")[0] for line in lines[1:7]] == first
    assert lines[1].endswith(f"{minutes['classifier:none', 3]:.1f}")
    assert (tmp_path / "out" / "set-seed3" / "synth.json").read_text() != (
        tmp_path / "out" / "set-seed4" / "synth.json"
    ).read_text()
    with pytest.raises(SystemExit):
        systems.main(["--out", f"{tmp_path / 'out'}", "--systems", "unknown:image"])
    assert "must be SYSTEM or SYSTEM:REFINER" in capsys.readouterr().err
    assert systems.main(["--out", f"{tmp_path / 'out'}", "--seeds", "3", "--data-args", "--images 14"]) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_settings_go_to_the_systems_that_have_the_stage(tmp_path, capsys):
    words = ["--out", f"{tmp_path / 'out'}", "--seeds", "3", *SMALL, "--workers=0", "--until=labels", "--device=cpu"]
    words += ["--data-args", "--images 12 --classes 3 --size 48 52 --val 0.25", "--set=sccam.clusters=2"]
    assert systems.main([*words, "--systems", "classifier:none"]) == 2
    assert "--set sccam.clusters=2: none of these systems has a stage sccam" in capsys.readouterr().err
    assert not (tmp_path / "out" / "classifier-none-seed3").exists()
    assert systems.main([*words, "--systems", "sccam:none", "--set=sccam.rounds=1"]) == 0
    manifest = json.loads((tmp_path / "out" / "sccam-none-seed3" / "round1" / "manifest.json").read_text())
    assert manifest["config"]["clusters"] == 2
    plan = json.loads((tmp_path / "out" / "classifier-none-seed3" / "run.json").read_text())["plan"]
    assert not any("sccam" in setting for setting in plan["settings"])
