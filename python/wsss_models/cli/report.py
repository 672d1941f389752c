"""`wsss report`: a run folder, or several, as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import FileError, shown, write_atomically
from wsss_models.report import Gallery, Run, make_gallery, open_pictures, read_runs
from wsss_models.report_page import page
from wsss_models.report_subcategories import SubCategoryGallery, make_sub_category_galleries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder with a results.json; several are compared")
    add("--out", type=Path, metavar="FILE.html", help="default: report.html in the first RUN")
    add("--data", type=Path, metavar="DIR", help="the pictures, where they are not where results.json says")
    add("--split", metavar="NAME", help="of the pictures shown; default: those in the results")
    add("--pictures", type=int, default=24, metavar="N", help="on the page, half the worst, half the best (24)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.pictures < 0:
        raise UsageError(f"--pictures must be at least 0, got {arguments.pictures}")
    out = arguments.out or arguments.runs[0] / "report.html"
    failures: dict[str, None] = {}  # in order, each once
    problems: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = read_runs(arguments.runs)
        galleries = _galleries(arguments, runs, failures, problems)
        sub_categories = _sub_categories(arguments, runs, failures)
    except ValueError as error:
        raise UsageError(str(error)) from None
    finally:
        torch.set_num_threads(threads)
    text = page(runs, galleries, [*problems, *failures], sub_categories).encode("utf-8", "backslashreplace")
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UsageError(f"--out must be a file that can be written ({error})") from None
    problems = [*(line for r in runs for line in r.problems), *problems]
    for line in (*problems, *(f"failed: {line}" for line in failures)):
        print(line)
    print(f"written: {shown(out)} ({len(text) / 1e6:.1f} MB)")
    return SOME_FAILED if failures else DONE


def _galleries(
    arguments: argparse.Namespace, runs: list[Run], failures: dict[str, None], problems: list[str]
) -> list[Gallery]:
    if not arguments.pictures:
        return []
    try:
        sets = open_pictures(runs, arguments.data, arguments.split)
    except FileError as error:
        if arguments.data is not None or arguments.split is not None:
            raise
        problems.append(f"no pictures: {error} (--data says where they are)")
        return []
    shares = [arguments.pictures // len(sets) + (k < arguments.pictures % len(sets)) for k in range(len(sets))]
    with Progress(sum(map(len, sets))) as progress:
        return [
            make_gallery(
                runs,
                pictures,
                share,
                failed=lambda name, reason: failures.setdefault(f"{shown(name)}: {reason}"),
                advance=progress.add,
            )
            for pictures, share in zip(sets, shares, strict=True)
        ]


def _sub_categories(
    arguments: argparse.Namespace, runs: list[Run], failures: dict[str, None]
) -> list[SubCategoryGallery]:
    if not arguments.pictures:
        return []
    return make_sub_category_galleries(
        runs, arguments.data, failed=lambda name, reason: failures.setdefault(f"{shown(name)}: {reason}")
    )
