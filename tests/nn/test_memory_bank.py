"""MemoryBank: against queues in plain Python, its randomness, its state, and two processes under DDP."""

import collections
import copy
import os

import pytest
import torch
import torch.distributed
import torch.multiprocessing

import wsss_kernels as wk


def contents(bank):
    """The prototypes of each class, oldest first."""
    queues = []
    for entries, length, head in zip(bank.entries, bank.lengths.tolist(), bank.heads.tolist(), strict=True):
        places = [(head - length + i) % bank.capacity for i in range(length)]
        queues.append([entries[place].tolist() for place in places])
    return queues


def test_queues_of_plain_python():
    bank = wk.MemoryBank(4, 2, capacity=5)
    queues = [collections.deque(maxlen=5) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        count = int(torch.randint(0, 6, (), generator=generator))
        rows, ids = torch.rand(count, 2, generator=generator), torch.randint(-1, 5, (count,), generator=generator)
        bank.push(rows, ids)
        for row, number in zip(rows.tolist(), ids.tolist(), strict=True):
            if 0 <= number < 4:
                queues[number].append(row)
        assert contents(bank) == [list(queue) for queue in queues]
    memory, class_ids, mask = bank.pull(torch.tensor([[1, 0, 1, 0], [0.0, 0.0, 0.0, 0.0]]))
    assert memory.shape == (20, 2) and class_ids.tolist() == [m // 5 for m in range(20)]
    filled = [m % 5 < len(queues[m // 5]) for m in range(20)]
    assert mask.tolist() == [[f and m // 5 in (0, 2) for m, f in enumerate(filled)], [False] * 20]
    assert sorted(memory[mask[0]].tolist()) == sorted(row for c in (0, 2) for row in queues[c])


def test_more_than_capacity_is_a_random_subset():
    rows, ids = torch.arange(30.0)[:, None], torch.arange(30) % 2
    kept = []
    for seed in range(40):
        bank = wk.MemoryBank(2, 1, capacity=4)
        bank.push(rows, ids, generator=torch.Generator().manual_seed(seed))
        queues = contents(bank)
        assert [len(queue) for queue in queues] == [4, 4]
        for c, queue in enumerate(queues):
            values = [int(row[0]) for row in queue]
            assert len(set(values)) == 4 and all(value % 2 == c for value in values) and values == sorted(values)
        kept.append(tuple(int(row[0]) for queue in queues for row in queue))
    assert len(set(kept)) > 30  # of 1365^2
    assert {value for rows in kept for value in rows} == set(range(30))
    again = wk.MemoryBank(2, 1, capacity=4)
    again.push(rows, ids, generator=torch.Generator().manual_seed(0))
    assert tuple(int(row[0]) for queue in contents(again) for row in queue) == kept[0]


def test_pulled_memory_is_a_copy_and_empty_memory_attends_to_nothing():
    bank = wk.MemoryBank(3, 4, capacity=2)
    memory, _, mask = bank.pull(torch.ones(2, 3))
    assert not mask.any()
    out = wk.cross_image_attention(torch.randn(2, 1, 5, 4), memory[None], memory[None], mask=mask)
    assert out.abs().max() == 0
    bank.push(torch.ones(1, 4), torch.tensor([1]))
    assert memory.abs().max() == 0 and bank.pull(torch.ones(1, 3))[0].sum() == 4


def test_state_moves_saves_and_loads():
    bank = wk.MemoryBank(3, 2, capacity=2)
    bank.push(torch.rand(3, 2), torch.tensor([0, 0, 2]))
    assert list(bank.buffers()) == [] and set(bank.state_dict()) == {"entries", "lengths", "heads"}
    model, other = torch.nn.Sequential(bank), torch.nn.Sequential(wk.MemoryBank(3, 2, capacity=2))
    other.load_state_dict(model.state_dict())
    assert contents(other[0]) == contents(bank)
    other[0].push(torch.rand(1, 2), torch.tensor([1]))
    assert bank.lengths.tolist() == [2, 0, 1] and other[0].lengths.tolist() == [2, 1, 1]
    assert contents(copy.deepcopy(bank)) == contents(bank)
    assert bank.double().entries.dtype == torch.float64 and bank.lengths.dtype == torch.int64
    with pytest.raises(RuntimeError, match=r"entries must be of shape \[3, 2, 2\]"):
        bank.load_state_dict(wk.MemoryBank(3, 2, capacity=3).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        bank.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        bank.load_state_dict({**bank.state_dict(), "tail": torch.zeros(1)})


def test_fullgraph():
    bank = wk.MemoryBank(3, 2, capacity=2)
    compiled = torch.compile(bank.push, fullgraph=True, backend="eager")
    compiled(torch.ones(2, 2), torch.tensor([0, 2]))
    assert bank.lengths.tolist() == [1, 0, 1]


def _in_process(rank, file, results, gather):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = wk.MemoryBank(3, 2, capacity=4, gather=gather)
            self.layer = torch.nn.Linear(2, 2)
            self.register_buffer("counter", torch.full((), float(rank)))

        def forward(self, x, ids):
            y = self.layer(x)
            self.bank.push(x, ids)
            return y

    model = torch.nn.parallel.DistributedDataParallel(Model())
    for step in range(3):
        count = 1 + rank * step  # in step 0 as many on both, then more on the second
        x = torch.full((count, 2), 10.0 * rank + step)
        model(x, torch.full((count,), rank)).sum().backward()
    inner = model.module
    torch.save((inner.counter, inner.bank.state_dict()), f"{results}.{rank}")
    # A wrapped model never lets go of its group, destroyed or not. Its threads may still hold tensors of the last
    # collective, and one that frees them while the interpreter ends aborts the process: end without that.
    os._exit(0)


@pytest.mark.parametrize("gather", ["own", "all"])
def test_two_processes(tmp_path, gather):
    torch.multiprocessing.spawn(_in_process, (tmp_path / "meeting", tmp_path / "result", gather), nprocs=2)
    found = [torch.load(tmp_path / f"result.{rank}") for rank in range(2)]
    assert found[1][0] == 0  # an ordinary buffer was overwritten by the first process
    banks = [wk.MemoryBank(3, 2, capacity=4) for _ in range(2)]
    for bank, (_, state) in zip(banks, found, strict=True):
        bank.load_state_dict(state)
    first = [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    second = [[11.0, 11.0], *[[12.0, 12.0]] * 3]  # 1 + 2 + 3 in a queue of 4
    if gather == "own":
        assert contents(banks[0]) == [first, [], []] and contents(banks[1]) == [[], second, []]
    else:
        assert contents(banks[0]) == contents(banks[1]) == [first, second, []]


@pytest.mark.parametrize(
    "rows, ids, failure, words",
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ValueError, r"prototypes must be \[n, 2\]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), ValueError, "prototypes must be a floating point"),
        (torch.zeros(2, 2).long(), torch.zeros(2, dtype=torch.int64), TypeError, "prototypes must be a floating"),
        (torch.zeros(2, 2), torch.zeros(2), TypeError, "class_ids must be an integer tensor"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), ValueError, "class_ids must be an integer tensor"),
    ],
)
def test_bad_pushes(rows, ids, failure, words):
    with pytest.raises(failure, match=words):
        wk.MemoryBank(3, 2).push(rows, ids)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"labels must be a real tensor \[B, 3\]"):
        wk.MemoryBank(3, 2).pull(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="labels must be a real tensor"):
        wk.MemoryBank(3, 2).pull([1, 0, 1])
    for arguments in ((0, 2), (3, 0), (3, 2, 0)):
        with pytest.raises(ValueError, match="must be a whole number >= 1"):
            wk.MemoryBank(*arguments)
    with pytest.raises(ValueError, match="gather must be one of 'own', 'all'"):
        wk.MemoryBank(3, 2, gather="mean")
