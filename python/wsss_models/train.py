"""One training loop for every system: CPU, a GPU, several (torchrun), mixed precision, exact resumption."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import wsss_kernels
from wsss_models.cli.progress import Progress
from wsss_models.data.artefacts import FileError, remove_stale, write_atomically
from wsss_models.recipe import optimiser, set_rate
from wsss_models.systems import as_dict

CHECKPOINT, MANIFEST, LOG = "checkpoint.pt", "manifest.json", "log.jsonl"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Order:
    """Which samples each process takes, step by step: a batch sampler.

    An epoch is one permutation of (seed, epoch). Step s takes batch_size samples of it, process r of n the r-th n-th of
    those, so that the batch of a step is the same for any number of processes. What does not fill a batch is dropped.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, rank: int = 0, processes: int = 1) -> None:
        if batch_size % processes:
            raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}")
        if count < batch_size:
            raise ValueError(f"batch_size must be at most the number of pictures ({count}), got {batch_size}")
        self.steps = count // batch_size
        self._count, self._batch, self._seed = count, batch_size, seed
        self._rank, self._share = rank, batch_size // processes
        self._epoch = self._first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """The next pass is this epoch's, from step `first` on."""
        self._epoch, self._first = epoch, first

    def __len__(self) -> int:
        return self.steps - self._first

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        for step in range(self._first, self.steps):
            begin = step * self._batch + self._rank * self._share
            yield order[begin : begin + self._share].tolist()


