"""`python -m benchmarks`: the table of speed and memory, each way checked against float64 before it is timed.

python -m benchmarks [--quick | --full] [--only walk affinity boundary crf attention vote refine memory overhead]
                     [--threads N] [--write]
python -m benchmarks --device cuda [--only walk affinity refine overhead compile] [--ours] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure_gpu
from benchmarks.cases import Aim, Case, all_cases
from benchmarks.device import Gpu
from benchmarks.measure import COLUMNS, RESULTS, Row, aim_value, environment, machine_slug, run_case

# compile: on a GPU
GROUPS = (
    "walk",
    "affinity",
    "boundary",
    "adaptive",
    "crf",
    "attention",
    "memory-attention",
    "vote",
    "loss",
    "kmeans",
    "histogram",
    "pyramid",
    "refine",
    "memory",
    "overhead",
    "compile",
)
IMPORT = "import time, torch; start = time.perf_counter(); import wsss_kernels; print(time.perf_counter() - start)"


def select(cases: list[Case], only: list[str], *, quick: bool, full: bool) -> list[Case]:
    chosen = [case for case in cases if set(case.groups) & set(only)]
    return [case for case in chosen if (case.quick or not quick) and (full or not case.only_full)]


def import_row(place: Row, repeats: int = 5) -> Row:
    """What importing wsss_kernels takes when torch is imported already, each time in a new process."""
    times = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        times.append(1e3 * float(done.stdout))
    row: Row = {**dict.fromkeys(COLUMNS), **place}
    row.update(op="import", group="overhead", case="import wsss_kernels after torch", way="ours", kind="ours")
    row.update(status="ok", median_ms=statistics.median(times), min_ms=min(times), visits=repeats)
    return row


def shown(value: float | None, unit: float = 1.0) -> str:
    """Three figures."""
    if value is None:
        return ""
    value *= unit
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def table(rows: list[Row], cases: dict[str, Case]) -> str:
    """Markdown, a section a group."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [f"\n### {group}\n"]
        lines += ["| case | way | median | min | ours is faster by | (quartiles) | GFLOP/s | peak MB | error |"]
        lines += ["|---|---|---:|---:|---:|---|---:|---:|---:|"]
        previous = None
        for row in (row for row in rows if row["group"] == group):
            case = cases.get(row["case"])
            unit, scale = ("us", 1e3) if case is not None and case.unit == "us" else ("ms", 1.0)
            name, previous = row["case"] if row["case"] != previous else "", row["case"]
            if row["status"] != "ok":
                lines.append(f"| {name} | {row['way']} | {row['status']} | | | | | | |")
                continue
            times = [f"{shown(row[key], scale)} {unit}" if row[key] else "" for key in ("median_ms", "min_ms")]
            ratio, spread = "", ""
            if row["ratio"]:
                mark = "**" if row["ratio"] < 1 else ""
                ratio = f"{mark}{shown(row['ratio'])}x{mark}" + (f" {row['ratio_to']}" if row["kind"] == "ours" else "")
                spread = f"{shown(row['ratio_low'])} to {shown(row['ratio_high'])}"
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            cells = [name, row["way"], *times, ratio, spread, shown(row["gflops"]), shown(row["peak_mb"]), error]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_table(rows: list[Row]) -> str:
    """Markdown, a section a group."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [f"\n### {group}\n"]
        lines += ["| case | way | ms | min | eager | images/s | ours is faster by | launches | of the limit | error |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        previous = None
        for row in (row for row in rows if row["group"] == group):
            name, previous = row["case"] if row["case"] != previous else "", row["case"]
            way = f"{row['way']} ({row['kernel']})" if row["kernel"] else row["way"]
            if row["status"] != "ok":
                lines.append(f"| {name} | {way} | {row['status']} | | | | | | | |")
                continue
            ms = shown(row["median_ms"]) + ("" if row["timing"] == "graph" else " (no graph)")
            ratio = "" if row["ratio"] is None else f"{shown(row['ratio'])}x"
            limit = "" if row["limit_reached"] is None else f"{100 * row['limit_reached']:.0f} %"
            cells = [name, way, ms, shown(row["min_ms"]), shown(row["eager_ms"]), shown(row["images_per_s"])]
            cells += [ratio, str(row["launches"] or ""), limit, "" if row["error"] is None else f"{row['error']:.0e}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _met(aim: Aim, value: float) -> bool:
    return aim.least <= value <= aim.most


def findings(rows: list[Row], cases: dict[str, Case]) -> str:
    """What is wrong, what was lost to somebody else's way, and how the aims stand."""
    lines = []
    for row in rows:
        if row["status"].startswith(("wrong", "failed")):
            lines.append(f"- {row['status'].partition(':')[0].upper()}: {row['case']}, {row['way']}: {row['status']}")
        elif row["ratio"] and row["ratio"] < 1 and row["kind"] != "context":
            lines.append(f"- LOST: {row['case']}, {row['way']}: {shown(row['ratio'])}x against {row['ratio_to']}")
    by_name = {(row["case"], row["way"]): row for row in rows}
    for case in cases.values():
        for aim in case.aims:
            found = by_name.get((case.name, aim.way))
            value = aim_value(found, aim.column) if found else None
            if value is not None:
                bound = f">= {aim.least:g}" if aim.most == float("inf") else f"<= {aim.most:g}"
                word = "met" if _met(aim, value) else "MISSED"
                lines.append(f"- aim {word}: {case.name}, {aim.way}: {aim.column} {shown(value)}, {bound} wanted")
    return "\n".join(lines)


