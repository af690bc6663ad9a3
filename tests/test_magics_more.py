"""`%%ranks` where notebooks are untidy: names that cannot travel, values that are kept, line numbers, interrupts."""

import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "labkit")
    yield shell
    shell.reset()
    InteractiveShell.clear_instance()


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ("%%ranks 2 -> values\nrank * 10", [0, 10]),
        ("%%ranks 3->values\ncomm.all_reduce(torch.ones(1))\nresult = world_size", [3, 3, 3]),
        ("%%ranks 2 --timeout 30 --out values\npass", [None, None]),
        ("%%ranks 2 -> values\nlock = 5\nlock + rank", [5, 6]),
        ("%%ranks 1 -> values\n[np.array([twice(n)]) for n in (1, 2)][1].item()", [4]),
    ],
)
def test_values_are_kept(shell: InteractiveShell, cell: str, values: list[object]) -> None:
    assert shell.run_cell("import threading, numpy as np\nlock = threading.Lock()\ntwo = 2").success
    assert shell.run_cell("def twice(n):\n    return two * n").success
    assert shell.run_cell(cell).success
    assert shell.user_ns["values"] == values


def test_a_value_is_shown_even_if_it_cannot_be_sent(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.run_cell("%%ranks 2\n(i for i in range(3))").success
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" object")[0] for line in lines] == [f"[rank {r}] <generator" for r in range(2)]


def test_an_error_has_the_line_number_that_the_notebook_shows(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run_cell("import threading\nlock = threading.Lock()\ndef fails():\n    return 1 / 0", store_history=True)
    shell.run_cell("%%ranks 2\nx = 1\nfails()", store_history=True)
    seen = capsys.readouterr()
    text = seen.out + seen.err
    assert ", line 3, in <module>" in text and "fails()" in text
    assert ", line 4, in fails" in text and "return 1 / 0" in text  # the source of another cell
    assert "labkit" not in text.replace("labkit.", "")
    shell.run_cell("%%ranks 2\nlock.acquire()")
    seen = capsys.readouterr()
    assert "NameError" in seen.out + seen.err and "lock (lock) can't be copied to the ranks" in seen.out + seen.err


def test_papermill_stops_at_a_failing_rank_and_goes_on_after_none(tmp_path: Path) -> None:
    cells = ["%load_ext labkit", "%%ranks 2 -> values\ncomm.all_reduce(torch.ones(1)).item()", "print(sum(values))"]
    path = tmp_path / "notebook.ipynb"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(nb, path)
    done = papermill.execute_notebook(path, tmp_path / "done.ipynb", kernel_name="python3", progress_bar=False)
    assert done.cells[-1].outputs[0].text == "4.0\n"

    nb.cells[-1].source = "%%ranks 2\nprint('pid', __import__('os').getpid())\nassert rank == 0\ncomm.barrier()"
    nbformat.write(nb, path)
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="rank 1 of 2 raised AssertionError"):
        papermill.execute_notebook(path, tmp_path / "done.ipynb", kernel_name="python3", progress_bar=False)
    text = "".join(output.get("text", "") for output in nbformat.read(tmp_path / "done.ipynb", 4).cells[-1].outputs)
    pids = [int(line.split()[-1]) for line in text.splitlines() if "pid" in line]
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)
