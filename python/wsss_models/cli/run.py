"""`wsss run`: a whole system, from image-level labels to the numbers of a segmentation network, in one folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.results import Row, of_labels, of_maps, table
from wsss_models.cli.run_plan import (
    SETTINGS,
    STAGES,
    SYSTEMS,
    Plan,
    classifier_of,
    networks_of,
    open_splits,
    plan_of,
    read_plan,
    settings_of,
)
from wsss_models.data.artefacts import shown, write_atomically
from wsss_models.data.pictures import PictureSet
from wsss_models.systems import ONE_STAGE, TRAINED, preset, system, with_settings
from wsss_models.train import PRECISIONS

ENDS = ("labels", "deeplab")
RESULTS = "results.json"


class FailedError(Exception):
    """A stage named pictures that failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("system", metavar="SYSTEM", help=", ".join(SYSTEMS))
    add("--data", type=Path, required=True, metavar="DIR", help="PASCAL VOC, COCO, or pictures with a labels.csv")
    add("--out", type=Path, required=True, metavar="DIR", help="all stages, results.json; the same command goes on")
    add("--preset", default="published", metavar="NAME", help="of the system: published (the default), tiny, ...")
    add("--segmentation", metavar="NAME", help="preset of deeplab: published, v3plus, tiny; default: as --preset")
    add(
        "--refiner",
        metavar="NAME[,NAME]",
        help="image, par, crf or other methods of wsss refine, in turn; affinitynet or irnet; none; default: the "
        "system's own, image for classifier; mcic, with itself only: by its memory",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    add("--split", metavar="NAME", help="that is learnt from; default: train, or all pictures of a set without splits")
    add("--val-split", metavar="NAME", help="that is segmented; default: val, or, without another split, --split")
    add("--weights", type=Path, metavar="FILE", help="public weights of the system's backbone")
    add(
        "--segmentation-weights",
        type=Path,
        metavar="FILE",
        help="public weights of deeplab's backbone; default: the classifier's where it is the same",
    )
    add("--saliency", type=Path, metavar="DIR", help="mcic: saliency maps, one grey PNG a picture (0..255)")
    add("--scales", default="0.75,1,1.25", metavar="S,S,...", help="of the pictures that are segmented (0.75,1,1.25)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="[STAGE.]NAME=VALUE",
        help=f"a setting of one stage ({', '.join(STAGES)}), such as deeplab.epochs=3, or of all",
    )
    add("--precision", default="32-true", choices=PRECISIONS, help="of the arithmetic in training (32-true)")
    add("--classifier", type=Path, metavar="RUN", help="another run with the same classifier: take its CAMs, too")
    add("--until", default="deeplab", choices=ENDS, help="labels: leave the segmentation out; the same command goes on")
    add(
        "--ceiling",
        action="store_true",
        help="also train deeplab on the masks of the split: what labels can at most give",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")


def run(arguments: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("wsss run is one process; under torchrun, train the stages by wsss train")
    try:
        train, val = open_splits(arguments)
        plan = plan_of(arguments, train, val)
        _Stages(arguments, plan, train, val).run()
    except FailedError as error:
        print(f"stopped: {error}", flush=True)
        return SOME_FAILED
    except ValueError as error:
        raise UsageError(str(error)) from None
    return DONE


class _Stages:
    """The stages in turn; each goes on from what is there, by the means of its own command."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan, train: PictureSet, val: PictureSet) -> None:
        self._arguments, self._plan, self._train, self._val = arguments, plan, train, val
        self._out: Path = arguments.out
        self._device = arguments.device
        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._networks = networks_of(plan)
        self._rounds = self._config("sccam").rounds if "sccam" in self._networks else 0
        if arguments.classifier is not None:
            self._check_classifier(arguments.classifier)
        self._seconds = self._start()

    def run(self) -> None:
        out, plan = self._out, self._plan
        if self._arguments.classifier is not None:
            self._take_classifier(self._arguments.classifier)
        self._stage("classifier", self._train_classifier)
        for number in range(1, self._rounds + 1):
            self._stage(f"round{number}", partial(self._train_round, number))
        self._stage("cams", self._write_cams)
        if plan.refiner in TRAINED:
            self._stage("affinity", self._train_affinity)
        self._stage("labels", self._write_labels)
        if self._arguments.until == "deeplab":
            self._stage("deeplab", self._train_deeplab)
            self._stage("segmentation", self._segment)
        if self._arguments.ceiling:
            self._stage("ceiling", self._train_ceiling)
        rows = of_maps("CAM", self._train, out / "cams")
        scales = f"scales {plan.scales}, flipped too"
        for branch in self._branches():
            rows += of_maps(f"CAM {branch}", self._train, out / f"cams-{branch}")
        if plan.refiner == "none":
            note = "of the CAMs, each picture's threshold found without masks"
        elif plan.refiner in ONE_STAGE:
            note = f"by the memory of {plan.refiner}, of each picture's classes, {scales}"
        elif plan.refiner in TRAINED:
            note = f"spread by {plan.refiner}"
            rows.append(of_labels("refined", self._train, out / "labels", f"{note}; the pseudo-labels are the same"))
        else:
            note = "of the refined maps, each picture's threshold found without masks"
            rows += of_maps("refined", self._train, out / "refined")
        rows.append(of_labels("labels", self._train, out / "labels", note))
        if self._arguments.until == "deeplab":
            if plan.system in ONE_STAGE:
                own = out / "segmentation" / plan.system
                rows.append(of_labels(plan.system, self._val, own, f"its own segmentation, {scales}"))
                crf = own.with_name(f"{own.name}-crf")
                rows.append(of_labels(f"{plan.system}+CRF", self._val, crf, f"{scales}; dense CRF"))
            rows.append(of_labels("deeplab", self._val, out / "segmentation" / "mean", scales))
            rows.append(of_labels("deeplab+CRF", self._val, out / "segmentation" / "crf", f"{scales}; dense CRF"))
        if self._arguments.ceiling:
            learnt = f"deeplab trained on the masks of {plan.split or 'all pictures'}"
            note = f"{learnt}, {scales}: about what the best labels could give"
            rows.append(of_labels("ceiling", self._val, out / "segmentation" / "ceiling", note))
        self._report(rows)

    def _config(self, stage: str) -> Any:
        return with_settings(preset(*self._networks[stage]), settings_of(self._plan, stage))

    def _start(self) -> dict[str, float]:
        """The seconds of the stages that are done; the folder is this plan's."""
        plan = asdict(self._plan)
        if (self._out / SETTINGS).exists():
            before, seconds = read_plan(self._out)
            changed = [name for name, value in plan.items() if getattr(before, name) != value]
            if changed:
                raise UsageError(
                    f"{shown(self._out)} holds a run with another {', '.join(changed)}: give another --out"
                )
            return seconds
        self._write(SETTINGS, {"plan": plan, "seconds": {}})
        return {}

    def _write(self, name: str, values: dict[str, object]) -> None:
        try:
            write_atomically(self._out / name, (json.dumps(values, indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"--out must be a folder that can be written to ({error})") from None

    def _stage(self, name: str, work: Callable[[], None]) -> None:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        work()
        if name not in self._seconds:  # the stage came to its end in this process for the first time
            self._seconds[name] = round(time.monotonic() - began, 2)
            self._write(SETTINGS, {"plan": asdict(self._plan), "seconds": self._seconds})

    def _check_classifier(self, source: Path) -> None:
        plan, seconds = read_plan(source)
        changed = [name for name, value in classifier_of(self._plan).items() if classifier_of(plan)[name] != value]
        if changed:
            raise UsageError(f"--classifier {shown(source)} has another {', '.join(changed)}")
        if "cams" not in seconds:
            raise UsageError(f"--classifier {shown(source)} has not come to its CAMs yet")

    def _take_classifier(self, source: Path) -> None:
        """Copies, complete or not at all; where there is a classifier already, nothing."""
        for name in ("classifier",) if self._rounds else ("classifier", "cams"):
            if not (self._out / name).exists():
                partial = self._out / f".{name}"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source / name, partial)
                partial.rename(self._out / name)

    def _train_ceiling(self) -> None:
        out, weights = self._out / "ceiling", self._arguments.segmentation_weights or self._of_classifier("deeplab")
        self._fit("deeplab", out, weights, ["--labels=masks"])
        self._segment_by("ceiling", self._val, self._out / "segmentation" / "ceiling")

    def _train_classifier(self) -> None:
        maps = self._arguments.saliency
        more = [] if maps is None else [f"--saliency={maps}"]
        self._fit("classifier", self._out / "classifier", self._arguments.weights, more)

    def _train_round(self, number: int) -> None:
        """Each from the weights that the first one began with."""
        previous = [f"--previous={self._maps_of(number - 1)}", f"--set=round={number}"]
        self._fit("sccam", self._maps_of(number), self._arguments.weights, previous)

    def _maps_of(self, number: int) -> Path:
        """The training of a round; the classifier's is number 0."""
        return self._out / (f"round{number}" if number else "classifier")

    def _write_cams(self) -> None:
        inputs = [f"--run={self._maps_of(self._rounds)}", *self._pictures(self._train)]
        workers = f"--workers={self._arguments.workers}"
        self._call("cams", [*inputs, f"--out={self._out / 'cams'}", f"--device={self._device}", workers])
        for branch in self._branches():
            more = [f"--out={self._out / f'cams-{branch}'}", f"--branch={branch}"]
            self._call("cams", [*inputs, *more, f"--device={self._device}", workers])

    def _branches(self) -> list[str]:
        """The kinds of CAMs beside those that are refined, where the network has several."""
        stage = self._maps_stage()
        config = self._config(stage)
        found = getattr(system(self._networks[stage][0]), "branches", lambda config: ())(config)
        return [branch for branch in found if branch != config.cam]

    def _maps_stage(self) -> str:
        """Whose network gives the CAMs."""
        return "sccam" if self._rounds else "classifier"

    def _train_affinity(self) -> None:
        cams = [f"--cams={self._out / 'cams'}"]
        self._fit("affinity", self._out / "affinity", self._of_classifier("affinity"), cams)

    def _write_labels(self) -> None:
        out = self._out
        if self._plan.refiner in TRAINED:
            inputs = [f"--run={out / 'affinity'}", *self._pictures(self._train)]
            device = f"--device={self._device}"
            self._call("spread", [*inputs, f"--cams={out / 'cams'}", f"--out={out / 'labels'}", device])
            return
        if self._plan.refiner in ONE_STAGE:
            self._segment_by("classifier", self._train, out / "labels", "--labelled")
            return
        ids = out / "ids.txt"
        write_atomically(ids, "".join(f"{name}\n" for name in self._train.ids).encode("utf-8", "surrogateescape"))
        shared = [f"--images={_root_of(self._train)}", f"--cams={out / 'cams'}", f"--out={out / 'labels'}"]
        shared += [f"--ids={ids}", f"--num-classes={len(self._train.classes)}", f"--device={self._device}"]
        if self._plan.refiner == "none":
            self._call("labels", shared)
        else:
            self._call("refine", [*shared, f"--method={self._plan.refiner}", f"--maps={out / 'refined'}"])

    def _train_deeplab(self) -> None:
        labels = [f"--labels={self._out / 'labels'}"]
        weights = self._arguments.segmentation_weights or self._of_classifier("deeplab")
        self._fit("deeplab", self._out / "deeplab", weights, labels)

    def _segment(self) -> None:
        out, val = self._out / "segmentation", self._val
        if self._plan.system in ONE_STAGE:
            self._segment_by("classifier", val, out / self._plan.system)
            self._segment_by("classifier", val, out / f"{self._plan.system}-crf", "--crf")
        self._segment_by("deeplab", val, out / "mean")
        self._segment_by("deeplab", val, out / "crf", "--crf")

    def _segment_by(self, stage: str, pictures: PictureSet, out: Path, *more: str) -> None:
        inputs = [f"--run={self._out / stage}", *self._pictures(pictures), f"--out={out}"]
        inputs += [f"--scales={self._plan.scales}", f"--device={self._device}", f"--workers={self._arguments.workers}"]
        self._call("segment", [*inputs, *more])

    def _of_classifier(self, stage: str) -> Path | None:
        """The weights that a stage starts from, where its backbone is the classifier's."""
        found = []
        for name in (stage, self._maps_stage()):
            config = self._config(name)
            found.append((config.backbone, config.width))
        if found[0] == found[1]:
            return self._maps_of(self._rounds) / "checkpoint.pt"
        print(f"{stage} begins anew: its backbone is {found[0][0]}, the classifier's {found[1][0]}", flush=True)
        return None

    def _fit(self, stage: str, out: Path, weights: Path | None, more: Sequence[str] = ()) -> None:
        name, which = self._networks[stage]
        words = [name, *self._pictures(self._train), f"--out={out}", f"--preset={which}"]
        words += [f"--seed={self._plan.seed}", f"--device={self._device}", f"--workers={self._arguments.workers}"]
        words += [
            f"--precision={self._plan.precision}",
            *(f"--set={setting}" for setting in settings_of(self._plan, stage)),
        ]
        words += [] if weights is None else [f"--weights={weights}"]
        self._call("train", [*words, *more, "--resume"])

    def _pictures(self, pictures: PictureSet) -> list[str]:
        split = [] if pictures.split is None else [f"--split={pictures.split}"]
        return [f"--data={self._arguments.data}", *split]

    def _call(self, command: str, words: Sequence[str]) -> None:
        module = import_module(f"wsss_models.cli.{command}")
        parser = argparse.ArgumentParser(prog=f"wsss {command}")
        module.add_arguments(parser)
        if module.run(parser.parse_args(words)) != DONE:
            raise FailedError(f"wsss {command} named pictures that failed; mend them and run the same command again")

    def _report(self, rows: list[Row]) -> None:
        plan = self._plan
        values = {"system": plan.system, "preset": plan.preset, "refiner": plan.refiner, "seed": plan.seed}
        stages = dict(self._seconds)
        self._write(RESULTS, {**values, "data": plan.data, "rows": [asdict(row) for row in rows], "stages": stages})
        print("\n".join(table(rows)))
        print(f"written: {shown(self._out / RESULTS)}; CAMs: {shown(self._out / 'cams')}", end="")
        print(f"; pseudo-labels: {shown(self._out / 'labels')}", end="")
        segmented = self._arguments.until == "deeplab"
        print(f"; segmentation: {shown(self._out / 'segmentation' / 'crf')}" if segmented else "")


def _root_of(pictures: PictureSet) -> Path:
    """The folder under which each picture is `<id>.<suffix>`, as `wsss refine` wants it."""
    roots = set()
    for i, name in enumerate(pictures.ids):
        path = pictures.image_path(i)
        root = path.parents[name.count("/")]
        if path.with_suffix("") != root / name and path != root / name:
            raise UsageError(f"{shown(path)}: must be named as its id {shown(name)} for a refiner of wsss refine")
        roots.add(root)
    if len(roots) != 1:
        raise UsageError(f"pictures must be in one folder for a refiner of wsss refine, got {len(roots)}")
    return roots.pop()
