"""Tensor-parallel products by hand, on real ranks. The reference is the uncut product."""

import random
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from labkit import split
from labkit.lab.exercise import Answer, Case, Exercise, Misconception, PerRank, Traffic

Parts = list[torch.Tensor]  # one per rank


def _cases(rng: random.Random) -> list[Case]:
    """Small products, whose sizes their number of ranks doesn't divide."""
    cases = []
    for ranks in (2, 3, 4):
        n, inner, outer = rng.randrange(2, 5), ranks * rng.randrange(3, 6) + 1, ranks * rng.randrange(2, 5) + 1
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        x, weight, bias = (torch.randn(s, generator=generator) for s in ((n, inner), (outer, inner), (outer,)))
        cases.append(Case((x, weight, bias), f"x {n} x {inner}, weight {outer} x {inner}", ranks))
    return cases


def _without_bias(rng: random.Random) -> list[Case]:
    return [replace(case, args=case.args[:2]) for case in _cases(rng)]


def _columns(x: torch.Tensor, w: torch.Tensor, ranks: int) -> Parts:
    return [F.linear(x, w[rows.start : rows.stop]) for rows in split.even(len(w), ranks)]


def _partial(x: torch.Tensor, w: torch.Tensor, ranks: int) -> Parts:
    return [F.linear(x[:, c.start : c.stop], w[:, c.start : c.stop]) for c in split.even(w.shape[1], ranks)]


