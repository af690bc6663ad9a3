"""The exercises on pipelines and on KV capacity: the engine agrees with them."""

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


def solution(name):
    """The function that the solution notebook hands in."""
    book = "kv_capacity" if name.startswith("memory") else "pipeline_schedule"
    scope = {}
    for cell in nbformat.read(ROOT / "solutions" / f"{book}.ipynb", as_version=4).cells:
        if "answer" in cell.metadata.get("tags", []):
            exec(cell.source, scope)
    return scope[name.split(".")[1]]


def test_misconceptions_that_no_case_can_tell_apart_are_refused():
    finish = EXERCISES["pipeline.finish"]
    twice = replace(finish, misconceptions=(finish.misconceptions[0],) * 2)
    with pytest.raises(RuntimeError, match="pipeline.finish: no cases tell all its misconceptions"):
        distinct(lambda: twice, lambda: [Case(((2, 5, 1), 3), "times 2 5 1")])


# -- who works on what -------------------------------------------------------------------------------------------------


def right_table(p, m):
    return [[t - s if 0 <= t - s < m else -1 for s in range(p)] for t in range(m + p - 1)]


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


# -- how many sequences fit --------------------------------------------------------------------------------------------


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
