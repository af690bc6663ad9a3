"""The gated MLP and the cut vocabulary: solutions pass on real ranks, and mistakes made there are told by name."""

import nbformat
import pytest
import torch
import torch.nn.functional as F
from test_notebooks import ROOT

from labkit import split
from labkit.lab.check import check
from labkit.lab.exercises import EXERCISES

SEED = 4


def solution(book, name):
    scope = {"torch": torch, "F": F, "split": split}
    for cell in nbformat.read(ROOT / "solutions" / f"{book}.ipynb", as_version=4).cells:
        if "answer" in cell.metadata.get("tags", []):
            exec(cell.source, scope)
    return scope[name]


def said(name, fn):
    result = check(name, fn, seed=SEED)
    assert (result.status, result.points) == ("not yet", 0), result
    return result.message


def told(name, fn, part):
    found = {m.name for m in EXERCISES[name].misconceptions if part in m.name}
    assert len(found) == 1, found
    return f"That is what you get when {found.pop()}. " in said(name, fn)


@pytest.mark.parametrize(("book", "name"), [("gated_mlp", "gated_mlp"), ("vocabulary_argmax", "greedy")])
def test_the_solution_passes(book, name):
    for seed in (SEED, 7):
        result = check(f"tensor.{name}", solution(book, name), seed=seed)
        assert (result.status, result.points) == ("passed", 2), result


# -- the gated MLP -----------------------------------------------------------------------------------------------------


def gated(*, fused=False, reduce=True, swap=False, active=True, whole=False, mean=False, early=False):
    """A gated MLP for real ranks, right as it stands, wrong in the way that is asked for."""

    def fn(x, gate_up, down, comm):
        width, n = down.shape[1], comm.world_size
        part = split.even(width, n)[comm.rank] if not whole else range(width)
        if fused:
            mine = split.even(2 * width, n)[comm.rank]
            y = F.linear(x, gate_up[mine.start : mine.stop])
            half = min(len(mine) // 2, len(part))
            gate, up, part = y[:, :half], y[:, len(mine) // 2 :][:, :half], range(part.start, part.start + half)
        else:
            gate, up = (F.linear(x, m[part.start : part.stop]) for m in gate_up.chunk(2))
        if early:
            widest = -(-width // n)
            gate, up = (
                comm.all_reduce(F.pad(t, (0, widest - len(part))).contiguous())[:, : len(part)] for t in (gate, up)
            )
        gate, up = (up, gate) if swap else (gate, up)
        partial = F.linear((F.silu(gate) if active else gate) * up, down[:, part.start : part.stop])
        y = comm.all_reduce(partial) if reduce else partial
        return y / n if mean else y

    return fn


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"fused": True}, "cut as if it were one"),
        ({"reduce": False}, "no all-reduce"),
        ({"early": True}, "before the activation"),
        ({"swap": True}, "exchanged"),
        ({"active": False}, "forgotten"),
        ({"whole": True}, "whole matrices"),
        ({"mean": True}, "averaged"),
    ],
)
def test_a_wrong_mlp_is_told_by_name(options, part):
    assert told("tensor.gated_mlp", gated(**options), part)


def test_a_right_mlp_that_talks_too_much_or_not_at_all_is_told_what_was_counted():
    def joined(x, gate_up, down, comm):
        part = split.even(down.shape[1], comm.world_size)[comm.rank]
        gate, up = (F.linear(x, m[part.start : part.stop]) for m in gate_up.chunk(2))
        inner = torch.zeros(len(x), down.shape[1])
        inner[:, part.start : part.stop] = F.silu(gate) * up
        return F.linear(comm.all_reduce(inner), down)

    right = gated()

    def twice(x, gate_up, down, comm):
        comm.all_reduce(torch.zeros(1))
        return right(x, gate_up, down, comm)

    assert "one of them took part in 2 all_reduce" in said("tensor.gated_mlp", twice)
    assert "One all-reduce of the result is enough" in said("tensor.gated_mlp", joined)
    alone = said("tensor.gated_mlp", gated(whole=True, reduce=False))
    assert "no rank talked to another" in alone


# -- greedy over a cut vocabulary --------------------------------------------------------------------------------------


def greedy(*, start="right", dtype=torch.float64, choose="score", ties="first"):
    def fn(scores, vocab, comm):
        begin = {"right": split.even(vocab, comm.world_size)[comm.rank].start, "none": 0}.get(
            start, comm.rank * scores.shape[1]
        )
        scores = scores.float()
        best, at = scores.max(dim=1)
        if ties == "last":
            at = scores.shape[1] - 1 - scores.flip(1).argmax(dim=1)
        if choose == "own":
            return at + begin
        pairs = comm.all_gather(torch.stack([best.to(dtype), (at + begin).to(dtype)]))
        if choose == "id":
            return pairs[:, 1].amax(dim=0).long()
        if choose == "rank 0":
            return pairs[0, 1].long()
        order = pairs.flip(0) if ties == "last" else pairs
        return order[:, 1].gather(0, order[:, 0].argmax(dim=0).unsqueeze(0)).squeeze(0).long()

    return fn


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"choose": "own"}, "best of its own part"),
        ({"start": "none"}, "from the beginning of a rank's part"),
        ({"start": "width"}, "rank x its own width"),
        ({"choose": "id"}, "largest id wins"),
        ({"ties": "last"}, "the last one wins"),
        ({"dtype": torch.float16}, "16 bits"),
        ({"choose": "rank 0"}, "rank 0's best"),
    ],
)
def test_a_wrong_choice_of_the_token_is_told_by_name(options, part):
    assert told("tensor.greedy", greedy(**options), part)


def test_gathering_all_scores_is_right_and_too_dear():
    def everything(scores, vocab, comm):
        widest = -(-vocab // comm.world_size)
        padded = F.pad(scores.float(), (0, widest - scores.shape[1]), value=-1e9)
        parts = comm.all_gather(padded)
        whole = [part[:, : len(own)] for part, own in zip(parts, split.even(vocab, comm.world_size), strict=True)]
        return torch.cat(whole, dim=1).argmax(dim=1)

    assert "A score and an id for each row and rank are enough" in said("tensor.greedy", everything)
