"""`wsss cams`: class activation maps of a set by a trained network."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from wsss_models.cli import over_set
from wsss_models.cli.main import UsageError
from wsss_models.infer import FLIPS, Scales, run_hash, write_cams
from wsss_models.systems import system


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the --out of wsss train", dest="training")
    add("--data", type=Path, required=True, metavar="DIR", help="PASCAL VOC, COCO, or pictures with a labels.csv")
    add("--split", metavar="NAME", help="of the set, or a file with one id a line; default: all pictures")
    add("--out", type=Path, required=True, metavar="DIR", help="one .npz a picture: class_ids, cams; half precision")
    add("--scales", default="1,0.5,1.5,2", metavar="S,S,...", help="of the picture, their maps added up (1,0.5,1.5,2)")
    add("--flip", choices=FLIPS, help="how the flipped picture's maps are merged (sum; vwe: max)")
    more = "sccam: parent or sub; vwe: convolution, words or maximum; default: the training's setting cam"
    add("--branch", metavar="NAME", help=more)
    add("--stride", type=int, default=4, metavar="N", help="of the maps written (4); 1: the picture's size")
    add("--batch", type=int, default=4, metavar="N", help="pictures of one size that go through the network together")
    over_set.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1:
        raise UsageError("--batch must be at least 1")
    work = over_set.work_of(arguments, "cams", "a classifier, got {system}; it labels with wsss segment")
    model, name = work.model, work.manifest["system"]
    try:
        numbers = tuple(float(text) for text in arguments.scales.split(","))
        scales = Scales(numbers, arguments.flip or getattr(system(name), "FLIP", "sum"), arguments.stride)
    except ValueError as error:
        raise UsageError(str(error)) from None
    source = _source(arguments, model, name)

    def write(failed: over_set.Failed, advance: Callable[[], None]) -> tuple[int, int]:
        return write_cams(
            model,
            work.pictures,
            arguments.out,
            scales=scales,
            source=source,
            normalisation=work.manifest["config"]["recipe"]["normalisation"],
            device=work.device,
            batch_size=arguments.batch,
            workers=arguments.workers,
            shard=work.shard,
            failed=failed,
            advance=advance,
        )

    return over_set.write_all(work, arguments.out, "maps", write)


def _source(arguments: argparse.Namespace, model: nn.Module, name: str) -> str:
    """What tells the maps apart from another training's or another branch's; the model gives those of the branch."""
    weights = run_hash(arguments.training)
    if not hasattr(system(name), "branches"):
        if arguments.branch is not None:
            raise UsageError(f"--branch must be left out for {name}, which has one kind of CAMs")
        return weights
    known = system(name).branches(model.config)
    branch = arguments.branch or model.config.cam
    if branch not in known:
        raise UsageError(f"--branch must be one of {', '.join(known)} for these settings, got {branch}")
    model.config = replace(model.config, cam=branch)
    return f"{weights} {branch}"
