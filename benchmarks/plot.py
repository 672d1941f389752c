"""`python -m benchmarks plot`: time and memory of the walk against the size of the map, from benchmarks/results.

python -m benchmarks plot [--out docs/benchmarks.png] [--channels 5] [--machine SLUG] [FILE ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.measure import RESULTS, Row, machine_slug

DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "benchmarks.png"
LINES = {  # way: (label, colour, growth of time and of memory with the number of pixels, where it is extrapolated)
    "dense, published": ("published: dense matrix, 8 squarings", "#b03a2e", (3, 2)),
    "scipy CSR": ("SciPy, CSR products", "#ca8a04", None),
    "torch CSR": ("PyTorch, CSR products", "#2563eb", None),
    "ours, auto": ("wsss_kernels.random_walk", "#15803d", None),
}
PANELS = (("median_ms", "time of one walk (ms)"), ("peak_mb", "memory above the inputs (MB)"))


def newest(rows: list[Row], channels: int, machine: str | None) -> list[Row]:
    """The last row of every way and size, all from one machine and number of threads: those of the newest row."""
    kept = [
        row
        for row in rows
        if row["op"] == "random_walk" and row["group"] == "walk" and row["channels"] == channels
        and row["way"] in LINES and row["status"] == "ok" and row["median_ms"] and "backward" not in row["case"]
        and (row.get("device", "cpu") == "cpu" if machine is None else machine_slug(row) == machine)
    ]  # fmt: skip
    if not kept:
        return []
    kept.sort(key=lambda row: row["date"])
    same = ("machine", "cores", "threads")
    kept = [row for row in kept if all(row[key] == kept[-1][key] for key in same)]
    return list({(row["way"], row["height"], row["width"]): row for row in kept}.values())


def draw(rows: list[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    def pixels(row: Row) -> int:
        return int(row["height"] * row["width"])

    sizes = {pixels(row): f"{row['height']}x{row['width']}" for row in rows}
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4.4), layout="constrained")
    for panel, (axis, (column, title)) in enumerate(zip(axes, PANELS, strict=True)):
        for way, (label, colour, growth) in LINES.items():
            points = sorted((pixels(row), row[column]) for row in rows if row["way"] == way and row[column])
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o-", color=colour, label=label, linewidth=2, markersize=4)
            beyond = [n for n in sorted(sizes) if n > x[-1]]
            if growth and beyond:
                far = [y[-1] * (n / x[-1]) ** growth[panel] for n in beyond]
                power = f"pixels$^{growth[panel]}$"
                axis.plot(
                    [x[-1], *beyond], [y[-1], *far], "--", color=colour, linewidth=1.2,
                    label=f"the same, not run: extrapolated as {power}",
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="map (pixels)", title=title)
        axis.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(sorted(sizes), [sizes[n] for n in sorted(sizes)], rotation=30, ha="right", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8, loc="upper left")
    row = rows[-1]
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    figure.suptitle(f"Random walk of 256 steps, {row['channels']} maps, {threads}, {row['machine']}", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="default: benchmarks/results/random_walk--*"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--channels", type=int, default=5, help="number of maps walked (default 5)")
    parser.add_argument("--machine", help="as in the names of the files (default: that of the newest CPU row)")
    options = parser.parse_args(argv)
    files = options.files or sorted(RESULTS.glob("random_walk--*.jsonl"))
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        print(f"FILE must be a results file, got {', '.join(missing)}", file=sys.stderr)
        return 2
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines() if line.strip()]
    chosen = newest(rows, options.channels, options.machine)
    if not chosen:
        print("no rows to draw; first: python -m benchmarks --only walk --write", file=sys.stderr)
        return 2
    try:
        draw(chosen, options.out)
    except ImportError as error:
        print(f"the plot needs matplotlib ({error}): pip install 'wsss-kernels[bench]'", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
