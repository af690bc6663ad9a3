"""The gated MLP and the cut vocabulary, on real ranks: right answers that cost too much. Mistakes are in misconceptions/."""

import torch
import torch.nn.functional as F

from labkit import split
from labkit.lab.check import check

SEED = 4


def said(name, fn):
    result = check(name, fn, seed=SEED)
    assert (result.status, result.points) == ("not yet", 0), result
    return result.message


# -- the gated MLP -----------------------------------------------------------------------------------------------------


def right(x, gate_up, down, comm):
    part = split.even(down.shape[1], comm.world_size)[comm.rank]
    gate, up = (F.linear(x, m[part.start : part.stop]) for m in gate_up.chunk(2))
    return comm.all_reduce(F.linear(F.silu(gate) * up, down[:, part.start : part.stop]))


def whole(x, gate_up, down, comm):
    gate, up = (F.linear(x, m) for m in gate_up.chunk(2))
    return F.linear(F.silu(gate) * up, down)


def test_a_right_mlp_that_talks_too_much_or_not_at_all_is_told_what_was_counted():
    def joined(x, gate_up, down, comm):
        part = split.even(down.shape[1], comm.world_size)[comm.rank]
        gate, up = (F.linear(x, m[part.start : part.stop]) for m in gate_up.chunk(2))
        inner = torch.zeros(len(x), down.shape[1])
        inner[:, part.start : part.stop] = F.silu(gate) * up
        return F.linear(comm.all_reduce(inner), down)

    def twice(x, gate_up, down, comm):
        comm.all_reduce(torch.zeros(1))
        return right(x, gate_up, down, comm)

    assert "one of them took part in 2 all_reduce" in said("tensor.gated_mlp", twice)
    assert "One all-reduce of the result is enough" in said("tensor.gated_mlp", joined)
    assert "no rank talked to another" in said("tensor.gated_mlp", whole)


# -- greedy over a cut vocabulary --------------------------------------------------------------------------------------


def test_gathering_all_scores_is_right_and_too_dear():
    def everything(scores, vocab, comm):
        widest = -(-vocab // comm.world_size)
        padded = F.pad(scores.float(), (0, widest - scores.shape[1]), value=-1e9)
        parts = comm.all_gather(padded)
        whole = [part[:, : len(own)] for part, own in zip(parts, split.even(vocab, comm.world_size), strict=True)]
        return torch.cat(whole, dim=1).argmax(dim=1)

    assert "A score and an id for each row and rank are enough" in said("tensor.greedy", everything)
