"""Where a learner stands: what is noted, where not, and what it says about lessons and exercises."""

import json
import threading
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import labkit
from labkit.cli import app
from labkit.lab import course, progress
from labkit.lab.check import check
from labkit.lab.predict_then import _PredictThen

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A learner's file."""
    path = tmp_path / "mine" / "progress.json"
    monkeypatch.setenv("LABKIT_PROGRESS", str(path))
    return path


def step(name):
    (found,) = [each for each in labkit.progress().steps if each["name"] == name]
    return found


def test_checks_and_predictions_move_a_learner_through_the_course(kept):
    assert labkit.progress().next["name"] == course.lessons(ROOT)[0].name
    assert (step("memory_analysis")["status"], step("memory_analysis")["attempts"]) == ("not begun", 0)
    check("memory.seventy_b", lambda tp: 140)
    assert (step("memory_analysis")["status"], step("memory_analysis")["made"]) == ("begun", "0 of 3")
    check("memory.seventy_b", lambda tp: 140 / tp)
    check("memory.seventy_b", lambda tp: 140)  # what was passed stays passed
    assert (step("memory_analysis")["points"], step("memory_analysis")["made"]) == (1, "1 of 3")
    for name in ("memory.per_gpu", "memory.kv_per_gpu"):
        progress.note_check(name, "passed", 2)
    assert (step("memory_analysis")["status"], step("memory_analysis")["points"]) == ("passed", 5)
    assert json.loads(kept.read_text())["checks"]["memory.seventy_b"]["attempts"] == 2


def test_a_lesson_is_done_when_its_predictions_are_measured(kept):
    predict_then, lesson = _PredictThen(), course.lessons(ROOT)[0]
    assert len(lesson.predictions) >= 4
    for i, pattern in enumerate(lesson.predictions):
        assert step(lesson.name)["made"] == f"{i} of {len(lesson.predictions)}"
        predict_then(pattern.replace("\\", "").replace(".+", "2"), None, 2.0)  # an f-string's value may be anything
    assert step(lesson.name)["status"] == "done"
    assert labkit.progress().next["name"] != lesson.name


def test_every_lesson_has_predictions_and_every_exercise_has_its_place():
    lessons = course.lessons(ROOT)
    assert all(len(lesson.predictions) >= 3 for lesson in lessons)
    placed = [step["name"] for step in labkit.progress().steps if step["kind"] == "exercise"]
    assert sorted(placed) == sorted(book.name for book in course.exercises(ROOT))
    assert {name for lesson in lessons for name in lesson.exercises} == {f"{name}.ipynb" for name in placed}


def test_the_calibration_table_spans_notebooks_and_keeps_guesses(kept):
    _PredictThen()("bytes", 20, 10.0, model=10, unit="B")
    _PredictThen()("time", 1.0, 4.0)
    _PredictThen()("bytes", None, 11.0)  # run again, without a guess
    rows = {row["name"]: row for row in progress.calibration()}
    assert (rows["bytes"]["guess / measured"], rows["bytes"]["model / measured"]) == (2.0, 1.0)
    assert progress.typically_off_by(list(rows.values())) == {"guess": pytest.approx(3.0), "model": pytest.approx(1.0)}
    table = _PredictThen().table(course=True)
    assert list(table.index) == ["bytes", "time"] and table.loc["time", "you / measured"] == 0.25
    assert _PredictThen().table().empty


@pytest.mark.parametrize("setting", [{"LABKIT_PROGRESS": "off"}, {"LABKIT_PROGRESS": "", "CI": "true"}])
def test_nothing_is_noted_where_nobody_learns(setting, monkeypatch, tmp_path):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert progress.kept_in() is None
    progress.note_check("memory.seventy_b", "passed", 1)
    assert progress.notes() == {"checks": {}, "predictions": {}}


def test_a_graded_notebook_notes_nothing(kept, tmp_path):
    from labkit.lab import grade

    note = "progress.note_check('memory.seventy_b', 'passed', 1)"
    cell = f"from labkit.lab import progress\n{note}\n1 / (progress.kept_in() is None)"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    assert grade.execute(nb, tmp_path) == ""
    assert not kept.exists()


def test_without_a_setting_it_is_kept_in_the_labs_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LABKIT_PROGRESS")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(ROOT / "notebooks")
    assert progress.kept_in() == ROOT / ".labkit" / "progress.json"


def test_a_file_that_cannot_be_read_or_written_stops_nobody(kept, monkeypatch):
    kept.parent.mkdir()
    kept.write_text("{ half a fi")
    assert progress.notes()["checks"] == {}
    progress.note_check("memory.seventy_b", "passed", 1)
    assert progress.notes()["checks"]["memory.seventy_b"]["points"] == 1
    monkeypatch.setenv("LABKIT_PROGRESS", "/proc/nowhere/progress.json")
    progress.note_check("memory.seventy_b", "passed", 1)


def test_kernels_that_note_at_once_lose_nothing(kept):
    def learner(i):
        for j in range(10):
            progress.note_check(f"{i}.{j}", "passed", 1)

    threads = [threading.Thread(target=learner, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(progress.notes()["checks"]) == 40
    assert sorted(p.name for p in kept.parent.iterdir()) == ["progress.json", "progress.json.lock"]


def test_the_map_has_links_that_lead_there_from_any_folder(kept, monkeypatch):
    progress.note_check("tensor.row_linear", "passed", 1)
    for folder, link in (("", "exercises/row_parallel.ipynb"), ("notebooks", "../exercises/row_parallel.ipynb")):
        monkeypatch.chdir(ROOT / folder)
        shown = labkit.progress()._repr_mimebundle_()
        assert f'<a href="{link}">' in shown["text/html"] and "passed" in shown["text/html"]
        assert shown["text/plain"] == str(labkit.progress())
        assert labkit.progress().advice() in shown["text/plain"]


def test_the_command_line_says_where_and_what_next(kept):
    _PredictThen()("bytes", 20, 10.0, model=10, unit="B")
    for command in ("progress", "next"):
        shown = CliRunner().invoke(app, [command])
        assert shown.exit_code == 0 and "Next: the lesson" in shown.stdout.replace("\n", " ")
    found = json.loads(CliRunner().invoke(app, ["progress", "--json"]).stdout)
    assert found["typically_off_by"] == {"guess": 2.0, "model": 1.0}
    assert found["next"] == json.loads(CliRunner().invoke(app, ["next", "--json"]).stdout)["next"]
    assert {each["name"] for each in found["lessons"]} == {book.name for book in course.lessons(ROOT)}
