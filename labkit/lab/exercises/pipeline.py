"""Which stage works on what, and when. The references are told by real ranks that pass micro-batches on."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from labkit.comm import Comm
from labkit.lab.exercise import Case, Exercise, Misconception, distinct
from labkit.lab.exercises.communication import served
from labkit.lab.exercises.memory import Shape
from labkit.launch.local import run

Times = tuple[int, ...]  # of each stage, for one micro-batch
IDLE = -1


def _stage(comm: Comm, times: Times, microbatches: int) -> list[int]:
    """When this rank's stage begins each micro-batch, by a clock that goes on by its time and waits for what is sent to it.

    A micro-batch carries the time at which it left the stage before: the order is that of real messages, and no processor's
    speed enters.
    """
    now, begun = 0, []
    for _ in range(microbatches):
        if comm.rank > 0:
            now = max(now, int(comm.recv(torch.empty(1, dtype=torch.int64, device=comm.device), comm.rank - 1)))
        begun.append(now)
        now += times[comm.rank]
        if comm.rank + 1 < comm.world_size:
            comm.send(torch.tensor([now], device=comm.device), comm.rank + 1)
    return begun


@lru_cache(maxsize=64)
def begun(times: Times, microbatches: int) -> list[list[int]]:
    """When each stage begins each micro-batch, on as many real ranks as there are stages."""
    return run(_stage, len(times), args=(times, microbatches))


# -- who works on what -------------------------------------------------------------------------------------------------


def _table(starts: Sequence[Sequence[int]]) -> torch.Tensor:
    """(ticks, stages): the micro-batch that each stage works on, from the ticks in which each stage begins them."""
    table = torch.full((1 + max(map(max, starts)), len(starts)), IDLE)
    for stage, ticks in enumerate(starts):
        for microbatch, tick in enumerate(ticks):
            table[tick, stage] = microbatch
    return table


def _schedule(stages: int, microbatches: int) -> torch.Tensor:
    return _table(begun((1,) * stages, microbatches))


def _begins(tick: Callable[[int, int, int, int], int], p: int, m: int) -> torch.Tensor:
    """A table in which stage s begins micro-batch j in tick(s, j, p, m)."""
    return _table([[tick(s, j, p, m) for j in range(m)] for s in range(p)])


def _schedule_cases(rng: random.Random) -> list[Case]:
    sizes = [(2, rng.randrange(3, 7)), (3, rng.randrange(4, 8)), (4, rng.choice((3, 5, 6, 7)))]
    return [Case((p, m), f"{p} stages, {m} micro-batches") for p, m in sizes]


SCHEDULE = Exercise(
    name="pipeline.schedule",
    call="schedule(stages, microbatches)",
    cases=_schedule_cases,
    reference=_schedule,
    points=2,
    tolerance=1e-6,
    misconceptions=(
        Misconception("a micro-batch must leave the last stage before the next one enters the first",
            "Then one stage works at a time and the others wait. Stage 0 has nothing to do with micro-batch 0 after its tick, so "
            "it can begin the next at once.", partial(_begins, lambda s, j, p, m: p * j + s)),
        Misconception("a stage begins when the stage before it has done all micro-batches",
            "That is the whole batch handed on in one piece. A stage can begin each micro-batch as soon as that one comes.",
            partial(_begins, lambda s, j, p, m: m * s + j)),
        Misconception("all stages work on the same micro-batch at the same time",
            "That is tensor parallelism. A stage needs what the stage before it has made of the micro-batch, one tick earlier.",
            partial(_begins, lambda s, j, p, m: j)),
        Misconception("the last stage begins, and the first comes last",
            "Micro-batches enter at stage 0: that one has the embedding.", partial(_begins, lambda s, j, p, m: p - 1 - s + j)),
        Misconception("handing over takes a tick of its own",
            "Here it takes no time: what a stage has done in one tick, the next stage has in the next.",
            partial(_begins, lambda s, j, p, m: 2 * s + j)),
        Misconception("the table ends when the first stage is done",
            "The last micro-batch still has the other stages before it: p - 1 ticks more, in which the pipeline drains.",
            lambda p, m: _schedule(p, m)[:m]),
        Misconception("the table begins when the last stage has something to do",
            "The first p - 1 ticks, in which the pipeline fills, belong to it.", lambda p, m: _schedule(p, m)[p - 1 :]),
        Misconception("rows are stages and columns are ticks", "The other way round: one row for each tick.",
            lambda p, m: _schedule(p, m).T),
        Misconception("micro-batches are counted from 1, and 0 means idle", "They count from 0, and -1 means idle.",
            lambda p, m: _schedule(p, m) + 1),
        Misconception("idle stages are said to work on micro-batch 0", "Idle is -1; micro-batch 0 is the first one.",
            lambda p, m: _schedule(p, m).clamp(min=0)),
    ),
    hints=(
        "Write down by hand when each stage works on micro-batch 0, then on micro-batch 1. What changes from one to the next?",
        "Micro-batch j enters stage 0 in tick j, and moves on by a stage with each tick. So in tick t stage s works on which?",
        "[[t - s if 0 <= t - s < microbatches else -1 for s in range(stages)] for t in range(microbatches + stages - 1)].",
    ),
    moral="m + p - 1 ticks, of which each stage works in m: the bubble is (p - 1) / (m + p - 1).",
)  # fmt: skip


# -- stages that are not alike -----------------------------------------------------------------------------------------


def _finish(times: Times, m: int) -> int:
    return begun(times, m)[-1][-1] + times[-1]


def _finish_cases(rng: random.Random) -> list[Case]:
    """The slowest stage first, in the middle, and last."""

    def draw() -> list[Case]:
        cases = []
        for p, slowest in ((2, 0), (3, 1), (4, rng.choice((1, 2))), (3, 2)):
            times = [rng.randrange(2, 9) for _ in range(p)]
            times[slowest] = rng.randrange(9, 13)
            m = rng.randrange(3, 9)
            cases.append(Case((tuple(times), m), f"times {times}, {m} micro-batches"))
        return cases

    return distinct(lambda: FINISH, draw)


FINISH = Exercise(
    name="pipeline.finish",
    call="finish(times, microbatches)",
    cases=_finish_cases,
    reference=_finish,
    points=2,
    tolerance=1e-6,
    misconceptions=(
        Misconception("only the slowest stage is counted, once for each micro-batch",
            "The first micro-batch must come to it, and the last must go on behind it, through all the other stages.",
            lambda t, m: m * max(t)),
        Misconception("every tick is as long as the slowest stage",
            "That is (m + p - 1) ticks in step. But nobody keeps step: a stage begins as soon as it is free and has something. "
            "While the pipeline fills and drains, the fast stages are fast.", lambda t, m: (m + len(t) - 1) * max(t)),
        Misconception("all stages are taken to be as fast as their mean",
            "On average they may be, but a queue forms before the slowest, and the stages behind it wait: it sets the pace.",
            lambda t, m: (m + len(t) - 1) * sum(t) / len(t)),
        Misconception("a micro-batch must leave the last stage before the next one enters the first",
            "The stages then work one at a time. They can work at once, on different micro-batches.", lambda t, m: m * sum(t)),
        Misconception("one micro-batch is followed, and the others are forgotten", "It is m of them that must be done.",
            lambda t, m: sum(t)),
        Misconception("the slowest stage is counted once too often",
            "The sum over all stages has the slowest one's time for one micro-batch already: m - 1 are left.",
            lambda t, m: sum(t) + m * max(t)),
        Misconception("the last stage sets the pace", "If it isn't the slowest, it waits for that one.",
            lambda t, m: sum(t) + (m - 1) * t[-1]),
        Misconception("the first stage sets the pace", "It begins one micro-batch after the other, but a slower one behind it "
            "can't keep up with it.", lambda t, m: sum(t) + (m - 1) * t[0]),
    ),
    hints=(
        "Follow the first micro-batch: when is it done? Then look at the slowest stage only: when does it begin, and does it "
        "ever wait again?",
        "Once the slowest stage has its first micro-batch it always has work. Time until then, m times its own, time behind it.",
        "sum(times) + (microbatches - 1) * max(times).",
    ),
    moral="The slowest stage sets the pace, for everybody: that is why stages are cut by what they cost, not by layers alone.",
)  # fmt: skip


# -- the bubble of a decode --------------------------------------------------------------------------------------------

_SMALL = Shape(4, 48, 64, 4, 2, 12, 96, False, 4)


@lru_cache(maxsize=64)
def _bubble(stages: int, requests: int, tokens: int) -> float:
    """What the engine counted on real ranks."""
    prompts = [[i + 1, i + 2, i + 3] for i in range(requests)]
    return served(_SMALL, prompts, tokens, pipeline_parallel_size=stages)["bubble_fraction"]


def _bubble_cases(rng: random.Random) -> list[Case]:
    """One request alone, fewer than stages, as many, more."""

    def draw() -> list[Case]:
        counts = ((2, 1), (4, rng.choice((2, 3))), (3, 3), (2, rng.randrange(3, 9)))
        sizes = [(p, requests, rng.randrange(4, 10)) for p, requests in counts]
        return [Case(size, "{} stages, {} request(s), {} tokens each".format(*size)) for size in sizes]

    return distinct(lambda: BUBBLE, draw)


def _one_pass(p: int, m: int) -> float:
    return (p - 1) / (m + p - 1)


BUBBLE = Exercise(
    name="pipeline.bubble",
    call="bubble(stages, requests, tokens)",
    cases=_bubble_cases,
    reference=_bubble,
    points=2,
    tolerance=0.005,
    misconceptions=(
        Misconception("requests are taken for the micro-batches of one pass",
            "(p - 1) / (m + p - 1) is for one pass. Here each request comes back to stage 0 again and again, and with too few of "
            "them there is a bubble in every round.", lambda p, r, t: _one_pass(p, r)),
        Misconception("one request's tokens are taken to follow each other through the stages at once",
            "The next token can't enter stage 0 before this one has left the last stage: it is this one, sampled.",
            lambda p, r, t: _one_pass(p, t)),
        Misconception("all tokens of all requests are taken to be independent micro-batches",
            "Those of different requests are, those of one request are not: each waits for the one before it to be sampled.",
            lambda p, r, t: _one_pass(p, r * t)),
        Misconception("filling and draining are left out",
            "1 - min(1, requests / stages) is the bubble of a decode that never ends. With so few tokens the ends show.",
            lambda p, r, t: 1 - min(1, r / p)),
        Misconception("one request is taken to be alone",
            "With more of them in flight, one stage works on this and another on that.", lambda p, r, t: 1 - 1 / p),
        Misconception("there is no bubble in a decode",
            "There is while the pipeline fills, while it drains, and in each round with fewer requests than stages.",
            lambda p, r, t: 0.0),
        Misconception("it is the busy part, not the idle one", "The bubble is what is left: 1 - busy.",
            lambda p, r, t: 1 - _bubble(p, r, t)),
        Misconception("idle time is divided by busy time", "Divide it by all of the time, busy and idle.",
            lambda p, r, t: _bubble(p, r, t) / (1 - _bubble(p, r, t))),
        Misconception("more requests than stages are given a turn each",
            "With more requests than stages they share turns: there are as many lanes as stages, and all requests of a lane are "
            "one batch.", lambda p, r, t: 1 - r * t / ((t - 1) * max(p, r) + r + p - 1)),
    ),
    hints=(
        "How many lanes have anything to do? In how many of its ticks does each stage work, then?",
        "A lane has its turn every p ticks, `tokens` times. min(requests, stages) lanes have work, and begin one tick after the "
        "other. And the last stage comes p - 1 ticks after the first.",
        "lanes = min(requests, stages); ticks = (tokens - 1) * stages + lanes + stages - 1; 1 - tokens * lanes / ticks.",
    ),
    moral="With fewer requests than stages there is a bubble in every round; with as many or more, only at both ends.",
)  # fmt: skip

EXERCISES: tuple[Exercise, ...] = (SCHEDULE, FINISH, BUBBLE)
