"""`wsss train`: a system, a set of pictures, a folder of checkpoints."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wsss_models.backbones import load_model, read_weights
from wsss_models.cli.main import DONE, UsageError
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import npz_settings, shown
from wsss_models.data.dataset import list_splits, open_dataset
from wsss_models.data.pictures import PictureSet
from wsss_models.subcategories import (
    SUB_CATEGORIES,
    Found,
    read_sub_categories,
    sub_category_settings,
    write_sub_categories,
)
from wsss_models.systems import SYSTEMS, preset, system, with_settings
from wsss_models.train import PRECISIONS, data_hash, train
from wsss_models.training_data import (
    labels_hash,
    needs_affinity_labels,
    needs_masks,
    needs_sub_labels,
    samples_of,
    takes_saliency,
    write_training_labels,
)

_LABELS = {"affinitynet": "affinity", "irnet": "confident"}  # how the labels of each are made from CAMs
MASKS = "masks"  # --labels of a system that trains on label pictures: the set's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("system", metavar="SYSTEM", help=", ".join(SYSTEMS))
    add("--data", type=Path, required=True, metavar="DIR", help="PASCAL VOC, COCO, or pictures with a labels.csv")
    add("--split", metavar="NAME", help="of the set, or a file with one id a line; default: train where there is one")
    add("--out", type=Path, required=True, metavar="DIR", help="checkpoint, manifest, log")
    add("--preset", default="published", metavar="NAME", help="published (the default), tiny, ...")
    add(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another setting, such as epochs=3 or crop=321"
    )
    add("--weights", type=Path, metavar="FILE", help="start from public weights, or from a checkpoint.pt")
    add("--cams", type=Path, metavar="DIR", help="of wsss cams: labels for affinitynet and irnet are made from them")
    add(
        "--labels",
        type=Path,
        metavar="DIR",
        help="such labels (PNG, 255 = not sure) made elsewhere; deeplab: pseudo-labels, or masks: the set's own",
    )
    add(
        "--previous",
        type=Path,
        metavar="DIR",
        help="sccam: the --out of the round before (of a classifier for the first), whose features are clustered",
    )
    add("--saliency", type=Path, metavar="DIR", help="mcic: saliency maps, one grey PNG a picture (0..255)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, where there is one")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    add("--precision", default="32-true", choices=PRECISIONS, help="of the arithmetic (32-true)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    add("--checkpoint-steps", type=int, metavar="N", help="a checkpoint every N steps, too, beside every epoch's")


def run(arguments: argparse.Namespace) -> int:
    if arguments.seed < 0 or arguments.workers < 0:
        raise UsageError("--seed and --workers must be at least 0")
    try:
        return _run(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError(str(error)) from None


def _run(arguments: argparse.Namespace) -> int:
    module = system(arguments.system)
    pictures = _pictures(arguments)
    config = replace(preset(arguments.system, arguments.preset), num_classes=len(pictures.classes))
    config = with_settings(config, arguments.set)
    about: dict[str, str] = {}
    labels = None
    if needs_masks(module):
        labels = _pseudo_labels(arguments)
        about["labels"] = MASKS if labels is None else labels_hash(pictures, labels)
    elif needs_affinity_labels(module, config):
        labels = _training_labels(arguments, pictures, config)
    if arguments.saliency is not None:
        if not takes_saliency(module):
            raise UsageError(f"--saliency is for systems that take such maps, which {arguments.system} does not")
        about["saliency"] = labels_hash(pictures, arguments.saliency)
    sub_labels = None
    if needs_sub_labels(module):
        found = _sub_categories(arguments, config, pictures)
        about["sub_categories"] = found.digest()
        sub_labels = found.labels()
    torch.manual_seed(arguments.seed)
    model = module.Model(config)
    if arguments.weights is not None:
        kept = load_model(model, read_weights(arguments.weights), source=arguments.weights)
        parts = Counter(name.partition(".")[0] for name in kept)
        new = ", ".join(f"{part} ({count})" for part, count in parts.items())
        print(f"weights of {shown(arguments.weights)}; new tensors: {new or 'none'}", flush=True)
    elif arguments.preset != "tiny" and not arguments.preset.startswith("tiny-"):
        print("no --weights: the backbone begins with random numbers, which the published settings do not", flush=True)
    epochs = getattr(config, "last_epoch", config.recipe.epochs)
    of = "" if epochs == config.recipe.epochs else f" of {config.recipe.epochs}"
    print(f"{pictures}, {arguments.system} ({arguments.preset}), {epochs}{of} epochs", flush=True)
    began = time.monotonic()
    losses = train(
        model,
        samples_of(
            module,
            config,
            pictures,
            seed=arguments.seed,
            labels=labels,
            saliency=arguments.saliency,
            sub_labels=sub_labels,
        ),
        arguments.out,
        seed=arguments.seed,
        resume=arguments.resume,
        accelerator=arguments.device,
        precision=arguments.precision,
        workers=arguments.workers,
        checkpoint_steps=arguments.checkpoint_steps,
        stop_after=epochs * (len(pictures) // config.recipe.batch_size),
        about={
            **about,
            "system": arguments.system,
            "classes": list(pictures.classes),
            "data": {
                "path": shown(arguments.data),
                "split": pictures.split,
                "pictures": len(pictures),
                "hash": data_hash(pictures.ids, pictures.labels()),
            },
        },
    )
    last = f", last loss {losses[-1]:.4f}" if losses else ""
    print(f"{len(losses)} steps in {time.monotonic() - began:.1f} s{last}; {shown(arguments.out)}")
    return DONE


def _pictures(arguments: argparse.Namespace) -> PictureSet:
    split = arguments.split
    if split is None and "train" in list_splits(arguments.data):
        split = "train"
    return open_dataset(arguments.data, split)


def _pseudo_labels(arguments: argparse.Namespace) -> Path | None:
    """The folder; None = the set's own masks."""
    if arguments.cams is not None or arguments.labels is None:
        raise UsageError(f"{arguments.system} trains on label pictures: give --labels DIR, or --labels {MASKS}")
    if str(arguments.labels) == MASKS:
        return None
    if not arguments.labels.is_dir():
        raise UsageError(f"--labels must be a folder or the word {MASKS}, got {shown(arguments.labels)}")
    return arguments.labels


