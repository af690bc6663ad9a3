"""`labkit grade`: runs exercise notebooks in fresh kernels and collects what their checks found.

A notebook runs in a folder that is thrown away, with limits on time and memory, and can print what it likes: that keeps
accidents from doing harm, not people who mean it. Grade the work of people you know.
"""

import csv as csv_files
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from rich.console import Console
from rich.progress import track
from rich.table import Table

from labkit.lab.check import MARKS, MIME
from labkit.lab.exercises import EXERCISES
from labkit.lab.isolate import environment, scratch
from labkit.lab.kernel import OwnKernel

CELL_TIMEOUT = 120  # seconds; a check that hangs ends itself long before
NOTEBOOK_TIMEOUT = 900
MEMORY = 8 * 10**9  # bytes that each process of a notebook may write to
FIELDS = ("student", "notebook", "name", "status", "points", "max_points", "seconds", "message")


class Submission(NamedTuple):
    """A notebook, and whose it is ("" where nothing says so)."""

    student: str
    path: Path


def grade(paths: Sequence[Path], csv: Path | None = None, jobs: int = 1) -> dict[str, Any]:
    """Runs the notebooks of `paths`, `jobs` at a time, and returns {"exercises", "students", "points", "max_points", ...}.

    A path is a notebook; a folder with notebooks, one for each student; or one with a folder for each student. Notebooks
    that keep the names of the lab's own, as memory_analysis.ipynb, are those of one student.

    "exercises" has a row of FIELDS for each check, "students" the sum for each, "median_check_seconds" what a check took. A
    check that a notebook names in its metadata and never reaches counts as not attempted. Raises ValueError for a path that
    isn't a notebook or a folder with some; whatever happens inside a notebook is in its rows.
    """
    submissions = [each for path in paths for each in _submissions(Path(path))]
    said = Console(stderr=True)
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        graded = track(
            pool.map(grade_notebook, submissions), "grading", len(submissions), console=said, transient=True,
            disable=not said.is_terminal,
        )  # fmt: skip
        rows = [row for notebook in graded for row in notebook]
    if csv:
        with csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv_files.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    took = [row["seconds"] for row in rows if row["seconds"]]
    students = dict.fromkeys(row["student"] for row in rows)
    return {
        "exercises": rows,
        "students": [{"student": name, **_sum(row for row in rows if row["student"] == name)} for name in students],
        **_sum(rows),
        "median_check_seconds": median(took) if took else None,
    }


def cases(*paths: str | Path) -> list[Any]:
    """For a class that grades with pytest: a parameter for each check of the notebooks of `paths`, graded right here.

    `@pytest.mark.parametrize("found", cases("exercises"))`; then `found["status"]` should be "passed".
    """
    import pytest

    rows = grade([Path(path) for path in paths])["exercises"]
    return [pytest.param(row, id="-".join(filter(None, (row["student"], row["name"])))) for row in rows]


def grade_notebook(submission: Submission) -> list[dict[str, Any]]:
    """One row for each check of a notebook; one that says why, where it can't be graded at all."""
    path = submission.path
    try:
        nb = nbformat.read(path, as_version=4)
        trouble = execute(nb, path.parent)
        found = results(nb)
        missing = {
            "status": "not attempted",
            "message": "; ".join(filter(None, ("no result of this check was shown", trouble))),
        }
        return [_row(submission, name, found.get(name, missing)) for name in checks(nb)]
    except Exception as error:  # the other notebooks of a class are graded all the same
        said = f"this is not a notebook that can be read: {type(error).__name__}: {error}"
        return [_row(submission, path.stem, {"status": "not attempted", "message": said})]


