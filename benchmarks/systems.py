"""How good the systems are: every stage of each, trained on generated sets, seed by seed beside the plain classifier.

    python -m benchmarks systems --out DIR [--systems classifier affinitynet irnet:image ...] [--seeds 0 1 2] [--write]
                                 [--data-args "--images 300 --classes 4"] [--preset tiny] [--set NAME=VALUE]

For each seed `wsss data synth` makes a set of its own, and `wsss run` trains each system on it with that seed; the same
command goes on where an interrupted one stopped. SYSTEM:REFINER is the system with another refiner than its own (for
`classifier` the walk on the picture's colours). Systems with the same classifier share its weights and CAMs, so that
what differs between them is what came after. Rows: mean IoU in percent of CAMs (at the best threshold of the set, which
needs the masks, and label-free), of the refined maps, of the pseudo-labels, and of the segmentation network on other
pictures, with and without the CRF; `ceiling` is that network trained on the masks (with --ceiling, once a seed);
minutes: of all stages, each counted where it ran. The last lines are each system minus the plain classifier without a
refiner, whose CAMs are the labels as they are: the mean of the seeds' differences, and its standard error.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from wsss_models.cli import data as data_command
from wsss_models.cli.main import DONE, UsageError
from wsss_models.cli.run import RESULTS as RUN_RESULTS
from wsss_models.cli.run_plan import SYSTEMS, stage_of
from wsss_models.cli.sweep import Scores, configs, lines_of, mean_and_error, paired, scores_of, shown

from benchmarks.measure import RESULTS, Row, environment
from benchmarks.run import heading, write

BASELINE = "classifier:none"
DATA = "--images 300 --classes 4"
STAGES = ("CAM best", "CAM free", "refined best", "refined free", "refined", "labels", "deeplab", "deeplab+CRF")
MINUTES = "minutes"


def make_set(folder: Path, words: list[str], seed: int) -> None:
    parser = argparse.ArgumentParser(prog="wsss data")
    data_command.add_arguments(parser)
    if data_command.run(parser.parse_args(["synth", f"{folder}", *words, f"--seed={seed}"])) != DONE:
        raise UsageError(f"wsss data synth {' '.join(words)} failed")


def named(word: str) -> str:
    """SYSTEM or SYSTEM:REFINER, as argparse reads it."""
    if word.partition(":")[0] not in SYSTEMS:
        raise argparse.ArgumentTypeError(f"must be SYSTEM or SYSTEM:REFINER, SYSTEM one of {', '.join(SYSTEMS)}")
    return word


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(':', '-').replace(',', '-')}-seed{seed}"


def words_of(name: str, seed: int, data: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """Of `wsss run`, with the settings of the stages that the system has."""
    system, _, refiner = name.partition(":")
    words = [system, f"--data={data}", f"--preset={options.preset}", f"--seed={seed}", f"--until={options.until}"]
    words += [f"--device={options.device}", f"--workers={options.workers}", f"--precision={options.precision}"]
    words += [f"--refiner={refiner}"] if refiner else []
    words += ["--ceiling"] if options.ceiling and name == BASELINE else []
    stages = configs(folder, words)
    return [*words, *(f"--set={setting}" for setting in options.set if stage_of(setting) in (None, *stages))]


def minutes_of(folder: Path) -> float:
    """Of the stages that ran in this folder; those that were copied from another run took none here."""
    stages: dict[str, float] = json.loads((folder / RUN_RESULTS).read_text(encoding="utf-8"))["stages"]
    return sum(stages.values()) / 60


def rows_of(name: str, seed: int, scores: Scores, baseline: Scores, options: argparse.Namespace) -> list[Row]:
    """A row a stage, with the baseline's on the same set."""
    shared = {"op": "systems", "system": name, "seed": seed, "preset": options.preset, "data": options.data_args}
    shared[MINUTES] = minutes_of(folder_of(options.out, name, seed))
    shared["precision"] = options.precision
    shared["settings"] = " ".join(options.set)
    return [{**shared, "stage": s, "miou": v, "baseline": baseline.get(s)} for s, v in scores.items()]


