"""`wsss ablate`: a system with each of its parts switched, and one table of what that costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from wsss_models.cli import sweep
from wsss_models.cli.main import DONE, UsageError
from wsss_models.cli.run_plan import SYSTEMS
from wsss_models.cli.sweep import Scores, lines_of, mean_and_error, paired, scores_of, shown
from wsss_models.systems import system
from wsss_models.train import PRECISIONS

WHOLE = "as it is"  # the variant without a change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("system", metavar="SYSTEM", help=", ".join(SYSTEMS))
    add("--data", type=Path, required=True, metavar="DIR", help="of wsss run: a set with masks, of both splits")
    add("--out", type=Path, required=True, metavar="DIR", help="one run a variant and seed; the same command goes on")
    add("--preset", default="published", metavar="NAME", help="of the system: published (the default), tiny, ...")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="of everything random (0)",
    )
    add(
        "--only",
        nargs="+",
        metavar="VARIANT",
        help="of the system's variants; default: all",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:SETTING [SETTING]",
        help="another one, such as 'short walk:affinity.steps=4'",
    )
    add("--set", action="append", default=[], metavar="[STAGE.]NAME=VALUE", help="of all variants, as for wsss run")
    add("--segmentation", action="store_true", help="up to the segmentation network; default: to the pseudo-labels")
    add("--weights", type=Path, metavar="FILE", help="public weights of the system's backbone")
    add("--precision", default="32-true", choices=PRECISIONS, help="of the arithmetic in training (32-true)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")


def run(arguments: argparse.Namespace) -> int:
    variants = _that_differ(arguments, _variants(arguments))
    scores: dict[str, dict[int, Scores]] = {name: {} for name in variants}
    for seed in arguments.seeds:
        folders = {name: _folder(arguments, name, seed) for name in variants}
        for name, settings in variants.items():
            print(f"=== {name}, seed {seed}: {' '.join(settings) or 'no change'}", flush=True)
            words = _words(arguments, settings, seed)
            scores[name][seed] = scores_of(folders[name], words, list(folders.values()))
    print("\n".join(_table(variants, scores)))
    return DONE


def _words(arguments: argparse.Namespace, settings: list[str], seed: int) -> list[str]:
    """Of `wsss run`."""
    return [
        arguments.system,
        f"--data={arguments.data}",
        f"--preset={arguments.preset}",
        f"--seed={seed}",
        f"--device={arguments.device}",
        f"--workers={arguments.workers}",
        f"--precision={arguments.precision}",
        *(f"--set={setting}" for setting in (*arguments.set, *settings)),
        *([] if arguments.segmentation else ["--until=labels"]),
        *([] if arguments.weights is None else [f"--weights={arguments.weights}"]),
    ]


def _that_differ(arguments: argparse.Namespace, variants: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without those that change nothing; what `wsss run` would refuse is refused before anything is trained."""
    seed = arguments.seeds[0]
    configs = {n: sweep.configs(_folder(arguments, n, seed), _words(arguments, s, seed)) for n, s in variants.items()}
    for stages in configs.values() if not arguments.segmentation else ():
        stages.pop("deeplab")
    same = [name for name in variants if name != WHOLE and configs[name] == configs[WHOLE]]
    if len(same) == len(variants) - 1:
        raise UsageError(f"nothing to compare: {', '.join(same)} changes nothing of these settings")
    for name in same:
        print(f"=== {name}: changes nothing of these settings", flush=True)
    return {name: settings for name, settings in variants.items() if name not in same}


def _folder(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(arguments.out) / f"{_slug(name)}-seed{seed}"


def _variants(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> settings, the unchanged system first."""
    if arguments.system not in SYSTEMS:
        raise UsageError(f"system must be one of {', '.join(SYSTEMS)}, got {arguments.system!r}")
    known: dict[str, list[str]] = {WHOLE: []}
    known |= getattr(system(arguments.system), "ABLATIONS", {})
    chosen = list(known) if arguments.only is None else [WHOLE, *(name for name in arguments.only if name != WHOLE)]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UsageError(f"--only must name variants of {', '.join(known)}, got {unknown[0]!r}")
    variants = {name: known[name] for name in chosen}
    for text in arguments.variant:
        name, colon, settings = text.partition(":")
        if not colon or not name.strip() or "=" not in settings:
            raise UsageError(f"--variant must be NAME:SETTING [SETTING], got {text!r}")
        if name.strip() in variants:
            raise UsageError(f"--variant {name.strip()!r} is there already")
        variants[name.strip()] = settings.split()
    if len(variants) == 1:
        raise UsageError(f"{arguments.system} names no variants: give --variant NAME:SETTING")
    return variants


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _table(variants: dict[str, list[str]], scores: dict[str, dict[int, Scores]]) -> list[str]:
    """A line a variant: the means of its stages, and what the last labels gain or lose by the change."""
    whole = scores[WHOLE]
    stages = list(dict.fromkeys(stage for of_seed in whole.values() for stage in of_seed))
    if not stages:
        raise UsageError("--data must have masks: without them there is nothing to compare")
    head = ["mean IoU %", *stages, f"change of {stages[-1]}"]
    rows = []
    for name in variants:
        of_seed = scores[name].values()
        cells = [shown(*mean_and_error([values[stage] for values in of_seed if stage in values])) for stage in stages]
        change = "" if name == WHOLE else shown(*mean_and_error(paired(scores[name], whole, stages[-1])), sign=True)
        rows.append([name, *cells, change])
    seeds = len(whole)
    note = "one seed" if seeds == 1 else f"{seeds} seeds, mean ± standard error; changes are paired seed by seed"
    return [*lines_of(head, rows), note, *(f"{n}: {' '.join(s)}" for n, s in variants.items() if s)]
