"""What `labkit lessons` leaves behind for reading: an HTML page for each notebook, figures, and an index with all results.

Pages open from a disk without a network: they load nothing and run nothing.
"""

import base64
import html
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from labkit.lab import course
from labkit.lab.predict_then import MIME
from labkit.measure.machine import hardware

_WIDGET = "application/vnd.jupyter.widget-view+json"
_INSTEAD = "<p><em>Here is a slider where this notebook is run; the picture above doesn't move.</em></p>"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
td, th { padding: .3em .8em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
.number { text-align: right } .failed { color: #B04A00; font-weight: bold } img { max-width: 40em } figure { margin: 1em 0 }
details table { font-size: 90% }
"""


def predictions(nb: NotebookNode) -> list[dict[str, Any]]:
    """The key figures of an executed notebook: what was predicted in it, and measured."""
    return [output.data[MIME] for output in _outputs(nb) if MIME in output.get("data", ())]


def write(folder: Path, out: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Makes pages of the executed lessons in `out` and of the exercises of the lab in `folder`, and of `rows` the index."""
    lessons = sorted(out.glob("[0-9][0-9]_*.ipynb"))
    pages = {path: out / f"{path.stem}.html" for path in lessons}
    pages |= {book.path: out / "exercises" / f"{book.name}.html" for book in course.exercises(folder)}
    ran_as = {folder / "notebooks" / path.name: page for path, page in pages.items() if path in lessons}
    known = {path.resolve(): page for path, page in (pages | ran_as).items()}
    figures = {}
    for path, page in pages.items():
        nb = nbformat.read(path, as_version=4)
        page.parent.mkdir(parents=True, exist_ok=True)
        seen_from = folder / "notebooks" if path in lessons else path.parent
        page.write_text(_links(_page(nb), seen_from, page, known), encoding="utf-8")
        if path in lessons:
            figures[path.stem] = list(_figures(nb, out, path.stem))
    index = out / "index.html"
    index.write_text(_index(rows, pages, figures, out), encoding="utf-8")
    return index


def _outputs(nb: NotebookNode) -> Iterator[NotebookNode]:
    return (output for cell in nb.cells for output in cell.get("outputs", ()))


def _page(nb: NotebookNode) -> str:
    """Without scripts: all of nbconvert's come from elsewhere, or wait for some that do."""
    for output in _outputs(nb):
        if _WIDGET in output.get("data", ()):
            output.data = {"text/html": _INSTEAD}
    page, _ = HTMLExporter().from_notebook_node(nb)
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


def _links(text: str, seen_from: Path, page: Path, known: dict[Path, Path]) -> str:
    """Links to notebooks lead to their pages, where there are some."""

    def lead(match: re.Match[str]) -> str:
        target = known.get((seen_from / match[1]).resolve())
        return f'href="{os.path.relpath(target, page.parent)}"' if target else f'title="{match[1]}"'

    return re.sub(r'href="([^":]+\.ipynb)"', lead, text)


def _figures(nb: NotebookNode, out: Path, name: str) -> Iterator[tuple[str, str]]:
    """(file, alt text) of each figure, written to `out`/figures."""
    (out / "figures").mkdir(exist_ok=True)
    images = (output for output in _outputs(nb) if "image/png" in output.get("data", ()))
    for number, output in enumerate(images, 1):
        file = f"figures/{name}_{number}.png"
        (out / file).write_bytes(base64.b64decode(output.data["image/png"]))
        yield file, output.get("metadata", {}).get("image/png", {}).get("alt", "")


def _index(
    rows: Sequence[dict[str, Any]], pages: dict[Path, Path], figures: dict[str, list[tuple[str, str]]], out: Path
) -> str:
    titles = {page: course.title(path) for path, page in pages.items()}
    named = {page.stem: page for page in titles}
    table, shown = [], []
    for row in rows:
        page = named.get(row["name"].removeprefix("solutions/"))
        text = html.escape(titles[page] if page else row["name"])
        link = f'<a href="{os.path.relpath(page, out)}">{text}</a>' if page else text
        kind = "solution of the exercise " if row["name"].startswith("solutions/") else ""
        style = "" if row["status"] == "passed" else " class='failed'"
        table.append(
            f"<tr><td>{kind}{link}</td><td{style}>{row['status']}</td><td class='number'>{row['seconds']:.0f}</td>"
            f"<td class='number'>{row['grade']}</td><td>{_key_figures(row['figures'])}{html.escape(row['error'])}</td></tr>"
        )
        images = "".join(
            f'<figure><img src="{file}" alt="{html.escape(alt)}"><figcaption>{html.escape(alt)}</figcaption></figure>'
            for file, alt in figures.get(row["name"], ())
        )
        shown.append(f"<h2>{link}</h2>{images}" if images else "")
    head = "<tr><th>notebook</th><th>status</th><th>seconds</th><th>checks passed</th><th>key figures</th></tr>"
    where = html.escape(f"{hardware('cpu')}, {datetime.now():%Y-%m-%d %H:%M}")
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>Model Parallelism Lab: results</title>"
        f"<style>{_STYLE}</style></head><body><h1>Model Parallelism Lab</h1><p>Measured on {where}.</p>"
        f"<table>{head}{''.join(table)}</table>{''.join(shown)}</body></html>\n"
    )


def _key_figures(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    lines = []
    for row in found:
        formula = "-" if row["model"] is None else f"{row['model']:,.4g}"
        lines.append(
            f"<tr><td>{html.escape(row['name'])}</td><td class='number'>{row['measured']:,.4g} {html.escape(row['unit'])}</td>"
            f"<td class='number'>{formula}</td></tr>"
        )
    head = "<tr><th>what</th><th>measured</th><th>formula</th></tr>"
    return f"<details><summary>{len(found)} measured</summary><table>{head}{''.join(lines)}</table></details>"
