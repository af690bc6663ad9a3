"""Checks, grading, lessons, predictions and figures: what only notebooks use."""

import csv
import html
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest
import torch.nn.functional as F

from labkit import split
from labkit.lab import check as checking
from labkit.lab import grade as grading
from labkit.lab import lessons, plots
from labkit.lab.check import MIME, check
from labkit.lab.exercises import EXERCISES, memory
from labkit.lab.predict_then import Prediction, _PredictThen
from labkit.measure.trace import Span

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1)


def right_per_gpu(model, tp):
    kv_heads = max(model.kv_heads / tp, 1)
    layer = (
        2 * model.hidden * model.head_dim * (model.heads / tp + kv_heads) + 3 * model.hidden * model.intermediate / tp
    )
    ends = (1 if model.tied else 2) * model.vocab * model.hidden / tp
    return (model.layers * layer + ends) * model.bytes_per_param


def cases_of(exercise, seed):
    return exercise.cases(random.Random(seed))


# -- exercises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
@pytest.mark.parametrize("seed", SEEDS)
def test_each_misconception_is_wrong_and_is_told_by_its_own_name(exercise, seed):
    cases = cases_of(exercise, seed)
    right = [exercise.answers(exercise.reference, case) for case in cases]
    assert len(exercise.misconceptions) >= 3
    assert (
        exercise.diagnose(right, cases) is None or exercise.name == "tensor.column_linear"
    )  # whose whole joins to itself
    for wrong in exercise.misconceptions:
        answers = [exercise.answers(wrong.answer, case) for case in cases]
        assert max(map(exercise.distance, answers, right)) > exercise.tolerance, wrong.name
        assert exercise.diagnose(answers, cases) == wrong


def test_the_engine_counts_the_published_size_of_a_70b_model():
    # 68,976,648,192 parameters (its config.json; Llama 2, arXiv 2307.09288), two bytes each.
    assert memory.counted(memory.LLAMA_70B, 1)[0] == 2 * 68_976_648_192
    # 2 x 80 layers x 8 KV heads x 128 x 2 bytes for each token.
    assert memory.counted(memory.LLAMA_70B, 1, context=1000, batch=3)[1] == 327_680 * 3000


@pytest.mark.parametrize("seed", range(20))
def test_the_simple_formula_is_always_right_somewhere_and_wrong_where_kv_heads_are_replicated(seed):
    exercise = EXERCISES["memory.per_gpu"]
    layouts = [case.args for case in cases_of(exercise, seed)]
    assert any(tp > model.kv_heads for model, tp in layouts)
    for model, tp in layouts:
        simple = memory.counted(model, 1)[0] / tp
        far = abs(simple / memory.counted(model, tp)[0] - 1)
        assert (far > exercise.tolerance) == (tp > model.kv_heads)


def test_columns_may_be_cut_in_any_consecutive_way():
    exercise = EXERCISES["tensor.column_linear"]
    for case in cases_of(exercise, 0):
        right = exercise.answers(exercise.reference, case)
        chunks = exercise.answers(lambda x, w, ranks: F.linear(x, w).chunk(ranks, dim=1), case)
        if len(chunks) == case.ranks:
            assert exercise.compare(chunks, right) == "agrees"
        greedy = exercise.answers(lambda x, w, ranks: [F.linear(x, w), *[x.new_empty(len(x), 0)] * (ranks - 1)], case)
        assert exercise.compare(greedy, right) != "agrees"  # one rank does all the work


# -- check -------------------------------------------------------------------------------------------------------------


def test_a_right_answer_passes_with_its_points():
    result = check("memory.per_gpu", right_per_gpu, seed=3)
    assert (result.status, result.points, result.max_points, result.seed) == ("passed", 2, 2, 3)
    assert "5 cases agree" in str(result)


def test_a_known_wrong_answer_is_named_and_the_seed_repeats_it():
    def simple(model, tp):
        return right_per_gpu(model, 1) / tp

    first = check("memory.per_gpu", simple)
    again = check("memory.per_gpu", simple, seed=first.seed)
    assert (first.status, first.points) == ("not yet", 0)
    assert "That is what you get when every rank is given total / tp" in first.message
    assert first.cases == again.cases and again.attempt == first.attempt + 1
    assert f"seed={first.seed}" in first.replay


