"""Overlap: what one part of a step sends travels while another part is computed.

A forward pass is written once, as a generator that yields at each communication point. Who drives it decides what happens
there: `alone` waits for each exchange; `in_turns` drives the parts of a step in turns, starts what one part sends and computes
the next part meanwhile. All ranks take the same turns, so their operations match.

How a step is cut (`LLM(overlap=...)`):
- "two-batch": into two halves of its sequences, in prefill and decode. A decode step then reads its weights twice.
- "chunks": each prompt into two pieces, in prefill. The second attends to the first through the KV cache, where each layer
  has put it by then.

An exchange stays one asynchronous all-reduce, which is a reduce-scatter and an all-gather inside. Started as these two, the
second half of each waits for its part's next turn: TP=2 prefill of 4 x 512 tokens over 500 Mbit/s took 11.1 s, 7.3 s with the
all-reduce, and 10.1 s without overlap (gloo, two cores).

Nothing is gained where communication costs the rank's own time, as through shared memory, and at best the smaller of
communication and computation is hidden.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from labkit import split
from labkit.comm import Comm, Forward, Pending
from labkit.model.attention import Batch, KVCache
from labkit.model.decoder import Decoder

MODES = ("none", "chunks", "two-batch")


@dataclass(frozen=True)
class Part:
    """Some of a step's tokens: those in `pieces[i]`, of the tokens that the step brings for sequence `sequences[i]`."""

    sequences: list[int]
    pieces: list[range]
    starts: list[int]  # position of each piece's first token in its sequence
    tables: list[list[int]]  # the sequences' cache blocks
    ends: list[bool]  # whether logits are wanted behind a piece


def cut(
    tokens: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[list[int]], ends: Sequence[bool],
    mode: str = "none",
) -> list[Part]:  # fmt: skip
    """The parts that a step is computed in, in order: one, unless `mode` finds something to cut.

    Of each sequence: its tokens in this step, the position of the first, its cache blocks, and whether it wants logits.
    """
    lengths = [len(t) for t in tokens]
    everyone = list(range(len(lengths)))

    def part(sequences: list[int], pieces: list[range]) -> Part:
        pairs = list(zip(sequences, pieces, strict=True))
        first = [starts[i] + piece.start for i, piece in pairs]
        last = [ends[i] and piece.stop == lengths[i] for i, piece in pairs]
        return Part(sequences, pieces, first, [tables[i] for i in sequences], last)

    if mode == "two-batch" and len(lengths) > 1:
        middle = min(everyone[1:], key=lambda i: abs(sum(lengths[:i]) - sum(lengths[i:])))
        return [part(half, [range(lengths[i]) for i in half]) for half in (everyone[:middle], everyone[middle:])]
    if mode == "chunks" and max(lengths) > 1:
        pieces = [split.even(n, 2) for n in lengths]
        # Single tokens first, as a Batch wants them.
        some = (sorted((i for i in everyone if p[i]), key=lambda i: len(p[i]) > 1) for p in zip(*pieces, strict=True))
        return [part(chosen, [pieces[i][half] for i in chosen]) for half, chosen in enumerate(some)]
    return [part(everyone, [range(n) for n in lengths])]


def forward(
    comm: Comm, decoder: Decoder, cache: KVCache, x: torch.Tensor, parts: Sequence[Part],
    replicas: list[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """One stage's forward pass of a step's `x`, ids (N,) or residual (N, hidden), in `parts`; its result as of one piece.

    replicas: tokens of each replica in this step, if they take it together; it can't be cut then.
    """

    def batch(part: Part) -> Batch:
        lengths = [len(p) for p in part.pieces]
        return Batch.make(lengths, part.starts, part.tables, part.ends, cache.size, comm.device, replicas)

    if len(parts) == 1:
        return alone(comm, decoder(x, batch(parts[0]), cache))
    ends = {i: piece.stop for part in parts for i, piece in zip(part.sequences, part.pieces, strict=True)}
    first = [0, *accumulate(ends[i] for i in sorted(ends))]  # where in x each sequence begins
    rows = [
        [first[i] + at for i, piece in zip(part.sequences, part.pieces, strict=True) for at in piece] for part in parts
    ]
    forwards = [decoder(x[where], batch(part), cache) for part, where in zip(parts, rows, strict=True)]
    ys = torch.cat(in_turns(comm, forwards))
    if decoder.last:  # logits: one row for each sequence that wants them, from the part that has its end
        rows = [[i for i, end in zip(part.sequences, part.ends, strict=True) if end] for part in parts]
        number = {i: at for at, i in enumerate(sorted(i for some in rows for i in some))}
        rows = [[number[i] for i in some] for some in rows]
    order = torch.tensor([row for some in rows for row in some], device=ys.device)
    return torch.empty_like(ys).index_copy_(0, order, ys)


def alone(comm: Comm, forward: Forward) -> torch.Tensor:
    """The result of one forward pass that waits at each communication point."""
    try:
        op, *args = next(forward)
        while True:
            op, *args = forward.send(getattr(comm, op)(*args))
    except StopIteration as end:
        return end.value


def in_turns(comm: Comm, forwards: Sequence[Forward]) -> list[torch.Tensor]:
    """The results of several forward passes; while what one exchanges is under way, the others are computed."""
    results: dict[int, torch.Tensor] = {}
    turns: deque[tuple[int, Pending | None]] = deque((i, None) for i in range(len(forwards)))
    while turns:
        i, pending = turns.popleft()
        try:
            op, *args = forwards[i].send(pending.wait()) if pending else next(forwards[i])
        except StopIteration as end:
            results[i] = end.value
        else:
            turns.append((i, getattr(comm, f"{op}_start")(*args)))
    return [results[i] for i in range(len(forwards))]
