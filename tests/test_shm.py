"""Shared memory between real ranks: the same results as gloo, the same bits everywhere, clear errors, nothing left behind."""

import os
import random
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch

from labkit import run
from labkit.comm import Comm, CommError
from labkit.launch.local import RankError, RankGroup
from labkit.mesh import Layout
from labkit.shm import DTYPES, SLOT, library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler when labkit was installed, or not Linux")


def ones(dtype: torch.dtype, *shape: int, seed: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    return x.to(dtype)


def digests_of_random_all_reduces(comm: Comm, calls: int, seed: int) -> list[int]:
    """A CRC of the bits of each result; sizes and dtypes differ from call to call, values from rank to rank."""
    rng, out = random.Random(seed), []
    for call in range(calls):
        dtype = rng.choice(DTYPES)
        largest = 4 * SLOT if call % 100 == 0 else 5000
        x = ones(dtype, rng.randrange(1, largest), seed=call * 100 + comm.rank)
        out.append(zlib.crc32(comm.all_reduce(x).view(torch.uint8).numpy()))
    return out


@pytest.mark.parametrize(("ranks", "calls"), [(2, 4000), (3, 3000), (4, 3000)])
def test_an_all_reduce_leaves_the_same_bits_on_every_rank(ranks: int, calls: int) -> None:
    first, *others = run(digests_of_random_all_reduces, ranks, args=(calls, ranks), timeout=300)
    assert len(set(first)) > calls * 0.99  # they are not all alike for another reason
    assert all(other == first for other in others)


def test_sums_are_taken_in_rank_order_in_at_least_float32() -> None:
    def sums(comm: Comm) -> bool:
        for dtype in DTYPES:
            for n in (1, 7, 5000, SLOT // dtype.itemsize + 3):
                parts = [ones(dtype, n, seed=r) for r in range(comm.world_size)]
                wide = torch.float32 if dtype is torch.bfloat16 else dtype
                right = sum((p.to(wide) for p in parts[1:]), parts[0].to(wide)).to(dtype)
                if not torch.equal(comm.all_reduce(parts[comm.rank].clone()), right):
                    return False
        return True

    assert all(run(sums, 3))


def all_operations(comm: Comm) -> list[torch.Tensor]:
    """Small and long messages, even and uneven, empty rows and columns."""
    n, me, out = comm.world_size, comm.rank, []
    for size in (1, 1000, SLOT // 2 + 5):
        out.append(comm.all_gather(ones(torch.float32, size, 2, seed=me)))
        out.append(comm.reduce_scatter(ones(torch.int64, n * size, 3, seed=me)))
        out.append(comm.all_reduce(ones(torch.int32, size, seed=me)))
        out.append(comm.broadcast(ones(torch.float16, size, 2, seed=me), size % n))
        send = [(me + 2 * r) % 3 * size for r in range(n)]
        recv = [(r + 2 * me) % 3 * size for r in range(n)]
        out.append(comm.all_to_all(ones(torch.bfloat16, sum(send), 2, seed=me), send, recv))
    out.append(comm.all_gather(torch.zeros(0)))
    out.append(comm.all_to_all(torch.zeros(0, 4), [0] * n, [0] * n))
    return out


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_operation_gives_what_gloo_gives(ranks: int) -> None:
    ours = run(all_operations, ranks)
    theirs = run(all_operations, ranks, shared_memory=False)
    for mine, gloos in zip(ours, theirs, strict=True):
        assert len(mine) == len(gloos)
        assert all(torch.equal(a, b) for a, b in zip(mine, gloos, strict=True))


def test_each_axis_has_its_own_memory_and_counts_as_before() -> None:
    def on_axes(comm: Comm) -> tuple:
        sums = [comm.all_reduce(torch.tensor([float(comm.rank)]), axis).item() for axis in ("tp", "pp", "world")]
        return sorted(comm.shared), sums, {key[1]: tally.calls for key, tally in comm.tallies.items()}

    axes, sums, calls = run(on_axes, layout=Layout(tp=2, pp=2))[3]
    assert axes == ["pp", "tp", "world"]
    assert sums == [2 + 3, 1 + 3, 6]
    assert calls == {"tp": 1, "pp": 1, "world": 1}
    assert run(on_axes, layout=Layout(tp=2, pp=2), shared_memory=False)[3][0] == []


def test_other_dtypes_and_strided_tensors_go_through_gloo() -> None:
    def odd(comm: Comm) -> tuple[float, bool]:
        half = comm.all_reduce(torch.ones(8, dtype=torch.float16)).sum().item()
        flags = comm.all_gather(torch.tensor([comm.rank == 1]))
        return half, flags[1].item() and not flags[0].item()

    assert run(odd, 2) == [(16.0, True)] * 2


def test_different_operations_are_named() -> None:
    def differ(comm: Comm) -> str:
        try:
            if comm.rank:
                comm.all_gather(torch.zeros(10))
            else:
                comm.all_reduce(torch.zeros(3))
        except CommError as error:
            return str(error)
        return ""

    first, second = run(differ, 2)
    assert "rank 1 is in another operation: all_gather of 40 bytes" in first
    assert "rank 0 is in another operation: all_reduce of 12 bytes" in second


def test_rows_that_do_not_match_are_named() -> None:
    def mismatch(comm: Comm) -> str:
        try:
            comm.all_to_all(torch.zeros(4, 2), [2, 2], [2, 2] if comm.rank else [2, 1])
        except CommError as error:
            return str(error)
        return ""

    assert "rank 1 is in another operation" in run(mismatch, 2)[0]


def test_a_missing_rank_is_a_time_out_that_names_it() -> None:
    def alone(comm: Comm) -> None:
        if comm.rank == 0:
            comm.all_reduce(torch.zeros(3), what="scores")
        time.sleep(30)

    with pytest.raises(RankError, match=r"all_reduce of scores .*Timed out waiting 1 s for rank 1"):
        run(alone, 2, collective_timeout=1)


def segments() -> set[str]:
    return {str(p) for folder in ("/dev/shm", "/tmp") for p in Path(folder).glob("*labkit*")}


def test_a_killed_rank_is_reported_at_once_and_leaves_nothing() -> None:
    def spin(comm: Comm, channel: object) -> None:
        if comm.rank == 1:
            time.sleep(60)
        comm.all_reduce(torch.zeros(3))

    before = segments()
    group = RankGroup(spin, 2, collective_timeout=30)
    pids = group.pids
    time.sleep(0.3)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 was killed by SIGKILL"):
        group.receive(20)
    assert time.monotonic() - began < 10
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert segments() <= before
