"""`labkit lessons`: runs the lessons from top to bottom, measures and grades them, and keeps the executed notebooks."""

import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from labkit.lab import course, grade, site
from labkit.lab.kernel import OwnKernel
from labkit.measure.machine import usable_cores

CELL_TIMEOUT = {"ci": 180, "laptop": 600, "gpu": 600}  # seconds


def run_lessons(names: list[str], profile: str, out: Path) -> list[dict[str, Any]]:
    """Runs the lessons called `names` ("03" or "03_tensor_parallel"), or all of them and then the solutions of the exercises.

    Executed notebooks go to `out`, with index.html and what it leads to (`labkit.lab.site`). Returns one {name, status, seconds,
    grade, figures, error} for each; status is passed, failed or timed out, grade the checks passed of those in it, figures
    what was predicted and measured. Raises ValueError for an unknown name or profile.
    """
    if profile not in CELL_TIMEOUT:
        raise ValueError(f"profile {profile!r}: use one of {', '.join(CELL_TIMEOUT)}")
    root = course.root()
    lessons = sorted((root / "notebooks").glob("*.ipynb"))
    chosen = [_named(name, lessons) for name in names] or lessons
    solutions = [] if names else sorted((root / "solutions").glob("*.ipynb"))
    out.mkdir(parents=True, exist_ok=True)
    said = Console(stderr=True)
    rows = []
    for number, path in enumerate([*chosen, *solutions], 1):
        said.print(f"{number} of {len(chosen) + len(solutions)}: {path.relative_to(root)} ...", highlight=False)
        rows.append(_run_lesson(path, profile, out) if path in lessons else _run_solution(path))
    said.print(f"read them: {site.write(root, out, rows)}", highlight=False)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Status, time and grade of each, for a terminal."""
    made = Table(title="Lessons")
    for name in ("lesson", "status", "seconds", "grade", "error"):
        made.add_column(name, justify="right" if name in ("seconds", "grade") else "left")
    for row in rows:
        colour = "green" if row["status"] == "passed" else "red"
        made.add_row(row["name"], f"[{colour}]{row['status']}[/]", f"{row['seconds']:.0f}", row["grade"], row["error"])
    return made


def _run_lesson(path: Path, profile: str, out: Path) -> dict[str, Any]:
    logging.getLogger("papermill").setLevel(logging.ERROR)
    ranks = min(8, max(2, torch.cuda.device_count())) if profile == "gpu" else 4 if usable_cores() >= 4 else 2
    executed = out / path.name
    began, status, error = time.perf_counter(), "passed", ""
    try:
        papermill.execute_notebook(
            path, executed, parameters={"PROFILE": profile, "RANKS": ranks, "SEED": 0}, cwd=path.parent,
            kernel_name="python3", kernel_manager_class=OwnKernel, execution_timeout=CELL_TIMEOUT[profile],
            start_timeout=60, progress_bar=sys.stderr.isatty(),
        )  # fmt: skip
    except PapermillExecutionError as failure:
        status, error = "failed", f"cell {failure.cell_index}: {failure.ename}: {failure.evalue}"
    except TimeoutError:
        status, error = "timed out", f"a cell took more than {CELL_TIMEOUT[profile]} s"
    except Exception as failure:  # the other lessons go on
        status, error = "failed", f"{type(failure).__name__}: {failure}"
    seconds = time.perf_counter() - began
    passed, figures = [], []
    if executed.exists():
        nb = nbformat.read(executed, as_version=4)
        found, figures = grade.results(nb), site.predictions(nb)
        error = error or _noise(nb)
        passed = [name in found and found[name]["status"] == "passed" for name in grade.checks(nb)]
    return {
        "name": path.stem, "status": status, "seconds": seconds, "grade": _share(passed), "figures": figures, "error": error,
    }  # fmt: skip


def _noise(nb: NotebookNode) -> str:
    """What a reader would see as a warning, though nothing failed."""
    for number, cell in enumerate(nb.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr" and output.text.strip():
                return f"cell {number} says on stderr: {output.text.strip().splitlines()[0]}"
    return ""


def _run_solution(path: Path) -> dict[str, Any]:
    began = time.perf_counter()
    rows = grade.grade_notebook(grade.Submission("", path))
    seconds = time.perf_counter() - began
    wrong = [f"{row['name']}: {row['message']}" for row in rows if row["status"] not in ("passed", "blocked")]
    return {
        "name": f"solutions/{path.stem}",
        "status": "failed" if wrong else "passed",
        "seconds": seconds,
        "grade": _share(row["status"] == "passed" for row in rows),
        "figures": [],
        "error": "; ".join(wrong),
    }


def _share(passed: Iterable[bool]) -> str:
    each = list(passed)
    return f"{sum(each)}/{len(each)}" if each else "-"


def _named(name: str, lessons: list[Path]) -> Path:
    wanted = Path(name).stem
    matches = [path for path in lessons if path.stem == wanted or path.stem.startswith(f"{wanted}_")]
    if len(matches) != 1:
        raise ValueError(f"no lesson {name!r}: use one of {', '.join(path.stem for path in lessons)}")
    return matches[0]
