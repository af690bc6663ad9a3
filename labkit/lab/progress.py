"""Where a learner stands: which predictions were made and which checks passed, kept in one small file of the lab's folder.

`check` and `predict_then` note what happens in a notebook that somebody works in. Nothing is noted while labkit itself runs or
grades notebooks, nor under CI. `LABKIT_PROGRESS` names another file, or is "off".
"""

import contextlib
import html
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock, Timeout

from labkit.lab import course
from labkit.lab.course import Book
from labkit.lab.exercises import EXERCISES

Notes = dict[str, dict[str, Any]]  # {"checks": {name: {...}}, "predictions": {name: {...}}}
DONE = ("done", "passed", "blocked")


def kept_in() -> Path | None:
    """The file, or None where nothing is to be kept."""
    chosen = os.environ.get("LABKIT_PROGRESS") or ("off" if os.environ.get("CI") else "")
    if chosen == "off":
        return None
    try:
        return Path(chosen).expanduser() if chosen else course.root() / ".labkit" / "progress.json"
    except ValueError:  # labkit is used on its own, without the lessons
        return None


def notes() -> Notes:
    """What was noted so far; empty where nothing was, or nothing can be read."""
    empty: Notes = {"checks": {}, "predictions": {}}
    path = kept_in()
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return empty | {name: dict(found[name]) for name in empty if name in found}
    except (OSError, ValueError, TypeError):
        return empty


def note_check(name: str, status: str, points: int) -> None:
    """Notes the outcome of a check. What was passed once stays passed."""

    def change(kept: Notes) -> None:
        before = kept["checks"].get(name, {"status": "", "points": 0, "attempts": 0})
        best = before if before["status"] == "passed" else {"status": status, "points": points}
        tried = before["attempts"] + (status in ("not yet", "hung"))
        kept["checks"][name] = {**best, "attempts": tried, "when": _now()}

    _note(change)


def note_prediction(name: str, guess: float | None, model: float | None, measured: float, unit: str) -> None:
    """Notes a prediction; of several with one name the last that came with a guess, since the first runs often have none."""

    def change(kept: Notes) -> None:
        if guess is None and kept["predictions"].get(name, {}).get("guess") is not None:
            return
        row = {"guess": guess, "model": model, "measured": measured, "unit": unit, "when": _now()}
        kept["predictions"][name] = row

    _note(change)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def _note(change: Callable[[Notes], None]) -> None:
    """Changes the file as a whole: readers find the old or the new one. A notebook goes on where it can't be written."""
    path = kept_in()
    if path is None:
        return
    with contextlib.suppress(OSError, Timeout):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=2):
            kept = notes()
            change(kept)
            handle, name = tempfile.mkstemp(dir=path.parent)
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1)
            os.replace(name, path)


