"""Local ranks: started in a tenth of a second, watched, and ended together.

`run` calls a function on fresh ranks; `RankGroup` keeps ranks that take messages. Processes are started and ended by
torch.multiprocessing, forked from a server that has imported torch once. A rank that raises, dies or hangs ends the
others, and one `RankError` says which it was, what it was doing, and who waited for whom.
"""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch.multiprocessing.spawn import ProcessContext, start_processes

from labkit.comm import Comm
from labkit.launch import board
from labkit.launch.rank import Channel, Job, join, main
from labkit.measure.machine import usable_cores
from labkit.mesh import Layout
from labkit.split import LayoutError


class RankError(RuntimeError):
    """A rank failed. The message is for reading; `rank` is the first one that failed, None if nobody can be named."""

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: in a notebook the message is all there is to read; the launcher's own frames say nothing."""
        return [f"RankError: {self}"]


class RankGroup:
    """Ranks that stay: each calls `fn(comm, channel, *args)`, with `channel.receive()` and `channel.send(message)`.

    Args:
        fn: any function, also one defined in a notebook or a lambda.
        ranks: how many; layout: their grid (default: one tensor-parallel group).
        threads: torch threads of each (default: the cores shared out).
        collective_timeout: seconds that an operation between ranks may wait.
        meter: count operations.

    Raises RankError from any method when a rank fails; all ranks have ended then. Use as a context manager, or `close()`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        ranks: int,
        *,
        args: tuple[Any, ...] = (),
        layout: Layout | None = None,
        threads: int | None = None,
        collective_timeout: float = 10.0,
        meter: bool = True,
    ) -> None:
        if ranks < 1:
            raise ValueError(f"ranks={ranks}: use 1 or more")
        layout = layout or Layout(tp=ranks)
        if layout.world != ranks:
            raise LayoutError(f"ranks={ranks} does not fit tp={layout.tp} x pp={layout.pp} x dp={layout.dp}")
        self.ranks = ranks
        self._folder = Path(tempfile.mkdtemp(prefix="labkit-"))
        board.create(self._folder / "board", ranks)
        work = cloudpickle.dumps((fn, args))
        job = Job(work, layout, threads or threads_per_rank(ranks), self._folder, collective_timeout, meter)
        pairs = [multiprocessing.Pipe() for _ in range(ranks)]
        theirs = [there for _, there in pairs]
        self._lines: dict[int, Connection] = {rank: here for rank, (here, _) in enumerate(pairs)}
        with _main_module_hidden():
            multiprocessing.set_forkserver_preload(["labkit.launch.rank", "labkit.engine.llm"])
            self._processes: ProcessContext = start_processes(
                main, (job, theirs), ranks, join=False, daemon=True, start_method="forkserver"
            )
        for line in theirs:
            line.close()
        self.pids = self._processes.pids()
        self._inbox: deque[tuple[int, Any]] = deque()
        self._results: dict[int, Any] = {}
        self._failures: dict[int, tuple[str, str, bool]] = {}  # rank -> traceback, summary, only lost its peer?
        self._remains = (self._processes, list(self._lines.values()), self._folder)
        self._end = weakref.finalize(self, _end, *self._remains)

    def send(self, message: Any) -> None:
        """One message to every rank."""
        raw = pickle.dumps(message)
        for line in self._lines.values():
            with contextlib.suppress(BrokenPipeError):  # a dead rank is reported by the next receive
                line.send_bytes(raw)

    def receive(self, timeout: float | None = None) -> tuple[int, Any]:
        """The next (rank, message) from any rank. Meanwhile, what ranks print is printed here, labelled."""
        self._pump(lambda: bool(self._inbox), timeout)
        return self._inbox.popleft()

    def results(self, timeout: float | None = None) -> list[Any]:
        """Waits until `fn` has returned on every rank; its values in rank order."""
        self._pump(lambda: len(self._results) == self.ranks, timeout)
        return [self._results[rank] for rank in range(self.ranks)]

    def close(self) -> None:
        """Ends the ranks; nothing of them is left when it returns."""
        self._end()

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- watching ------------------------------------------------------------------------------------------------------

    def _pump(self, enough: Callable[[], bool], timeout: float | None) -> None:
        """Takes in what ranks say until `enough()`. Whatever goes wrong meanwhile, no rank survives it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not enough():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise self._timed_out(timeout)
                self._listen(left)
        except BaseException:
            if self._end.detach():
                _end(*self._remains, 0.0)  # they wait for each other, or for nobody
            raise

    def _listen(self, timeout: float | None) -> None:
        """Waits for something to happen, and handles it; raises RankError for a failure."""
        ready = wait([*self._lines.values(), *self._processes.sentinels], timeout)
        failed = False
        for rank, line in list(self._lines.items()):
            if line in ready:
                failed |= self._read(rank, line)
        if failed or (any(s in ready for s in self._processes.sentinels) and self._dead()):
            raise self._diagnose()

    def _read(self, rank: int, line: Connection) -> bool:
        """Takes in everything that `rank` has said; True if it said that it failed."""
        failed = False
        try:
            while line.poll():
                kind, value = pickle.loads(line.recv_bytes())
                if kind == "message":
                    self._inbox.append((rank, value))
                elif kind == "result":
                    self._results[rank] = value
                elif kind == "output":
                    stream, lines = value
                    for text in lines:
                        print(f"[rank {rank}] {text}", file=getattr(sys, stream), flush=True)
                else:
                    self._failures[rank] = value
                    failed = True
        except (EOFError, ConnectionResetError):
            del self._lines[rank]
        return failed

    def _dead(self) -> dict[int, str]:
        """Ranks that ended without having said why, and how."""
        how = {}
        for rank, process in enumerate(self._processes.processes):
            if process.exitcode is None or rank in self._failures or rank in self._results:
                continue
            if process.exitcode < 0:
                how[rank] = f"was killed by {signal.Signals(-process.exitcode).name}"
            else:
                how[rank] = f"exited with code {process.exitcode}"
        return how

    def _diagnose(self) -> RankError:
        """Somebody failed: finds out who was first. A rank that only lost its peer is not."""
        doings = self._doings()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            if self._dead() or any(not lost for _, _, lost in self._failures.values()):
                break
            wait(list(self._lines.values()), deadline - time.monotonic())
            for rank, line in list(self._lines.items()):
                self._read(rank, line)
        if dead := self._dead():
            first = min(dead)
            text = f"rank {first} of {self.ranks} {dead[first]} while it {doings[first]}"
            return RankError(self._and_others(text, {first}, doings), first)
        own = [rank for rank, (_, _, lost) in self._failures.items() if not lost]
        if own:
            trace, summary, _ = self._failures[own[0]]
            text = f"rank {own[0]} of {self.ranks} raised {summary}\n\n{trace.rstrip()}\n"
            return RankError(self._and_others(text, {own[0]}, doings), own[0])
        text = "ranks waited for each other in vain:"
        for _, summary, _ in self._failures.values():
            text += f"\n  {summary.removeprefix('CommError: ')}"
        return RankError(self._and_others(text, set(self._failures), doings, stacks=True), min(self._failures))

    def _timed_out(self, timeout: float | None) -> RankError:
        text = f"not finished after {timeout:g} s:"
        return RankError(self._and_others(text, set(self._results), self._doings(), stacks=True), None)

    def _doings(self) -> list[board.Doing]:
        return board.read(self._folder / "board", self.ranks)

    def _and_others(self, text: str, named: set[int], doings: list[board.Doing], *, stacks: bool = False) -> str:
        """`text`, and a line on every rank that isn't `named` in it; with `stacks`, where its Python code stands."""
        others = [rank for rank in range(self.ranks) if rank not in named and rank not in self._results]
        where = self._stacks(others) if stacks else {}
        for rank in others:
            text += f"\n  rank {rank} {doings[rank]}"
            text += "".join(f"\n    {line}" for line in where.get(rank, []))
        return text

    def _stacks(self, ranks: list[int]) -> dict[int, list[str]]:
        """Asks ranks where their main thread is: innermost frames first."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.2)
        found = {}
        for rank in ranks:
            lines = (self._folder / f"stack-{rank}").read_text().splitlines()[1:]
            ours = [line.strip() for line in lines if "/labkit/launch/" not in line and "multiprocessing" not in line]
            found[rank] = ours[:4]
        return found


def run(
    fn: Callable[..., Any],
    ranks: int | None = None,
    timeout: float = 60.0,
    *,
    args: tuple[Any, ...] = (),
    layout: Layout | None = None,
    threads: int | None = None,
    collective_timeout: float = 10.0,
) -> list[Any]:
    """Calls `fn(comm, *args)` on fresh local ranks; what they return, in rank order.

    Args:
        fn: any function, also one defined in a notebook or a lambda.
        ranks: how many (default: what `layout` needs, else 2).
        timeout: seconds for everything; collective_timeout: seconds that one operation between ranks may wait.
        layout: the ranks' grid (default: one tensor-parallel group of all).
        threads: torch threads of each rank (default: the cores shared out).

    Raises RankError when a rank raises, dies, or doesn't finish in time; no rank is left then.
    """
    ranks = ranks if ranks is not None else layout.world if layout else 2
    with RankGroup(
        _call, ranks, args=(fn, args), layout=layout, threads=threads, collective_timeout=collective_timeout
    ) as group:
        return group.results(timeout)


def _call(comm: Comm, channel: Channel, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(comm, *args)


def threads_per_rank(ranks: int) -> int:
    """Usable cores shared out among `ranks`, at least 1."""
    return max(1, usable_cores() // ranks)


def oversubscribed(ranks: int) -> bool:
    """More ranks than devices (GPUs where there are some, else cores): their times say little."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ranks > (gpus or usable_cores())


