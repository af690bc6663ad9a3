"""Tensor-parallel products by hand, on real ranks. The reference is the uncut product."""

import random
from dataclasses import replace

import torch
import torch.nn.functional as F

from labkit import split
from labkit.lab.exercise import Answer, Case, Exercise, Misconception, Traffic

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

EXERCISES = (COLUMN, ROW)
