"""The runner of CUDA sources on the CPU: what it computes, what it counts, and that it reports every mistake."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch.testing import assert_close

from tests.cuda import runner

pytestmark = pytest.mark.skipif(runner.absence is not None, reason=str(runner.absence))

KERNELS = "tests/cuda/kernels"
orders = pytest.mark.parametrize("order", runner.ORDERS)


@pytest.fixture(scope="module")
def right():
    return runner.build(f"{KERNELS}/right.cu")


@pytest.fixture(scope="module")
def wrong():
    return runner.build(f"{KERNELS}/wrong.cu")


@orders
@pytest.mark.parametrize("blocks, threads, count", [(1, 32, 1), (3, 96, 1000), (40, 256, 20000)])
def test_sum(right, order, blocks, threads, count):
    values = torch.rand(count)
    with right.run(order=order) as gpu:
        sums = gpu.output("sums", (blocks,))
        gpu.call("run_sum", gpu.input("values", values), sums, count, blocks, threads)
        assert_close(sums.tensor().double().sum(), values.double().sum(), rtol=1e-6, atol=0)


@orders
def test_box_filter(right, order):
    image = torch.rand(21, 37)
    with right.run(order=order) as gpu:
        out = gpu.output("out", image.shape)
        gpu.call("run_box_filter", gpu.input("image", image), out, 21, 37)
        assert_close(out.tensor(), torch.nn.functional.avg_pool2d(image[None], 3, 1, padding=1)[0])
        assert gpu.launches == [
            runner.Launch("box_filter", (3, 3, 1), (16, 8, 1), 1, False, 720, 1, 0, 0, 0)
        ]  # fmt: skip


@orders
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_cluster(right, order, cluster, split):
    blocks, threads = 8, 40
    values = torch.rand(blocks // cluster, cluster * threads * 4)
    with right.run(order=order) as gpu:
        out = gpu.output("out", values.shape)
        gpu.call("run_ring", gpu.input("values", values), out, blocks, threads, cluster, split)
        assert_close(out.tensor(), values.roll(1, 1) + values.roll(-1, 1))
        (launch,) = gpu.launches
        assert launch.cluster == cluster and launch.cluster_barriers == 2


@orders
def test_grid(right, order):
    values, steps = torch.rand(1000), 9
    expected = values.clone()
    for _ in range(steps):
        expected[1:-1] = 0.5 * (expected[:-2] + expected[2:])
    with right.run(order=order, sm_count=4) as gpu:
        first, second = gpu.output("first", (1000,)), gpu.output("second", (1000,))
        gpu.call("run_smooth", gpu.input("values", values), first, second, 1000, steps, 7, True)
        assert_close(second.tensor(), expected)
        (launch,) = gpu.launches
        assert launch.cooperative and launch.grid_barriers == steps


@orders
def test_atomics(right, order):
    values = torch.randint(0, 10, (200,), dtype=torch.int32)
    with right.run(order=order, seed=3) as gpu:
        bins = gpu.inout("bins", torch.zeros(10, dtype=torch.int32))
        largest = gpu.inout("largest", torch.full((1,), -1, dtype=torch.int32))
        tickets = gpu.inout("tickets", torch.zeros(7, dtype=torch.int32))
        product = gpu.inout("product", torch.full((1,), 2.0**-100))
        gpu.call("run_histogram", gpu.input("values", values), 200, bins, largest, tickets, product)
        assert_close(bins.tensor(), torch.bincount(values, minlength=10).int())
        assert largest.tensor().item() == values.max()
        assert tickets.tensor().tolist() == [-1] * 6 + [255]
        assert product.tensor().item() == 2.0**100


@pytest.mark.parametrize("name, dtype", [("halves", torch.float16), ("bfloat16s", torch.bfloat16)])
def test_every_bit_pattern(right, name, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    with right.run() as gpu:
        values, rounded = gpu.output("values", (2**16,)), gpu.output("rounded", (2**16,), dtype)
        gpu.call(f"run_convert_{name}", gpu.input("patterns", patterns), values, rounded)
        assert_close(values.tensor(), patterns.float(), rtol=0, atol=0, equal_nan=True)
        back, number = rounded.tensor(), ~patterns.isnan()
        assert_close(back.view(torch.int16)[number], patterns.view(torch.int16)[number], rtol=0, atol=0)
        assert back[~number].isnan().all()


@pytest.mark.parametrize("name, dtype", [("halves", torch.float16), ("bfloat16s", torch.bfloat16)])
def test_rounding(right, name, dtype):
    between = torch.arange(0, 2**15, dtype=torch.int16).view(dtype).float()
    between = between[between.isfinite()]
    ties = (between[1:].double() + between[:-1].double()) / 2
    near = [
        ties.float(),
        torch.nextafter(ties.float(), torch.tensor(0.0)),
        torch.nextafter(ties.float(), torch.tensor(3e38)),
    ]
    random = torch.randint(-(2**31), 2**31 - 1, (100_000,)).int().view(torch.float32)
    values = torch.cat([*near, *(-x for x in near), random, torch.tensor([65504.0, 65519.99, 65520.0, 1e-45, 3e38])])
    values = torch.nn.functional.pad(values, (0, -len(values) % 128))
    with right.run() as gpu:
        rounded = gpu.output("rounded", values.shape, dtype)
        gpu.call(f"run_round_{name}", gpu.input("values", values), rounded, len(values) // 128)
        assert_close(rounded.tensor(), values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_halves_in_pairs(right):
    a, b = torch.randn(2, 64, 2).half()
    with right.run() as gpu:
        product, total = gpu.output("product", a.shape, torch.float16), gpu.output("sum", a.shape)
        gpu.call("run_halves_in_pairs", gpu.input("a", a), gpu.input("b", b), product, total, 64)
        assert_close(product.tensor(), a * b, rtol=0, atol=0)
        assert_close(total.tensor(), a.float() + b.float(), rtol=0, atol=0)


@orders
def test_votes(right, order):
    with right.run(order=order) as gpu:
        told = gpu.output("told", (64, 8), torch.int32)
        gpu.call("run_votes", told)
        told = told.tensor().tolist()
    for rank, row in enumerate(told):
        lane, warp = rank % 32, rank // 32 * 32
        half = range(rank // 16 * 16, rank // 16 * 16 + 16)
        ballot = sum(1 << i for i in range(32) if (warp + i) % 5 == 0)
        shuffled = (rank - 3 if rank % 8 >= 3 else rank) if lane < 16 else rank // 16 * 16 + 1
        assert row == [
            22, 1, 0, ballot - (ballot >> 31 << 32), shuffled, sum(half), (20 in half) + 2 * (rank < 32),
            (rank ^ 1) + 1000 * (rank // 8) + 100000 * 0b10101010,
        ]  # fmt: skip


@orders
def test_parts_of_a_warp_meet(right, order):
    with right.run(order=order) as gpu:
        out = gpu.output("out", (32,), torch.int32)
        gpu.call("run_pairs", out)
        assert out.tensor().tolist() == [10 * (i ^ 1) for i in range(32)]


@orders
def test_waiting_for_another_block(right, order):
    with right.run(order=order) as gpu:
        turn = gpu.inout("turn", torch.zeros(1, dtype=torch.int32))
        gpu.call("run_wait_in_turn", turn, 20)
        assert turn.tensor().item() == 20


def test_memory_moved_by_the_host(right):
    with right.run() as gpu:
        first, second = gpu.output("first", (10,)), gpu.output("second", (10,))
        gpu.call("fill_and_copy", first, second, 40)
        assert second.tensor().tolist() == [0] * 10
        with pytest.raises(runner.CudaError, match="cudaMemsetAsync: cudaErrorInvalidValue"):
            gpu.call("fill_and_copy", first, second, 41)
        with pytest.raises(runner.CudaError, match="cudaMemcpyAsync: cudaErrorInvalidValue"):
            gpu.call("fill_and_copy", first, gpu.input("input", torch.zeros(10)), 40)


def test_many_threads_and_switches(right):
    with right.run(sm_count=200) as gpu:
        start = time.perf_counter()
        gpu.call("run_barriers", 100, 1024, 3)
        gpu.call("run_barriers", 2, 512, 1000)
        seconds = time.perf_counter() - start
    assert seconds < 20, f"{seconds:.1f} s for 1.3 million switches"


SHAPES = {  # x, y, z, threads, shared, cluster, cooperative
    "no blocks": ((0, 1, 1, 32, 0, 1, 0), "cudaErrorInvalidConfiguration"),
    "no threads": ((1, 1, 1, 0, 0, 1, 0), "cudaErrorInvalidConfiguration"),
    "too many threads": ((1, 1, 1, 1025, 0, 1, 0), "cudaErrorInvalidConfiguration"),
    "grid too tall": ((1, 65536, 1, 32, 0, 1, 0), "cudaErrorInvalidConfiguration"),
    "grid too deep": ((1, 1, 65536, 32, 0, 1, 0), "cudaErrorInvalidConfiguration"),
    "shared memory without the opt-in": ((1, 1, 1, 32, 49153, 1, 0), "cudaErrorInvalidValue"),
    "cluster does not divide": ((6, 1, 1, 32, 0, 4, 0), "cudaErrorInvalidClusterSize"),
    "cluster too large": ((16, 1, 1, 32, 0, 16, 0), "cudaErrorInvalidClusterSize"),
    "grid not at once": ((9, 1, 1, 1024, 0, 1, 1), "cudaErrorCooperativeLaunchTooLarge"),
    "right": ((8, 1, 1, 1024, 49152, 1, 1), None),
    "right cluster": ((16, 2, 1, 32, 0, 8, 0), None),
}


@pytest.mark.parametrize("case", SHAPES)
def test_launches_a_device_refuses(right, case):
    shape, error = SHAPES[case]
    with right.run(sm_count=8) as gpu:
        if error is None:
            gpu.call("run_shape", *shape)
            assert len(gpu.launches) == 1
        else:
            with pytest.raises(runner.CudaError, match=f"barriers: {error}$"):
                gpu.call("run_shape", *shape)
            assert gpu.launches == []


def test_what_the_device_has(right):
    with right.run(clusters=False) as gpu, pytest.raises(runner.CudaError, match="cudaErrorNotSupported"):
        gpu.call("run_shape", 2, 1, 1, 32, 0, 2, 0)
    with right.run(cooperative=False) as gpu, pytest.raises(runner.CudaError, match="cudaErrorNotSupported"):
        gpu.call("run_shape", 2, 1, 1, 32, 0, 1, 1)
    with right.run(shared_per_block=99 * 1024) as gpu:
        values, out = gpu.input("values", torch.zeros(16 * 128)), gpu.output("out", (16 * 128,))
        gpu.call("run_large_ring", values, out, 16, 99 * 1024)
        with pytest.raises(runner.CudaError, match="shared: cudaErrorInvalidValue"):
            gpu.call("run_large_ring", values, out, 16, 99 * 1024 + 1)
    with right.run(max_cluster=8) as gpu, pytest.raises(runner.CudaError, match="ring: cudaErrorInvalidClusterSize"):
        gpu.call("run_large_ring", None, None, 16, 0)
    with right.run(registers=128) as gpu:
        for threads, shared, blocks in [(256, 0, 2), (32, 0, 16), (32, 48 * 1024, 4), (32, 99_999, 0)]:
            assert gpu.ask("blocks_a_processor", threads, shared) == blocks
    with pytest.raises(ValueError, match="not cores"), right.run(cores=1):
        pass


def test_an_older_device_has_no_clusters():
    with pytest.raises(RuntimeError, match="this_cluster"):
        runner.build(f"{KERNELS}/right.cu", arch=800)


MISTAKES = {  # what the report must say
    "no_block_barrier": (
        r"race: read of 4 bytes at 'shared memory' \+ \d+ \(of 256 bytes\) without a barrier after its write "
        r"by thread \(\d+,0,0\) of block \(0,0,0\) at wrong.cu:\d+, by thread"
    ),
    "no_barrier_before_next_write": r"race: write of 4 bytes at 'shared memory'.* after its read by thread",
    "no_warp_barrier": "race: read of 4 bytes at 'shared memory'",
    "shuffle_for_barrier": "race: read of 4 bytes at 'shared memory'",
    "barrier_of_other_lanes": "race: read of 4 bytes at 'shared memory'",
    "no_cluster_barrier": "race: read of 4 bytes at 'shared memory'",
    "written_after_arrival": "race: read of 4 bytes at 'shared memory'",
    "no_barrier_at_start": "lifetime: write of 4 bytes of shared memory of block .* it may not have started",
    "no_barrier_at_exit": r"lifetime: (block \(\d,0,0\) exits without|read of .* which has exited)",
    "other_cluster": "map_shared_rank must name a block of the cluster",
    "no_grid_barrier": "race: read of 4 bytes at 'workspace'",
    "grid_barrier_without_launch": "a barrier of the grid needs a cooperative launch",
    "two_writers": r"race: write of 4 bytes at 'out' \+ 0 ",
    "atomic_and_plain": r"race: (write|atomic operation) of 4 bytes at 'workspace' \+ 0 ",
    "past_tensor": (
        r"^out of bounds: read of 4 bytes at 'input' \+ 256 \(of 256 bytes\), by thread \(63,0,0\) of block "
        r"\(0,0,0\), in kernel past_tensor, at wrong.cu:\d+$"
    ),
    "before_tensor": r"out of bounds: read of 4 bytes at 'input' \+ -4 \(of 256 bytes\)",
    "vector_past_tensor": r"out of bounds: write of 16 bytes at 'out' \+ \d+ \(of 256 bytes\)",
    "past_shared": r"out of bounds: write of 4 bytes at 'shared memory' \+ 256 \(of 256 bytes\)",
    "memory_of_the_host": "out of bounds: read of 4 bytes at address .* no memory of the device",
    "index_of_array": "out of bounds: index 4 of an array",
    "unwritten_shared": r"uninitialised: read of 4 bytes at 'shared memory' \+ 28 .* thread \(7,0,0\)",
    "unwritten_workspace": "uninitialised: read of 4 bytes at 'workspace'",
    "copied_past_tensor": r"out of bounds: read of 260 bytes at 'input' \+ 0 \(of 256 bytes\)",
    "divergent_block_barrier": (
        r"of block \(0,0,0\) 63 wait at __syncthreads \(first: thread \(0,0,0\)\), 1 exited "
        r"\(first: thread \(5,0,0\)\)"
    ),
    "two_kinds_of_barrier": "divergent barrier: one __syncthreads has met another kind",
    "divergent_warp_barrier": "divergent barrier: of block .* 32 wait at __syncthreads .* 32 wait for lanes",
    "divergent_grid_barrier": "divergent barrier: of block .* 64 wait at the grid's barrier",
    "divergent_cluster_barrier": "divergent barrier: of block .* 64 wait at the cluster's barrier",
    "endless_wait": "divergent barrier: threads spin and nobody gets on",
    "mask_without_itself": "a warp operation's mask must name the calling lane.* at wrong.cu",
    "misaligned_vector": "misaligned: access as .*float4.* at an address that is 4 modulo 16.*wrong.cu",
    "write_to_input": r"write of 4 bytes to the input 'input' \+ \d+",
    "integer_overflow": r"undefined: signed overflow of \+",
}
BLOCKS = {
    "no_cluster_barrier": 2,
    "written_after_arrival": 2,
    "no_barrier_at_start": 2,
    "no_barrier_at_exit": 2,
    "other_cluster": 4,
    "no_grid_barrier": 2,
    "two_writers": 2,
    "atomic_and_plain": 2,
    "divergent_grid_barrier": 2,
    "divergent_cluster_barrier": 2,
}  # else 1


def run_wrong(gpu, name, blocks=1, threads=64, count=None):
    count = count or blocks * threads
    out = gpu.output("out", (count,))
    workspace = None if name == "memory_of_the_host" else gpu.workspace(4 * count)
    gpu.call("run_wrong", name.encode(), gpu.input("input", torch.ones(count)), out, workspace, count, blocks, threads)
    return out


@orders
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(wrong, name, order):
    with wrong.run(order=order) as gpu:
        with pytest.raises(runner.Fault) as fault:
            run_wrong(gpu, name, BLOCKS.get(name, 1))
        assert re.search(MISTAKES[name], str(fault.value), re.MULTILINE), fault.value
        assert str(fault.value).count("\n") < 8 and f"kernel {name}" in str(fault.value)
        gpu.check()  # told once


def test_shuffle_from_a_lane_that_is_not_there(wrong):
    with wrong.run() as gpu, pytest.raises(runner.Fault, match="reads from a lane that takes no part"):
        run_wrong(gpu, "lane_that_is_not_there", threads=24)


def test_unwritten_output(wrong):
    with wrong.run() as gpu:
        out = run_wrong(gpu, "unwritten_output")
        with pytest.raises(runner.Fault, match="unwritten: 4 of 256 bytes of 'out', the first in element 3"):
            out.tensor()


@pytest.mark.parametrize("source", [*runner.ENGINE, *(runner.ROOT / KERNELS).glob("*.cu")], ids=lambda path: path.name)
def test_compiles_without_warnings(source):
    assert runner.warnings_of(source) == ""
