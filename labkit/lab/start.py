"""`labkit lab`: JupyterLab on a start page, a notebook with the map of the course, this learner's progress and the next step."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import nbformat
from nbformat.sign import NotebookNotary

from labkit.lab import course
from labkit.lab.progress import progress

WELCOME = """\
# Model Parallelism Lab

Open a lesson with its link, or run the cell below (Shift+Enter) to see where you stand now. Each lesson asks for a guess, then
measures, and leads to exercises, where `check(...)` runs what you wrote on real ranks.
Nothing that you do leaves this machine."""
HERE = "from labkit import predict_then, progress\n\nprogress()"
TABLE = """\
How near did your predictions come? A ratio of 2 is twice too high, 1 is right. The next cell shows all that you have made:"""


def page() -> nbformat.NotebookNode:
    """The start page, with the map as it is now."""
    found = progress()
    here = nbformat.v4.new_code_cell(HERE, id="map")
    shown = {"text/html": found._repr_mimebundle_()["text/html"], "text/plain": str(found)}
    here.outputs = [nbformat.v4.new_output("execute_result", shown, execution_count=1)]
    here.execution_count = 1
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell(WELCOME, id="welcome"),
        here,
        nbformat.v4.new_markdown_cell(TABLE, id="calibration"),
        nbformat.v4.new_code_cell("predict_then.table(course=True)", id="table"),
    ])  # fmt: skip
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return nb


def serve(port: int, browser: bool) -> NoReturn:
    """Writes the start page into the lab's folder, and becomes JupyterLab on it."""
    folder = course.root()
    os.chdir(folder)  # the page's links are as seen from there
    nb = page()
    NotebookNotary().sign(nb)  # so that JupyterLab shows the map as it is
    nbformat.write(nb, folder / "start.ipynb")
    command = [
        sys.executable, "-m", "jupyterlab", f"--port={port}", "--ip=127.0.0.1", f"--ServerApp.root_dir={folder}",
        "--LabApp.default_url=/lab/tree/start.ipynb",
    ]  # fmt: skip
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container; it serves this machine alone, behind a token
    settings = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("JUPYTER_CONFIG_PATH"))))
    os.execve(sys.executable, command, os.environ | {"JUPYTER_CONFIG_PATH": settings})  # labconfig/: nothing pops up
