"""`%%ranks` in a real IPython shell, and in a kernel that is interrupted and killed while ranks run."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import start_new_kernel


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "labkit")
    yield shell
    shell.reset()
    InteractiveShell.clear_instance()


def test_a_cell_runs_on_every_rank_with_the_notebooks_names(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.run_cell("import math\nscale = 3\ndef scaled(x):\n    return scale * math.sqrt(x)").success
    cell = "%%ranks 2 --out values\nprint('here is', rank, 'of', world_size, device)\ncomm.all_reduce(torch.ones(1) * scaled(4))"
    assert shell.run_cell(cell).success
    assert [float(v) for v in shell.user_ns["values"]] == [12.0, 12.0]
    seen = capsys.readouterr().out
    assert "[rank 0] here is 0 of 2 cpu" in seen and "[rank 1] tensor([12.])" in seen


def test_a_cell_may_run_over_a_link(shell: InteractiveShell) -> None:
    cell = "comm.all_reduce(torch.ones(1)).item(), 'tp' in comm.shared"
    assert shell.run_cell(f"%%ranks 2 --link 1gbit -> values\n{cell}").success
    assert shell.user_ns["values"] == [(2.0, False)] * 2  # hosts of their own share no memory


def test_an_error_shows_the_cells_line_and_nothing_of_ours(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    result = shell.run_cell("%%ranks 2\nx = 1\nif rank == 1:\n    raise KeyError('no')\ncomm.all_reduce(torch.ones(1))")
    assert not result.success
    seen = capsys.readouterr()
    text = seen.out + seen.err
    assert "rank 1 of 2 raised KeyError: 'no'" in text and "line 4" in text and "raise KeyError('no')" in text
    assert "launch" not in text


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%ranks 0\n1", "use 1 or more"),
        ("%%ranks many\n1", "invalid int"),
        ("%%ranks 2\nx = = 1", "SyntaxError"),
        ("%%ranks 2\nnext(numbers)", "numbers (generator) can't be copied"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str], cell: str, said: str
) -> None:
    shell.run_cell("numbers = (i for i in range(3))")
    assert not shell.run_cell(cell).success
    seen = capsys.readouterr()
    assert said in seen.out + seen.err


LONG = """%%ranks 2
import os, time
print("pid", os.getpid())
while True:
    comm.all_reduce(torch.ones(1))
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_kernel_that_is_interrupted_or_killed_leaves_no_rank(how: str, tmp_path: Path) -> None:
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute_interactive("%load_ext labkit", timeout=60)
        client.execute(LONG)
        pids: list[int] = []
        while len(pids) < 2:
            content = client.get_iopub_msg(timeout=60)["content"]
            pids += [int(line.split()[-1]) for line in content.get("text", "").splitlines() if "pid" in line]
        if how == "interrupt":
            manager.interrupt_kernel()
            reply = client.get_shell_msg(timeout=20)
            while reply["content"].get("status") != "error":
                reply = client.get_shell_msg(timeout=20)
            assert reply["content"]["ename"] == "KeyboardInterrupt"
            assert client.execute_interactive("1 + 1", timeout=20)["content"]["status"] == "ok"
        else:
            manager.shutdown_kernel(now=True)
        deadline = time.monotonic() + 5
        while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
