"""Who owns what: integer arithmetic only, no torch, no communication.

Every function answers "which part of n things belongs to which of p ranks" and is a pure function of its arguments,
so each rank computes its own share, and everybody else's, without asking anyone. Ranges are half-open `range` objects.
Shares may be uneven; what can't be shared at all raises `LayoutError`, which names the values that could.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


class LayoutError(ValueError):
    """A degree of parallelism that the model's shape doesn't allow. The message names the legal values."""


def even(n: int, parts: int) -> list[range]:
    """`n` things in `parts` contiguous shares whose sizes differ by at most one, larger ones first (some may be empty)."""
    if n < 0 or parts < 1:
        raise LayoutError(f"cannot split {n} things into {parts} parts: n >= 0 and parts >= 1 are needed")
    size, extra = divmod(n, parts)
    starts = [i * size + min(i, extra) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


@dataclass(frozen=True)
class HeadShare:
    """One tensor-parallel rank's attention heads: `query` heads, and the `kv` heads that those read.

    A rank's query heads may begin or end inside a group (the query heads that share one KV head). `pad_left` and
    `pad_right` are how many query heads of the first and last group are *not* on this rank: padding by them makes the
    local heads a full grid of len(kv) groups, which grouped-query attention needs.
    """

    query: range
    kv: range
    pad_left: int
    pad_right: int


def heads(query_heads: int, kv_heads: int, tp: int) -> list[HeadShare]:
    """Attention heads over `tp` ranks: query heads as even as can be, a KV head on every rank that reads it.

    9 query and 3 KV heads over tp=2: heads 0-4 with KV 0-1, heads 5-8 with KV 1-2 (KV head 1 is held twice). When
    tp > kv_heads, KV heads are replicated, and the KV cache per rank stops shrinking with tp.
    """
    if kv_heads < 1 or query_heads % kv_heads:
        raise LayoutError(f"{query_heads} query heads are not a multiple of {kv_heads} key/value heads")
    if not 1 <= tp <= query_heads:
        raise LayoutError(
            f"tensor_parallel_size={tp} does not fit {query_heads} query heads over {kv_heads} key/value heads: "
            f"each rank needs a query head of its own; use 1 to {query_heads}"
        )
    group = query_heads // kv_heads
    shares = []
    for q in even(query_heads, tp):
        kv = range(q.start // group, (q.stop - 1) // group + 1)
        shares.append(HeadShare(q, kv, q.start - kv.start * group, kv.stop * group - q.stop))
    return shares


def layers(n: int, pp: int) -> list[range]:
    """`n` equal layers over `pp` pipeline stages, as evenly as can be; the later stages have one more, since the first has the
    embedding too."""
    if not 1 <= pp <= n:
        raise LayoutError(f"pipeline_parallel_size={pp} does not fit {n} layers: use 1 to {n}")
    return ranges([len(part) for part in reversed(even(n, pp))])


def vocabulary(n: int, tp: int, pp: int) -> list[list[range]]:
    """Rows of an output head for `n` tokens over the tp ranks of all stages: [tp rank][stage]. A tp rank's are those of its part
    of the embedding, which may be the same matrix."""
    shares = ((share.start, even(len(share), pp)) for share in even(n, tp))
    return [[range(start + part.start, start + part.stop) for part in parts] for start, parts in shares]


# -- experts: a placement is a list of the expert numbers that each rank holds --------------------------------------------


def experts(n: int, ranks: int, how: str = "contiguous") -> list[list[int]]:
    """`n` experts over `ranks`: neighbours together ("contiguous"), or dealt out one by one ("round-robin")."""
    if not 1 <= ranks <= n:
        raise LayoutError(f"{ranks} expert-parallel ranks (dp x tp) do not fit {n} experts: use 1 to {n}")
    if how == "contiguous":
        return [list(part) for part in even(n, ranks)]
    if how == "round-robin":
        return [list(range(rank, n, ranks)) for rank in range(ranks)]
    raise LayoutError(f"expert placement {how!r}: use 'contiguous', 'round-robin', or the experts of each rank")


def experts_by_load(load: Sequence[float], ranks: int) -> list[list[int]]:
    """Experts over `ranks` so that the busiest rank has little more than the mean: `load[e]` is expert e's, in any unit.

    No rank gets more experts than others by more than one. Heaviest first, each to the rank with the least load so far that
    has room (LPT, Graham 1969, doi:10.1137/0117039); then pairs change places as long as that helps the busier rank. Close to
    the best there is, not always equal to it.
    """
    sizes = [len(part) for part in experts(len(load), ranks)]
    placed: list[list[int]] = [[] for _ in range(ranks)]

    def total(rank: int) -> float:
        return sum(load[e] for e in placed[rank])

    for e in sorted(range(len(load)), key=lambda e: -load[e]):
        open_ranks = [rank for rank in range(ranks) if len(placed[rank]) < sizes[rank]]
        placed[min(open_ranks, key=total)].append(e)
    while True:
        busiest = max(range(ranks), key=total)
        swaps = [
            (max(total(busiest) - load[a] + load[b], total(rank) - load[b] + load[a]), a, b, rank)
            for rank in range(ranks) for a in placed[busiest] for b in placed[rank] if rank != busiest
        ]  # fmt: skip
        if not swaps or min(swaps)[0] >= total(busiest):
            return [sorted(experts) for experts in placed]
        _, a, b, rank = min(swaps)
        placed[busiest][placed[busiest].index(a)] = b
        placed[rank][placed[rank].index(b)] = a


def busiest_over_mean(load: Sequence[float], placement: Sequence[Sequence[int]]) -> float:
    """Load of the busiest rank over the mean of all: 1.0 is balance, and what the others wait for is above."""
    totals = [sum(load[e] for e in mine) for mine in placement]
    return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0


def ranges(sizes: Sequence[int]) -> list[range]:
    """Consecutive ranges of the given sizes: (2, 3) -> [range(0, 2), range(2, 5)]."""
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
