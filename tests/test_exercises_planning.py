"""The exercises on planning: each mistake that they know is told by its name, and the cost model agrees with the solutions."""

import random

import nbformat
import pytest
import torch
from test_notebooks import ROOT

from labkit.lab.check import check
from labkit.lab.exercises import EXERCISES
from labkit.lab.exercises.communication import sent
from labkit.lab.exercises.memory import LLAMA_70B
from labkit.lab.exercises.planning import gpu
from labkit.predict.cost import predict

SEED = 4
BOOKS = {"planning.per_gpu": "parallelism_design", "planning.choose": "parallelism_design",
         "planning.time_per_token": "latency_analysis"}  # fmt: skip


def solution(name):
    """The function that the solution notebook hands in."""
    scope = {"predict": predict}
    for cell in nbformat.read(ROOT / "solutions" / f"{BOOKS[name]}.ipynb", as_version=4).cells:
        if "answer" in cell.metadata.get("tags", []):
            exec(cell.source, scope)
    return scope[name.split(".")[1]]


def told(name, fn, part):
    """Whether `fn`, wrong as it is, is told the misconception whose name holds `part`."""
    exercise = EXERCISES[f"planning.{name}"]
    cases = exercise.cases(random.Random(SEED))
    mine = [[torch.as_tensor(fn(*case.args), dtype=torch.float64)] for case in cases]
    assert any(
        exercise.compare(a, exercise.answers(exercise.reference, c)) != "agrees"
        for a, c in zip(mine, cases, strict=True)
    )
    found = exercise.diagnose(mine, cases)
    return found is not None and part in found.name


def test_a_wrong_layout_is_shown_in_numbers_with_its_name():
    result = check("planning.choose", lambda model, hardware, gpus, batch, context: (gpus, 1, 1), seed=SEED)
    assert result.status == "not yet" and "spread over all GPUs, whatever joins them" in result.message, result
    assert result.cases[1]["yours"] == "16, 1, 1" and result.cases[1]["expected"] == "8, 2, 1"


@pytest.mark.parametrize("seed", range(8))
def test_every_draw_tells_right_and_wrong_apart(seed):
    for name in BOOKS:
        assert EXERCISES[name].cases(random.Random(seed))


# -- weights of a hybrid layout ----------------------------------------------------------------------------------------


def test_the_weights_of_175b_on_eight_gpus_are_a_fact_and_88_gb_are_not():
    gpt3 = EXERCISES["planning.per_gpu"].cases(random.Random(0))[0].args[0]
    right = solution("planning.per_gpu")(gpt3, 2, 4, 1)
    assert 43.5e9 < right < 44e9
    assert told("per_gpu", lambda m, tp, pp, dp: m.total / pp, "tp is forgotten")  # 87.5 GB


# -- time per token ----------------------------------------------------------------------------------------------------


def paper(m, tp, pp, on, *, calls=2, layers=1.0, efficiency=None, share=None, each=None):
    read = m.total / (share or tp) / (on.bandwidth_gbs * (efficiency or on.efficiency)) / 1e6
    exchanges = (tp > 1) * calls * m.layers * (on.all_reduce_us[tp] if each is None else each)
    return read + (exchanges + layers * m.layers * on.layer_us + (pp > 1) * pp * on.hop_us) / 1e3


def test_the_formula_on_paper_is_what_predict_says_of_the_four_gpus():
    on = gpu("h100-sxm,link_gbs=100")
    for tp, pp in ((2, 1), (4, 1), (2, 2)):
        whole = predict("llama-2-70b", "h100-sxm,link_gbs=100", tp=tp, pp=pp, context=1)["tpot_ms"]
        assert paper(LLAMA_70B, tp, pp, on) == pytest.approx(whole, rel=0.02)


# -- a layout ----------------------------------------------------------------------------------------------------------


# -- communication volume ----------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_70b_model_sends_what_the_formula_says():
    assert sent(LLAMA_70B, 4) == 160 * 16_384 * 1.5