def test_an_unknown_wrong_answer_shows_case_yours_expected_and_ratio():
    result = check("memory.seventy_b", lambda tp: 420 / tp)
    assert "wrong in 3 of 3 cases, e.g. Llama-2-70B in FP16, tp=2: 3.04x the reference" in result.message
    assert "That is what you get" not in result.message
    assert result.cases[0] == {
        "case": "Llama-2-70B in FP16, tp=2", "yours": "210 GB", "expected": "68.98 GB", "compared": "3.04x the reference"
    }  # fmt: skip


def test_each_failed_attempt_shows_the_next_hint_and_hint_shows_one_at_once(monkeypatch):
    monkeypatch.setattr(checking, "_attempts", checking.Counter())
    shown = [check("memory.seventy_b", 7).hint[:11] for _ in range(4)]
    assert shown == ["Hint 1 of 3", "Hint 2 of 3", "Hint 3 of 3", "Hint 3 of 3"]
    assert check("memory.seventy_b", ..., hint=2).hint.startswith("Hint 2 of 3")
    with pytest.raises(ValueError, match="has hints 1 to 3"):
        check("memory.seventy_b", 7, hint=4)


def test_an_unknown_exercise_names_the_nearest_and_all_known():
    with pytest.raises(ValueError, match="did you mean 'memory.per_gpu'.*tensor.row_linear"):
        check("memory.pergpu", right_per_gpu)


def test_what_is_not_written_yet_is_not_attempted(monkeypatch):
    monkeypatch.setattr(checking, "_attempts", checking.Counter())

    def stub(model, tp):
        raise NotImplementedError

    for empty in (None, ..., stub, lambda model, tp: None, lambda model, tp: ...):
        result = check("memory.per_gpu", empty)
        assert (result.status, result.points, result.attempt, result.hint) == ("not attempted", 0, 0, "")


def test_an_exception_is_told_with_the_learners_line_and_without_our_traceback():
    def broken(model, tp):
        print("I got", tp)
        return model.layer / tp

    result = check("memory.per_gpu", broken)
    assert result.status == "not yet"
    assert "AttributeError: 'Shape' object has no attribute 'layer'" in result.message
    assert "return model.layer / tp" in result.message
    assert "Traceback" not in str(result) and "labkit/" not in str(result)
    assert result.prints.startswith("[rank 0] I got")


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda: 1, "It is called as per_gpu(model, tp)"),
        (lambda model, tp: "a lot", "a value of type str"),
        (lambda model, tp: sys.exit("bye"), "SystemExit: bye"),
        (lambda model, tp: float("nan"), "not a number"),
        (3.0, "hand in the function per_gpu itself"),
        (
            (lambda lock: lambda model, tp: lock)(SimpleNamespace(of=(i for i in ()))),
            "can't be sent to another process",
        ),
    ],
)
def test_odd_answers_are_explained(fn, said):
    result = check("memory.per_gpu", fn)
    assert result.status == "not yet" and said in str(result)


def test_a_function_that_never_ends_is_hung(monkeypatch):
    monkeypatch.setattr(checking, "TIMEOUT", 2.0)

    def endless(tp):
        while True:
            time.sleep(0.1)

    began = time.monotonic()
    result = check("memory.seventy_b", endless)
    assert (result.status, result.points) == ("hung", 0)
    assert "not finished after 2 s" in result.message and "in endless" in result.message
    assert time.monotonic() - began < 20


def test_a_rank_that_waits_for_the_others_in_vain_is_hung(monkeypatch):
    monkeypatch.setattr(checking, "TIMEOUT", 4.0)
    result = check("tensor.row_linear", lambda x, w, b, comm: comm.all_reduce(b) if comm.rank == 0 else b)
    assert result.status == "hung"
    assert "all_reduce on axis world" in result.message and "All ranks must enter the same operations" in result.message
    assert "comm.py" not in str(result)


def test_an_exercise_without_its_hardware_is_blocked(monkeypatch):
    needs_gpus = checking.Exercise(**{**EXERCISES["memory.seventy_b"].__dict__, "gpus": 999})
    monkeypatch.setitem(EXERCISES, "memory.seventy_b", needs_gpus)
    result = check("memory.seventy_b", lambda tp: 140 / tp)
    assert result.status == "blocked" and "needs 999 GPU(s)" in result.message


