"""What a run of `wsss run` is about, and which network each of its stages trains."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from wsss_models.cli.main import UsageError
from wsss_models.data.artefacts import shown
from wsss_models.data.dataset import list_splits, open_dataset
from wsss_models.data.pictures import PictureSet
from wsss_models.systems import ONE_STAGE, TRAINED, as_dict, preset, system, with_settings
from wsss_models.train import data_hash
from wsss_models.training_data import takes_saliency

SYSTEMS = {  # and the refiner of each
    "classifier": "image",
    "affinitynet": "affinitynet",
    "irnet": "irnet",
    "sccam": "affinitynet",
    "puzzlecam": "irnet",
    "vwe": "irnet",
    "mcic": "mcic",
}
V3PLUS = ("puzzlecam",)  # whose last stage was published with DeepLab v3+
STAGES = ("classifier", "sccam", "affinity", "deeplab")  # that learn, and take settings
SETTINGS = "run.json"


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
    split: str | None
    val_split: str | None
    scales: str
    settings: tuple[str, ...]
    weights: str | None
    segmentation_weights: str | None
    saliency: str | None
    precision: str = "32-true"


def classifier_of(plan: Plan) -> dict[str, object]:
    """What classifier and CAMs of a run depend on: runs that agree here can share them."""
    name, which = "classifier" if plan.system == "irnet" else plan.system, plan.preset
    if name in ("affinitynet", "sccam"):
        name, which = "affinitynet", "published-classifier" if which == "published" else f"{which}-classifier"
    settings = settings_of(plan, "classifier")
    return {
        "classifier": (name, which),
        "settings": as_dict(with_settings(preset(name, which), settings)),
        **{name: getattr(plan, name) for name in ("seed", "hash", "split", "weights", "saliency", "precision")},
    }


def settings_of(plan: Plan, stage: str) -> list[str]:
    """The --set of a stage, its own and those of all."""
    chosen = []
    for setting in plan.settings:
        own = stage_of(setting)
        if own in (None, stage):
            chosen.append(setting if own is None else setting.removeprefix(f"{own}."))
    return chosen


def stage_of(setting: str) -> str | None:
    """The stage that [STAGE.]NAME=VALUE is for; None: all."""
    first, dot, _ = setting.partition("=")[0].partition(".")
    return first if dot and first in STAGES else None


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


def open_splits(arguments: argparse.Namespace) -> tuple[PictureSet, PictureSet]:
    """What is learnt from, and what is segmented: the same where a folder of one's own is not divided."""
    known = list_splits(arguments.data)
    split = arguments.split or ("train" if known else None)
    val_split = arguments.val_split or (split if {*known} <= {split} else "val")
    return open_dataset(arguments.data, split), open_dataset(arguments.data, val_split)


def plan_of(arguments: argparse.Namespace, train: PictureSet, val: PictureSet) -> Plan:
    if arguments.system not in SYSTEMS:
        raise UsageError(f"system must be one of {', '.join(SYSTEMS)}, got {arguments.system!r}")
    refiner = arguments.refiner or SYSTEMS[arguments.system]
    if "," in refiner and set(refiner.split(",")) & {*TRAINED, *ONE_STAGE, "none"}:
        raise UsageError(f"--refiner {', '.join((*TRAINED, *ONE_STAGE))} and none stand alone, got {refiner}")
    if refiner in ONE_STAGE and refiner != arguments.system:
        raise UsageError(f"--refiner {refiner} is for the system {refiner}, got {arguments.system}")
    if arguments.saliency is not None and not takes_saliency(system(arguments.system)):
        raise UsageError(f"--saliency is for systems that take such maps, which {arguments.system} does not")
    tiny = "tiny" if arguments.preset.partition("-")[0] == "tiny" else "published"
    return Plan(
        system=arguments.system,
        preset=arguments.preset,
        segmentation=arguments.segmentation or ("v3plus" if tiny != "tiny" and arguments.system in V3PLUS else tiny),
        refiner=refiner,
        seed=arguments.seed,
        data=shown(arguments.data),
        hash=data_hash((*train.ids, *val.ids), train.labels()),
        split=train.split,
        val_split=val.split,
        scales=arguments.scales,
        settings=tuple(arguments.set),
        weights=None if arguments.weights is None else shown(arguments.weights),
        segmentation_weights=None if arguments.segmentation_weights is None else shown(arguments.segmentation_weights),
        saliency=None if arguments.saliency is None else shown(arguments.saliency),
        precision=arguments.precision,
    )


def networks_of(plan: Plan) -> dict[str, tuple[str, str]]:
    """Stage -> system and preset.

    Raises:
        UsageError, ValueError: settings that a stage does not take; thus tried before anything is trained.
    """
    classifier = classifier_of(plan)["classifier"]
    assert isinstance(classifier, tuple)
    networks = {"classifier": classifier, "deeplab": ("deeplab", plan.segmentation)}
    if plan.system == "sccam":
        networks["sccam"] = ("sccam", plan.preset)
    if plan.refiner in TRAINED:
        networks["affinity"] = (plan.refiner, _refiner_preset(plan, classifier))
    for setting in plan.settings:
        if stage_of(setting) not in (None, *networks):
            raise UsageError(f"--set {setting}: this run has no stage {stage_of(setting)}")
    for stage, (name, which) in networks.items():
        with_settings(preset(name, which), settings_of(plan, stage))
    return networks


def configs_of(plan: Plan) -> dict[str, object]:
    """Stage -> the settings of what it trains, whichever preset and `--set` they came from; errors of `networks_of`."""
    networks = networks_of(plan)
    return {stage: with_settings(preset(*network), settings_of(plan, stage)) for stage, network in networks.items()}


def _refiner_preset(plan: Plan, classifier: tuple[str, str]) -> str:
    """For this system, or of the run's own name, or else the first with the classifier's backbone."""
    presets, backbone = system(plan.refiner).PRESETS, preset(*classifier).backbone
    for name in (f"{plan.system}-{plan.preset}", plan.preset):
        if name in presets:
            return name
    for name, config in presets.items():
        if config.backbone == backbone and getattr(config, "stage", "affinity") == "affinity":
            return name
    raise UsageError(f"{plan.refiner} has no preset with the backbone {backbone}: give another --refiner")
