"""Commands of the course: lessons, grades, progress, JupyterLab."""

from pathlib import Path
from typing import Annotated, Any

import typer

from labkit.cli.common import Json, console, finish, plain_table


def lessons(
    names: Annotated[
        list[str] | None, typer.Argument(help="lessons, e.g. 03 or 03_tensor_parallel (default: all)")
    ] = None,
    profile: Annotated[str, typer.Option(help="ci (short), laptop, or gpu")] = "ci",
    out: Annotated[Path, typer.Option(help="where executed notebooks go")] = Path("build/lessons"),
    as_json: Json = False,
) -> None:
    """Run the lessons, measured, and grade them; a table of status, time and grade."""
    from labkit.lab import lessons as runner

    rows = runner.run_lessons(names or [], profile, out)
    ok = all(row["status"] == "passed" for row in rows)
    finish({"lessons": rows}, as_json, lambda: console.print(runner.table(rows)), ok=ok)


def grade(
    paths: Annotated[
        list[Path], typer.Argument(help="exercise notebooks, folders of them, or a folder with one for each student")
    ],
    csv: Annotated[Path | None, typer.Option(help="also write a CSV file, a row for each student and exercise")] = None,
    jobs: Annotated[int, typer.Option(help="notebooks at once; each uses several cores")] = 1,
    as_json: Json = False,
) -> None:
    """Run exercise notebooks and grade them. Exit 0 means that they could be graded, whatever the grade."""
    from labkit.lab import grade as grader

    result = grader.grade(paths, csv, jobs)
    finish(result, as_json, lambda: console.print(grader.table(result)))


def progress(as_json: Json = False) -> None:
    """Where you stand: lessons run, exercises passed, and how near your predictions came."""
    from labkit.lab import progress as learner

    found = learner.progress()
    result = found.as_dict()

    def show() -> None:
        columns = ("name", "status", "made")
        plain_table([{**{c: step[c] for c in columns}, "points": _points(step)} for step in found.steps])
        if found.calibration:
            names = {"guess": "you", "model": "formula", "measured": "measured", "unit": "unit"}
            ratios = ("guess / measured", "model / measured")
            plain_table(
                [
                    {"prediction": row["name"], **{names[c]: row[c] for c in names}, **{c: row[c] for c in ratios}}
                    for row in found.calibration
                ]
            )
        for who, factor in result["typically_off_by"].items():
            if factor:
                print(
                    f"{'your guesses' if who == 'guess' else 'formulas'} are typically off by a factor of {factor:.2f}"
                )
        print(f"{result['points']} of {result['max_points']} points. {found.advice()}")

    finish(result, as_json, show)


def next_step(as_json: Json = False) -> None:
    """What to do next: the first lesson or exercise that isn't done."""
    from labkit.lab import progress as learner

    found = learner.progress()
    finish({"next": found.next, "next_lesson": found.next_lesson}, as_json, lambda: print(found.advice()))


def _points(step: dict[str, Any]) -> str:
    return f"{step['points']}/{step['max_points']}" if step["max_points"] else ""


def lab(
    port: Annotated[int, typer.Option(help="port on this machine; 0 takes a free one")] = 8888,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open it in a browser")] = True,
) -> None:
    """Open JupyterLab on a page with the lessons, your progress and the next step. On loopback only, behind a token."""
    from labkit.lab import start

    start.serve(port, browser)
