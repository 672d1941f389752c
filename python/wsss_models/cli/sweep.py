"""Several runs of `wsss run` beside each other, each trained once: what they share is copied, what is done is kept."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsss_models.cli import run as one_run
from wsss_models.cli.main import DONE, UsageError
from wsss_models.cli.run_plan import classifier_of, configs_of, open_splits, plan_of, read_plan

Scores = dict[str, float]  # stage -> mean IoU in percent


def scores_of(out: Path, words: Sequence[str], siblings: Sequence[Path]) -> Scores:
    """Run `wsss run WORDS --out OUT` to its end, or go on with it, and read its results.

    Args:
        out: folder of the run.
        words: system and options, without --out.
        siblings: folders of other runs; classifier and CAMs are copied from the first whose are the same.

    Returns:
        dict[str, float]: stage -> mean IoU in percent; stages without masks are left out.

    Raises:
        UsageError: arguments that `wsss run` refuses, or pictures that failed.
    """
    arguments = _parse(out, words)
    if arguments.classifier is None:
        arguments.classifier = _same_classifier(arguments, siblings)
    if one_run.run(arguments) != DONE:
        raise UsageError(f"wsss run {' '.join(words)}: some pictures failed")
    record = json.loads((out / one_run.RESULTS).read_text(encoding="utf-8"))
    return {row["stage"]: 100 * row["miou"] for row in record["rows"] if row["miou"] is not None}


def configs(out: Path, words: Sequence[str]) -> dict[str, object]:
    """What `wsss run WORDS --out OUT` would train: stage -> settings.

    Raises:
        UsageError: arguments that `wsss run` refuses.
    """
    arguments = _parse(out, words)
    try:
        return configs_of(plan_of(arguments, *open_splits(arguments)))
    except ValueError as error:
        raise UsageError(str(error)) from None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (of one value: NaN)."""
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def paired(scores: Mapping[int, Scores], against: Mapping[int, Scores], stage: str) -> list[float]:
    """Differences of a stage, seed by seed; seeds that one of them has not got are left out."""
    return [
        values[stage] - against[seed][stage]
        for seed, values in scores.items()
        if seed in against and stage in values and stage in against[seed]
    ]


def shown(mean: float, error: float, *, sign: bool = False) -> str:
    if math.isnan(mean):
        return "-"
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return text if math.isnan(error) else f"{text} ± {error:.1f}"


def lines_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]


def _parse(out: Path, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="wsss run")
    one_run.add_arguments(parser)
    return parser.parse_args([*words, f"--out={out}"])


def _same_classifier(arguments: argparse.Namespace, siblings: Sequence[Path]) -> Path | None:
    wanted = classifier_of(plan_of(arguments, *open_splits(arguments)))
    for folder in siblings:
        try:
            plan, seconds = read_plan(folder)
        except UsageError:
            continue  # not begun
        if "cams" in seconds and classifier_of(plan) == wanted:
            return folder
    return None
