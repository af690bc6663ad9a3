"""The exercises on expert parallelism: other right ways, dearer ways, and what is said of them."""

import random
import re
import sys
import time
from itertools import product
from pathlib import Path

import cloudpickle
import nbformat
import pytest
import torch
import torch.nn.functional as F

from labkit import split
from labkit.lab import check as checking
from labkit.lab.check import check
from labkit.lab.exercises import expert

SEED = 4
ROOT = Path(__file__).parents[1]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as from a notebook: ranks needn't import pytest


def said(name, fn, seed=SEED):
    result = check(f"expert.{name}", fn, seed=seed)
    assert (result.status, result.points) == ("not yet", 0), result
    return result.message


def solution(notebook):
    """The function that the solution notebook hands in."""
    nb = nbformat.read(ROOT / "solutions" / f"{notebook}.ipynb", as_version=4)
    (answer,) = [cell.source for cell in nb.cells if "answer" in cell.metadata.get("tags", [])]
    scope = {"torch": torch}
    exec(answer, scope)
    return scope[notebook]


# -- the dispatch ------------------------------------------------------------------------------------------------------


def dispatch(*, k=2, swap=False, waste=""):
    """A dispatch for real ranks, right as it stands, wrong in the way that is asked for."""

    def fn(x, chosen, weights, owner, experts, comm):
        chosen, weights, n = chosen[:, :k], weights[:, :k], comm.world_size
        wants = (owner[chosen].unsqueeze(2) == torch.arange(n)).sum(1)
        rows = wants.clamp(max=1)
        table = comm.all_gather(rows.sum(0))
        send, receive = table[comm.rank].tolist(), table[:, comm.rank].tolist()
        if swap:
            send, receive = receive, send
        tokens = torch.arange(len(x))
        sent = torch.cat([tokens.repeat_interleave(rows[:, rank]) for rank in range(n)])
        arrived, wanted, weighed = (comm.all_to_all(y[sent], send, receive) for y in (x, chosen, weights))
        if waste == "dispatch":
            comm.all_to_all(x[sent], send, receive)
        made = experts(arrived, wanted) * weighed.unsqueeze(2)
        if waste == "combine":  # one row for each expert: added up at home
            results = comm.all_to_all(made, receive, send).sum(1)
        else:
            results = comm.all_to_all(made.sum(1), receive, send)
        return torch.zeros_like(x).index_add_(0, sent, results)

    return fn


def by_choice(x, chosen, weights, owner, experts, comm):
    """First choices, then second choices: right, but a token goes twice to a rank that has both."""
    one = dispatch(k=1)
    choices = [(chosen[:, i : i + 1], weights[:, i : i + 1]) for i in range(chosen.shape[1])]
    return sum(one(x, c, w, owner, experts, comm) for c, w in choices)


def packed(x, chosen, weights, owner, experts, comm):
    """Counts by an all-to-all, and rows, choices and weights side by side in another."""
    (n, hidden), k = x.shape, chosen.shape[1]
    goes = [(owner[chosen] == rank).any(1).nonzero().flatten() for rank in range(comm.world_size)]
    ones = [1] * comm.world_size
    send = torch.tensor([[len(tokens)] for tokens in goes])
    receive = comm.all_to_all(send, ones, ones).flatten().tolist()
    send, sent = send.flatten().tolist(), torch.cat(goes)
    all_of_it = comm.all_to_all(torch.cat([x, chosen.float(), weights], 1)[sent], send, receive)
    rows, choices, w = all_of_it.split([hidden, k, k], dim=1)
    made = torch.einsum("rkh,rk->rh", experts(rows, choices), w)
    out = torch.zeros(n, hidden)
    for token, result in zip(sent.tolist(), comm.all_to_all(made, receive, send), strict=True):
        out[token] += result
    return out


def wishes(x, chosen, weights, owner, experts, comm):
    """Everybody's choices and weights by an all-gather first, as labkit's own block has it; then each source by itself."""
    sizes = comm.all_gather(torch.tensor([len(x)])).flatten().tolist()
    n, k, most = comm.world_size, chosen.shape[1], max(sizes)
    wish = F.pad(torch.cat([chosen.float(), weights], 1), (0, 0, 0, most - len(x)))
    everyones = [wish[:size] for wish, size in zip(comm.all_gather(wish), sizes, strict=True)]
    goes = [[(owner[w[:, :k].long()] == rank).any(1).nonzero().flatten() for rank in range(n)] for w in everyones]
    send, receive = [len(rows) for rows in goes[comm.rank]], [len(row[comm.rank]) for row in goes]
    arrived = comm.all_to_all(x[torch.cat(goes[comm.rank])], send, receive).split(receive)
    made = []
    for rows, w, row in zip(arrived, everyones, goes, strict=True):
        choices, weight = w[row[comm.rank]].split([k, k], dim=1)
        made.append((experts(rows, choices.long()) * weight.unsqueeze(2)).sum(1))
    back = comm.all_to_all(torch.cat(made), receive, send)
    return torch.zeros_like(x).index_add_(0, torch.cat(goes[comm.rank]), back)


