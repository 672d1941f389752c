"""The benchmarks measure what they say: every way is right, rows are whole, wrong ways get no number."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import wsss_kernels as wk

pytest.importorskip("scipy", reason="the benchmarks' opponents need scipy")
pytest.importorskip("benchmarks", reason="not part of the package: python -m pytest from the checkout")

from benchmarks import baselines, cases, measure, plot, run, sizes

TINY = sizes.Size("tiny 9x11", 9, 11, dim=6)
CASES = {case.name: case for case in cases.all_cases()}
PLACE = measure.environment()


def tiny(case):
    return replace(case, size=replace(TINY, batch=min(case.size.batch, 2)), aims=())


def test_names_are_unique():
    assert len(CASES) == len(cases.all_cases())
    for case in CASES.values():
        ways = [way.name for way in case.ways]
        assert len(set(ways)) == len(ways)
        assert set(case.groups) <= set(run.GROUPS)
        assert {aim.way for aim in case.aims} <= set(ways)


WAYS = [
    pytest.param(case, way, id=f"{case.name}-{way.name}")
    for case in CASES.values()
    for way in case.ways
    if way.kind != "context" and not (case.only_full or "375x500" in case.name)
]


@pytest.mark.filterwarnings("ignore:.*runs the slow reference")
@pytest.mark.parametrize(("case", "way"), WAYS)
def test_every_way_is_right_on_a_tiny_map(case, way, monkeypatch):
    if way.name == "torch.compile" and "hspp" not in case.name:  # one of them generates code: half a minute for others
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    # The library form of refine_cams takes the number of steps refine_cams takes by itself at its own size.
    if case.name.startswith("refine_cams psa 47x63 C=2 background") and way.kind == "library":
        pytest.skip("steps depend on the size; see test_library_refine")
    inputs = tiny(case).inputs(tiny(case).size)
    assert way.compare(way.prepare(inputs)(), case.expected(inputs), inputs) <= way.tolerance


@pytest.mark.parametrize("automatic", [True, False])
def test_library_refine(automatic):
    cams, feats = sizes.maps(TINY, 2), sizes.features(TINY)
    options = {"scale": "auto"} if automatic else {"scale": 1.0, "border": "cropped"}
    expected = wk.refine_cams(
        cams.double(), feats.double(), background=16.0, steps=20, normalize="image" if automatic else None, **options
    )
    assert_close(
        baselines.library_refine(cams, feats, 16.0, 20, automatic=automatic).double(), expected, atol=1e-4, rtol=0
    )


def test_pair_loss_by_hand():
    affinity = torch.tensor([[[0.5, 0.25, 0.75]]])  # one pair inside the background, one in a class, one between two
    labels = torch.eye(3)[:, None, None]
    expected = math.log(2) / 4 + math.log(4) / 4 + math.log(4) / 2
    assert_close(float(baselines.pair_loss(affinity, tuple(labels))), expected, atol=1e-3, rtol=0)


def test_published_layout_is_the_inverse_of_the_view():
    affinity = wk.reference.local_affinity(sizes.features(TINY), border="cropped")
    assert_close(baselines.published_layout(baselines.published_view(affinity), TINY.height, TINY.width), affinity)


def test_published_pairs_are_the_cropped_border():
    feats = sizes.features(TINY)
    pairs = baselines.gathered_affinity(feats, *baselines.published_pairs(TINY.height, TINY.width))
    expected = wk.reference.local_affinity(feats, border="cropped")
    assert_close(baselines.published_layout(pairs, TINY.height, TINY.width), expected)


def test_rows_are_whole():
    case = tiny(CASES["walk psa 47x63 C=5"])
    rows = measure.run_case(case, PLACE, rounds=2, budget=0.05, memory=False)
    assert [row["way"] for row in rows] == [way.name for way in case.ways]
    for row in rows:
        assert tuple(row) == measure.COLUMNS
        assert row["status"] == "ok"
        assert row["median_ms"] >= row["min_ms"] > 0
        assert row["visits"] >= 1
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        json.dumps(row)
    ours = [row for row in rows if row["kind"] == "ours"]
    rivals = [row for row in rows if row["kind"] == "library"]
    assert {row["ratio_to"] for row in ours} == {min(rivals, key=lambda row: row["median_ms"])["way"]}
    text = run.table(rows, {case.name: case})
    assert all(way.name in text for way in case.ways)


def test_a_wrong_way_gets_no_number():
    case = tiny(CASES["walk psa 47x63 C=2"])
    wrong = replace(case.ways[0], prepare=lambda i: lambda: i["maps"])
    rows = measure.run_case(replace(case, ways=(wrong, *case.ways[2:])), PLACE, rounds=1, budget=0.05, memory=False)
    assert rows[0]["status"].startswith("wrong")
    assert rows[0]["error"] > 1e-3
    assert (rows[0]["median_ms"], rows[0]["ratio"]) == (None, None)
    assert "WRONG" in run.findings(rows, {case.name: case})


def test_nan_and_shapes_are_errors():
    good = torch.ones(3)
    assert cases.relative_error(torch.tensor([1.0, math.nan, 1.0]), good) == math.inf
    with pytest.raises(ValueError, match="shape"):
        cases.relative_error(torch.ones(2), good)


def test_a_lost_comparison_is_said():
    row = dict.fromkeys(measure.COLUMNS) | {"status": "ok", "ratio": 0.5, "kind": "library", "case": "c", "way": "w"}
    assert "LOST: c, w" in run.findings([row], {})


def test_turns_are_interleaved():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleave(functions, dict.fromkeys("abc", 1.0), rounds=3, budget=2.0)
    assert "".join(order) == "abcabc"
    assert [[math.isnan(t) for t in column] for column in times.values()] == [[False, False, True]] * 3


def test_paired_ratio():
    assert measure.paired_ratio([2.0, 6.0, math.nan], [1.0, 2.0, 5.0]) == (2.25, 2.5, 2.75)


@pytest.mark.skipif(not measure.sys.platform.startswith("linux"), reason="read from /proc")
def test_memory_is_told():
    case = CASES["walk psa 47x63 C=5"]
    dense = next(way for way in case.ways if way.kind == "published")
    peak, output = measure.peak_memory(replace(case, size=replace(sizes.SMALL, height=40, width=40)), dense)
    matrix = 4 * 1600**2 / 2**20
    assert 1.9 * matrix < peak < 6 * matrix
    assert output == pytest.approx(5 * 1600 * 4 / 2**20)


def test_rows_are_written_and_drawn(tmp_path):
    case = tiny(CASES["walk psa 47x63 C=5"])
    rows = measure.run_case(case, PLACE, rounds=1, budget=0.02, memory=False)
    (path,) = run.write(rows, tmp_path)
    assert path.name == f"random_walk--{measure.machine_slug(PLACE)}.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    run.write(rows, tmp_path)
    assert len(path.read_text().splitlines()) == 2 * len(rows)
    if importlib.util.find_spec("matplotlib"):
        assert plot.main([str(path), "--out", str(tmp_path / "walk.png")]) == 0
        assert (tmp_path / "walk.png").read_bytes().startswith(b"\x89PNG")


def test_commands_refuse_nonsense(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--only", "speed"])
    assert stop.value.code == 2
    assert plot.main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