def train(
    model: nn.Module,
    samples: Dataset[dict[str, Any]],
    out: Path | str,
    *,
    seed: int = 0,
    resume: bool = False,
    accelerator: str = "auto",
    precision: str = "32-true",
    workers: int = 0,
    checkpoint_steps: int | None = None,
    stop_after: int | None = None,
    about: dict[str, Any] | None = None,
) -> list[float]:
    """Train a model as its recipe says.

    The learning rate, the order of the samples and every random draw are functions of (seed, step), so that a training
    that was interrupted and resumed ends with the same bits as one that was not (on a CPU; a GPU's own kernels need
    torch.use_deterministic_algorithms). Under torchrun every process takes its share of each batch.

    Args:
        model: has `config.recipe`, `loss(batch, progress=...)` and `parameter_groups()`.
        samples: a dictionary a picture; `set_epoch(epoch)` is called where there is one.
        out: folder of checkpoint.pt (written at the end of every epoch, complete or not at all), manifest.json,
            log.jsonl (a line a step) and, where tensorboard is installed, its events.
        seed: of everything random, >= 0.
        resume: go on from the checkpoint in `out`, where there is one; its manifest must be of the same settings.
        accelerator: "cpu", "cuda" or "auto".
        precision: "32-true", "bf16-mixed" or "16-mixed".
        workers: processes that read samples; 0 = none but this one.
        checkpoint_steps: also write a checkpoint every so many steps.
        stop_after: end after this step, as if interrupted; resumed with the same number, nothing is left to do.
        about: what else the manifest should say (system, data); compared on resumption, too.

    Returns:
        list[float]: the total loss of the steps done now, the mean over the processes.

    Raises:
        ValueError: an argument outside this contract, or a loss that is no number (with its step).
        FileError: `out` holds another training, or a damaged checkpoint.
    """
    fabric = _fabric(accelerator, precision)
    out, recipe = Path(out), model.config.recipe
    order = Order(len(samples), recipe.batch_size, seed=seed, rank=fabric.global_rank, processes=fabric.world_size)
    steps = recipe.epochs * order.steps
    last = steps if stop_after is None else min(steps, stop_after)
    manifest = {"config": as_dict(model.config), "seed": seed, "precision": precision, **(about or {})}
    state = _start(fabric, out, manifest, resume)
    _seed(seed, 0, 0)
    sgd = optimiser(recipe, model.parameter_groups())
    if state is not None:
        _load(out, model, sgd, fabric, state)
    wrapped, sgd = fabric.setup(model, sgd)
    wrapped.mark_forward_method("loss")
    done = 0 if state is None else int(state["step"])
    loader = DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=fabric.device.type == "cuda",
        worker_init_fn=_one_thread,
    )
    losses: list[float] = []
    with _Log(fabric, out, last, done) as log:
        for epoch in range(done // order.steps, recipe.epochs) if done < last else ():
            order.start(epoch, done - epoch * order.steps)
            if hasattr(samples, "set_epoch"):
                samples.set_epoch(epoch)
            wrapped.train()
            for batch in _batches(loader):
                set_rate(sgd, recipe, done / steps)
                _seed(seed, done + 1, fabric.global_rank)
                terms = wrapped.loss(fabric.to_device(batch), progress=done / steps)
                fabric.backward(terms["total"])
                sgd.step()
                sgd.zero_grad()
                done += 1
                losses.append(log(done, _mean(fabric, terms), sgd.param_groups[0]["lr"]))
                at_end = done % order.steps == 0 or done == last
                if at_end or (checkpoint_steps and done % checkpoint_steps == 0):
                    _save(out, model, sgd, fabric, done)
                if done == last:
                    return losses
    return losses


def _batches(loader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An error of a reading process keeps its reason; torch wraps it in the process's whole traceback."""
    try:
        yield from loader
    except RuntimeError as error:
        found = re.search(r"FileError: (.+)", str(error))
        if found is None:
            raise
        path, _, reason = found[1].partition(": ")
        raise FileError(path, reason) from None


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, anything else in a list."""
    return {
        name: torch.stack([s[name] for s in samples]) if isinstance(value, Tensor) else [s[name] for s in samples]
        for name, value in samples[0].items()
    }


def data_hash(ids: Sequence[str], labels: np.ndarray) -> str:
    """Tells sets of pictures apart by their names and labels."""
    digest = hashlib.sha256("\n".join(ids).encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(labels, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def read_checkpoint(out: Path) -> dict[str, Any]:
    """What `train` wrote: "model" (weights), "step" and the optimiser's state.

    Raises:
        FileError: missing or damaged.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        raise FileError(path, "no checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("model", "optimiser", "precision", "step")}
    except Exception as error:
        raise FileError(path, f"damaged checkpoint ({type(error).__name__})") from None


def _fabric(accelerator: str, precision: str) -> Any:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" not in os.environ:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    strategy = DDPStrategy(process_group_backend="gloo" if accelerator == "cpu" else "nccl")
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def _start(fabric: Any, out: Path, manifest: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from; the manifest is checked or written."""
    manifest = json.loads(json.dumps(manifest))
    path = out / MANIFEST
    state = None
    if path.exists() and not resume:
        raise FileError(out, "holds a training already: resume it, or give another folder")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in manifest if before.get(name) != manifest[name]]
        if changed:
            raise FileError(path, f"the training to resume has another {', '.join(changed)}")
        if (out / CHECKPOINT).exists():
            state = read_checkpoint(out)
    fabric.barrier()
    if fabric.is_global_zero:
        remove_stale(out)
        if not path.exists():
            versions = {
                "wsss-kernels": wsss_kernels.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            }
            manifest |= {"versions": versions, "processes": fabric.world_size, "device": fabric.device.type}
            write_atomically(path, json.dumps(manifest, indent=1).encode())
    fabric.barrier()
    return state


def _seed(seed: int, step: int, rank: int) -> None:
    """Every generator, from where we are: nothing to store, nothing to restore."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002  libraries that a model uses may draw from it
    random.seed(int(words[1]))


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _mean(fabric: Any, terms: dict[str, Tensor]) -> dict[str, float]:
    values = fabric.all_reduce(torch.stack([value.detach().float() for value in terms.values()]), reduce_op="mean")
    return dict(zip(terms, values.tolist(), strict=True))


def _load(out: Path, model: nn.Module, sgd: torch.optim.Optimizer, fabric: Any, state: dict[str, Any]) -> None:
    try:
        model.load_state_dict(state["model"])
        sgd.load_state_dict(state["optimiser"])
        fabric.strategy.precision.load_state_dict(state["precision"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise FileError(out / CHECKPOINT, f"of another model ({str(error).partition(chr(10))[0]})") from None


def _save(out: Path, model: nn.Module, sgd: torch.optim.Optimizer, fabric: Any, step: int) -> None:
    if fabric.is_global_zero:
        buffer = io.BytesIO()
        precision = fabric.strategy.precision.state_dict()
        state = {"model": model.state_dict(), "optimiser": sgd.state_dict(), "precision": precision, "step": step}
        torch.save(state, buffer)
        write_atomically(out / CHECKPOINT, buffer.getvalue())
    fabric.barrier()


class _Log:
    """A progress bar, log.jsonl, TensorBoard where it is installed; all from the first process alone."""

    def __init__(self, fabric: Any, out: Path, steps: int, done: int) -> None:
        self._active, self._board = fabric.is_global_zero, None
        if not self._active:
            return
        path = out / LOG
        if path.exists():  # steps after the checkpoint are done again
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= done]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._progress = Progress(steps, unit="step")
        self._progress.add(done)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
        except ImportError:
            print("no TensorBoard: log.jsonl has the losses (pip install tensorboard)", file=sys.stderr)
        self._time = time.monotonic()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            self._file.close()
            self._progress.__exit__(*error)
            if self._board is not None:
                self._board.close()

    def __call__(self, step: int, terms: dict[str, float], rate: float) -> float:
        if not math.isfinite(terms["total"]):
            raise ValueError(f"the loss must be finite, got {terms} at step {step} (a lower lr may help)")
        if self._active:
            now = time.monotonic()
            line = {"step": step, "lr": rate, "seconds": round(now - self._time, 4), **terms}
            self._time = now
            self._file.write(json.dumps(line) + "\n")
            self._progress.add()
            if self._board is not None:
                for name, value in {**terms, "lr": rate}.items():
                    self._board.add_scalar(name, value, step)
        return terms["total"]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a crash