@pytest.mark.parametrize("fn", [packed, wishes], ids=["packed", "wishes"])
def test_any_dispatch_that_sends_no_more_than_it_must_passes(fn):
    result = check("expert.dispatch", fn, seed=SEED)
    assert result.status == "passed", result


def test_send_and_receive_counts_that_changed_places_are_told():
    # Where Comm itself refuses lists that don't add up to the rows, that is what is shown.
    assert re.search("send_rows", said("dispatch", dispatch(swap=True)))


def test_rows_without_their_choices_are_told():
    mixed_up = said("dispatch", lambda x, c, w, owner, experts, comm: experts(x, c[1:]))
    assert re.search(
        r"the experts got (\d+) rows, and the choices of \d+\nin line \d+: .*experts\(x, c\[1:\]\)", mixed_up
    )


def everything(x, chosen, weights, owner, experts, comm, *, sum_up="all_reduce"):
    """Shows every token to every rank."""
    sizes = comm.all_gather(torch.tensor([len(x)])).flatten().tolist()
    start, most = sum(sizes[: comm.rank]), max(sizes)

    def gather(y):
        parts = comm.all_gather(F.pad(y, (0, 0, 0, most - len(y))))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    made = (experts(gather(x), gather(chosen)) * gather(weights).unsqueeze(2)).sum(1)
    if sum_up == "all_reduce":
        return comm.all_reduce(made)[start : start + len(x)]
    back = comm.all_to_all(made, sizes, [len(x)] * comm.world_size)
    return back.view(comm.world_size, *x.shape).sum(0)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (everything, r"comm.all_gather and comm.all_reduce did what two all-to-alls should.* sent \d+ bytes"),
        (lambda *case: (everything(*case, sum_up=""), case[-1].all_to_all(case[0][:0], *[[0] * case[-1].world_size] * 2))[0],
            "Only rows that another rank's experts want should leave, each once"),
        (by_choice, "with 4 ranks one of them sent .* A token that wants two experts of one rank goes there once"),
        (dispatch(waste="dispatch"), "with 4 ranks one of them sent .* goes there once, and comes back as one row"),
        (dispatch(waste="combine"), "with 4 ranks one of them sent .* goes there once, and comes back as one row"),
    ],
    ids=["gathered", "gathered, summed by all-to-all", "by choice", "rows sent twice", "a result for each expert"],
)  # fmt: skip
@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_right_sums_by_dearer_ways_are_told_what_was_counted(fn, message, seed):
    found = said("dispatch", fn, seed)
    assert "the sums are right, but " in found and re.search(message, found), found


def test_a_dispatch_past_comm_is_told_that_nothing_was_counted():
    def past_comm(x, chosen, weights, owner, experts, comm):
        class Past:
            rank, world_size = comm.rank, comm.world_size

            def all_gather(self, y):
                out = [torch.empty_like(y) for _ in range(comm.world_size)]
                torch.distributed.all_gather(out, y)
                return torch.stack(out)

            def all_to_all(self, y, send, receive):
                out = y.new_empty(sum(receive), *y.shape[1:])
                torch.distributed.all_to_all_single(out, y, receive, send)
                return out

        return dispatch()(x, chosen, weights, owner, experts, Past())

    assert "comm counted nothing" in said("dispatch", past_comm)


def test_a_rank_without_tokens_that_returns_early_keeps_the_others_waiting(monkeypatch):
    monkeypatch.setattr(checking, "TIMEOUT", 4.0)

    def early(x, *rest):
        return dispatch()(x, *rest) if len(x) else x

    result = check("expert.dispatch", early, seed=SEED)
    assert result.status == "hung" and "all_gather on axis world" in result.message, result
    assert "All ranks must enter the same operations" in result.message and result.hint


# -- the volume --------------------------------------------------------------------------------------------------------


def rows(chosen, placement, rank):
    """Rows that a rank sends in the dispatch and in the combine, counted token by token."""
    owner = {e: r for r, held in enumerate(placement) for e in held}
    needs = [[{owner[e] for e in token} for token in tokens] for tokens in chosen]
    there = sum(len(token - {rank}) for token in needs[rank])
    back = sum(rank in token for r, tokens in enumerate(needs) for token in tokens if r != rank)
    return there, back


def right_volume(chosen, placement, rank, hidden, size):
    return sum(rows(chosen, placement, rank)) * hidden * size


