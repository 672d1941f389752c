"""How the GPU is measured, with the CPU standing in for one."""

import functools
import json
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("scipy", reason="the benchmarks' opponents need scipy")
pytest.importorskip("benchmarks", reason="not part of the package: python -m pytest from the checkout")

from benchmarks import baselines, bench_random_walk, cases, measure, measure_gpu, plot, run, sizes
from benchmarks.device import Gpu, Work, moved, repeated
from wsss_kernels.info import info

CASES = {case.name: case for case in cases.all_cases("cuda")}
TINY = sizes.Size("tiny 7x9", 7, 9, dim=6)
SHORT = "affinity psa 47x63 batch 16"


class StandIn:
    """Counts its recordings; a broken one replays nothing, one that records nothing is None."""

    device = torch.device("cpu")
    l2_bytes = 100_000
    flops, products_per_second, bytes_per_second = 1e12, 1e13, 1e11
    about = {  # noqa: RUF012
        "device": "cuda", "machine": "NVIDIA Stand-In 1", "driver": "1.2", "cuda": "13.0", "triton": None,
        "peak_tflops": 1.0, "copy_tbs": 0.1, "product_tflops": 10.0,
    }  # fmt: skip
    limit_ms = Gpu.limit_ms

    def __init__(self, graphs="good"):
        self.graphs = graphs
        self.recorded = []

    def free_gigabytes(self):
        return math.inf

    def seconds(self, function, calls=1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def record(self, functions):
        self.recorded.append(len(functions))
        if self.graphs is None:
            return None
        result = functions[-1]()

        def replay():
            for function in functions:
                last = function()
            if self.graphs == "good":
                result.copy_(last)

        return replay, result

    def launches(self, function):
        return 3

    def peak_mb(self, function):
        return 1.5


def tiny(name):
    case = CASES[name]
    return replace(case, size=replace(TINY, batch=case.size.batch))


def rows_of(case, gpu=None, **options):
    gpu = gpu or StandIn()
    return measure_gpu.run_case(case, measure.environment() | gpu.about, gpu, rounds=3, budget=0.02, **options)


def test_names_are_unique_and_every_group_is_known():
    assert len(CASES) == len(cases.all_cases("cuda"))
    for case in CASES.values():
        assert set(case.groups) <= set(run.GROUPS)
        assert case.ways[0].kind == "ours" and len({way.name for way in case.ways}) == len(case.ways)


def test_the_sizes_that_matter_are_there():
    for size in ("psa 47x63", "irn 94x125", "128x128"):
        for batch in (1, 16, 256):
            assert f"walk {size} batch {batch} C=3" in CASES
            assert CASES[f"affinity {size} batch {batch}"].size.dim == 448
    assert CASES["affinity, forward + backward crop 56x56 batch 8"].size.batch == 8
    for op in {case.op for case in CASES.values()} - {"refine_cams"}:
        batches = {case.size.batch for case in CASES.values() if case.op == op and "overhead" not in case.groups}
        assert op == "kmeans" or (1 in batches and len(batches) > 1), op  # k-means has problems: 1, and 20
        assert any(way.work for case in CASES.values() if case.op == op for way in case.ways), op
    losses_without_rows = {"affinity_loss_from_features"}  # in affinity_loss's
    assert {case.op for case in CASES.values()} >= set(info()["ops"]) - losses_without_rows | {"refine_cams"}


@pytest.mark.parametrize(
    "name",
    [
        SHORT,
        "affinity, forward + backward crop 56x56 batch 8",
        "walk psa 47x63 batch 1 C=3",
        "dense_crf 21 labels voc 375x500 batch 8",
        "dense_energy_loss, forward + backward 21 labels crop 160x160 batch 4",
        "boundary affinity irn 94x125",
        "boundary affinity radius 10, forward + backward 128x128 batch 8",
        "par 448x448 C=21",
        "attention walk 24x32 C=20",
        "vote of superpixels photograph C=21",
        "vote of masks photograph C=21",
        "class context 41x41 batch 4 d 512, 21 classes",
        "module 41x41 batch 4 d 512, 192 entries, forward and backward",
        "k-means, given centers 20 classes x4096",
        "soft_histogram, forward + backward to feats and codebook vwe 28x28 batch 16, 256 words",
        "attention 41x41 batch 32 d 512, 1344 entries, forward and backward",
    ],
)
@pytest.mark.native
def test_every_way_is_right_on_a_tiny_map(name):
    case = tiny(name)
    inputs, expected = measure_gpu.data_of(case, StandIn())
    for way in (way for way in case.ways if "compile" not in way.name):  # half a minute
        assert way.compare(way.prepare(inputs)(), expected, inputs) <= way.tolerance, way.name


@pytest.mark.native
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "compile" in case.groups])
def test_compiled_ways_are_right(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # code takes minutes
    case = tiny(name)
    inputs, expected = measure_gpu.data_of(case, StandIn())
    (way,) = (way for way in case.ways if way.name.startswith("torch.compile"))
    assert way.compare(way.prepare(inputs)(), expected, inputs) <= way.tolerance


@pytest.mark.parametrize(
    "name",
    [
        "affinity, forward + backward crop 56x56 batch 8",
        "affinity loss from features, forward + backward crop 56x56 batch 8",
        "attention walk tokens 32x32 C=3",
        "vote of masks photograph C=21",
        "par 448x448 C=21",
        "class context 41x41 batch 4 d 512, 21 classes",
        "attention 41x41 batch 4 d 512, 1344 entries, forward and backward",
        "module 41x41 batch 4 d 512, 192 entries, forward and backward",
        "attention_entropy 41x41 batch 4 d 512, 1344 entries, forward and backward",
        "dense_energy_loss, forward + backward 21 labels crop 160x160 batch 4",
        "boundary affinity irn 94x125",
        "k-means, given centers 20 classes x4096",
        "soft_histogram, forward + backward to feats and codebook vwe 28x28 batch 16, 256 words",
        "hspp, forward + backward vwe 28x28 batch 16",
    ],
)
@pytest.mark.filterwarnings("ignore:.* on meta runs the slow reference")
def test_every_way_stays_where_its_inputs_are(name, one_device):
    """As far as it goes without data: what it makes on the CPU does not go with them."""
    case = tiny(name)
    inputs = moved(case.inputs(replace(case.size, batch=min(2, case.size.batch))), torch.device("meta"))
    ways = [("expected", lambda i: lambda: case.expected(i))]
    for way, prepare in ways + [(w.name, w.prepare) for w in case.ways if "compile" not in w.name]:
        complaint = ""
        try:
            with one_device:
                prepare(inputs)()
        except (RuntimeError, TypeError) as error:  # most of them ask for the data
            complaint = str(error)
        assert not re.search("expected device|same device|to numpy", complaint), f"{way}: {complaint}"


@pytest.mark.native
def test_rows_are_whole(monkeypatch):
    monkeypatch.setattr(measure_gpu, "COUNTED", math.inf)  # however busy the machine is
    gpu = StandIn()
    case = tiny(SHORT)
    rows = rows_of(case, gpu)
    assert [row["way"] for row in rows] == ["ours", "torch shifted views"]
    for row in rows:
        assert tuple(row) == measure.COLUMNS
        assert (row["status"], row["device"], row["timing"], row["launches"]) == ("ok", "cuda", "graph", 3)
        assert row["median_ms"] >= row["min_ms"] > 0 and row["eager_ms"] > 0 and row["peak_mb"] == 1.5
        assert row["images_per_s"] == pytest.approx(16e3 / row["median_ms"])
        json.dumps(row)
    ours, other = rows
    assert ours["kernel"] == info()["ops"]["local_affinity"]["cuda"]["forward"]["kernel"] and other["kernel"] is None
    assert ours["limit_reached"] == pytest.approx(ours["limit_ms"] / ours["median_ms"])
    assert ours["ratio_to"] == "torch shifted views"
    assert len(gpu.recorded) == 2 and min(gpu.recorded) > 1
    text = run.gpu_table(rows) + run.heading(measure.environment() | gpu.about)
    assert "torch shifted views" in text and "NVIDIA Stand-In 1" in text and "driver 1.2" in text


@pytest.mark.native
def test_rows_name_the_form_of_a_kernel():
    case = tiny(SHORT)
    named = replace(case, ways=tuple(replace(way, form=lambda inputs: "grid") for way in case.ways[:1]))
    (row,) = rows_of(named)
    assert row["kernel"] == info()["ops"]["local_affinity"]["cuda"]["forward"]["kernel"] + ", grid"


def test_form_of_a_walk(monkeypatch):
    asked = []

    def plan(*arguments):
        asked.append(arguments)
        return SimpleNamespace(form="cluster")

    monkeypatch.setattr(bench_random_walk, "cuda_plan", plan)
    auto, power, *others = CASES["walk psa 47x63 batch 16 C=3"].ways
    assert not any(way.form for way in others)
    maps = SimpleNamespace(is_cuda=True, shape=(16, 3, 47, 63), device=SimpleNamespace(index=1))
    for kernel, expected in (("cuda", "cluster"), ("triton", "")):
        monkeypatch.setattr(bench_random_walk._dispatch, "gpu_kernel", lambda name, index, found=kernel: (found, ""))
        assert auto.form({"maps": maps}) == power.form({"maps": maps}) == expected
    assert asked == [(16, 3, 47, 63, 5, 256, solver, 1e-4, 1) for solver in (0, 1)]
    assert auto.form({"maps": torch.zeros(1, 1, 2, 2)}) == ""


@pytest.mark.native
def test_only_ours():
    assert [row["way"] for row in rows_of(tiny(SHORT), ours=True)] == ["ours"]


@pytest.mark.native
def test_what_cannot_be_recorded_is_timed_call_by_call():
    (row,) = rows_of(tiny(SHORT), StandIn(graphs=None), ours=True)
    assert (row["status"], row["timing"]) == ("ok", "events") and row["median_ms"] > 0


@pytest.mark.native
def test_a_graph_that_writes_nothing_gets_no_number():
    (row,) = rows_of(tiny(SHORT), StandIn(graphs="broken"), ours=True)
    assert row["status"].startswith("wrong: in a graph") and row["median_ms"] is None


@pytest.mark.native
def test_wrong_and_failing_ways_get_no_number():
    case = tiny(SHORT)
    ours, other = case.ways
    wrong = replace(ours, name="wrong", prepare=lambda i: lambda: torch.zeros(16, 34, 7, 9))

    def out_of_memory():
        raise RuntimeError("out of memory\nand more")

    failing = replace(ours, name="failing", prepare=lambda i: out_of_memory)
    rows = rows_of(replace(case, ways=(wrong, failing, other)))
    assert [row["status"] for row in rows] == [
        "wrong: error 1.0e+00, at most 1e-05", "failed: RuntimeError: out of memory", "ok",
    ]  # fmt: skip
    assert [row["median_ms"] is None for row in rows] == [True, True, False]
    found = run.findings(rows, {case.name: case})
    assert "WRONG" in found and "FAILED" in found
    assert "out of memory" in run.gpu_table(rows)


def test_a_way_without_memory_is_left_out():
    case = tiny(SHORT)
    row = measure.new_row(case, replace(case.ways[0], gigabytes=2.0), {}, full=False, gigabytes=1.0)
    assert row["status"] == "left out: needs 2 GB of free memory"


def test_rotation():
    assert measure_gpu.rotation(50, l2_bytes=100, seconds=1e-6) == 4  # 200 bytes pass before the first comes again
    assert measure_gpu.rotation(300, l2_bytes=100, seconds=1e-6) == 1
    assert measure_gpu.rotation(1, l2_bytes=10**6, seconds=0.03) == 3  # no longer than 0.1 s
    assert measure_gpu.rotation(1, l2_bytes=10**6, seconds=9.0) == 1
    assert measure_gpu.rotation(0, l2_bytes=0, seconds=0.0) == 1


@pytest.mark.native
def test_every_copy_has_its_own_place():
    places = []
    case = tiny(SHORT)
    ours = case.ways[0]

    def prepare(inputs):
        places.append(inputs["feats"].data_ptr())
        return ours.prepare(inputs)

    rows_of(replace(case, ways=(replace(ours, prepare=prepare),)))
    assert len(places) > 1 and len(set(places)) == len(places)


def test_batches_repeat_their_images():
    data = {"maps": torch.arange(6.0).view(2, 3), "pairs": [torch.arange(5), torch.tensor(1.0)], "steps": 4}
    grown = repeated(data, 2, 6)
    assert_close(grown["maps"][4], data["maps"][0])
    assert grown["maps"].shape == (6, 3) and grown["pairs"][0].shape == (5,) and grown["steps"] == 4
    assert repeated(data, 2, 2) is data


def test_limit_by_hand():
    gpu = StandIn()
    assert gpu.limit_ms(Work(flop=2e9, bytes=1e8)) == pytest.approx(2.0)  # arithmetic
    assert gpu.limit_ms(Work(flop=2e9, bytes=5e8)) == pytest.approx(5.0)  # memory
    assert gpu.limit_ms(Work(flop=2e9, bytes=1e8, products=3e10)) == pytest.approx(3.0)
    gpu.flops = None
    assert gpu.limit_ms(Work(flop=2e9, bytes=5e8)) is None


def test_work_by_hand():
    pixels = 47 * 63
    (work,) = (way.work for way in CASES["affinity psa 47x63 batch 1"].ways if way.work)
    assert (work.flop, work.bytes) == (3 * 448 * 34 * pixels, 4 * (448 + 34) * pixels)
    power = CASES["walk psa 47x63 batch 1 C=3"].ways[1]
    assert power.name == "ours, power"
    assert power.work == Work(flop=2 * 69 * 256 * 3 * pixels, bytes=4 * (34 + 6) * pixels)
    training = CASES["affinity, forward + backward crop 56x56 batch 8"].ways[0].work
    assert training.bytes == 4 * 8 * 56 * 56 * (3 * 448 + 3 * 34)


@pytest.mark.native
def test_work_of_a_series_is_its_products():
    auto, power = (way.work for way in CASES["walk psa 47x63 batch 1 C=3"].ways[:2])
    assert 0.2 < auto.flop / power.flop < 0.4  # 74 products of 256


def test_transition_matrix_of_a_batch():
    affinity = torch.rand(3, 34, 5, 7, generator=torch.Generator().manual_seed(0))
    affinity *= baselines.shifted_affinity(torch.zeros(3, 1, 5, 7)) > 0
    affinity[affinity < 0.3] = 0
    batch = baselines.torch_transition_csr(affinity, 8.0).to_dense()
    alone = [torch.from_numpy(baselines.transition_matrix(a[None], 8.0).toarray()) for a in affinity]
    assert_close(batch, torch.block_diag(*alone), atol=1e-6, rtol=0)


def test_walk_of_a_batch():
    affinity, maps = baselines.shifted_affinity(sizes.features(replace(TINY, batch=2))), torch.rand(2, 3, 7, 9)
    matrix = baselines.torch_transition_csr(affinity, 8.0)
    planes = baselines.transition_planes(affinity, 8.0)
    walked = baselines.torch_csr_walk(maps, matrix, 9)
    assert walked.is_contiguous()
    assert_close(walked, baselines.shifted_walk(maps, planes, 9), atol=1e-5, rtol=0)


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda", "--only", "walk"]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_rows_of_a_gpu_have_a_file_of_their_own(tmp_path, capsys):
    row = dict.fromkeys(measure.COLUMNS) | StandIn.about
    row |= {"op": "random_walk", "cores": 16, "group": "walk", "case": "walk", "channels": 5, "way": "ours, auto"}
    row |= {"status": "ok", "median_ms": 1.0, "date": "2030-01-01", "height": 7, "width": 9, "threads": 1}
    (path,) = run.write([row], tmp_path)
    assert path.name == "random_walk--nvidia-stand-in-1.jsonl"
    assert plot.newest([row], 5, None) == [] and plot.newest([row], 5, "nvidia-stand-in-1") == [row]