def table(scores: dict[str, dict[int, Scores]], out: Path) -> list[str]:
    """A line a system and seed, a line a system, and the paired differences."""
    found = {stage for of_system in scores.values() for values in of_system.values() for stage in values}
    stages = [stage for stage in (*STAGES, *sorted(found - {*STAGES})) if stage in found]
    rows = [
        [
            f"{name}, seed {seed}",
            *(shown(*mean_and_error([values[s]] if s in values else [])) for s in stages),
            f"{minutes_of(folder_of(out, name, seed)):.1f}",
        ]
        for name, of_system in scores.items()
        for seed, values in of_system.items()
    ]
    for name, of_system in scores.items():
        if len(of_system) > 1:
            means = [mean_and_error([v[s] for v in of_system.values() if s in v]) for s in stages]
            minutes = mean_and_error([minutes_of(folder_of(out, name, seed)) for seed in of_system])
            rows.append([f"{name}, mean of {len(of_system)}", *(shown(*each) for each in (*means, minutes))])
    for name, of_system in scores.items():
        if name != BASELINE:
            changes = [mean_and_error(paired(of_system, scores[BASELINE], s)) for s in stages]
            rows.append([f"{name} - {BASELINE}", *(shown(*each, sign=True) for each in changes), ""])
    return lines_of(["mean IoU %", *stages, MINUTES], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks systems", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="sets and runs; the same command goes on"
    )
    parser.add_argument(
        "--systems", nargs="+", type=named, default=list(SYSTEMS), metavar="SYSTEM[:REFINER]", help="default: all"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of set and training (0 1 2)"
    )
    parser.add_argument("--data-args", default=DATA, metavar="WORDS", help=f'of wsss data synth ("{DATA}")')
    parser.add_argument("--preset", default="tiny", metavar="NAME", help="of each system (tiny)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="[STAGE.]NAME=VALUE", help="of every run that has the stage"
    )
    parser.add_argument("--precision", default="32-true", help="of the arithmetic in training (32-true)")
    parser.add_argument("--until", default="deeplab", choices=("labels", "deeplab"), help="labels: no segmentation")
    parser.add_argument("--ceiling", action="store_true", help="also the segmentation network trained on the masks")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}/")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="... or to this folder")
    options = parser.parse_args(argv)

    systems = [BASELINE, *(name for name in options.systems if name != BASELINE)]
    scores: dict[str, dict[int, Scores]] = {name: {} for name in systems}
    rows: list[Row] = []
    try:
        for seed in options.seeds:
            data = options.out / f"set-seed{seed}"
            make_set(data, shlex.split(options.data_args), seed)
            folders = {name: folder_of(options.out, name, seed) for name in systems}
            commands = {name: words_of(name, seed, data, folders[name], options) for name in systems}
            unused = [s for s in options.set if not any(f"--set={s}" in words for words in commands.values())]
            if unused:
                raise UsageError(f"--set {unused[0]}: none of these systems has a stage {stage_of(unused[0])}")
            for name, words in commands.items():
                print(f"=== {name}, seed {seed}", flush=True)
                scores[name][seed] = scores_of(folders[name], words, list(folders.values()))
                rows += rows_of(name, seed, scores[name][seed], scores[BASELINE][seed], options)
    except UsageError as error:
        print(f"python -m benchmarks systems: error: {error}", file=sys.stderr)
        return 2
    place = environment()
    print(f"{heading(place)}; sets: wsss data synth {options.data_args}, preset {options.preset}")
    print("\n".join(table(scores, options.out)))
    if options.write:
        written = write([{**place, **row} for row in rows], options.folder)
        print("written:", *(path.name for path in written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
