"""Comm: each operation gives what it says, on every axis, and counts what it moved."""

import time

import pytest
import torch

from labkit import Layout, run
from labkit.comm import Comm
from labkit.launch.local import RankError


def every_operation(comm: Comm) -> dict:
    n, i = comm.world_size, comm.rank
    comm.phase = "decode"
    x = torch.arange(4.0) + 10 * i
    out = {
        "all_reduce": comm.all_reduce(x.clone(), what="a"),
        "all_gather": comm.all_gather(x, what="b"),
        "reduce_scatter": comm.reduce_scatter(torch.arange(2.0 * n) + i, what="c"),
        "broadcast": comm.broadcast(x.clone(), 1, what="d"),
        # rank i sends j rows to rank j, so it receives i rows from each; rank 0 gets none
        "all_to_all": comm.all_to_all(torch.full((n * (n - 1) // 2, 2), float(i)), list(range(n)), [i] * n, what="e"),
    }
    if i == 0:
        comm.send(x, 1, what="f")
    if i == 1:
        out["recv"] = comm.recv(torch.empty(4), 0, what="f")
    comm.flush()
    out["tallies"] = {
        (op, what): (t.calls, t.payload_bytes, t.wire_bytes) for (op, _, _, what), t in comm.tallies.items()
    }
    return out


@pytest.mark.parametrize("n", [2, 3])
def test_operations_and_their_bytes(n: int) -> None:
    ranks = run(every_operation, ranks=n)
    inputs = [torch.arange(4.0) + 10 * i for i in range(n)]
    for i, out in enumerate(ranks):
        assert torch.equal(out["all_reduce"], sum(inputs))
        assert torch.equal(out["all_gather"], torch.stack(inputs))
        total = sum(torch.arange(2.0 * n) + r for r in range(n))
        assert torch.equal(out["reduce_scatter"], total[2 * i : 2 * i + 2])
        assert torch.equal(out["broadcast"], inputs[1])
        assert out["all_to_all"][:, 0].tolist() == [float(r) for r in range(n) for _ in range(i)]
        rows = n * (n - 1) // 2
        expected = {
            ("all_reduce", "a"): (1, 16, 2 * (n - 1) * 16 // n),
            ("all_gather", "b"): (1, 16, (n - 1) * 16),
            ("reduce_scatter", "c"): (1, 8 * n, (n - 1) * 8),
            ("broadcast", "d"): (1, 16, 16 if i == 1 else 0),
            ("all_to_all", "e"): (1, rows * 8, (rows - i) * 8),
        }
        if i < 2:
            expected["send", "f"] = (1, 16, 16) if i == 0 else (0, 0, 0)
        assert out["tallies"] == expected
    assert torch.equal(ranks[1]["recv"], inputs[0])


def along_axes(comm: Comm) -> dict:
    return {
        axis: comm.all_gather(torch.tensor([comm.rank]), axis).flatten().tolist()
        for axis in ("tp", "pp", "dp", "ep", "world")
    }


def test_axes_are_those_of_the_layout() -> None:
    layout = Layout(tp=2, pp=2, dp=2, expert_parallel=True)
    for rank, seen in enumerate(run(along_axes, layout=layout)):
        assert seen == {axis: layout.peers(rank, axis) for axis in ("tp", "pp", "dp", "ep", "world")}


def alone(comm: Comm) -> tuple:
    x = torch.ones(3)
    same = comm.all_reduce(x, "tp") is x and comm.broadcast(x, 0, "tp") is x
    return same, comm.all_gather(x, "tp").shape, len(comm.tallies)


def test_a_group_of_one_moves_and_counts_nothing() -> None:
    assert run(alone, layout=Layout(pp=2)) == [(True, (1, 3), 0)] * 2


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize(("send", "receive"), [([2, 2], [1, 1]), ([3], [3]), ([4, -1], [1, 1])])
def test_rows_that_do_not_add_up_are_refused_before_anything_is_read(
    send: list, receive: list, shared_memory: bool
) -> None:
    def exchange(comm: Comm) -> None:
        comm.all_to_all(torch.ones(3, 2), send, receive)

    with pytest.raises(RankError, match=r"all_to_all of 3 rows over 2 ranks: send_rows=.* must be 2 numbers"):
        run(exchange, 2, shared_memory=shared_memory)


def reductions_in_many_dtypes(comm: Comm) -> list[torch.Tensor]:
    torch.manual_seed(comm.rank)
    sizes = [1, 7, 576, 4097]
    return [
        comm.all_reduce(torch.randn(n).to(dtype))
        for n in sizes
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]


def test_an_all_reduce_has_the_same_bits_on_every_rank() -> None:
    ranks = run(reductions_in_many_dtypes, ranks=3)
    for others in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0], others, strict=True))


@pytest.mark.parametrize("axis", ["world", "tp"])
def test_a_message_that_never_comes_is_a_time_out(axis: str) -> None:
    def waits(comm: Comm) -> None:
        if comm.rank == 0:
            comm.recv(torch.zeros(3), 1, axis, "news")
        time.sleep(20)

    with pytest.raises(RankError, match=f"recv of news on axis {axis} .* failed after 1.. s with rank"):
        run(waits, 2, collective_timeout=1)
