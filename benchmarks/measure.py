"""How a case is measured: checked against float64 first, then timed in turns, memory in a fresh process."""

from __future__ import annotations

import ctypes
import datetime
import gc
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

import wsss_kernels as wk
from benchmarks.cases import Case, Inputs, Result, Way, all_cases
from benchmarks.sizes import Size
from wsss_kernels import _dispatch

Row = dict[str, Any]

VISIT = 0.02  # seconds at least that a way runs when its turn comes; its time is the mean of the calls
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "date", "commit", "dirty", "machine", "cores", "isa", "threads", "python", "torch", "numpy", "scipy",
    "wsss_kernels", "op", "group", "case", "size", "batch", "channels", "dim", "height", "width", "way", "kind",
    "status", "error", "median_ms", "min_ms", "visits", "ratio", "ratio_low", "ratio_high", "ratio_to", "gflops",
    "peak_mb", "output_mb", "device", "driver", "cuda", "triton", "peak_tflops", "copy_tbs", "product_tflops", "kernel",
    "timing", "eager_ms", "images_per_s", "launches", "limit_ms", "limit_reached",
)  # fmt: skip


# Where --------------------------------------------------------------------------------------------------------------


def _cpu_model() -> str:
    """Model name with family and model numbers, since several generations share a name under virtual machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (match.group(1).strip() if match else "?" for match in found.values())
    return f"{name} (family {family}, model {model})" if found["model name"] else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment() -> Row:
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or os.environ.get("WSSS_COMMIT"),
        "dirty": None if changes is None else bool(changes),
        "machine": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": getattr(_dispatch.native, "cpu_isa", None),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "wsss_kernels": wk.__version__,
        "device": "cpu",
    }


def machine_slug(row: Row) -> str:
    cores = "" if row.get("device") == "cuda" else f" {row['cores']} cores"
    words = f"{row['machine']}{cores}".lower().replace("family ", "f").replace("model ", "m")
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def available_gigabytes() -> float:
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 2**20  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return math.inf


# Time -----------------------------------------------------------------------------------------------------------------


def _seconds(function: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleave(
    functions: Mapping[str, Callable[[], object]],
    guess: Mapping[str, float],
    rounds: int,
    budget: float,
    seconds: Callable[[Callable[[], object], int], float] = _seconds,
) -> dict[str, list[float]]:
    """Seconds a call, by way and round, NaN where a slow way sat a round out.

    The ways take turns, A B C A B C ..., so that what else the machine does meets all of them. Each may spend `budget`
    seconds: a way too slow for every round takes its turns evenly spread. guess: seconds a call takes, roughly.
    """
    plans = {}
    for name in functions:
        calls = min(20_000, max(1, math.ceil(VISIT / max(guess[name], 1e-7))))
        turns = max(1, min(rounds, int(budget / ((calls + (calls > 1)) * max(guess[name], 1e-7)))))
        plans[name] = (calls, {i * rounds // turns for i in range(turns)})
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, function in functions.items():
                calls, turns_of_way = plans[name]
                if turn not in turns_of_way:
                    times[name].append(math.nan)
                    continue
                if calls > 1:
                    function()  # brings its data back into the caches
                times[name].append(seconds(function, calls))
    finally:
        gc.enable()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    kept = [v for v in values if not math.isnan(v)]
    low, middle, high = np.quantile(kept, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def paired_ratio(times: Sequence[float], against: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of times / against, round by round."""
    return quartiles([a / b for a, b in zip(times, against, strict=True)])


# Memory ---------------------------------------------------------------------------------------------------------------


def _status(key: str) -> float:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024  # type: ignore[union-attr]


def _peak(case: Case, way: Way) -> tuple[float, float]:
    """MiB above the inputs at the highest point, and MiB of the result. What `prepare` builds and keeps counts."""
    way.prepare(case.inputs(case.size.tiny()))()  # loads code and starts threads
    inputs = case.inputs(case.size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    function = way.prepare(inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    result = function()
    peak = _status("VmHWM") - before
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return peak, sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _peak_in_child(connection: Any, name: str, size: Size, way: str, threads: int) -> None:
    torch.set_num_threads(threads)
    case = replace(next(case for case in all_cases() if case.name == name), size=size)
    connection.send(_peak(case, next(w for w in case.ways if w.name == way)))


def peak_memory(case: Case, way: Way, timeout: float = 900) -> tuple[float | None, float | None]:
    """`_peak` in a process of its own, which starts with torch imported and nothing run; None where untold."""
    if not sys.platform.startswith("linux"):
        return None, None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "scipy.sparse"])  # not wsss_kernels: it runs serially in forked processes
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_peak_in_child, args=(sender, case.name, case.size, way.name, torch.get_num_threads())
    )
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else (None, None)
    except EOFError:
        return None, None
    finally:
        if process.is_alive():
            process.join(5)
            process.kill()
        process.join()


# A case ---------------------------------------------------------------------------------------------------------------


