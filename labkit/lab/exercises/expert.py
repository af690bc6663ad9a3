"""Tokens and their experts on different ranks: sending each where it is wanted, what that costs, and who should hold which."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from labkit import split
from labkit.comm import Comm
from labkit.lab.exercise import Answer, Case, Exercise, Misconception, PerRank, Traffic
from labkit.launch.local import run
from labkit.mesh import Layout
from labkit.model.config import ModelConfig
from labkit.parallel import overlap
from labkit.parallel.expert import MoE, Spread

Parts = list[torch.Tensor]  # one per rank
Table = Sequence[Sequence[Sequence[int]]]  # by rank, the experts that each of its tokens wants
Counts = list[list[int]]  # rows from each rank to each


def _counts(table: Table, owner: Mapping[int, int] | Sequence[int], ranks: int, *, each: bool = False) -> Counts:
    """One row for each rank that holds experts of a token; with `each`, one for each of its experts."""
    kind = list if each else set
    to = [[rank for token in mine for rank in kind(owner[e] for e in token)] for mine in table]
    return [[mine.count(rank) for rank in range(ranks)] for mine in to]


def _out(counts: Counts, rank: int) -> int:
    """Rows that leave `rank` in the dispatch."""
    return sum(counts[rank]) - counts[rank][rank]


def _in(counts: Counts, rank: int) -> int:
    """Rows that come to `rank` from others in the dispatch, and that it sends back in the combine."""
    return sum(row[rank] for row in counts) - counts[rank][rank]


# -- the dispatch ------------------------------------------------------------------------------------------------------

_HIDDEN = 128


@dataclass(frozen=True)
class Held:
    """The experts of one rank, as the learner gets them; `made` is what they do.

    sends, comes: rows of this rank in a right dispatch, where these numbers can tell that the two were mixed up.
    """

    matrices: dict[int, torch.Tensor]
    sends: int = 0
    comes: int = 0

    def made(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What each chosen expert (R, k) makes of its row of (R, hidden): (R, k, hidden), zeros for those on other ranks."""
        out = rows.new_zeros(*chosen.shape, rows.shape[1])
        for e, matrix in self.matrices.items():
            row, i = (chosen == e).nonzero(as_tuple=True)
            out[row, i] = torch.tanh(rows[row] @ matrix.to(rows.device))
        return out

    def __call__(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if len(rows) == self.sends != self.comes:
            raise ValueError(
                f"the experts got {len(rows)} rows, as many as this rank sends, but {self.comes} should come to it. "
                "Have send_rows and recv_rows changed places?"
            )
        if len(chosen) != len(rows):
            raise ValueError(f"the experts got {len(rows)} rows, and the choices of {len(chosen)}")
        return self.made(rows, chosen)


def _dispatch_cases(rng: random.Random) -> list[Case]:
    """Two ranks; three, one of them without tokens; four, and most tokens on one rank, all experts wanted on another."""
    two = _dispatch_case(rng, [rng.randrange(9, 13), rng.randrange(4, 8)])
    three = _dispatch_case(rng, [0, rng.randrange(8, 12), rng.randrange(4, 8)])
    return [two, three, _dispatch_case(rng, [0, 1, 3, rng.randrange(14, 17)], all_to_one=True)]


def _dispatch_case(rng: random.Random, tokens: list[int], *, all_to_one: bool = False) -> Case:
    ranks, k = len(tokens), 2
    experts = 2 * ranks + 1
    while True:
        rng.shuffle(tokens)
        owner = [e % ranks for e in range(experts)]
        rng.shuffle(owner)
        hot = rng.choice([rank for rank in range(ranks) if tokens[rank] < max(tokens)])
        wanted = [e for e in range(experts) if owner[e] == hot] if all_to_one else range(experts)
        table = [[rng.sample(wanted, k) for _ in range(n)] for n in tokens]
        counts = _counts(table, owner, ranks)
        sends, comes = [sum(row) for row in counts], [sum(row[rank] for row in counts) for rank in range(ranks)]
        # On two ranks, which come first, a mix-up shows in these numbers, if they are like no others.
        others = {*tokens, sum(tokens), 2 * max(tokens), counts[0][1], counts[1][0], *comes}
        telling = ranks == 2 and not others & {*sends}
        if telling or ranks > 2:
            break
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    matrices = torch.randn(experts, _HIDDEN, _HIDDEN, generator=generator) / _HIDDEN**0.5
    weights = PerRank(torch.rand(n, k, generator=generator) + 0.1 for n in tokens)
    held = [
        Held(
            {e: matrices[e].clone() for e in range(experts) if owner[e] == rank},
            sends[rank] if telling else 0,
            comes[rank] if telling else 0,
        )
        for rank in range(ranks)
    ]
    args = (
        PerRank(torch.randn(n, _HIDDEN, generator=generator) for n in tokens),
        PerRank(torch.tensor(mine, dtype=torch.int64).view(-1, k) for mine in table),
        PerRank(each / each.sum(1, keepdim=True) for each in weights),
        torch.tensor(owner),
        PerRank(held),
    )
    where = f", all wanted on rank {hot}" if all_to_one else ""
    return Case(args, f"tokens {tokens}, {experts} experts{where}", ranks)


class _Made(NamedTuple):
    """Of one rank's tokens."""

    wants: torch.Tensor  # how many experts of each rank (tokens, ranks)
    by: torch.Tensor  # what those make of them, weighted and added up (tokens, ranks, hidden)


def _made(
    xs: Parts,
    chosen: Parts,
    weights: Parts,
    owner: torch.Tensor,
    experts: Sequence[Held],
    n: int,
    *,
    power: float = 1.0,
) -> list[_Made]:
    """All in one place, for each rank's tokens; weights to the given power."""
    x, choices, w = torch.cat(xs), torch.cat(chosen), torch.cat(weights) ** power
    by = torch.stack([(held.made(x, choices) * w.unsqueeze(2)).sum(1) for held in experts], dim=1)
    wants = (owner[choices].unsqueeze(2) == torch.arange(n)).sum(1)
    sizes = [len(each) for each in xs]
    return [_Made(*parts) for parts in zip(wants.split(sizes), by.split(sizes), strict=True)]


def _summed(*case: Any, power: float = 1.0) -> Parts:
    return [made.by.sum(1) for made in _made(*case, power=power)]


def _some(*case: Any, times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Parts:
    """What a rank's experts make counts times(1 at home and 0 elsewhere, how many experts of each rank a token wants)."""
    at_home = torch.eye(case[-1])
    return [
        (times(home, made.wants).unsqueeze(-1) * made.by).sum(1)
        for home, made in zip(at_home, _made(*case), strict=True)
    ]


def _not_combined(*case: Any) -> Parts:
    everyones = _made(*case)
    return [torch.cat([made.by[made.wants[:, rank] > 0, rank] for made in everyones]) for rank in range(case[-1])]


def _misplaced(*case: Any, sent: str, back: str) -> Parts:
    """Rows are in order of "rank" (their destination) or "token": when handed in, and as results are taken to come back.

    back="replace": by rank, but a later result takes the place of an earlier one.
    """
    out = []
    for made in _made(*case):
        by_rank = (made.wants > 0).T.nonzero().tolist()
        by_token = [(rank, token) for token, rank in (made.wants > 0).nonzero().tolist()]
        handed_in, places = (by_token if order == "token" else by_rank for order in (sent, back))
        y = made.by.new_zeros(len(made.by), made.by.shape[2])
        for (rank, _), (_, token), (_, place) in zip(by_rank, handed_in, places, strict=True):
            y[place] = made.by[token, rank] + (0 if back == "replace" else y[place])
        out.append(y)
    return out


def _dispatch_cost(case: Case, traffic: Traffic) -> str:
    xs, chosen, _, owner, _ = case.args
    n, row, right = case.ranks, xs[0].shape[1] * xs[0].itemsize, "the sums are right, but "
    if not traffic.calls:
        return f"{right}comm counted nothing. Send rows through comm, which counts."
    if traffic.calls.get("all_to_all", 0) < 2:
        others = " and ".join(f"comm.{op}" for op in sorted(set(traffic.calls) - {"all_to_all"}))
        return (
            f"{right}{others or 'a single all-to-all'} did what two all-to-alls should: tokens go only to the ranks that hold "
            f"their experts, and come back. With {n} ranks one of them sent {traffic.wire_bytes} bytes."
        )
    tables = (_counts([mine.tolist() for mine in chosen], owner.tolist(), n, each=each) for each in (False, True))
    once, each = (max(_out(counts, rank) + _in(counts, rank) for rank in range(n)) for counts in tables)
    # Everybody's counts, and everybody's choices and weights in 8 bytes each, for all to know.
    small = (n - 1) * (16 * n + max(map(len, xs)) * 16 * chosen[0].shape[1])
    if traffic.wire_bytes <= once * row + small:
        return ""
    why = (
        "A token that wants two experts of one rank goes there once, and comes back as one row, added up there."
        if traffic.wire_bytes <= each * row + small
        else "Only rows that another rank's experts want should leave, each once."
    )
    return (
        f"{right}with {n} ranks one of them sent {traffic.wire_bytes} bytes, {traffic.wire_bytes / row:.1f} rows of tokens; the "
        f"busiest has to send {once}, there and back, and a few bytes of counts, choices and weights. {why}"
    )


DISPATCH = Exercise(
    name="expert.dispatch",
    call="expert_dispatch(x, chosen, weights, owner, experts, comm)",
    cases=_dispatch_cases,
    reference=_summed,
    spmd=True,
    points=4,
    tolerance=1e-4,
    join=lambda values: [v for v in values if v.numel()],  # a rank without tokens has nothing to compare
    rule=_dispatch_cost,
    misconceptions=(
        Misconception("no token leaves its rank", "Each rank holds only some experts: the others' work is missing.",
            partial(_some, times=lambda home, wants: home)),
        Misconception("the combine is left out: each rank returns what it made of the rows that came to it",
            "Results must go back by a second all-to-all, the other way round, and be added up at home.", _not_combined),
        Misconception("what comes back is added to tokens in another order than rows were sent in",
            "all_to_all returns rows by the rank that they come from, and within a rank in the order in which they were sent: "
            "row i is the result of the i-th row that you handed in.", partial(_misplaced, sent="rank", back="token")),
        Misconception("rows are handed to all_to_all in the tokens' order, not sorted by the rank that they go to",
            "It takes the first send_rows[0] rows for rank 0, the next for rank 1: many come to ranks without their experts.",
            partial(_misplaced, sent="token", back="token")),
        Misconception("a token's second result takes the place of its first",
            "A token that went to two ranks gets a row from each, to be added. With repeated indices, y[i] += rows keeps one of "
            "them; y.index_add_(0, i, rows) adds all.", partial(_misplaced, sent="rank", back="replace")),
        Misconception("the weights are not applied", "A token's result is the weighted sum over its experts.",
            partial(_summed, power=0.0)),
        Misconception("the weights are applied twice",
            "Once is enough: where the experts are, since what comes back is already added up.", partial(_summed, power=2.0)),
        Misconception("a token is sent once for each of its experts, and each copy meets all of them",
            "With two experts on one rank it arrives there twice, and both add to both copies. Send it once.",
            partial(_some, times=lambda home, wants: wants)),
        Misconception("tokens for a rank's own experts are left out",
            "all_to_all also has a part that stays on its rank: send_rows[comm.rank]. It crosses nothing and costs nothing.",
            partial(_some, times=lambda home, wants: 1 - home)),
        Misconception("only the first of a token's experts is asked", "All k of them add to its sum.",
            lambda xs, chosen, weights, *rest: _summed(xs, [c[:, :1] for c in chosen], [w[:, :1] for w in weights], *rest)),
    ),
    hints=(
        "Which ranks does each token go to? owner[chosen] says it for each of its experts; the same rank twice is one row. "
        "Counted by rank, this gives send_rows. Only the others know recv_rows: exchange the counts first, on all ranks, also on "
        "one without tokens.",
        "comm.all_gather of everybody's counts is a table, (from, to): your line is send_rows, your column recv_rows. Sort rows "
        "by destination and keep the list of their tokens: rows, choices and weights all travel in that order, and results come "
        "back in it. On the way back the two lists of counts change places.",
        "goes = (owner[chosen].unsqueeze(2) == torch.arange(n)).any(1), which is (tokens, ranks); table = "
        "comm.all_gather(goes.sum(0)); token = goes.T.nonzero()[:, 1]; all_to_all of x[token], chosen[token] and weights[token]; "
        "made = (experts(rows, choices) * w.unsqueeze(2)).sum(1); all_to_all of that, back; and at the end "
        "torch.zeros_like(x).index_add_(0, token, back).",
    ),
    moral="Two all-to-alls for a layer, dispatch and combine: a row for each rank that a token needs, not for each expert.",
)  # fmt: skip


# -- the volume of an exchange -----------------------------------------------------------------------------------------

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def _block(comm: Comm, table: Table, placement: Sequence[Sequence[int]], hidden: int, itemsize: int) -> int:
    """Bytes that this rank sends in the two all-to-alls of labkit's own block, whose router is made to choose as `table` says."""
    experts, mine = sum(map(len, placement)), table[comm.rank]
    k = next(len(token) for tokens in table for token in tokens)
    cfg = ModelConfig.from_dict({
        "model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": hidden, "intermediate_size": 8, "vocab_size": 8,
        "num_attention_heads": 1, "num_local_experts": experts, "num_experts_per_tok": k,
    })  # fmt: skip
    assert cfg.moe, "a mixtral has experts"
    moe = MoE(cfg, cfg.moe, 0, comm, Spread("all_to_all", {0: placement}), _DTYPES[itemsize], comm.device)
    for p in moe.parameters():
        p.zero_()
    moe.router.weight[:, :experts] = torch.eye(experts)  # feature e speaks for expert e
    x = torch.zeros(len(mine), hidden)
    for row, token in zip(x, mine, strict=True):
        row[list(token)] = 1.0
    with torch.inference_mode():
        overlap.alone(comm, moe(x.to(comm.device, _DTYPES[itemsize]), [len(tokens) for tokens in table]))
    return sum(tally.wire_bytes for (op, *_), tally in comm.tallies.items() if op == "all_to_all")


@lru_cache(maxsize=64)
def sent(table: Table, placement: tuple[tuple[int, ...], ...], hidden: int, itemsize: int) -> list[int]:
    """Bytes that each rank sends in dispatch and combine of one layer, counted on real ranks, one for each part of `table`."""
    layout = Layout(dp=len(table), expert_parallel=True)
    return run(_block, layout=layout, args=(table, placement, hidden, itemsize))


def _sent(table: Table, placement: Sequence[Sequence[int]], rank: int, hidden: int, itemsize: int) -> int:
    fixed = tuple(tuple(tuple(token) for token in mine) for mine in table)
    return sent(fixed, tuple(map(tuple, placement)), hidden, itemsize)[rank]


def _volume_cases(rng: random.Random) -> list[Case]:
    """Drawn until no two ways to count agree in all cases."""
    while True:
        cases = [*_tables(rng, 2, 2, 4), *_tables(rng, 3, 2, 2), *_tables(rng, 4, 3, 2)]  # ranks, k, bytes per number
        ways: list[Callable[..., float]] = [_counted, *(wrong.answer for wrong in VOLUME.misconceptions)]
        if len({tuple(way(*case.args) for case in cases) for way in ways}) == len(ways):
            return cases


def _tables(rng: random.Random, ranks: int, k: int, itemsize: int) -> list[Case]:
    """One table, about which one rank is asked, or two; of four, one has no tokens."""
    hidden, experts = rng.randrange(10, 21, 2), 2 * ranks + rng.choice((0, 1))
    placement = split.experts(experts, ranks, rng.choice(("contiguous", "round-robin")))
    tokens = [rng.randrange(8, 11), *(rng.randrange(4, 8) for _ in range(ranks - 1))]
    if ranks == 4:
        tokens[1] = 0
    rng.shuffle(tokens)
    asked = [rng.randrange(2)] if ranks == 2 else rng.sample(range(ranks), 2)
    table = [[rng.sample(range(experts), k) for _ in range(n)] for n in tokens]
    text = f"tokens {tokens}, {experts} experts, {k} per token, hidden {hidden}, {itemsize} B"
    return [Case((table, placement, rank, hidden, itemsize), f"{text}, rank {rank} of {ranks}") for rank in asked]


class _Rows(NamedTuple):
    """What a routing table says of one rank. Rows: one for each other rank that a token needs, in `each` one for each expert."""

    there: int  # that it sends in the dispatch
    back: int  # and in the combine
    there_each: int
    back_each: int
    stay: int  # that are handed to an all-to-all and cross nothing
    tokens: int
    others_tokens: int
    k: int
    ranks: int


def _rows(
    count: Callable[[_Rows], float], table: Table, placement: Sequence[Sequence[int]], rank: int, hidden: int, itemsize: int
) -> float:  # fmt: skip
    """Bytes of as many rows as a misconception counts."""
    owner, n = {e: r for r, held in enumerate(placement) for e in held}, len(placement)
    once, each = (_counts(table, owner, n, each=each) for each in (False, True))
    tokens, k = len(table[rank]), next(len(token) for mine in table for token in mine)
    said = _Rows(
        _out(once, rank), _in(once, rank), _out(each, rank), _in(each, rank), once[rank][rank],
        tokens, sum(map(len, table)) - tokens, k, n,
    )  # fmt: skip
    return count(said) * hidden * itemsize


_counted = partial(_rows, lambda r: r.there + r.back)
_THERE_AND_BACK = "There are two all-to-alls: tokens go to their experts (dispatch), and results come home (combine)."

VOLUME = Exercise(
    name="expert.volume",
    call="expert_volume(chosen, placement, rank, hidden, bytes_per_number)",
    cases=_volume_cases,
    reference=_sent,
    points=2,
    unit=("B", 1.0),
    tolerance=1e-6,  # to the byte
    misconceptions=(
        Misconception("one all-to-all is counted, the dispatch",
            _THERE_AND_BACK, partial(_rows, lambda r: r.there)),
        Misconception("one all-to-all is counted, the combine",
            _THERE_AND_BACK, partial(_rows, lambda r: r.back)),
        Misconception("the combine is taken to be as large as the dispatch",
            "In the combine a rank sends back what came to it: other ranks' tokens, not as many as it sent of its own.",
            partial(_rows, lambda r: 2 * r.there)),
        Misconception("a token is counted once for each of its experts that are elsewhere",
            "Those on the same rank share one row, on the way there and on the way back.",
            partial(_rows, lambda r: r.there_each + r.back_each)),
        Misconception("results are counted once for each expert",
            "What the experts of one rank make of a token is added up there: one row goes back, as one came.",
            partial(_rows, lambda r: r.there + r.back_each)),
        Misconception("rows that stay on their rank are counted: the payload, not the wire",
            "A token whose expert is on its own rank crosses nothing.",
            partial(_rows, lambda r: r.there + r.back + 2 * r.stay)),
        Misconception("it is tokens x top_k, there and back",
            "That many rows leave only if no expert is at home and no two of a token's share a rank; and back go other ranks' "
            "tokens.", partial(_rows, lambda r: 2 * r.tokens * r.k)),
        Misconception("it is tokens x top_k",
            f"That is the most that a dispatch can send: a token whose experts share a rank goes there once, one whose expert is "
            f"at home stays. {_THERE_AND_BACK}", partial(_rows, lambda r: r.tokens * r.k)),
        Misconception("experts are taken to be chosen evenly, so that (n - 1) / n of all choices are elsewhere",
            "That is a fair guess without a routing table. Here is one: count.",
            partial(_rows, lambda r: 2 * r.tokens * r.k * (r.ranks - 1) / r.ranks)),
        Misconception("every token goes to every rank",
            "That is an all-gather. A token goes only to ranks that hold one of its experts.",
            partial(_rows, lambda r: (r.ranks - 1) * r.tokens + r.others_tokens)),
        Misconception("all ranks are counted together", "What one rank sends is asked for.",
            lambda t, p, r, h, b: sum(_counted(t, p, rank, h, b) for rank in range(len(p)))),
        Misconception("rows are counted, not bytes", "A row has hidden numbers of bytes_per_number bytes each.",
            lambda t, p, r, h, b: _counted(t, p, r, h, b) / (h * b)),
        Misconception("numbers are counted, not bytes", "Each of them takes bytes_per_number bytes.",
            lambda t, p, r, h, b: _counted(t, p, r, h, b) / b),
        Misconception("a number takes 4 bytes", "That is float32; here it takes bytes_per_number.",
            lambda t, p, r, h, b: _counted(t, p, r, h, b) * 4 / b),
    ),
    hints=(
        "Count rows first. Of this rank's tokens, which ranks does each go to? Of the others' tokens, which come here?",
        "Rows there: for each of this rank's tokens, the number of different *other* ranks that hold its experts. Rows back: the "
        "tokens of other ranks that want at least one expert of this one. Sets help.",
        "owner = {e: r for r, held in enumerate(placement) for e in held}; there = sum(len({owner[e] for e in token} - {rank}) "
        "for token in chosen[rank]); back = how many tokens in the other lists of chosen have rank in {owner[e] for e in token}; "
        "(there + back) * hidden * bytes_per_number.",
    ),
    moral="To the byte. What a rank sends it also receives: its rows go out and come home, others' come and go home.",
)  # fmt: skip


# -- the placement -----------------------------------------------------------------------------------------------------


class _ByBusiest(Exercise):
    """Placements, the rank of each expert, are as good as their busiest rank: many are equally right.

    Right answers and those of misconceptions carry the load and the number of ranks along, to judge the learner's by.
    """

    def answers(self, make: Callable[..., list[int]], case: Case) -> Answer:
        load, ranks = case.args
        return [*super().answers(make, case), torch.tensor(load, dtype=torch.float64), torch.tensor(float(ranks))]

    def distance(self, a: Answer, b: Answer) -> float:
        _, load, ranks = b
        if _flaw(a[0], b) or _over(a[0], int(ranks)) != _over(b[0], int(ranks)):
            return float("inf")
        busiest = _totals(b[0], load, int(ranks)).max()
        return abs((_totals(a[0], load, int(ranks)).max() / busiest).item() - 1)

    def compare(self, mine: Answer, right: Answer) -> str:
        placement, (_, load, ranks) = mine[0], right
        if flaw := _flaw(placement, right):
            return flaw
        if _over(placement, int(ranks)):
            counts = _totals(placement, torch.ones_like(load), int(ranks))
            room = -(-len(load) // int(ranks))
            return (
                f"rank {counts.argmax().item()} is to hold {counts.max().item():.0f} experts, and has room for {room}"
            )
        if self.distance(mine, right) <= self.tolerance:
            return "agrees"
        a, b = (_totals(x, load, int(ranks)).max() / load.sum() * ranks for x in (placement, right[0]))
        return f"the busiest rank has {a.item():.2f}x the mean, where {b.item():.2f}x can be had"

    def show(self, answer: Answer) -> str:
        if answer[0].ndim != 1:
            return super().show(answer[:1])
        numbers = [f"{rank:g}" for rank in answer[0].tolist()]
        return " ".join(numbers[:10] + ["..."] * (len(numbers) > 10))


def _flaw(placement: torch.Tensor, right: Answer) -> str:
    """Why a learner's value is no placement at all, if it isn't."""
    _, load, ranks = right
    if placement.shape != load.shape:
        return f"a rank for each of the {len(load)} experts is needed"
    numbers = torch.arange(int(ranks), dtype=placement.dtype)
    return "" if torch.isin(placement, numbers).all() else f"ranks are numbered 0 to {int(ranks) - 1}"


def _over(placement: torch.Tensor, ranks: int) -> int:
    """How many experts the fullest rank has beyond its room."""
    return max(0, int(placement.long().bincount().max()) - -(-len(placement) // ranks))


def _totals(placement: torch.Tensor, load: torch.Tensor, ranks: int) -> torch.Tensor:
    return torch.zeros(ranks, dtype=load.dtype).index_add_(0, placement.long(), load)


def _ranks_of(placed: Sequence[Sequence[int]]) -> list[int]:
    """From the experts of each rank to the rank of each expert."""
    owner = {e: rank for rank, mine in enumerate(placed) for e in mine}
    return [owner[e] for e in range(len(owner))]


def _busiest(load: Sequence[float], ranks: int, owner: Sequence[int]) -> float:
    return max(sum(x for x, r in zip(load, owner, strict=True) if r == rank) for rank in range(ranks))


def _greedy(load: Sequence[float], ranks: int, *, order: str = "heaviest", room: bool = True) -> list[int]:
    """Each expert to the rank with the least load so far: the "heaviest" or "lightest" first, or as they "come"."""
    sign = {"heaviest": -1, "come": 0, "lightest": 1}[order]
    totals, counts, owner = [0.0] * ranks, [0] * ranks, [0] * len(load)
    for e in sorted(range(len(load)), key=lambda e: sign * load[e]):
        open_ranks = [rank for rank in range(ranks) if not room or counts[rank] < -(-len(load) // ranks)]
        owner[e] = rank = min(open_ranks, key=lambda rank: totals[rank])
        totals[rank], counts[rank] = totals[rank] + load[e], counts[rank] + 1
    return owner


def _sorted_then(load: Sequence[float], ranks: int, how: str) -> list[int]:
    """Sorted by load, heaviest first, then "dealt" out like cards, in a "snake" to and fro, or cut into "blocks"."""
    owner = [0] * len(load)
    blocks = _ranks_of(split.experts(len(load), ranks))
    for i, e in enumerate(sorted(range(len(load)), key=lambda e: -load[e])):
        lap, at = divmod(i, ranks)
        owner[e] = {"dealt": at, "snake": at if lap % 2 == 0 else ranks - 1 - at, "blocks": blocks[i]}[how]
    return owner


def best(load: Sequence[float], ranks: int) -> list[int]:
    """The rank of each expert, so that the busiest has as little as can be; with more than 10 experts, as `split` would do it.

    All placements of 10 experts are tried, but for those that only rename ranks or can't be better than the best so far.
    """
    found = _ranks_of(split.experts_by_load(load, ranks))
    if len(load) > 10:
        return found
    order, room = sorted(range(len(load)), key=lambda e: -load[e]), -(-len(load) // ranks)
    least, owner, totals, counts = _busiest(load, ranks, found), [0] * len(load), [0.0] * ranks, [0] * ranks

    def place(at: int) -> Iterator[list[int]]:
        if at == len(order):
            yield list(owner)
            return
        e = order[at]
        for rank in range(min(ranks, 1 + sum(map(bool, counts)))):  # of the empty ranks only the first
            if counts[rank] < room and totals[rank] + load[e] < least:
                owner[e], totals[rank], counts[rank] = rank, totals[rank] + load[e], counts[rank] + 1
                yield from place(at + 1)
                totals[rank], counts[rank] = totals[rank] - load[e], counts[rank] - 1

    for better in place(0):
        found, least = better, _busiest(load, ranks, better)
    return found


def _at_least(load: Sequence[float], ranks: int) -> float:
    """No placement's busiest rank has less: the mean, or the heaviest expert with the lightest that must keep it company."""
    fewest = len(load) - (ranks - 1) * -(-len(load) // ranks)
    return max(sum(load) / ranks, max(load) + sum(sorted(load)[: max(fewest - 1, 0)]))


def _placement_cases(rng: random.Random) -> list[Case]:
    """Drawn until a plain greedy placement is good enough, nothing is better than the reference, and each misconception shows."""

    def even_odds(n: int) -> list[int]:
        return [round(400 * rng.expovariate(1)) for _ in range(n)]

    def skewed(n: int) -> list[int]:
        """As routers do it: a few experts that many want, a long tail, and some that nobody asks for."""
        steep, unused = rng.uniform(0.5, 0.9), n // 8
        load = [round(2000 * rng.uniform(0.8, 1.25) / (i + 2) ** steep) for i in range(n - unused)] + [0] * unused
        rng.shuffle(load)
        return load

    def draw(make: Callable[[int], list[int]], experts: int, ranks: int) -> Case:
        while True:
            load = make(experts)
            least = _busiest(load, ranks, best(load, ranks))
            sure = experts <= 10 or least <= 1.01 * _at_least(load, ranks)
            if sure and _busiest(load, ranks, _greedy(load, ranks)) <= 1.015 * least:
                what = "load " + " ".join(map(str, load)) if experts <= 10 else f"{max(load) / sum(load):.0%} for one"
                return Case((load, ranks), f"{experts} experts on {ranks} ranks, {what}")

    while True:
        sizes = ((even_odds, 8, 2), (even_odds, 10, 4), (skewed, 16, 4), (skewed, 64, 8))
        cases = [draw(*size) for size in sizes]
        answers = [
            [PLACEMENT.answers(make, case) for case in cases]
            for make in (PLACEMENT.reference, *(wrong.answer for wrong in PLACEMENT.misconceptions))
        ]
        if all(
            max(map(PLACEMENT.distance, a, b)) > 2 * PLACEMENT.tolerance
            for i, a in enumerate(answers) for b in answers[:i]
        ):  # fmt: skip
            return cases


PLACEMENT = _ByBusiest(
    name="expert.placement",
    call="expert_placement(load, ranks)",
    cases=_placement_cases,
    reference=best,
    points=2,
    tolerance=0.03,
    misconceptions=(
        *(Misconception("neighbours go together, whatever their load",
            "Numbers say nothing about load: some ranks get several busy experts. Look at the load.", make)
            for make in (lambda load, n: _ranks_of(split.experts(len(load), n)),
                lambda load, n: [e // -(-len(load) // n) for e in range(len(load))])),
        Misconception("experts are dealt out one by one in the order of their numbers",
            "That is round-robin: it makes the numbers of experts equal, not their load.",
            lambda load, n: [e % n for e in range(len(load))]),
        Misconception("experts are sorted by load, then dealt out one by one",
            "The first rank gets the heaviest of every round. Look at what each rank has so far, not only at whose turn it is.",
            partial(_sorted_then, how="dealt")),
        Misconception("experts are sorted by load, then dealt out to and fro",
            "Better than one by one, but one very busy expert upsets it: look at what each rank has so far.",
            partial(_sorted_then, how="snake")),
        Misconception("experts are sorted by load, then cut into blocks", "The busiest experts then all share one rank.",
            partial(_sorted_then, how="blocks")),
        Misconception("the number of experts that a rank can hold is ignored",
            "Each takes memory, wanted or not, so a rank holds at most ceil(experts / ranks). A full rank is out, however little "
            "load it has.", partial(_greedy, room=False)),
        Misconception("experts are placed in the order of their numbers, each where there is least load so far",
            "A heavy one that comes late finds no good place. Begin with the heaviest.", partial(_greedy, order="come")),
        Misconception("the lightest experts are placed first",
            "The heaviest come last, when nothing is left to make up for them. Begin with them.",
            partial(_greedy, order="lightest")),
    ),
    hints=(
        "Which experts are the hardest to place well? In what order would you place them?",
        "Heaviest first, each to the rank with the least load so far, among those that still have room.",
        "for e in sorted(range(len(load)), key=lambda e: -load[e]): rank = min((r for r in range(ranks) if count[r] < room), "
        "key=lambda r: total[r]); put e there, and add to total[rank] and count[rank]. room = -(-len(load) // ranks).",
    ),
    moral="Heaviest first, each to the least busy rank with room: within a few percent of the best, without trying them all.",
)  # fmt: skip

EXERCISES = (DISPATCH, VOLUME, PLACEMENT)
