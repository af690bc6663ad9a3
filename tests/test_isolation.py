"""What a learner's code may do to itself: each accident ends in a result of its own, in time, and leaves nothing behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from labkit.lab import check as checking
from labkit.lab.check import check
from labkit.lab.isolate import LINES, WIDTH, Prints

LIMIT = 4.0  # seconds


@pytest.fixture(autouse=True)
def short_and_nothing_left(monkeypatch):
    """A short limit; and in the end no process but those that were there: the fork server and its resource tracker stay."""
    check("memory.seventy_b", lambda tp: 1)  # starts these
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    monkeypatch.setattr(checking, "TIMEOUT", LIMIT)
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not left
    assert not [p for p in psutil.process_iter(["cmdline"]) if MARK in (p.info["cmdline"] or ())]


MARK = "a-child-that-a-learner-started"


def loop(x, weight, bias, comm):
    while True:
        pass


def holds_the_interpreter(x, weight, bias, comm):
    return re.match(r"(a+)+$", "a" * 40 + "b")


def mismatch(x, weight, bias, comm):
    return comm.all_reduce(x) if comm.rank == 0 else comm.all_gather(x)


def other_sizes(x, weight, bias, comm):
    return comm.all_reduce(torch.zeros(10 * (comm.rank + 1)))


def much(x, weight, bias, comm):
    return torch.zeros(10**10 // 4)


def more_and_more(x, weight, bias, comm):
    kept = []
    while True:
        kept.append(torch.empty(10**8 // 4))


def leaves(x, weight, bias, comm):
    exit()


def leaves_at_once(x, weight, bias, comm):
    os._exit(3)


def is_killed(x, weight, bias, comm):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return comm.all_reduce(x)


def asks(x, weight, bias, comm):
    return input("how many? ")


@pytest.mark.parametrize(
    ("fn", "status", "said"),
    [
        (loop, "hung", "not finished after 4 s"),
        (holds_the_interpreter, "hung", "not finished after 4 s"),
        (mismatch, "hung", "all_reduce.*another operation: all_gather"),
        (other_sizes, "hung", "all_reduce.*another operation: all_reduce of 80 bytes"),
        (much, "not yet", "there is no more memory. A check gives each rank 1 GB"),
        (more_and_more, "not yet", "there is no more memory. A check gives each rank 1 GB"),
        (leaves, "not yet", "it raised SystemExit"),
        (leaves_at_once, "not yet", "exited with code 3"),
        (is_killed, "not yet", "rank 1 of 2 was killed by SIGKILL"),
        (asks, "not yet", "EOFError"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_accident_ends_in_time_in_a_result_of_its_own(fn, status, said):
    began = time.monotonic()
    result = check("tensor.row_linear", fn, seed=1)
    assert time.monotonic() - began < 60  # ended by the limit, not by patience
    assert (result.status, result.points) == (status, 0), result
    assert re.search(said, result.message), result


def test_a_child_that_goes_on_ends_with_the_check():
    def parent(tp):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", MARK])
        return 140 / tp

    assert check("memory.seventy_b", parent).status == "passed"


def test_it_runs_in_a_folder_that_is_thrown_away():
    here = Path.cwd()
    before = sorted(here.iterdir())

    def writes(tp):
        import tempfile

        Path("a.txt").write_text("here")
        Path("~/b.txt").expanduser().write_text("at home")
        print(Path.cwd(), Path.home(), tempfile.mkdtemp())
        return 140 / tp

    result = check("memory.seventy_b", writes)
    assert result.status == "passed"
    cwd, home, temporary = map(Path, result.prints.splitlines()[0].removeprefix("[rank 0] ").split())
    assert cwd == home == temporary.parent and not cwd.exists()
    assert sorted(here.iterdir()) == before


def test_what_it_prints_is_in_the_result_and_kept_short(capsys):
    def talks(tp):
        print(f"tp is {tp}")
        print("x" * 1000)
        for i in range(1000):
            print(i)
        return 140 / tp

    result = check("memory.seventy_b", talks)
    first, second, *_, last = result.prints.splitlines()
    assert (first, second) == ("[rank 0] tp is 2", f"[rank 0] {'x' * (WIDTH - 9)}...")
    assert last == f"... and {3 * 1002 - LINES:,} more line(s)"
    assert "It printed:" in str(result) and "tp is 2" in result._repr_mimebundle_()["text/html"]
    assert capsys.readouterr().out == ""


def test_prints_counts_what_it_leaves_out():
    prints = Prints()
    prints.write("a\nb\n")
    assert str(prints) == "a\nb"
    prints.write("c\n" * LINES)
    assert str(prints).splitlines()[-2:] == ["c", "... and 2 more line(s)"]


def test_ranks_end_with_a_notebook_that_is_killed():
    """Also those that hold the interpreter, whose own watchdog never gets its turn."""
    code = (
        "import re\nfrom labkit.lab import check as c\nc.TIMEOUT = 60\n"
        "c.check('memory.seventy_b', lambda tp: print('begun', flush=True) or re.match(r'(a+)+$', 'a' * 40 + 'b'))"
    )
    notebook = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline, ranks = time.monotonic() + 60, []
        while not ranks and time.monotonic() < deadline:  # a rank has left the notebook's process group
            children = psutil.Process(notebook.pid).children(recursive=True)
            ranks = [p for p in children if os.getpgid(p.pid) not in (notebook.pid, os.getpgid(0))]
            time.sleep(0.1)
        assert ranks
        time.sleep(0.5)  # to begin with what holds the interpreter
        notebook.kill()
        notebook.wait()
        _, left = psutil.wait_procs(ranks, timeout=20)
        assert not left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(notebook.pid, signal.SIGKILL)