def test_a_volume_worked_out_by_hand():
    # Experts 0 to 2 on rank 0, 3 to 5 on rank 1. Of rank 0's tokens the first stays, the second crosses once, for both of
    # its experts, the third too, for one. Of rank 1's tokens one comes here.
    chosen, placement = [[[0, 2], [3, 5], [1, 4]], [[4, 0], [3, 4]]], [[0, 1, 2], [3, 4, 5]]
    for fn in (right_volume, solution("expert_volume"), expert._sent):
        assert [fn(chosen, placement, rank, 10, 2) for rank in (0, 1)] == [60, 60]
        assert [fn(chosen, placement, rank, 10, 4) for rank in (0, 1)] == [120, 120]


def test_one_byte_off_is_wrong():
    assert "wrong in 5 of 5 cases" in said("volume", lambda *case: right_volume(*case) + 1)


# -- the placement -----------------------------------------------------------------------------------------------------


def greedy(load, ranks, *, key=lambda x: -x, room=True):
    """Each to the least busy rank; heaviest first unless another order is asked for."""
    placed = [[] for _ in range(ranks)]
    for e in sorted(range(len(load)), key=lambda e: key(load[e])):
        open_ranks = [mine for mine in placed if not room or len(mine) < -(-len(load) // ranks)]
        min(open_ranks, key=lambda mine: sum(load[i] for i in mine)).append(e)
    return owner_of(placed)


def owner_of(placed):
    return [next(r for r, mine in enumerate(placed) if e in mine) for e in range(sum(map(len, placed)))]


@pytest.mark.parametrize(
    "fn",
    [
        lambda load, ranks: owner_of(split.experts_by_load(load, ranks)),
        lambda load, ranks: owner_of(split.experts_by_load(load, ranks)[::-1]),
        lambda load, ranks: torch.tensor(greedy(load, ranks)),
        lambda load, ranks: expert.best(load, ranks),
    ],
    ids=["labkit's", "renamed", "tensor", "best"],
)
def test_any_placement_that_is_good_enough_passes(fn):
    result = check("expert.placement", fn, seed=SEED)
    assert (result.status, result.points) == ("passed", 2), result


def test_the_reference_is_the_best_of_all_placements():
    rng = random.Random(0)
    for experts, ranks in [(6, 2), (7, 3), (7, 4), (8, 2)]:
        load = [rng.randrange(100) for _ in range(experts)]
        room = -(-experts // ranks)
        everyone = (o for o in product(range(ranks), repeat=experts) if max(map(o.count, range(ranks))) <= room)
        least = min(
            max(sum(x for x, r in zip(load, o, strict=True) if r == rank) for rank in range(ranks)) for o in everyone
        )
        found = expert.best(load, ranks)
        assert max(map(found.count, range(ranks))) <= room
        assert max(sum(x for x, r in zip(load, found, strict=True) if r == rank) for rank in range(ranks)) == least


@pytest.mark.parametrize("seed", range(12))
def test_heaviest_first_is_always_good_enough_and_nothing_is_better_than_the_reference(seed):
    for case in expert.PLACEMENT.cases(random.Random(seed)):
        right = expert.PLACEMENT.answers(expert.PLACEMENT.reference, case)
        mine = [torch.tensor(greedy(*case.args), dtype=torch.float64)]
        assert expert.PLACEMENT.compare(mine, right) == "agrees"
        load, ranks = case.args
        placed = [[e for e, rank in enumerate(right[0].tolist()) if rank == r] for r in range(ranks)]
        if len(load) > 10:  # beside the best of all, which the smaller cases have
            assert split.busiest_over_mean(load, placed) <= max(1, max(load) * ranks / sum(load)) * 1.03


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda load, ranks: split.experts_by_load(load, ranks), "a rank for each of the 8 experts is needed|of type list"),
        (lambda load, ranks: greedy(load, ranks)[1:], "a rank for each of the 8 experts is needed"),
        (lambda load, ranks: [1 + rank for rank in greedy(load, ranks)], "ranks are numbered 0 to 1"),
        (lambda load, ranks: [rank / 2 for rank in greedy(load, ranks)], "ranks are numbered 0 to 1"),
        (lambda load, ranks: [float("nan")] * len(load), "ranks are numbered 0 to 1"),
        (lambda load, ranks: [0] * len(load), "rank 0 is to hold 8 experts, and has room for 4"),
        (lambda load, ranks: owner_of(split.experts(len(load), ranks)), "busiest rank has 1...x the mean, where 1...x can"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_placement_is_said(fn, message):
    assert re.search(message, said("placement", fn))


def test_a_placement_without_end_is_reported_as_hung(monkeypatch):
    monkeypatch.setattr(checking, "TIMEOUT", 2.0)

    def endless(load, ranks):
        while True:
            time.sleep(0.1)

    assert check("expert.placement", endless, seed=SEED).status == "hung"