def test_products_by_hand_on_real_ranks():
    def column(x, weight, comm):
        rows = split.even(len(weight), comm.world_size)[comm.rank]
        return F.linear(x, weight[rows.start : rows.stop])

    def bias_too_early(x, weight, bias, comm):
        part = split.even(weight.shape[1], comm.world_size)[comm.rank]
        return comm.all_reduce(F.linear(x[:, part.start : part.stop], weight[:, part.start : part.stop]) + bias)

    assert check("tensor.column_linear", column).status == "passed"
    assert "when the bias is added on every rank" in check("tensor.row_linear", bias_too_early).message
    alone = check("tensor.row_linear", lambda x, weight, bias, comm: F.linear(x, weight, bias))
    assert alone.status == "not yet" and "no rank talked to another" in alone.message


def test_text_and_html_say_the_same():
    result = check("memory.seventy_b", lambda tp: 140, seed=5)
    shown = result._repr_mimebundle_()
    assert shown["text/plain"] == str(result) == repr(result)
    for essential in (
        "memory.seventy_b: not yet",
        "seed 5",
        "not divided by tp",
        "Hint",
        "2.03x the reference",
        "17.25 GB",
    ):
        assert essential in shown["text/plain"] and essential in shown["text/html"]
    assert shown[MIME]["status"] == "not yet" and shown[MIME]["max_points"] == 1
    evil = checking.CheckResult("a.b", "not yet", 1, 0, 1, "it raised <script>")
    assert "<script>" not in evil._repr_mimebundle_()["text/html"]


# -- grade -------------------------------------------------------------------------------------------------------------


# Shows a check's result without the seconds that importing torch into a kernel takes.
SHOW = f"""
from IPython.display import display
found = {{"name": "memory.seventy_b", "status": "passed", "message": "well done"}}
display({{"{MIME}": found, "text/plain": "passed"}}, raw=True)
"""


def notebook(path, *cells, checks=(), kernel="python3"):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nb.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    nb.metadata["labkit"] = {"checks": list(checks)}
    nbformat.write(nb, path)
    return path


def test_an_untouched_exercise_scores_nothing_and_a_solution_everything(tmp_path):
    untouched = grading.grade([ROOT / "exercises" / "memory_analysis.ipynb"], tmp_path / "grades.csv")
    assert {row["status"] for row in untouched["exercises"]} == {"not attempted"}
    assert (untouched["points"], untouched["max_points"]) == (0, 5)
    assert not any("rror" in row["message"] for row in untouched["exercises"])
    with (tmp_path / "grades.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in untouched["exercises"]]
    solved = grading.grade([ROOT / "solutions" / "row_parallel.ipynb"])
    assert (solved["points"], solved["max_points"]) == (1, 1)
    (row,) = solved["exercises"]
    assert (row["name"], row["status"]) == ("tensor.row_linear", "passed") and row["message"].startswith(
        "3 cases agree"
    )


@pytest.fixture
def foreign_kernel(tmp_path_factory, monkeypatch):
    """A user's own "python3" kernel, of another Python, that comes before ours; and no environment on PATH."""
    folder = tmp_path_factory.mktemp("jupyter")
    (folder / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_whatever_happens_in_a_notebook_is_graded(tmp_path, monkeypatch, foreign_kernel):
    monkeypatch.setattr(grading, "CELL_TIMEOUT", 4)
    messy = ("1 / 0", "import time; time.sleep(99)", SHOW)
    notebook(tmp_path / "a.ipynb", *messy, checks=["memory.seventy_b", "memory.per_gpu"], kernel="no-such-kernel")
    notebook(tmp_path / "b.ipynb", "import os; os._exit(1)", SHOW, checks=["memory.seventy_b"])
    (tmp_path / "c.ipynb").write_text("not a notebook")
    graded = grading.grade([tmp_path])
    a, a2, b, c = graded["exercises"]
    assert (a["name"], a["status"], a["points"]) == ("memory.seventy_b", "passed", 1)
    assert (a2["name"], a2["status"], a2["max_points"]) == ("memory.per_gpu", "not attempted", 2)
    assert "ZeroDivisionError" in a2["message"]
    assert (b["status"], b["points"], b["max_points"]) == ("not attempted", 0, 1) and "kernel died" in b["message"]
    assert c["status"] == "not attempted" and "can be read" in c["message"]
    assert grading.table(graded).row_count == 7  # four checks, and the sums of three


MARK = "a-child-that-a-notebook-started"
MESSY = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "{MARK}"])
open("litter.txt", "w").write(os.environ["HOME"])
assert os.getcwd() == os.environ["HOME"] == os.environ["TMPDIR"]
import helper
try:
    kept = bytearray(10**10)
    raise RuntimeError("10 GB")
