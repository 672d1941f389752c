"""`wsss labels`: a folder of maps, coarse or refined, to label pictures by one of three rules."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk
from wsss_models.cli import pictures
from wsss_models.cli.main import UsageError
from wsss_models.cli.pictures import Failures, Job, Tally, Work
from wsss_models.data import files

_FORMAT = 1  # of what is written: raised when the same settings give other files
_IGNORE = 255
# Rule -> its options and their defaults.
RULES: dict[str, dict[str, object]] = {
    "maps": {"background": "auto", "ignore": None},
    "confident": {"fg": 0.30, "bg": 0.05},
    "affinity": {"low": 4.0, "high": 32.0},
}
_OPTIONS = tuple(option for options in RULES.values() for option in options)

Rule = Callable[[Tensor, Tensor], Tensor]  # picture [3, H, W] uint8, maps [k, H, W] -> labels [H, W]: 0..k or 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pictures.add_inputs(parser)
    add = parser.add_argument
    add(
        "--rule",
        default="maps",
        choices=tuple(RULES),
        help="maps (the default): the highest score above a threshold; confident: where two dense CRFs agree, from a "
        "constant background (IRNet); affinity: the same from a background (1 - max)^alpha (AffinityNet). Those two "
        "write 255 where they are not sure",
    )
    add("--background", metavar="auto|T", help="rule maps: threshold, as a share of the picture's maximum (auto)")
    add(
        "--ignore",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="rule maps: 255 where the highest score, as a share of the picture's maximum, lies between",
    )
    add("--fg", type=float, metavar="T", help="rule confident: background's score of the sure objects (0.30)")
    add("--bg", type=float, metavar="T", help="rule confident: background's score of the sure background (0.05)")
    add("--low", type=float, metavar="A", help="rule affinity: background's power of the sure objects (4)")
    add("--high", type=float, metavar="A", help="rule affinity: background's power of the sure background (32)")
    add("--device", default="cpu", metavar="cpu|cuda")
    pictures.add_selection(parser)


def run(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    rule = _rule(arguments.rule, options)
    device = pictures.torch_device(arguments.device)
    pictures.check_counts(arguments, "workers", "num_classes")
    pictures.check_folders(arguments, ("images", "cams"), {arguments.out})
    names, found = pictures.chosen_names(arguments)
    pictures.make_folders({arguments.out})
    print(f"{len(names)} pictures, rule {arguments.rule} {_shown(options)}, on {device}", flush=True)

    def settings_text(inputs: list[str]) -> str:
        values = {"format": _FORMAT, "version": wk.__version__, "rule": arguments.rule, **options, "inputs": inputs}
        return json.dumps(values, sort_keys=True)

    def find(name: str) -> Job:
        return pictures.find_job(name, found.get(name, []), arguments, None, settings_text)

    def start(pool: ThreadPoolExecutor, failed: Failures, tally: Tally) -> Iterator[Work]:
        jobs = pictures.left_to_do(names, find, failed, tally)
        return pictures.each_picture(pool, jobs, partial(_process, arguments.num_classes, rule, device))

    return pictures.run_all(
        len(names),
        start,
        workers=arguments.workers,
        depth=2 * arguments.workers,
        strict=arguments.strict,
        one_thread_each=device.type == "cpu",
        out=arguments.out,
    )


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """Those of the rule, the given ones over its defaults."""
    own = RULES[arguments.rule]
    for option in _OPTIONS:
        if getattr(arguments, option) is not None and option not in own:
            known = ", ".join(f"--{name}" for name in own)
            raise UsageError(f"--{option} is no option of --rule {arguments.rule}, which has {known}")
    given = {name: getattr(arguments, name) for name in own if getattr(arguments, name) is not None}
    options = {**own, **given}
    if "background" in options:
        options["background"] = pictures.threshold("--background", str(options["background"]))
    return options


def _shown(options: dict[str, object]) -> str:
    return "(" + ", ".join(f"{name} {value}" for name, value in options.items() if value is not None) + ")"


def _rule(name: str, options: dict[str, object]) -> Rule:
    """The engine's function with these options, tried on a picture of a few pixels: it says itself what it takes."""

    def from_maps(_: Tensor, maps: Tensor) -> Tensor:
        ignore = options["ignore"]
        band = tuple(ignore) if isinstance(ignore, list) else None
        share = maps / maps.max().clamp_min(torch.finfo(maps.dtype).tiny)
        labels = wk.labels_from_maps(share, background=options["background"], ignore=band)  # type: ignore[arg-type]
        assert isinstance(labels, Tensor)
        return labels

    def from_peaks(make: Callable[..., Tensor], picture: Tensor, maps: Tensor) -> Tensor:
        peaks = maps.amax(dim=(1, 2), keepdim=True)
        return make(picture, maps / peaks.clamp_min(torch.finfo(maps.dtype).tiny), **options)

    rule: Rule = from_maps
    if name != "maps":
        rule = partial(from_peaks, wk.confident_labels if name == "confident" else wk.affinity_labels)
    try:
        rule(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.ones(1, 2, 2))
    except ValueError as error:
        raise UsageError(f"--rule {name}: {error}") from None
    return rule


@torch.inference_mode()
def _process(num_classes: int, rule: Rule, device: torch.device, job: Job) -> bool:
    class_ids, cams = files.read_maps(job.cams, num_classes=num_classes)
    picture = torch.from_numpy(files.read_picture(job.picture)).permute(2, 0, 1).to(device)
    label = np.zeros(picture.shape[-2:], dtype=np.uint8)
    if cams.size:
        maps = torch.from_numpy(cams.clip(0)).to(device)
        maps = F.interpolate(maps[None], picture.shape[-2:], mode="bilinear", align_corners=False)[0]
        table = np.full(256, _IGNORE, dtype=np.uint8)
        table[: len(class_ids) + 1] = [0, *class_ids]
        label = table[rule(picture, maps).cpu().numpy()]
    files.write_label(job.label, label, settings=job.settings)
    return bool((cams < 0).any())
