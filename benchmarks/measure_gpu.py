"""How a case is measured on a GPU: checked against float64 first, then timed in turns on data the caches have lost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.cases import Case, Inputs, Result, Way
from benchmarks.device import Gpu, bytes_of, clone, moved, repeated
from benchmarks.measure import VISIT, Row, compare_ways, interleave, new_row, note_times
from wsss_kernels.info import info

DISTINCT = 8  # images of a batch; the others repeat them, and all are checked
PREPARING = 1.0  # seconds: a way that prepares slowly gets fewer copies of its data, to its advantage
RECORDED = 0.1  # seconds at most that one replay of a graph takes
COUNTED = 5e-3  # seconds of a call up to which its launches are counted


@dataclass(frozen=True)
class Turn:
    """What runs when a way's turn comes: `calls` calls, each on data of its own."""

    run: Callable[[], object]
    calls: int
    timing: str  # "graph": recorded once and replayed; "events": launched call by call


def kernels_of(op: str) -> str:
    """The kernels behind an op on the GPU; those of every op for what is composed of them."""
    rows = info()["ops"]
    chosen = [rows[op]] if op in rows else rows.values()
    return "/".join(sorted({str(row["cuda"]["forward"]["kernel"]) for row in chosen}))


def rotation(size: int, l2_bytes: int, seconds: float) -> int:
    """How many copies of data of `size` bytes take turns, so that twice the L2 passes before one comes again."""
    wanted = math.ceil(2 * l2_bytes / max(size, 1))
    return max(1, min(wanted, 1024, int(RECORDED / max(seconds, 1e-7))))


def data_of(case: Case, gpu: Gpu) -> tuple[Inputs, Result]:
    """Inputs and the float64 result, both on the GPU."""
    images = math.gcd(case.size.batch, DISTINCT) if case.by_image else case.size.batch
    inputs = moved(case.inputs(replace(case.size, batch=images)), gpu.device)
    expected = case.expected(inputs)
    return repeated(inputs, images, case.size.batch), repeated(expected, images, case.size.batch)


def run_case(
    case: Case, place: Row, gpu: Gpu, *, rounds: int = 7, budget: float = 0.3, full: bool = False, ours: bool = False
) -> list[Row]:
    """One row a way, as in `measure.run_case`; a way that fails says so in its row. ours: no other ways."""
    ways = [way for way in case.ways if way.kind == "ours" or not ours]
    rows = {way.name: new_row(case, way, place, full, gpu.free_gigabytes()) for way in ways}
    inputs, expected = data_of(case, gpu)
    turns: dict[str, Turn] = {}
    for way in ways:
        row = rows[way.name]
        if row["status"] != "ok":
            continue
        row["kernel"] = kernels_of(case.op) if way.kind == "ours" else None
        try:
            if way.form is not None and (form := way.form(inputs)):
                row["kernel"] = f"{row['kernel']}, {form}"
            turn = _prepare(way, inputs, expected, gpu, row)
        except Exception as error:
            row["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        else:
            if turn is not None:
                turns[way.name] = turn
    guess = {name: gpu.seconds(turn.run) for name, turn in turns.items()}
    times = interleave({name: turn.run for name, turn in turns.items()}, guess, rounds, budget, gpu.seconds)
    times = {name: [t / turns[name].calls for t in column] for name, column in times.items()}
    for way in ways:
        if way.name in times:
            _note(rows[way.name], way, times[way.name], turns[way.name], gpu)
    compare_ways(replace(case, ways=tuple(ways)), times, rows)
    return list(rows.values())


def _prepare(way: Way, inputs: Inputs, expected: Result, gpu: Gpu, row: Row) -> Turn | None:
    """None where the result is wrong; the row says so."""
    function = way.prepare(inputs)
    if not _right(way, function(), expected, inputs, row):
        return None
    seconds = gpu.seconds(function)
    row["launches"] = gpu.launches(function) if seconds < COUNTED else None
    row["peak_mb"] = gpu.peak_mb(function)
    row["output_mb"] = bytes_of(function()) / 2**20

    functions, start = [function], time.perf_counter()
    for _ in range(rotation(bytes_of(inputs), gpu.l2_bytes, seconds) - 1):
        if time.perf_counter() - start > PREPARING:
            break
        functions.append(way.prepare(clone(inputs)))

    def one_by_one() -> None:
        for function in functions:
            function()

    one_by_one()
    runs = max(1, int(VISIT / max(seconds * len(functions), 1e-7)))
    row["eager_ms"] = 1e3 * statistics.median(gpu.seconds(one_by_one, runs) for _ in range(3)) / len(functions)
    recorded = gpu.record(functions)
    if recorded is None:
        return Turn(one_by_one, len(functions), "events")
    replay, result = recorded
    poison(result)
    replay()
    if not _right(way, result, expected, inputs, row, "in a graph, "):
        return None
    return Turn(replay, len(functions), "graph")


def poison(result: Result) -> None:
    """What nobody writes again is NaN."""
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(math.nan)


def _right(way: Way, result: Result, expected: Result, inputs: Inputs, row: Row, where: str = "") -> bool:
    if way.kind == "context":
        return True
    row["error"] = way.compare(result, expected, inputs)
    if row["error"] <= way.tolerance:
        return True
    row["status"] = f"wrong: {where}error {row['error']:.1e}, at most {way.tolerance:g}"
    return False


def _note(row: Row, way: Way, times: list[float], turn: Turn, gpu: Gpu) -> None:
    note_times(row, way, times)
    row["timing"] = turn.timing
    row["images_per_s"] = 1e3 * row["batch"] / row["median_ms"]
    if way.work is not None and (limit := gpu.limit_ms(way.work)) is not None:
        row["limit_ms"], row["limit_reached"] = limit, limit / row["median_ms"]