def _join_columns(parts: Answer) -> Answer:
    """Consecutive columns in any cut, if no rank has more than its share; joined, they are the whole."""
    if any(part.ndim != 2 or len(part) != len(parts[0]) for part in parts):
        return parts
    whole = torch.cat(parts, dim=1)
    return [whole] if max(part.shape[1] for part in parts) <= -(-whole.shape[1] // len(parts)) else parts


COLUMN = Exercise(
    name="tensor.column_linear",
    call="column_linear(x, weight, comm)",
    cases=_without_bias,
    reference=_columns,
    spmd=True,
    tolerance=1e-4,
    join=_join_columns,
    misconceptions=(
        Misconception("every rank computes the whole product",
            "The numbers are right, but nothing is shared out: each rank should hold and multiply only its own columns of W.",
            lambda x, w, ranks: [F.linear(x, w)] * ranks),
        Misconception("the input features are cut instead of the output features",
            "That is the row-parallel product, with partial sums of all columns. PyTorch stores a weight as (out, in), so W's "
            "columns are the rows of the stored tensor.", _partial),
        Misconception("the remainder is dropped",
            "out // ranks columns for each rank leave the last out % ranks columns with nobody.",
            lambda x, w, ranks: [F.linear(x, w[r * (len(w) // ranks) :][: len(w) // ranks]) for r in range(ranks)]),
        Misconception("columns are dealt out like cards",
            "Every n-th column gives another order; each rank should own consecutive ones.",
            lambda x, w, ranks: [F.linear(x, w[r::ranks]) for r in range(ranks)]),
        Misconception("all ranks take the first share", "The share must follow comm.rank.",
            lambda x, w, ranks: [_columns(x, w, ranks)[0]] * ranks),
    ),
    hints=(
        "Which rows of the stored weight (out, in) does this rank own? labkit.split.even(out, comm.world_size) says it for all.",
        "No communication is needed: x is whole on every rank, and each rank keeps its own columns of Y.",
        "rows = split.even(len(weight), comm.world_size)[comm.rank], then F.linear(x, weight[rows.start : rows.stop]).",
    ),
    moral="Column-parallel: no communication, and each rank ends with its own columns of Y.",
)  # fmt: skip


def _talked(case: Case, traffic: Traffic) -> str:
    alone = (
        "the numbers are right, but no rank talked to another: each computed the whole product, which saves nothing."
    )
    return "" if traffic.calls else alone


ROW = Exercise(
    name="tensor.row_linear",
    call="row_linear(x, weight, bias, comm)",
    cases=_cases,
    reference=lambda x, w, b, ranks: [F.linear(x, w, b)] * ranks,
    spmd=True,
    tolerance=1e-4,
    rule=_talked,
    misconceptions=(
        Misconception("the bias is added on every rank before the all-reduce",
            "The sum over ranks then holds it once per rank. It belongs after the sum, or on one rank only.",
            lambda x, w, b, ranks: [F.linear(x, w) + ranks * b] * ranks),
        Misconception("there is no all-reduce",
            "Each rank has only the partial sum over its own input features; the partial sums must be added up.",
            lambda x, w, b, ranks: [y + b for y in _partial(x, w, ranks)]),
        Misconception("there is neither an all-reduce nor a bias",
            "Each rank has only the partial sum over its own input features: add them up over ranks, then add the bias.",
            lambda x, w, b, ranks: _partial(x, w, ranks)),
        Misconception("partial results are put side by side instead of added",
            "Each rank has a value for every output, so side by side there are too many. That is for column-parallel.",
            lambda x, w, b, ranks: [torch.cat(_partial(x, w, ranks), dim=1) + b.repeat(ranks)] * ranks),
        Misconception("partial results are averaged", "They are parts of one sum, not estimates of one value.",
            lambda x, w, b, ranks: [F.linear(x, w) / ranks + b] * ranks),
        Misconception("the bias is forgotten", "Y = XW + b.", lambda x, w, b, ranks: [F.linear(x, w)] * ranks),
        Misconception("every rank multiplies the whole matrices and the results are added up",
            "The sum then has the product once per rank. Each should multiply only its own input features.",
            lambda x, w, b, ranks: [ranks * F.linear(x, w) + b] * ranks),
        Misconception("every rank computes everything, bias included, and the results are added up",
            "The sum then has everything once per rank. Each should multiply only its own input features.",
            lambda x, w, b, ranks: [ranks * F.linear(x, w, b)] * ranks),
    ),
    hints=(
        "Cut the input features: which columns of x and which columns of the stored weight (out, in) does this rank own?",
        "Each rank now has a partial sum of all outputs: comm.all_reduce adds them up. Which rank should own the bias?",
        "part = split.even(weight.shape[1], comm.world_size)[comm.rank]; mine = slice(part.start, part.stop); "
        "comm.all_reduce(F.linear(x[:, mine], weight[:, mine])) + bias.",
    ),
    moral="Row-parallel: one all-reduce of the whole output, and the bias after it.",
)  # fmt: skip


# -- a gated MLP, column then row --------------------------------------------------------------------------------------


def _gated_cases(rng: random.Random) -> list[Case]:
    """MLPs whose width the number of ranks doesn't divide. `gate_up` has gate's rows, then up's."""
    cases = []
    for ranks in (2, 3, 4):
        n, hidden, width = rng.randrange(2, 5), rng.randrange(5, 9), ranks * rng.randrange(2, 5) + 1
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        x, gate_up, down = (
            torch.randn(s, generator=generator) for s in ((n, hidden), (2 * width, hidden), (hidden, width))
        )
        cases.append(Case((x, gate_up, down), f"x {n} x {hidden}, MLP {width} wide", ranks))
    return cases


def _gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=1)
    return F.silu(gate) * up


def _partials(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ranks: int) -> Parts:
    return _partial(_gated(x, gate_up), down, ranks)


def _split_as_one(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ranks: int) -> Parts:
    """Each rank takes a consecutive piece of the fused matrix, as if it were one, and calls its halves gate and up."""
    width, total = down.shape[1], torch.zeros(len(x), len(down))
    for mine, part in zip(split.even(2 * width, ranks), split.even(width, ranks), strict=True):
        y = F.linear(x, gate_up[mine.start : mine.stop])
        inner = F.silu(y[:, : len(mine) // 2]) * y[:, len(mine) // 2 : len(mine) // 2 * 2]
        held = min(inner.shape[1], len(part))
        total = total + F.linear(inner[:, :held], down[:, part.start : part.start + held])
    return [total] * ranks


def _one_all_reduce(case: Case, traffic: Traffic) -> str:
    x = case.args[0]
    if not traffic.calls:
        return "the numbers are right, but no rank talked to another: each computed the whole MLP, which saves nothing."
    most = x.nbytes * 2 * (case.ranks - 1) // case.ranks
    if traffic.calls == {"all_reduce": 1} and traffic.wire_bytes <= most:
        return ""
    said = ", ".join(f"{count} {op}" for op, count in sorted(traffic.calls.items()))
    return (
        f"the numbers are right, but with {case.ranks} ranks one of them took part in {said} and sent {traffic.wire_bytes} "
        f"bytes. One all-reduce of the result is enough: {most} bytes. Nothing needs to be joined between the products."
    )


GATED = Exercise(
    name="tensor.gated_mlp",
    call="gated_mlp(x, gate_up, down, comm)",
    cases=_gated_cases,
    reference=lambda x, gu, down, ranks: [F.linear(_gated(x, gu), down)] * ranks,
    spmd=True,
    points=2,
    tolerance=1e-4,
    rule=_one_all_reduce,
    misconceptions=(
        Misconception("the fused matrix is cut as if it were one",
            "A consecutive piece of [gate; up] gives the first ranks gate alone, and the last ones up. Each rank needs the same "
            "rows of both: cut gate and up separately.", _split_as_one),
        Misconception("there is no all-reduce", "Each rank has a partial sum, over its own part of the MLP's width: add them up.",
            _partials),
        Misconception("the ranks add up before the activation function",
            "Gate and up are cut by columns: a rank's are complete, and what other ranks have are other columns. Sums of "
            "different columns mean nothing.",
            lambda x, gu, down, ranks: [_summed_early(x, gu, down, ranks)] * ranks),
        Misconception("gate and up are exchanged", "silu(gate) * up: the activation function is on the first half.",
            lambda x, gu, down, ranks: [F.linear(_gated(x, gu.roll(len(gu) // 2, 0)), down)] * ranks),
        Misconception("the activation function is forgotten", "silu(gate) * up.",
            lambda x, gu, down, ranks: [F.linear(torch.mul(*F.linear(x, gu).chunk(2, dim=1)), down)] * ranks),
        Misconception("every rank multiplies the whole matrices and the results are added up",
            "The sum then has the result once per rank. Each should use its own part of the width.",
            lambda x, gu, down, ranks: [ranks * F.linear(_gated(x, gu), down)] * ranks),
        Misconception("partial results are averaged", "They are parts of one sum, not estimates of one value.",
            lambda x, gu, down, ranks: [F.linear(_gated(x, gu), down) / ranks] * ranks),
    ),
    hints=(
        "Which rows of gate does this rank own? It needs the same rows of up. Where are they in gate_up?",
        "part = split.even(width, n)[rank]; gate = gate_up[:width], up = gate_up[width:]. What a rank has of silu(gate) * up is "
        "what its columns of down need.",
        "mine = slice(part.start, part.stop); inner = F.silu(F.linear(x, gate_up[:width][mine])) * "
        "F.linear(x, gate_up[width:][mine]); comm.all_reduce(F.linear(inner, down[:, mine])).",
    ),
    moral="Column, column, row: three products and one all-reduce, because what a rank makes is what it needs next.",
)  # fmt: skip


def _summed_early(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ranks: int) -> torch.Tensor:
    """With parts of equal width, padded: gate and up summed over ranks, then each rank's columns of down."""
    width = down.shape[1]
    parts, widest = split.even(width, ranks), -(-width // ranks)
    gate, up = (
        sum(F.pad(F.linear(x, m[p.start : p.stop]), (0, widest - len(p))) for p in parts) for m in gate_up.chunk(2)
    )
    inner = F.silu(torch.as_tensor(gate)) * up
    return torch.stack([F.linear(inner[:, : len(p)], down[:, p.start : p.stop]) for p in parts]).sum(0)


# -- greedy over a cut vocabulary --------------------------------------------------------------------------------------


class _Args(NamedTuple):
    """Scores (B, vocab) cut over ranks, and the uncut size."""

    scores: PerRank
    vocab: int


def _scores(rng: random.Random, ranks: int) -> _Args:
    """float16 scores over a vocabulary that float16 can't count to; the best of some rows comes twice, on different ranks."""
    batch, vocab = rng.randrange(6, 9), ranks * rng.randrange(1200, 1600) + 1
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    scores = torch.randn(batch, vocab, generator=generator).half()
    for row in range(batch):
        # Odd and large ids show rounding to 16 bits; the others have their best anywhere.
        at = rng.randrange(3 * vocab // 4, vocab - 2) | 1 if row < 4 else rng.randrange(vocab // 2)
        scores[row, at] = 9.0
        if row < 2:  # a tie: the first one counts
            scores[row, rng.randrange(vocab // 10, vocab // 6)] = 9.0
    parts = split.even(vocab, ranks)
    return _Args(PerRank(scores[:, part.start : part.stop].contiguous() for part in parts), vocab)


def _greedy_cases(rng: random.Random) -> list[Case]:
    drawn = {ranks: _scores(rng, ranks) for ranks in (2, 3, 4)}
    return [Case(tuple(at), f"{len(at.scores[0])} rows, vocabulary {at.vocab}", n) for n, at in drawn.items()]


def _bests(scores: Parts, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ranks, B) of each rank's best: its score, where it is on the rank, and where in the vocabulary."""
    best, at = (torch.stack(each) for each in zip(*(part.float().max(dim=1) for part in scores), strict=True))
    starts = torch.tensor([part.start for part in split.even(vocab, len(scores))]).unsqueeze(1)
    return best, at, at + starts


def _pick(scores: Parts, vocab: int, ids: torch.Tensor) -> Parts:
    """On every rank, for each row the id (of (ranks, B)) from the rank whose best is the best."""
    best, _, _ = _bests(scores, vocab)
    return [ids.gather(0, best.argmax(dim=0).unsqueeze(0)).squeeze(0)] * len(scores)


def _two_numbers(case: Case, traffic: Traffic) -> str:
    rows, most = len(case.args[0][0]), 16 * (case.ranks - 1) * len(case.args[0][0])
    if not traffic.calls:
        return "the ids are right, but comm counted nothing. Talk through comm, which counts."
    if traffic.wire_bytes <= 2 * most:
        return ""
    return (
        f"the ids are right, but with {case.ranks} ranks one of them sent {traffic.wire_bytes:,} bytes for {rows} rows. A "
        f"score and an id for each row and rank are enough: {most:,} bytes in an all-gather of float64."
    )


GREEDY = Exercise(
    name="tensor.greedy",
    call="greedy(scores, vocab, comm)",
    cases=_greedy_cases,
    reference=lambda scores, vocab, n: _pick(scores, vocab, _bests(scores, vocab)[2]),
    spmd=True,
    points=2,
    tolerance=1e-6,
    rule=_two_numbers,
    misconceptions=(
        Misconception("each rank takes the best of its own part",
            "The ranks then disagree about the token, and their caches about the text. One must win, on all of them.",
            lambda scores, vocab, n: list(_bests(scores, vocab)[2])),
        Misconception("ids are counted from the beginning of a rank's part",
            "max gives a place among this rank's columns. Add where they begin: split.even(vocab, n)[rank].start.",
            lambda scores, vocab, n: _pick(scores, vocab, _bests(scores, vocab)[1])),
        Misconception("each rank counts from rank x its own width",
            "Parts differ in width when vocab doesn't divide: begin where the parts before it end.",
            lambda scores, vocab, n: _pick(
                scores, vocab,
                _bests(scores, vocab)[1] + torch.tensor([r * s.shape[1] for r, s in enumerate(scores)]).unsqueeze(1))),
        Misconception("the largest id wins instead of the id of the largest score",
            "Compare scores; ids only say where they are.", lambda scores, vocab, n: [_bests(scores, vocab)[2].amax(0)] * n),
        Misconception("of equal scores the last one wins",
            "torch.argmax takes the first, and so must a model on any number of ranks, or its answer depends on the layout.",
            lambda scores, vocab, n: _pick([s.flip(1) for s in reversed(scores)], vocab, _last(scores, vocab))),
        Misconception("ids travel in the 16 bits of the scores",
            "float16 counts exactly up to 2,048 only, bfloat16 up to 256: larger ids are rounded. Use a type that holds them.",
            lambda scores, vocab, n: _pick(scores, vocab, _bests(scores, vocab)[2].half().long())),
        Misconception("rank 0's best is taken by all", "Its part of the vocabulary needn't have the best score.",
            lambda scores, vocab, n: [_bests(scores, vocab)[2][0]] * n),
    ),
    hints=(
        "What is the least that other ranks must know of a rank's scores, for each row?",
        "best, at = scores.max(dim=1); the id is at + split.even(vocab, n)[rank].start. Gather both from all ranks, in a type "
        "that holds ids exactly; then take, for each row, the id of the rank with the highest score.",
        "pair = torch.stack([best.double(), (at + start).double()]); pairs = comm.all_gather(pair) is (n, 2, B); "
        "winner = pairs[:, 0].argmax(dim=0); pairs[winner, 1, torch.arange(len(winner))].long().",
    ),
    moral="Two numbers per row and rank instead of a whole vocabulary: the engine does the same, and sampling adds noise first.",
)  # fmt: skip


def _last(scores: Parts, vocab: int) -> torch.Tensor:
    """As `_bests` has the ids, of the last among equals, with the last rank first."""
    parts = [part.flip(1).float().max(dim=1)[1] for part in reversed(scores)]
    stops = torch.tensor([part.stop for part in reversed(split.even(vocab, len(scores)))]).unsqueeze(1)
    return stops - 1 - torch.stack(parts)


EXERCISES = (COLUMN, ROW, GATED, GREEDY)
