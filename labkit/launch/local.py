"""Local ranks: started in a tenth of a second, watched, and ended together.

`run` calls a function on fresh ranks; `RankGroup` keeps ranks that take messages. torch.multiprocessing starts and ends the
processes, forked from a server that has imported torch once (the first start takes the 2 s that this needs). A rank that
raises, dies or hangs ends the others, and one `RankError` says which it was, what it was doing, and who waited for whom.
"""

import contextlib
import linecache
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Container, Iterator
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import psutil
from torch.multiprocessing.spawn import ProcessContext, start_processes

from labkit.comm import Comm
from labkit.launch import in_torchrun, prepare
from labkit.launch.board import Board, Doing
from labkit.launch.rank import Channel, Failure, Frame, Job, Wiring, join_torchrun, main
from labkit.links import Link, LinkError, Network
from labkit.measure.machine import core_ids, usable_cores
from labkit.mesh import Layout, pick_backend
from labkit.split import LayoutError

__all__ = ["RankError", "RankGroup", "in_torchrun", "join_torchrun", "oversubscribed", "run", "threads_per_rank"]

EVIDENCE = 0.5  # seconds to wait for a rank's own failure after another only lost its peer
GRACE = 0.5  # seconds that ranks get to end by themselves
PATIENCE = 2.0  # seconds to find out how a rank ended whose pipe has closed
LOOK = 1.0  # seconds between two looks at ranks that may hang
IDLE = 0.02  # a rank that uses less than this part of a core does not compute
TRICKLE = 1000  # bytes per second that say no more than that a link is there: the slowest one carries 125,000
_FORKING = threading.Lock()
_NOT_THE_USERS = (
    "/labkit/launch/",
    "/labkit/lab/",
    "/labkit/comm.py",
    "/site-packages/",
    os.path.dirname(os.__file__) + "/",
    "<",
)


