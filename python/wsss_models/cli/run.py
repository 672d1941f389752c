"""`wsss run`: a whole system, from image-level labels to the numbers of a segmentation network, in one folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.results import Row, of_labels, of_maps, table
from wsss_models.data.artefacts import shown, write_atomically
from wsss_models.data.dataset import open_dataset
from wsss_models.data.pictures import PictureSet
from wsss_models.systems import as_dict, preset, with_settings
from wsss_models.train import PRECISIONS, data_hash

SYSTEMS = {"classifier": "image", "affinitynet": "affinitynet", "irnet": "irnet"}  # and the refiner of each
TRAINED = ("affinitynet", "irnet")  # refiners that have a network of their own
STAGES = ("classifier", "affinity", "deeplab")  # that learn, and take settings
ENDS = ("labels", "deeplab")
SETTINGS, RESULTS = "run.json", "results.json"


@dataclass(frozen=True)
class Plan:
    """What a folder of results is about; another plan needs another folder."""

    system: str
    preset: str
    segmentation: str
    refiner: str
    seed: int
    data: str
    hash: str
    split: str
    val_split: str
    scales: str
    settings: tuple[str, ...]
    weights: str | None
    segmentation_weights: str | None
    precision: str = "32-true"


def classifier_of(plan: Plan) -> dict[str, object]:
    """What classifier and CAMs of a run depend on: runs that agree here can share them."""
    system, which = "classifier", plan.preset
    if plan.system == "affinitynet":
        system, which = plan.system, "published-classifier" if which == "published" else f"{which}-classifier"
    settings = settings_of(plan, "classifier")
    return {
        "classifier": (system, which),
        "settings": as_dict(with_settings(preset(system, which), settings)),
        **{name: getattr(plan, name) for name in ("seed", "hash", "split", "weights", "precision")},
    }


def settings_of(plan: Plan, stage: str) -> list[str]:
    """The --set of a stage, its own and those of all."""
    chosen = []
    for setting in plan.settings:
        first, _, rest = setting.partition(".")
        if first in STAGES and "=" in rest:
            chosen += [rest] if first == stage else []
        else:
            chosen.append(setting)
    return chosen


def read_plan(out: Path) -> tuple[Plan, dict[str, float]]:
    """Plan and seconds of the stages that are done.

    Raises:
        UsageError: no run, or a damaged one.
    """
    path = out / SETTINGS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        values = {**record["plan"], "settings": tuple(record["plan"]["settings"])}
        return Plan(**values), dict(record["seconds"])
    except OSError:
        raise UsageError(f"{shown(out)} holds no run: there is no {SETTINGS}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{shown(path)}: damaged, or of another version ({error})") from None


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
        "system's own, image for classifier",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    add("--split", default="train", metavar="NAME", help="that is learnt from (train)")
    add("--val-split", default="val", metavar="NAME", help="that is segmented (val)")
    add("--weights", type=Path, metavar="FILE", help="public weights of the system's backbone")
    add(
        "--segmentation-weights",
        type=Path,
        metavar="FILE",
        help="public weights of deeplab's backbone; default: the classifier's where it is the same",
    )
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
        train, val = open_dataset(arguments.data, arguments.split), open_dataset(arguments.data, arguments.val_split)
        plan = plan_of(arguments, train, val)
        _Stages(arguments, plan, train, val).run()
    except FailedError as error:
        print(f"stopped: {error}", flush=True)
        return SOME_FAILED
    except ValueError as error:
        raise UsageError(str(error)) from None
    return DONE


def plan_of(arguments: argparse.Namespace, train: PictureSet, val: PictureSet) -> Plan:
    if arguments.system not in SYSTEMS:
        raise UsageError(f"system must be one of {', '.join(SYSTEMS)}, got {arguments.system!r}")
    refiner = arguments.refiner or SYSTEMS[arguments.system]
    if "," in refiner and set(refiner.split(",")) & {*TRAINED, "none"}:
        raise UsageError(f"--refiner {', '.join(TRAINED)} and none stand alone, got {refiner}")
    tiny = "tiny" if arguments.preset == "tiny" else "published"
    return Plan(
        system=arguments.system,
        preset=arguments.preset,
        segmentation=arguments.segmentation or tiny,
        refiner=refiner,
        seed=arguments.seed,
        data=shown(arguments.data),
        hash=data_hash((*train.ids, *val.ids), train.labels()),
        split=arguments.split,
        val_split=arguments.val_split,
        scales=arguments.scales,
        settings=tuple(arguments.set),
        weights=None if arguments.weights is None else shown(arguments.weights),
        segmentation_weights=None if arguments.segmentation_weights is None else shown(arguments.segmentation_weights),
        precision=arguments.precision,
    )


class _Stages:
    """The stages in turn; each goes on from what is there, by the means of its own command."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan, train: PictureSet, val: PictureSet) -> None:
        self._arguments, self._plan, self._train, self._val = arguments, plan, train, val
        self._out: Path = arguments.out
        self._device = arguments.device
        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._networks = self._configs()
        if arguments.classifier is not None:
            self._check_classifier(arguments.classifier)
        self._seconds = self._start()

    def run(self) -> None:
        out, plan = self._out, self._plan
        if self._arguments.classifier is not None:
            self._take_classifier(self._arguments.classifier)
        self._stage("classifier", self._train_classifier)
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
        if plan.refiner == "none":
            note = "of the CAMs, each picture's threshold found without masks"
        elif plan.refiner in TRAINED:
            note = f"spread by {plan.refiner}"
            rows.append(of_labels("refined", self._train, out / "labels", f"{note}; the pseudo-labels are the same"))
        else:
            note = "of the refined maps, each picture's threshold found without masks"
            rows += of_maps("refined", self._train, out / "refined")
        rows.append(of_labels("labels", self._train, out / "labels", note))
        scales = f"scales {plan.scales}, flipped too"
        if self._arguments.until == "deeplab":
            rows.append(of_labels("deeplab", self._val, out / "segmentation" / "mean", scales))
            rows.append(of_labels("deeplab+CRF", self._val, out / "segmentation" / "crf", f"{scales}; dense CRF"))
        if self._arguments.ceiling:
            note = f"deeplab trained on the masks of {plan.split}, {scales}: about what the best labels could give"
            rows.append(of_labels("ceiling", self._val, out / "segmentation" / "ceiling", note))
        self._report(rows)

    def _configs(self) -> dict[str, tuple[str, str]]:
        """Stage -> system and preset, settings tried on each before anything is trained."""
        plan = self._plan
        classifier = classifier_of(plan)["classifier"]
        assert isinstance(classifier, tuple)
        networks = {"classifier": classifier, "deeplab": ("deeplab", plan.segmentation)}
        if plan.refiner in TRAINED:
            networks["affinity"] = (plan.refiner, plan.preset)
        for setting in plan.settings:
            stage, dot, _ = setting.partition("=")[0].partition(".")
            if dot and stage in STAGES and stage not in networks:
                raise UsageError(f"--set {setting}: this run has no stage {stage}")
        for stage, (system, which) in networks.items():
            with_settings(preset(system, which), self._settings(stage))
        return networks

    def _settings(self, stage: str) -> list[str]:
        return settings_of(self._plan, stage)

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
        for name in ("classifier", "cams"):
            if not (self._out / name).exists():
                partial = self._out / f".{name}"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source / name, partial)
                partial.rename(self._out / name)

    def _train_ceiling(self) -> None:
        out, weights = self._out / "ceiling", self._arguments.segmentation_weights or self._of_classifier("deeplab")
        self._fit("deeplab", out, self._plan.split, weights, ["--labels=masks"])
        self._call("segment", [*self._segmented(out), f"--out={self._out / 'segmentation' / 'ceiling'}"])

    def _train_classifier(self) -> None:
        self._fit("classifier", self._out / "classifier", self._plan.split, self._arguments.weights)

    def _write_cams(self) -> None:
        inputs = [f"--run={self._out / 'classifier'}", f"--data={self._arguments.data}", f"--split={self._plan.split}"]
        workers = f"--workers={self._arguments.workers}"
        self._call("cams", [*inputs, f"--out={self._out / 'cams'}", f"--device={self._device}", workers])

    def _train_affinity(self) -> None:
        cams = [f"--cams={self._out / 'cams'}"]
        self._fit("affinity", self._out / "affinity", self._plan.split, self._of_classifier("affinity"), cams)

    def _write_labels(self) -> None:
        out, data = self._out, self._arguments.data
        if self._plan.refiner in TRAINED:
            inputs = [f"--run={out / 'affinity'}", f"--data={data}", f"--split={self._plan.split}"]
            device = f"--device={self._device}"
            self._call("spread", [*inputs, f"--cams={out / 'cams'}", f"--out={out / 'labels'}", device])
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
        self._fit("deeplab", self._out / "deeplab", self._plan.split, weights, labels)

    def _segment(self) -> None:
        inputs = self._segmented(self._out / "deeplab")
        self._call("segment", [*inputs, f"--out={self._out / 'segmentation' / 'mean'}"])
        self._call("segment", [*inputs, "--crf", f"--out={self._out / 'segmentation' / 'crf'}"])

    def _segmented(self, run: Path) -> list[str]:
        inputs = [f"--run={run}", f"--data={self._arguments.data}", f"--split={self._plan.val_split}"]
        return [
            *inputs,
            f"--scales={self._plan.scales}",
            f"--device={self._device}",
            f"--workers={self._arguments.workers}",
        ]

    def _of_classifier(self, stage: str) -> Path | None:
        """The weights that a stage starts from, where its backbone is the classifier's."""
        found = []
        for name in (stage, "classifier"):
            config = with_settings(preset(*self._networks[name]), self._settings(name))
            found.append((config.backbone, config.width))
        if found[0] == found[1]:
            return self._out / "classifier" / "checkpoint.pt"
        print(f"{stage} begins anew: its backbone is {found[0][0]}, the classifier's {found[1][0]}", flush=True)
        return None

    def _fit(self, stage: str, out: Path, split: str, weights: Path | None, more: Sequence[str] = ()) -> None:
        system, which = self._networks[stage]
        words = [system, f"--data={self._arguments.data}", f"--split={split}", f"--out={out}", f"--preset={which}"]
        words += [f"--seed={self._plan.seed}", f"--device={self._device}", f"--workers={self._arguments.workers}"]
        words += [f"--precision={self._plan.precision}", *(f"--set={setting}" for setting in self._settings(stage))]
        words += [] if weights is None else [f"--weights={weights}"]
        self._call("train", [*words, *more, "--resume"])

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
        print(f"written: {shown(self._out / RESULTS)}")


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