def _training_labels(arguments: argparse.Namespace, pictures: PictureSet, config: Any) -> Path:
    if (arguments.cams is None) == (arguments.labels is None):
        raise UsageError(f"{arguments.system} trains on labels from CAMs: give --cams DIR, or --labels DIR")
    if arguments.labels is not None:
        return arguments.labels
    if not arguments.cams.is_dir():
        raise UsageError(f"--cams must be a folder, got {shown(arguments.cams)}")
    out = arguments.out / "labels"
    print(f"labels from the CAMs in {shown(arguments.cams)}", flush=True)
    with Progress(len(pictures)) as progress:
        write_training_labels(
            pictures,
            arguments.cams,
            out,
            how=_LABELS[arguments.system],
            options=config.label_options(),
            advance=progress.add,
        )
    return out


def _sub_categories(arguments: argparse.Namespace, config: Any, pictures: PictureSet) -> Found:
    """Under torchrun of the first process, for which the others wait: k-means on a GPU may differ between processes."""
    if arguments.previous is None:
        raise UsageError(f"{arguments.system} trains on clusters of a network's features: give --previous DIR")
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        settings = sub_category_settings(arguments.previous, pictures, config)
        while npz_settings(arguments.out / SUB_CATEGORIES) != settings:
            time.sleep(1)
        return read_sub_categories(arguments.out / SUB_CATEGORIES)
    print(f"sub-categories of the features of {shown(arguments.previous)}", flush=True)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with Progress(len(pictures)) as progress:
        return write_sub_categories(
            arguments.previous,
            pictures,
            arguments.out,
            config,
            device=device,
            workers=arguments.workers,
            advance=progress.add,
        )
