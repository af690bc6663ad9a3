"""Where a learner's code runs: in a process group of its own, within limits, in a folder that is thrown away afterwards.

It keeps accidents from doing harm: an endless allocation, a file written to the wrong place, a child that goes on for ever. It
is no sandbox against code that means harm.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from io import TextIOBase
from multiprocessing import forkserver
from pathlib import Path

MEMORY = 10**9  # bytes that a learner's code may have in one process, beyond what is there before it runs
LINES, WIDTH = 12, 120  # of what it prints that are shown


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for code to run in. At the end it is removed, with all that still runs of those that `confine` led there."""
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    (folder / "home").mkdir()
    try:
        yield folder
    finally:
        for file in folder.glob("group-*"):
            end_group(int(file.name.removeprefix("group-")))
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path) -> dict[str, str]:
    """Variables that lead to `folder` what goes to a home or a temporary folder by itself; caches stay where they are."""
    home = str(folder / "home")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return {"HOME": home, "TMPDIR": home, "IPYTHONDIR": home, "XDG_CACHE_HOME": cache, "PYTHONDONTWRITEBYTECODE": "1"}


def confine(folder: Path, memory: int | None = MEMORY) -> None:
    """Makes this process the leader of a group of its own, in `folder`, with no more than `memory` bytes more (Linux only)."""
    os.setpgid(0, 0)
    (folder / f"group-{os.getpid()}").touch()
    os.chdir(folder / "home")
    os.environ.update(environment(folder))
    tempfile.tempdir = None  # found anew
    if sys.platform == "linux":
        # The fork server lives as long as anybody holds this, and a rank that holds the interpreter would as long as it lives.
        alive = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
        if alive is not None:
            os.close(alive)
            forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a Ctrl-C no longer reaches it from a terminal
        if memory:
            limit_memory(memory)


def limit_memory(more: int) -> None:
    """Lets this process have `more` bytes than it has, and what it starts as many. Linux counts what it could write to."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit = pages * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def end_group(leader: int) -> None:
    """Kills what is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


class Prints(TextIOBase):
    """A stream that keeps the first LINES lines, each up to WIDTH characters, and counts the others."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._more = 0

    def write(self, text: str) -> int:
        lines = text.splitlines()
        room = LINES - len(self._kept)
        self._kept += [line if len(line) <= WIDTH else f"{line[:WIDTH]}..." for line in lines[:room]]
        self._more += max(0, len(lines) - room)
        return len(text)

    def __str__(self) -> str:
        return "\n".join([*self._kept, *([f"... and {self._more:,} more line(s)"] if self._more else [])])