def skip_reason(way: Way, full: bool, gigabytes: float | None = None) -> str:
    if way.only_full and not full:
        return "left out: takes minutes (--full)"
    if (available_gigabytes() if gigabytes is None else gigabytes) < way.gigabytes:
        return f"left out: needs {way.gigabytes:.3g} GB of free memory"
    return ""


def new_row(case: Case, way: Way, place: Row, full: bool, gigabytes: float | None = None) -> Row:
    size = case.size
    row: Row = {**dict.fromkeys(COLUMNS), **place}
    row.update(op=case.op, group=case.groups[0], case=case.name, size=size.name, batch=size.batch)
    row.update(channels=case.channels, dim=size.dim, height=size.height, width=size.width)
    row.update(way=way.name, kind=way.kind, status=skip_reason(way, full, gigabytes) or "ok")
    return row


def check(way: Way, function: Callable[[], Result], expected: Result, inputs: Inputs) -> tuple[float, float]:
    """Error against float64, and seconds a call, roughly."""
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    error = way.compare(result, expected, inputs)
    del result
    if seconds < 0.5:  # the first call loads code
        seconds = min(_seconds(function) for _ in range(2))
    return error, seconds


def run_case(
    case: Case, place: Row, *, rounds: int = 15, budget: float = 2.0, full: bool = False, memory: bool = True
) -> list[Row]:
    """One row a way. An "ours" row's ratio is the fastest library way's time over its own (else the fastest published
    one's), another row's ratio its own time over the first of ours: above 1 ours is faster."""
    rows = {way.name: new_row(case, way, place, full) for way in case.ways}
    ways = [way for way in case.ways if rows[way.name]["status"] == "ok"]
    if case.timed:
        times = _run_times(case, ways, rows, rounds, budget)
        compare_ways(case, times, rows)
    if memory:
        for way in ways:
            if rows[way.name]["status"] == "ok" and way.kind != "context":
                rows[way.name]["peak_mb"], rows[way.name]["output_mb"] = peak_memory(case, way)
    return list(rows.values())


def _run_times(case: Case, ways: list[Way], rows: dict[str, Row], rounds: int, budget: float) -> dict[str, list[float]]:
    inputs = case.inputs(case.size)
    expected = case.expected(inputs)
    functions, guess = {}, {}
    for way in ways:
        function = way.prepare(inputs)
        if way.kind == "context":
            function()
            guess[way.name] = _seconds(function)
        else:
            error, guess[way.name] = check(way, function, expected, inputs)
            rows[way.name]["error"] = error
            if not error <= way.tolerance:
                rows[way.name]["status"] = f"wrong: error {error:.1e}, at most {way.tolerance:g}"
                continue
        functions[way.name] = function
    times = interleave(functions, guess, rounds, budget)
    for way in ways:
        if way.name in times:
            note_times(rows[way.name], way, times[way.name])
    return times


def note_times(row: Row, way: Way, times: Sequence[float]) -> None:
    kept = [1e3 * t for t in times if not math.isnan(t)]
    row.update(median_ms=statistics.median(kept), min_ms=min(kept), visits=len(kept))
    row["gflops"] = way.flop / row["median_ms"] / 1e6 if way.flop else None


def compare_ways(case: Case, times: dict[str, list[float]], rows: dict[str, Row]) -> None:
    def of(kind: str) -> list[str]:
        return [way.name for way in case.ways if way.kind == kind and way.name in times]

    rivals = of("library") or of("published")
    opponent = min(rivals, key=lambda name: rows[name]["median_ms"]) if rivals else None
    first = of("ours")[0] if of("ours") else None
    for name in times:
        other = opponent if rows[name]["kind"] == "ours" else first
        if other is None or (rows[name]["kind"] == "context" and case.unit == "us"):
            continue
        pair = (times[other], times[name]) if rows[name]["kind"] == "ours" else (times[name], times[other])
        low, middle, high = paired_ratio(*pair)
        rows[name].update(ratio=middle, ratio_low=low, ratio_high=high, ratio_to=other)


def aim_value(row: Row, column: str) -> float | None:
    if column == "workspace_mb":
        return None if row["peak_mb"] is None else row["peak_mb"] - row["output_mb"]
    return row[column]


# pytest-benchmark -----------------------------------------------------------------------------------------------------


def with_pytest(benchmark: Any, case: Case, way: Way) -> None:
    """The same check, then pytest-benchmark's own timing."""
    inputs = case.inputs(case.size)
    function = way.prepare(inputs)
    benchmark.group = case.name
    if way.kind == "context":
        function()
        seconds = _seconds(function)
    else:
        error, seconds = check(way, function, case.expected(inputs), inputs)
        assert error <= way.tolerance, f"{case.name}, {way.name}: error {error:.1e}, at most {way.tolerance:g}"
        benchmark.extra_info["error"] = error
    calls = max(1, math.ceil(VISIT / max(seconds, 1e-7)))
    benchmark.pedantic(function, rounds=max(1, min(10, int(2 / (calls * seconds)))), iterations=calls)
