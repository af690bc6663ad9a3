"""The exercises on pipelines and on KV capacity: each mistake that they know is told by its name, and the engine agrees."""

import random
from dataclasses import replace

import nbformat
import pytest
from test_notebooks import ROOT

from labkit.lab.check import check
from labkit.lab.exercise import Case, distinct
from labkit.lab.exercises import EXERCISES, memory, pipeline
from labkit.lab.exercises.communication import served

SEED = 4
NAMES = ("pipeline.schedule", "pipeline.finish", "pipeline.bubble", "memory.kv_capacity")


def solution(name):
    """The function that the solution notebook hands in."""
    book = "kv_capacity" if name.startswith("memory") else "pipeline_schedule"
    scope = {}
    for cell in nbformat.read(ROOT / "solutions" / f"{book}.ipynb", as_version=4).cells:
        if "answer" in cell.metadata.get("tags", []):
            exec(cell.source, scope)
    return scope[name.split(".")[1]]


def told(name, fn, part):
    """Whether a check of `fn` names the misconception whose name holds `part`."""
    found = {m.name for m in EXERCISES[name].misconceptions if part in m.name}
    assert len(found) == 1, found
    result = check(name, fn, seed=SEED)
    assert (result.status, result.points) == ("not yet", 0), result
    return f"That is what you get when {found.pop()}. " in result.message


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    for seed in (SEED, 7):
        result = check(name, solution(name), seed=seed)
        assert (result.status, result.points) == ("passed", 2), result


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_written_yet_is_not_attempted(name):
    def stub(*args):
        raise NotImplementedError

    assert check(name, stub, seed=SEED).status == "not attempted"


def test_misconceptions_that_no_case_can_tell_apart_are_refused():
    finish = EXERCISES["pipeline.finish"]
    twice = replace(finish, misconceptions=(finish.misconceptions[0],) * 2)
    with pytest.raises(RuntimeError, match="pipeline.finish: no cases tell all its misconceptions"):
        distinct(lambda: twice, lambda: [Case(((2, 5, 1), 3), "times 2 5 1")])


# -- who works on what -------------------------------------------------------------------------------------------------


def table(begins, last):
    """The table in which stage s begins micro-batch j in tick begins(p, m, s, j), up to tick last(p, m)."""

    def fn(p, m):
        rows = [[-1] * p for _ in range(last(p, m) + 1)]
        for s in range(p):
            for j in range(m):
                rows[begins(p, m, s, j)][s] = j
        return rows

    return fn


def right_table(p, m):
    return [[t - s if 0 <= t - s < m else -1 for s in range(p)] for t in range(m + p - 1)]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (table(lambda p, m, s, j: p * j + s, lambda p, m: p * m - 1), "before the next one enters"),
        (table(lambda p, m, s, j: m * s + j, lambda p, m: p * m - 1), "has done all micro-batches"),
        (lambda p, m: [[t] * p for t in range(m)], "at the same time"),
        (lambda p, m: [row[::-1] for row in right_table(p, m)], "the last stage begins"),
        (table(lambda p, m, s, j: 2 * s + j, lambda p, m: m + 2 * p - 3), "handing over takes a tick"),
        (lambda p, m: right_table(p, m)[:m], "ends when the first stage"),
        (lambda p, m: right_table(p, m)[p - 1 :], "begins when the last stage"),
        (lambda p, m: list(zip(*right_table(p, m), strict=True)), "rows are stages"),
        (lambda p, m: [[n + 1 for n in row] for row in right_table(p, m)], "from 1"),
        (lambda p, m: [[max(n, 0) for n in row] for row in right_table(p, m)], "idle stages"),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_told_by_name(fn, name):
    assert told("pipeline.schedule", fn, name)


def test_a_table_that_is_no_table_is_explained():
    with_none = check(
        "pipeline.schedule", lambda p, m: [[None if n < 0 else n for n in row] for row in right_table(p, m)]
    )
    ragged = check("pipeline.schedule", lambda p, m: [[n for n in row if n >= 0] for row in right_table(p, m)])
    assert "a value of type list; a number or a tensor is needed" in with_none.message == ragged.message


@pytest.mark.parametrize("pp", [2, 3])
def test_the_engine_takes_as_many_ticks_as_the_clocks_say(pp):
    """A prefill of m prompts, one in each step: what the engine counts as idle are the empty places of the table."""
    for m in (1, 4):
        starts = pipeline.begun((1,) * pp, m)
        ticks = 1 + max(map(max, starts))
        prompts = [[i + 1] * 16 for i in range(m)]
        report = served(pipeline._SMALL, prompts, 1, pipeline_parallel_size=pp, max_num_batched_tokens=16)
        assert report["bubble_fraction"] == pytest.approx(1 - m / ticks)


# -- stages that are not alike -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda t, m: m * max(t), "only the slowest"),
        (lambda t, m: (m + len(t) - 1) * max(t), "every tick"),
        (lambda t, m: (m + len(t) - 1) * sum(t) / len(t), "their mean"),
        (lambda t, m: sum(t) + (m - 1) * sum(t) / len(t), "their mean"),
        (lambda t, m: m * sum(t), "before the next one enters"),
        (lambda t, m: sum(t), "one micro-batch is followed"),
        (lambda t, m: sum(t) + m * max(t), "once too often"),
        (lambda t, m: sum(t) + (m - 1) * t[-1], "the last stage sets"),
        (lambda t, m: sum(t) + (m - 1) * t[0], "the first stage sets"),
    ],
)  # fmt: skip
def test_a_wrong_finish_is_told_by_name(fn, name):
    assert told("pipeline.finish", fn, name)


