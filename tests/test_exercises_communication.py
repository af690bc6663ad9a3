"""The exercises on communication: other right ways, dearer ways, and mistakes that tests/misconceptions doesn't have."""

import time

import pytest
import torch

from labkit.lab import check as checking
from labkit.lab.check import check
from labkit.lab.exercises import EXERCISES, memory

SEED = 4


def said(name, fn):
    result = check(name, fn, seed=SEED)
    assert (result.status, result.points) == ("not yet", 0), result
    return result.message


def named(name, part):
    """The misconceptions of an exercise whose name holds `part`, by name."""
    found = {m.name for m in EXERCISES[f"communication.{name}"].misconceptions if part in m.name}
    assert len(found) == 1, found
    return found.pop()


# -- the ring ----------------------------------------------------------------------------------------------------------


def ring(*, first=0, ceil=False, gather="copy", slip=0, rest="kept"):
    """A ring all-reduce for real ranks, right as it stands, wrong in the way that is asked for."""

    def fn(x, comm):
        n, r = comm.world_size, comm.rank
        whole = x[: len(x) // n * n] if rest != "kept" else x
        chunks = list(whole.clone().split(-(-len(whole) // n)) if ceil else whole.clone().tensor_split(n))

        def exchange(at):
            comm.send(chunks[at % n], (r + 1) % n)
            return comm.recv(torch.empty_like(chunks[(at - 1) % n]), (r - 1) % n)

        for at in range(r + first, r + first - n + 1, -1):
            got = exchange(at)
            chunks[(at - 1) % n] = chunks[(at - 1) % n] + got
        complete = r + first + 1
        for at in range(complete + slip, complete + slip - n + 1, -1) if gather != "skip" else ():
            got = exchange(at)
            chunks[(at - 1) % n] = chunks[(at - 1) % n] + got if gather == "add" else got
        return torch.cat([*chunks, x[len(whole) :]])

    return fn


def padded(x, comm):
    """Equal chunks, the last one padded; reduced in place, in one buffer."""
    n, r = comm.world_size, comm.rank
    size = -(-len(x) // n)
    work = torch.cat([x, x.new_zeros(n * size - len(x))]).view(n, size)
    for step in range(2 * (n - 1)):
        comm.send(work[(r - step) % n], (r + 1) % n)
        got = comm.recv(torch.empty(size), (r - 1) % n)
        work[(r - step - 1) % n] = got + (work[(r - step - 1) % n] if step < n - 1 else 0)
    return work.view(-1)[: len(x)]


def whole_round(x, comm, *, buffer=None):
    n, total, moving = comm.world_size, x.clone(), x if buffer is None else x.clone()
    for _ in range(n - 1):
        comm.send(moving, (comm.rank + 1) % n)
        got = comm.recv(moving if buffer else torch.empty_like(x), (comm.rank - 1) % n)
        total = total + got
        moving = got
    return total


@pytest.mark.parametrize(
    "fn", [ring(), ring(ceil=True), ring(first=-1), padded], ids=["even", "ceil", "first", "padded"]
)
def test_any_ring_passes(fn):
    result = check("communication.ring_all_reduce", fn, seed=SEED)
    assert (result.status, result.points) == ("passed", 3), result


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (ring(gather="skip", ceil=True, first=-1), "stops after the reduce-scatter"),
        (ring(slip=-1, first=-1), "replaces chunks"),
        (ring(gather="add", ceil=True), "the second phase adds"),
        (ring(rest="own"), "the remainder is dropped"),
    ],
)  # fmt: skip
def test_a_ring_that_is_cut_or_begun_otherwise_and_wrong_is_told_by_name(fn, name):
    assert f"That is what you get when {named('ring_all_reduce', name)}" in said("communication.ring_all_reduce", fn)


def test_a_right_sum_by_dearer_ways_is_told_what_was_counted():
    whole = said("communication.ring_all_reduce", whole_round)
    assert (
        "with 4 ranks one of them sent" in whole and "3.00x the payload. That is the whole tensor sent round" in whole
    )
    assert "it is 2 (n - 1) / n = 1.50x" in whole

    def through_rank_0(x, comm):
        others = range(1, comm.world_size)
        if comm.rank:
            comm.send(x, 0)
            return comm.recv(torch.empty_like(x), 0)
        total = x + sum(comm.recv(torch.empty_like(x), rank) for rank in others)
        for rank in others:
            comm.send(total, rank)
        return total

    assert "made 1 send(s). A ring has 2 (n - 1) = 6 steps" in said("communication.ring_all_reduce", through_rank_0)
    by_comm = said("communication.ring_all_reduce", lambda x, comm: comm.all_reduce(x))
    assert "the sum is right, but comm.all_reduce made it" in by_comm

    def past_comm(x, comm):
        torch.distributed.all_reduce(x)
        return x

    assert "comm counted nothing" in said("communication.ring_all_reduce", past_comm)


def test_a_tensor_that_is_changed_while_it_is_sent_is_told():
    for _ in range(3):  # a race, but rank 0 starts late enough to lose it
        one_buffer = said("communication.ring_all_reduce", lambda x, comm: whole_round(x, comm, buffer=True))
        assert "changed after it had been handed to comm.send, and before it had left" in one_buffer

    def at_once(x, comm):
        comm.send(x, (comm.rank + 1) % comm.world_size)
        x.zero_()
        return comm.recv(torch.empty_like(x), (comm.rank - 1) % comm.world_size)

    assert "Receive into another tensor, or send a clone" in said("communication.deadlock_c", at_once)


def test_a_send_that_waits_hangs_when_all_send_first(monkeypatch):
    monkeypatch.setattr(checking, "TIMEOUT", 4.0)

    def blocking(x, comm):
        n = comm.world_size
        torch.distributed.send(x, (comm.rank + 1) % n)
        torch.distributed.recv(x, (comm.rank - 1) % n)
        return x

    result = check("communication.ring_all_reduce", blocking, seed=SEED)
    assert result.status == "hung" and "torch.distributed.send(x" in result.message, result


# -- bytes per token ---------------------------------------------------------------------------------------------------


def right_bytes(m, tp):
    return 2 * m.layers * m.hidden * m.bytes_per_param * 2 * (tp - 1) / tp


def test_the_right_formula_agrees_with_what_the_engine_counted_on_real_ranks():
    result = check("communication.bytes_per_token", right_bytes, seed=SEED)
    assert (result.status, result.points) == ("passed", 2), result
    assert right_bytes(memory.LLAMA_70B, 4) == 160 * 16_384 * 1.5


def test_a_tensor_sent_whole_to_each_rank_is_told_by_name():
    def whole(m, tp):
        return 2 * m.layers * m.hidden * m.bytes_per_param * (tp - 1)

    name = named("bytes_per_token", "tp all-reduces")
    assert f"That is what you get when {name}" in said("communication.bytes_per_token", whole)


# -- deadlocks ---------------------------------------------------------------------------------------------------------


def broken_total(tokens, comm):
    if comm.rank == 0:
        comm.all_reduce(tokens)
    return tokens


def broken_loss(batches, comm):
    return sum(comm.all_reduce(batch.sum()) for batch in batches)


def broken_pass(x, comm):
    received = comm.recv(torch.empty_like(x), (comm.rank - 1) % comm.world_size)
    comm.send(x, (comm.rank + 1) % comm.world_size)
    return received


@pytest.mark.parametrize(
    ("which", "broken", "waited", "limit"),
    [("a", broken_total, "all_reduce", 4), ("b", broken_loss, "all_reduce", 4), ("c", broken_pass, "recv", None)],
)
def test_a_hang_is_reported_soon_with_who_waited_for_what(which, broken, waited, limit, monkeypatch):
    monkeypatch.setattr(checking, "TIMEOUT", limit or checking.TIMEOUT)
    began = time.monotonic()
    result = check(f"communication.deadlock_{which}", broken, seed=SEED)
    assert time.monotonic() - began < checking.TIMEOUT + 3  # starting ranks included
    assert result.status == "hung" and f"{waited} on axis world" in result.message, result
    assert "in the same order" in result.message and result.hint


def agreed(batches, comm):
    """As many rounds as the rank with most batches needs; who has none left brings zeros."""
    rounds = int(comm.all_gather(torch.tensor([len(batches)])).max())
    mine = [batch.sum() for batch in batches]
    return sum(comm.all_reduce(mine[i] if i < len(mine) else torch.zeros(())) for i in range(rounds))


def by_turns(x, comm):
    """Even ranks send first, odd ones receive first: right also where sends wait."""
    n, buffer = comm.world_size, torch.empty_like(x)
    if comm.rank % 2 == 0:
        comm.send(x, (comm.rank + 1) % n)
    comm.recv(buffer, (comm.rank - 1) % n)
    if comm.rank % 2:
        comm.send(x, (comm.rank + 1) % n)
    return buffer


@pytest.mark.parametrize(
    ("which", "fn"),
    [
        ("a", lambda tokens, comm: comm.all_gather(tokens).sum(0)),
        ("b", lambda batches, comm: comm.all_reduce(batches.sum())),
        ("b", agreed),
        ("c", by_turns),
    ],
)
def test_any_right_repair_passes(which, fn):
    assert check(f"communication.deadlock_{which}", fn, seed=SEED).status == "passed"


def test_a_gather_where_one_send_is_enough_is_not_a_repair():
    through_all = said("communication.deadlock_c", lambda x, comm: comm.all_gather(x)[comm.rank - 1])
    assert "through comm.all_gather" in through_all and "One send and one receive are enough" in through_all
    twice = said("communication.deadlock_c", lambda x, comm: (by_turns(x, comm), by_turns(x, comm))[0])
    assert "a rank made 2 sends" in twice
