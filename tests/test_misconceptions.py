"""What holds for every registered exercise, found by its name: its solution, its stub, and each typical mistake.

A mistake is a file, tests/misconceptions/EXERCISE/ANY_NAME.py: the function as a learner would write it, and as its docstring
the name of the misconception that it stems from.
"""

import ast
import random
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from labkit.lab.check import MIME, judge
from labkit.lab.exercises import EXERCISES
from labkit.lab.isolate import Prints

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "exercises").glob("*.ipynb"))
SEED = 4


def mistakes(exercise):
    """(misconception, function) of each file."""
    wanted, found = exercise.call.split("(")[0], []
    for path in sorted((Path(__file__).parent / "misconceptions" / exercise.name).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        scope = {"__name__": "learner"}
        exec(compile(source, str(path), "exec"), scope)
        found.append((ast.get_docstring(ast.parse(source)), scope[wanted]))
    return found


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_every_misconception_has_a_file_that_is_rejected_with_its_own_explanation(exercise):
    files = mistakes(exercise)
    assert {name for name, _ in files} == {wrong.name for wrong in exercise.misconceptions}
    assert len({name for name, _ in files}) >= 3
    verdicts = judge(exercise, [fn for _, fn in files], exercise.cases(random.Random(SEED)), Prints())
    for (name, _), (status, message, rows) in zip(files, verdicts, strict=True):
        assert status == "not yet", (name, message)
        explained = [f"That is what you get when {w.name}. {w.why}" for w in exercise.misconceptions if w.name == name]
        assert any(text in message for text in explained), (name, message)
        assert any(row["compared"] != "agrees" for row in rows)  # and yours, expected, and how they differ


def test_misconceptions_are_those_of_known_exercises():
    assert {path.name for path in (Path(__file__).parent / "misconceptions").iterdir()} == set(EXERCISES)


def run_through(path):
    """The results of the checks in a notebook, whose other cells must not fail."""
    shell, found = InteractiveShell(), {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            result = shell.run_cell(cell.source)
            assert result.success, (cell.source, result.error_in_exec)
            if hasattr(result.result, "_repr_mimebundle_") and MIME in (shown := result.result._repr_mimebundle_()):
                found[shown[MIME]["name"]] = result.result
    return found


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_an_untouched_exercise_scores_nothing_and_raises_nothing(path):
    found = run_through(path)
    assert list(found) == nbformat.read(path, as_version=4).metadata.labkit.checks
    assert {(result.status, result.points) for result in found.values()} == {("not attempted", 0)}


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_solution_passes_with_all_points(path):
    found = run_through(ROOT / "solutions" / path.name)
    assert list(found) == nbformat.read(path, as_version=4).metadata.labkit.checks
    for name, result in found.items():
        assert (result.status, result.points) == ("passed", EXERCISES[name].points), result