def test_a_finish_that_is_worked_out_stage_by_stage_passes():
    def step_by_step(times, microbatches):
        done = [0] * len(times)
        for _ in range(microbatches):
            before = 0
            for stage, time in enumerate(times):
                before = done[stage] = max(before, done[stage]) + time
        return done[-1]

    assert check("pipeline.finish", step_by_step, seed=SEED).status == "passed"
    assert step_by_step([2, 5, 1], 3) == 18  # as the notebook says


# -- the bubble of a decode --------------------------------------------------------------------------------------------


def right_bubble(p, r, t):
    lanes = min(p, r)
    return 1 - t * lanes / ((t - 1) * p + lanes + p - 1)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda p, r, t: (p - 1) / (r + p - 1), "micro-batches of one pass"),
        (lambda p, r, t: (p - 1) / (t + p - 1), "follow each other"),
        (lambda p, r, t: (p - 1) / (r * t + p - 1), "independent micro-batches"),
        (lambda p, r, t: max(0, 1 - r / p), "filling and draining"),
        (lambda p, r, t: (p - 1) / p, "to be alone"),
        (lambda p, r, t: 0, "there is no bubble"),
        (lambda p, r, t: 1 - right_bubble(p, r, t), "the busy part"),
        (lambda p, r, t: right_bubble(p, r, t) / (1 - right_bubble(p, r, t)), "divided by busy time"),
        (lambda p, r, t: 1 - r * t / ((t - 1) * max(p, r) + r + p - 1), "a turn each"),
    ],
)  # fmt: skip
def test_a_wrong_bubble_is_told_by_name(fn, name):
    assert told("pipeline.bubble", fn, name)


# -- how many sequences fit --------------------------------------------------------------------------------------------


def capacity(*, kv=lambda m, tp: max(m.kv_heads / tp, 1), vectors=2, size=None, of=lambda layers: layers, pick=min,
             tokens=lambda n: -(-n // 16) * 16, whole=True):  # fmt: skip
    """A learner's function, right as it stands, wrong in the way that is asked for."""

    def fn(model, tp, layers, free, length):
        row = vectors * kv(model, tp) * model.head_dim * (size or model.bytes_per_param) * tokens(length)
        fits = [room / (n * row) for n, room in zip(of(layers), free, strict=False)]
        return pick(map(int, fits)) if whole else pick(fits)

    return fn


def one_pot(m, tp, layers, free, length):
    row = 2 * m.kv_heads * m.head_dim * m.bytes_per_param * (-(-length // 16) * 16)
    return sum(free) * tp // (sum(layers) * row)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (capacity(vectors=1), "K and V"),
        (capacity(kv=lambda m, tp: m.heads / tp), "query heads"),
        (capacity(kv=lambda m, tp: m.kv_heads / tp), "goes on shrinking"),
        (capacity(kv=lambda m, tp: m.kv_heads), "all KV heads"),
        (capacity(of=lambda layers: [sum(layers)] * len(layers)), "the cache of all layers"),
        (capacity(of=lambda layers: [sum(layers) / len(layers)] * len(layers)), "the same number of layers"),
        (capacity(of=lambda layers: [1] * len(layers)), "only one layer"),
        (capacity(of=lambda layers: layers[:1]), "only the first stage"),
        (lambda m, tp, layers, free, n: capacity()(m, tp, layers[-1:], free[-1:], n), "only the last stage"),
        (capacity(pick=max), "roomiest"),
        (capacity(pick=sum), "added up"),
        (one_pot, "one pot"),
        (capacity(tokens=lambda n: n), "not rounded up"),
        (capacity(tokens=lambda n: n // 16 * 16), "rounded down to"),
        (capacity(tokens=lambda n: 16), "tokens or blocks"),
        (capacity(tokens=lambda n: 1), "tokens or blocks"),
        (capacity(size=1), "one byte"),
        (capacity(whole=False), "a part of a sequence"),
    ],
)  # fmt: skip
def test_a_wrong_capacity_is_told_by_name(fn, name):
    assert told("memory.kv_capacity", fn, name)


def test_one_sequence_off_is_wrong():
    right = solution("memory.kv_capacity")
    assert "wrong in 4 of 4 cases" in check("memory.kv_capacity", lambda *case: right(*case) + 1, seed=SEED).message


def test_the_engine_serves_as_many_sequences_as_fit_and_no_more():
    """On real ranks: their caches are as large as was counted, and one sequence more has to give up its room."""
    model, length, tp, pp = memory.Shape(5, 48, 64, 4, 2, 12, 96, False, 4), 40, 2, 2
    held = memory.stages(model, tp, pp, 1, 16)
    free = tuple(random.Random(SEED).randrange(14, 18) * stage.kv for stage in held)
    fits = solution("memory.kv_capacity")(model, tp, [stage.layers for stage in held], free, length)
    blocks = min(room // stage.kv for room, stage in zip(free, held, strict=True))
    assert fits == blocks // 3 >= 4
    options = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "max_model_len": length}
    reports = [
        served(model, [[i]] * n, length - 1, kv_cache_tokens=16 * blocks, **options)
        for i, n in enumerate((fits, blocks))
    ]
    for rank in reports[0]["ranks"]:
        assert rank["kv_bytes"] == blocks * held[rank["stage"]].kv
    assert [rank["preemptions"] for rank in reports[0]["ranks"]] == [0] * 4
    assert all(rank["preemptions"] > 0 for rank in reports[1]["ranks"])
