"""`labkit grade`: runs exercise notebooks in fresh kernels and collects what their checks found.

A notebook's code runs with the rights of whoever grades it, and can print what it likes: grade the work of people you know.
"""

import csv as csv_files
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from rich.table import Table

from labkit.lab.check import MIME
from labkit.lab.exercises import EXERCISES
from labkit.lab.kernel import OwnKernel

CELL_TIMEOUT = 120  # seconds; a check that hangs ends itself long before
FIELDS = ("notebook", "name", "status", "points", "max_points", "message")


def grade(paths: Sequence[Path], csv: Path | None = None) -> dict[str, Any]:
    """Runs each notebook (of a folder: all in it) and returns {"exercises": [{FIELDS}], "points", "max_points"}.

    A check that a notebook names in its metadata and never reaches counts as not attempted. Raises ValueError for a path that
    isn't a notebook or a folder with some; whatever happens inside a notebook is in its rows.
    """
    rows = [row for path in _notebooks(paths) for row in grade_notebook(path)]
    if csv:
        with csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv_files.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return {
        "exercises": rows,
        "points": sum(row["points"] for row in rows),
        "max_points": sum(row["max_points"] for row in rows),
    }


def grade_notebook(path: Path) -> list[dict[str, Any]]:
    """One row for each check of the notebook at `path`."""
    try:
        nb = nbformat.read(path, as_version=4)
    except Exception as error:
        return [_row(path, path.stem, "not attempted", f"this is not a notebook that can be read: {error}")]
    trouble = execute(nb, path.parent)
    return [
        _row(path, name, found["status"], found["message"])
        if (found := results(nb).get(name))
        else _row(
            path, name, "not attempted", "no result of this check was shown" + (f"; {trouble}" if trouble else "")
        )
        for name in checks(nb)
    ]


def execute(nb: NotebookNode, folder: Path) -> str:
    """Runs all cells of `nb` in place, in `folder`, past those that fail or take too long. Returns the first trouble, or ""."""
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    late = {"ename": "Timeout", "evalue": f"the cell took more than {CELL_TIMEOUT} s", "traceback": []}
    client = NotebookClient(
        nb, timeout=CELL_TIMEOUT, allow_errors=True, interrupt_on_timeout=True, error_on_timeout=late,
        kernel_name="python3", kernel_manager_class=OwnKernel, resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    try:
        client.execute()
    except DeadKernelError:
        return "the notebook's kernel died"
    except Exception as error:  # the other notebooks of a class are graded all the same
        return f"the notebook could not be run: {type(error).__name__}: {error}"
    errors = (o for cell in nb.cells for o in cell.get("outputs", ()) if o.output_type == "error")
    return next((f"{o.ename}: {o.evalue}".splitlines()[0] for o in errors), "")


def results(nb: NotebookNode) -> dict[str, dict[str, Any]]:
    """What the checks of an executed notebook found; of several with one name, the last."""
    outputs = (output for cell in nb.cells for output in cell.get("outputs", ()))
    found = [output.data[MIME] for output in outputs if MIME in output.get("data", ())]
    return {result["name"]: result for result in found}


def checks(nb: NotebookNode) -> list[str]:
    """Names of the checks in a notebook: those in its metadata (`labkit.checks`), else those it ran."""
    return list(nb.metadata.get("labkit", {}).get("checks", results(nb)))


def table(result: dict[str, Any]) -> Table:
    """The grades for a terminal."""
    out = Table(title=f"{result['points']} of {result['max_points']} points")
    for name in ("notebook", "exercise", "status", "points", "what was found"):
        out.add_column(name, justify="right" if name == "points" else "left")
    for row in result["exercises"]:
        points = f"{row['points']}/{row['max_points']}"
        out.add_row(Path(row["notebook"]).name, row["name"], row["status"], points, row["message"].splitlines()[0])
    return out


def _row(path: Path, name: str, status: str, message: str) -> dict[str, Any]:
    worth = EXERCISES[name].points if name in EXERCISES else 0
    return dict(zip(FIELDS, (str(path), name, status, worth * (status == "passed"), worth, message), strict=True))


def _notebooks(paths: Sequence[Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_file() and path.suffix == ".ipynb":
            yield path
            continue
        inside = sorted(p for p in path.glob("*.ipynb")) if path.is_dir() else []
        if not inside:
            raise ValueError(f"{path}: use a notebook (.ipynb), or a folder that holds some")
        yield from inside