def write(rows: list[Row], folder: Path = RESULTS) -> list[Path]:
    """Appends to <op>--<machine>.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{row['op']}--{machine_slug(row)}.jsonl" for row in rows]
    for path, row in zip(paths, rows, strict=True):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return list(dict.fromkeys(paths))


def heading(place: Row) -> str:
    versions = (
        f"wsss_kernels {place['wsss_kernels']} ({place['commit']}{', changed' if place['dirty'] else ''}), torch "
        f"{place['torch']}, numpy {place['numpy']}, scipy {place['scipy']}, Python {place['python']}; {place['date']}"
    )
    if place["device"] == "cpu":
        return f"{place['machine']}, {place['cores']} cores, {place['isa']}, {place['threads']} threads; {versions}"
    return (
        f"{place['machine']}, driver {place['driver']}, CUDA {place['cuda']}, Triton {place['triton']}; limits: "
        f"{shown(place['peak_tflops'])} TFLOP/s in float32, {shown(place['product_tflops'])} in products, "
        f"{shown(place['copy_tbs'])} TB/s copied; {versions}"
    )


def _groups(text: list[str]) -> list[str]:
    return [word for part in text for word in part.split(",") if word]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a few cases, under a minute")
    extent.add_argument("--full", action="store_true", help="also the cases that take minutes each")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the cases of a GPU")
    parser.add_argument("--ours", action="store_true", help="with --device cuda: nobody else's ways")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, help="turns every way gets (default 15, quick 5)")
    parser.add_argument(
        "--write", action=argparse.BooleanOptionalAction, default=False, help=f"append to {RESULTS.name}/"
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="... or to this folder")
    options = parser.parse_args(argv)
    only = _groups(options.only)
    if not set(only) <= set(GROUPS):
        parser.error(f"--only must name some of {', '.join(GROUPS)}, got {' '.join(options.only)}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be a whole number >= 1, got {options.threads}")
        torch.set_num_threads(options.threads)

    os.environ.setdefault("WSSS_REQUIRE_NATIVE", "1")  # nothing is timed that fell back to the reference
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here; `python -m wsss_kernels` says why", file=sys.stderr)
        return 1
    gpu = Gpu() if on_gpu else None
    place = environment() | (gpu.about if gpu else {})
    cases = {
        case.name: case for case in select(all_cases(options.device), only, quick=options.quick, full=options.full)
    }
    rounds = options.rounds or (5 if options.quick else 7 if on_gpu else 15)
    budget = 0.3 if on_gpu else 0.6 if options.quick else 2.0
    rows: list[Row] = []
    written: list[Path] = []
    for number, case in enumerate(cases.values(), 1):
        start = time.perf_counter()
        print(f"[{number}/{len(cases)}] {case.name}", end="", file=sys.stderr, flush=True)
        if gpu:
            new = measure_gpu.run_case(
                case, place, gpu, rounds=rounds, budget=budget, full=options.full, ours=options.ours
            )
        else:
            new = run_case(case, place, rounds=rounds, budget=budget, full=options.full, memory=case.unit != "us")
        rows += new
        written += write(new, options.folder) if options.write else []  # at once: what comes later may be interrupted
        print(f": {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if "overhead" in only and not on_gpu:
        rows.append(import_row(place))
        written += write(rows[-1:], options.folder) if options.write else []
    rows.sort(key=lambda row: GROUPS.index(row["group"]))

    print(heading(place))
    print(gpu_table(rows) if on_gpu else table(rows, cases))
    found = findings(rows, cases)
    if found:
        print(f"\n### findings\n\n{found}")
    if written:
        print("\nwritten:", *dict.fromkeys(path.name for path in written))
    ours = [row for row in rows if row["kind"] == "ours"]
    wrong = any(row["status"].startswith("wrong") for row in rows)
    return 1 if wrong or any(row["status"].startswith("failed") for row in ours) else 0


if __name__ == "__main__":
    raise SystemExit(main())