# -- where that is in the course ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """A learner's place. `steps` are lessons, each followed by the exercises that it is the first to lead to.

    A step has kind, name, title, path (from the lab's folder), status, made ("3 of 7"), points, max_points and attempts. What is
    to be made are measurements, for the predictions of a lesson, and checks to be passed.
    """

    steps: list[dict[str, Any]]
    calibration: list[dict[str, Any]]
    folder: Path

    @property
    def next(self) -> dict[str, Any] | None:
        """The first step that isn't finished."""
        return next((step for step in self.steps if step["status"] not in DONE), None)

    @property
    def next_lesson(self) -> dict[str, Any] | None:
        """The first lesson that isn't finished, for who leaves an exercise for later."""
        left = (step for step in self.steps if step["status"] not in DONE)
        return next((step for step in left if step["kind"] == "lesson"), None)

    def points(self) -> tuple[int, int]:
        """Those of the checks passed, and of all."""
        return sum(step["points"] for step in self.steps), sum(step["max_points"] for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        got, most = self.points()
        return {
            "lessons": [step for step in self.steps if step["kind"] == "lesson"],
            "exercises": [step for step in self.steps if step["kind"] == "exercise"],
            "points": got,
            "max_points": most,
            "calibration": self.calibration,
            "typically_off_by": typically_off_by(self.calibration),
            "next": self.next,
        }

    def __str__(self) -> str:
        got, most = self.points()
        width = max(len(step["name"]) for step in self.steps)
        lines = [
            f"{'  ' * (step['kind'] == 'exercise')}{step['name'].ljust(width)}  {step['status']:11} {step['made']}"
            for step in self.steps
        ]
        return "\n".join([*lines, f"{got} of {most} points", self.advice()])

    __repr__ = __str__

    def advice(self) -> str:
        """What to do next, in a sentence or two."""
        if not (step := self.next):
            return "All lessons and exercises are done."
        text = f"Next: the {step['kind']} {step['title']} ({step['path']})"
        if step["kind"] == "exercise" and (lesson := self.next_lesson):
            text += f"; or go on to the lesson {lesson['title']} ({lesson['path']}) and come back"
        return f"{text}."

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        got, most = self.points()
        left = "style='text-align:left'"
        rows = []
        for step in self.steps:
            begun = "" if step["status"] == "not begun" else step["status"]
            mark = f"&#10003; {begun}" if begun in DONE else begun
            number = f"<b>{step['name'][:2]}</b>" if step["kind"] == "lesson" else "exercise"
            link = self._link(step)
            rows.append(
                f"<tr><td>{number}</td><td {left}>{link}</td><td {left}>{mark}</td><td>{step['made']}</td></tr>"
            )
        head = f"<tr><th></th><th {left}>lesson or exercise</th><th {left}>status</th><th>measured and passed</th></tr>"
        advice = f"Next: {self._link(self.next)}" if self.next else self.advice()
        page = f"<p><b>{advice}</b></p><table>{head}{''.join(rows)}</table><p>{got} of {most} points.</p>"
        return {"text/plain": str(self), "text/html": page}

    def _link(self, step: dict[str, Any]) -> str:
        """As seen from the folder that the notebook runs in."""
        target = html.escape(os.path.relpath(self.folder / step["path"]), quote=True)
        return f'<a href="{target}">{html.escape(step["title"])}</a>'


def progress() -> Progress:
    """Where this learner stands; shown as a map with links in a notebook. Raises ValueError where there are no lessons."""
    folder, kept = course.root(), notes()
    books = {book.path.name: book for book in course.exercises(folder)}
    steps = []
    for lesson in course.lessons(folder):
        steps.append(_step("lesson", lesson, folder, kept))
        steps += [_step("exercise", books.pop(name), folder, kept) for name in lesson.exercises if name in books]
    steps += [_step("exercise", book, folder, kept) for book in books.values()]
    return Progress(steps, calibration(kept), folder)


def calibration(kept: Notes | None = None) -> list[dict[str, Any]]:
    """Every prediction of the course, with the ratios of guess and formula to what was measured: 2 is twice too high."""
    rows = []
    for name, row in (kept or notes())["predictions"].items():
        ratios = {
            f"{who} / measured": row[who] / row["measured"] if row[who] is not None and row["measured"] else None
            for who in ("guess", "model")
        }
        rows.append({"name": name, **row, **ratios})
    return rows


def typically_off_by(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The median factor by which guesses, and formulas, are too high or too low: 1 is right."""
    out: dict[str, float | None] = {}
    for who in ("guess", "model"):
        ratios = [row[f"{who} / measured"] for row in rows]
        factors = [math.exp(abs(math.log(ratio))) for ratio in ratios if ratio is not None and ratio > 0]
        out[who] = median(factors) if factors else None
    return out


def _step(kind: str, book: Book, folder: Path, kept: Notes) -> dict[str, Any]:
    found = [kept["checks"].get(name, {"status": "", "points": 0, "attempts": 0}) for name in book.checks]
    measured = [any(re.fullmatch(each, name) for name in kept["predictions"]) for each in book.predictions]
    made, of = sum(measured) + sum(each["status"] in DONE for each in found), len(measured) + len(found)
    attempts = sum(each["attempts"] for each in found)
    finished = "done" if kind == "lesson" else "passed"
    return {
        "kind": kind,
        "name": book.name,
        "title": book.title,
        "path": str(book.path.relative_to(folder)),
        "status": finished if made == of else "begun" if made or attempts else "not begun",
        "made": f"{made} of {of}",
        "points": sum(each["points"] for each in found),
        "max_points": sum(EXERCISES[name].points for name in book.checks if name in EXERCISES),
        "attempts": attempts,
    }
