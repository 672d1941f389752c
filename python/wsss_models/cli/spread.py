"""`wsss spread`: maps spread by a trained AffinityNet or IRNet, and the label of every pixel."""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from wsss_models.cli.main import DONE, SOME_FAILED, UsageError
from wsss_models.cli.pictures import torch_device
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import png_settings, remove_stale, shown
from wsss_models.data.dataset import open_dataset
from wsss_models.data.files import fingerprint, read_maps, write_label
from wsss_models.data.folder import inside, parse_shard
from wsss_models.infer import load_run, run_hash
from wsss_models.recipe import NORMALISATIONS

_FORMAT = 1  # raised when the same settings give other labels
# At once on a CPU, each with its share of the threads: threads of one picture meet at the end of every small operation,
# and on a busy machine each time wait for one that does not run.
_PICTURES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the --out of wsss train", dest="training")
    add("--data", type=Path, required=True, metavar="DIR", help="PASCAL VOC, COCO, or pictures with a labels.csv")
    add("--split", metavar="NAME", help="of the set, or a file with one id a line; default: all pictures")
    add("--cams", type=Path, required=True, metavar="DIR", help="of wsss cams: one .npz a picture")
    add("--out", type=Path, required=True, metavar="DIR", help="label PNGs (VOC palette) go here")
    add(
        "--background",
        type=float,
        metavar="X",
        help="AffinityNet: power of the background map; IRNet: score up to which a pixel is background; default: "
        "the training's settings",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="cpu|cuda")
    add("--shard", metavar="i/n", help="take every n-th picture from the i-th on; default: torchrun's, or 0/1")


def run(arguments: argparse.Namespace) -> int:
    device = torch_device(arguments.device)
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not arguments.cams.is_dir():
        raise UsageError(f"--cams must be a folder, got {shown(arguments.cams)}")
    if arguments.background is not None and not arguments.background > 0:
        raise UsageError(f"--background must be above 0, got {arguments.background}")
    try:
        index, count = parse_shard(arguments.shard or f"{rank}/{processes}")
        model, manifest = load_run(arguments.training)
        pictures = open_dataset(arguments.data, arguments.split)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not hasattr(model, "labels"):
        raise UsageError(f"--run must be of affinitynet or irnet, got {manifest['system']}; wsss refine needs none")
    model.to(device).eval()
    options = {} if arguments.background is None else {"background": arguments.background}
    normalise = NORMALISATIONS[manifest["config"]["recipe"]["normalisation"]]
    settings = {"format": _FORMAT, "run": run_hash(arguments.training), **options}
    remove_stale(arguments.out)
    written = kept = failures = 0
    began = time.monotonic()
    numbers = range(index, len(pictures), count)

    def spread(i: int) -> bool:
        """False: it is there already."""
        name = pictures.ids[i]
        source, target = inside(arguments.cams, name, ".npz"), inside(arguments.out, name, ".png")
        inputs = [fingerprint(pictures.image_path(i)), fingerprint(source)]
        text = json.dumps({**settings, "inputs": inputs})
        if png_settings(target) == text:
            return False
        class_ids, cams = read_maps(source, num_classes=len(pictures.classes))
        image = pictures.image(i)
        label = torch.zeros(image.shape[:2], dtype=torch.int64)
        if len(class_ids):
            maps = torch.from_numpy(cams)[None].to(device)
            x = normalise(image)[None].to(device)
            label = model.labels(x, maps, class_ids=class_ids.tolist(), **options)[0].cpu()
        try:
            write_label(target, label.numpy(), settings=text)
        except OSError as error:
            raise UsageError(f"--out must be a folder that can be written to ({error})") from None
        return True

    threads = torch.get_num_threads()
    together = 1 if device.type == "cuda" else min(threads, _PICTURES)
    share = partial(torch.set_num_threads, threads // together)
    with Progress(len(numbers)) as progress, ThreadPoolExecutor(together, initializer=share) as pool:
        try:
            for i, future in [(i, pool.submit(spread, i)) for i in numbers]:
                try:
                    done = future.result()
                    written, kept = written + done, kept + (not done)
                except UsageError:
                    raise
                except (ValueError, MemoryError) as error:
                    failures += 1
                    progress.say(f"failed: {shown(pictures.ids[i])}: {error}")
                progress.add()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)
    already = f", {kept} already done" if kept else ""
    seconds = time.monotonic() - began
    print(f"{written} written{already}, {failures} failed in {seconds:.1f} s; labels in {shown(arguments.out)}")
    return SOME_FAILED if failures else DONE
