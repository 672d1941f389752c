"""`wsss cams`: class activation maps of a set by a trained network."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.pictures import torch_device
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import shown
from wsss_models.data.dataset import open_dataset
from wsss_models.data.folder import parse_shard
from wsss_models.infer import FLIPS, Scales, load_run, run_hash, write_cams
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="cpu|cuda")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    add("--shard", metavar="i/n", help="take every n-th picture from the i-th on; default: torchrun's, or 0/1")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1 or arguments.workers < 0:
        raise UsageError("--batch must be at least 1 and --workers at least 0")
    device = torch_device(arguments.device)
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        numbers = tuple(float(text) for text in arguments.scales.split(","))
        shard = parse_shard(arguments.shard or f"{rank}/{processes}")
        model, manifest = load_run(arguments.training)
        flip = arguments.flip or getattr(system(manifest["system"]), "FLIP", "sum")
        scales = Scales(numbers, flip, arguments.stride)
        source = _source(arguments, model, manifest["system"])
        pictures = open_dataset(arguments.data, arguments.split)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not hasattr(model, "cams"):
        raise UsageError(f"--run must be of a classifier, got {manifest['system']}; it labels with wsss segment")
    if list(pictures.classes) != manifest.get("classes", list(pictures.classes)):
        raise UsageError(f"--data must have the classes of --run, {manifest['classes']}, got {list(pictures.classes)}")
    failures = 0
    began = time.monotonic()
    with Progress(len(range(shard[0], len(pictures), shard[1]))) as progress:

        def failed(name: str, reason: str) -> None:
            nonlocal failures
            failures += 1
            progress.add()
            progress.say(f"failed: {shown(name)}: {reason}")

        try:
            written, kept = write_cams(
                model,
                pictures,
                arguments.out,
                scales=scales,
                source=source,
                normalisation=manifest["config"]["recipe"]["normalisation"],
                device=device,
                batch_size=arguments.batch,
                workers=arguments.workers,
                shard=shard,
                failed=failed,
                advance=progress.add,
            )
        except OSError as error:
            raise UsageError(f"--out must be a folder that can be written to ({error})") from None
    already = f", {kept} already done" if kept else ""
    seconds = time.monotonic() - began
    print(f"{written} written{already}, {failures} failed in {seconds:.1f} s; maps in {shown(arguments.out)}")
    return SOME_FAILED if failures else DONE


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
