"""A memory of class prototypes from earlier images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from wsss_kernels import _check

GATHER = ("own", "all")
STATE = ("entries", "lengths", "heads")


class MemoryBank(torch.nn.Module):
    """For each class the last `capacity` prototypes, first in first out.

    Sizes never depend on the data, so nothing waits for the device: `pull` always gives num_classes * capacity entries
    and says by a mask which hold something. The contents move with `to` and are in the state_dict, but are no buffers:
    DistributedDataParallel, which copies the first process's buffers over the others', leaves them alone.

    Args:
        num_classes: with the background, class 0.
        dim: channels of a prototype.
        capacity: entries a class; published: 64.
        gather: under torch.distributed, "own": each process keeps what it pushes; "all": every process keeps what all
            push, in the order of their ranks, so that all memories stay equal (every process must push as many times;
            numbers of prototypes may differ, which costs one exchange of sizes that waits for the device).

    Source: Fan and Zhang, Memory-based Cross-image Contexts, TPAMI 2022; there every process worked with the memory of
    the first, whose buffers were broadcast.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> bank = wk.MemoryBank(num_classes=3, dim=2, capacity=4)
        >>> bank.push(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 2]))
        >>> memory, class_ids, mask = bank.pull(torch.tensor([[1.0, 1.0, 0.0]]))  # class 2 is not in this image
        >>> memory.shape, mask.nonzero().tolist()
        (torch.Size([12, 2]), [[0, 0]])
    """

    entries: Tensor  # [num_classes, capacity, dim]
    lengths: Tensor  # [num_classes] entries in use
    heads: Tensor  # [num_classes] where the next one goes

    def __init__(self, num_classes: int, dim: int, capacity: int = 64, *, gather: str = "own") -> None:
        super().__init__()
        self.num_classes = _check.whole("num_classes", num_classes, "a whole number >= 1", least=1)
        self.dim = _check.whole("dim", dim, "a whole number >= 1 (channels)", least=1)
        self.capacity = _check.whole("capacity", capacity, "a whole number >= 1 (entries a class)", least=1)
        _check.choice("gather", gather, GATHER)
        self.gather = gather
        self.entries = torch.zeros(num_classes, capacity, dim)
        self.lengths = torch.zeros(num_classes, dtype=torch.int64)
        self.heads = torch.zeros(num_classes, dtype=torch.int64)

    @torch.no_grad()
    def push(self, prototypes: Tensor, class_ids: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Put prototypes at the end of their classes' queues; the oldest fall out.

        Where one call brings more than `capacity` of a class, a random subset of them stays.

        Args:
            prototypes: [n, dim] floating point; a constant, kept in the dtype of the memory.
            class_ids: [n] integers; a row whose id is outside 0..num_classes-1 is left out (such as -1 for a class
                without confident pixels, which needs no host to sort out).
            generator: of the random subset, on the device of prototypes.

        Raises:
            TypeError, ValueError: an argument outside this contract, named.
        """
        _check.tensor("prototypes", prototypes, "n dim")
        if prototypes.shape[1] != self.dim:
            raise ValueError(f"prototypes must be [n, {self.dim}], got {_check.describe(prototypes)}")
        contract = f"an integer tensor [n] = [{prototypes.shape[0]}]"
        if not isinstance(class_ids, Tensor) or class_ids.is_floating_point() or class_ids.dtype == torch.bool:
            raise TypeError(f"class_ids must be {contract}, got {_check.describe(class_ids)}")
        if class_ids.shape != prototypes.shape[:1]:
            raise ValueError(f"class_ids must be {contract}, got {_check.describe(class_ids)}")
        _check.same_device("entries", self.entries, "prototypes", prototypes)
        _check.same_device("entries", self.entries, "class_ids", class_ids)
        rows, ids = prototypes.detach().to(self.entries.dtype), class_ids.long()
        order = torch.rand(len(ids), device=rows.device, generator=generator)
        if self.gather == "all" and torch.distributed.is_available() and torch.distributed.is_initialized():
            rows, ids, order = _of_all_ranks(rows, ids, order)
        if len(ids):
            self._append(rows, ids, order)

    def _append(self, rows: Tensor, ids: Tensor, order: Tensor) -> None:
        known = (ids >= 0) & (ids < self.num_classes)
        ids = torch.where(known, ids, 0)
        member = torch.nn.functional.one_hot(ids, self.num_classes) * known[:, None]  # [n, num_classes]
        # The capacity rows of a class that come first in the random order; with fewer rows than that, all.
        drawn = torch.argsort(order)
        rank = torch.empty_like(drawn).scatter_(0, drawn, (member[drawn].cumsum(0).gather(1, ids[drawn, None]))[:, 0])
        stays = known & (rank <= self.capacity)
        member = member * stays[:, None]
        place = (member.cumsum(0).gather(1, ids[:, None])[:, 0] - 1 + self.heads[ids]) % self.capacity
        # Rows that do not stay go to a slot past the end.
        slot = torch.where(stays, ids * self.capacity + place, self.num_classes * self.capacity)
        spare = torch.cat([self.entries.flatten(0, 1), self.entries.new_zeros(1, self.dim)])
        self.entries.copy_(spare.index_copy_(0, slot, rows)[:-1].view_as(self.entries))
        count = member.sum(0)
        self.lengths.copy_((self.lengths + count).clamp(max=self.capacity))
        self.heads.copy_((self.heads + count) % self.capacity)

    @torch.no_grad()
    def pull(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The memory and what each image may use of it.

        Args:
            labels: [B, num_classes], above 0 where a class is in the image; any real dtype or bool. The background is
                there only where its label, the first, says so.

        Returns:
            memory [M, dim], class_ids [M] int64 and mask [B, M] bool with M = num_classes * capacity always: entry m
            is of class m // capacity, and may be used where its slot is filled and its class in the image. The memory
            is a copy: a later push does not change it.

        Raises:
            TypeError, ValueError: labels outside this contract.
        """
        contract = f"a real tensor [B, {self.num_classes}]"
        if not isinstance(labels, Tensor) or labels.is_complex():
            raise TypeError(f"labels must be {contract}, got {_check.describe(labels)}")
        if labels.dim() != 2 or labels.shape[1] != self.num_classes:
            raise ValueError(f"labels must be {contract}, got {_check.describe(labels)}")
        _check.same_device("entries", self.entries, "labels", labels)
        slots = torch.arange(self.capacity, device=labels.device)
        filled = slots < self.lengths[:, None]  # [num_classes, capacity]
        class_ids = torch.arange(self.num_classes, device=labels.device).repeat_interleave(self.capacity)
        mask = (labels > 0)[:, :, None] & filled
        return self.entries.flatten(0, 1).clone(), class_ids, mask.flatten(1)

    def extra_repr(self) -> str:
        sizes = f"num_classes={self.num_classes}, dim={self.dim}, capacity={self.capacity}"
        return f"{sizes}, gather={self.gather!r}"

    # The contents are no buffers: DistributedDataParallel copies those of the first process over all others.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        super()._apply(fn, recurse)
        for name in STATE:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: getattr(self, name) for name in STATE})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {prefix + name: getattr(self, name) for name in STATE}
        others = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in own if key not in state_dict and strict)
        for key, mine in own.items():
            if key not in state_dict:
                continue
            if state_dict[key].shape != mine.shape:
                error_msgs.append(f"{key} must be of shape {list(mine.shape)}, got {list(state_dict[key].shape)}")
            else:
                mine.copy_(state_dict[key])


def _of_all_ranks(rows: Tensor, ids: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What every process brings, rank by rank: filled up to the most that one brings with rows of no class."""
    ranks = torch.distributed.get_world_size()
    most = torch.tensor([len(ids)], device=rows.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    missing = int(most) - len(ids)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    order = torch.nn.functional.pad(order, (0, missing))
    gathered = []
    for tensor in (rows, ids, order):
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        gathered.append(torch.cat(parts))
    return gathered[0], gathered[1], gathered[2]