class RankError(RuntimeError):
    """Ranks failed; all of them have ended. The message is for reading: what happened, who waited for whom, a traceback.

    Attributes:
        rank: the first rank that failed, None if none did (the time was up).
        how: "raised", "killed", "exited", "hung", or "timeout".
        kind: the name of the exception's class, where one was raised.
        outputs: from `LLM.generate`, what there was of each prompt's outputs, but for the last moment; "error" is the
            finish_reason of those cut off.
    """

    def __init__(self, message: str, rank: int | None = None, how: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.rank, self.how, self.kind = rank, how, kind
        self.outputs: list[Any] = []

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of the launcher's own traceback, which says nothing about the ranks."""
        return f"RankError: {self}".splitlines()


class RankGroup:
    """Ranks that stay: each calls `fn(comm, channel, *args)`, with `channel.receive()` and `channel.send(message)`.

    `channel.receive()` raises EOFError when the group is closed. Close it, use it as a context manager, or drop it.

    Args:
        fn: any function, also a lambda or one from a notebook; it travels by value, with what it refers to.
        ranks: how many. layout: their grid (default: one tensor-parallel group).
        threads: torch threads of each (default: the cores shared out). Each is pinned to cores of its own if these suffice.
        collective_timeout: seconds that an operation between ranks may wait. start_timeout: that ranks may need to be up.
        hang_timeout: that a rank may be stopped, or neither wait for anybody nor compute, or that all may wait for each other
            (default: as long as they like).
        meter: count operations. shared_memory: use it between the ranks, not sockets alone.
        overlap: operations are to go on while the ranks compute.
        link: one to emulate between CPU ranks, as "1gbit": by the kernel, or where it refuses, or LABKIT_LINKS=software is set,
            by waiting.

    Attributes:
        link_label: the link, how it is emulated, and why not by the kernel; for figures and tables. Empty without one.

    Raises ValueError or LayoutError before anything is started, TypeError if `fn` or `args` cannot be pickled, OSError where the
    folder for temporary files is full, RankError from any method when a rank fails.
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
        start_timeout: float = 60.0,
        hang_timeout: float | None = None,
        meter: bool = True,
        shared_memory: bool = True,
        overlap: bool = False,
        link: Link | str | None = None,
    ) -> None:
        if not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"ranks={ranks!r}: use 1 or more")
        layout = layout or Layout(tp=ranks)
        if layout.world != ranks:
            raise LayoutError(f"ranks={ranks} does not fit tp={layout.tp} x pp={layout.pp} x dp={layout.dp}")
        try:
            work = cloudpickle.dumps((fn, args))
        except Exception as error:  # whatever a __reduce__ raises
            raise TypeError(f"{fn!r} and its arguments cannot be sent to ranks: {error}") from error
        link = Link.parse(link) if isinstance(link, str) else link
        network, self.link_label = _emulate(link, ranks)
        self.ranks, self._hang_timeout = ranks, hang_timeout
        self._still: dict[int, _Still] = {}
        self._deadlock: tuple[float, list[float], int] | None = None  # seen when, all waiting since, bytes received
        self._network, self._delayed = network, link is not None and network is None
        self._looked = 0.0
        self._inbox: deque[tuple[int, Any]] = deque()
        self._up: set[int] = set()
        self._done: set[int] = set()
        self._failures: dict[int, Failure] = {}  # in the order in which they became known
        wiring = Wiring(
            layout, threads or self._threads(), core_ids(), collective_timeout, start_timeout, meter,
            shared_memory, overlap, link=link,
            namespaces=[network.where(rank) for rank in range(ranks)] if network else None,
        )  # fmt: skip
        environ = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
        sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
        self._links: dict[int, Connection] = {}
        self._sentinels: dict[int, int] = {}
        self._files: list[Any] = [network] if network else []
        with _unbroken():
            self._folder = Path(tempfile.mkdtemp(prefix="labkit-"))
            end, resources = self._ending()
            # multiprocessing's own finalizer: it also runs before multiprocessing joins children at exit.
            self._finalizer = util.Finalize(self, end, resources, exitpriority=100)
        try:
            with _unbroken():
                try:
                    self._board = Board(self._folder / "board", ranks)
                except OSError as error:
                    where = f"{self._folder.parent}, where ranks meet (TMPDIR can name another folder)"
                    raise OSError(error.errno, f"{error.strerror}: {where}") from error
                self._files.append(self._board)
                self._start(Job(work, wiring, self._folder, environ, sources))
            self._until(lambda: len(self._up) == ranks, start_timeout, f"not all ranks up after {start_timeout:g} s")
        except BaseException:
            self._end()
            raise

    def _threads(self) -> int:
        return threads_per_rank(self.ranks)

    def _ending(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """What ends the ranks, and its arguments, into which goes what has been started."""
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        return _end, (self._processes, self._pipes, self._files, self._folder)

    def _start(self, job: Job) -> None:
        """Starts the ranks."""
        pipes = [multiprocessing.Pipe() for _ in range(self.ranks)]
        self._pipes += [here for here, _ in pipes]
        theirs = [there for _, there in pipes]
        self._links |= enumerate(self._pipes)
        context = fork(main, (job, theirs), self.ranks)
        for their in theirs:
            their.close()
        self._processes += context.processes
        self.pids = context.pids()
        self._sentinels |= {process.sentinel: rank for rank, process in enumerate(context.processes)}

    def send(self, message: Any) -> None:
        """One message to every rank."""
        raw = cloudpickle.dumps(message)
        for link in list(self._links.values()):  # another thread may be receiving
            with contextlib.suppress(OSError):  # a dead rank is for the next receive to report
                link.send_bytes(raw)

    def receive(self, timeout: float | None = None) -> tuple[int, Any]:
        """The next (rank, message) from any rank, waiting up to `timeout` seconds; prints meanwhile what ranks print."""
        self._until(lambda: bool(self._inbox), timeout, f"nothing received after {timeout or 0:g} s")
        return self._inbox.popleft()

    def close(self) -> None:
        """Ends the ranks; when it returns nothing of them is left."""
        if not self._finalizer.still_active():
            return
        try:
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.send_bytes(b"")
            deadline = time.monotonic() + GRACE
            while self._sentinels and time.monotonic() < deadline:
                self._listen(deadline - time.monotonic())
        finally:
            self._end()

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        with _unbroken():
            self._finalizer()

    # -- watching ------------------------------------------------------------------------------------------------------

    def _until(self, enough: Callable[[], bool], timeout: float | None, late: str) -> None:
        """Takes in what ranks say until `enough()`. Whatever goes wrong meanwhile, no rank survives it."""
        if not self._finalizer.still_active():
            raise ValueError("this group of ranks is closed")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not enough():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    text = self._tell(f"{late}:", self._board.read(), time.monotonic())
                    raise RankError(text, how="timeout") from TimeoutError(late)
                self._listen(left if self._hang_timeout is None else min(LOOK, left or LOOK))
                if self._failures:
                    raise self._diagnose()
                if self._hang_timeout is not None:
                    self._look(self._hang_timeout)
        except BaseException:
            self._end()
            raise

    def _listen(self, timeout: float | None) -> None:
        """Waits until a rank says something or ends, and takes it in."""
        ready = wait([*self._links.values(), *self._sentinels], timeout)
        for rank, link in list(self._links.items()):
            if link in ready:
                self._read(rank, link)
        for rank in sorted(self._sentinels.pop(each) for each in ready if isinstance(each, int)):
            while rank in self._links and self._links[rank].poll():  # what it said before it ended
                self._read(rank, self._links[rank])
            self._gone(rank)

    def _read(self, rank: int, link: Connection) -> None:
        """Takes in one message, or that there will be none: then its process has ended, or is about to."""
        try:
            raw = link.recv_bytes()
        except (EOFError, OSError):
            del self._links[rank]
            self._gone(rank)
            return
        self._take(rank, *pickle.loads(raw))

    def _gone(self, rank: int) -> None:
        if rank not in self._done and rank not in self._failures:
            self._failures[rank] = self._ended(rank)

    def _ended(self, rank: int) -> Failure:
        """How a rank ended."""
        code = _exit_code(self._processes[rank], PATIENCE)
        if code is None:
            return Failure("exited", " has gone, and nothing tells how", True)
        if code < 0:
            return Failure("killed", f" was killed by {signal.Signals(-code).name}", True)
        return Failure("exited", f" exited with code {code}", True)

    def _take(self, rank: int, kind: str, value: Any) -> None:
        match kind:
            case "message":
                self._inbox.append((rank, value))
            case "stdout" | "stderr":
                stream = getattr(sys, kind)
                stream.write("".join(f"[rank {rank}] {line}\n" for line in value))
                stream.flush()
            case "ready":
                self._up.add(rank)
            case "done":
                self._done.add(rank)
            case "failed":
                self._failures[rank] = value

    def _look(self, limit: float) -> None:
        """Raises if a rank hangs: if others wait for it, that would show only when they give up, which may be much later."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        if now - self._looked > 3 * LOOK:  # nobody looked: what was seen before says nothing about the time between
            self._still.clear()
            self._deadlock = None
        self._looked = now
        doings = self._board.read()
        for rank, pid in enumerate(self.pids):
            try:
                process = psutil.Process(pid)
                status, used = process.status(), sum(process.cpu_times()[:2])
            except psutil.Error:  # it has just ended
                continue
            stopped, since = status == psutil.STATUS_STOPPED, doings[rank].since
            excused = doings[rank].waiting or status in (psutil.STATUS_DISK_SLEEP, psutil.STATUS_TRACING_STOP)
            still = self._still.get(rank, _Still(now, since, used))
            if used - still.used > IDLE * (now - still.at) or since != still.since or (excused and not stopped):
                still = _Still(now, since, used)
            elif now - still.at >= limit and (stopped or rank in self._up):
                did = "has been stopped (SIGSTOP)" if stopped else "has neither waited for another rank nor computed"
                text = f"rank {rank} of {self.ranks} hangs: for {now - still.at:.0f} s it {did}:"
                raise RankError(self._tell(text, doings, now), rank, "hung")
            self._still[rank] = still
        waiting = [doing for rank, doing in enumerate(doings) if rank not in self._done]
        if self._delayed or not all(doing.waiting and doing.number for doing in waiting):
            self._deadlock = None
            return
        sinces, received = [doing.since for doing in waiting], self._received()
        began, before, then = self._deadlock or (now, sinces, received)
        if sinces != before or received - then > TRICKLE * (now - began):
            began, then = now, received
        elif now - began >= limit:
            text = f"ranks have waited for each other for {now - began:.0f} s:"
            raise RankError(self._tell(text, doings, now), how="hung")
        self._deadlock = began, sinces, then

    def _received(self) -> int:
        """Bytes that have come over an emulated link, on all ranks together."""
        total = 0
        for pid in self.pids if self._network else ():
            with contextlib.suppress(OSError):  # it has just ended
                lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
                total += sum(int(line.split(":")[1].split()[0]) for line in lines if "eth0:" in line)
        return total

    # -- explaining ----------------------------------------------------------------------------------------------------

    def _diagnose(self) -> RankError:
        """Somebody failed. Finds out who was first: not a rank that only lost another one."""
        doings, seen = self._board.read(), time.monotonic()
        settled = seen + EVIDENCE
        while len(self._failures) < self.ranks:
            if any(failure.own for failure in self._failures.values()):
                settled = min(settled, time.monotonic() + 0.05)  # often all ranks raise the same: name the lowest
            left = settled - time.monotonic()
            if left <= 0:
                break
            self._listen(left)
        own = [rank for rank, failure in self._failures.items() if failure.own]
        if not own:
            first = min(self._failures, key=lambda rank: "by peer" in self._failures[rank].text)
            text = self._tell("ranks waited for each other in vain:", doings, seen, explain_lost=True)
        else:
            first = min(rank for rank in own if self._failures[rank].text == self._failures[own[0]].text)
            failure, doing = self._failures[first], doings[first]
            text = f"rank {first} of {self.ranks}{failure.text}"
            if failure.how != "raised":
                text += f" while it {doing.describe(seen)}"
            text += _at(failure.frames or self._stack(first))
            if failure.text.endswith("SIGABRT") and doing.waiting:
                text += (
                    "\n  gloo does this when more arrives than was asked for: another operation, or a larger tensor."
                )
            text = self._tell(text, doings, seen, {first})
        failure = self._failures[first]
        if failure.trace:
            text += f"\n\nOn rank {first}: {failure.trace.rstrip()}"
        return RankError(text, first, failure.how, failure.kind)

    def _tell(
        self, text: str, doings: list[Doing], seen: float, told: Container[int] = (), *, explain_lost: bool = False
    ) -> str:
        """`text`, and a line or two on every rank but those `told` of: what it did when `seen`, and where in whose code."""
        running = self._up - self._done - self._failures.keys()
        self._ask_for_stacks(running)
        for rank in sorted(set(range(self.ranks)) - self._done):
            failure, said = self._failures.get(rank), " " + doings[rank].describe(seen)
            if failure and (failure.own or explain_lost or not doings[rank].waiting):
                said = failure.text
            frames = failure.frames if failure else self._stack(rank, 0.3) if rank in running else ()
            if rank not in told:
                text += f"\n  rank {rank}{said}" + _at(frames, "\n    ")
        text += "".join(f"\n  rank {rank} had returned" for rank in sorted(self._done))
        if len({doing.text for doing in doings if doing.waiting and doing.number}) > 1:
            text += (
                "\n  These are different operations: all ranks of a group must call the same ones in the same order."
            )
        return text

    def _ask_for_stacks(self, ranks: set[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(OSError):
                os.kill(self.pids[rank], signal.SIGUSR1)  # faulthandler writes it

    def _stack(self, rank: int, patience: float = 0) -> tuple[Frame, ...]:
        """What faulthandler has written of a rank: the innermost frame first. Nothing, where it ended before it had begun."""
        file, deadline = self._folder / f"stack-{rank}", time.monotonic() + patience
        while time.monotonic() < deadline and not (file.exists() and file.stat().st_size):
            time.sleep(0.01)
        text = file.read_text(errors="replace") if file.exists() else ""
        return tuple(re.findall(r'File "(.+)", line (\d+) in (.+)', text))


class _Still(NamedTuple):
    """A rank that has done nothing since `at` (time.monotonic()): what its board said then; seconds of a core it had used."""

    at: float
    since: float
    used: float


def _at(frames: tuple[Frame, ...], lead: str = "\n  ") -> str:
    """The innermost of `frames` that is neither ours nor a library's, with its source."""
    for name, line, function in frames:
        if not any(part in name for part in _NOT_THE_USERS):
            source = linecache.getline(name, int(line)).strip()
            return f'{lead}File "{name}", line {line}, in {function}' + (f": {source}" if source else "")
    return ""


def run(
    fn: Callable[..., Any],
    ranks: int | None = None,
    timeout: float = 60.0,
    *,
    args: tuple[Any, ...] = (),
    layout: Layout | None = None,
    threads: int | None = None,
    collective_timeout: float = 10.0,
    shared_memory: bool = True,
    overlap: bool = False,
    link: Link | str | None = None,
    launcher: str = "local",
) -> list[Any]:
    """Calls `fn(comm, *args)` on fresh ranks; what they return, in rank order (tensors as copies).

    Args:
        fn: any function, also a lambda or one from a notebook; it travels by value, with what it refers to.
        ranks: how many (default: what `layout` needs, else 2). layout: their grid (default: one tensor-parallel group).
        timeout: seconds for all of it, from when the ranks are up. collective_timeout: for one operation between ranks.
        threads: torch threads of each (default: the cores shared out). shared_memory: use it between the ranks.
        overlap: operations are to go on while the ranks compute. link: one to emulate between them, as RankGroup does.
        launcher: "local", or "ray": on the nodes of a Ray cluster (`labkit.launch.ray`).

    Raises RankError when a rank raises, dies, or does not finish in time; otherwise as RankGroup does.
    """
    ranks = ranks if ranks is not None else layout.world if layout else 2
    with launchers(launcher)(
        _call, ranks, args=(fn, args), layout=layout, threads=threads, collective_timeout=collective_timeout,
        shared_memory=shared_memory, overlap=overlap, link=link,
    ) as group:  # fmt: skip
        group._until(lambda: len(group._inbox) == ranks, timeout, f"not finished after {timeout:g} s")
        values = dict(group._inbox)
    return [values[rank] for rank in range(ranks)]


def launchers(name: str) -> type[RankGroup]:
    """What starts ranks: "local" or "ray". Raises ValueError for another name, ImportError where Ray isn't installed."""
    if name == "local":
        return RankGroup
    if name == "ray":
        from labkit.launch.ray import RayGroup

        return RayGroup
    raise ValueError(f"launcher={name!r}: use 'local' or 'ray'")


def _call(comm: Comm, channel: Channel, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    channel.send(fn(comm, *args))


def threads_per_rank(ranks: int) -> int:
    """Usable cores shared out among `ranks`, at least 1."""
    return max(1, usable_cores() // ranks)


def oversubscribed(ranks: int) -> bool:
    """Whether `ranks` are more than the devices (GPUs where there are some, else usable cores): their times say little."""
    backend, kind = pick_backend(ranks)
    return backend != "nccl" if kind == "cuda" else ranks > usable_cores()


def fork(fn: Callable[..., None], args: tuple[Any, ...], processes: int = 1) -> ProcessContext:
    """Processes, forked from the server, that call `fn(number, *args)`.

    multiprocessing is shown an empty `__main__`: it would import the user's in each of them, which runs an unguarded script once
    more. What they need of it travels by value.
    """
    with _FORKING:
        main_module = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            prepare()
            return start_processes(fn, args, processes, join=False, start_method="forkserver")
        finally:
            sys.modules["__main__"] = main_module


def _emulate(link: Link | None, ranks: int) -> tuple[Network | None, str]:
    """The network whose namespaces ranks are to enter, if any, and a label. Raises ValueError where no link can be emulated."""
    if link is None:
        return None, ""
    if in_torchrun() or pick_backend(ranks)[1] != "cpu":
        where = "torchrun's ranks" if in_torchrun() else "GPUs"
        raise ValueError(f"link={str(link)!r} on {where}: links are emulated between local CPU ranks only")
    try:
        if os.environ.get("LABKIT_LINKS") == "software":
            raise LinkError("LABKIT_LINKS=software")
        return Network(link, ranks), f"{link.label}, tc tbf in network namespaces"
    except LinkError as error:
        return None, f"{link.label}, software-emulated ({error})"


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """Puts off Ctrl-C until the end of what must not stay half done. A second one does not wait."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[Any] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        caught.append(frame)
        if len(caught) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(caught) == 1:
            handler(signal.SIGINT, caught[0])


def _exit_code(process: Any, patience: float) -> int | None:
    """How a process ended (a signal as a negative number), None if it has not within `patience` seconds, or nothing tells.

    The kernel is asked too: the fork server, whose child it is, tells nothing while it is stopped or held up.
    """
    deadline = time.monotonic() + patience
    while process.exitcode is None and time.monotonic() < deadline:
        process.join(0.1)
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()  # proc(5), from field 3
            if status[0] == "Z":
                return os.waitstatus_to_exitcode(int(status[49]))
    return process.exitcode


def _end(processes: list[Any], links: list[Connection], files: list[Any], folder: Path) -> None:
    """Ends ranks whatever they are doing. Those whose fork server has ended do so when their pipes close.

    Only then are pipes closed: another thread may be writing to one, and would write into what next has its number.
    """
    with _unbroken():
        for process in processes:
            process.kill()
        for process in processes:
            while _exit_code(process, PATIENCE) is None and psutil.pid_exists(process.pid):
                pass
        for each in (*processes, *links, *files):
            with contextlib.suppress(ValueError):  # a process of which the fork server has not told that it ended
                each.close()
        shutil.rmtree(folder, ignore_errors=True)