def execute(nb: NotebookNode, folder: Path) -> str:
    """Runs all cells of `nb` in place, past those that fail or take too long. Returns the first trouble, or "".

    The kernel works in a folder of its own; modules are found in `folder` too. Nothing that a cell started survives.
    """
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    end = monotonic() + NOTEBOOK_TIMEOUT
    late = {"ename": "Timeout", "evalue": f"the cell took more than {CELL_TIMEOUT} s", "traceback": []}
    client = NotebookClient(
        nb, timeout_func=lambda cell: max(1, min(CELL_TIMEOUT, end - monotonic())), allow_errors=True,
        interrupt_on_timeout=True, error_on_timeout=late, kernel_name="python3", kernel_manager_class=OwnKernel,
        shutdown_kernel="immediate",
    )  # fmt: skip
    with scratch() as own:

        def enter() -> None:
            (own / f"group-{os.getpid()}").touch()  # the kernel leads a session, and so a group, of its own
            if sys.platform == "linux":
                import resource

                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

        found_in = os.pathsep.join(filter(None, (str(folder.resolve()), os.environ.get("PYTHONPATH"))))
        env = os.environ | environment(own) | {"PYTHONPATH": found_in}
        try:
            client.execute(cwd=str(own / "home"), env=env, preexec_fn=enter)
        except DeadKernelError:
            return "the notebook's kernel died"
        except Exception as error:
            return f"the notebook could not be run: {type(error).__name__}: {error}"
    errors = (o for cell in nb.cells for o in cell.get("outputs", ()) if o.output_type == "error")
    return next((f"{o.ename}: {o.evalue}".splitlines()[0] for o in errors), "")


def results(nb: NotebookNode) -> dict[str, dict[str, Any]]:
    """What the checks of an executed notebook found; of several with one name, the last."""
    outputs = (output for cell in nb.cells for output in cell.get("outputs", ()))
    found = [output.data[MIME] for output in outputs if MIME in output.get("data", ())]
    return {result["name"]: result for result in found if result.get("status") in MARKS}


def checks(nb: NotebookNode) -> list[str]:
    """Names of the checks in a notebook: those in its metadata (`labkit.checks`), else those it ran."""
    return list(nb.metadata.get("labkit", {}).get("checks", results(nb)))


def table(result: dict[str, Any]) -> Table:
    """The grades for a terminal."""
    several = len(result["students"]) > 1
    out = Table(title=f"{result['points']} of {result['max_points']} points")
    for name in (*(["student"] if several else []), "notebook", "exercise", "status", "points", "s", "what was found"):
        out.add_column(
            name, justify="right" if name in ("points", "s") else "left", no_wrap=name in ("exercise", "status")
        )
    for row in result["exercises"]:
        points, took = f"{row['points']}/{row['max_points']}", f"{row['seconds']:.1f}" if row["seconds"] else "-"
        said = "" if row["status"] == "passed" else row["message"].splitlines()[0]
        shown = (Path(row["notebook"]).name, row["name"], row["status"], points, took, said)
        out.add_row(*([row["student"]] if several else []), *shown)
    for each in result["students"] if several else ():
        out.add_row(each["student"], "", "", "together", f"{each['points']}/{each['max_points']}")
    if result["median_check_seconds"]:
        out.caption = f"a check took {result['median_check_seconds']:.1f} s (median)"
    return out


def _row(submission: Submission, name: str, found: dict[str, Any]) -> dict[str, Any]:
    worth = EXERCISES[name].points if name in EXERCISES else 0
    status, seconds = found["status"], found.get("seconds", 0.0)
    points = worth * (status == "passed")
    row = (submission.student, str(submission.path), name, status, points, worth, seconds, str(found["message"]))
    return dict(zip(FIELDS, row, strict=True))


def _sum(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    each = list(rows)
    return {name: sum(row[name] for row in each) for name in ("points", "max_points")}


def _submissions(path: Path) -> Iterator[Submission]:
    if path.is_file() and path.suffix == ".ipynb":
        yield Submission("", path)
        return
    ours = {each.name for each in (Path(__file__).resolve().parents[2] / "exercises").glob("*.ipynb")}
    found = [*sorted(path.glob("*.ipynb")), *sorted(path.glob("*/*.ipynb"))] if path.is_dir() else []
    found = [each for each in found if each.parent.name != ".ipynb_checkpoints"]
    if not found:
        raise ValueError(f"{path}: use a notebook (.ipynb), or a folder that holds some, or folders of them")
    for each in found:
        if each.parent != path:
            yield Submission(each.parent.name, each)
        else:
            yield Submission("" if each.name in ours else each.stem, each)
