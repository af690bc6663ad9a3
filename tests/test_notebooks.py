"""The rules that every notebook keeps. Whole lessons are run by `labkit lessons`, not here."""

import ast
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

from labkit.lab.exercises import EXERCISES

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXERCISE_BOOKS = sorted((ROOT / "exercises").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
ALL = [*LESSONS, *EXERCISE_BOOKS, *SOLUTIONS]


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def read(path):
    return nbformat.read(path, as_version=4)


def cells(nb, kind):
    return [cell for cell in nb.cells if cell.cell_type == kind]


def tagged(nb, tag):
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_a_notebook_is_valid_short_and_without_outputs(path):
    nb = read(path)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in nb.cells}) == len(nb.cells) <= 60
    lines = [len(cell.source.splitlines()) for cell in cells(nb, "code")]
    assert median(lines) <= 6 and max(lines) <= 20
    for cell in cells(nb, "code"):
        assert not cell.outputs and cell.execution_count is None
        assert cell.source.strip()
    titles = re.findall(r"^# .*", "\n".join(cell.source for cell in cells(nb, "markdown")), flags=re.MULTILINE)
    assert len(titles) == 1 and nb.cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", LESSONS, ids=name_of)
def test_a_lesson_has_a_question_parameters_and_the_right_length(path):
    nb = read(path)
    assert nb.cells[0].source.splitlines()[0].endswith("?")
    (parameters,) = tagged(nb, "parameters")
    assigned = [node.targets[0].id for node in ast.parse(parameters.source).body]
    assert assigned == ["PROFILE", "RANKS", "SEED"]
    words = sum(len(cell.source.split()) for cell in cells(nb, "markdown"))
    assert (500 if path.stem.startswith("00") else 1200) <= words <= 2000
    text = "\n".join(cell.source for cell in nb.cells)
    assert "**Question.**" in text and "guess" in text and "predict_then(" in text
    assert "../exercises/" in text


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_figures_have_alt_text(path):
    nb = read(path)
    for cell in cells(nb, "markdown"):
        assert all(alt.strip() for alt in re.findall(r"!\[([^\]]*)\]", cell.source))
        assert "<img" not in cell.source or "alt=" in cell.source
    # Figures come from labkit.lab.plots, which writes their alt text (tests/test_lab.py); a bare plot would have none.
    for cell in cells(nb, "code"):
        assert not re.search(r"pyplot|\bplt\.|\.plot\(|\.hist\(", cell.source)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path):
    for cell in cells(read(path), "markdown"):
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_checks_in_a_notebook_are_the_ones_it_names(path):
    nb = read(path)
    asked = re.findall(r'check\("([\w.]+)"', "\n".join(cell.source for cell in cells(nb, "code")))
    assert nb.metadata.labkit.checks == asked
    assert set(asked) <= set(EXERCISES)


def test_every_exercise_is_asked_for_somewhere():
    asked = {name for path in [*LESSONS, *EXERCISE_BOOKS] for name in read(path).metadata.labkit.checks}
    assert asked == set(EXERCISES)


def test_every_exercise_notebook_has_a_solution():
    assert [path.name for path in EXERCISE_BOOKS] == [path.name for path in SOLUTIONS]


@pytest.mark.parametrize("path", EXERCISE_BOOKS, ids=name_of)
def test_exercise_and_solution_differ_only_in_the_answers(path):
    exercise, solution = read(path), read(ROOT / "solutions" / path.name)
    assert exercise.metadata == solution.metadata and len(exercise.cells) == len(solution.cells)
    assert len(tagged(exercise, "answer")) == len(exercise.metadata.labkit.checks)
    for a, b in zip(exercise.cells, solution.cells, strict=True):
        if "answer" in a.metadata.get("tags", []):
            assert a.metadata == b.metadata and a.id == b.id
            assert "raise NotImplementedError" in a.source and "NotImplementedError" not in b.source
            assert a.source.splitlines()[0] == b.source.splitlines()[0]  # the same signature
        else:
            assert a == b


@pytest.mark.parametrize("path", EXERCISE_BOOKS, ids=name_of)
def test_an_exercise_says_how_long_and_how_hard(path):
    text = read(path).cells[0].source
    assert "minutes" in text and re.search(r"\b(easy|medium|hard)\b", text)
