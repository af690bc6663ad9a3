"""Two half-batches: what one sends travels while the other is computed. Products and exchanges are real, the clock counts."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from labkit import split
from labkit.comm import Comm, Pending
from labkit.lab.exercise import Case, Exercise, Misconception, Traffic, distinct

Halves = tuple[torch.Tensor, torch.Tensor]
Answer = list[torch.Tensor]  # one per rank


class Layers:
    """Row-parallel layers y = tanh(sum over ranks of x_part W_part), and a clock that knows what takes how long.

    A product takes `compute` ticks of the rank's time. An exchange takes `exchange` ticks of the link, which carries one after
    the other, beside whatever the rank does; `wait` is where the rank stands still until it has ended.
    """

    def __init__(self, weights: list[torch.Tensor], compute: int, exchange: int) -> None:
        self.weights, self.compute, self.exchange = weights, compute, exchange
        self.clock = self.link_free = 0

    def __len__(self) -> int:
        return len(self.weights)

    def product(self, layer: int, x: torch.Tensor, comm: Comm) -> torch.Tensor:
        """x (N, hidden) -> this rank's partial sum (N, hidden)."""
        self.clock += self.compute
        mine = split.even(x.shape[1], comm.world_size)[comm.rank]
        return x[:, mine.start : mine.stop] @ self.weights[layer][mine.start : mine.stop]

    def start(self, partial_sum: torch.Tensor, comm: Comm) -> Pending:
        """Starts an exchange; `wait()` gives the layer's result (N, hidden)."""
        ends = self.link_free = max(self.clock, self.link_free) + self.exchange
        pending = comm.all_reduce_start(partial_sum)

        def finish() -> torch.Tensor:
            self.clock = max(self.clock, ends)
            return pending.wait().tanh()

        return Pending(finish)

    def done(self, halves: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the learner returns: both results, and in one more row the ticks that it took."""
        rows, ticks = torch.cat(list(halves)), self.clock
        self.clock = self.link_free = 0  # for whoever comes next
        return torch.cat([rows, torch.full_like(rows[:1], ticks)])


class _Alone:
    """One rank that has everything: an uncut reference."""

    rank, world_size = 0, 1

    def all_reduce_start(self, x: torch.Tensor) -> Pending:
        return Pending(lambda: x)


Driver = Callable[[Layers, Halves, Any], torch.Tensor]


def _waiting(layers: Layers, halves: Halves, comm: Any) -> torch.Tensor:
    """Each exchange is waited for where it is started; the halves take turns."""
    xs = list(halves)
    for layer in range(len(layers)):
        for i in (0, 1):
            xs[i] = layers.start(layers.product(layer, xs[i], comm), comm).wait()
    return layers.done((xs[0], xs[1]))


def _early(layers: Layers, halves: Halves, comm: Any) -> torch.Tensor:
    """Started at once, but both halves are waited for at the end of each layer."""
    xs = list(halves)
    for layer in range(len(layers)):
        pending = [layers.start(layers.product(layer, x, comm), comm) for x in xs]
        xs = [p.wait() for p in pending]
    return layers.done((xs[0], xs[1]))


def _turns(layers: Layers, halves: Halves, comm: Any, *, swap: bool = False, last: int = 0) -> torch.Tensor:
    """Each half is waited for when its turn comes again. swap: results are handed to the other half. last: layers that are left
    out."""
    xs: list[Any] = list(halves)
    pending: list[Pending | None] = [None, None]
    for layer in range(len(layers) - last):
        for i in (0, 1):
            before = pending[i]
            if before is not None:
                xs[i] = before.wait()
            pending[i] = layers.start(layers.product(layer, xs[i], comm), comm)
    xs = [p.wait() for p in pending if p is not None]
    return layers.done((xs[1], xs[0]) if swap else (xs[0], xs[1]))


def _alone(drive: Driver, layers: Layers, halves: Halves, n: int) -> Answer:
    fresh = Layers(layers.weights, layers.compute, layers.exchange)
    return [drive(fresh, halves, _Alone())] * n


def _two_cases(rng: random.Random) -> list[Case]:
    """Exchanges shorter than products, as long, longer; halves that differ in size."""
    cases = []
    for ranks, (compute, exchange) in ((2, (5, 3)), (2, (4, 4)), (3, (3, rng.randrange(5, 8)))):
        hidden, count = rng.randrange(6, 10), rng.randrange(3, 6)
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        weights = [torch.randn(hidden, hidden, generator=generator) / hidden**0.5 for _ in range(count)]
        halves = tuple(torch.randn(n, hidden, generator=generator) for n in (2, rng.randrange(2, 4)))
        text = f"{count} layers, product {compute}, exchange {exchange} ticks"
        cases.append(Case((Layers(weights, compute, exchange), halves), text, ranks))
    return cases


def _both_sent(case: Case, traffic: Traffic) -> str:
    calls = 2 * len(case.args[0])
    return "" if traffic.calls == {"all_reduce": calls} else f"the result is right, but it took {dict(traffic.calls)}."


TWO_HALVES = Exercise(
    name="overlap.two_halves",
    call="two_halves(layers, halves, comm)",
    cases=_two_cases,
    reference=partial(_alone, _turns),
    spmd=True,
    points=3,
    tolerance=1e-4,
    rule=_both_sent,
    misconceptions=(
        Misconception("each sum is waited for where it is started, or both of a layer start after both products",
            "Nothing is hidden: the rank stands still while sums are under way. Start a half's sum as soon as it is there, and "
            "compute the other half before you wait.", partial(_alone, _waiting)),
        Misconception("both halves are waited for at the end of each layer",
            "The first half can go on to the next layer while the second half's sum is under way. Wait for a half when its own "
            "turn comes, not before.", partial(_alone, _early)),
        Misconception("the halves are handed back in the other order", "layers.done((first, second)).",
            partial(_alone, partial(_turns, swap=True))),
        Misconception("the last layer is left out", "Every layer has a product and an exchange, the last one too.",
            partial(_alone, partial(_turns, last=1))),
    ),
    hints=(
        "While the first half's sum is under way, what is there to compute that doesn't need it?",
        "Keep what is under way of each half. In each layer, for each half: wait for its sum of the layer before, compute, start."
        " Then wait for both.",
        "pending = [None, None]; for layer in range(len(layers)): for i in (0, 1): if pending[i]: xs[i] = pending[i].wait(); "
        "pending[i] = layers.start(layers.product(layer, xs[i], comm), comm). Then layers.done([p.wait() for p in pending]).",
    ),
    moral="Wait late: for each half when it is its turn again. All ranks take the same turns, so their sums match.",
)  # fmt: skip


# -- how long it takes -------------------------------------------------------------------------------------------------


def _ticks(layers: int, compute: int, exchange: int) -> int:
    """What the clock said, at the end of the right order."""
    work = Layers([torch.eye(2)] * layers, compute, exchange)
    return int(_turns(work, (torch.ones(1, 2), torch.ones(1, 2)), _Alone())[-1, 0])


def _ticks_cases(rng: random.Random) -> list[Case]:
    def draw() -> list[Case]:
        short, long = rng.randrange(2, 6), rng.randrange(7, 12)
        sizes = [
            (rng.randrange(3, 9), long, short),
            (rng.randrange(3, 9), short, long),
            (rng.randrange(3, 9), long, long),
        ]
        return [Case(size, "{} layers, product {}, exchange {}".format(*size)) for size in sizes]

    return distinct(lambda: TICKS, draw)


TICKS = Exercise(
    name="overlap.ticks",
    call="ticks(layers, compute, exchange)",
    cases=_ticks_cases,
    reference=_ticks,
    tolerance=1e-6,
    misconceptions=(
        Misconception("nothing is hidden", "That is products and exchanges one after the other: the time without overlap.",
            lambda n, c, a: 2 * n * (c + a)),
        Misconception("overlap is taken to be perfect",
            "The first product has nothing under way beside it, or the last exchange no product: one end always shows.",
            lambda n, c, a: 2 * n * max(c, a)),
        Misconception("all exchanges are taken to be hidden", "If they are longer than products, the link is what is waited for.",
            lambda n, c, a: 2 * n * c + a),
        Misconception("all products are taken to be hidden", "If they are longer than exchanges, the core is what is waited for.",
            lambda n, c, a: 2 * n * a + c),
        Misconception("only one half is counted", "Both halves pass all layers: 2 x layers products, and as many exchanges.",
            lambda n, c, a: n * max(c, a) + min(c, a)),
        Misconception("both ends are counted as exposed, in every layer", "Only once: the other half fills in.",
            lambda n, c, a: n * (max(c, a) + c + a)),
    ),
    hints=(
        "Draw two lines, one for the core and one for the link, for 2 layers. Which of the two is never idle, but for an end?",
        "The slower of core and link is busy 2 x layers times without a pause. What is before its first turn, or after its last?",
        "2 * layers * max(compute, exchange) + min(compute, exchange).",
    ),
    moral="2 L max(C, A) + min(C, A): the gain over no overlap nears (C + A) / max(C, A), at most 2, as layers grow.",
)  # fmt: skip

EXERCISES = (TWO_HALVES, TICKS)