except MemoryError:
    pass
"""


def test_a_class_is_graded_by_student_in_parallel_and_what_notebooks_do_stays_theirs(tmp_path):
    for student in ("ann", "ben"):
        (tmp_path / student).mkdir()
    (tmp_path / "ann" / "helper.py").write_text("")
    notebook(tmp_path / "ann" / "memory_analysis.ipynb", MESSY, SHOW, checks=["memory.seventy_b", "memory.kv_per_gpu"])
    forged = SHOW.replace('"passed", "mess', '"excellent", "mess')
    notebook(tmp_path / "ben" / "memory_analysis.ipynb", "import os; os._exit(0)", checks=["memory.seventy_b"])
    notebook(tmp_path / "cleo.ipynb", forged, checks=["memory.seventy_b"])
    before = sorted(tmp_path.rglob("*"))
    graded = grading.grade([tmp_path], tmp_path / "grades.csv", jobs=2)
    assert graded["students"] == [
        {"student": "cleo", "points": 0, "max_points": 1},
        {"student": "ann", "points": 1, "max_points": 3},
        {"student": "ben", "points": 0, "max_points": 1},
    ]
    (messy,) = [row for row in graded["exercises"] if row["name"] == "memory.kv_per_gpu"]
    assert messy["message"] == "no result of this check was shown"  # and no cell failed
    assert "kernel died" in graded["exercises"][-1]["message"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if MARK in (p.info["cmdline"] or ())]
    with (tmp_path / "grades.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["student"], row["name"], row["points"]) for row in rows] == [
        ("cleo", "memory.seventy_b", "0"), ("ann", "memory.seventy_b", "1"), ("ann", "memory.kv_per_gpu", "0"),
        ("ben", "memory.seventy_b", "0"),
    ]  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "grades.csv"])


def test_a_classroom_can_grade_with_pytest(tmp_path):
    notebook(tmp_path / "dan.ipynb", SHOW, checks=["memory.seventy_b", "memory.per_gpu"])
    passed, missing = grading.cases(tmp_path)
    assert (passed.id, passed.values[0]["status"]) == ("dan-memory.seventy_b", "passed")
    assert (missing.id, missing.values[0]["status"]) == ("dan-memory.per_gpu", "not attempted")


def test_a_check_in_a_notebook_has_a_progress_bar_that_goes_away(tmp_path):
    cell = "from labkit import check\ncheck('memory.seventy_b', lambda tp: 1)"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    assert grading.execute(nb, tmp_path) == ""
    bar, result = nb.cells[0].outputs
    assert (bar.output_type, bar.data["text/html"]) == ("display_data", "")
    assert result.data[MIME]["status"] == "not yet"


def test_a_path_without_notebooks_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.ipynb"):
        with pytest.raises(ValueError, match="use a notebook"):
            grading.grade([path])


# -- lessons -----------------------------------------------------------------------------------------------------------


def test_lessons_run_with_parameters_in_this_interpreter_past_failures(tmp_path, monkeypatch, foreign_kernel):
    monkeypatch.setitem(lessons.CELL_TIMEOUT, "ci", 4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    lesson = tmp_path / "notebooks" / "01_good.ipynb"
    say = "import sys\nassert (PROFILE, RANKS > 1, SEED) == ('ci', True, 0)\nprint(sys.executable)"
    notebook(
        lesson,
        'PROFILE = ""\nRANKS = 0\nSEED = 9',
        say,
        SHOW,
        checks=["memory.seventy_b"],
        kernel="no-such",
    )
    nb = nbformat.read(lesson, as_version=4)
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, lesson)
    notebook(tmp_path / "notebooks" / "02_bad.ipynb", "x = 1", "1 / 0")
    notebook(tmp_path / "notebooks" / "03_slow.ipynb", "import time", "time.sleep(99)")
    good, bad, slow = lessons.run_lessons([], "ci", tmp_path / "out")
    assert (good["name"], good["status"], good["grade"], good["error"]) == ("01_good", "passed", "1/1", "")
    assert (bad["status"], bad["grade"]) == ("failed", "-") and bad["error"].endswith(
        ": ZeroDivisionError: division by zero"
    )
    assert slow["status"] == "timed out" and slow["seconds"] < 25
    assert sys.executable in (tmp_path / "out" / "01_good.ipynb").read_text()
    assert sys.executable in (tmp_path / "out" / "01_good.html").read_text()
    assert lessons.table([good, bad, slow]).row_count == 3


def test_unknown_lessons_and_profiles_name_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="03_tensor_parallel"):
        lessons.run_lessons(["99"], "ci", tmp_path)
    with pytest.raises(ValueError, match="laptop"):
        lessons.run_lessons([], "fast", tmp_path)


# -- predictions and figures -------------------------------------------------------------------------------------------


def test_predict_then_compares_in_text_and_html_and_keeps_one_row_for_each_name():
    predict_then = _PredictThen()
    predict_then("all-reduces", None, 60)
    row = predict_then("all-reduces", 240, 60, model=60)
    shown = row._repr_mimebundle_()
    for essential in ("all-reduces", "240", "4.00x the measured value", "1.00x", "measured"):
        assert essential in shown["text/plain"] and essential in shown["text/html"]
    predict_then("time", 1.5, 3.0, unit="ms")
    table = predict_then.table()
    assert list(table.index) == ["all-reduces", "time"]
    assert table.loc["time", "you / measured"] == 0.5 and table.loc["time", "formula"] == "-"
    assert "no guess" in str(Prediction("x", None, None, 1.0))
    for wrong in ({"guess": "many"}, {"guess": float("nan")}, {"measured": None}):
        with pytest.raises(ValueError, match="use a finite number"):
            predict_then(**{"name": "x", "guess": 1, "measured": 1.0, **wrong})


def test_every_figure_carries_alt_text_with_its_numbers():
    shares = split.heads(9, 3, 2)
    sizes = pd.DataFrame({"op": "all_reduce", "path": "sockets", "ranks": 2, "bytes": [256, 512], "median_us": [3.0, 4.0],
                          "p95_us": [5.0, 6.0]})  # fmt: skip
    trace = [Span(0, "compute", "prefill", 0.0, 0.002), Span(0, "tp", "all_reduce", 0.002, 0.0025, flight=True)]
    figures = [
        (plots.collectives(sizes, {"all_reduce": [(256, 2.0, 0.256)]}), "all_reduce: 3 us at 256 bytes, 4 us at 512"),
        (plots.gantt(trace, title="one rank"), "rank 0: compute 2.0 ms."),
        (
            plots.throughput({1: 20, 8: 130}, {2: 39, 16: 250}, {2: 40}, stages=2),
            "each stage, PP=2: 39 at 1, 250 at 8; by requests for each stage, PP=2, predicted: 40 at 1, 260 at 8.",
        ),
        (plots.gains(["1gbit"], {"chunks": [1.5]}, {"bound": [2.0]}), "bound: 2.00 at 1gbit; chunks: 1.50 at 1gbit"),
        (plots.owners({"9 query heads": [s.query for s in shares]}), "rank 1 holds 5 to 8"),
        (plots.memory({"TP=2": [138e6, 131e6]}), "TP=2: 138.0, 131.0"),
        (
            plots.footprint({"TP=1": {"weights": 70.0, "KV cache": 5.0}, "TP=2": {"weights": 35.0}}, 72.0),
            "of 72.0 GB that can be used. TP=1: 75 GB (weights 70, KV cache 5), does not fit; TP=2: 35 GB (weights 35), fits",
        ),
        (
            plots.terms({"TP=8": {"weights": 27.0, "layers": 2.5}}, "A token"),
            "A token. TP=8: 29.5 ms (weights 27, layers 2.5).",
        ),
        (
            plots.grid([{"rank": r, "place": {"pp": r, "tp": 0}, "layers": 15, "weights_bytes": 9e7} for r in (0, 1)]),
            "stage 1, shard 0: rank 1, 15 layers, 90 MB",
        ),
        (plots.latency({"TP=1": {"weights": 20.0, "per layer": 5.0}}, {"TP=1": 26.0}), "predicted 25.0 ms"),
    ]
    for figure, said in figures:
        data, metadata = figure._repr_mimebundle_()
        assert said in metadata["image/png"]["alt"] == data["text/plain"]
        assert f'<img alt="{html.escape(data["text/plain"])}"' in data["text/html"]
        assert len(data["image/png"]) > 1000
    assert len(set(zip(plots.COLOURS, plots.HATCHES, strict=True))) == 8
