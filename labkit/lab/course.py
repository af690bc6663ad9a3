"""What the course consists of: lessons, exercises and what belongs to which, read from the notebooks themselves."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode


@dataclass(frozen=True)
class Book:
    """A lesson or an exercise.

    checks: names of those in it. predictions: a pattern for the name of each prediction that every machine makes in it.
    exercises: file names of those that it leads to, in order.
    """

    path: Path
    title: str
    checks: tuple[str, ...]
    predictions: tuple[str, ...]
    exercises: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem


def root() -> Path:
    """The folder with the lessons: this one or one above it, else the one that this package was installed from.

    Raises ValueError where there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if any((folder / "notebooks").glob("[0-9][0-9]_*.ipynb")):
            return folder
    raise ValueError(f"no notebooks/ with lessons in {here} or above it: run this in the lab's folder")


def lessons(folder: Path) -> list[Book]:
    """In their order."""
    return [_book(path) for path in sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def exercises(folder: Path) -> list[Book]:
    """By name."""
    return [_book(path) for path in sorted((folder / "exercises").glob("*.ipynb"))]


def title(path: Path) -> str:
    """The heading of a notebook."""
    return _title(_prose(_read(path))) or path.stem


def _read(path: Path) -> "NotebookNode":
    import nbformat  # takes a second, and most that ask for a prediction don't ask for the course

    return nbformat.read(path, as_version=4)


def _prose(nb: "NotebookNode") -> str:
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def _title(prose: str) -> str:
    found = re.search(r"^# (.+)", prose, flags=re.MULTILINE)
    return found[1] if found else ""


def _book(path: Path) -> Book:
    nb = _read(path)
    prose = _prose(nb)
    return Book(
        path,
        _title(prose) or path.stem,
        tuple(nb.metadata.get("labkit", {}).get("checks", ())),
        tuple(_predictions(nb)),
        tuple(dict.fromkeys(re.findall(r"\]\((?:\.\./exercises/)([\w-]+\.ipynb)\)", prose))),
    )


def _predictions(nb: "NotebookNode") -> Iterator[str]:
    """Those that aren't inside an `if` or a loop."""
    for cell in nb.cells:
        if cell.cell_type != "code" or cell.source.startswith("%%"):
            continue
        source = "\n".join("" if line.startswith(("%", "!")) else line for line in cell.source.splitlines())
        for statement in ast.parse(source).body:
            for call in ast.walk(statement) if isinstance(statement, ast.Expr | ast.Assign) else ():
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "predict_then":
                    yield _pattern(call.args[0])


def _pattern(name: ast.expr) -> str:
    """Of a string: itself; of an f-string: anything in place of its values."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    return "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in parts)