def in_torchrun() -> bool:
    """Whether this process is a rank that torchrun (or the like) has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def join_torchrun(layout: Layout, threads: int, collective_timeout: float = 60.0) -> Comm:
    """Joins the ranks that torchrun has started, in place. Raises LayoutError when their number isn't the layout's."""
    world = int(os.environ["WORLD_SIZE"])
    if world != layout.world:
        raise LayoutError(
            f"torchrun started {world} ranks; tp={layout.tp} x pp={layout.pp} x dp={layout.dp} needs {layout.world}"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    rank = int(os.environ["RANK"])
    return join(rank, local_rank, local_ranks, layout, None, threads, collective_timeout, meter=True, board=None)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps new processes from importing the user's script again, which would start ranks from within ranks.

    What they need of it travels by value (cloudpickle), so a script needs no `if __name__ == "__main__"`.
    """
    module = sys.modules["__main__"]
    hidden = {name: getattr(module, name) for name in ("__spec__", "__file__") if hasattr(module, name)}
    try:
        module.__spec__ = None
        if "__file__" in hidden:
            del module.__file__
        yield
    finally:
        for name, value in hidden.items():
            setattr(module, name, value)


def _end(processes: ProcessContext, lines: list[Connection], folder: Path, patience: float = 1.0) -> None:
    """Hangs up, upon which ranks that are idle or done end by themselves; ends the others after `patience` seconds."""
    for line in lines:
        line.close()
    for seconds, signal_number in ((patience, signal.SIGTERM), (0.5, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        while (alive := [p for p in processes.processes if p.exitcode is None]) and time.monotonic() < deadline:
            wait([p.sentinel for p in alive], max(0.0, deadline - time.monotonic()))
        for process in alive:
            os.kill(process.pid, signal_number)
    for process in processes.processes:
        process.join()
    shutil.rmtree(folder, ignore_errors=True)
