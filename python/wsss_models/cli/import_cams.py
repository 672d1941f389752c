"""`wsss import`: files of the published code to the files of this one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import npz_settings, remove_stale, shown
from wsss_models.data.files import fingerprint, write_maps
from wsss_models.published import read_published_cams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--cams",
        type=Path,
        required=True,
        metavar="DIR",
        help="pickled .npy files of AffinityNet, SC-CAM, IRNet, Puzzle-CAM, VWE or CLIP-ES; no code of theirs is run",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="one .npz a picture: class_ids, cams; half precision")
    add("--maps", metavar="NAME", help="cam, high_res, hr_cam, rw or attn_highres; default: the finest there are")
    add("--strict", action="store_true", help="stop at the first file that fails instead of finishing the rest")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.cams.is_dir():
        raise UsageError(f"--cams must be a folder, got {shown(arguments.cams)}")
    paths = list(_files(arguments.cams))
    if not paths:
        raise UsageError(f"--cams must hold .npy files, got none in {shown(arguments.cams)}")
    remove_stale(arguments.out)
    written = kept = failures = 0
    warnings: dict[str, int] = {}
    with Progress(len(paths), unit="file") as progress:
        for path in paths:
            target = arguments.out / path.relative_to(arguments.cams).with_suffix(".npz")
            settings = f"import {arguments.maps or 'finest'} {path.stat().st_size} {path.stat().st_mtime_ns}"
            try:
                if npz_settings(target) == settings and fingerprint(target):
                    kept += 1
                    continue
                found = read_published_cams(path, maps=arguments.maps)
                write_maps(target, found.class_ids, found.cams, settings=settings)
                written += 1
                if found.warning:
                    warnings[found.warning] = warnings.get(found.warning, 0) + 1
            except ValueError as error:
                failures += 1
                progress.say(f"failed: {error}")
                if arguments.strict:
                    break
            except OSError as error:
                raise UsageError(f"--out must be a folder that can be written to ({error})") from None
            finally:
                progress.add()
    for warning, count in warnings.items():
        print(f"{count} files hold {warning}")
    already = f", {kept} already done" if kept else ""
    print(f"{written} written{already}, {failures} failed; maps in {shown(arguments.out)}")
    return SOME_FAILED if failures else DONE


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.npy")):
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            yield path
